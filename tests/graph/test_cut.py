"""Pieces of a graph, run one after the other, are the graph."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.engines.onnxruntime import inference_session
from tersor.graph import export_onnx
from tersor.graph.cut import live_values, piece

SHAPE = (2, 8, 8)


class Branched(nn.Module):
    """A value that outlives several nodes, and a shape computed from the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.inner(x)) + x
        return self.head(x.mean((2, 3)).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return export_onnx(Branched().eval(), SHAPE)


def run(model, given):
    session = inference_session(model, 1)
    names = [value.name for value in session.get_outputs()]
    taken = {value.name: given[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(None, taken), strict=True))


def test_two_pieces_are_the_whole_wherever_it_is_cut(graph):
    images = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    start = {live_values(graph, 0)[0]: images}
    (expected,) = run(graph, start).values()
    end = len(graph.graph.node)
    for index in range(1, end):
        held = {**start, **run(piece(graph, 0, index, start), start)}
        given = {name: held[name] for name in live_values(graph, index)}
        rest = piece(graph, index, end, given)
        (found,) = run(rest, given).values()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_piece_takes_other_batch_sizes_than_its_example(graph):
    images = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    (name,) = live_values(graph, 0)
    first = piece(graph, 0, 1, {name: images})
    (made,) = run(first, {name: images[:1]}).values()
    assert made.shape == (1, 4, 8, 8)


def test_an_initializer_can_be_given(graph):
    (name,) = live_values(graph, 0)
    images = np.ones((1, *SHAPE), np.float32)
    zeros = {f"stem.{part}": np.zeros(size, np.float32) for part, size in
             (("weight", (4, 2, 3, 3)), ("bias", (4,)))}  # fmt: skip
    first = piece(graph, 0, 1, {name: images, **zeros})
    assert not first.graph.initializer
    (made,) = run(first, {name: images, **zeros}).values()
    assert not made.any()


def test_values_live_from_their_making_to_their_last_reader(graph):
    nodes = graph.graph.node
    for index in range(len(nodes) + 1):
        before = {name for node in nodes[:index] for name in node.output}
        after = {name for node in nodes[index:] for name in node.input}
        living = set(live_values(graph, index))
        assert living >= before & after
        assert living <= before | {graph.graph.input[0].name}
    assert live_values(graph, len(nodes)) == [graph.graph.output[0].name]
