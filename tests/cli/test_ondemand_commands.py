"""The commands that take a budget: words in, exit codes and one JSON object out."""

import contextlib
import io
import json

import pytest

from tersor.cli import main


def called(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(each) for each in arguments])
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "the budget is empty"),
        (("--size", "5 apples"), "500kB"),
        (("--latency", "6x smaller"), "6x smaller"),
        (("--drop", "0"), "above 0"),
        (("--drop", "1", "--effort", "quik"), "Did you mean 'quick'"),
        (("--drop", "1", "--recipe", "r.json"), "give one of both"),
        (("--drop", "1", "--save-weights", "w.safetensors"), "--recipe"),
        (("--recipe", "r.json", "--executor", "ray"), "trains under torchrun"),
        (("--drop", "1", "--executor", "rya"), "unknown executor 'rya'"),
    ],
)
def test_words_that_mean_nothing_end_with_two_and_a_remedy(tmp_path, options, words):
    code, _, err = called(
        "compress", "digits_net", "--data", "digits", "--out", tmp_path / "out", *options
    )
    assert code == 2 and words in err
    assert not (tmp_path / "out" / "model.tersor").exists()


def test_an_answer_is_one_json_object_and_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    code, said, err = called(
        "compress", "digits_net", "--data", "digits", "--size", "4x smaller", "--minutes", "0.1",
        "--out", out, "--json",
    )  # fmt: skip
    told = json.loads(said)
    assert code == 0 and told["path"] == str(out / "model.tersor")
    assert told["size_bytes"] == (out / "model.tersor").stat().st_size
    assert told["drop"]["labelled"] and told["front"]
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    for words in (
        f"report: {out / 'report.html'}",
        "serve it",
        "tersor evaluate",
        "tersor export",
        "x faster than PyTorch",
    ):
        assert words in err


def test_advice_names_every_method_with_its_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    code, said, _ = called("advise", "digits_net", "--data", "digits", "--no-labels", "--json")
    told = json.loads(said)
    assert code == 0
    methods = [advice["method"] for advice in told["advice"]]
    assert len(methods) == len(set(methods)) == 7
    for advice in told["advice"]:
        assert advice["verdict"] in ("yes", "no", "try") and advice["reason"]
    assert any(char.isdigit() for advice in told["advice"][:3] for char in advice["reason"])
    assert told["command"].startswith("tersor compress digits_net --data digits")
    assert told["facts"]["weights"] == 89_632
