"""Teachers that answer on an engine: what a student learns from, at a fraction of what a float network costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tersor.engines.load import Session
from tersor.errors import ModelError


class EngineTeacher(nn.Module):
    """The mean of the logits that `sessions` give for images (N, C, H, W), as a module for `finetune` and `distill`.

    The same networks in integers answer several times as fast as in PyTorch, so that more of the time is the
    student's; several together know more than each (Hinton 2015, section 2, on ensembles). Nothing is differentiated
    through it. A copy shares the sessions. Raises ModelError for no session; where one runs, what the session does,
    and ModelError where their answers differ in shape.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        super().__init__()
        if not sessions:
            raise ModelError("a teacher needs at least one session to answer")
        self.sessions = tuple(sessions)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) float32."""
        images = inputs.detach().to("cpu", torch.float32).contiguous().numpy()
        answers = [session.run(images) for session in self.sessions]
        shapes = sorted({answer.shape for answer in answers})
        if len(shapes) > 1:
            raise ModelError(f"teachers give answers of shapes {shapes}; give those of one")
        return torch.from_numpy(np.mean(answers, axis=0, dtype=np.float32)).to(inputs.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineTeacher:
        return self
