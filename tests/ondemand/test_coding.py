"""Codes chosen by rate and distortion take the bytes they may, and lose less than bits by layer at as many."""

import numpy as np
import pytest
import torch

from tersor.artifact import pack, save
from tersor.bench.drop import measured_drop
from tersor.engines import open_session
from tersor.engines.load import logits_of
from tersor.errors import BudgetError
from tersor.graph.layers import graph_layers, num_weights
from tersor.ondemand.coding import bytes_of_scales, coded
from tersor.ondemand.network import Network, request_of, rounded


@pytest.fixture(scope="module")
def whole(original):
    return Network(1.0, original.module, original.graph, None, 0.0)


def size_and_harm(original, graph, plan, path):
    held = pack(graph, plan=plan.to_dict(), provenance={})
    logits = logits_of(open_session(graph), original.held)
    return save(held, path), measured_drop(original.logits, logits).harm_kl


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_at_the_bytes_of_two_bits_less_is_lost(original, whole, tmp_path, mode):
    bits = {layer.name: 2 for layer in graph_layers(whole.graph)}
    graph, plan = rounded(original, whole, bits, lambda *told: None, mode=mode)
    size, harm = size_and_harm(original, graph, plan, tmp_path / "bits.tersor")
    weights = sum(layer.num_weights for layer in graph_layers(whole.graph))
    codes = int(0.2 * weights)
    spec = request_of(original, mode, True)
    graph, plan, priced = coded(original, whole, codes, spec, lambda *told: None)
    assert priced.coded.code_bytes <= codes
    smaller, less = size_and_harm(original, graph, plan, tmp_path / "coded.tersor")
    assert smaller <= size and less < harm
    integers = {"QuantizeLinear"} & {node.op_type for node in graph.graph.node}
    assert bool(integers) == (mode == "static")


def test_the_plan_tells_what_the_graph_holds(original, whole):
    spec = request_of(original, "static", True)
    _, plan, priced = coded(original, whole, 6000, spec, lambda *told: None)
    assert [line.layer for line in plan.layers] == [x.name for x in graph_layers(whole.graph)]
    for line in plan.layers:
        codes = priced.coded.learned[line.layer].codes
        assert line.action == "int8"
        assert line.sparsity == pytest.approx(np.mean(codes == 0), abs=1e-3)
        assert np.abs(codes).max() < 2 ** (line.bits - 1) * 2


def test_a_network_coded_before_is_where_the_next_begins(original, whole):
    spec = request_of(original, "static", True)
    told = []
    *_, priced = coded(original, whole, 6000, spec, lambda text, share: told.append(text))
    assert any(text.startswith("trial") for text in told)
    told.clear()
    *_, again = coded(
        original, whole, 5000, spec, lambda text, share: told.append(text), near=priced
    )
    assert not any(text.startswith("trial") for text in told)
    assert again.coded.code_bytes <= 5000 and again.price > priced.price


def test_less_than_no_bytes_is_refused(original, whole):
    spec = request_of(original, "static", True)
    with pytest.raises(BudgetError, match="no bytes are left"):
        coded(original, whole, -5, spec, lambda *told: None)


def test_the_weights_of_a_coded_graph_are_all_counted(original, whole):
    graph, _ = rounded(original, whole, {}, lambda *told: None)
    assert num_weights(graph) == sum(layer.num_weights for layer in graph_layers(whole.graph))


def test_scales_are_counted_for_every_output(original, whole):
    rows = sum(
        len(p) for n, p in original.module.named_parameters() if p.ndim > 1 and "weight" in n
    )
    assert bytes_of_scales(whole) == 4 * rows
    assert torch.is_tensor(next(original.module.parameters()))
