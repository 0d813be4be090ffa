"""What others do for small files: published sizes, codes in gzip and zstd, Deep Compression."""

from __future__ import annotations

import copy
import gzip
import heapq

import numpy as np
import onnx
import torch

import tersor
from tersor.graph.fold import fold_copies_
from tersor.pipeline import deployment_graph, prune_model, quantize_graph

# (network, what, bytes, accuracy in percent, source): results/README or the papers; not measured here.
PUBLISHED = [
    ("VGG-16 (60 MB form)", "DeepCABAC / NNR", 960_000, 91.0, "Wiedemann 2020"),
    ("VGG-16 (60 MB form)", "Bayesian Compression", 525_000, 90.8, "Louizos 2017"),
    ("VGG-16 (60 MB form)", "MIRACLE", 417_000, 93.4, "Havasi 2019"),
    ("VGG-16 (60 MB form)", "EPR", 101_000, 90.0, "Oktay 2020"),
    ("VGG-16 (60 MB form)", "LilNetX", 129_000, 92.6, "Girish 2023"),
    ("VGG-16 (60 MB form)", "LilNetX", 76_000, 90.0, "Girish 2023"),
    ("ResNet-20-4", "EPR", 128_000, 91.2, "Oktay 2020"),
    ("ResNet-20-4", "LilNetX", 66_000, 91.5, "Girish 2023"),
    ("ResNet-18", "Tiled Bit Networks", 358_000, 93.1, "Gorbett 2024"),
    ("ResNet-18", "Multi-Prize Ticket", 1_000_000, 94.8, "Diffenderfer 2021"),
]
FIELDS = ("model", "form", "size_bytes", "accuracy_percent", "source")


def published():
    return [dict(zip(FIELDS, row, strict=True)) for row in PUBLISHED]


def packed_bytes(graph, kind):
    data = graph.SerializeToString(deterministic=True)
    if kind == "gzip":
        return len(gzip.compress(data, 9))
    import zstandard

    return len(zstandard.ZstdCompressor(level=19).compress(data))


def deep_compression(rest, module, splits, place):
    """The graph, and what is told of it: global magnitude pruning, k-means of each layer, gaps and places Huffman-coded
    (Han 2016, sections 2-4)."""
    share, bits, *more = rest.split(",")
    epochs = float(more[0].split("=")[1]) if more else 0.0
    module = copy_folded(module, splits)
    recovery = None
    if epochs:
        recovery = tersor.Finetune(epochs=epochs, learning_rate=0.02, distill=1.0, compile="off")
    pruned = prune_model(
        module,
        splits,
        tersor.Prune(sparsity=float(share), criterion="l1", scope="global"),
        recovery=recovery,
        checkpoint=place.with_suffix(".checkpoint"),
    ).module
    graph = deployment_graph(pruned, splits.input_shape)
    request = tersor.Quantize(
        mode="weight_only", code="codebook", bits=int(bits), granularity="per_tensor", edge_bits=8
    )
    small = quantize_graph(graph, None, request).graph
    size = huffman_file_bytes(small, graph)
    return small, {"size_bytes": size, "file": "counted", "epochs": epochs}


def copy_folded(module, splits):
    module = copy.deepcopy(module)
    fold_copies_(module, torch.zeros(2, *splits.input_shape))
    return module


def huffman_file_bytes(small, graph):
    """Bytes of Deep Compression's form: for each weight the gaps between its nonzero codes (up to 15, longer ones
    in several steps) and these codes, each Huffman-coded with its table; all else as it is."""
    held = {i.name: onnx.numpy_helper.to_array(i) for i in small.graph.initializer}
    bits = other = 0
    for name, values in held.items():
        if not name.endswith("_quantized"):
            other += values.nbytes
            continue
        flat = values.ravel()
        levels = held.get(name.removesuffix("_quantized") + "_levels")
        zero = 0 if levels is None else int(np.abs(levels).argmin())
        if levels is not None and levels[zero] != 0:
            zero = -1
        places = np.flatnonzero(flat != zero)
        gaps = np.diff(places, prepend=-1) - 1
        fillers = gaps // 15
        steps = np.concatenate([gaps % 15, np.full(int(fillers.sum()), 15)])
        codes = np.concatenate([flat[places], np.full(int(fillers.sum()), max(zero, 0))])
        bits += huffman_bits(steps) + huffman_bits(codes.astype(np.int64))
    return -(-bits // 8) + other


def huffman_bits(symbols):
    """Bits of symbols under their best prefix code, and of its table: a byte for each symbol and its length."""
    counts = np.unique(symbols, return_counts=True)[1].tolist()
    if len(counts) < 2:
        return len(symbols) + 16
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total + 16 * len(counts)
