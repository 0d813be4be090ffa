"""Synthetic rows: complete ones of a study of both networks, and the few of the demonstration."""

import contextlib
import copy
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

CONDITIONS = {
    "data": "CIFAR-10 (JPEG q75)",
    "seed": 0,
    "versions": {"tersor": "0.1.0", "torch": "2.14.1", "onnxruntime": "1.32.0"},
    "cpu": "Test CPU 9000",
    "flags": ["avx2", "avx512f", "avx512_vnni", "sse4_2"],
    "threads": 2,
    "time": "2025-01-02T03:04:05Z",
}
ACCURACY = {"vgg16_bn": 0.9312, "resnet18": 0.9437}
SIZE = {"vgg16_bn": 553_430_176, "resnet18": 44_700_344}
EAGER_MS = {"vgg16_bn": {1: 24.21, 64: 707.4}, "resnet18": {1: 7.61, 64: 272.3}}
SHARE = {  # of eager's time, by variant and engine, at batch 1 and 64
    ("float", "torch"): (1.0, 1.0),
    ("float", "onnxruntime"): (0.487, 0.798),
    ("static", "onnxruntime"): (0.178, 0.228),
    ("dynamic", "onnxruntime"): (0.461, 0.743),
}
LOSS_PT = {  # one-shot, re-estimated, fine-tuned
    0.1: (0.02, 0.01, -0.04),
    0.3: (0.31, 0.05, -0.02),
    0.5: (1.62, 0.22, 0.03),
    0.7: (31.7, 1.14, 0.11),
    0.9: (83.1, 30.2, 0.72),
}


def interval(difference_pt):
    return {
        "difference_pt": difference_pt,
        "low_pt": difference_pt - 0.13,
        "high_pt": difference_pt + 0.17,
        "level": 0.95,
        "p_value": 0.0371,
        "num_samples": 10000,
    }


def accuracy_row(model, variant, accuracy, size_bytes, **more):
    row = {
        "kind": "accuracy",
        "model": model,
        "variant": variant,
        "scope": "",
        "sparsity": 0.0,
        "recovery": "",
        "accuracy": accuracy,
        "num_samples": 10000,
        "interval": None,
        "size_bytes": size_bytes,
        "engine": "onnxruntime",
        "precision": "float32",
        **CONDITIONS,
    }
    return row | more


def timing_row(model, variant, engine, batch, median_ms, ratio, **more):
    row = {
        "kind": "timing",
        "model": model,
        "variant": variant,
        "engine": engine,
        "batch": batch,
        "median_ms": median_ms,
        "p05_ms": median_ms * 0.931,
        "p95_ms": median_ms * 1.173,
        "repeats": 57,
        "ratio": ratio,
        **CONDITIONS,
    }
    return row | more


def coverage_row(model, variant, **more):
    layers = [
        {"layer": "conv1", "action": "int8", "bits": 8, "sparsity": 0.0, "reason": ""},
        {
            "layer": "fc",
            "action": "keep",
            "bits": 32,
            "sparsity": 0.0,
            "reason": "excluded by name",
        },
    ]
    row = {
        "kind": "coverage",
        "model": model,
        "variant": variant,
        "layers": layers,
        "macs_share": 0.9871,
        "bytes_share": 0.9953,
        **CONDITIONS,
    }
    return row | more


