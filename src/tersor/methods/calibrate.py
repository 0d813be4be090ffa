"""One pass of calibration inputs through the float graph: the ranges of its values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from tersor.engines.load import available_cpus
from tersor.engines.onnxruntime import inference_session
from tersor.errors import DataError
from tersor.tensors.observers import OBSERVERS

FloatArray = npt.NDArray[np.float32]
CHUNK = 32  # images at a time: all values of VGG-16 at 32x32 take 70 MB then


def observe_ranges(
    graph: onnx.ModelProto,
    names: Sequence[str],
    batches: Iterable[FloatArray],
    *,
    observer: str,
    num_images: int,
    levels: int = 256,
) -> tuple[dict[str, tuple[float, float]], int]:
    """Ranges (low, high) of the values `names` over the first `num_images` images of `batches` (N,
    C, H, W) float32, by the registered `observer` for codes of so many `levels`,
    and the number of images seen.

    Raises DataError for no images, another shape, NaN or infinity, naming the batch.
    """
    observers = {name: OBSERVERS[observer](levels=levels) for name in names}
    (image,) = [
        i for i in graph.graph.input if i.name not in {c.name for c in graph.graph.initializer}
    ]
    shape = [d.dim_value for d in image.type.tensor_type.shape.dim]
    inner = [name for name in names if name != image.name]
    session = inference_session(with_outputs(graph, inner), available_cpus())
    seen = 0
    for number, batch in checked_batches(batches, shape[1:], num_images):
        for start in range(0, len(batch), CHUNK):
            chunk = batch[start : start + CHUNK]
            values = dict(
                zip(inner, session.run(inner, {image.name: chunk}) if inner else [], strict=True)
            )
            values[image.name] = chunk
            for name, watching in observers.items():
                try:
                    watching.observe(values[name])
                except DataError as error:
                    raise DataError(
                        f"calibration batch {number}: the value {name!r} inside the model: "
                        f"{error}; the float model overflows on this input"
                    ) from None
        seen += len(batch)
    if seen == 0:
        raise DataError("no calibration images were given; static quantization needs one at least")
    return {name: watching.range() for name, watching in observers.items()}, seen


def with_outputs(graph: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The graph with the float values `names` as outputs in place of its own."""
    extended = onnx.ModelProto()
    extended.CopyFrom(graph)
    if names:
        del extended.graph.output[:]
    for name in names:
        extended.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    return extended


def checked_batches(
    batches: Iterable[Any], image_shape: Sequence[int], num_images: int
) -> Iterator[tuple[int, FloatArray]]:
    """The first `num_images` images of `batches`, with the number of the batch they come in.

    Raises DataError for another shape than (N, *image_shape) (0 stands for any size), another dtype
    than float32, NaN or infinity.
    """
    left = num_images
    for number, batch in enumerate(batches):
        if left <= 0:
            return
        values = np.asarray(batch)
        if values.ndim != 4 or any(
            want not in (0, has) for want, has in zip(image_shape, values.shape[1:], strict=True)
        ):
            wanted = ", ".join(str(size) for size in image_shape)
            raise DataError(
                f"calibration batch {number} has shape {values.shape}; expected (N, {wanted})"
            )
        if values.dtype != np.float32:
            raise DataError(
                f"calibration batch {number} is {values.dtype}; expected float32 as the model "
                "sees it (Splits.batches normalises)"
            )
        values = np.ascontiguousarray(values[:left])
        if not np.isfinite(values).all():
            image = int(np.argwhere(~np.isfinite(values))[0][0])
            raise DataError(
                f"calibration batch {number} holds NaN or infinity in image {image}; clean the "
                "inputs"
            )
        left -= len(values)
        yield number, values
