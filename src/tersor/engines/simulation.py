"""The function that a graph defines, computed node by node in float: what engines are held to."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from tersor.engines.load import ENGINES, Session, open_session
from tersor.engines.onnxruntime import OnnxRuntimeSession, inference_session


@ENGINES.register("simulation")
class SimulationSession(OnnxRuntimeSession):
    """ONNX Runtime without any optimisation of the graph.

    QuantizeLinear and DequantizeLinear are computed one by one and what lies between them in
    float32, so that no integer kernel, merged operator or 16-bit sum takes part. Several times
    slower than any engine.
    """

    engine = "simulation"
    may_be_chosen = False  # it is what the others are held to

    def _opened(self, graph: onnx.ModelProto) -> Any:
        return inference_session(products_in_float(graph), self.threads, optimize=False)


def simulate(graph: Any, threads: int | None = None) -> Session:
    """A session of the function that `graph`, an onnx.ModelProto or an Artifact, defines.

    `threads` as in open_session. Raises EngineError for a graph that cannot run.
    """
    return open_session(graph, engine="simulation", threads=threads)


def products_in_float(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every MatMulInteger computed as MatMul in float32; the same graph without one.

    ONNX gives MatMulInteger the exact sum in int32. Integer kernels for x86 without VNNI may cut
    it off; float32 is exact up to 2^24 and off by 2^-24 of the value beyond.
    """
    if all(node.op_type != "MatMulInteger" for node in graph.graph.node):
        return graph
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    del changed.graph.node[:]
    for node in graph.graph.node:
        integer = node.op_type == "MatMulInteger"
        changed.graph.node.extend(_float_product(node) if integer else [node])
    return changed


def _float_product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """MatMul of both factors less their zero points, as int32 like the output of `node`."""
    end = node.output[0]
    nodes: list[onnx.NodeProto] = []
    factors: list[str] = []
    for place in range(2):
        factor = f"{end}_factor_{place}"
        nodes.append(_to(node.input[place], factor, TensorProto.FLOAT))
        if len(node.input) > place + 2 and node.input[place + 2]:
            zero_point, centred = f"{factor}_zero_point", f"{factor}_centred"
            nodes.append(_to(node.input[place + 2], zero_point, TensorProto.FLOAT))
            nodes.append(helper.make_node("Sub", [factor, zero_point], [centred]))
            factor = centred
        factors.append(factor)
    product = f"{end}_in_float"
    nodes.append(helper.make_node("MatMul", factors, [product]))
    return [*nodes, _to(product, end, TensorProto.INT32)]


def _to(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=kind)
