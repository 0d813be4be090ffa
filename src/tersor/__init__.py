"""Tersor: trained PyTorch networks made smaller and faster, in one safe file, with measurements.

    import tersor

    data = tersor.load_data("digits")
    module = tersor.finetune(tersor.load_model("digits_net"), data, tersor.Finetune(epochs=5)).module
    pruned = tersor.prune(module, tersor.Prune(sparsity=0.7))
    graph = tersor.export_onnx(pruned.module, data.input_shape)
    small = tersor.quantize(graph, tersor.Quantize(), data.batches(data.calibration, 64))
    tersor.write(small.graph, "digits.tersor", plan=small.plan)
    session = tersor.open_session(tersor.load("digits.tersor"))
    print(tersor.evaluate(session, data).accuracy)

Names are imported when they are first used, so that `import tersor` and running a file need no torch.
"""

import importlib
from typing import Any

_HOMES = {
    "Budget": "specs",
    "EngineTeacher": "methods.teachers",
    "Factorize": "specs",
    "Finetune": "specs",
    "Plan": "specs",
    "Prune": "specs",
    "Quantize": "specs",
    "Recipe": "specs",
    "Share": "specs",
    "Squeeze": "specs",
    "StudySettings": "study.settings",
    "TersorError": "errors",
    "benchmark": "bench.timing:time_sessions",
    "compress": "ondemand.compress",
    "evaluate": "bench.evaluate",
    "export_onnx": "graph.export",
    "factorize": "methods.factorize",
    "finetune": "methods.finetune",
    "fitted_dropout": "methods.dropout",
    "load": "loading",
    "load_data": "data",
    "load_model": "models",
    "open_session": "engines",
    "pack": "artifact",
    "paired_interval": "bench.stats",
    "prune": "methods.prune",
    "quantize": "methods.quantize",
    "quantize_network": "pipeline",
    "reestimate_batch_norm": "methods.reestimate",
    "run_recipe": "recipe",
    "run_study": "study.run",
    "save": "artifact",
    "save_weights": "models",
    "share": "methods.share",
    "squeeze": "methods.squeezing",
    "write": "pipeline",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(f"tersor.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
