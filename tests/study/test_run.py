"""The study on digits: every cell is measured, a killed run goes on, and other settings are refused."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from tersor.data import load_data
from tersor.errors import MissingExtraError, RunError, SpecError, UnknownNameError
from tersor.runs.journal import read_rows
from tersor.study.run import run_study
from tersor.study.settings import StudySettings

SMALL = StudySettings(
    models=("digits_net",),
    sparsities=(0.5, 0.9),
    scopes=("layer", "global"),
    num_calibration=64,
    train_epochs=3.0,
    train_learning_rate=0.1,
    batch_size=64,
    augment="crop",
    finetune_epochs=(0.5, 1.0),
    finetune_learning_rate=(0.01, 0.03),
    batches=(1, 4),
    threads=1,
    timing_seconds=0.2,
)


@pytest.fixture(scope="module")
def data():
    return load_data("digits", num_calibration=256)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    page = run_study(SMALL, data, out)
    return out, page, read_rows(out / "rows.jsonl")


def accuracy_keys(rows):
    return sorted(
        (r["variant"], r["scope"], r["sparsity"], r["recovery"])
        for r in rows
        if r["kind"] == "accuracy"
    )


EXPECTED = sorted(
    [(v, "", 0.0, "") for v in ("float", "float", "static", "dynamic")]
    + [
        ("pruned", scope, sparsity, recovery)
        for scope in SMALL.scopes
        for sparsity in SMALL.sparsities
        for recovery in ("none", "bn", "finetune")
    ]
)


def test_every_cell_is_measured_once(finished):
    _, page, rows = finished
    assert accuracy_keys(rows) == EXPECTED
    timings = [(r["variant"], r["engine"], r["batch"]) for r in rows if r["kind"] == "timing"]
    assert len(timings) == len(set(timings)) == 2 * 4
    assert page.stat().st_size > 5_000


def test_every_row_carries_its_conditions(finished):
    _, _, rows = finished
    for row in rows:
        if row["kind"] == "run":
            continue
        for key in ("data", "model", "seed", "threads", "cpu", "versions", "time"):
            assert row[key] is not None, (row["kind"], key)
        if row["kind"] == "accuracy":
            assert row["num_samples"] == 449
            original = row["variant"] == "float" and row["engine"] == "onnxruntime"
            assert (row["interval"] is None) == original


def test_pruned_files_shrink_with_sparsity_and_int8_is_near_a_quarter(finished):
    _, _, rows = finished
    size = {
        (r["variant"], r["scope"], r["sparsity"], r["recovery"]): r["size_bytes"]
        for r in rows
        if r["kind"] == "accuracy" and r["engine"] == "onnxruntime"
    }
    full = size["float", "", 0.0, ""]
    assert size["pruned", "layer", 0.9, "none"] < size["pruned", "layer", 0.5, "none"] < full
    assert size["static", "", 0.0, ""] < 0.4 * full


def test_every_fine_tuned_row_carries_its_recipe(finished):
    _, _, rows = finished
    tuned = [r for r in rows if r.get("recovery") == "finetune"]
    for row in tuned:
        place = SMALL.sparsities.index(row["sparsity"])
        assert row["recipe"]["epochs"] == SMALL.finetune_epochs[place]
        assert row["recipe"]["learning_rate"] == SMALL.finetune_learning_rate[place]
    assert len(tuned) == 4


def test_pruned_forms_are_timed_when_asked(data, tmp_path):
    import dataclasses

    asked = dataclasses.replace(
        SMALL,
        sparsities=(0.5,),
        finetune_epochs=(0.5,),
        finetune_learning_rate=(0.01,),
        scopes=("layer",),
        batches=(1,),
        time_pruned=True,
    )
    run_study(asked, data, tmp_path)
    timed = [
        r["recovery"]
        for r in read_rows(tmp_path / "rows.jsonl")
        if r["kind"] == "timing" and r["variant"] == "pruned"
    ]
    assert sorted(timed) == ["bn", "finetune", "none"]


def test_a_second_call_measures_nothing_again(finished, data):
    out, page, rows = finished
    before = page.read_bytes()
    run_study(SMALL, data, out)
    assert read_rows(out / "rows.jsonl") == rows
    assert page.read_bytes() == before


def test_other_settings_are_refused_with_the_difference(finished, data):
    out, _, _ = finished
    import dataclasses

    with pytest.raises(RunError, match=r"train_epochs=3\.0, now asked for 4\.0"):
        run_study(dataclasses.replace(SMALL, train_epochs=4.0), data, out)


def test_settings_that_cannot_mean_anything_are_refused(data, tmp_path):
    with pytest.raises(SpecError, match="finetune_epochs has 1 values for 2"):
        StudySettings(sparsities=(0.1, 0.2), finetune_epochs=(1.0,))
    with pytest.raises(SpecError, match="finetune_learning_rate has 5 values for 2"):
        StudySettings(sparsities=(0.1, 0.2), finetune_epochs=(1.0, 1.0))
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet18'"):
        run_study(StudySettings(models=("resnet81",)), data, tmp_path)
    with pytest.raises(UnknownNameError, match="weights given for 'resnet18'"):
        run_study(SMALL, data, tmp_path, weights={"resnet18": "x"})


def test_a_missing_extra_is_told_before_any_work(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"tersor\[report\]"):
        run_study(SMALL, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


CHILD = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import importlib.util
spec = importlib.util.spec_from_file_location("settings", sys.argv[3])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from tersor.data import load_data
from tersor.study.run import run_study
run_study(module.SMALL, load_data("digits", num_calibration=256), pathlib.Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [6.0, 9.0, 13.0])
def test_kill_9_and_resume_loses_no_finished_row(after_s, data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path), "", str(pathlib.Path(__file__))]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    time.sleep(after_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    path = tmp_path / "rows.jsonl"
    before = path.read_bytes() if path.exists() else b""
    run_study(SMALL, data, tmp_path)
    whole = before[: before.rfind(b"\n") + 1]
    assert path.read_bytes().startswith(whole)
    assert accuracy_keys(read_rows(path)) == EXPECTED


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of ray are not ours
def test_the_grid_on_a_ray_cluster_gives_the_rows_of_one_process(finished, data, tmp_path):
    """And a worker that is killed once costs its cell no row and doubles none."""
    ray = pytest.importorskip("ray", reason="ray is not installed (extra 'ray')")
    _, _, alone = finished
    killed = []

    def watch(text, share):
        """Kills a worker once, when the grid has begun."""
        if " pruned " in text and not killed:
            killed.append(kill_a_worker())

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=place)
        try:
            run_study(SMALL, data, tmp_path, executor="ray", watch=watch)
        finally:
            ray.shutdown()
    rows = read_rows(tmp_path / "rows.jsonl")
    assert accuracy_keys(rows) == EXPECTED and killed == [True]

    def accuracies(rows):
        keys = ("variant", "scope", "sparsity", "recovery", "engine")
        return {tuple(r[k] for k in keys): r["accuracy"] for r in rows if r["kind"] == "accuracy"}

    for key, accuracy in accuracies(alone).items():
        assert accuracies(rows)[key] == pytest.approx(accuracy, abs=0.03), key


def kill_a_worker():
    """End a Ray worker that computes, as a machine that goes away would."""
    for place in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = place.read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::_serve"):
            os.kill(int(place.parent.name), signal.SIGKILL)
            return True
    return False


def test_an_executor_that_is_unknown_or_would_be_timed_is_refused_before_any_work(data, tmp_path):
    import dataclasses

    with pytest.raises(UnknownNameError, match="unknown executor 'rya'"):
        run_study(SMALL, data, tmp_path / "out", executor="rya")
    with pytest.raises(SpecError, match="time_pruned beside other work"):
        asked = dataclasses.replace(SMALL, time_pruned=True)
        run_study(asked, data, tmp_path / "out", executor="ray")
    assert not (tmp_path / "out").exists()


def test_other_data_of_the_same_name_and_another_version_are_refused(finished, data, monkeypatch):
    import dataclasses
    import importlib.metadata

    out, _, _ = finished
    images = data.test.images.copy()
    images[0, 0, 0, 0] ^= 1
    other = dataclasses.replace(data, test=dataclasses.replace(data.test, images=images))
    with pytest.raises(RunError, match="data_fingerprint="):
        run_study(SMALL, other, out)
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "99" if name == "tersor" else real(name)
    )
    with pytest.raises(RunError, match=r"tersor=.*now asked for '99'"):
        run_study(SMALL, data, out)
