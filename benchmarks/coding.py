"""Bytes of the codes of trained networks: Tersor's encodings, their entropies, zstd, LZMA, Huffman.

    python benchmarks/coding.py --weights resnet18=FILE vgg16_bn=FILE --cache DIR --out coding.json
    python benchmarks/coding.py --weights resnet18=FILE vgg16_bn=FILE --cache DIR --out coding.json --time

Every form (see FORMS) is made from the weights of the trained network: magnitude pruning over all layers, nearest
codes with one scale a row, as `tersor quantize --mode weight_only` makes them. Codes and sections are kept in
--cache; with --time their decoding is timed. A row is one form of one network and sums up its weights:

ours            the section's bytes, all that is needed to decode included
entropy         the same symbols under the same model, by an ideal coder
one_table, row_tables, row_by_column
                ideal coders with one table a tensor, one a row, one a class of (row scale x column scale); tables cost
                which symbols occur and half the logarithm of how often, scales their own entropy
bytes_where_... the same of the tensors of which at most a tenth is not 0
zstd, lzma      level 19, preset 9 extreme, of the codes' bytes (one stream a tensor)
huffman         Deep Compression's way: canonical Huffman of the codes; where it is less, of the distances between
                codes that are not 0 (4 or 5 bits, filled up with zeros) and of those codes
weights_a_second  of decoding, one thread, best of three: as they stand, and all of it as `quick` packing writes it
"""

from __future__ import annotations

import argparse
import heapq
import json
import lzma
import math
import pathlib
import time

import numpy as np
import torch
import zstandard

import tersor
from tersor.artifact import ENCODINGS
from tersor.artifact.encoding import Steps, smallest
from tersor.artifact.encodings import codes as coded
from tersor.artifact.encodings import integers
from tersor.artifact.entropy import Reader
from tersor.artifact.fitting import PART, Meter
from tersor.bench.environment import environment
from tersor.graph.fold import fold_copies_
from tersor.graph.layers import weight_layers
from tersor.tensors.grids import fit_grid

# Share pruned; code and bits (None: the floats themselves).
FORMS = {
    "8 bits": (0, ("uniform", 8)),
    "4 bits": (0, ("uniform", 4)),
    "3 bits": (0, ("uniform", 3)),
    "2 bits": (0, ("uniform", 2)),
    "ternary": (0, ("ternary", 2)),
    "4 bits, k-means": (0, ("codebook", 4)),
    "70 % pruned, 8 bits": (0.7, ("uniform", 8)),
    "70 % pruned, 4 bits": (0.7, ("uniform", 4)),
    "70 % pruned, k-means": (0.7, ("codebook", 4)),
    "90 % pruned, 8 bits": (0.9, ("uniform", 8)),
    "90 % pruned, 4 bits": (0.9, ("uniform", 4)),
    "90 % pruned, k-means": (0.9, ("codebook", 4)),
    "95 % pruned, 8 bits": (0.95, ("uniform", 8)),
    "95 % pruned, 4 bits": (0.95, ("uniform", 4)),
    "95 % pruned, k-means": (0.95, ("codebook", 4)),
    "float": (0, None),
    "90 % pruned, float": (0.9, None),
}
LIMITS = {"zstd": 19, "lzma": 9 | lzma.PRESET_EXTREME}
SHAPE = (3, 32, 32)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--weights", nargs="+", required=True, metavar="NETWORK=FILE")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--cache", required=True, help="directory that keeps codes and sections")
    parser.add_argument(
        "--time", action="store_true", help="time the decoding of what was measured"
    )
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    out = pathlib.Path(options.out)
    told = json.loads(out.read_text()) if out.exists() else {"rows": []}
    for network, _, weights in (each.partition("=") for each in options.weights):
        for form in options.forms:
            rows = [r for r in told["rows"] if (r["network"], r["form"]) != (network, form)]
            (row,) = [r for r in told["rows"] if r not in rows] or [{}]
            held = made(pathlib.Path(options.cache), network, weights, form)
            if options.time:
                row = {**row, "weights_a_second": speeds(held)}
            else:
                row = {"network": network, "form": form, **measure(held)}
            told = {"rows": [*rows, row], "environment": environment()}
            told["rows"].sort(key=lambda r: (r["network"], list(FORMS).index(r["form"])))
            out.write_text(json.dumps(told, indent=1) + "\n")
            print(line_of(row), flush=True)


