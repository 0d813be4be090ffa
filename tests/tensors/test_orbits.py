"""Filters that follow from others: planted orbits are found, the fit is least squares, pairing is near the best."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tersor.errors import ModelError, SpecError
from tersor.specs.share import TRANSFORMS
from tersor.tensors.orbits import ORBITS, _lost, _matched, fit_orbits, num_images

EACH = pytest.mark.parametrize("transform", list(ORBITS))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(fitted, weight):
    return float((fitted.filters() - weight).square().sum() / weight.square().sum())


def test_the_request_and_the_registry_have_the_same_names():
    assert set(TRANSFORMS) == set(ORBITS)


@EACH
def test_images_are_isometries_their_own_inverse_and_the_first_is_the_filter(transform):
    filters = normal(5, 3, 3, 4)
    images = ORBITS[transform](filters)
    assert len(images) == num_images(transform)
    assert torch.equal(images[0], filters)
    for number, image in enumerate(images):
        assert torch.equal(ORBITS[transform](image)[number], filters)
        norms = image.flatten(1).norm(dim=1)
        assert torch.allclose(norms, filters.flatten(1).norm(dim=1))


@EACH
@pytest.mark.parametrize("stored", [1, 2, 9])
def test_planted_orbits_are_found_exactly(transform, stored):
    count = stored * num_images(transform)
    images = ORBITS[transform](normal(stored, 4, 3, 3)).flatten(0, 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    sizes = 0.5 + normal(count, seed=2).abs()
    signs = normal(count, seed=3).sign()
    weight = (images * (sizes * signs)[:, None, None, None])[order]
    fitted = fit_orbits(weight, transform)
    assert relative_error(fitted, weight) < 1e-20
    assert fitted.bases.shape == (stored, 4, 3, 3)


@EACH
def test_every_image_of_every_base_is_one_filter(transform):
    fitted = fit_orbits(normal(24, 4, 3, 3), transform)
    used = list(zip(fitted.source.tolist(), fitted.element.tolist(), strict=True))
    assert sorted(used) == [
        (s, e) for s in range(len(fitted.bases)) for e in range(24 // len(fitted.bases))
    ]


@EACH
def test_bases_and_scales_are_the_least_squares_of_their_orbits(transform):
    weight = normal(8, 3, 3, 3)
    fitted = fit_orbits(weight, transform)
    sizes = (fitted.bases.numel(), fitted.scale.numel())

    def error(values):
        bases, scale = torch.from_numpy(values).split(sizes)
        images = ORBITS[transform](bases.view_as(fitted.bases))[fitted.element, fitted.source]
        return float((images * scale[:, None, None, None] - weight).square().sum())

    start = torch.cat([fitted.bases.flatten(), fitted.scale]).numpy()
    better = minimize(error, start, method="L-BFGS-B", options={"maxiter": 50})
    assert better.fun >= error(start) * (1 - 1e-6)
    for seed in range(10):
        assert error(start + 0.05 * normal(len(start), seed=seed).numpy()) > error(start)


@EACH
def test_the_fit_beats_orbits_taken_as_they_come(transform):
    weight, images = normal(32, 4, 3, 3), num_images(transform)
    fitted = relative_error(fit_orbits(weight, transform), weight)
    taken = []
    for orbit in weight.split(images):
        turned = torch.stack([ORBITS[transform](f[None])[i][0] for i, f in enumerate(orbit)])
        values = torch.linalg.svdvals(turned.flatten(1))
        taken.append(float(values[1:].square().sum()))
    assert fitted < 0.95 * sum(taken) / float(weight.square().sum())


def best_pairing(cost):
    """The least cost of all perfect pairings, by trying them."""

    def least(left):
        if not left:
            return 0.0
        first, *others = left
        return min(
            cost[first, other] + least([o for o in others if o != other]) for other in others
        )

    return least(list(range(len(cost))))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 6, 8]))
def test_pairing_uses_each_once_and_is_the_best_or_close(seed, count):
    filters = normal(count, 2, 2, 2, seed=seed)
    cost = _lost(filters, filters)
    pairs = _matched(cost, np.random.default_rng(0)).numpy()
    assert sorted(pairs.ravel().tolist()) == list(range(count))
    found = cost[pairs[:, 0], pairs[:, 1]].sum()
    assert found <= 1.15 * best_pairing(cost) + 1e-12


def test_what_two_filters_lose_is_their_second_singular_value():
    filters = normal(5, 3, 3, 3)
    lost = _lost(filters, filters.flip(-1))
    for i in range(5):
        for j in range(5):
            pair = torch.stack([filters[i], filters[j].flip(-1)]).flatten(1)
            assert lost[i, j] == pytest.approx(float(torch.linalg.svdvals(pair)[1]) ** 2, abs=1e-10)


@EACH
def test_same_seed_same_answer_and_zeros_are_exact(transform):
    weight = normal(16, 3, 3, 3)
    first, second = fit_orbits(weight, transform, seed=3), fit_orbits(weight, transform, seed=3)
    assert torch.equal(first.filters(), second.filters())
    weight[4:] = 0
    fitted = fit_orbits(weight, transform)
    assert torch.isfinite(fitted.filters()).all()
    assert torch.equal(fit_orbits(0 * weight, transform).filters(), 0 * weight)


@EACH
def test_filters_that_cannot_be_are_refused(transform):
    with pytest.raises(SpecError, match=r"7 filters are no multiple of"):
        fit_orbits(normal(7, 3, 3, 3), transform)
    weight = normal(8, 3, 3, 3)
    weight[1, 1, 1, 1] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        fit_orbits(weight, transform)
