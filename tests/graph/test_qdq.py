"""A clamp goes where the codes clamp anyway, and stays where it does more."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tersor.engines import open_session
from tersor.graph import export_onnx
from tersor.graph.layers import graph_layers
from tersor.graph.marking import activations_to_quantize
from tersor.graph.qdq import static_graph
from tersor.methods.quantize import quantize
from tersor.specs import Quantize
from tersor.tensors import affine


class Clamped(nn.Module):
    """MobileNet's way: a convolution, ReLU6, a convolution, another clamp."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.linear = nn.Linear(8, 4)

    def forward(self, images):
        maps = nn.functional.relu6(20 * self.first(images))
        maps = self.second(maps).clamp(-0.1, 0.1)
        return self.linear(maps.mean((2, 3)))


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return export_onnx(Clamped().eval(), (3, 8, 8))


@pytest.fixture(scope="module")
def batch():
    return np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)


def clamps(graph):
    return [node for node in graph.graph.node if node.op_type in ("Relu", "Clip")]


@pytest.mark.parametrize("activation_bits", [4, 8])
def test_a_clamp_at_the_ends_of_the_codes_is_left_to_them(graph, batch, activation_bits):
    spec = Quantize(observer="minmax", activation_bits=activation_bits)
    found = quantize(graph, spec, [batch]).graph
    assert len(clamps(graph)) == 2
    left = [node.output[0] for node in clamps(found) if "_limited" not in node.output[0]]
    assert left == []
    held = {i.name: numpy_helper.to_array(i) for i in found.graph.initializer}
    for clamp, (low, high) in zip(clamps(graph), [(0, 6), (-0.1, 0.1)], strict=True):
        root = clamp.output[0]
        code = held[f"{root}_scale"], held[f"{root}_zero_point"]
        values = np.linspace(-50, 50, 100_001, dtype=np.float32)
        top = 2**activation_bits - 1
        plain, clamped = (
            affine.quantize(each, *code, dtype=np.uint8).clip(max=top)
            for each in (values, values.clip(low, high))
        )
        assert np.array_equal(plain, clamped) and plain.max() == top


def test_a_clamp_inside_the_codes_stays(graph, batch):
    activations = activations_to_quantize(graph, graph_layers(graph))
    wide = {name: (np.float32(0.1), np.uint8(128)) for name in activations.observed}
    made = static_graph(graph, [], activations, wide)
    assert [n.output[0] for n in clamps(made)] == [n.output[0] for n in clamps(graph)]
    assert np.isfinite(open_session(made, threads=1).run(batch)).all()
