"""A file goes back into a fresh instance of the class, computes the same, and trains on."""

import copy
import dataclasses as dc

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.swin_transformer import SwinTransformer

import tersor
from tersor.artifact import pack, save
from tersor.engines.onnxruntime import inference_session
from tersor.errors import ModelError, SpecError
from tersor.graph.export import export_onnx
from tersor.methods import prune_structured as structured
from tersor.methods.factorize import factorize
from tersor.methods.prune import prune
from tersor.methods.quantize import quantize
from tersor.methods.restore import plans_of, restore, unheld
from tersor.specs import Factorize, Prune, Quantize

SHAPE = (3, 8, 8)


class Block(nn.Module):
    """A residual sum, a convolution with a bias before its norm, copies of a 1x1 map, two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.body, self.inner = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.down = nn.Conv2d(12, 10, 8)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden, self.head = nn.Linear(40, 16), nn.Linear(16, 5)

    def forward(self, images):
        maps = torch.relu(self.norm(self.stem(images)))
        maps = torch.relu(maps + self.inner(self.body(maps)))
        return self.head(torch.relu(self.hidden(self.pool(self.down(maps)).flatten(1))))


def trained(seed=0):
    torch.manual_seed(seed)
    net = Block().train()
    with torch.no_grad():
        for norm in (net.norm, net.inner):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        for _ in range(3):
            net(torch.randn(16, *SHAPE))
    return net.eval()


def images(count, seed=5):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def logits(module, batch):
    with torch.no_grad():
        return module(torch.from_numpy(batch)).numpy()


def file_of(graph, plan=None):
    return pack(graph, plan=None if plan is None else plan.to_dict())


def removed(net):
    plan = structured.plan(net, Prune(structure="channel", sparsity=0.5), torch.zeros(1, *SHAPE))
    return structured.apply(net, plan), plan


@pytest.mark.parametrize("fold", [False, True])
def test_a_float_file_goes_back(fold):
    net = trained()
    from tersor.pipeline import deployment_graph

    found = restore(file_of(deployment_graph(net, SHAPE, fold_copies=fold)), Block())
    np.testing.assert_allclose(
        logits(found, images(4)), logits(net, images(4)), rtol=1e-3, atol=1e-4
    )
    assert {k: v.shape for k, v in found.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }


@pytest.mark.parametrize(
    "spec",
    [
        None,
        Quantize(num_calibration=16),
        Quantize(num_calibration=16, activation_bits=5),
        Quantize(mode="dynamic"),
        Quantize(mode="weight_only", bits=4),
        Quantize(mode="weight_only", bits=4, granularity="per_group", group_size=7),
        Quantize(mode="weight_only", bits=3, code="codebook"),
    ],
    ids=lambda spec: "float" if spec is None else f"{spec.mode}-{spec.code}-{spec.granularity}",
)
def test_a_pruned_and_quantized_file_goes_back_into_the_users_class(spec, tmp_path):
    small, plan = removed(trained())
    graph = export_onnx(small, SHAPE)
    if spec is not None:
        coded = quantize(graph, spec, [images(16)])
        graph, plan = coded.graph, coded.plan.after((plan,))
    save(file_of(graph, plan), tmp_path / "net.tersor")
    fresh = Block()
    before = copy.deepcopy(fresh.state_dict())
    found = tersor.load(tmp_path / "net.tersor", into=fresh)
    assert type(found) is Block and found.stem.out_channels == 6
    assert all(torch.equal(before[k], v) for k, v in fresh.state_dict().items())
    # The weights are those of the codes: within half a step of the float ones, and few in number.
    held = dict(found.named_parameters())["head.weight"].detach().numpy()
    given = dict(small.named_parameters())["head.weight"].detach().numpy()
    if spec is None:
        np.testing.assert_array_equal(held, given)
        np.testing.assert_allclose(
            logits(found, images(4)), logits(small, images(4)), rtol=1e-3, atol=1e-4
        )
        return
    session = inference_session(graph, 1, optimize=False)
    (expected,) = session.run(None, {session.get_inputs()[0].name: images(64)})
    again = logits(found, images(64))
    if spec.mode == "weight_only":
        np.testing.assert_allclose(again, expected, rtol=1e-3, atol=1e-4)
    else:
        assert ((again - expected) ** 2).mean() < 0.05 * expected.var()
        assert np.abs(held - given).max() <= np.abs(given).max() / 127


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("coded", [False, True])
def test_without_a_plan_the_shapes_tell_how_narrow_a_network_is(folded, coded):
    from tersor.pipeline import deployment_graph

    small, _ = removed(trained())
    graph = (
        deployment_graph(small, SHAPE, fold_copies=False) if folded else export_onnx(small, SHAPE)
    )
    if coded:
        graph = quantize(graph, Quantize(mode="weight_only", bits=8), [images(16)]).graph
    found = restore(file_of(graph), Block(), inputs=[images(32)])
    assert {k: v.shape for k, v in found.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }
    expected = logits(small, images(8))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        logits(found, images(8)), expected, atol=(0.05 if coded else 1e-3) * scale
    )


def test_plans_keep_their_order():
    small, first = removed(trained())
    second = quantize(export_onnx(small, SHAPE), Quantize(mode="dynamic")).plan.after((first,))
    third = dc.replace(second, earlier=()).after((second,))
    held = plans_of(file_of(export_onnx(small, SHAPE), third))
    assert [p.request.kind for p in held] == ["prune", "quantize", "quantize"]
    assert all(not p.earlier for p in held[:-1])


def test_low_rank_and_zeros_go_back():
    net = trained()
    found = factorize(net, Factorize(method="svd", size=0.5), [images(16)])
    masked = prune(found.module, Prune(sparsity=0.5))
    plan = masked.plan.after((found.plan,))
    again = restore(file_of(export_onnx(masked.module, SHAPE), plan), Block())
    np.testing.assert_allclose(
        logits(again, images(4)), logits(masked.module, images(4)), rtol=1e-3, atol=1e-4
    )
    weights = [p for n, p in again.named_parameters() if p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert zeros >= 0.49


def test_with_inputs_training_starts_where_the_file_stands():
    net = trained()
    held = file_of(export_onnx(net, SHAPE))
    batches = [images(64, seed) for seed in range(4)]
    ready = restore(held, Block(), inputs=batches)
    plain = restore(held, Block())
    np.testing.assert_allclose(
        logits(ready, images(4)), logits(net, images(4)), rtol=1e-3, atol=1e-3
    )
    batch = batches[0]
    expected = logits(net, batch)
    change = [
        np.abs(logits(copy.deepcopy(each).train(), batch) - expected).mean()
        for each in (ready, plain)
    ]
    assert change[0] < change[1] / 4


def test_networks_that_do_not_fit_are_refused_by_their_tensors():
    net = trained()
    held = file_of(export_onnx(net, SHAPE))
    with pytest.raises(ModelError, match=r"weight: the network has .* the file"):
        restore(held, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)))
    small, plan = removed(net)
    with pytest.raises(ModelError, match=r"another network|does not fit"):
        restore(file_of(export_onnx(small, SHAPE), plan), nn.Sequential(nn.Conv2d(3, 12, 3)))

    class Other(Block):
        def forward(self, images):
            return -super().forward(images)

    with pytest.raises(ModelError, match="does not compute what the file does"):
        restore(held, Other())


def test_inputs_without_a_network_are_refused(tmp_path):
    save(file_of(export_onnx(trained(), SHAPE)), tmp_path / "net.tersor")
    with pytest.raises(SpecError, match="into=MyModel"):
        tersor.load(tmp_path / "net.tersor", inputs=[])


class Square(nn.Module):
    """Linear layers on sequences: the exporter keeps them as products with the transpose, which has the same shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs):
        return self.second(self.first(inputs.mean(1)).relu()).mean(1)


