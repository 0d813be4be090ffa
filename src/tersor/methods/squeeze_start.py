"""The coded network that a training starts from, kept beside its checkpoint: coding it anew takes minutes."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import numpy as np
import torch
from torch import nn

from tersor.errors import RunError
from tersor.methods.learned import LayerBits, LearnedLayer
from tersor.methods.squeeze import CodedLayer, CodedNetwork
from tersor.methods.squeeze_search import Priced
from tersor.specs import Squeeze


def started_bytes(spec: Squeeze, start: Priced) -> bytes:
    """`start`, found for `spec`, as the bytes of a file."""
    layers = {}
    for name, learned in start.coded.learned.items():
        told = start.coded.layers[name]
        layers[name] = {
            "codes": torch.from_numpy(learned.codes),
            "scale": torch.from_numpy(learned.scale),
            "outputs": torch.from_numpy(told.outputs),
            "inputs": torch.from_numpy(told.inputs),
            "numbers": [told.size_bytes, told.bits, told.error],
        }
    content = {
        "spec": repr(spec),
        "price": start.price,
        "layers": layers,
        "kept": start.coded.kept,
        "state": start.coded.module.state_dict(),
    }
    held = io.BytesIO()
    torch.save(content, held)
    return held.getvalue()


def started_from(
    content: bytes, spec: Squeeze, module: nn.Module, *, path: pathlib.Path | None
) -> Priced:
    """What `started_bytes` told, put into `module`, a copy of the original. Raises RunError naming `path` for what
    is none, or of another request or network."""
    try:
        held: Any = torch.load(io.BytesIO(content), weights_only=True)
        if held["spec"] != repr(spec):
            raise RunError(
                f"{path} belongs to another request: {held['spec']}; remove it to start anew"
            )
        module.load_state_dict(held["state"])
        learned, layers = {}, {}
        for name, each in held["layers"].items():
            codes, scale = each["codes"].numpy(), each["scale"].numpy()
            learned[name] = LearnedLayer(LayerBits(8), codes.astype(np.int8), scale, None)
            size, bits, error = each["numbers"]
            worth = each["outputs"].numpy(), each["inputs"].numpy()
            layers[name] = CodedLayer(size, bits, error, *worth)
        coded = CodedNetwork(module, learned, layers, held["kept"])
        return Priced(coded, float(held["price"]))
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{path} cannot be read ({error}); remove it to start anew") from None
