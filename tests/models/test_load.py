"""Networks by name and files of weights: exact facts, round trips, and files that mean harm."""

import os
import pathlib
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tersor.errors import ModelError, RunError, SpecError, UnknownNameError
from tersor.models import (
    MODELS,
    example_input,
    load_model,
    load_weights_,
    read_weights,
    save_weights,
)


def equal_states(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def net():
    return load_model("digits_net", seed=1)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("resnet18", {}, 11_173_962),
        ("vgg16", {}, 138_357_544),
        ("vgg16", {"num_classes": 10}, 134_301_514),
        ("vgg16_bn", {}, 138_365_992),
    ],
)
def test_parameter_counts_computed_from_the_modules(name, options, parameters):
    with torch.device("meta"):
        module = MODELS[name](**options)
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_the_resnet_has_no_early_stride():
    module = load_model("resnet18")
    stem = module.maxpool(module.relu(module.bn1(module.conv1(torch.zeros(1, 3, 32, 32)))))
    assert stem.shape == (1, 64, 32, 32)


@pytest.mark.parametrize("classes", [1, 10, 7])
def test_num_classes_is_the_width_of_the_output(classes):
    module = load_model("digits_net", num_classes=classes)
    assert module(example_input((1, 8, 8))).shape == (2, classes)


