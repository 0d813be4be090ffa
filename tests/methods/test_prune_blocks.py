"""Which residual blocks go: the harmless first, to the target, and in one plan."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tersor.engines import open_session
from tersor.errors import BudgetError, ModelError, SpecError
from tersor.graph.export import export_onnx
from tersor.methods.prune_auto import KL_BOUND
from tersor.methods.prune_blocks import plan_blocks
from tersor.methods.prune_structured import apply, plan
from tersor.methods.prune_trials import Trials
from tersor.specs import Prune, from_dict


class Block(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(6, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, 6, 1)
        )

    def forward(self, x):
        return x + self.net(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 5)
        self.blocks = nn.Sequential(*[Block(hidden) for hidden in (8, 8, 16, 8)])

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 6, 6)
IMAGES = np.random.default_rng(0).standard_normal((40, 3, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    """The second block does almost nothing, the third a little, the others much."""
    torch.manual_seed(0)
    module = Net()
    with torch.no_grad():
        module.head.weight *= 20
        module.blocks[1].net[2].weight *= 1e-3
        module.blocks[1].net[2].bias *= 1e-3
        module.blocks[2].net[2].weight *= 0.2
        module.blocks[2].net[2].bias *= 0.2
    return module


def gone(decided):
    return [line.layer for line in decided.layers if line.action == "bypass"]


def block(**fields):
    return Prune(structure="block", **fields)


def test_the_harmless_go_first(net):
    assert gone(plan(net, block(sparsity=0.25), EXAMPLE, inputs=[IMAGES])) == ["blocks.1"]
    decided = plan(net, block(sparsity=0.5), EXAMPLE, inputs=[IMAGES])
    assert gone(decided) == ["blocks.1", "blocks.2"]
    lines = {line.layer: line for line in decided.layers}
    assert {"stem", "head", "blocks.0.net.0"} <= set(lines) and "blocks.1.net.0" not in lines
    free = plan(net, block(sparsity=0.0), EXAMPLE, inputs=[IMAGES])
    assert "blocks.1" in gone(free)
    trials = Trials(net, IMAGES)
    assert trials.harm_(apply(net, free)) <= KL_BOUND
    everything = plan(net, block(sparsity=0.99), EXAMPLE, inputs=[IMAGES])
    assert trials.harm_(apply(net, everything)) > KL_BOUND


def test_macs_are_met(net):
    def flops(module):
        with FlopCounterMode(display=False) as counter:
            module(EXAMPLE)
        return counter.get_total_flops()

    for macs in (0.9, 0.6, 0.2):
        smaller = apply(net, plan(net, block(macs=macs), EXAMPLE, inputs=[IMAGES]))
        assert flops(smaller) <= macs * flops(net)
    with pytest.raises(BudgetError, match=r"macs=0\.005 cannot be met.*0\.\d+"):
        plan(net, block(macs=0.005), EXAMPLE, inputs=[IMAGES])


def test_the_plan_through_json_on_a_fresh_instance_and_exported(net):
    decided = plan(net, block(sparsity=0.5), EXAMPLE, inputs=[IMAGES])
    again = from_dict(json.loads(json.dumps(decided.to_dict())))
    smaller, fresh = apply(net, decided), apply(Net(), again)
    fresh.load_state_dict(smaller.state_dict())
    images = torch.from_numpy(IMAGES)
    with torch.no_grad():
        expected = smaller(images)
        assert torch.equal(fresh(images), expected)
    graph = export_onnx(smaller, (3, 6, 6))
    assert sum(node.op_type == "Conv" for node in graph.graph.node) == 5
    got = open_session(graph, threads=1).run(IMAGES)
    assert np.abs(got - expected.numpy()).max() <= 1e-5 * float(expected.abs().max())


def test_exclusion_and_what_is_refused(net):
    spec = block(sparsity=0.25, exclude=("blocks.1.net.0",))
    assert gone(plan(net, spec, EXAMPLE, inputs=[IMAGES])) == ["blocks.2"]
    with pytest.raises(SpecError, match="needs calibration inputs"):
        plan(net, block(), EXAMPLE)
    for fields in ({"scope": "auto"}, {"criterion": "l2"}, {"multiple_of": 8}, {"reconstruct": True}):  # fmt: skip
        with pytest.raises(SpecError, match=f"{next(iter(fields))}.*no meaning for blocks"):
            plan(net, block(**fields), EXAMPLE, inputs=[IMAGES])
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ModelError, match="no residual block"):
        plan_blocks(plain, block(), EXAMPLE, IMAGES)
    with pytest.raises(ModelError, match=r"blocks\.1"):
        apply(plain, plan(net, block(), EXAMPLE, inputs=[IMAGES]))
