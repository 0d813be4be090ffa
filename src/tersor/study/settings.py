"""What the study runs: frozen, so that a resumed run can be told from another one."""

from __future__ import annotations

import dataclasses as dc

from tersor.errors import SpecError
from tersor.specs import Spec


@dc.dataclass(frozen=True)
class StudySettings(Spec, kind="study"):
    """Pruning at `sparsities` x `scopes`, quantization in `modes`, timing at `batches`, for each of `models`.

    `finetune_epochs` and `finetune_learning_rate` hold one number for each sparsity: a lightly pruned
    network needs few small steps, and large ones only take it away from where it was.
    `accuracy_precision` is the arithmetic in which the pruned networks are judged: "float32" runs the
    written file on ONNX Runtime, "bf16" runs the module in torch, twice as fast where the processor has
    bfloat16. Float and quantized forms always run from the file. `time_pruned` times the pruned forms too: in a
    dense engine a zero costs as much as any other number, so that the study leaves it out.
    """

    models: tuple[str, ...] = ("vgg16_bn", "resnet18")
    sparsities: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    scopes: tuple[str, ...] = ("layer", "global")
    criterion: str = "l1"
    modes: tuple[str, ...] = ("static", "dynamic")
    observer: str = "histogram"
    num_calibration: int = 512
    train_epochs: float = 30.0
    train_learning_rate: float = 0.2
    batch_size: int = 256
    augment: str = "flip_crop"
    finetune_epochs: tuple[float, ...] = (1.0, 1.0, 2.0, 3.0, 6.0)
    finetune_learning_rate: tuple[float, ...] = (0.005, 0.005, 0.01, 0.02, 0.03)
    batches: tuple[int, ...] = (1, 64)
    threads: int = 2
    timing_seconds: float = 30.0
    time_pruned: bool = False
    accuracy_precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("finetune_epochs", "finetune_learning_rate"):
            values = getattr(self, name)
            if len(values) != len(self.sparsities):
                raise SpecError(
                    f"{name} has {len(values)} values for {len(self.sparsities)} sparsities; "
                    "give one for each"
                )
        if self.accuracy_precision not in ("float32", "bf16"):
            raise SpecError(
                f"accuracy_precision must be float32 or bf16, got {self.accuracy_precision!r}"
            )
        for name in ("models", "sparsities", "scopes", "batches"):
            if not getattr(self, name):
                raise SpecError(f"{name} is empty; name one at least")
