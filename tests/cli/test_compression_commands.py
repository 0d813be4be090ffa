"""What prune and factorize write is smaller, runs on the engine, and is told layer by layer."""

import contextlib
import io
import json
import pathlib
import re

import numpy as np
import onnx
import pytest
import torch

import tersor
from tersor.artifact import load
from tersor.cli import main
from tersor.engines import open_session
from tersor.methods.restore import plans_of


def called(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        code = main([str(each) for each in arguments])
    return code, json.loads(said.getvalue() or "null")


@pytest.fixture(scope="module")
def float_size(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "net.tersor"
    code, told = called(
        "export", "digits_net", "--to", "tersor", "--out", path, "--json",
        "--input-shape", 1, 8, 8,
    )  # fmt: skip
    assert code == 0
    return told["size_bytes"]


@pytest.mark.parametrize("structure", ["channel", "filter", "neuron"])
def test_removed_parts_are_gone_from_file_and_network(tmp_path, float_size, structure):
    out, weights = tmp_path / "net.tersor", tmp_path / "net.safetensors"
    code, told = called(
        "prune", "digits_net", "--data", "digits", "--out", out, "--structure", structure,
        "--sparsity", 0.5, "--save-weights", weights, "--json",
    )  # fmt: skip
    assert code == 0
    assert told["parameters"] < told["parameters_before"]
    assert told["size_bytes"] == out.stat().st_size < float_size
    touched = [line for line in told["layers"] if line["action"] == "remove"]
    assert touched and all(line["outputs"] or line["inputs"] for line in touched)
    logits = open_session(load(out), threads=1).run(np.zeros((2, 1, 8, 8), np.float32))
    assert logits.shape == (2, 10) and np.isfinite(logits).all()


def test_a_share_of_the_multiplications_and_a_training(tmp_path):
    code, told = called(
        "prune", "digits_net", "--data", "digits", "--out", tmp_path / "net.tersor",
        "--structure", "channel", "--macs", 0.3, "--finetune-epochs", 0.2, "--distill", 1,
        "--no-reestimate", "--json",
    )  # fmt: skip
    assert code == 0 and told["parameters"] < told["parameters_before"] / 2


def test_an_impossible_share_ends_with_its_own_exit_code(tmp_path):
    code, _ = called(
        "prune", "digits_net", "--data", "digits", "--out", tmp_path / "net.tersor",
        "--structure", "channel", "--macs", 0.0001, "--json",
    )  # fmt: skip
    assert code == 3 and not (tmp_path / "net.tersor").exists()


def test_low_rank_is_told_with_its_ranks(tmp_path, float_size):
    out = tmp_path / "net.tersor"
    code, told = called(
        "factorize", "digits_net", "--data", "digits", "--out", out, "--size", 0.5, "--json"
    )
    assert code == 0
    ranks = [line["ranks"] for line in told["layers"] if line["action"] == "factorize"]
    assert ranks and all(ranks)
    assert told["parameters"] < 0.55 * told["parameters_before"]
    assert out.stat().st_size < 0.6 * float_size


@pytest.mark.parametrize(
    "options",
    [
        ("--criterion", "wanda"),
        ("--criterion", "obc", "--reconstruct", "--scope", "global"),
        ("--structure", "n_m", "--pattern", "1:4"),
        ("--structure", "stripe", "--scope", "auto"),
        ("--schedule", "gradual", "--rounds", "2", "--finetune-epochs", "0.2"),
        ("--structure", "channel", "--scope", "auto", "--macs", "0.4"),
        (
            "--structure",
            "channel",
            "--macs",
            "0.4",
            "--schedule",
            "gradual",
            "--rounds",
            "2",
            "--finetune-epochs",
            "0.2",
        ),
    ],
    ids=lambda options: " ".join(options),
)
def test_every_way_of_pruning_is_one_command(tmp_path, options):
    out = tmp_path / "net.tersor"
    sparsity = () if "--macs" in options or "n_m" in options else ("--sparsity", 0.6)
    code, told = called(
        "prune", "digits_net", "--data", "digits", "--out", out, *options, *sparsity, "--json"
    )
    assert code == 0
    touched = [line for line in told["layers"] if line["action"] in ("prune", "remove")]
    assert touched
    logits = open_session(load(out), threads=1).run(np.zeros((2, 1, 8, 8), np.float32))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "following",
    [
        ("quantize", "--mode", "weight_only", "--bits", 8),
        ("quantize", "--data", "digits", "--num-calibration", 64),
        ("export", "--to", "tersor"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_a_command_that_takes_a_file_keeps_what_was_done_before(tmp_path, following):
    first, out = tmp_path / "pruned.tersor", tmp_path / "after.tersor"
    for command, options in (
        ("prune", ("--structure", "channel", "--sparsity", 0.5)),
        ("factorize", ("--size", 0.7)),
    ):
        code, _ = called(
            command, "digits_net", "--data", "digits", "--out", first, *options, "--json"
        )
        assert code == 0
        command, *options = following
        code, _ = called(command, first, "--out", out, *options, "--json")
        assert code == 0
        held = plans_of(load(first))
        assert [p.layers for p in plans_of(load(out))[: len(held)]] == [p.layers for p in held]
        module = tersor.load(out, into=tersor.load_model("digits_net", seed=1))
        once = tersor.load(first, into=tersor.load_model("digits_net"))
        assert {n: p.shape for n, p in module.named_parameters()} == {
            n: p.shape for n, p in once.named_parameters()
        }


@pytest.mark.parametrize("faster", [True, False])
def test_stripes_are_small_in_the_file_and_left_out_where_that_is_faster(
    tmp_path, float_size, monkeypatch, faster
):
    import tersor.bench.forms

    told = []

    def timed(pairs):
        told.extend(pairs)
        return list(pairs)[:1] if faster else []

    monkeypatch.setattr(tersor.bench.forms, "faster_forms", timed)
    out, kept = tmp_path / "net.tersor", tmp_path / "net.safetensors"
    code, answer = called(
        "prune", "digits_net", "--data", "digits", "--out", out, "--structure", "stripe",
        "--sparsity", 0.7, "--save-weights", kept, "--json",
    )  # fmt: skip
    assert code == 0
    assert told == ["features.0", "features.3", "features.7"]
    assert answer["split"] == (["features.0"] if faster else [])
    zeros = sum(
        p["sparsity"] * w for p, w in zip(answer["layers"], (288, 18432, 36864), strict=False)
    )
    assert out.stat().st_size < float_size - 0.8 * 4 * zeros
    network = tersor.load_model("digits_net", weights=kept).eval()
    images = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)
    expected = network(torch.from_numpy(images)).detach().numpy()
    found = open_session(load(out), threads=1).run(images)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    back = tersor.load(out, into=tersor.load_model("digits_net", seed=1))
    for name in told:  # scaled by the folded norms, zeros at the same places
        held, original = (n.get_submodule(name).weight for n in (back, network))
        assert torch.equal(held != 0, original != 0)


def test_the_recipe_of_the_page_on_squeezing_runs_and_its_zeros_stay(tmp_path):
    """Its squeeze asks for more calibration images than other steps; all are loaded."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "squeezing.md").read_text()
    recipe = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL).group(1))
    prune, _, squeeze = recipe["steps"]
    squeeze["size"] = "30kB"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    out = tmp_path / "net.tersor"
    code, told = called(
        "compress", "digits_net", "--data", "digits", "--recipe", tmp_path / "recipe.json",
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0 and told["size_bytes"] == out.stat().st_size <= 30_000
    codes = [
        onnx.numpy_helper.to_array(held)
        for held in load(out).to_onnx().graph.initializer
        if held.name.endswith("_quantized")
    ]
    zeros = sum(int((each == 0).sum()) for each in codes) / sum(each.size for each in codes)
    assert zeros >= prune["sparsity"] - 0.01
