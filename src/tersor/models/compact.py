"""Float weights in a small exact form: the network is rounded once to a grid, then stored without further loss.

A float network in half precision costs two bytes a weight, most of which is noise. Here each output channel of a
matrix or convolution gets a step, `step = sqrt(12 * error) * std` (a uniform quantizer's squared error is
step^2 / 12), and integer codes; a weight is (code + 1/2) * step, so that none becomes zero and pruning finds as little
to remove as before. The whole safetensors file is packed by xz. The rounded network is the one to be measured and
published: reading the file gives exactly its weights.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Mapping

import torch
from safetensors.torch import save

from tersor.errors import ModelError

CODES, STEP = ".codes", ".step"
LARGEST_CODE = 32767


def compact_tensors(
    state: Mapping[str, torch.Tensor], errors: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Codes and steps for the tensors that `errors` names (relative squared error each), the rest as they are.

    Codes are int8 where they fit, else int16, shaped as the weight; steps are float32 (O,).
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name not in errors:
            tensors[name] = value.clone()
            continue
        rows = value.float().flatten(1)
        step = (rows.std(1) * math.sqrt(12 * errors[name])).clamp(min=1e-12)
        codes = torch.floor(rows / step[:, None])
        largest = float(codes.abs().max())
        if largest > LARGEST_CODE:
            raise ModelError(
                f"{name}: a code of {largest:.0f} does not fit 16 bits; raise its error"
            )
        kind = torch.int8 if largest <= 127 else torch.int16
        tensors[name + CODES] = codes.to(kind).view(value.shape)
        tensors[name + STEP] = step
    return tensors


def expand_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The float32 weights that `compact_tensors` stands for: (code + 1/2) * step, computed in float32."""
    state: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(STEP) and name.removesuffix(STEP) + CODES in tensors:
            continue
        if not name.endswith(CODES):
            state[name] = value
            continue
        key = name.removesuffix(CODES)
        step = tensors.get(key + STEP)
        if step is None or step.shape != value.shape[:1]:
            raise ModelError(f"{key}: codes without one step for each of {value.shape[0]} channels")
        state[key] = (value.float() + 0.5) * step.view(-1, *[1] * (value.ndim - 1))
    return state


def packed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file inside xz, the same bytes for the same tensors."""
    raw = save({name: value.contiguous() for name, value in tensors.items()})
    return lzma.compress(raw, preset=9)


def unpacked(data: bytes, limit: int = 2**31) -> bytes:
    """Undo xz, refusing more than `limit` bytes. Raises ModelError for a damaged file."""
    decoder = lzma.LZMADecompressor()
    try:
        raw = decoder.decompress(data, max_length=limit)
    except lzma.LZMAError as error:
        raise ModelError(f"not an xz file, or damaged: {error}") from None
    if not decoder.eof or decoder.unused_data:
        raise ModelError(
            "the xz file is truncated, has bytes after its end, or is larger than 2 GiB"
        )
    return raw
