"""How small the file of a network shall be."""

from __future__ import annotations

import dataclasses as dc
import math
import re

from tersor.errors import SpecError
from tersor.specs.finetune import Finetune
from tersor.specs.spec import Spec, one_of, require

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "KiB": 2**10, "MiB": 2**20}
GOALS = ("size", "drop", "price")


@dc.dataclass(frozen=True)
class Squeeze(Spec, kind="squeeze"):
    """Choose the codes of all weights for what they cost in the file and for what they change, without
    labels; a training with the file's size in it may follow.

    One of the three is given:
    size      of the file at most, everything counted: "500kB", "1.5 MB", "192KiB", or a number of bytes.
    drop      points of accuracy on the validation images that may be lost (without labels there: percent of
              the answers that may change), above 0.
    price     what a bit may cost, in nats of KL(original || squeezed), above 0: no search.

    epochs    of a training from the float network's outputs afterwards; 0: none. Needs `size`. The training
              has `learning_rate`, and starts from the coded network of `start` times the size.
    distill   the share of the training's loss that the float network's outputs have; at 1, the default, no
              labels are read.
    num_calibration  unlabelled images that codes are chosen by, changed as `augment` says: none, crop or
              flip_crop, as the network was trained.
    exclude   layers left in float: exact names, or `re:PATTERN` (a full match).
    """

    size: str = ""
    drop: float = 0.0
    price: float = 0.0
    epochs: float = 0.0
    learning_rate: float = 0.02
    start: float = 1.5
    distill: float = 1.0
    batch_size: int = 256
    num_calibration: int = 1024
    augment: str = "flip_crop"
    precision: str = "bf16"
    seed: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drop", "price", "epochs"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0,
                f"squeeze.{name} must be finite and 0 (not asked for) or more, got {value!r}",
            )
        given = [name for name in GOALS if getattr(self, name)]
        require(
            len(given) == 1,
            'squeeze needs one goal: size ("500kB"), drop (points) or price; got '
            + (" and ".join(given) or "none"),
        )
        _ = self.size_bytes
        require(self.drop < 100, f"squeeze.drop is in points, below 100, got {self.drop!r}")
        require(
            not self.epochs or bool(self.size),
            f"squeeze.epochs {self.epochs:g}: a training goes to a size; give size instead of {given[0]}",
        )
        require(
            math.isfinite(self.start) and self.start >= 1,
            f"squeeze.start is a multiple of the size, 1 or more, got {self.start!r}",
        )
        require(
            self.num_calibration >= 1,
            f"squeeze.num_calibration must be at least 1, got {self.num_calibration}",
        )
        one_of("squeeze.augment", self.augment, ("none", "flip_crop", "crop"))
        one_of("squeeze.precision", self.precision, ("bf16", "float32"))
        if self.epochs:
            _ = self.training

    @property
    def size_bytes(self) -> int:
        """The size asked for, in bytes; 0 where none is. Raises SpecError."""
        return size_in_bytes(self.size) if self.size else 0

    @property
    def training(self) -> Finetune | None:
        """The training that follows; None where none does. Raises SpecError for its values."""
        if not self.epochs:
            return None
        return Finetune(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=5e-4,
            label_smoothing=0.0,
            warmup=0.1,
            # A mean of weights whose codes go back and forth has other codes, and answers worse (measured).
            ema_decay=0.0,
            augment=self.augment,
            distill=self.distill,
            precision=self.precision,
            compile="off",
            seed=self.seed,
        )


def size_in_bytes(text: str) -> int:
    """Bytes of "500kB", "1.5 MB", "192KiB" or "131072". Raises SpecError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = 0
    if found and found[2] in UNITS:
        size = int(float(found[1]) * UNITS[found[2]])
    if size < 1:
        units = ", ".join(unit for unit in UNITS if unit)
        raise SpecError(f'a size is a number and one of {units}, such as "500kB"; got {text!r}')
    return size
