"""The machine and the library versions that stand beside every number; no host name and no path."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

CPUINFO = pathlib.Path("/proc/cpuinfo")
# The instructions that decide how fast float32, bfloat16 and int8 products are, on x86 and on Arm.
FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
)
PACKAGES = ("tersor", "torch", "torchvision", "onnxruntime", "openvino", "numpy")


def environment() -> dict[str, Any]:
    """A JSON-ready dict: `cpu` (name), `flags` (list, those of FLAGS that the processor has),
    `cores` (usable by this process), `platform` (system and architecture), `versions` (python and
    each installed package).

    Nothing is imported for it, so it costs milliseconds and works without torch.
    """
    name, flags = _processor()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": name,
        "flags": flags,
        "cores": usable_cores(),
        "platform": f"{platform.system()} {platform.machine()}".strip(),
        "versions": versions,
    }


def usable_cores() -> int:
    """Processors this process may run on, at least 1: taskset or a container may allow a few."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> tuple[str, list[str]]:
    """Name and relevant flags of the first processor; without /proc/cpuinfo the name alone."""
    fields: dict[str, str] = {}
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown"
    held = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    return name, [flag for flag in FLAGS if flag in held]
