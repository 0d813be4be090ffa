"""Reconstruction: each layer is fitted by least squares to the original's outputs, on the inputs that the pruned
network gives it."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import DataError, ModelError
from tersor.graph.weights import as_rows
from tersor.methods.lockstep import Walk, stopping
from tersor.methods.reconstruct import reconstruct


class Net(nn.Module):
    """A residual sum, a grouped, a transposed and a shared layer, batch norm, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.shared = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = functional.relu(x + self.grouped(x), inplace=True)
        x = self.shared(functional.relu(self.shared(x)))
        return self.head(functional.relu(self.up(x)).mean((2, 3)))


FITTED = ["stem", "grouped", "up", "head"]


def images(count=40, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 2, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = Net().eval()
    with torch.no_grad():
        for _ in range(20):
            made.norm.train()(made.stem(torch.from_numpy(images(seed=9))))
    return made.eval()


def half(rows, mask, statistics, share):
    """The smaller half of the weights goes."""
    count = round(0.5 * share * rows.numel())
    order = (rows.abs() * mask).flatten().argsort()
    kept = torch.ones(rows.numel(), dtype=torch.bool)
    kept[order[:count]] = False
    return kept.view(rows.shape)


def every(module, choice=half):
    return {
        name: choice
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    }


def run(original, module, choices, batches, **more):
    return reconstruct(
        original, module, choices, batches, precision="float32", positions_per_image=10**6, **more
    )


def test_a_single_layer_becomes_the_least_squares_solution():
    """Brute force in float64: for each row, numpy's least squares over what the mask keeps."""
    torch.manual_seed(1)
    layer = nn.Linear(12, 7)
    batches = [np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32)]
    found = run(nn.Sequential(layer), nn.Sequential(layer), {"0": half}, batches)
    mask = found.masks["0"]
    inputs = batches[0].astype(np.float64)
    wanted = inputs @ layer.weight.detach().double().numpy().T + layer.bias.detach().numpy()
    assert int((~mask).sum()) == 42
    for row in range(7):
        kept = mask[row].numpy()
        columns = np.column_stack([inputs[:, kept], np.ones(200)])
        solution = np.linalg.lstsq(columns, wanted[:, row], rcond=None)[0]
        given = found.module[0].weight[row].detach().numpy()
        # 1 % damping pulls a little towards the weights as they were
        assert np.allclose(given[kept], solution[:-1], atol=0.02)
        assert found.module[0].bias[row].item() == pytest.approx(solution[-1], abs=0.02)
        assert not given[~kept].any()


def test_errors_are_those_of_the_layers_outputs(net):
    """The stem reads images whatever is pruned: its error is known without the walk."""
    found = run(net, net, {"stem": half}, [images()])
    given, wanted = (m.stem(torch.from_numpy(images())) for m in (found.module, net))
    centred = [value - value.mean((0, 2, 3), keepdim=True) for value in (given, wanted)]
    error = (centred[0] - centred[1]).square().sum() / centred[1].square().sum()
    assert found.errors == {"stem": pytest.approx(error.item(), rel=1e-3)}


def test_it_is_nearer_to_the_original_than_masks_alone(net):
    batches = [images(60, seed) for seed in range(4)]
    found = run(net, net, every(net), batches)
    masked = copy.deepcopy(net)
    for name, mask in found.masks.items():
        with torch.no_grad():
            masked.get_submodule(name).weight.mul_(mask)
    fresh = torch.from_numpy(images(200, 77))
    with torch.no_grad():
        wanted = net(fresh)
        far, near = ((m(fresh) - wanted).square().mean() for m in (masked, found.module))
    assert near < 0.5 * far
    assert set(found.errors) == set(FITTED)  # the shared and the unused layer are masked only


def test_every_mask_is_exact_and_kept(net):
    found = run(net, net, every(net), [images()])
    for name, mask in found.masks.items():
        weight = found.module.get_submodule(name).weight
        assert mask.shape == weight.shape
        assert int((~mask).sum()) == round(0.5 * mask.numel())
        assert not weight[~mask].any()
    shared = net.shared.weight
    assert torch.equal(found.module.shared.weight, shared * found.masks["shared"])


