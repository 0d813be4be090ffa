"""Networks that share filters: the same as with all filters stored, smaller in the file, exact, trainable."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.data import load_data
from tersor.engines import open_session
from tersor.errors import ModelError, SpecError
from tersor.graph.export import export_onnx
from tersor.graph.shared import SharedConv2d
from tersor.methods.finetune import finetune
from tersor.methods.share import plain, plan, restructured, share
from tersor.models import load_model
from tersor.pipeline import quantize_graph
from tersor.specs import Finetune, Plan, Prune, Quantize, Share, from_dict
from tersor.specs.share import TRANSFORMS
from tersor.tensors.orbits import num_images

EACH = pytest.mark.parametrize("transform", TRANSFORMS)


def noise(count=9, shape=(1, 8, 8)):
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)


def logits(module, images):
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images).to(next(module.parameters())))


class Hard(nn.Module):
    """Strides, dilation, paddings, biases, one layer at two places, and convolutions that cannot share."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(16, 16, 3, padding="same", dilation=2, bias=False)
        self.twice = nn.Conv2d(16, 16, 3, padding=(0, 1), padding_mode="circular")
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 12, 1)
        self.odd = nn.Conv2d(12, 7, 3)
        self.head = nn.Linear(7, 10)

    def forward(self, images):
        x = functional.relu(self.same(functional.relu(self.stem(images))))
        x = self.twice(functional.relu(self.twice(x)))
        x = self.pointwise(functional.relu(self.depthwise(x)))
        return self.head(self.odd(x).mean((2, 3)))


@pytest.fixture(scope="module")
def hard():
    torch.manual_seed(0)
    return Hard().double().eval()


@EACH
def test_a_shared_network_is_that_with_all_its_filters_stored(hard, transform):
    made = share(hard, Share(transform))
    images = noise(5, (3, 20, 20)).astype(np.float64)
    ordinary = plain(made.module)
    assert type(made.module) is type(ordinary) is Hard
    assert torch.allclose(logits(made.module, images), logits(ordinary, images), atol=1e-10)
    shared = [d.layer for d in made.plan.layers if d.action == "share"]
    assert {"stem", "same", "twice"} <= set(shared) == set(made.errors)
    for name in shared:
        before, after = (m.get_submodule(name).weight.detach() for m in (hard, ordinary))
        error = float((before - after).square().sum() / before.square().sum())
        assert error == pytest.approx(made.errors[name], abs=1e-9)
        stored = made.module.get_submodule(name).weight
        assert stored.numel() * num_images(transform) == before.numel()


@EACH
def test_layers_that_cannot_share_are_kept_and_said(hard, transform):
    decided = plan(hard, Share(transform, exclude=("re:st.*",)))
    reasons = {d.layer: d.reason for d in decided.layers if d.action == "keep"}
    assert "excluded by name" in reasons["stem"]
    assert "16 groups" in reasons["depthwise"]
    assert "7 filters are no multiple" in reasons["odd"]
    assert "Linear is not Conv2d" in reasons["head"]
    assert ("pointwise" in reasons) == (transform != "negate")
    assert transform == "negate" or "1 wide" in reasons["pointwise"]


def test_a_flat_kernel_has_no_second_mirror_image():
    module = nn.Sequential(nn.Conv2d(3, 8, (1, 3)), nn.Conv2d(8, 8, (3, 1)))
    said = {t: [d.reason for d in plan(module, Share(t)).layers] for t in TRANSFORMS}
    assert said["negate"] == ["", ""]
    assert said["mirror"][0] == "" and "1 wide" in said["mirror"][1]
    assert "1 high" in said["mirror4"][0] and "1 wide" in said["mirror4"][1]