def made(cache, network, weights, form):
    """(array, encoding, section, section of quick packing) of each weight; made once."""
    path = cache / f"{network}, {form}.npz"
    if not path.exists():
        arrays = forms_of(network, weights, form)
        found = {}
        for name, array in arrays.items():
            encoding, section = smallest(array)
            quick = smallest(array, True)[1]
            parts = (
                array,
                encoding,
                np.frombuffer(section, np.uint8),
                np.frombuffer(quick, np.uint8),
            )
            found.update({f"{name}/{i}": part for i, part in enumerate(parts)})
            found[f"{name}/4"] = smallest(array, True)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **found)
    held = np.load(path)
    names = sorted({key.rpartition("/")[0] for key in held.files})
    return [tuple(held[f"{name}/{i}"] for i in range(5)) for name in names]


def forms_of(network, weights, form):
    """The arrays that a file of that form holds, by layer."""
    sparsity, grid = FORMS[form]
    module = tersor.load_model(network, weights=weights)
    fold_copies_(module, torch.zeros(2, *SHAPE))
    if sparsity:
        module = tersor.prune(module, tersor.Prune(sparsity=sparsity, scope="global")).module
    found = {}
    for name, layer in weight_layers(module):
        weight = layer.weight.detach().numpy()
        found[name] = weight if grid is None else codes_of(weight, *grid)
    return found


def codes_of(weight, code, bits):
    matrix = weight.reshape(len(weight), -1)
    grid = fit_grid(
        code,
        matrix,
        bits,
        symmetric=True,
        granularity="per_channel",
        group_size=0,
        search="minmax" if bits == 8 else "mse",
    )
    indexes = grid.encode(matrix).reshape(weight.shape)
    return grid.levels.astype(np.int8)[indexes] if grid.integers else indexes


def measure(held):
    sums, sparse, forms = {}, {}, {}
    elements = nonzero = 0
    for array, encoding, section, *_ in held:
        name, data = str(encoding), section.tobytes()
        forms[detail(name, data)] = forms.get(detail(name, data), 0) + array.size
        costs = {"ours": len(data), "entropy": ideal(name, data, array), **rivals(array)}
        counts = np.unique(array, return_counts=True)[1]
        used = array.size - int(counts.max() if array.itemsize == 1 else (array == 0).sum())
        for kept in (sums, sparse) if used <= 0.1 * array.size else (sums,):
            for key, value in {**costs, "elements": array.size}.items():
                kept[key] = kept.get(key, 0) + value
        elements += array.size
        nonzero += used
    return {
        "elements": elements,
        "density": nonzero / elements,
        "bits_per_weight": 8 * sums["ours"] / elements,
        "bytes": rounded(sums),
        "bytes_where_at_most_a_tenth_is_not_0": rounded(sparse),
        "encodings": forms,
    }


def speeds(held):
    """Weights a second, by how they are stored; and all of them as quick packing stores them."""
    spent = {}
    for array, encoding, section, quick, quick_encoding in held:
        name = detail(str(encoding), section.tobytes())
        for key, way, data in (
            (name, encoding, section),
            ("all", encoding, section),
            ("all, quick", quick_encoding, quick),
        ):
            size, seconds = spent.get(key, (0, 0.0))
            spent[key] = size + array.size, seconds + decoding(str(way), data.tobytes(), array)
    return {key: round(size / seconds) for key, (size, seconds) in spent.items()}


def rounded(sums):
    return {key: round(value) for key, value in sums.items() if not np.isnan(value)}


def detail(name, section):
    return f"{name}, {('constant', 'runs', 'context')[section[0]]}" if name == "codes" else name


class Spy(Reader):
    """A reader that adds up what its symbols cost under its tables."""

    meter = Meter()

    def symbols(self, table, index, known):
        return self.meter.symbols(table, index, super().symbols(table, index, known))

    def run(self, table, count, known):
        return self.meter.run(table, count, super().run(table, count, known))

    def uniform(self, sizes, known):
        return self.meter.uniform(sizes, super().uniform(sizes, known))


def decoding(name, section, array):
    """Seconds to decode, the best of three."""
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        found = ENCODINGS[name].decode(
            memoryview(section), array.shape, array.dtype, Steps(1 << 30)
        )
        spent.append(time.perf_counter() - start)
        assert found.tobytes() == array.tobytes()
    return min(spent)


def ideal(name, section, array):
    """Bytes that an ideal coder would take under the same model; NaN where not all is entropy-coded."""
    Spy.meter = Meter()
    before = coded.Reader, integers.Reader
    coded.Reader = integers.Reader = Spy
    try:
        found = ENCODINGS[name].decode(
            memoryview(section), array.shape, array.dtype, Steps(1 << 30)
        )
    finally:
        coded.Reader, integers.Reader = before
    assert found.tobytes() == array.tobytes()
    return Spy.meter.parts / PART / 8 if name in ("codes", "codebook") else float("nan")