@pytest.mark.parametrize("mode", ["float", "weight_only", "dynamic"])
def test_square_weights_of_linear_layers_are_not_turned(tmp_path, mode):
    torch.manual_seed(0)
    network = Square().eval()
    graph = export_onnx(network, (1, 8, 8))
    if mode != "float":
        graph = tersor.quantize(graph, tersor.Quantize(mode=mode)).graph
    tersor.write(graph, tmp_path / "net.tersor")
    back = tersor.load(tmp_path / "net.tersor", into=Square())
    for name in ("first", "second"):
        one, other = (n.get_submodule(name).weight for n in (network, back))
        assert torch.allclose(one, other, atol=1e-6 if mode == "float" else 5e-3)


def vision_transformer():
    return VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=24,
        num_classes=5,
    )


def swin():
    return SwinTransformer([2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=5)


@pytest.mark.parametrize("build", [vision_transformer, swin])
def test_networks_whose_exporter_folds_parameters_go_back(build, tmp_path):
    """Tables that the exporter turned into others stand beside the graph; joined weights keep their name."""
    torch.manual_seed(0)
    net = build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    graph = export_onnx(net, SHAPE)
    state = unheld(net, graph)
    assert {name.rsplit(".", 1)[-1] for name in state} <= {
        "relative_position_bias_table",
        "relative_position_index",
    }
    coded = quantize(graph, Quantize(mode="weight_only", bits=8))
    for made, tolerance in ((graph, 1e-4), (coded.graph, 0.1)):
        tersor.write(made, tmp_path / "net.tersor", state=state)
        found = tersor.load(tmp_path / "net.tersor", into=build())
        np.testing.assert_allclose(
            logits(found, images(4)), logits(net, images(4)), rtol=tolerance, atol=tolerance
        )
        assert all(
            found.state_dict()[name].dtype == tensor.dtype
            for name, tensor in net.state_dict().items()
        )
    save(file_of(graph), tmp_path / "bare.tersor")
    if state:
        with pytest.raises(ModelError, match="relative_position"):
            tersor.load(tmp_path / "bare.tersor", into=build())
