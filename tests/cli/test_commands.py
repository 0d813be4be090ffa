"""The commands as a person types them, end to end on the embedded digits."""

import importlib.metadata
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from tersor.cli import main

TRAIN = ("--epochs", "4", "--batch-size", "64", "--augment", "crop", "--compile", "off")


def run(capsys, *arguments):
    """Exit code, the JSON object on stdout (None without --json), and stderr."""
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    answer = json.loads(captured.out) if "--json" in arguments else None
    return code, answer, captured


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with trained weights, made by the command itself."""
    directory = tmp_path_factory.mktemp("home")
    out = directory / "net.safetensors"
    assert main(["train", "digits_net", "--data", "digits", "--out", str(out), *TRAIN]) == 0
    return directory


def test_train_writes_weights_and_their_recipe(home):
    told = json.loads((home / "net.json").read_text())
    assert told["validation_accuracy"] > 0.8
    assert told["recipe"]["epochs"] == 4
    assert told["size_bytes"] == (home / "net.safetensors").stat().st_size
    assert sorted(p.name for p in home.iterdir()) == ["net.json", "net.safetensors"]


def test_prune_quantize_evaluate_benchmark_inspect_export(home, capsys, tmp_path):
    weights = ("--weights", home / "net.safetensors")
    pruned, small = tmp_path / "pruned.tersor", tmp_path / "small.tersor"
    code, told, _ = run(
        capsys, "prune", "digits_net", *weights, "--data", "digits", "--out", pruned,
        "--sparsity", "0.9", "--scope", "global", "--json",
    )  # fmt: skip
    assert code == 0
    assert told["size_bytes"] == pruned.stat().st_size
    assert {layer["action"] for layer in told["layers"]} == {"prune"}

    code, told, _ = run(
        capsys, "quantize", "digits_net", *weights, "--data", "digits", "--out", small,
        "--num-calibration", "64", "--json",
    )  # fmt: skip
    assert code == 0
    assert told["macs_share"] == 1.0

    code, told, _ = run(
        capsys, "evaluate", small, "--data", "digits", "--original", "digits_net",
        "--original-weights", home / "net.safetensors", "--json",
    )  # fmt: skip
    assert code == 0
    assert told["num_samples"] == 449
    assert told["size_bytes"] == small.stat().st_size
    interval = told["interval"]
    assert interval["low_pt"] <= interval["difference_pt"] <= interval["high_pt"]
    assert abs(interval["difference_pt"]) < 2

    code, told, _ = run(
        capsys, "benchmark", small, "--batch", "1", "3", "--seconds", "0.2", "--threads", "1",
        "--json",
    )  # fmt: skip
    assert code == 0
    assert [t["batch"] for t in told["timings"]] == [1, 3]
    for timing in told["timings"]:
        assert 0 < timing["p05_ms"] <= timing["median_ms"] <= timing["p95_ms"]

    code, told, _ = run(capsys, "inspect", small, "--json")
    assert code == 0
    assert any("features.0" in layer["name"] for layer in told["layers"])

    exported = tmp_path / "small.onnx"
    code, told, _ = run(capsys, "export", small, "--to", "onnx", "--out", exported, "--json")
    assert code == 0
    onnx.checker.check_model(onnx.load(exported))
    assert told["size_bytes"] == exported.stat().st_size


def test_dynamic_and_weight_only_need_no_data(home, capsys, tmp_path):
    full = tmp_path / "float.tersor"
    weights = ("--weights", str(home / "net.safetensors"))
    shape = ("--input-shape", "1", "8", "8")
    run(capsys, "export", "digits_net", *weights, *shape, "--to", "tersor", "--out", full)
    for mode in ("dynamic", "weight_only"):
        out = tmp_path / f"{mode}.tersor"
        code, told, _ = run(capsys, "quantize", full, "--mode", mode, "--out", out, "--json")
        assert code == 0
        assert told["size_bytes"] < full.stat().st_size


@pytest.mark.parametrize(("side", "larger"), [(2, True), (32, False)])
def test_a_file_that_is_not_smaller_is_said_plainly(capsys, tmp_path, side, larger):
    (tmp_path / "tiny.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        f"    return nn.Sequential(nn.Flatten(), nn.Linear({side * side}, 10))\n"
    )
    code, _, captured = run(
        capsys, "quantize", f"{tmp_path / 'tiny.py'}:net", "--mode", "dynamic",
        "--input-shape", "1", side, side, "--out", tmp_path / "tiny.tersor",
    )  # fmt: skip
    assert code == 0
    assert ("not smaller" in captured.out) == larger
    float_bytes = side * side * 10 * 4
    assert ((tmp_path / "tiny.tersor").stat().st_size > float_bytes) == larger


def test_people_get_text_and_json_gets_stdout_alone(home, capsys):
    weights = ("--weights", home / "net.safetensors")
    _, _, captured = run(capsys, "evaluate", "digits_net", *weights, "--data", "digits")
    size = (home / "net.safetensors").stat().st_size
    assert "accuracy" in captured.out and f"{size:,} bytes" in captured.out
    _, answer, captured = run(
        capsys, "evaluate", "digits_net", *weights, "--data", "digits", "--json"
    )
    assert captured.out.count("\n") == 1
    assert "accuracy" in captured.err
    assert set(answer) >= {"accuracy", "num_samples", "size_bytes", "interval"}


REFUSALS = {
    "unknown model": (["evaluate", "resnet81", "--data", "digits"], 2, "Did you mean 'resnet18'?"),
    "unknown data": (["evaluate", "digits_net", "--data", "digit"], 2, "Did you mean 'digits'?"),
    "unknown torchvision": (["inspect", "torchvision:resnet19"], 2, "Did you mean 'resnet1"),
    "unknown criterion": (
        ["prune", "digits_net", "--data", "digits", "--out", "x.tersor", "--criterion", "randon"],
        2,
        "Did you mean 'random'?",
    ),
    "unknown mode": (["quantize", "digits_net", "--out", "x.tersor", "--mode", "statc"], 2, "'static'"),
    "missing weights": (["inspect", "digits_net", "--weights", "none.pt"], 1, "no such weights file"),
    "missing file": (["inspect", "none.tersor"], 1, "none.tersor"),
    "missing folder": (["evaluate", "digits_net", "--data", "folder:none"], 1, "no such directory"),
    "missing function file": (["inspect", "none.py:net"], 2, "no such file"),
    "wrong shape": (["evaluate", "resnet18", "--data", "digits"], 1, "resnet18|ResNet|shape"),
    "no data": (["quantize", "digits_net", "--out", "x.tersor"], 2, "--data"),
    "impossible sparsity": (
        ["prune", "digits_net", "--data", "digits", "--out", "x.tersor", "--sparsity", "1.5"],
        2,
        "1.5",
    ),
    "wrong ending": (["export", "digits_net", "--out", "x.txt"], 2, r"\.onnx"),
    "no rows": (["report", "."], 1, "no such file"),
    "study weights": (
        ["study", "--data", "digits", "--out", "s", "--weights", "resnet18"], 2, "NAME=FILE"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_gets_one_message_and_leaves_nothing(case, capsys, tmp_path, monkeypatch):
    arguments, expected, words = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == expected
    assert captured.err.splitlines()[-1].startswith("tersor: ")
    import re

    assert re.search(words, captured.err)
    assert "Traceback" not in captured.err
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_wrong_options_are_usage_errors(capsys):
    for arguments in (["trian"], ["evaluate"], ["prune", "digits_net", "--sparsty", "0.5"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    capsys.readouterr()


def test_unreadable_image_is_named(capsys, tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        for index in range(12):
            pixels = np.full((8, 8, 3), index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / "cat" / f"{index:02}.png")
    (tmp_path / "train" / "cat" / "05.png").write_bytes(b"not an image")
    code = main(["evaluate", "resnet18", "--data", f"folder:{tmp_path}"])
    assert code == 1
    assert "05.png" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_that_is_not_writable_is_told_at_once(capsys, tmp_path):
    tmp_path.chmod(0o500)
    code = main(["export", "digits_net", "--out", str(tmp_path / "x.onnx")])
    assert code == 1
    assert "cannot be written" in capsys.readouterr().err


def test_output_under_a_file_is_told_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("here")
    out = tmp_path / "file" / "x.onnx"
    code = main(["export", "digits_net", "--out", str(out)])
    assert code == 1
    assert str(out) in capsys.readouterr().err


def test_a_missing_extra_says_how_to_install_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code = main(["evaluate", "digits_net", "--data", "digits"])
    assert code == 2
    assert "pip install 'tersor[study]'" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(Exception, match="resnet81"):
        main(["inspect", "resnet81", "--debug"])
    capsys.readouterr()


def test_interrupt_exits_130(capsys, monkeypatch):
    import tersor.pipeline

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tersor.pipeline, "resolve", stop)
    assert main(["inspect", "digits_net"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "tersor", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["tersor", importlib.metadata.version("tersor")], done.stderr


def test_the_installed_command_answers_help_without_torch():
    code = (
        "import sys\nfrom tersor.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in (
        "demo",
        "train",
        "evaluate",
        "prune",
        "quantize",
        "benchmark",
        "inspect",
        "export",
    ):
        assert command in done.stdout


def test_study_and_report_end_with_tables_and_a_page(home, capsys, tmp_path):
    out = tmp_path / "study"
    code, told, _ = run(
        capsys, "study", "--data", "digits", "--out", out, "--models", "digits_net",
        "--weights", f"digits_net={home / 'net.safetensors'}", "--sparsities", "0.5",
        "--scopes", "global", "--finetune-epochs", "0.5", "--finetune-learning-rate", "0.01",
        "--batch-size", "64", "--augment", "crop", "--num-calibration", "64", "--batches", "1",
        "--threads", "1", "--timing-seconds", "0.2", "--json",
    )  # fmt: skip
    assert code == 0
    assert {line["variant"] for line in told["summary"]} == {"float", "pruned", "static", "dynamic"}
    for line in told["summary"]:
        assert line["num_samples"] == 449
    trained = [json.loads(row) for row in (out / "rows.jsonl").read_text().splitlines()]
    recipe = next(row for row in trained if row["kind"] == "training")
    assert recipe["epochs"] == 4  # told by the .json that `train` wrote beside the weights

    markdown = tmp_path / "results.md"
    code, _, captured = run(capsys, "report", out, "--markdown", markdown)
    assert code == 0
    assert "coverage: layers changed" in captured.out
    assert captured.out.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert "](study/figures/" in markdown.read_text()
