"""`tersor.compress` with what computes replaced, so that a whole search takes milliseconds: what is left is what
lies on the disk. Run by test_compress_faults.py, which forks one search for every point it is ended at."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import shutil
import signal
import sys
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import tersor.ondemand.build as build
import tersor.ondemand.candidate as candidate
import tersor.ondemand.compress as compress
import tersor.ondemand.facts as facts
import tersor.ondemand.original as original
import tersor.ondemand.search as search
import tersor.ondemand.trials as trials
from tersor.artifact import pack, save
from tersor.bench.drop import Drop
from tersor.data.unlabelled import unlabelled
from tersor.errors import BudgetError, RunError, TersorError
from tersor.methods.bit_options import BitOptions
from tersor.ondemand.answer import write_json
from tersor.ondemand.effort import Clock, Effort
from tersor.runs import Run
from tersor.specs import Budget, LayerPlan, Plan, Quantize

BUDGET = Budget(macs="1.3x fewer", size="2.8x smaller", drop=2.5)
ANSWER = ("model.tersor", "plan.json", "result.json", "rows.jsonl")
ROUNDS = 2
CALLS = ("open", "write", "fsync", "ftruncate", "pwrite", "mkdir", "replace", "unlink", "rmdir")
made = []  # what was measured or made, by its name


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.only = nn.Linear(64, 10)

    def forward(self, images):
        return self.only(images.flatten(1))


def graph_of(levels=8):
    """One linear layer as a graph, its weights on a grid."""
    weights = np.random.default_rng(0).integers(-levels, levels, (10, 64)).astype(np.float32)
    shapes = (("x", ["batch", 1, 8, 8]), ("y", ["batch", 10]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes]
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "only.weight"], ["y"], transB=1),
    ]
    held = [numpy_helper.from_array(weights, "only.weight")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], held),
        opset_imports=[helper.make_opsetid("", 20)],
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


GRAPH = graph_of()
PLAN = Plan(Quantize(), (LayerPlan("only", "int8", bits=8),))


class Family:
    """Channels of one group of eight."""

    whole, least_share = 1000, 0.45

    unseen = 0.0

    def __init__(self, *given, harms=None, **options):
        made.append("channels") if harms is None else None
        self.harms = {"g": ([0, 4], [0.0, 0.01])}

    def units(self, share):
        return {"g": np.arange(round(8 * (1 - share)))}

    def harm(self, units):
        return 0.001 * sum(map(len, units.values()))

    def macs(self, units):
        return 1000 - 60 * sum(map(len, units.values()))

    cost = macs

    def plan(self, units):
        return None

    def sizes(self, units):
        return {"only.weight": 640 - 40 * sum(map(len, units.values()))}


def bit_options(*given, **options):
    made.append("bits")
    each = {bits: bits / 8 for bits in (2, 4, 8)}
    return {"only": BitOptions("only", 640, 10, each, {bits: 0.02 / bits for bits in each})}


packed = {}  # coding takes the most time, and the whole run has done it


def packed_once(graph, **told):
    key = graph.SerializeToString(), json.dumps(told, default=str, sort_keys=True)
    if key not in packed:
        packed[key] = pack(graph, **told)
    return packed[key]


def measured(asked, graph, plan, path, choice, *, macs, **options):
    made.append(path.name)
    bits = choice["bits"].get("only", 8)
    size = save(packed_once(graph_of(2 ** (bits - 1)), plan=plan.to_dict()), path)
    harm = 0.01 * (9 - bits) * (2 - choice["channels_share"])
    drop = Drop(10 * harm, 20 * harm, 1 - harm, harm, 100, False)
    costs = {"size_bytes": float(size), "latency_ms": 1.0, "macs": macs, "energy_mj": 0.1}
    times = {"onnxruntime": 1.0}
    return candidate.Measured(path, choice, costs, drop, "onnxruntime", 3.0, plan, times)


def network(asked, wanted, checkpoint, kept, watch):
    made.append(f"network {wanted.share}")
    checkpoint.write_bytes(b"half of a training")
    return build.Network(wanted.share, asked.module, GRAPH, wanted.plan, 0.001)


def original_logits(*given, **options):
    made.append("original")
    return np.random.default_rng(1).normal(size=(60, 10)).astype(np.float32)


def tell(directory, *given, **options):
    write_json(directory / "details.json", {})
    return {}


def write_page(directory, rows, pictures):
    write_json(directory / "report.html", {"rows": len(rows)})


def replace():
    """Put the above in the place of what computes."""
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # thousands of calls; a killed process does not lose what it wrote
    Clock.passed = property(lambda self: 1.0)
    compress.effort_of = lambda *given: Effort("quick", 2, False, 60, 60, ROUNDS)
    original.deployment_graph = lambda *given: GRAPH
    original.fold_copies_ = lambda *given: ([], {})
    original.open_session = lambda *given, **options: None
    original.logits_of = original_logits
    times = {
        original.EAGER: type("T", (), {"median_ms": 3.0}),
        original.FLOAT: type("T", (), {"median_ms": 2.0}),
    }
    original.time_apart = lambda *given, **options: times
    for room in (facts, search):
        room.rounded = lambda *given, **options: (GRAPH, PLAN)
        room.unheld = lambda *given: {}
        room.measured = measured
    trials.ChannelFamily, trials.bit_options = Family, bit_options
    trials.time_cost = lambda *given: None
    build._network, compress.pack = network, packed_once
    compress.tell, compress.write_page = tell, write_page
    build.deployment_graph = lambda *given: GRAPH
    images = np.random.default_rng(2).normal(size=(120, 1, 8, 8)).astype(np.float32)
    return unlabelled("noise", images)


def content(directory):
    """Every file of a directory but its lock, by name."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(pathlib.Path(directory).rglob("*"))
        if p.is_file() and p.name != "run.lock"
    }


