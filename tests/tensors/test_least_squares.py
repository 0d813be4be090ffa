"""The fit is least squares: against numpy's and torch's solvers in float64, row by row."""

import pytest
import torch

from tersor.tensors.least_squares import Moments, damped, fit, fit_gradually


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(groups=2, rows=3, columns=8, count=60, seed=0):
    """Inputs (groups, count, K), wanted outputs (groups, count, R), and their moments."""
    mixing = normal(groups, columns, columns, seed=seed + 7)
    inputs = normal(groups, count, columns, seed=seed) @ mixing
    outputs = normal(groups, count, rows, seed=seed + 1)
    across = inputs.transpose(1, 2)
    moments = Moments(
        across @ inputs / count,
        outputs.transpose(1, 2) @ inputs / count,
        outputs.square().mean(1),
    )
    return inputs, outputs, moments


def exact(inputs, outputs, mask):
    """Brute force: one least squares problem for every row."""
    solved = torch.zeros(mask.shape, dtype=torch.float64)
    for group, row in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:2])).tolist():
        kept = mask[group, row]
        if kept.any():
            wanted = outputs[group, :, row, None]
            solution = torch.linalg.lstsq(inputs[group][:, kept], wanted, driver="gelsd").solution
            solved[group, row, kept] = solution[:, 0]
    return solved


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_brute_force_least_squares_on_the_mask(seed):
    inputs, outputs, moments = problem(seed=seed)
    mask = normal(2, 3, 8, seed=seed + 2) > 0
    mask[0, 0] = False  # a row that loses everything
    start = normal(2, 3, 8, seed=seed + 3)
    found = fit(start, mask, moments, sweeps=200, tolerance=1e-12)
    expected = exact(inputs, outputs, mask)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-9)
    assert not found[~mask].any()
    given = inputs @ found.transpose(1, 2)
    error = (given - outputs).square().sum() / outputs.square().sum()
    assert moments.error(found) == pytest.approx(float(error))


def test_with_one_weight_gone_it_is_the_update_of_optimal_brain_surgeon():
    """Hassibi 1993, eq. 5: w - w_q / [H^-1]_qq H^-1 e_q."""
    _, _, held = problem(groups=1, rows=1)
    rows = normal(1, 1, 8, seed=9)
    moments = Moments(held.hessian, rows @ held.hessian, torch.ones(1, 1, dtype=torch.float64))
    inverse = torch.linalg.inv(held.hessian[0])
    for gone in range(8):
        mask = torch.ones(1, 1, 8, dtype=torch.bool)
        mask[..., gone] = False
        update = rows[0, 0] - rows[0, 0, gone] / inverse[gone, gone] * inverse[:, gone]
        found = fit(rows, mask, moments, sweeps=200, tolerance=1e-13)
        assert torch.allclose(found[0, 0], update, rtol=1e-6, atol=1e-9)


def test_a_few_sweeps_never_make_it_worse():
    _, _, moments = problem(columns=30, count=40)
    rows, mask = normal(2, 3, 30, seed=5), normal(2, 3, 30, seed=6) > 0
    losses = [
        moments.error(fit(rows, mask, moments, sweeps=n, tolerance=0)) for n in (0, 1, 3, 10, 40)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_damping_pulls_towards_the_rows_it_is_given():
    _, _, moments = problem(columns=30, count=5)  # 5 samples leave 25 directions untold
    rows = normal(2, 3, 30, seed=5)
    whole = torch.ones(2, 3, 30, dtype=torch.bool)
    found = fit(rows, whole, damped(moments, rows, 1e6), sweeps=100)
    assert torch.allclose(found, rows, atol=1e-3)
    moments = Moments(moments.hessian, rows @ moments.hessian, moments.squared)
    assert torch.allclose(fit(rows, whole, damped(moments, rows), sweeps=100), rows)


def test_inputs_that_are_all_zero_leave_the_rows():
    zeros = torch.zeros(1, 4, 4, dtype=torch.float64)
    moments = Moments(zeros, torch.zeros(1, 2, 4).double(), torch.zeros(1, 2).double())
    rows, mask = normal(1, 2, 4), torch.tensor([True, False, True, True]).expand(1, 2, 4)
    assert torch.equal(fit(rows, mask, damped(moments, rows)), rows * mask)
    assert moments.error(rows) == 0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_the_inputs_does_not_matter(scale):
    _, _, held = problem()
    rows, mask = normal(2, 3, 8, seed=5), normal(2, 3, 8, seed=6) > 0
    expected = fit(rows, mask, held, sweeps=100, tolerance=1e-12)
    moved = Moments(held.hessian * scale**2, held.cross * scale**2, held.squared * scale**2)
    assert torch.allclose(fit(rows, mask, moved, sweeps=100, tolerance=1e-12), expected)
    small = Moments(*(part.float() for part in (moved.hessian, moved.cross, moved.squared)))
    found = fit(rows.float(), mask, small, sweeps=100)
    assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_gradual_choice_keeps_its_counts_and_beats_one_at_once():
    torch.manual_seed(0)
    _, _, held = problem(groups=1, rows=20, columns=40, count=400)
    rows = normal(1, 20, 40, seed=5)
    squared = ((rows @ held.hessian) * rows).sum(2)
    moments = Moments(held.hessian, rows @ held.hessian, squared)
    seen = []

    def choose(values, mask, share):
        seen.append((share, int(mask.sum())))
        kept = values.numel() - round(share * 0.7 * values.numel())
        order = (values.abs() * mask).flatten().argsort(descending=True)
        chosen = torch.zeros(values.numel(), dtype=torch.bool)
        chosen[order[:kept]] = True
        return chosen.view(values.shape)

    found, mask = fit_gradually(
        rows, moments, choose, mask=torch.ones_like(rows, dtype=torch.bool)
    )
    assert int(mask.sum()) == 240 and not found[~mask].any()
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert seen[-1][0] == 1
    at_once = choose(rows, torch.ones_like(rows, dtype=torch.bool), 1.0)
    assert moments.error(found) < moments.error(fit(rows, at_once, moments))
