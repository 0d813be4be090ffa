"""Half of the channels of torchvision's classifiers removed: pruned equals masked; all of them in the slow tier."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import torchvision

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "coverage_torchvision.py"
SMALL = (
    "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5", "mobilenet_v3_small", "regnet_x_400mf", "efficientnet_b0",
    "googlenet", "densenet121",
)  # fmt: skip
ALL = torchvision.models.list_models(module=torchvision.models)


@pytest.fixture(scope="module")
def measured():
    spec = importlib.util.spec_from_file_location("coverage_torchvision", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measured


def check(row):
    assert row["passed"], row
    assert row["relative_error"] <= 1e-10
    assert row["groups"] > 0 and row["macs_removed"] > 0.1 and row["parameters_removed"] > 0.1
    assert row["frozen_share"] < 0.9 and all(row["frozen"])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_pruned_equals_masked(name, measured):
    check(measured(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_pruned_equals_masked_in_a_process_of_its_own(name, tmp_path):
    out = tmp_path / "coverage.json"
    subprocess.run([sys.executable, SCRIPT, "--out", out, "--models", name], check=True)
    (row,) = json.loads(out.read_text())["rows"]
    check(row)


def test_there_are_eighty():
    assert len(ALL) >= 80 and set(SMALL) <= set(ALL)
