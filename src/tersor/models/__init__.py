"""Networks by name, and reading and writing of their weights."""

from tersor.models.load import (
    MODELS,
    example_input,
    load_model,
    load_weights_,
    read_weights,
    save_compact,
    save_weights,
)

__all__ = [
    "MODELS",
    "example_input",
    "load_model",
    "load_weights_",
    "read_weights",
    "save_compact",
    "save_weights",
]
