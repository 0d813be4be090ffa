"""The coded network that a training starts from, kept beside its checkpoint: coding it anew takes minutes."""

from __future__ import annotations

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


def write_start(path: pathlib.Path, spec: Squeeze, start: Priced) -> None:
    """Write `start`, found for `spec`; the file is there when it is whole. Raises RunError."""
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
    temporary = path.with_name(f".{path.name}.part")
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise RunError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_start(path: pathlib.Path, spec: Squeeze, module: nn.Module) -> Priced:
    """What `write_start` wrote, put into `module`, a copy of the original. Raises RunError for a file that is
    none, or of another request or network."""
    try:
        held: Any = torch.load(path, weights_only=True)
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
