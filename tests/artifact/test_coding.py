"""Entropy coding: against a decoder of whole numbers, written from docs/format.md alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.artifact import activity, entropy
from tersor.artifact.context import _FIRST, _WIDTH, Model, code_grid, size_symbols
from tersor.artifact.entropy import TOTAL, Counts, Reader, Run, Writer, flat_prior, frequencies
from tersor.artifact.fitting import PART, Meter, choose
from tersor.artifact.grid import Grid, as_grid, grid_of
from tersor.errors import ArtifactError


class Plain:
    """The ANS decoder of docs/format.md in Python's whole numbers."""

    def __init__(self, stream):
        padded = stream + bytes(-len(stream) % 4)
        self.words = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)]
        self.state = 0
        self._fill()

    def _fill(self):
        while self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def symbol(self, frequency):
        size, total = len(frequency), sum(frequency)
        ends = [0]
        for value in frequency:
            ends.append(ends[-1] + value)
        ends = [e * ((1 << 24) - size) // total + i for i, e in enumerate(ends)]
        ends[-1] = 1 << 24
        place = self.state & ((1 << 24) - 1)
        found = next(i for i in range(size) if ends[i + 1] > place)
        share = ends[found + 1] - ends[found]
        self.state = (self.state >> 24) * share + place - ends[found]
        self._fill()
        return found


def tables(rng, contexts, size):
    counts = rng.integers(1, 2000, (contexts, size)) ** rng.integers(1, 3, (contexts, 1))
    return Counts(counts.astype(np.int64), 1 << 20)


@pytest.mark.parametrize("size", [2, 3, 9, 28, 255, 256])
def test_the_library_decodes_as_the_format_says(size):
    rng = np.random.default_rng(size)
    table = tables(rng, 5, size)
    writer = Writer()
    index, widths = rng.integers(0, 5, 300), 2 ** rng.integers(1, 16, 50).astype(np.int32)
    wanted = [rng.integers(0, size, 300), rng.integers(0, size, 77), rng.integers(0, widths)]
    writer.symbols(table, index, wanted[0])
    writer.run(table, 77, wanted[1])
    writer.uniform(widths, wanted[2])
    (stream,) = writer.finish()
    rows = [[int(v) for v in row] for row in table.frequencies]
    plain = Plain(stream)
    assert [plain.symbol(rows[i]) for i in index] == wanted[0].tolist()
    assert [plain.symbol(rows[0]) for _ in range(77)] == wanted[1].tolist()
    reader = Reader([stream])
    assert reader.symbols(table, index, None).tolist() == wanted[0].tolist()
    assert reader.run(table, 77, None).tolist() == wanted[1].tolist()
    assert reader.uniform(widths, None).tolist() == wanted[2].tolist()
    reader.finish()


@given(st.lists(st.lists(st.integers(1, 1 << 30), min_size=2, max_size=40), min_size=1, max_size=1))
def test_frequencies_are_whole_numbers_that_add_up(counts):
    found = frequencies(np.array(counts, np.int64))
    assert found.dtype == np.float64 and (found >= 1).all() and found.sum() == TOTAL
    assert (found == np.floor(found)).all()
    share = np.array(counts) / np.sum(counts)
    assert np.abs(found / TOTAL - share).max() <= 2 * len(counts[0]) / TOTAL


def test_counts_fade_behind_the_limit_and_stay_whole():
    table = Counts(flat_prior(3), 100)
    for symbol in (0, 1):
        table.update(np.int64(0), np.full(400, symbol))
    assert table.counts.sum() <= 100 * entropy.UNIT and (table.counts >= 1).all()
    assert table.counts[0].argmax() == 1, "what came last counts most"


@pytest.mark.parametrize("length", [1, 47, 48, 49, 5000])
def test_runs_do_not_care_in_which_pieces_they_are_asked_for(length):
    symbols = np.random.default_rng(length).binomial(4, 0.3, length)
    whole, parts = Writer(), Writer()
    Run(Counts(flat_prior(5), 1 << 20)).code(whole, length, symbols)
    run = Run(Counts(flat_prior(5), 1 << 20))
    for start in range(0, length, 37):
        part = symbols[start : start + 37]
        run.code(parts, len(part), part)
    # the same tables for the same symbols; only the calls differ
    reader = Reader(parts.finish())
    assert (
        Run(Counts(flat_prior(5), 1 << 20)).code(reader, length, None).tolist() == symbols.tolist()
    )
    reader.finish()
    assert whole.finish() == parts._segments


def test_long_streams_are_closed_and_begun_anew(monkeypatch):
    monkeypatch.setattr(entropy, "SEGMENT", 100)
    symbols = np.random.default_rng(0).binomial(9, 0.5, 2000)
    writer = Writer()
    Run(Counts(flat_prior(10), 1 << 20)).code(writer, 2000, symbols)
    streams = writer.finish()
    assert len(streams) > 5
    reader = Reader(streams)
    run = Run(Counts(flat_prior(10), 1 << 20))
    assert run.code(reader, 2000, None).tolist() == symbols.tolist()
    reader.finish()
    for broken in (streams[:-1], [*streams, streams[0]], streams[::-1]):
        with pytest.raises(ArtifactError):
            other = Reader(broken)
            Run(Counts(flat_prior(10), 1 << 20)).code(other, 2000, None)
            other.finish()


def test_runs_come_within_two_percent_of_the_entropy():
    rng = np.random.default_rng(3)
    for spread in (0.3, 2.0, 20.0):
        symbols = np.clip(np.round(rng.laplace(0, spread, 200_000)) + 100, 0, 200).astype(np.int64)
        writer = Writer()
        Run(Counts(flat_prior(201), 1 << 22)).code(writer, len(symbols), symbols)
        counts = np.bincount(symbols)
        counts = counts[counts > 0]
        bits = float(-(counts * np.log2(counts / counts.sum())).sum())
        assert 8 * sum(map(len, writer.finish())) < 1.02 * bits + 2000


def test_the_logarithm_is_right_to_its_last_part_and_far_from_every_tie():
    values = np.concatenate([np.arange(1, 5000), 2 ** np.arange(53), 2 ** np.arange(1, 53) - 1])
    wanted = activity.OCTAVE * np.log2(values.astype(np.float64))
    assert np.abs(activity.log2_parts(values) - wanted).max() <= 1
    # A library whose logarithm is a little off makes the same table all the same.
    exact = [activity.OCTAVE * math.log2(1 + (i + 0.5) / 256) for i in range(256)]
    assert min(abs(x % 1 - 0.5) for x in exact) > 1e-6


def test_sizes_are_symbols_and_a_rest():
    magnitudes = np.arange(1, 256)
    symbols, rest = size_symbols(magnitudes)
    assert (_FIRST[symbols] + rest == magnitudes).all() and (rest < _WIDTH[symbols]).all()
    assert (np.diff(symbols) >= 0).all() and symbols[:8].tolist() == list(range(8))
    assert all(width & (width - 1) == 0 for width in _WIDTH.tolist()), "powers of two"


GRIDS = [
    ((7, 5, 3, 3), False),
    ((7, 5, 3, 3), True),
    ((4, 9, 1, 1), False),
    ((3, 4, 5), False),
    ((6, 35), False),
    ((6, 35), True),
    ((2, 3, 9, 9), False),
    ((2, 64, 1, 2, 3), True),
]


@pytest.mark.parametrize(("shape", "transposed"), GRIDS, ids=str)
def test_a_grid_is_a_view_of_all_elements(shape, transposed):
    array = np.arange(np.prod(shape)).reshape(shape)
    grid, view = grid_of(shape, transposed), as_grid(array, transposed)
    assert view.shape == (grid.rows, grid.positions, grid.channels)
    assert np.shares_memory(view, array) and sorted(view.ravel()) == list(range(array.size))
    covered = [row for start, end in grid.blocks() for row in range(start, end)]
    assert covered == list(range(grid.rows))
    if len(shape) == 4 and shape[2] == 3:
        first, second = (1, 2) if transposed else (2, 1)
        assert view[first, 4, second] == array[2, 1, 1, 1] if not transposed else array[2, 1, 1, 1]


def test_neighbours_are_the_nearest_that_are_known():
    grid = Grid(1, 1, 9, 3)
    assert [grid.neighbours(p) for p in (0, 1, 4)] == [[], [0], [3, 1, 2, 0]]
    assert all(len(Grid(1, 1, 49, 7).neighbours(p)) <= 8 for p in range(49))
    assert Grid(1, 1, 8, 0).neighbours(5) == []


def laplace(seed, shape, spread):
    return np.round(np.random.default_rng(seed).laplace(0, spread, shape)).astype(np.int64)


def coded(codes, model, grid):
    writer, meter = Writer(), Meter()
    for coder in (writer, meter):
        code_grid(coder, grid, model, as_grid(codes, False), None)
    streams = writer.finish()
    found = np.zeros_like(codes)
    view = as_grid(found, False)

    def put(start, end, position, values):
        view[start:end, position] = values

    reader = Reader(streams)
    code_grid(reader, grid, model, None, put)
    reader.finish()
    np.testing.assert_array_equal(found, codes)
    return 8 * sum(map(len, streams)), meter.parts / PART


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 2, 3]), st.integers(1, 3)),
    st.sampled_from([0.4, 3.0, 60.0]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 99),
)
def test_contexts_come_back_and_cost_what_their_tables_say(shape, spread, flags, seed):
    codes = np.clip(laplace(seed, shape, spread), -255, 255)
    codes[:, : shape[1] // 2] = 0
    grid = grid_of(shape, False)
    rng = np.random.default_rng(seed)
    weights = rng.integers(-128, 128, (grid.positions, 8)).astype(np.int8)
    means = rng.integers(-128, 128, 2).astype(np.int8)
    model = Model(max(1, int(np.abs(codes).max())), *flags, weights, means)
    bits, ideal = coded(codes, model, grid)
    # an ANS coder may end early by what its first state is worth, and it ends on whole bytes
    assert ideal - 32 <= bits <= 1.002 * ideal + 72


def test_predictions_stay_whole_numbers_that_float32_holds():
    """The largest sums that a stream can ask for stay below 2^24, so that no order of adding and no
    fused operation can round them."""
    weights, codes = 128, 255
    assert 8 * weights * 16 * codes + 2 * weights * 16 * codes < 2**24


def test_what_is_known_of_rows_columns_and_neighbours_is_used():
    rng = np.random.default_rng(1)
    rows, columns = rng.random((64, 1, 1, 1)) ** 3, rng.random((1, 48, 1, 1)) ** 3
    pruned = laplace(0, (64, 48, 3, 3), 2) * (rng.random((64, 48, 3, 3)) < 3 * rows * columns)
    smooth = laplace(1, (64, 48, 1, 1), 3) + laplace(2, (64, 48, 3, 3), 0.5)
    for codes, least in ((pruned, 0.12), (smooth, 0.3)):
        counts = np.unique(codes, return_counts=True)[1]
        plain = float(-(counts * np.log2(counts / counts.sum())).sum())
        chosen = choose(codes.astype(np.int16))
        assert 8 * chosen.cost < (1 - least) * plain


def test_a_choice_is_the_same_twice():
    codes = laplace(5, (40, 30, 3, 3), 1).astype(np.int16)
    one, other = choose(codes), choose(codes.copy())
    assert (one.transposed, one.grid, one.cost) == (other.transposed, other.grid, other.cost)
    assert one.model.weights.tobytes() == other.model.weights.tobytes()