def test_a_seed_decides_the_weights_and_leaves_torchs_generator_alone(net):
    before = torch.random.get_rng_state()
    assert equal_states(net, load_model("digits_net", seed=1))
    assert not equal_states(net, load_model("digits_net", seed=2))
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(UnknownNameError):
        load_model("no", seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_models_come_in_eval_mode(net):
    assert not any(module.training for module in net.modules())


def test_torchvisions_classifiers_by_their_own_names():
    module = load_model("torchvision:squeezenet1_1", num_classes=3)
    assert type(module).__name__ == "SqueezeNet"
    with torch.inference_mode():
        assert module(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet81", "resnet18"), ("torchvision:resnet_50", "resnet50"), ("digitsnet", "digits_net")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UnknownNameError, match=rf"unknown .*Did you mean '{nearest}'\?"):
        load_model(name)


def test_a_number_of_classes_below_one_is_refused():
    with pytest.raises(SpecError, match="num_classes must be 1 or more, got 0"):
        load_model("digits_net", num_classes=0)


USER = """
import torch
def net(num_classes=3): return torch.nn.Linear(4, num_classes)
def fixed(): return torch.nn.Linear(4, 5)
def number(): return 5
def broken(): raise ValueError("no such width")
class Net(torch.nn.Module):
    pass
"""


@pytest.fixture
def user(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(USER)
    return path


def test_a_users_function_or_class(user):
    assert load_model(f"{user}:net").out_features == 3
    assert load_model(f"{user}:net", num_classes=8).out_features == 8
    assert load_model(f"{user}:fixed").out_features == 5
    assert type(load_model(f"{user}:Net")).__name__ == "Net"


@pytest.mark.parametrize(
    ("function", "options", "told"),
    [
        ("number", {}, "returned int; expected a torch.nn.Module"),
        ("fixed", {"num_classes": 2}, "could not be called with {'num_classes': 2}"),
        ("broken", {}, "no such width"),
    ],
)
def test_a_users_function_that_gives_no_module_is_refused(user, function, options, told):
    with pytest.raises(ModelError, match=told):
        load_model(f"{user}:{function}", **options)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_weights_of_every_format_give_the_same_network(tmp_path, net, suffix):
    path = tmp_path / f"net.{suffix}"
    if suffix == "safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    assert equal_states(load_model("digits_net", weights=path), net)


def test_a_state_dict_inside_a_checkpoint_is_found(tmp_path, net):
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "net.pt")
    assert equal_states(load_model("digits_net", weights=tmp_path / "net.pt"), net)


def test_weights_of_other_floating_types_arrive_as_float32(tmp_path, net):
    state = {k: v.double() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    assert equal_states(load_model("digits_net", weights=tmp_path / "net.pt"), net)


def test_saved_weights_round_trip_bit_for_bit(tmp_path, net):
    size = save_weights(net, tmp_path / "net.safetensors")
    assert size == (tmp_path / "net.safetensors").stat().st_size
    assert equal_states(load_model("digits_net", weights=tmp_path / "net.safetensors"), net)


def test_half_weights_are_the_nearest_halves_and_then_stay(tmp_path, net):
    full = save_weights(net, tmp_path / "full.safetensors")
    half = save_weights(net, tmp_path / "half.safetensors", half=True)
    assert half < 0.6 * full
    once = load_model("digits_net", weights=tmp_path / "half.safetensors")
    for key, value in net.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(once.state_dict()[key], expected), key
    save_weights(once, tmp_path / "again.safetensors", half=True)
    first, second = (tmp_path / f"{name}.safetensors" for name in ("half", "again"))
    assert first.read_bytes() == second.read_bytes()


class Pooled(nn.Module):
    def __init__(self, copies):
        super().__init__()
        self.first = nn.Linear(3 * 49, 5)
        if copies:
            with torch.no_grad():
                columns = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
                self.first.weight.copy_(columns.repeat_interleave(49, 1))


def test_equal_columns_are_stored_summed_and_come_back_equal(tmp_path):
    module = Pooled(copies=True)
    save_weights(module, tmp_path / "net.safetensors", half=True)
    stored = load_file(tmp_path / "net.safetensors")
    assert stored["first.weight.sum49"].shape == (5, 3) and "first.weight" not in stored
    found = read_weights(tmp_path / "net.safetensors")["first.weight"]
    groups = found.view(5, 3, 49)
    assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
    assert torch.equal(groups[:, :, 0], (module.first.weight[:, ::49] * 49).half().float() / 49)
    again = Pooled(copies=False)
    load_weights_(again, tmp_path / "net.safetensors")
    save_weights(again, tmp_path / "again.safetensors", half=True)
    first, second = (tmp_path / f"{name}.safetensors" for name in ("net", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_unequal_columns_are_stored_whole(tmp_path):
    save_weights(Pooled(copies=False), tmp_path / "net.safetensors", half=True)
    assert load_file(tmp_path / "net.safetensors")["first.weight"].shape == (5, 147)


def test_weights_beyond_half_precision_are_refused_not_made_infinite(tmp_path, net):
    with torch.no_grad():
        net.classifier[0].weight[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"classifier\.0\.weight.*half"):
        save_weights(net, tmp_path / "net.safetensors", half=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("features.0.weight"), r"features\.0\.weight is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not part of the model"),
        (
            lambda s: s.update({"classifier.2.bias": torch.zeros(7)}),
            r"classifier\.2\.bias is \(7,\), the model has \(10,\)",
        ),
        (
            lambda s: s.update({"classifier.2.bias": torch.full((10,), torch.nan)}),
            r"classifier\.2\.bias holds NaN or infinity",
        ),
        (
            lambda s: s.update({"classifier.2.bias": torch.full((10,), -torch.inf)}),
            r"classifier\.2\.bias holds NaN or infinity",
        ),
        (lambda s: s.clear(), r"is missing.*\(and \d+ more\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_and_the_model_is_left_alone(
    tmp_path, net, change, told
):
    state = load_model("digits_net", seed=9).state_dict()
    change(state)
    save_file(state, tmp_path / "net.safetensors")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ModelError, match=f"does not fit DigitsNet: .*{told}"):
        load_weights_(net, tmp_path / "net.safetensors")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


class Attack:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return pathlib.Path.touch, (self.victim,)


@pytest.mark.parametrize("write", ["torch", "legacy", "pickle"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path, net, write):
    victim, path = tmp_path / "victim", tmp_path / "net.pt"
    content = {**net.state_dict(), "payload": Attack(victim)}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(ModelError, match=r"net\.pt cannot be read as weights"):
        load_model("digits_net", weights=path)
    assert not victim.exists()
    torch.load(path, weights_only=False) if write != "pickle" else pickle.loads(path.read_bytes())
    assert victim.exists(), "the attack is a real one"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"rubbish", b"PK\x03\x04", b"\x80\x02.", b"\xff" * 99]
)
def test_rubbish_is_refused_by_the_files_name(tmp_path, suffix, content):
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"net\.{suffix} cannot be read as weights"):
        read_weights(path)


@pytest.mark.parametrize("suffix", ["pt", "legacy.pt", "safetensors"])
def test_damage_anywhere_is_a_typed_refusal_or_weights(tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == "pt")
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        at, bit = generator.integers(len(whole)), 1 << int(generator.integers(8))
        damaged = bytearray(whole)
        damaged[at] ^= bit
        cut = len(whole) if generator.random() < 0.6 else at
        path.write_bytes(bytes(damaged[:cut]))
        try:
            found = read_weights(path)
        except ModelError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(value, torch.Tensor) for value in found.values())


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2), 5])
def test_a_file_that_holds_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ModelError, match="expected a state dict of tensors"):
        read_weights(tmp_path / "net.pt")


def test_a_missing_file_and_a_directory_are_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ModelError, match="no such weights file"):
            read_weights(path)


def test_writing_where_it_cannot_be_is_told_and_leaves_nothing(tmp_path, net):
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken").mkdir()
    for name in ("file/net.safetensors", "taken"):
        with pytest.raises(RunError, match="cannot be written"):
            save_weights(net, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_a_full_disk_keeps_the_old_file(tmp_path, net, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_weights(net, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot be written: .*No space left"):
        save_weights(net, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tied_weights_are_stored_and_loaded(tmp_path):
    def make():
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module[1].weight = module[0].weight
        return module

    module = make()
    save_weights(module, tmp_path / "net.safetensors")
    again = make()
    load_weights_(again, tmp_path / "net.safetensors")
    assert equal_states(module, again) and again[0].weight is again[1].weight


def test_example_input_is_seeded_noise():
    first = example_input((3, 5, 7), batch=4)
    assert first.shape == (4, 3, 5, 7) and first.dtype == torch.float32
    assert torch.equal(first, example_input((3, 5, 7), batch=4)) and first.std() > 0.5
