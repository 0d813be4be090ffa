"""torch's multi-head attention with whole heads as units."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

import tersor
from tersor.engines import open_session
from tersor.errors import ModelError
from tersor.graph import export_onnx
from tersor.graph.attention import Heads, headed_
from tersor.graph.coupling import coupled_groups, half_of, masked, random_twin
from tersor.graph.surgery import lines_of, removed
from tersor.methods.prune_structured import apply, chosen_units, plan
from tersor.specs import Prune, from_dict

IMAGE = torch.zeros(1, 3, 32, 32)


def attention(**options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(24, 3, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(-0.5, 0.5)
    return made


def masks(kind, batch, length, keys):
    return {
        "none": {},
        "bool": {"attn_mask": torch.ones(length, keys).triu(1).bool()},
        "float": {"attn_mask": torch.randn(length, keys).double()},
        "of each head": {"attn_mask": torch.randn(batch * 3, length, keys).double()},
        "padding": {"key_padding_mask": torch.arange(keys).expand(batch, -1) > keys - 3},
    }[kind]


@pytest.mark.parametrize("kind", ["none", "bool", "float", "of each head", "padding"])
@pytest.mark.parametrize("crossed", [False, True])
def test_with_all_heads_it_is_torchs_function(kind, crossed):
    for batch_first, bias, need, average in itertools.product([True, False], repeat=4):
        ours = attention(batch_first=batch_first, bias=bias)
        theirs = copy.deepcopy(ours)
        headed_(ours)
        assert type(ours) is Heads and type(theirs) is nn.MultiheadAttention
        query = torch.randn(2, 5, 24).double()
        key = torch.randn(2, 7, 24).double() if crossed else query
        value = torch.randn(2, 7, 24).double() if crossed else query
        inputs = [query, key, value]
        if not batch_first:
            inputs = [each.transpose(0, 1) for each in inputs]
        if not crossed:
            inputs = [inputs[0]] * 3
        told = {
            "need_weights": need,
            "average_attn_weights": average,
            **masks(kind, 2, 5, 7 if crossed else 5),
        }
        (found, weights), (expected, their_weights) = ours(*inputs, **told), theirs(*inputs, **told)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
        assert (weights is None) == (their_weights is None) == (not need)
        if need:
            assert torch.allclose(weights, their_weights, rtol=1e-12, atol=1e-12)


def test_one_sequence_alone():
    ours = attention()
    theirs = copy.deepcopy(ours)
    headed_(ours)
    tokens = torch.randn(5, 24).double()
    padding = torch.arange(5) > 3
    for one, other in zip(
        ours(tokens, tokens, tokens, key_padding_mask=padding),
        theirs(tokens, tokens, tokens, key_padding_mask=padding),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(ModelError, match="give the mask too"):
        ours(tokens, tokens, tokens, is_causal=True)


def test_what_torch_has_beyond_that_is_left_alone():
    network = nn.ModuleList(
        [attention(add_bias_kv=True), attention(add_zero_attn=True), attention(kdim=8, vdim=8)]
    )
    headed_(network)
    assert all(type(part) is nn.MultiheadAttention for part in network)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5).eval()
    with torch.no_grad():  # no two tensors alike, as after a training
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def found(net):
    return coupled_groups(net, IMAGE)


def test_units_are_whole_heads_and_pruned_equals_masked(net, found):
    heads = [group for group in found.groups if "attention" in group.name]
    assert [group.num_units for group in heads] == [4, 4]
    for group in heads:
        rows, _, columns = group.members
        for unit, index in enumerate(columns.index):
            assert sorted(index) == list(range(8 * unit, 8 * unit + 8))
            assert sorted(rows.index[unit]) == sorted(
                32 * part + place for part in range(3) for place in index
            )
    twin, units = random_twin(net), {group.name: half_of(group) for group in found.groups}
    smaller = removed(twin, lines_of(twin, found.kept(units)))
    inputs = torch.randn(1, 3, 32, 32).double()
    expected = masked(twin, inputs, found, units)
    assert (smaller(inputs) - expected).abs().max() <= 1e-10 * expected.abs().max()
    kept = [part.num_heads for part in smaller.modules() if isinstance(part, Heads)]
    assert kept == [2, 2]
    again = removed(smaller, ())
    assert torch.equal(again(inputs), smaller(inputs))


def test_the_network_keeps_its_own_attention_until_heads_go(net, found):
    assert not any(isinstance(part, Heads) for part in net.modules())
    spec = Prune(structure="channel", sparsity=0.5, exclude=(r"re:.*out_proj",))
    kept = apply(net, plan(net, spec, IMAGE, found=found))
    assert not any(isinstance(part, Heads) for part in kept.modules())
    units = chosen_units(net, spec, IMAGE, found)
    assert len(units) == 2 and not any("attention" in name for name in units)


def test_a_file_of_fewer_heads_runs_and_goes_back(net, found, tmp_path):
    decided = plan(net, Prune(structure="channel", sparsity=0.5), IMAGE, found=found)
    decided = from_dict(json.loads(json.dumps(decided.to_dict())))
    smaller = apply(net, decided)
    inputs = torch.randn(3, 3, 32, 32)
    expected = smaller(inputs).detach()
    graph = export_onnx(smaller, (3, 32, 32))
    found_logits = torch.from_numpy(open_session(graph, threads=1).run(inputs.numpy()))
    assert torch.allclose(found_logits, expected, atol=1e-5)
    torch.manual_seed(1)
    fresh = apply(VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5), decided)
    fresh.load_state_dict(smaller.state_dict())
    assert torch.equal(fresh.eval()(inputs), smaller(inputs))
    tersor.write(graph, tmp_path / "net.tersor", plan=decided)
    other = VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5)
    back = tersor.load(tmp_path / "net.tersor", into=other)
    assert torch.allclose(back(inputs), expected, atol=1e-4)


def test_torchs_encoder_runs_with_fewer_heads():
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 16)
            self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
            self.last = nn.Linear(16, 3)

        def forward(self, inputs):
            return self.last(self.layer(self.first(inputs)).mean(1))

    network = Encoder().eval()
    inputs = torch.randn(2, 5, 6)
    seen = coupled_groups(network, inputs)
    assert any("self_attn" in group.name and group.num_units == 4 for group in seen.groups)
    smaller = apply(network, plan(network, Prune(structure="neuron"), inputs, found=seen))
    assert smaller.layer.self_attn.num_heads == 2
    with torch.no_grad():  # torch's fused encoder would run here
        fused = smaller(inputs)
    assert torch.allclose(fused, smaller(inputs), atol=1e-6)
    smaller.train()(inputs).sum().backward()
    with pytest.raises(ModelError, match="for each of 8 heads"):
        smaller.layer.self_attn(*[torch.zeros(2, 5, 16)] * 3, attn_mask=torch.zeros(8, 5, 5))
