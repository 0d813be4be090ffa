"""Low rank against its theorems: Eckart and Young, the least change of outputs, Tucker's bounds, signal and noise."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import ModelError, SpecError, UnknownNameError
from tersor.tensors.factorize import (
    FACTORIZATIONS,
    ActivationAwareSvd,
    OutputMoments,
    Svd,
    Tucker2,
    balanced,
    rank_of_energy,
    vbmf_rank,
)

SHAPES = [
    (6, 10),
    (10, 6),
    (7, 7),
    (6, 4, 3, 3),
    (12, 2, 3, 3),
    (5, 8, 1, 1),
    (4, 6, 5),
    (4, 3, 2, 3, 2),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def columns_of(weight, seed=1, count=400):
    """Correlated inputs (K, count) with a mean: plain SVD and the best answer differ for them."""
    width = weight[0].numel()
    return normal(width, width, seed=seed) @ normal(width, count, seed=seed + 1) + 3 * normal(
        width, 1, seed=seed + 2
    )


def moments_of(outputs):
    mean = outputs.mean(dim=1)
    centred = outputs - mean[:, None]
    return OutputMoments(mean, centred @ centred.T / outputs.shape[1], outputs.shape[1])


def made(name, weight, bias=None, seed=1):
    outputs = weight.flatten(1) @ columns_of(weight, seed)
    if bias is not None:
        outputs = outputs + bias[:, None]
    return FACTORIZATIONS[name](weight, bias, moments_of(outputs))


def product(factors):
    """The weight (O, I, kernel) that layers in series compute; kernels of 1 but one."""
    parts = [part.flatten(2) if part.ndim > 2 else part[:, :, None] for part in factors.weights]
    result = parts[0]
    for part in parts[1:]:
        result = (
            torch.einsum("ri,sr->si", result[:, :, 0], part[:, :, 0])[:, :, None]
            if part.shape[2] == result.shape[2] == 1
            else torch.einsum("rik,srl->sikl", result, part).flatten(2)
        )
    return result.reshape(result.shape[0], result.shape[1], -1)


def weight_of(factors, weight):
    return product(factors).reshape(weight.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(FACTORIZATIONS))
def test_every_method_is_exact_at_full_rank(name, shape):
    weight, bias = normal(*shape), normal(shape[0], seed=5)
    factorization = made(name, weight, bias)
    factors = factorization.truncated([len(held) for held in factorization.energies])
    assert torch.allclose(weight_of(factors, weight), weight, atol=1e-9)
    assert torch.allclose(factors.bias, bias, atol=1e-9)
    assert all(part.dtype == torch.float64 for part in factors.weights)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(FACTORIZATIONS))
def test_every_method_has_its_ranks_and_falling_energies(name, shape):
    weight = normal(*shape)
    factorization = made(name, weight)
    for held in factorization.energies:
        assert torch.all(held >= 0) and torch.all(held.diff() <= 1e-9 * held[0])
    ranks = [max(1, len(held) // 2) for held in factorization.energies]
    factors = factorization.truncated(ranks)
    assert len(factors.weights) == len(ranks) + 1
    assert factors.weights[-1].shape[:2] == (shape[0], ranks[0])
    assert factors.weights[0].shape[:2] == (ranks[-1], shape[1])
    assert all(part.ndim == weight.ndim for part in factors.weights)
    matrix = weight_of(factors, weight).flatten(1)
    assert torch.linalg.matrix_rank(matrix, rtol=1e-9) <= ranks[0]


@pytest.mark.parametrize("name", list(FACTORIZATIONS))
def test_more_ranks_lose_less_and_components_have_equal_norms(name):
    weight = normal(8, 6, 3, 3)
    factorization = made(name, weight)
    columns = columns_of(weight)
    losses = []
    for rank in range(1, 7):
        factors = factorization.truncated([rank] * len(factorization.energies))
        error = (weight_of(factors, weight) - weight).flatten(1)
        if name == "activation_aware_svd":
            error = error @ (columns - columns.mean(dim=1, keepdim=True))
        losses.append(float(error.norm()))
        for first, second in itertools.pairwise(factors.weights):
            into = second.transpose(0, 1).flatten(1).norm(dim=1)
            if len(factors.weights) == 2:
                assert torch.allclose(first.flatten(1).norm(dim=1), into)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_svd_is_the_truncated_svd_of_the_library(shape):
    weight = normal(*shape)
    factorization = Svd(weight)
    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    assert torch.allclose(factorization.energies[0], values.square())
    for rank in (1, 2, len(values) - 1):
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.allclose(weight_of(factorization.truncated([rank]), weight).flatten(1), best)


def output_loss(weight, bias, other, other_bias, columns):
    """E ||y - y'||^2 over the columns."""
    change = (weight - other).flatten(1) @ columns + (bias - other_bias)[:, None]
    return float(change.square().sum(dim=0).mean())


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 4, 3, 3)], ids=str)
def test_activation_aware_svd_equals_whitened_truncation(shape):
    """The textbook form: truncate W L with the Cholesky factor L of the inputs' covariance, undo L."""
    weight, bias = normal(*shape), normal(shape[0], seed=5)
    columns, rank = columns_of(weight), 3
    centred = columns - columns.mean(dim=1, keepdim=True)
    root = torch.linalg.cholesky(centred @ centred.T / columns.shape[1])
    left, values, right = torch.linalg.svd(weight.flatten(1) @ root, full_matrices=False)
    whitened = left[:, :rank] * values[:rank] @ right[:rank] @ torch.linalg.inv(root)
    factorization = made("activation_aware_svd", weight, bias)
    factors = factorization.truncated([rank])
    assert torch.allclose(weight_of(factors, weight).flatten(1), whitened, atol=1e-8)
    lost = output_loss(weight, bias, weight_of(factors, weight), factors.bias, columns)
    assert lost == pytest.approx(float(values[rank:].square().sum()))
    assert lost == pytest.approx(float(factorization.energies[0][rank:].sum()))
    plain = Svd(weight, bias).truncated([rank])
    assert lost < output_loss(weight, bias, weight_of(plain, weight), bias, columns)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_no_perturbation_of_the_factors_changes_the_outputs_less(seed, size):
    weight, bias = normal(6, 9), normal(6, seed=5)
    columns = columns_of(weight)
    factors = made("activation_aware_svd", weight, bias).truncated([3])
    first, last = factors.weights
    best = output_loss(weight, bias, last @ first, factors.bias, columns)
    moved = (last + size * normal(*last.shape, seed=seed)) @ (
        first + size * normal(*first.shape, seed=seed + 1)
    )
    shift = size * normal(6, seed=seed + 2)
    assert best <= output_loss(weight, bias, moved, factors.bias + shift, columns) * (1 + 1e-12)


