"""The float baseline is a snapshot: neither side touches the other."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.engines import open_session
from tersor.errors import EngineError


def test_the_session_keeps_its_own_copy_in_eval_mode():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    session = open_session(module, engine="torch", threads=1)
    batch = np.ones((3, 1, 2, 2), np.float32)
    first = session.run(batch)
    assert module.training and module[2].weight.dtype == torch.float64
    with torch.no_grad():
        module[2].weight.zero_()
    assert np.array_equal(session.run(batch), first)


def test_a_module_that_returns_no_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(EngineError, match="returned tuple"):
        open_session(Pair(), engine="torch", threads=1).run(np.ones((1, 1, 2, 2), np.float32))