def network_rows(model):
    base, size = ACCURACY[model], SIZE[model]
    rows = [accuracy_row(model, "float", base, size)]
    for sparsity, losses in LOSS_PT.items():
        for scope, factor in (("layer", 1.0), ("global", 0.31)):
            for recovery, loss in zip(("none", "bn", "finetune"), losses, strict=True):
                lost = loss * factor
                rows.append(
                    accuracy_row(
                        model,
                        "pruned",
                        base - lost / 100,
                        int(size * (1.031 - sparsity)),
                        scope=scope,
                        sparsity=sparsity,
                        recovery=recovery,
                        interval=interval(-lost),
                    )
                )
    for variant, bytes_share, loss in (("static", 0.2508, 0.06), ("dynamic", 0.3301, -0.01)):
        rows.append(
            accuracy_row(
                model,
                variant,
                base - loss / 100,
                int(size * bytes_share),
                interval=interval(-loss),
                precision="int8",
            )
        )
        rows.append(coverage_row(model, variant))
    for (variant, engine), shares in SHARE.items():
        for batch, share in zip((1, 64), shares, strict=True):
            median = EAGER_MS[model][batch] * share
            rows.append(timing_row(model, variant, engine, batch, median, share))
    recipe = {"kind": "finetune", "learning_rate": 0.1, "batch_size": 256, "augment": "flip_crop"}
    rows.append(
        {
            "kind": "training",
            "model": model,
            "recipe": recipe,
            "seconds": 11641.0,
            "images_per_s": 203.4,
            "precision": "bf16",
            "epochs": 30,
            "history": [
                {"epoch": 1.0, "loss": 1.7, "images_per_s": 200.0},
                {"epoch": 30.0, "loss": 0.3471},
            ],
            **CONDITIONS,
        }
    )
    return rows


@pytest.fixture
def study_rows():
    """A complete study of both networks."""
    run = {"kind": "run", "settings": {"seed": 0}, **CONDITIONS}
    return copy.deepcopy([run, *network_rows("vgg16_bn"), *network_rows("resnet18")])


@pytest.fixture
def demo_rows():
    """The demonstration on handwritten digits: few forms, no sweep."""
    conditions = {"data": "scikit-learn digits", "num_samples": 360}
    rows = [accuracy_row("digits_net", "float", 0.9861, 94_312, **conditions)]
    for variant, accuracy, size, lost, more in (
        (
            "pruned",
            0.9833,
            31_277,
            -0.28,
            {"sparsity": 0.7, "scope": "global", "recovery": "finetune"},
        ),
        ("static", 0.9861, 28_121, 0.0, {}),
        ("dynamic", 0.9889, 78_433, 0.28, {}),
    ):
        rows.append(
            accuracy_row(
                "digits_net", variant, accuracy, size, interval=interval(lost), **more, **conditions
            )
        )
    for variant, engine, share in (
        ("float", "torch", 1.0),
        ("float", "onnxruntime", 0.31),
        ("static", "onnxruntime", 0.19),
        ("dynamic", "onnxruntime", 0.27),
    ):
        rows.append(
            timing_row(
                "digits_net", variant, engine, 1, 0.412 * share, share, data=conditions["data"]
            )
        )
    rows.append(coverage_row("digits_net", "static", data=conditions["data"]))
    return copy.deepcopy(rows)


LAYERS = ("features.0", "features.3", "classifier.0")


def _layer(name, number):
    before = 16 << number
    return {
        "layer": name,
        "op": "Conv" if number < 2 else "Gemm",
        "action": "int8",
        "reason": "",
        "bits": (8, 4, 3)[number],
        "inputs": 3,
        "inputs_before": 3,
        "outputs": before - 4 * number,
        "outputs_before": before,
        "weights": 1000 * (number + 1),
        "weights_before": 1300 * (number + 1),
        "density": 0.25 * (number + 1),
        "macs": 12_345.0,
        "macs_before": 23_456,
        "size_bytes": 700 * (number + 1),
        "time_ms": (0.0125, 0.00731, None)[number],
        "time_before_ms": (0.0125, 0.00952, None)[number],
        "harm_kl": 1e-5,
        "harm_tried_kl": (0.0123, 0.0456, None)[number],
        "tried_bits": 3,
    }


def _bins(*counts):
    return {"low": -1.25, "high": 2.5, "before": list(counts), "after": list(reversed(counts))}


def _choice(share=0.85):
    bits = dict(zip(LAYERS, (8, 4, 3), strict=True))
    return {"channels_share": share, "mode": "static", "bits": bits, "epochs": 0.0}


def _candidate(number, size, latency, drop):
    return {
        "step": f"candidate {number}",
        "file": f"candidate_{number}.tersor",
        "choice": _choice(1.0 if number == 0 else 0.85),
        "size_bytes": size,
        "latency_ms": latency,
        "macs": 51_000_000.0,
        "energy_mj": 0.345,
        "engine": "openvino",
        "speedup": 5.0,
        "engines_ms": {"openvino": latency, "onnxruntime": latency * 1.3},
        "drop": drop,
        "seconds": 11.0,
    }


