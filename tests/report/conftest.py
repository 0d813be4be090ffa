"""Synthetic rows: complete ones of a study of both networks, and the few of the demonstration."""

import copy

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
