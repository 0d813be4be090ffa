"""The model as a structure: export to ONNX, exact folding, layers by name, and quantized graphs."""

from tersor.graph.export import export_onnx
from tersor.graph.layers import weight_layers

__all__ = ["export_onnx", "weight_layers"]
