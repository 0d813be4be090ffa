"""What a training lowers: the labels' loss, the distance to a teacher's logits."""

from __future__ import annotations

import torch
from torch.nn import functional

from tersor.specs import Finetune


def training_loss(
    spec: Finetune,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    target: torch.Tensor | None,
) -> torch.Tensor:
    """The scalar loss of `logits` (N, classes) float32 by the shares of `spec`.

    `labels` (N,) int64 are read unless spec.distill is 1, `target` (N, classes) float32 are the
    teacher's logits where spec.distill is above 0.
    """
    loss = logits.new_zeros(())
    if labels is not None and spec.distill < 1:
        task = functional.cross_entropy(logits, labels, label_smoothing=spec.label_smoothing)
        loss = loss + (1 - spec.distill) * task
    if target is not None and spec.distill > 0:
        loss = loss + spec.distill * distillation(logits, target, spec.temperature)
    return loss


def distillation(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """Hinton 2015: KL divergence of the softened answers, mean over images, times T^2 to keep the gradient's
    size. Both (N, classes) float32."""
    soft = functional.kl_div(
        functional.log_softmax(logits / temperature, 1),
        functional.log_softmax(target / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * soft