def rivals(array):
    """Bytes of the others for the same elements."""
    data = array.tobytes()
    found = {
        "zstd": len(zstandard.ZstdCompressor(level=LIMITS["zstd"]).compress(data)),
        "lzma": len(lzma.compress(data, preset=LIMITS["lzma"])),
    }
    if array.itemsize > 1:
        planes = np.frombuffer(data, np.uint8).reshape(-1, array.itemsize).T
        return {**found, "huffman": sum(huffman(np.ascontiguousarray(p)) for p in planes)}
    codes = array.astype(np.int64)
    codes -= codes.min()
    rows = codes.reshape(len(codes), -1)
    zero = int(np.bincount(codes.ravel()).argmax())
    return {
        **found,
        "one_table": entropy(codes.ravel()) / 8,
        "row_tables": sum(entropy(row, int(codes.max()) + 1) for row in rows) / 8,
        "row_by_column": min(
            row_by_column(rows - zero, 1),
            row_by_column(rows - zero, array[0, 0].size),
        )
        / 8,
        "huffman": min(huffman(codes.ravel()), relative_huffman(codes.ravel(), zero)),
    }


def entropy(symbols, size=None):
    """Bits of an ideal coder with one table over `size` symbols (as many as there are)."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    ideal = -(counts * np.log2(counts / counts.sum())).sum()
    return float(ideal + table_bits(counts, int(symbols.max()) + 1 if size is None else size))


def table_bits(counts, size):
    """Bits of a table: which of `size` symbols occur, and how often, each to the precision that pays."""
    which = (
        math.lgamma(size + 1) - math.lgamma(len(counts) + 1) - math.lgamma(size - len(counts) + 1)
    )
    return which / math.log(2) + 0.5 * float(np.log2(counts + 1).sum())


def row_by_column(matrix, group):
    """Bits with one table for each class of row scale x column scale (of `group` columns together);
    scales in half octaves at their own entropy."""
    size = np.abs(matrix.astype(np.int64))
    columns = size.reshape(len(size), -1, group).mean(axis=(0, 2))
    steps = [half_octaves(size.mean(axis=1)), half_octaves(columns)]
    classes = steps[0][:, None] + np.repeat(steps[1], group)[None]
    codes = matrix.astype(np.int64) - int(matrix.min())
    classes -= classes.min()
    tables = np.zeros((int(classes.max()) + 1, int(codes.max()) + 1), np.int64)
    np.add.at(tables, (classes.ravel(), codes.ravel()), 1)
    total = tables.sum(axis=1, keepdims=True)
    held = tables[tables > 0]
    share = (tables / np.maximum(total, 1))[tables > 0]
    bits = -(held * np.log2(share)).sum()
    bits += sum(table_bits(table[table > 0], len(table)) for table in tables if table.any())
    return float(bits + sum(entropy(step - step.min()) for step in steps))


def half_octaves(means):
    return np.round(2 * np.log2(np.maximum(means, 2.0**-12))).astype(np.int64)


def huffman(symbols):
    """Bytes of a canonical Huffman code and one byte for each symbol's length."""
    counts = np.bincount(symbols)
    heap = [(int(c), i) for i, c in enumerate(counts[counts > 0])]
    if len(heap) == 1:
        return 2
    heapq.heapify(heap)
    bits, number = 0, len(heap)
    while len(heap) > 1:
        one, other = heapq.heappop(heap), heapq.heappop(heap)
        bits += one[0] + other[0]
        number += 1
        heapq.heappush(heap, (one[0] + other[0], number))
    return bits / 8 + int((counts > 0).sum())


def relative_huffman(codes, zero):
    """Deep Compression (Han et al. 2016): distances of 4 or 5 bits, filled up with zeros."""
    places = np.flatnonzero(codes != zero)
    if not places.size:
        return 2
    gaps = np.diff(places, prepend=-1) - 1
    best = []
    for bits in (4, 5):
        most = 1 << bits
        fillers = gaps // most
        distances = np.concatenate([gaps % most, np.full(int(fillers.sum()), most - 1)])
        values = np.concatenate([codes[places], np.full(int(fillers.sum()), zero)])
        best.append(huffman(distances) + huffman(values))
    return min(best)


def line_of(row):
    lines = [
        f"{row['network']}, {row['form']}: density {row['density']:.3f}, bits {row['bits_per_weight']:.3f}"
    ]
    for key in ("bytes", "bytes_where_at_most_a_tenth_is_not_0"):
        held = row[key]
        if held:
            others = "  ".join(
                f"{name} {held['ours'] / value - 1:+.1%}"
                for name, value in held.items()
                if name not in ("ours", "elements")
            )
            lines.append(f"  {key}: {held['ours']:,} for {held['elements']:,}  {others}")
    told = {k: f"{v / 1e6:.1f} M/s" for k, v in row.get("weights_a_second", {}).items()}
    return "\n".join([*lines, f"  {told} {row['encodings']}"])


if __name__ == "__main__":
    main()
