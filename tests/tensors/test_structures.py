"""N:M against a loop; stripes are positions of filters; pieces of any size are ranked by their mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ModelError
from tersor.tensors.structures import STRUCTURES, n_m_mask, n_m_removed


def n_m_by_loop(saliency, kept, of):
    mask = torch.zeros_like(saliency, dtype=torch.bool)
    for output in range(saliency.shape[0]):
        for place in range(saliency.shape[2]):
            for start in range(0, saliency.shape[1], of):
                run = range(start, min(start + of, saliency.shape[1]))
                wanted = math.ceil(len(run) * kept / of)
                order = sorted(run, key=lambda i: (-float(saliency[output, i, place]), -i))
                for index in order[:wanted]:
                    mask[output, index, place] = True
    return mask


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_n_m_is_what_a_loop_finds(data):
    of = data.draw(st.integers(2, 9))
    kept = data.draw(st.integers(1, of - 1))
    inputs = data.draw(st.integers(1, 20))
    values = st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=6 * inputs, max_size=6 * inputs
    )
    saliency = torch.tensor(data.draw(values)).view(3, inputs, 2)
    mask = n_m_mask(saliency, kept, of)
    assert torch.equal(mask, n_m_by_loop(saliency, kept, of))
    assert int((~mask).sum()) == 6 * n_m_removed(inputs, kept, of)


def test_n_m_of_a_linear_layer_runs_along_its_inputs():
    saliency = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0, 8.0]])
    assert n_m_mask(saliency, 2, 4).tolist() == [[False, True, True, False, True, False]]


def test_nan_in_a_pattern_is_refused():
    with pytest.raises(ModelError, match="NaN"):
        n_m_mask(torch.tensor([[1.0, float("nan")]]), 1, 2)


def test_a_stripe_is_one_position_of_one_filter():
    saliency = torch.ones(3, 4, 2, 2)
    saliency[1, :, 0, 1] = 0.1
    saliency[2, 0, 1, 1] = 0.0  # one weak weight does not make a weak stripe
    stripe = STRUCTURES["stripe"]
    assert stripe.piece_size(saliency.shape) == 4
    mask = stripe.mask(saliency, 7)  # one whole stripe fits
    expected = torch.ones(3, 4, 2, 2, dtype=torch.bool)
    expected[1, :, 0, 1] = False
    assert torch.equal(mask, expected)
    assert "one position" in stripe.problem(torch.Size([3, 4, 1, 1]))
    assert "one position" in stripe.problem(torch.Size([3, 4]))
    assert not stripe.problem(torch.Size([3, 4, 3, 1]))


def test_pieces_of_different_size_are_ranked_by_their_mean():
    stripe = STRUCTURES["stripe"]
    narrow, wide = torch.full((2, 3, 3), 2.0), torch.full((2, 50, 3), 1.0)
    assert (stripe.per_weight(narrow) == 2).all() and (stripe.per_weight(wide) == 1).all()
    single = torch.rand(4, 5)
    assert torch.equal(STRUCTURES["unstructured"].per_weight(single), single)