def test_dependent_inputs_do_no_harm():
    """Copies of one value: the covariance has no inverse, and rank 2 is exact on such inputs."""
    weight = normal(6, 9)
    columns = normal(9, 2, seed=3) @ normal(2, 200, seed=4)
    factors = ActivationAwareSvd(weight, None, moments_of(weight @ columns)).truncated([2])
    outputs = factors.weights[1] @ factors.weights[0] @ columns + factors.bias[:, None]
    assert torch.allclose(outputs, weight @ columns, atol=1e-9)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (5, 4), (8, 2)])
def test_tucker_keeps_the_bound_and_no_perturbation_is_nearer(ranks):
    weight = normal(8, 6, 3, 3)
    factorization = Tucker2(weight)
    error = (weight - weight_of(factorization.truncated(ranks), weight)).square().sum()
    tails = [held[rank:].sum() for held, rank in zip(factorization.energies, ranks, strict=True)]
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9
    factors = factorization.truncated(ranks).weights
    for seed in range(20):
        moved = [part + 0.01 * normal(*part.shape, seed=seed) for part in factors]
        inner = torch.einsum("srhw,ri->sihw", moved[1], moved[0][:, :, 0, 0])
        other = torch.einsum("os,sihw->oihw", moved[2][:, :, 0, 0], inner)
        assert error <= (weight - other).square().sum()


