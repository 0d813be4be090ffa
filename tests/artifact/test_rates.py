"""What codes would take: the lengths add up to the section, and say what changing a code costs."""

import numpy as np
import pytest

from tersor.artifact.encodings.codes import Codes
from tersor.artifact.rates import code_lengths, coded_bytes


def codes_of(seed, shape, spread=1.0):
    rng = np.random.default_rng(seed)
    scale = rng.random((shape[0], *[1] * (len(shape) - 1))) + 0.2
    return np.clip(np.round(rng.laplace(0, spread, shape) * scale), -7, 7).astype(np.int8)


@pytest.mark.parametrize("shape", [(48, 40, 3, 3), (64, 200), (30, 100, 1, 1)], ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_lengths_add_up_to_the_section(shape, spread):
    codes = codes_of(0, shape, spread)
    values = np.arange(-7, 8)
    lengths = code_lengths(codes, values)
    assert lengths.shape == (15, *shape) and (lengths >= 0).all()
    own = np.take_along_axis(lengths, codes[None].astype(np.int64) + 7, axis=0)
    assert own.sum() / 8 == pytest.approx(len(Codes.encode(codes)), rel=0.02, abs=40)
    assert coded_bytes(codes) <= len(Codes.encode(codes)) <= coded_bytes(codes, quick=True)


def test_the_lengths_of_all_values_are_a_probability():
    codes = codes_of(1, (40, 30, 3, 3))
    lengths = code_lengths(codes, np.arange(-7, 8))
    total = (2.0 ** -lengths.astype(np.float64)).sum(axis=0)
    np.testing.assert_allclose(total, 1, atol=0.02)


def test_codes_chosen_by_their_length_make_a_smaller_file():
    codes = codes_of(2, (64, 48, 3, 3), 2.0)
    weights = codes + np.random.default_rng(3).uniform(-0.5, 0.5, codes.shape)
    values = np.arange(-7, 8)
    cost = (weights[None] - values.reshape(-1, 1, 1, 1, 1)) ** 2 + code_lengths(codes, values)
    chosen = values[cost.argmin(axis=0)].astype(np.int8)
    assert coded_bytes(chosen) < 0.9 * coded_bytes(codes)


def test_tensors_without_contexts_are_rated_by_frequency():
    codes = np.array([0, 0, 0, 1], np.int8)
    lengths = code_lengths(codes, np.array([0, 1, 2]))
    assert lengths.shape == (3, 4) and (np.diff(lengths[:, 0]) > 0).all()
