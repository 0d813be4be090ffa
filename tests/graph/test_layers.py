"""What a graph's layers read and hold, coded or not."""

import numpy as np
import pytest

import tersor
from tersor.graph.layers import graph_layers, num_weights, read_by_layers
from tersor.pipeline import deployment_graph


@pytest.fixture(scope="module")
def graph():
    return deployment_graph(tersor.load_model("digits_net", seed=0), (1, 8, 8))


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_coded_layers_are_found_under_their_names_with_their_weights(graph, mode):
    images = np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32)
    coded = tersor.quantize(graph, tersor.Quantize(mode=mode), [images]).graph
    layers = graph_layers(graph)
    assert list(read_by_layers(coded)) == list(read_by_layers(graph)) == [e.name for e in layers]
    assert num_weights(coded) == num_weights(graph) == sum(each.num_weights for each in layers)
    for name, (value, stored) in read_by_layers(coded).items():
        assert stored == f"{name}.weight_quantized"
        made = {out for node in coded.graph.node for out in node.output}
        assert value in made | {i.name for i in coded.graph.input}