def test_later_layers_see_what_earlier_ones_have_become(net):
    """The statistics handed to a choice are those of the inputs in the network as pruned so far."""
    seen = {}

    def watch(rows, mask, statistics, share):
        if share == 1:
            seen["grouped"] = statistics.hessian
        return half(rows, mask, statistics, share)

    found = run(net, net, {"stem": half, "grouped": watch}, [images()])
    with torch.no_grad():
        pruned = found.module
        inputs = functional.relu(pruned.norm(pruned.stem(torch.from_numpy(images()))))
    columns = functional.unfold(inputs[:, :4], 3, padding=1).transpose(1, 2).flatten(0, 1)
    expected = columns.T @ columns / len(columns)
    # batch norms use the batch in the walk, and its mean over batches (unbiased) afterwards
    assert torch.allclose(seen["grouped"][0], expected, rtol=0.02, atol=0.02)


def test_what_went_before_stays_gone(net):
    before = {"stem": torch.rand(8, 2, 3, 3) < 0.8, "up": torch.rand(6, 8, 2, 2) < 0.8}
    found = run(net, net, every(net), [images()], before=before)
    for name, mask in before.items():
        rows = as_rows(found.module.get_submodule(name), found.masks[name])
        assert not (rows & ~mask).any()
        assert int((~rows).sum()) == round(0.5 * mask.numel())


def test_inputs_and_networks_are_left_alone_and_threads_end(net):
    before = copy.deepcopy(net.state_dict())
    running = threading.active_count()
    run(net, net, every(net), [images()])
    assert threading.active_count() == running
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in net.modules())


def test_the_split_of_inputs_into_batches_does_not_matter(net):
    whole, parts = images(), np.array_split(images(), 7)
    first, second = (run(net, net, every(net), held) for held in ([whole], parts))
    for key, value in first.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key])


def test_another_original_is_the_target(net):
    """With all weights kept, the copy becomes the original again where least squares can."""
    moved = copy.deepcopy(net)
    with torch.no_grad():
        moved.head.weight += 1
    whole = {"head": lambda rows, mask, statistics, share: mask}
    found = reconstruct(net, moved, whole, [images(400)], precision="float32")
    inputs = torch.from_numpy(images(50, 5))
    with torch.no_grad():
        far, near = ((m(inputs) - net(inputs)).square().mean() for m in (moved, found.module))
    assert near < 0.05 * far


def test_unusable_inputs_are_refused(net):
    with pytest.raises(DataError, match="need one at least"):
        run(net, net, every(net), [])


def test_a_network_that_the_pruned_one_does_not_come_from_is_refused(net):
    class Skips(Net):
        def forward(self, x):
            x = functional.relu(self.norm(self.stem(x)))
            return self.head(functional.relu(self.up(x)).mean((2, 3)))

    with pytest.raises(ModelError, match="'grouped' runs in the pruned network and not in the"):
        run(Skips().eval(), net, every(net), [images()])


def test_walks_stop_at_layers_and_hand_over_values(net):
    layers = {name: net.get_submodule(name) for name in ("stem", "shared")}
    stops = []
    with stopping(layers, after=True, done=lambda name: False):
        walk = Walk(net, torch.from_numpy(images(3)))
        walk.advance()
        while not walk.ended:
            stops.append((walk.name, tuple(walk.value.shape)))
            walk.advance()
        walk.close()
    assert stops == [("stem", (3, 8, 6, 6)), ("shared", (3, 8, 6, 6)), ("shared", (3, 8, 6, 6))]


def test_an_error_inside_a_walk_is_raised_outside_and_all_threads_end(net):
    running = threading.active_count()
    walks = [Walk(net, torch.zeros(2, 2, 6, 6)), Walk(net, torch.zeros(2, 5, 6, 6))]
    with (
        stopping({"up": net.up}, after=False, done=lambda name: False),
        pytest.raises(RuntimeError, match="channels"),
    ):
        for walk in walks:
            walk.advance()
    for walk in walks:
        walk.close()
    assert threading.active_count() == running
