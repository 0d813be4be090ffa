"""Pruning: the plan's numbers are the module's zeros, the input is left alone, recovery keeps the masks."""

import pytest
import torch
from torch import nn

from tersor.data import load_data
from tersor.errors import ModelError, SpecError
from tersor.methods.prune import apply, plan, prune
from tersor.methods.reestimate import reestimate_batch_norm
from tersor.models import load_model
from tersor.pipeline import prune_model
from tersor.specs import Finetune, Prune


@pytest.fixture(scope="module")
def module():
    return load_model("digits_net", seed=3)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_zeros_are_exactly_the_planned_ones(module, scope, sparsity):
    before = {k: v.clone() for k, v in module.state_dict().items()}
    pruned = prune(module, Prune(sparsity=sparsity, scope=scope))
    layers = dict(pruned.module.named_modules())
    total = zeros = 0
    for decision in pruned.plan.layers:
        weight = layers[decision.layer].weight
        count = int((weight == 0).sum())
        assert count == round(decision.sparsity * weight.numel())
        total, zeros = total + weight.numel(), zeros + count
    assert zeros == pytest.approx(sparsity * total, abs=len(layers))
    assert pruned.sparsity == pytest.approx(zeros / total)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_layer_scope_matches_torchs_l1_unstructured(module):
    import copy

    from torch.nn.utils import prune as oracle

    pruned = prune(module, Prune(sparsity=0.5))
    reference = copy.deepcopy(module)
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            oracle.l1_unstructured(layer, "weight", amount=0.5)
            assert torch.equal(pruned.masks[f"{name}.weight"], layer.weight_mask.bool())


def test_a_plan_applies_again_to_a_fresh_instance(module):
    decided = plan(module, Prune(sparsity=0.6, scope="global"))
    fresh = load_model("digits_net", seed=3)
    first, second = apply(module, decided), apply(fresh, decided)
    for name, mask in first.masks.items():
        assert torch.equal(mask, second.masks[name])


def test_a_plan_of_another_network_is_refused(module):
    decided = plan(module, Prune())
    with pytest.raises(ModelError, match=r"does not have; the plan belongs to another network"):
        apply(nn.Sequential(nn.Linear(4, 4)), decided)


def test_excluded_layers_are_kept_and_said(module):
    pruned = prune(module, Prune(sparsity=0.5, exclude=("features.0", "re:classifier.*")))
    kept = {d.layer: d.reason for d in pruned.plan.layers if d.action == "keep"}
    assert set(kept) == {"features.0", "classifier.0", "classifier.2"}
    assert all(kept.values())
    assert not any(name.startswith("classifier") for name in pruned.masks)


def test_a_pattern_that_matches_nothing_is_refused(module):
    with pytest.raises(SpecError, match=r"features\.1"):
        prune(module, Prune(exclude=("features.10",)))


def test_not_finite_weights_are_refused(module):
    broken = load_model("digits_net")
    with torch.no_grad():
        broken.features[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"features\.0.*NaN"):
        prune(broken, Prune())


def test_nothing_to_prune_is_said():
    with pytest.raises(ModelError, match="nothing to prune"):
        prune(nn.Sequential(nn.ReLU()), Prune())


def test_batch_norm_reestimation_is_the_average_over_batches(module):
    inputs = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    fresh = reestimate_batch_norm(module, [inputs[:12], inputs[12:]], precision="float32")
    first = module.features[0](torch.from_numpy(inputs))
    mean = first.mean(dim=(0, 2, 3))
    halves = [h.var(dim=(0, 2, 3), unbiased=True) for h in first.split(12)]
    assert torch.allclose(fresh.features[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(fresh.features[1].running_var, torch.stack(halves).mean(0), rtol=1e-4)
    assert not torch.allclose(module.features[1].running_mean, mean, atol=1e-5)
    assert fresh.features[1].momentum == module.features[1].momentum


def test_fine_tuning_keeps_every_pruned_weight_at_zero():
    data = load_data("digits")
    module = load_model("digits_net")
    spec = Finetune(epochs=1, batch_size=64, augment="none", precision="float32", compile="off")
    result = prune_model(module, data, Prune(sparsity=0.8), recovery=spec)
    assert result.finetuned is not None
    for name, layer in result.finetuned.module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            before = dict(result.one_shot.named_modules())[name].weight
            assert torch.all(layer.weight[before == 0] == 0)
            assert not torch.equal(layer.weight, before)
