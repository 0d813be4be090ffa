"""Low rank on networks: exact where nothing is cut, smaller where it is, told where it cannot be, and applied again."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.engines import open_session
from tersor.errors import BudgetError, DataError, ModelError, SpecError
from tersor.graph.export import export_onnx
from tersor.methods.factorize import apply, factorize, observe, plan, restructured
from tersor.methods.layer_outputs import observe_outputs
from tersor.models import load_model
from tersor.specs import Factorize, LayerPlan, Plan, Prune, from_dict
from tersor.specs.factorize import FACTORIZATIONS as NAMES
from tersor.tensors.factorize import FACTORIZATIONS

METHODS = pytest.mark.parametrize("method", NAMES)


def noise(count=24, shape=(1, 8, 8), seed=0):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def batches(count=24, shape=(1, 8, 8)):
    images = noise(count, shape)
    return [images[start : start + 7] for start in range(0, count, 7)]


def logits(module, images):
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images).to(next(module.parameters())))


class Hard(nn.Module):
    """What networks do to layers: strides, dilation, every padding, groups, sharing, tied weights, reads of weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(24, 24, 3, padding="same", dilation=2, bias=False)
        self.around = nn.Conv2d(24, 24, (3, 1), padding=(1, 0), padding_mode="circular")
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.pointwise = nn.Conv2d(24, 32, 1)
        self.again = nn.Linear(32, 32)
        self.encoder = nn.Linear(32, 20)
        self.decoder = nn.Linear(20, 32)
        self.decoder.weight = nn.Parameter(self.encoder.weight.detach().T.clone())
        self.tied = nn.Linear(32, 20)
        self.tied.weight = self.encoder.weight
        self.read = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.along = nn.Conv1d(32, 32, 3, padding=1)
        self.places = nn.ModuleList([self.again, self.again])
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        x = self.around(self.same(functional.relu(self.stem(images))))
        x = self.pointwise(functional.relu(self.depthwise(x) + x))
        x = x + self.up(x)[:, :1, :-1, :-1]
        tokens = x.flatten(2).transpose(1, 2)
        for place in self.places:
            tokens = tokens + functional.relu(place(tokens))
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        tokens = tokens + self.along(tokens.transpose(1, 2)).transpose(1, 2)
        hidden = self.encoder(tokens) + self.tied(tokens)
        tokens = self.decoder(hidden) + functional.linear(tokens, self.read.weight)
        return self.head(tokens.mean(1))


@pytest.fixture(scope="module")
def hard():
    torch.manual_seed(0)
    return Hard().eval()


def keeping(spec, ranks):
    """A plan at these ranks, whether they pay or not."""
    layers = [LayerPlan(name, "factorize", ranks=held) for name, held in ranks.items()]
    return Plan(spec, tuple(layers))


def test_the_request_and_the_registry_have_the_same_names():
    assert set(NAMES) == set(FACTORIZATIONS)


