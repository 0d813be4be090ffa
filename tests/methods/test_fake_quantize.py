"""Learned steps: LSQ's formulas in float64, the exact grid, and starts of little error."""

import copy
import dataclasses as dc
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import SpecError
from tersor.methods import fake_quantize as fake
from tersor.methods.fake_quantize import (
    SMALLEST_STEP,
    LearnedStep,
    Levels,
    fake_quantize,
    fitted_steps,
    input_levels,
    weight_levels,
)
from tersor.tensors import affine

WEIGHTS = [(bits, "uniform") for bits in range(1, 9)] + [(2, "ternary"), (1, "binary")]
INPUTS = [input_levels(8, 0), input_levels(8, 128), input_levels(4, 3), input_levels(2, 0)]
ALL_LEVELS = [weight_levels(bits, code) for bits, code in WEIGHTS] + INPUTS
levels_of = pytest.mark.parametrize("levels", ALL_LEVELS, ids=str)


def codes_of(levels):
    return np.arange(levels.low, levels.high + 1, levels.spacing)


def noise(*shape, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(*shape, generator=generator)


def lsq(values, step, levels, gradient):
    """Output and both gradients by the formulas of the paper, value by value, in float64.

    Esser 2020: equation 1 and 2 (codes), 3 (slope of the step), 5 (of the value), section 2.2 (scale).
    """
    v = values.double().numpy() / step.double().numpy().reshape(-1, *[1] * (values.ndim - 1))
    choices = codes_of(levels).astype(np.float64)
    code = choices[np.abs(v[..., None] - choices).argmin(-1)]
    inside = (levels.low < v) & (v < levels.high)
    slope = np.where(v <= levels.low, levels.low, np.where(inside, code - v, levels.high))
    given_gradient = gradient.double().numpy()
    count = values[0].numel()
    scale = 1 / math.sqrt(count * max(-levels.low, levels.high))
    of_step = scale * (given_gradient * slope).reshape(len(values), -1).sum(1)
    size = step.double().numpy().reshape(-1, *[1] * (values.ndim - 1))
    return code * size, given_gradient * inside, of_step if step.ndim else of_step.sum()


@levels_of
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("chunk", [7, 1 << 17])
def test_output_and_gradients_are_those_of_the_paper(levels, per_row, chunk, monkeypatch):
    monkeypatch.setattr(fake, "CHUNK", chunk)
    values = noise(6, 5, 3, 3).requires_grad_()
    # Odd steps, so that no value lies half way between two codes.
    size = 1.3037 / levels.largest
    step = torch.full((6,) if per_row else (), size) * (1 + 0.1 * noise(6).abs() if per_row else 1)
    step.requires_grad_()
    gradient = noise(6, 5, 3, 3, seed=2)
    output = fake_quantize(values, step, levels)
    of_values, of_step = torch.autograd.grad(output, (values, step), gradient)
    wanted, wanted_values, wanted_step = lsq(values.detach(), step.detach(), levels, gradient)
    np.testing.assert_allclose(output.detach(), wanted, rtol=1e-6)
    np.testing.assert_allclose(of_values, wanted_values, rtol=1e-6)
    np.testing.assert_allclose(of_step, wanted_step, rtol=1e-4, atol=1e-5)
    assert of_step.shape == step.shape
    inside = (of_values != 0).float().mean()
    assert 0 < inside < 1, "values inside and outside the range were met"


def test_the_gradient_is_passed_to_what_needs_one_only():
    values, step = noise(4, 9), torch.tensor(0.1, requires_grad=True)
    output = fake_quantize(values, step, weight_levels(4))
    output.sum().backward()
    assert step.grad is not None and values.grad is None
    values.requires_grad_()
    fake_quantize(values, step.detach(), weight_levels(4)).sum().backward()
    assert values.grad is not None


@levels_of
@given(data=st.data())
def test_every_output_is_a_code_times_the_step_exactly(levels, data):
    size = data.draw(st.floats(2.0**-20, 2.0**10, width=32))
    numbers = data.draw(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
    values, step = torch.tensor(numbers)[None], torch.tensor(size)
    output = fake_quantize(values, step, levels).numpy()
    exact = codes_of(levels).astype(np.float32) * np.float32(size)
    assert np.isin(output, exact).all()


@pytest.mark.parametrize("bits", range(3, 9))
def test_weights_get_the_codes_of_the_pinned_formula(bits):
    weight = noise(50, 40)
    step = torch.tensor(0.037)
    high = 2 ** (bits - 1) - 1
    wanted = np.clip(affine.quantize(weight.numpy(), np.float32(0.037)), -high, high)
    found = fake_quantize(weight, step, weight_levels(bits)).numpy()
    assert np.array_equal(found, affine.dequantize(wanted, np.float32(0.037)))


@pytest.mark.parametrize("zero_point", [0, 100, 255])
def test_inputs_get_the_codes_of_the_pinned_formula(zero_point):
    values = noise(50, 40, size=4)
    scale, zero = np.float32(0.031), np.uint8(zero_point)
    codes = affine.quantize(values.numpy(), scale, zero, dtype=np.uint8)
    found = fake_quantize(values, torch.tensor(scale), input_levels(8, zero_point)).numpy()
    assert np.array_equal(found, affine.dequantize(codes, scale, zero))


def test_halves_and_zeros():
    step = torch.tensor(1.0)
    values = torch.tensor([[-2.5, -0.5, 0.0, 0.5, 1.5]])
    assert fake_quantize(values, step, weight_levels(4)).tolist() == [[-2, 0, 0, 0, 2]]
    values = torch.tensor([[-9.0, -2.0, -0.1, 0.0, 2.0, 9.0]])
    assert fake_quantize(values, step, weight_levels(2)).tolist() == [[-3, -1, -1, 1, 3, 3]]
    assert fake_quantize(values, step, weight_levels(1)).tolist() == [[-1, -1, -1, 1, 1, 1]]


@pytest.mark.parametrize(("bits", "code"), WEIGHTS)
def test_a_weight_has_as_many_codes_below_zero_as_above_and_no_more_than_its_bits(bits, code):
    codes = codes_of(weight_levels(bits, code))
    assert np.array_equal(codes, -codes[::-1]) and len(codes) <= 2**bits
    assert len(codes) >= 2**bits - 1 and codes.min() > -128 and codes.max() < 128


@pytest.mark.parametrize(
    ("bits", "code"), [(0, "uniform"), (9, "uniform"), (3, "ternary"), (2, "binary"), (4, "x")]
)
def test_bits_that_a_code_does_not_have_are_refused(bits, code):
    with pytest.raises(SpecError, match=f"{code!r} of {bits} bits; expected uniform of 1 to 8"):
        weight_levels(bits, code)


@pytest.mark.parametrize(("bits", "zero_point"), [(1, 0), (9, 0), (8, 256), (4, 16), (4, -1)])
def test_inputs_without_codes_are_refused(bits, zero_point):
    with pytest.raises(SpecError, match="2 to 8 bits and a zero point among its codes"):
        input_levels(bits, zero_point)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    values = noise(16, 33).bfloat16()
    step, levels = torch.tensor(0.0173), input_levels(8, 77)
    found = fake_quantize(values, step, levels)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fake_quantize(values.float(), step, levels).bfloat16())


def test_the_layout_of_the_values_is_kept():
    values = noise(2, 8, 5, 5).to(memory_format=torch.channels_last)
    found = fake_quantize(values, torch.tensor(0.1), weight_levels(8))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_an_empty_batch_passes():
    values = torch.zeros(0, 3, requires_grad=True)
    fake_quantize(values, torch.tensor(0.1), weight_levels(8)).sum().backward()
    assert values.grad.shape == (0, 3)


@pytest.mark.parametrize("start", [0.0, -0.25, 1e-30])
def test_the_step_in_use_is_positive(start):
    learned = LearnedStep(torch.tensor([start, 0.5]), weight_levels(4))
    assert learned.size.tolist() == [max(abs(start), SMALLEST_STEP), 0.5]
    assert torch.isfinite(learned(noise(2, 6))).all()


def test_a_learned_step_gives_its_codes_and_decays_as_no_weight_does():
    learned = LearnedStep(torch.tensor([0.2, 0.3]), weight_levels(3))
    values = noise(2, 4, 3)
    codes = learned.codes(values)
    assert torch.equal(learned(values), codes * learned.size[:, None, None])
    assert all(p.ndim <= 1 for p in learned.parameters())


def test_copies_and_states_hold_the_step_and_refuse_other_levels():
    learned = LearnedStep(torch.tensor([0.2, 0.3]), weight_levels(2))
    other = LearnedStep(torch.tensor([1.0, 1.0]), weight_levels(2))
    other.load_state_dict(learned.state_dict())
    values = noise(2, 9)
    assert torch.equal(other(values), learned(values))
    assert torch.equal(copy.deepcopy(learned)(values), learned(values))
    with pytest.raises(ValueError, match="expected"):
        LearnedStep(torch.ones(2), weight_levels(4)).load_state_dict(learned.state_dict())


def error_of(weight, step, levels):
    return (fake_quantize(weight, step, levels) - weight).square().flatten(1).sum(1)


@levels_of
def test_the_start_errs_little_more_than_the_best_step_of_a_fine_search(levels):
    if levels.low != -levels.high:
        return
    weight = torch.cat(
        [noise(3, 4, 5, 5), noise(3, 4, 5, 5, seed=1) ** 3, noise(1, 4, 5, 5) * 1e-5]
    )
    found = error_of(weight, fitted_steps(weight, levels), levels)
    largest = weight.abs().flatten(1).amax(1) / levels.high
    tried = torch.stack(
        [error_of(weight, largest * share, levels) for share in np.linspace(0.02, 1.2, 400)]
    )
    assert (found <= 1.3 * tried.amin(0)).all()


def test_one_bit_starts_at_the_mean_magnitude():
    weight = noise(5, 30)
    assert torch.allclose(fitted_steps(weight, weight_levels(1)), weight.abs().mean(1))


def test_rows_of_zeros_have_a_step_too():
    weight = torch.zeros(2, 3, 3, 3)
    weight[1] = 1.0
    steps = fitted_steps(weight, weight_levels(4))
    assert steps[0] == SMALLEST_STEP and torch.isfinite(steps).all()
    assert not fake_quantize(weight, steps, weight_levels(4))[0].any()


def test_levels_are_values():
    assert weight_levels(2) == Levels(-3, 3, 2) and dc.asdict(input_levels(2, 1)) == {
        "low": -1,
        "high": 2,
        "spacing": 1,
    }
