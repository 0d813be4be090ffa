"""From the name a person types, and a file of weights, to a module."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from tersor.artifact.storage import write_whole
from tersor.errors import ModelError, SpecError, UnknownNameError
from tersor.models.compact import compact_tensors, expand_tensors, packed, unpacked
from tersor.models.networks import digits_net, resnet18, torchvision_model, vgg16, vgg16_bn
from tersor.registry import Registry, did_you_mean
from tersor.userfile import is_user_file, load_function

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
for _name, _build in (
    ("resnet18", resnet18),
    ("vgg16", vgg16),
    ("vgg16_bn", vgg16_bn),
    ("digits_net", digits_net),
):
    MODELS.register(_name)(_build)


def load_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Build the network `name` in eval mode, with the weights of a file or seeded random ones.

    `name` is one of MODELS, `torchvision:NAME` or `FILE.py:FUNCTION` (called without arguments, or with
    num_classes where it is given). Raises UnknownNameError, SpecError or ModelError.
    """
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if num_classes is not None and num_classes < 1:
        raise SpecError(f"num_classes must be 1 or more, got {num_classes}")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        if name.startswith("torchvision:"):
            module = torchvision_model(name.removeprefix("torchvision:"), num_classes)
        elif is_user_file(name):
            module = _user_module(name, options)
        elif name in MODELS:
            module = MODELS[name](**options)
        else:
            names = [*MODELS, "torchvision:NAME", "FILE.py:FUNCTION", "FILE.tersor"]
            raise UnknownNameError(
                f"unknown model {name!r}; expected one of {', '.join(names)}."
                + did_you_mean(name, names)
            )
    finally:
        torch.random.set_rng_state(state)
    if weights is not None:
        load_weights_(module, weights)
    return module.eval()


def _user_module(name: str, options: dict[str, Any]) -> nn.Module:
    build = load_function(name)
    try:
        module = build(**options)
    except Exception as error:
        raise ModelError(
            f"{name} could not be called with {options}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name} returned {type(module).__name__}; expected a torch.nn.Module")
    return module


def read_weights(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors, or from a `.pt` file with weights_only=True (no code is run).

    With `trust` a `.pt` file may be any pickle, of a whole module too: reading it runs the code that it
    names.

    The compact VGG form, in which `NAME.sum49` holds a linear layer summed over the 49 equal copies that a
    7x7 average pool makes of a 1x1 map, is expanded here. Raises ModelError.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ModelError(f"no such weights file: {file}")
    found: Any
    try:
        if file.name.endswith(".safetensors.xz"):
            found = expand_tensors(from_bytes(unpacked(file.read_bytes())))
        elif file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=not trust)
    except Exception as error:  # a damaged pickle raises AssertionError, KeyError and more
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{file} cannot be read as weights: {reason}; expected safetensors, or a .pt file that holds "
            "tensors only; reading another pickle runs code: if you know who made it, give --trust"
        ) from None
    if isinstance(found, torch.nn.Module):
        found = found.state_dict()
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in found.values()
    ):
        raise ModelError(f"{file} holds {type(found).__name__}; expected a state dict of tensors")
    return {
        str(key).removesuffix(".sum49"): _expanded(str(key), value) for key, value in found.items()
    }


def _expanded(key: str, value: torch.Tensor) -> torch.Tensor:
    if value.is_floating_point():
        value = value.float()
    if key.endswith(".sum49"):
        value = (value / 49).repeat_interleave(49, dim=1)
    return value


def load_weights_(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put the weights of a file into `module`. Raises ModelError naming what is missing, left over, of another
    shape, or not finite."""
    found = read_weights(path)
    wanted = module.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in found]
    problems += [f"{key} is not part of the model" for key in found if key not in wanted]
    problems += [
        f"{key} is {tuple(found[key].shape)}, the model has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    problems += [
        f"{key} holds NaN or infinity"
        for key, value in found.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(
            f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:3])}{more}; check the "
            "model's name and --num-classes"
        )
    module.load_state_dict(found)


def save_weights(module: nn.Module, path: str | os.PathLike[str], *, half: bool = False) -> int:
    """Write the state dict as safetensors, whole or not at all; returns the bytes on disk.

    With `half`, floating tensors are stored in float16. A first linear layer whose columns are equal in groups
    of 49 (see `read_weights`) is stored summed.
    """
    tensors = _summed(module) if half else dict(module.state_dict())
    stored = {k: (_halved(k, v) if half else v).detach().cpu().clone() for k, v in tensors.items()}
    return _write_bytes(path, to_bytes({k: v.contiguous() for k, v in stored.items()}))


def save_compact(
    module: nn.Module, path: str | os.PathLike[str], *, error: float, linear_error: float
) -> int:
    """Write the smallest form of float weights (see `models.compact`), FILE.safetensors.xz; returns its bytes.

    `error` and `linear_error` are the relative squared errors of the one rounding of convolutions and of
    linear layers, for instance 0.001. Vectors are stored in half precision. The file is read back exactly.
    """
    tensors = _summed(module)
    errors = {
        key: linear_error if value.ndim == 2 else error
        for key, value in tensors.items()
        if value.ndim >= 2
    }
    vectors = {k: v if k in errors else _halved(k, v) for k, v in tensors.items()}
    return _write_bytes(path, packed(compact_tensors(vectors, errors)))


def _summed(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with linear weights that are equal in groups of 49 columns stored as their sum."""
    tensors = {}
    for key, value in module.state_dict().items():
        stored, name = value.detach().cpu().contiguous(), key
        if stored.ndim == 2 and stored.shape[1] % 49 == 0:
            copies = stored.view(stored.shape[0], -1, 49)
            if torch.equal(copies, copies[:, :, :1].expand_as(copies)):
                stored, name = copies[:, :, 0] * 49, f"{key}.sum49"
        tensors[name] = stored
    return tensors


def _halved(key: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    stored = value.half()
    if torch.isfinite(value).all() and not torch.isfinite(stored).all():
        raise ModelError(f"{key} holds values beyond half precision (65504); save it in full")
    return stored


def _write_bytes(path: str | os.PathLike[str], data: bytes) -> int:
    target = pathlib.Path(path)
    write_whole(target, [data], len(data))
    return len(data)


def example_input(input_shape: tuple[int, int, int], batch: int = 2) -> torch.Tensor:
    """Seeded normal noise (batch, C, H, W) float32, for tracing and shape checks."""
    noise = np.random.default_rng(0).standard_normal((batch, *input_shape))
    return torch.from_numpy(noise.astype(np.float32))
