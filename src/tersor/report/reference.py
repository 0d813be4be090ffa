"""The figures of the study that this project grew out of, and the bars it set itself against them.

The study pruned and quantized torchvision's VGG-16 (1000-way head) and a ResNet-18 on the original
CIFAR-10, with weights of its own. Its figures are printed as a reference and never enter a
comparison.
"""

from __future__ import annotations

import dataclasses as dc

STUDY = "study (original CIFAR-10, other weights)"
TITLES = {"vgg16": "VGG-16", "resnet18": "ResNet-18"}

# Table 4.1: accuracy (0 to 1) after one-shot pruning by L1 norm, by sparsity.
PRUNED = {
    "vgg16": {0.0: 0.9087, 0.1: 0.9090, 0.3: 0.9066, 0.5: 0.9022, 0.7: 0.8551, 0.9: 0.1000},
    "resnet18": {0.0: 0.9412, 0.1: 0.9419, 0.3: 0.9403, 0.5: 0.9300, 0.7: 0.8265, 0.9: 0.0996},
}


@dc.dataclass(frozen=True)
class Quantized:
    """One column of Table 4.2: file size, accuracy (0 to 1), CPU time as a share of the float
    model's."""

    size_mib: float
    accuracy: float
    time_share: float


QUANTIZED = {
    "vgg16": {
        "float": Quantized(527.81, 0.9122, 1.0),
        "static": Quantized(132.01, 0.9099, 0.4362),
        "dynamic": Quantized(174.09, 0.9125, 0.7498),
    },
    "resnet18": {
        "float": Quantized(42.73, 0.9415, 1.0),
        "static": Quantized(10.79, 0.9394, 0.3458),
        "dynamic": Quantized(42.76, 0.9463, 0.7148),
    },
}

# The bars. Losses in points of accuracy, sizes in MiB, times as shares of eager float32.
FINETUNED_LOSS_PT = {0.7: 0.3, 0.9: 1.0}
SIZE_MIB = {
    "vgg16": {"static": 132.0, "dynamic": 174.1},
    "resnet18": {"static": 10.8, "dynamic": 42.7},
}
SIZE_TOLERANCE = 0.01
STATIC_LOSS_PT = 0.2
TIME_SHARE = {"vgg16": {"static": 0.25, "dynamic": 0.60}, "resnet18": {"static": 0.25}}
TIME_BATCHES = (1, 64)


def family(model: str) -> str:
    """The study's network that `model` is a form of: "vgg16", "resnet18", or "" for any other."""
    name = model.removeprefix("torchvision:")
    return next((known for known in TITLES if name in (known, f"{known}_bn")), "")
