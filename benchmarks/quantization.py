"""Static int8 side by side: Tersor, ONNX Runtime's quantizer, NNCF with OpenVINO, PyTorch, torchao.

    pip install -e '.[openvino]' -r benchmarks/requirements.txt
    python benchmarks/quantization.py --data folder:DIR --weights resnet18=FILE vgg16_bn=FILE --out quantization.json

Every form of one network is built from the same float module and the same unlabelled calibration images; accuracy is
taken on the whole test split (trained networks only); times are medians of interleaved runs in one process. Each peer
runs with its own documented defaults for x86, which are its best settings there; a peer that fails is listed with its
error. Needs a C++ compiler for Inductor.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import tempfile
import time
import warnings

import numpy as np
import torch

import tersor
from tersor.bench.environment import environment
from tersor.bench.timing import time_sessions
from tersor.engines import open_session
from tersor.pipeline import deployment_graph

NUM_CALIBRATION = 512
TOOLS = ("tersor", "onnxruntime", "nncf", "pytorch", "torchao")
SLOW_FLOATS = ("float32 on PyTorch eager", "float32 on openvino")


class Runs:
    """Anything with a function from a batch to logits, as a session of one engine."""

    def __init__(self, engine, threads, function):
        self.engine, self.threads, self.run = engine, threads, function


def tersor_forms(module, graph, calibration, threads):
    started = time.perf_counter()
    small = tersor.quantize(graph, tersor.Quantize(), calibration)
    seconds = time.perf_counter() - started
    for engine in ("onnxruntime", "openvino", "openvino_streams", "openvino_bf16"):
        yield (
            f"Tersor static int8 on {engine}",
            seconds,
            lambda e=engine: open_session(small.graph, engine=e, threads=threads),
        )


def onnxruntime_form(module, graph, calibration, threads):
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = iter(calibration)

        def get_next(self):
            batch = next(self.left, None)
            return None if batch is None else {"input": batch}

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        (place / "float.onnx").write_bytes(graph.SerializeToString())
        quant_pre_process(str(place / "float.onnx"), str(place / "ready.onnx"))
        quantization.quantize_static(
            str(place / "ready.onnx"),
            str(place / "int8.onnx"),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )
        import onnx

        model = onnx.load(place / "int8.onnx")
    yield (
        "ONNX Runtime quantize_static",
        time.perf_counter() - started,
        lambda: open_session(model, engine="onnxruntime", threads=threads),
    )


def nncf_form(module, graph, calibration, threads):
    import nncf
    import openvino

    started = time.perf_counter()
    core = openvino.Core()
    model = core.read_model(graph.SerializeToString())
    images = [image[None] for batch in calibration for image in batch]
    small = nncf.quantize(model, nncf.Dataset(images), subset_size=len(images))
    seconds = time.perf_counter() - started

    def opened():
        compiled = core.compile_model(
            small, "CPU", {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        )
        request = compiled.create_infer_request()
        return Runs(
            "openvino", threads, lambda batch: request.infer({0: batch})[compiled.output(0)].copy()
        )

    yield "NNCF on OpenVINO", seconds, opened


def inductor_form(module, graph, calibration, threads):
    """torchao's quantizer for x86. Dynamic batch sizes and non-strict export both defeat its patterns
    (60 times slower, an error), so it gets one program for each batch size, in channels_last."""
    import torch._inductor.config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    torch._inductor.config.freezing = True

    def converted(size):
        images = np.concatenate(calibration)
        images = images[: len(images) // size * size].reshape(-1, size, *images.shape[1:])
        example = torch.from_numpy(images[0]).contiguous(memory_format=torch.channels_last)
        program = torch.export.export(module.eval(), (example,), strict=True).module()
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program, quantizer)
        with torch.no_grad():
            for batch in images:
                prepared(torch.from_numpy(batch).contiguous(memory_format=torch.channels_last))
        return convert_pt2e(prepared)

    started = time.perf_counter()
    first = converted(len(calibration[0]))
    seconds = time.perf_counter() - started

    def opened():
        compiled = {}

        def run(batch):
            size = len(batch)
            inputs = torch.from_numpy(batch).contiguous(memory_format=torch.channels_last)
            torch.set_num_threads(threads)
            with torch.no_grad():
                if size not in compiled:
                    torch._dynamo.reset()
                    program = first if size == len(calibration[0]) else converted(size)
                    compiled[size] = torch.compile(program, dynamic=False)
                return compiled[size](inputs).numpy()

        return Runs("inductor", threads, run)

    yield "torchao pt2e on Inductor", seconds, opened


def pytorch_forms(module, graph, calibration, threads):
    """PyTorch's own FX quantization, once for each of its engines."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    for engine in ("x86", "onednn", "fbgemm"):
        started = time.perf_counter()
        torch.backends.quantized.engine = engine
        example = (torch.from_numpy(calibration[0][:2]),)
        mapping = get_default_qconfig_mapping(engine)
        prepared = prepare_fx(copy.deepcopy(module).eval(), mapping, example)
        with torch.no_grad():
            for batch in calibration:
                prepared(torch.from_numpy(batch))
        converted = convert_fx(prepared)
        seconds = time.perf_counter() - started

        def opened(converted=converted, engine=engine):
            def run(images):
                torch.backends.quantized.engine = engine
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    return converted(torch.from_numpy(images)).numpy()

            return Runs(engine, threads, run)

        yield f"PyTorch FX static int8 ({engine})", seconds, opened