def labelled_drop(estimate=0.37, low=-0.93, high=0.19):
    return {
        "estimate_pt": estimate,
        "high_pt": 0.84,
        "agreement": 0.985,
        "harm_kl": 0.0123,
        "num_samples": 2000,
        "labelled": True,
        "interval": {
            "difference_pt": -estimate,
            "low_pt": low,
            "high_pt": high,
            "level": 0.95,
            "p_value": 0.2,
            "num_samples": 2000,
        },
        "judged_pt": estimate,
    }


def unlabelled_drop(estimate=0.21, high=0.43):
    drop = labelled_drop()
    return drop | {
        "estimate_pt": estimate,
        "high_pt": high,
        "judged_pt": high,
        "labelled": False,
        "interval": None,
    }


def _plan():
    def decided(layer, action, **more):
        base = {"sparsity": 0.0, "bits": 32, "reason": "", "outputs": [], "inputs": [], "ranks": []}
        return {"kind": "layer_plan", "layer": layer, "action": action, "axis": 0, **base, **more}

    coded = [decided(name, "int8", bits=b) for name, b in zip(LAYERS, (8, 4, 3), strict=True)]
    kept = decided("head", "keep", reason="its weight has 3 dimensions")
    removed = decided("features.3", "remove", outputs=list(range(28)), inputs=list(range(12)))
    norm = decided("features.4", "remove", outputs=list(range(28)))
    left = decided("features.0", "keep", reason="nothing of it was chosen")
    request = {"kind": "quantize", "mode": "static", "rounding": "gptq", "num_calibration": 512}
    earlier = {
        "kind": "plan",
        "request": {"kind": "prune", "criterion": "fisher", "exclude": []},
        "layers": [removed, norm, left],
        "earlier": [],
    }
    return {"kind": "plan", "request": request, "layers": [*coded, kept], "earlier": [earlier]}


def _example(index, kind, label):
    return {
        "index": index,
        "kind": kind,
        "before": "cat",
        "before_confidence": 0.876,
        "after": "dog",
        "after_confidence": 0.543,
        "label": label,
    }


