"""Two processes make the training of one: torchrun starts them, and what they learned is compared."""

import importlib.util
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from tersor.errors import LostProcessError, RunError, SpecError
from tersor.methods.together import Together, digest
from tersor.runs import Processes, processes
from tersor.runs.processes import RANKS

CHILD = pathlib.Path(__file__).with_name("together_child.py")
TOLERANCE = 2e-5  # float32 sums in another order, over a few steps
LIMIT_S = 400
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def started_by_torchrun(what, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(CHILD), what, str(out)]
    return subprocess.run(
        command, env=environment(), timeout=LIMIT_S, check=False, capture_output=True, text=True
    )


def started_by_hand(what, out):
    """Two processes with the variables that torchrun sets; their exit codes and what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(CHILD), what, str(out)],
            env=environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [rank.communicate(timeout=LIMIT_S)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], said


def child():
    found = importlib.util.spec_from_file_location("together_child", CHILD)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums in one order, as the children have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone():
    return child().learned()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    done = started_by_torchrun("main", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(
    "case", ["plain", "masked_with_hints", "special_gradients", "few_bits", "coded"]
)
def test_two_processes_learn_what_one_does_and_both_hold_the_same(alone, two, case):
    expected, (leader, other) = alone[case], (rank["states"][case] for rank in two)
    assert list(expected) == list(leader) == list(other)
    for name, value in expected.items():
        assert torch.equal(leader[name], other[name]), f"{name} differs between the processes"
        size = float(value.double().abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            leader[name], value, rtol=0, atol=TOLERANCE * max(size, 1), msg=lambda m, n=name: n + m
        )


def test_batch_norm_of_slices_is_that_of_the_whole_batch_forward_and_backward(two):
    for rank in two:
        assert set(rank["oracle"]) == {"(7, 3, 4, 5)", "(5, 3)", "(4, 3, 6)"}
        assert max(rank["oracle"].values()) < 1e-10


def test_a_run_has_one_owner_and_its_results_reach_all(two):
    assert two[0]["run"] == [0, "by 0", 0, 0, 2, False, 0]
    assert two[1]["run"] == [0, "by 0", 0, 0, 1, True, 0]


def test_what_differs_between_processes_is_refused_by_name_in_all(two):
    for rank in two:
        network, data, recipe, accepted = rank["refused"]
        assert "process 1 of 2 was given another network than process 0" in network
        assert "another data set" in data and "another recipe" in recipe
        assert accepted == "", "an image for each process is enough"


def goes_on_to_the_same(out, steps):
    """The checkpoint in `out` holds `steps` steps, and one process alone goes on to what an unbroken training gives."""
    content = torch.load(out / "run.pt", weights_only=True)
    assert content["state"]["step"] == steps
    module = child()
    resumed, whole = module.trained(out).module, module.plain().module
    for (name, ours), theirs in zip(
        resumed.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: n + m
        )


def test_a_lost_process_ends_all_with_an_error_and_the_checkpoint_is_good(tmp_path):
    codes, _ = started_by_hand("lost", tmp_path)
    assert codes == [1, -9]
    told = (tmp_path / "lost0.txt").read_text()
    assert told.startswith(
        "LostProcessError: step 6 of 6: another process of this run was lost (connection "
    )
    assert "start all again to go on from the last checkpoint, which is good" in told
    goes_on_to_the_same(tmp_path, 5)


@pytest.mark.slow
def test_one_process_told_to_stop_stops_all_after_the_same_step(tmp_path):
    codes, said = started_by_hand("interrupted", tmp_path)
    assert codes == [0, 0], said
    assert sorted(p.name for p in tmp_path.glob("stopped*")) == ["stopped0.txt", "stopped1.txt"]
    goes_on_to_the_same(tmp_path, 3)


@pytest.mark.parametrize(("size", "count"), [(17, 2), (16, 3), (5, 5), (256, 7)])
def test_the_slices_are_the_batch_and_their_shares_are_one(size, count):
    slices = [Together(size, Processes(rank, count)) for rank in range(count)]
    taken = [n for one in slices for n in range(size)[one.part]]
    assert taken == list(range(size))
    assert sum(one.share for one in slices) == pytest.approx(1)
    assert max(one.share for one in slices) - min(one.share for one in slices) <= 1 / size + 1e-12


def test_a_batch_with_less_than_an_image_for_each_process_is_refused():
    with pytest.raises(SpecError, match="a batch of 3 images over 4 processes"):
        Together(3, Processes(0, 4))


def test_a_digest_tells_names_shapes_and_values_apart():
    first = nn.Linear(2, 3)
    assert digest(first) == digest(first) != digest(None)
    second = nn.Linear(2, 3)
    second.load_state_dict(first.state_dict())
    assert digest(second) == digest(first)
    with torch.no_grad():
        second.weight[0, 0] += 1e-7
    assert digest(second) != digest(first)
    assert digest(nn.Sequential(first)) != digest(first)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Processes()),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Processes()),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, Processes(1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING}, Processes()),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", **MEETING}, Processes(3, 4)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3", **MEETING}, Processes(2, 3)),
    ],
)
def test_the_process_is_known_by_what_its_launcher_set(monkeypatch, variables, expected):
    for name in {*itertools.chain(*RANKS), *MEETING}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes() == expected


def test_a_rank_that_is_no_number_is_refused(monkeypatch):
    for name, value in {"RANK": "one", "WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="RANK='one' and WORLD_SIZE='2' are not numbers"):
        processes()


def test_one_process_exchanges_nothing():
    among = Processes()
    held = object()
    assert among.agreed(held) is held and among.gathered(held) == [held]
    tensor = torch.ones(2)
    assert among.sum_(tensor) is tensor and torch.equal(tensor, torch.ones(2))
    assert issubclass(LostProcessError, ConnectionError)


@pytest.mark.slow
def test_a_command_under_torchrun_writes_and_prints_once(tmp_path):
    out = tmp_path / "net.safetensors"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    command += [
        "--no-python",
        sys.executable,
        "-c",
        "import sys; from tersor.cli import main; sys.exit(main())",
    ]
    command += ["train", "digits_net", "--data", "digits", "--out", str(out), "--json"]
    command += ["--epochs", "0.2", "--batch-size", "64", "--compile", "off"]
    done = subprocess.run(
        command, env=environment(), timeout=LIMIT_S, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"validation_accuracy"') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.json", "net.safetensors"]
