"""`tersor inspect` and `tersor export`: what a file holds, and the same in other forms."""

from __future__ import annotations

import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from tersor.cli.arguments import Model, Weights
from tersor.cli.output import Output, say, show_table
from tersor.cli.targets import picture, provenance, writable
from tersor.errors import SpecError

if TYPE_CHECKING:
    import onnx

SMALL = 64  # elements; tensors below that are summed up in one line
ENDINGS = {"onnx": ".onnx", "tersor": ".tersor", "openvino": ".xml", "torch": ".safetensors"}


def inspect(
    model: Positional[Model],
    /,
    *,
    weights: Weights = None,
    num_classes: int | None = None,
    out: str | None = None,
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """What a .tersor file holds, or which layers a network has: shape, encoding, bytes, density.

    Args:
        out: of a .tersor file: a picture of what takes its bytes (.svg), or a page with the table (.html)
    """
    from tersor.artifact import inspect_file
    from tersor.pipeline import resolve

    target = None if out is None else picture(out)
    if model.endswith(".tersor"):
        resolve(
            model, weights=weights, num_classes=num_classes
        )  # refuses options that do not apply
        answer = {"file": pathlib.Path(model).name, **inspect_file(model)}
    elif target is not None:
        raise SpecError(f"--out {out}: a picture is made of a .tersor file, got {model!r}")
    else:
        answer = _network(model, weights, num_classes)
    _show(output, model, answer)
    if target is not None:
        answer["out"] = str(target)
        say(output, f"wrote {target}, {_draw(target, answer):,} bytes")
    return answer


def _network(model: str, weights: str | None, num_classes: int | None) -> dict[str, Any]:
    from tersor.graph.layers import weight_layers
    from tersor.pipeline import resolve

    module = resolve(model, weights=weights, num_classes=num_classes).need_module("inspect")
    named = {name: layer.get_parameter("weight") for name, layer in weight_layers(module)}
    layers = [
        {
            "name": name,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "size_bytes": weight.numel() * weight.element_size(),
            "density": int(weight.count_nonzero()) / max(weight.numel(), 1),
        }
        for name, weight in named.items()
    ]
    parameters = sum(p.numel() for p in module.parameters())
    return {"model": model, "parameters": parameters, "layers": layers}


def _show(output: Output, model: str, answer: dict[str, Any]) -> None:
    layers = answer["layers"]
    known = ("name", "shape", "dtype", "encoding", "size_bytes", "bits_per_weight", "density")
    columns = [c for c in known if layers and c in layers[0]]
    large = [layer for layer in layers if _size(layer) >= SMALL or "encoding" not in layer]
    show_table(output, model, columns, [[layer[c] for c in columns] for layer in large])
    if len(large) < len(layers):
        taken = sum(layer["size_bytes"] for layer in layers if _size(layer) < SMALL)
        say(output, f"{len(layers) - len(large)} tensors below {SMALL} elements: {taken:,} bytes")
    for key in ("parameters", "size_bytes", "skeleton_bytes", "header_bytes", "format_version"):
        if key in answer:
            say(output, f"{key}: {answer[key]:,}")


def _size(layer: dict[str, Any]) -> int:
    found = 1
    for length in layer["shape"]:
        found *= length
    return found


def _draw(target: pathlib.Path, answer: dict[str, Any]) -> int:
    from tersor.artifact.storage import write_whole
    from tersor.report.contents import contents_page, contents_svg

    make = contents_svg if target.suffix == ".svg" else contents_page
    content = make(answer).encode()
    write_whole(target, [content], len(content))
    return len(content)


def export(
    model: Positional[Model],
    /,
    *,
    out: str,
    to: str = "onnx",
    weights: Weights = None,
    num_classes: int | None = None,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    output: Output = Output(),  # noqa: B008
) -> dict[str, Any]:
    """Write a network or a .tersor file in another form, with a free batch size.

    Args:
        out: the file to write: .onnx, .tersor, .xml (and .bin beside it), .safetensors
        to: onnx; tersor; openvino: its own form; torch: floats by name, which torch reads from safetensors
        input_shape: channels height width of one input (a .tersor file knows its own)
    """
    from tersor.artifact.storage import write_whole
    from tersor.pipeline import resolve, write

    if to not in ENDINGS:
        raise SpecError(f"--to must be one of {', '.join(ENDINGS)}, got {to!r}")
    target = writable(out, ENDINGS[to])
    subject = resolve(model, weights=weights, num_classes=num_classes)
    graph = subject.graph(input_shape)
    if to == "tersor":
        whence, state = provenance(model, None), subject.state(graph)
        size = write(graph, target, plan=subject.plan, provenance=whence, state=state)
    elif to == "openvino":
        size = _write_openvino(graph, target)
    else:
        data = graph.SerializeToString() if to == "onnx" else _tensors(graph, subject.state(graph))
        write_whole(target, [data], len(data))
        size = len(data)
    say(output, f"wrote {target}, {size:,} bytes")
    return {"out": str(target), "size_bytes": size, "to": to}


def _tensors(graph: onnx.ModelProto, state: dict[str, Any]) -> bytes:
    """A safetensors file of the graph's floats by name (coded weights as what they stand for), and of
    `state`, whose tensors go before those of the graph where a name is taken."""
    import numpy as np
    from safetensors.numpy import save

    from tersor.graph.constants import constant_values

    tensors = {**constant_values(graph), **state}
    data: bytes = save({name: np.array(tensors[name], order="C") for name in sorted(tensors)})
    return data


def _write_openvino(graph: onnx.ModelProto, target: pathlib.Path) -> int:
    """FILE.xml and FILE.bin; returns the bytes of both."""
    from tersor.artifact.storage import write_whole
    from tersor.engines.openvino import intermediate

    with tempfile.TemporaryDirectory() as place:
        found = intermediate(graph, pathlib.Path(place))
        parts = {suffix: found.with_suffix(suffix).read_bytes() for suffix in (".bin", ".xml")}
    for suffix, data in parts.items():
        write_whole(target.with_suffix(suffix), [data], len(data))
    return sum(map(len, parts.values()))