def answer(drop=None, *, met=True):
    """The four objects of an answer: result, plan, details, rows; numbers that no other place knows."""
    drop = drop or labelled_drop()
    labelled = drop["labelled"]
    front = [
        {
            **_choice(share),
            "size_bytes": size,
            "latency_ms": latency,
            "macs": 4e7,
            "energy_mj": 0.2,
            "drop_pt": lost,
            "harm_kl": 0.1,
            "measured": False,
        }
        for share, size, latency, lost in (
            (0.5, 111_222.7, 0.41, 12.345),
            (0.7, 222_333.1, 0.62, 2.468),
        )
    ]
    result = {
        "met": met,
        "axis": "" if met else "size_bytes",
        "layer": "" if met else "features.3",
        "path": "DIR/model.tersor" if met else "DIR/nearest.tersor",
        "size_bytes": 345_678.0,
        "latency_ms": 0.7654,
        "macs": 51_000_000.0,
        "energy_mj": 0.345,
        "original": {
            "size_bytes": 4_567_890.0,
            "latency_ms": 7.891,
            "macs": 98_000_000.0,
            "energy_mj": 6.54,
        },
        "engine": "openvino",
        "speedup": 9.876,
        "drop": drop,
        "limits": {"size_bytes": 400_000.0 if met else 300_000.0, "latency_ms": 1.578, "drop_pt": 0.5},
        "front": [*front, {**_choice(), "size_bytes": 345_678.0, "latency_ms": 0.7654, "macs": 51e6,
                           "energy_mj": 0.345, "drop_pt": 0.37, "measured": True, "file": "candidate_1.tersor"}],
        "notes": ["a note that must be known"],
        "choice": _choice(),
        "data": "2000 held-out inputs of photos",
        "seconds": 123.4,
        "input_shape": [3, 32, 32],
        "smaller": 4_567_890.0 / 345_678.0,
        "environment": {
            "cpu": "Test CPU 9000",
            "flags": ["avx2", "avx512_vnni"],
            "cores": 2,
            "platform": "Linux x86_64",
            "versions": {"python": "3.11.7", "tersor": "0.1.0"},
        },
    }  # fmt: skip
    kinds = {"lost": 9, "won": 2, "neither": 1, "unknown": 0}
    examples = [
        _example(7, "lost", "cat"),
        _example(41, "won", "dog"),
        _example(3, "neither", "owl"),
    ]
    if not labelled:
        kinds, examples = dict.fromkeys(kinds, 0) | {"unknown": 12}, [_example(7, "unknown", None)]
    details = {
        "layers": [_layer(name, number) for number, name in enumerate(LAYERS)],
        "rest_bytes": 341_478,
        "histograms": [
            {"layer": name, "weights": _bins(1, 5, 90, 4), "inputs": _bins(300, 20, 1, 0)}
            for name in LAYERS
        ],
        "changed": {"num_samples": 2000, "num_changed": 12, **kinds, "shown": True, "examples": examples},
        "energy": {
            "original_compute_mj": 1.54,
            "original_memory_mj": 5.0,
            "compressed_compute_mj": 0.045,
            "compressed_memory_mj": 0.3,
            "original_measured_mj": None,
            "compressed_measured_mj": None,
            "not_measured": "this machine shows no energy counters (RAPL)",
            "integers": True,
            "float32_mac_pj": 4.6,
            "int8_mac_pj": 0.3,
            "dram_byte_pj": 162.5,
        },
        "conditions": {
            "model": "resnet18",
            "data_name": "photos",
            "num_held": 2000,
            "num_calibration": 512,
            "labelled": labelled,
            "synthetic": False,
            "by_estimate": False,
            "batch": 1,
            "threads": 2,
            "seed": 5,
            "effort": {"name": "quick", "minutes": 2, "trains": False},
            "timing_seconds": 3.0,
            "float_engine_ms": 2.345,
            "folded": ["classifier.0"],
        },
    }  # fmt: skip
    budget = {"kind": "budget", "size": "400kB", "latency": "5x faster", "macs": "", "energy": "",
              "drop": 0.5, "batch": 1, "threads": 0}  # fmt: skip
    first = {"step": "original", "budget": budget, "effort": {"name": "quick", "minutes": 2},
             "seed": 5, "data": "photos", "float_engine_ms": 2.345}  # fmt: skip
    rows = [
        first,
        _candidate(0, 1_234_567.0, 0.9321, labelled_drop(0.05, -0.2, 0.1)),
        _candidate(1, 350_001.0, 0.7654, drop),
        {"step": "answer", "met": met},
    ]
    return copy.deepcopy(
        {"result": result, "plan": _plan(), "details": details, "rows": tuple(rows)}
    )


@pytest.fixture
def make_told():
    """A function that makes an answer with everything in it, and pictures."""
    from PIL import Image

    from tersor.report.ondemand import Told

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 40, 40)).save(buffer, "PNG")

    def made(*, met=True, labelled=True):
        objects = answer(labelled_drop() if labelled else unlabelled_drop(), met=met)
        return Told(**objects, pictures={7: buffer.getvalue(), 41: buffer.getvalue()})

    return made


# The browser looks for its ends of the pipes at 3 and 4; first they go out of each other's way.
ENDS = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """A headless browser that is told what to do over pipes, in the DevTools protocol (JSON, NUL between messages)."""

    def __init__(self, path, profile):
        reads, self.written = os.pipe()
        self.read, writes = os.pipe()

        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-quic",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENDS, str(reads), str(writes), path, *options,
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads)
        os.close(writes)
        self.number, self.held, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self, seconds):
        end = time.monotonic() + seconds
        while b"\0" not in self.held:
            ready, _, _ = select.select([self.read], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"the browser said nothing for {seconds} s")
            data = os.read(self.read, 1 << 16)
            assert data, "the browser ended"
            self.held += data
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session and not method.startswith(("Target", "Browser")):
            message["sessionId"] = self.session
        os.write(self.written, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message(60)
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def value(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def show(self, url, *, width, dark=False):
        """Load a page at that width and scheme; `events` are those since then."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 500)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._message(60))

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def close(self):
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.written)
        os.close(self.read)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("chromium is not installed; the page is checked by the parser only")
    browser = Chromium(path, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
