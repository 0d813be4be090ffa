"""Requests: frozen, round trips through JSON, and no typo or wrong value becomes a default."""

import dataclasses as dc
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import SpecError
from tersor.specs import (
    KINDS,
    Factorize,
    Finetune,
    LayerPlan,
    Plan,
    Prune,
    Quantize,
    Recipe,
    Share,
    from_dict,
)

shares = st.floats(0, 0.999)
prunes = st.builds(
    Prune,
    sparsity=shares,
    criterion=st.text(),
    scope=st.sampled_from(["layer", "global"]),
    floor=st.floats(0, 1),
    exclude=st.lists(st.text()).map(tuple),
)
quantizes = st.builds(
    Quantize,
    mode=st.sampled_from(["static", "dynamic", "weight_only"]),
    granularity=st.sampled_from(["per_tensor", "per_channel"]),
    num_calibration=st.integers(1, 10**6),
)
finetunes = st.builds(
    Finetune,
    epochs=st.floats(1, 100),
    learning_rate=st.floats(1e-6, 10),
    small_epochs=st.floats(0, 1),
    distill=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
factorizes = st.builds(
    Factorize,
    method=st.sampled_from(["svd", "activation_aware_svd", "tucker2"]),
    energy=st.floats(0.01, 1),
    macs=shares,
    multiple_of=st.integers(1, 64),
)
share_requests = st.builds(Share, transform=st.sampled_from(["negate", "mirror", "mirror4"]))
steps = prunes | quantizes | finetunes | factorizes | share_requests
ranks = st.lists(st.integers(1, 512), max_size=2).map(tuple)
layers = st.builds(LayerPlan, layer=st.text(), action=st.text(), sparsity=shares, ranks=ranks)
specs = (
    steps
    | st.builds(Recipe, steps=st.lists(steps, max_size=3).map(tuple), seed=st.integers(0))
    | st.builds(Plan, request=steps, layers=st.lists(layers, max_size=3).map(tuple))
)


@given(specs)
def test_json_and_back_is_the_same_spec(spec):
    text = json.dumps(spec.to_dict(), allow_nan=False)
    again = from_dict(json.loads(text))
    assert again == spec and hash(again) == hash(spec) and type(again) is type(spec)
    assert json.dumps(again.to_dict()) == text


@pytest.mark.parametrize("spec", [Prune(), Quantize(), Factorize(), Share(), Finetune()])
def test_kind_comes_first_and_specs_are_frozen(spec):
    assert next(iter(spec.to_dict().items())) == ("kind", spec.kind)
    assert KINDS[spec.kind] is type(spec)
    with pytest.raises(dc.FrozenInstanceError):
        spec.seed = 1
    assert from_dict({"kind": spec.kind}) == spec


BAD = [
    (Prune, "sparsity", [-0.1, 1, 1.5, math.nan, "half", None]),
    (Prune, "floor", [-1, 2, math.nan, "low"]),
    (Prune, "scope", ["layers", "", None, 3]),
    (Prune, "structure", ["filters", 7]),
    (Quantize, "mode", ["statik", None, 1]),
    (Quantize, "granularity", ["per_chanel", 0]),
    (Quantize, "bits", [0, 9, 16, "8", math.nan]),
    (Quantize, "activation_bits", [1, 9, "8"]),
    (Quantize, "edge_bits", [-1, 9, None]),
    (Quantize, "mean_bits", [-1.0, 0.5, 9.0, math.nan, "x"]),
    (Quantize, "code_bytes", [-1, 0.5, "small", None]),
    (Quantize, "code", ["linear", None]),
    (Quantize, "symmetry", ["odd", True]),
    (Quantize, "activation_symmetry", ["odd", None]),
    (Quantize, "group_size", [0, -1, "x"]),
    (Quantize, "weight_search", ["max", None]),
    (Quantize, "rounding", ["up", None]),
    (Quantize, "equalize", ["yes", 1, None]),
    (Quantize, "bias_correction", ["yes", 0, None]),
    (Quantize, "reestimate", ["yes", 1, None]),
    (Quantize, "num_calibration", [0, -1, "many", math.nan]),
    (Factorize, "method", ["svdd", None]),
    (Factorize, "rank", ["best", None]),
    (Factorize, "energy", [0, -0.1, 1.1, math.nan, "most"]),
    (Factorize, "size", [-0.1, 1, math.nan, "x"]),
    (Factorize, "macs", [-0.1, 1, math.inf, None]),
    (Factorize, "multiple_of", [0, -8, 2.5, "x"]),
    (Share, "transform", ["negated", None]),
    (Finetune, "epochs", [0, -1, math.nan, math.inf, "ten", None]),
    (Finetune, "learning_rate", [0, -0.1, math.nan, "fast"]),
    (Finetune, "batch_size", [0, 1, -4, "big", None]),
    (Finetune, "momentum", [-0.1, 1, math.nan, "x"]),
    (Finetune, "weight_decay", [-1, math.nan, math.inf, "x"]),
    (Finetune, "label_smoothing", [-0.1, 1]),
    (Finetune, "warmup", [-0.1, 1.0]),
    (Finetune, "ema_decay", [1, -1, math.nan]),
    (Finetune, "small_epochs", [-1, 11, math.nan, "x"]),
    (Finetune, "small_size", [-1, "x"]),
    (Finetune, "augment", ["flip", None]),
    (Finetune, "cutout", [-0.1, 1, math.nan, "x"]),
    (Finetune, "distill", [-0.1, 1.1, math.nan, "x"]),
    (Finetune, "temperature", [0, -1, math.inf]),
    (Finetune, "precision", ["fp16", None]),
    (Finetune, "compile", ["yes", True]),
    (Finetune, "schedule", ["linear", None]),
    (Finetune, "original_epochs", [-1.0, math.inf, "x"]),
    (Finetune, "hints", [-0.1, 1.1, math.nan, "x"]),
    (Finetune, "hint_layers", ["layer1", (3,), None]),
    (Finetune, "slimming", [-1.0, math.nan, "x"]),
    (Finetune, "stripes", [-1.0, math.inf, "x"]),
    (Finetune, "gradient_topk", [-0.1, 1.0, math.nan]),
    (Finetune, "eval_mode", ["yes", 1, None]),
    (Finetune, "views", [-1, 1.5, "x"]),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(kind, field, value) for kind, field, values in BAD for value in values],
)
def test_a_value_that_means_nothing_is_refused_by_the_fields_name(kind, field, value):
    data = {"kind": kind.kind, field: value}
    with pytest.raises(SpecError, match=f"{kind.kind}") as refused:
        from_dict(data)
    told = str(refused.value)
    assert field in told
    assert repr(value) in told or str(value) in told


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, "unknown kind None"),
        ({"kind": "prun"}, "Did you mean 'prune'"),
        ({"kind": ["prune"]}, "unknown kind"),
        ({"kind": 5}, "unknown kind 5"),
        ({"kind": "prune", "sparcity": 0.5}, "unknown field 'sparcity'.*Did you mean 'sparsity'"),
        ({"kind": "finetune", "epoch": 3}, "Did you mean 'epochs'"),
        ({"kind": "layer_plan", "layer": "a"}, "layer_plan.*action"),
        ({"kind": "recipe"}, "recipe.*steps"),
        ({"kind": "recipe", "steps": [{"kind": "prune", "sparsity": 2}]}, "sparsity"),
        ({"kind": "plan", "request": {"kind": "nothing"}}, "unknown kind 'nothing'"),
    ],
)
def test_a_typo_never_becomes_a_default(data, told):
    with pytest.raises(SpecError, match=told):
        from_dict(data)