def finished(directory):
    """What a later run may never lose: whole rows, and pieces that are made, until there is an answer."""
    held = content(directory) if directory.exists() else {}
    rows = held.get("rows.jsonl", b"")
    made = {k for k in held if "steps" in k and k.endswith("result.json")}
    return rows[: rows.rfind(b"\n") + 1], set() if b'"done"' in rows else made


class Point:
    """Counts the calls that change a disk, and does something at the n-th."""

    def __init__(self, at, act, only=CALLS):
        self.at, self.act, self.count = at, act, 0
        for name in only:
            setattr(os, name, self.wrapped(getattr(os, name), name))

    def wrapped(self, real, name):
        @functools.wraps(real)
        def call(*args, **options):
            self.count += 1
            if self.count == self.at:
                self.act(name, real, args)
            return real(*args, **options)

        return call


def require_same(found, expected, point):
    """Both hold the same files."""
    for name in sorted({*found, *expected}):
        ours, theirs = found.get(name, b""), expected.get(name, b"")
        same = next(
            (n for n, two in enumerate(zip(ours, theirs, strict=False)) if len({*two}) > 1), 0
        )
        assert ours == theirs, (point, name, ours[same - 40 : same + 40], theirs[same : same + 40])


def forked(act):
    """The exit code of `act` in a process of its own, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = act() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(base, stride, work):
    """Killed before every `stride`-th call that changes the disk, and twice again while it goes on."""
    work(base / "whole" / "out")
    expected, again, points = content(base / "whole" / "out"), 0, []
    at = 1
    while True:
        directory = base / "killed" / "out"
        shutil.rmtree(directory, ignore_errors=True)

        def end_at(number, place=directory):
            def act():
                Point(number, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                work(place)

            return forked(act) == -signal.SIGKILL

        if not end_at(at):
            break
        points.append(at)
        for second in (1 + at % 11, 40):
            rows, pieces = finished(directory)
            again += end_at(second)
            after, kept = finished(directory)
            assert after.startswith(rows), ("rows lost", at, second)
            assert kept >= pieces or b'"done"' in after, ("pieces lost", at, second)
        work(directory)
        require_same(content(directory), expected, at)
        at += stride
    return [len(points), again]


def failing(base, stride, work, number):
    """Every `stride`-th such call fails with an error of the system; then the same call goes on."""
    work(base / "whole" / "out")
    expected, messages, at, refused = content(base / "whole" / "out"), set(), 1, 0
    real = {name: getattr(os, name) for name in CALLS}

    def fail(name, function, args):
        if name == "write" and len(args[1]) > 3:
            function(args[0], bytes(args[1])[:3])  # a disk takes a part before it is full
        raise OSError(number, os.strerror(number))

    while True:
        directory = base / "failing" / "out"
        shutil.rmtree(directory, ignore_errors=True)
        point = Point(at, fail)
        try:
            work(directory)
        except TersorError as told:
            refused += 1
            assert os.strerror(number) in str(told), told
            messages.add(str(told))
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        if point.count < at:
            break
        work(directory)
        require_same(content(directory), expected, at)
        at += stride
    return [at // stride, refused, sorted(messages)]


def torn(base, stride, work):
    """The journal of a finished run, and of one killed before its answer, cut at every `stride`-th byte; three
    resumes each."""
    work(base / "whole" / "out")
    expected = content(base / "whole" / "out")
    count = 0
    for cut in range(0, len(expected["rows.jsonl"]), stride):
        directory = base / "torn" / "out"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(base / "whole" / "out", directory)
        (directory / "rows.jsonl").write_bytes(expected["rows.jsonl"][:cut])
        for _ in range(3):
            work(directory)
            require_same(content(directory), expected, cut)
        count += 1
    return [count]


def again(base, stride, work):
    """What is measured: in one go; in a second call of it; after one that was stopped before its answer; after Ctrl-C
    in the middle of the second file; and where the first candidate needs too much memory."""
    counts = {}

    def counted(name, directory):
        made.clear()
        work(base / directory / "out")
        counts[name] = list(made)

    counted("whole", "whole")
    counted("answered", "whole")

    def stopped(*given):
        raise KeyboardInterrupt

    with mock.patch.object(compress, "_written", stopped), contextlib.suppress(KeyboardInterrupt):
        work(base / "stopped" / "out")
    counted("stopped", "stopped")

    def signalled(*given, **options):
        found = measured(*given, **options)
        if found.path.name == "candidate_1.tersor":
            signal.raise_signal(signal.SIGINT)
        return found

    made.clear()
    with mock.patch.object(search, "measured", signalled):
        try:
            work(base / "killed" / "out")
        except KeyboardInterrupt:
            counts["interrupted"] = list(made)
    counted("after it", "killed")
    for name in ("stopped", "killed"):
        require_same(content(base / name / "out"), content(base / "whole" / "out"), name)

    def too_large(*given, **options):
        if given[3].name == "candidate_1.tersor":
            raise MemoryError
        return measured(*given, **options)

    with mock.patch.object(search, "measured", too_large), contextlib.suppress(BudgetError):
        counted("memory", "failing")
    counts["memory"] = list(made)
    counts["notes"] = json.loads((base / "failing" / "out" / "result.json").read_text())["notes"]
    with Run(base / "torn" / "out"):
        try:
            work(base / "torn" / "out")
        except RunError as told:
            counts["owner"] = str(told)
    return counts


ACTS = {"killed": killed, "failing": failing, "torn": torn, "again": again}


def main(base, *acts):
    """Each of `acts` is a name, and after colons a stride and the name of an error."""
    splits = replace()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background has it ignored
    network = Linear().eval()

    def work(directory):
        os.chdir(directory.parent)  # the answer tells its path
        compress.compress(network, splits, BUDGET, out=directory.name, effort="quick")

    for act in acts:
        name, stride, *more = act.split(":")
        place = pathlib.Path(base) / act
        for each in ("whole", "killed", "failing", "torn", "stopped"):
            (place / each).mkdir(parents=True)
        numbers = [getattr(errno, each) for each in more]
        print(json.dumps(ACTS[name](place, int(stride), work, *numbers)))


if __name__ == "__main__":
    main(*sys.argv[1:])
