"""What the tables share: rows, cells, and where they were measured."""

from __future__ import annotations

import json
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
NAMES = {"resnet18": "ResNet-18", "vgg16_bn": "VGG-16 (vgg16_bn)"}


def rows_of(name):
    return json.loads((ROOT / "results" / name).read_text())


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def where(told):
    told = told["environment"]
    cpu = told.get("cpu") or told.get("processor") or ""
    versions = ", ".join(f"{k} {v}" for k, v in sorted(told.get("versions", {}).items()))
    return f"{cpu}; {versions}".strip("; ")


def change(row):
    row = {**row, **row.get("interval", {})}
    return f"{row['difference_pt']:+.2f} ({row['low_pt']:+.2f} to {row['high_pt']:+.2f})"