@METHODS
def test_full_ranks_compute_the_same_function(hard, method):
    spec = Factorize(method=method)
    images = noise(8, (3, 12, 12))
    outputs = observe(hard, spec, [images])
    decided = plan(hard, spec, outputs)
    full = {}
    for decision in decided.layers:
        weight = hard.get_submodule(decision.layer).weight
        if decision.action == "factorize" or "would take" in decision.reason:
            sizes = [min(n, weight.numel() // n) for n in weight.shape[:2]]
            two = method == "tucker2" and weight.ndim > 2 and weight[0, 0].numel() > 1
            full[decision.layer] = tuple(sizes) if two else (min(weight.flatten(1).shape),)
    assert {"stem", "same", "around", "pointwise", "along", "head", "again"} <= set(full)
    double = hard.double()
    try:
        changed = apply(double, keeping(spec, full), outputs)
        assert torch.allclose(logits(changed, images), logits(double, images), atol=1e-9)
    finally:
        hard.float()


@METHODS
def test_what_cannot_be_factorized_is_kept_and_said(hard, method):
    spec = Factorize(method=method, energy=0.2, exclude=("head", "re:dec.*"))
    images = [noise(16, (3, 12, 12))]
    decided = plan(hard, spec, observe(hard, spec, images))
    reasons = {d.layer: d.reason for d in decided.layers if d.action == "keep"}
    told = {
        "depthwise": "24 groups",
        "up": "ConvTranspose2d is not one of",
        "attention.out_proj": "NonDynamicallyQuantizableLinear is not one of",
        "encoder": "tied",
        "tied": "tied",
        "read": "never called",
        "unused": "never called",
        "head": "excluded by name",
        "decoder": "excluded by name",
    }
    for name, reason in told.items():
        assert reason in reasons[name]
    changed = {d.layer for d in decided.layers if d.action == "factorize"}
    assert {"same", "pointwise", "again", "along"} <= changed
    assert changed | set(reasons) == {d.layer for d in decided.layers}


@METHODS
def test_a_shared_layer_stays_shared(hard, method):
    spec = Factorize(method=method, energy=0.2)
    made = factorize(hard, spec, [noise(8, (3, 12, 12))]).module
    assert isinstance(made.again, nn.Sequential)
    assert made.places[0] is made.places[1] is made.again
    assert isinstance(made, Hard)


@METHODS
@pytest.mark.parametrize("multiple_of", [1, 8])
@pytest.mark.parametrize("request_", [{"energy": 0.7}, {"size": 0.4}, {"macs": 0.5}], ids=str)
def test_every_layer_that_is_replaced_saves_weights_and_multiplications(
    method, request_, multiple_of
):
    module = load_model("digits_net", seed=3)
    spec = Factorize(method=method, multiple_of=multiple_of, **request_)
    found = factorize(module, spec, batches())
    before, after = counted(module), counted(found.module)
    changed = [d for d in found.plan.layers if d.action == "factorize"]
    assert changed
    for decision in changed:
        assert all(r % multiple_of == 0 for r in decision.ranks)
        inside = [v for n, v in after.items() if n.startswith(f"{decision.layer}.")]
        for unit in (0, 1):
            assert sum(v[unit] for v in inside) < before[decision.layer][unit]
    for unit, share in enumerate((found.size_share, found.macs_share)):
        totals = [sum(v[unit] for v in held.values()) for held in (after, before)]
        assert share == pytest.approx(totals[0] / totals[1])
    assert found.size_share <= request_.get("size", 1) and found.macs_share <= request_.get(
        "macs", 1
    )


def counted(module, shape=(1, 8, 8)):
    """Weights and multiplications of each layer, by counting what runs."""
    found = {}

    def hook(name, layer):
        def see(_, inputs, output):
            positions = output[0].numel() // output.shape[1]
            found[name] = (layer.weight.numel(), layer.weight.numel() * positions)

        return see

    handles = [
        part.register_forward_hook(hook(name, part))
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    logits(module, noise(1, shape))
    for handle in handles:
        handle.remove()
    return found


def test_a_larger_budget_loses_less_and_one_that_is_met_by_all_is_the_network():
    module = load_model("digits_net", seed=3)
    images, errors = noise(40), []
    for share in (0.2, 0.4, 0.6, 0.8, 0.999):
        made = factorize(module, Factorize(size=share), [images])
        errors.append(float((logits(made.module, images) - logits(module, images)).norm()))
    assert errors == sorted(errors, reverse=True)


def test_activation_aware_outputs_are_nearer_than_those_of_plain_svd():
    module = load_model("digits_net", seed=3)
    smooth = noise(200).cumsum(axis=2).cumsum(axis=3) / 8  # neighbours are alike, as in images
    errors = {}
    for method in ("svd", "activation_aware_svd"):
        spec = Factorize(method=method)
        ranks = {"features.3": (12,), "features.7": (16,), "classifier.0": (24,)}
        outputs = observe(module, spec, [smooth])
        made = apply(module, keeping(spec, ranks), outputs)
        errors[method] = float((logits(made, smooth) - logits(module, smooth)).norm())
    assert errors["activation_aware_svd"] < 0.8 * errors["svd"]


@METHODS
def test_the_plan_applies_to_a_fresh_instance_which_then_trains(method):
    module = load_model("digits_net", seed=3)
    found = factorize(module, Factorize(method=method, energy=0.6), batches())
    told = from_dict(found.plan.to_dict())
    assert told == found.plan
    fresh = restructured(load_model("digits_net", seed=9), told)
    fresh.load_state_dict(found.module.state_dict())
    images = noise()
    assert torch.equal(logits(fresh, images), logits(found.module, images))
    assert type(fresh) is type(module)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.01)
    labels = torch.arange(len(images)) % 10
    losses = []
    for _ in range(5):
        loss = functional.cross_entropy(fresh(torch.from_numpy(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@METHODS
def test_the_graph_computes_what_the_module_does(method):
    found = factorize(
        load_model("digits_net", seed=3), Factorize(method=method, energy=0.7), batches()
    )
    graph = export_onnx(found.module, (1, 8, 8))
    images = noise(9)
    session = open_session(graph)
    assert np.allclose(session.run(images), logits(found.module, images), rtol=1e-3, atol=1e-5)


@METHODS
def test_the_module_its_mode_and_the_random_numbers_are_left_alone(method):
    module = load_model("digits_net", seed=3).train()
    module.features[3].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    made = factorize(module, Factorize(method=method, energy=0.6), batches()).module
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert all(part.training for part in module.modules())
    assert all(part.training for part in made.modules())
    assert not any(p.requires_grad for p in made.features[3].parameters())
    assert all(p.requires_grad for p in made.classifier.parameters())
    assert not module.features[3]._forward_hooks


def test_half_weights_stay_half():
    module = load_model("digits_net", seed=3).to(torch.bfloat16)
    made = factorize(module, Factorize(energy=0.6), batches()).module
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert any(isinstance(part, nn.Sequential) for part in made.features)


def test_zero_weights_and_constant_outputs_are_exact():
    module = load_model("digits_net", seed=3)
    with torch.no_grad():
        module.features[3].weight.zero_()
        module.classifier[0].weight.zero_()
    images = noise()
    for method in NAMES:
        made = factorize(module, Factorize(method=method), [images]).module
        layer = made.classifier[0]
        assert isinstance(layer, nn.Sequential) and layer[0].out_features == 1
        assert torch.isfinite(logits(made, images)).all()


class Reads(nn.Module):
    """Calls a layer and reads its weight too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, images):
        x = images.flatten(1)
        return self.layer(x) + functional.linear(x, self.layer.weight)


def test_a_module_that_reads_a_replaced_weight_is_refused():
    with pytest.raises(ModelError, match=r"reads the weight of a layer; exclude that layer"):
        factorize(Reads(), Factorize(energy=0.3), batches())
    kept = factorize(Reads(), Factorize(energy=0.3, exclude=("layer",)), batches())
    assert kept.size_share == 1.0


def test_layers_with_hooks_and_whole_networks_are_kept():
    module = load_model("digits_net", seed=3)
    module.features[3].register_forward_hook(lambda *_: None)
    decided = factorize(module, Factorize(energy=0.5), batches()).plan
    assert "hooks" in {d.layer: d.reason for d in decided.layers}["features.3"]
    alone = factorize(nn.Conv2d(1, 8, 3), Factorize(energy=0.5), batches())
    assert "whole network" in alone.plan.layers[0].reason


def test_a_plan_of_another_network_is_refused(hard):
    spec = Factorize(method="svd", energy=0.5)
    outputs = observe(hard, spec, [noise(4, (3, 12, 12))])
    decided = plan(hard, spec, outputs)
    with pytest.raises(ModelError, match=r"no such layer.*another network"):
        restructured(load_model("digits_net"), decided)
    for ranks in ((99,), (0,), (4, 4), ()):
        wrong = keeping(spec, {"head": ranks})
        with pytest.raises(ModelError, match=r"Linear.*another network"):
            restructured(hard, wrong)
    with pytest.raises(ModelError, match="kind 'prune'; expected factorize"):
        restructured(hard, Plan(Prune()))


def test_a_budget_that_cannot_be_met_is_refused_with_the_least():
    module = load_model("digits_net")
    with pytest.raises(
        BudgetError, match=r"size 0\.01 cannot be met: the least possible share is"
    ) as told:
        factorize(module, Factorize(size=0.01), batches())
    assert told.value.exit_code == 3
    with pytest.raises(BudgetError, match=r"most of it in layer 'classifier\.0'"):
        factorize(module, Factorize(size=0.3, exclude=("classifier.0",)), batches())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "svdd"}, "Did you mean 'svd'"),
        ({"rank": "best"}, r"factorize\.rank must be one of energy, vbmf"),
        ({"energy": 0}, r"factorize\.energy is a share above 0"),
        ({"energy": 1.5}, "got 1.5"),
        ({"energy": float("nan")}, "got nan"),
        ({"size": 1.0}, r"factorize\.size is the share of the weights"),
        ({"macs": -0.5}, r"factorize\.macs is the share of the multiplications"),
        ({"size": 0.5, "macs": 0.5}, "takes one budget"),
        ({"rank": "vbmf", "method": "svd", "size": 0.5}, "chooses ranks by itself"),
        ({"rank": "vbmf"}, "use method svd or tucker2"),
        ({"multiple_of": 0}, "at least 1, got 0"),
        ({"multiple_of": 2.5}, "whole number"),
        ({"energy": "most"}, "must be a number"),
    ],
    ids=str,
)
def test_requests_that_mean_nothing_are_refused(fields, told):
    with pytest.raises(SpecError, match=told):
        from_dict({"kind": "factorize", **fields})


def test_bad_networks_and_inputs_are_refused():
    module = load_model("digits_net")
    with pytest.raises(ModelError, match="nothing to factorize"):
        factorize(nn.Sequential(nn.ReLU()), Factorize(), batches())
    with pytest.raises(SpecError, match=r"matches no layer.*features\.0"):
        factorize(module, Factorize(exclude=("features.99",)), batches())
    with pytest.raises(DataError, match="no unlabelled inputs"):
        factorize(module, Factorize(), [])
    broken = noise()
    broken[3] = np.nan
    with pytest.raises(DataError, match="image 3"):
        factorize(module, Factorize(), [broken])
    with pytest.raises(DataError, match="float64"):
        factorize(module, Factorize(), [noise().astype(np.float64)])
    with pytest.raises(
        ModelError, match=r"cannot run calibration batch 0 of shape \(24, 3, 8, 8\)"
    ):
        factorize(module, Factorize(), [noise(24, (3, 8, 8))])
    with torch.no_grad():
        module.features[3].weight[0, 0, 0, 0] = float("inf")
    for method in ("svd", "tucker2"):
        with pytest.raises(ModelError, match=r"features\.3"):
            factorize(module, Factorize(method=method), batches())


def test_moments_are_those_of_all_positions_of_all_images():
    module = load_model("digits_net", seed=3)
    with torch.no_grad():
        module.features[3].weight += 0.5  # far from zero: sums of squares would cancel
    images = noise(70)
    seen = observe_outputs(
        module, [images[:50], images[50:]], ["features.3", "classifier.0"],
        with_moments=["features.3", "classifier.0"],
    )  # fmt: skip
    double = load_model("digits_net", seed=3).double().eval()
    double.load_state_dict(module.state_dict())
    caught = {}
    for name in seen:
        part = double.get_submodule(name)
        part.register_forward_hook(lambda _, i, o, name=name: caught.update({name: o.clone()}))
    logits(double, images)
    for name, held in seen.items():
        rows = caught[name].movedim(1, 0).flatten(1)
        assert torch.allclose(held.moments.mean, rows.mean(1), rtol=1e-5, atol=1e-6)
        expected = torch.cov(rows, correction=0)
        assert torch.allclose(
            held.moments.covariance, expected, rtol=1e-4, atol=1e-4 * expected.max()
        )
        assert held.moments.num_samples == rows.shape[1]
    assert (seen["features.3"].positions, seen["features.3"].positions_in) == (64, 64)
    assert (seen["classifier.0"].positions, seen["classifier.0"].calls) == (1, 1)


def test_without_moments_one_image_is_read():
    def endless():
        while True:
            yield noise(5)

    seen = observe_outputs(load_model("digits_net"), endless(), ["features.3"])
    assert seen["features.3"].moments is None