def accuracy(session, splits, batch=250):
    part, right = splits.test, 0
    for start, inputs in zip(range(0, len(part), batch), splits.batches(part, batch), strict=True):
        right += int((session.run(inputs).argmax(1) == part.labels[start : start + batch]).sum())
    return right / len(part)


def measure(name, module, splits, input_shape, calibration, options, trained):
    threads = options.threads
    graph = deployment_graph(module, input_shape, fold_copies=True)
    plain = deployment_graph(module, input_shape)
    forms = {}

    def add(label, seconds, opened):
        try:
            session = opened()
            session.run(calibration[0][:2])
            forms[label] = (session, seconds, None)
        except Exception as error:
            forms[label] = (None, seconds, f"{type(error).__name__}: {error}"[:300])

    add(
        "float32 on PyTorch eager",
        0.0,
        lambda: open_session(module, engine="torch", threads=threads),
    )
    for engine in ("onnxruntime", "openvino"):
        add(
            f"float32 on {engine}",
            0.0,
            lambda e=engine: open_session(graph, engine=e, threads=threads),
        )
    # The peers get the plain graph, as their users would give it; ours is folded by exact algebra.
    for tool, build, source in (
        ("tersor", tersor_forms, graph),
        ("onnxruntime", onnxruntime_form, plain),
        ("nncf", nncf_form, plain),
        ("pytorch", pytorch_forms, plain),
        ("torchao", inductor_form, plain),
    ):
        if tool not in options.tools:
            continue
        try:
            for each in build(module, source, calibration, threads):
                add(*each)
        except Exception as error:
            forms[build.__name__] = (None, None, f"{type(error).__name__}: {error}"[:300])
    rows = {
        label: {
            "model": name,
            "form": label,
            "quantizing_s": seconds,
            "error": error,
            "accuracy": None,
            "num_samples": None,
        }
        for label, (_, seconds, error) in forms.items()
    }
    running = {label: session for label, (session, _, error) in forms.items() if error is None}
    for batch in () if options.no_times else options.batch:
        timings = time_sessions(running, input_shape, batch, seconds=options.seconds)
        for label, timing in timings.items():
            rows[label][f"batch_{batch}"] = timing.to_dict()
            print(f"{name:12} batch {batch:3} {timing.median_ms:8.2f} ms  {label}", flush=True)
    if trained and not options.no_accuracy:
        for label, session in running.items():
            if label in SLOW_FLOATS:  # the same function as float32 on onnxruntime
                continue
            rows[label]["accuracy"] = accuracy(session, splits)
            rows[label]["num_samples"] = len(splits.test)
            print(f"{name:12} accuracy {rows[label]['accuracy']:.2%}  {label}", flush=True)
    for label, row in rows.items():
        if row["error"]:
            print(f"{name:12} failed: {label}: {row['error']}", flush=True)
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", nargs="*", default=[], help="NAME=FILE of a trained network")
    parser.add_argument("--untrained", nargs="*", default=["mobilenet_v2", "vit_b_16"])
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--no-times", action="store_true", help="accuracy alone, on a busy machine")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    splits = tersor.load_data(options.data, num_calibration=NUM_CALIBRATION)
    calibration = list(splits.batches(splits.calibration, 64))
    rows = []
    for given in options.weights:
        name, _, file = given.partition("=")
        module = tersor.load_model(name, weights=file)
        rows += measure(name, module, splits, splits.input_shape, calibration, options, True)
        written(options.out, splits, options.threads, rows)
    noise = np.random.default_rng(0).standard_normal((64, 3, 224, 224)).astype(np.float32)
    for name in options.untrained:
        module = tersor.load_model(f"torchvision:{name}", seed=0)
        few = [noise[i : i + 16] for i in range(0, 64, 16)]
        options_here = argparse.Namespace(
            **{**vars(options), "batch": [b for b in options.batch if b <= 8] + [8]}
        )
        rows += measure(name, module, splits, (3, 224, 224), few, options_here, False)
        written(options.out, splits, options.threads, rows)


def written(out, splits, threads, rows):
    """Rows go beside those of an earlier call; what this one did not measure is kept."""
    path = pathlib.Path(out)
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {(row["model"], row["form"]): row for row in held}
    for row in rows:
        key = (row["model"], row["form"])
        fresh = {k: v for k, v in row.items() if v is not None}
        merged[key] = {**row, **merged.get(key, {}), **fresh}
    rows = list(merged.values())
    told = {
        "environment": environment(),
        "data": splits.name,
        "threads": threads,
        "calibration": NUM_CALIBRATION,
        "rows": rows,
    }
    path.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