def test_tucker_finds_a_tensor_of_its_ranks():
    core = normal(3, 2, 3, 3)
    weight = torch.einsum("srhw,os,ir->oihw", core, normal(9, 3, seed=1), normal(7, 2, seed=2))
    factors = Tucker2(weight).truncated((3, 2))
    assert torch.allclose(weight_of(factors, weight), weight, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda v: max(v) > 1e-6),
    st.floats(0.01, 1),
)
def test_rank_of_energy_is_the_least_that_keeps_the_share(values, share):
    energies = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_of_energy(energies, share)
    total = float(energies.sum())
    assert float(energies[:rank].sum()) >= share * total * (1 - 1e-9)
    assert rank == 1 or float(energies[: rank - 1].sum()) < share * total


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 200)])
@pytest.mark.parametrize("noise", [1e-3, 1.0])
def test_vbmf_tells_signal_from_noise(rank, shape, noise):
    signal = 10 * normal(shape[0], rank, seed=1) @ normal(rank, shape[1], seed=2)
    values = torch.linalg.svdvals(noise * (signal + normal(*shape, seed=3)))
    assert vbmf_rank(values.square(), *shape) == rank


def test_vbmf_of_noise_alone_and_of_nothing_is_the_least_rank():
    values = torch.linalg.svdvals(normal(50, 200, seed=3))
    assert vbmf_rank(values.square(), 50, 200) == 1
    assert vbmf_rank(torch.zeros(5, dtype=torch.float64), 5, 9) == 1
    with pytest.raises(SpecError, match="50 by 200 has 50 singular values, got 3"):
        vbmf_rank(values[:3], 50, 200)


def test_balanced_keeps_products_and_zeros():
    first, second = normal(3, 4), 100 * normal(3, 2, 2, seed=1)
    first[1] = 0
    left, right = balanced(first, second)
    before = torch.einsum("ri,rjk->rijk", first, second)
    assert torch.allclose(torch.einsum("ri,rjk->rijk", left, right), before)
    norms = left.norm(dim=1), right.flatten(1).norm(dim=1)
    assert torch.allclose(norms[0][[0, 2]], norms[1][[0, 2]])
    assert torch.equal(right[1], second[1])


@pytest.mark.parametrize("name", list(FACTORIZATIONS))
@pytest.mark.parametrize("shape", [(6, 10), (6, 4, 3, 3)], ids=str)
def test_ranks_that_cannot_be_are_refused(name, shape):
    factorization = made(name, normal(*shape))
    count = len(factorization.energies)
    for ranks in ([0] * count, [99] * count, [1] * (count + 1), []):
        with pytest.raises(SpecError, match=r"ranks .* do not fit: expected"):
            factorization.truncated(ranks)


@pytest.mark.parametrize("name", ["svd", "tucker2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, bad):
    weight = normal(6, 4, 3, 3)
    weight[2, 1, 0, 0] = bad
    with pytest.raises(ModelError, match="NaN or infinity"):
        FACTORIZATIONS[name](weight, None, None)


def test_outputs_that_are_missing_or_wrong_are_refused():
    weight = normal(6, 4)
    with pytest.raises(SpecError, match="needs the moments"):
        ActivationAwareSvd(weight)
    with pytest.raises(SpecError, match=r"6 outputs, got \(4, 4\)"):
        ActivationAwareSvd(weight, None, moments_of(normal(4, 9)))
    broken = moments_of(normal(6, 9))
    broken.covariance[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        ActivationAwareSvd(weight, None, broken)
    with pytest.raises(UnknownNameError, match="Did you mean 'tucker2'"):
        FACTORIZATIONS["tucker"]