@EACH
def test_the_graph_is_exact_and_stores_the_stored_filters_alone(transform):
    made = share(load_model("digits_net", seed=3), Share(transform)).module
    images = noise()
    graph = export_onnx(made, (1, 8, 8))
    found = open_session(graph).run(images)
    assert np.allclose(found, logits(made, images), rtol=1e-4, atol=1e-5)
    # The exporter makes the filters of small layers itself, where that is shorter than saying how.
    name, largest = max(
        ((n, p) for n, p in made.named_modules() if isinstance(p, SharedConv2d)),
        key=lambda pair: pair[1].weight.numel(),
    )
    sizes = {i.name: tuple(i.dims) for i in graph.graph.initializer}
    assert sizes[f"{name}.weight"] == largest.weight.shape
    saved = largest.weight.numel() * (num_images(transform) - 1) * 4
    full = 4 * sum(p.numel() for p in plain(made).parameters())
    assert graph.ByteSize() < full - saved / 2


def test_halved_convolutions_quantize_as_any():
    data = load_data("digits")
    made = share(load_model("digits_net", seed=3), Share("negate")).module
    graph = export_onnx(made, data.input_shape)
    small = quantize_graph(graph, data, Quantize(num_calibration=64))
    assert {d.action for d in small.plan.layers} == {"int8"}
    images = next(data.batches(data.test, 64))
    agreement = open_session(small.graph).run(images).argmax(1) == open_session(graph).run(
        images
    ).argmax(1)
    assert agreement.mean() > 0.9


@EACH
def test_a_shared_network_learns_by_distillation_and_stays_shared(transform):
    """Fitting alone loses the function; an epoch of distillation without labels brings much of it back."""
    data = load_data("digits")
    recipe = dict(batch_size=64, augment="none", precision="float32", compile="off")
    teacher = finetune(load_model("digits_net"), data, Finetune(epochs=3, **recipe)).module
    made = share(teacher, Share(transform)).module
    learned = finetune(
        made, data, Finetune(epochs=2, distill=1.0, learning_rate=0.03, **recipe), teacher=teacher
    ).module
    images = next(data.batches(data.validation, 200))
    truth = logits(teacher, images)
    before, after = ((logits(m, images) - truth).norm() for m in (made, learned))
    assert after < 0.6 * before
    for old, new in zip(made.modules(), learned.modules(), strict=True):
        if isinstance(new, SharedConv2d):
            assert torch.equal(old.source, new.source) and torch.equal(old.element, new.element)
            assert not torch.equal(old.weight, new.weight)
            assert not torch.equal(old.scale, new.scale)


@EACH
def test_the_plan_applies_to_a_fresh_instance(transform):
    made = share(load_model("digits_net", seed=3), Share(transform))
    told = from_dict(made.plan.to_dict())
    assert told == made.plan
    fresh = restructured(load_model("digits_net", seed=9), told)
    fresh.load_state_dict(made.module.state_dict())
    assert torch.equal(logits(fresh, noise()), logits(made.module, noise()))


def test_the_module_its_mode_and_the_random_numbers_are_left_alone():
    module = load_model("digits_net", seed=3).train()
    module.features[3].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    made = share(module, Share()).module
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(part.training for part in made.modules())
    assert not any(p.requires_grad for p in made.features[3].parameters())
    half = share(load_model("digits_net").to(torch.bfloat16), Share()).module
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_bad_requests_networks_and_plans_are_refused():
    module = load_model("digits_net")
    with pytest.raises(SpecError, match="Did you mean 'negate'"):
        Share("negated")
    with pytest.raises(SpecError, match=r"matches no layer.*features\.0"):
        share(module, Share(exclude=("features.9",)))
    with pytest.raises(ModelError, match="no filters to share"):
        share(nn.Sequential(nn.ReLU()), Share())
    decided = plan(module, Share())
    with pytest.raises(ModelError, match=r"there is no such layer; the plan belongs to another"):
        restructured(Hard(), decided)
    with pytest.raises(ModelError, match="kind 'prune'; expected share"):
        restructured(module, Plan(Prune()))
    wrong = plan(nn.ModuleDict({"odd": nn.Conv2d(3, 8, 3)}), Share())
    with pytest.raises(ModelError, match="7 filters are no multiple of 2; the plan belongs"):
        restructured(Hard(), wrong)
    with torch.no_grad():
        module.features[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"features\.3.*NaN"):
        share(module, Share())
