"""What every encoding of the artifact must keep, whichever is added later."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.artifact.encodings import CHUNK, DTYPES, ENCODINGS, smallest_encoding
from tersor.errors import ArtifactError

PAIRS = [
    (name, dtype)
    for name in ENCODINGS
    for dtype in DTYPES
    if ENCODINGS[name].accepts(DTYPES[dtype])
]
SHAPES = [(), (0,), (0, 3), (1,), (7,), (8,), (9,), (3, 5, 2), (1, 1, 1, 1, 1, 1, 1, 2)]


def bits_of(array):
    return (array.dtype, array.shape, array.tobytes())


def sparse(dtype, shape, density, seed=0):
    """Any bit patterns (NaN payloads, -0.0, subnormals), most of them replaced by zero bits."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    data = rng.integers(0, 256, (count, dtype.itemsize), dtype=np.uint8)
    if dtype == np.bool_:
        data &= 1
    data[rng.random(count) >= density] = 0
    return data.reshape(-1).view(dtype).reshape(shape)


def round_trip(name, array):
    encoding = ENCODINGS[name]
    data = encoding.encode(array)
    assert data.dtype == np.uint8 and data.shape == (encoding.size(array),)
    assert encoding.fits(data.size, array.size, array.dtype)
    return encoding.decode(data.copy(), array.size, array.dtype).reshape(array.shape)


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_keeps_every_bit(name, dtype, shape, density):
    array = sparse(DTYPES[dtype], shape, density)
    assert bits_of(round_trip(name, array)) == bits_of(array)


@pytest.mark.parametrize("name", list(ENCODINGS))
def test_round_trip_across_chunks(name):
    for extra in (-1, 0, 1, 8, 13):
        array = sparse(np.dtype("u1"), (CHUNK + extra,), 0.3, seed=extra + 1)
        assert bits_of(round_trip(name, array)) == bits_of(array)


@pytest.mark.parametrize("name", [n for n, dtype in PAIRS if dtype == "float32"])
def test_sign_of_zero_and_nan_payload_survive(name):
    words = np.array([0x80000000, 0x7FC00001, 0xFF800001, 0, 1], np.uint32)
    assert round_trip(name, words.view(np.float32)).view(np.uint32).tolist() == words.tolist()


@given(
    data=st.data(),
    pair=st.sampled_from(PAIRS),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
)
def test_round_trip_property(data, pair, shape):
    name, dtype = pair
    array = np.array(data.draw(hnp.arrays(DTYPES[dtype], shape)))
    assert bits_of(round_trip(name, array)) == bits_of(array)


@given(
    pair=st.sampled_from(PAIRS),
    junk=st.binary(max_size=60),
    count=st.integers(0, 64),
)
def test_junk_is_refused_or_is_the_one_form_of_its_content(pair, junk, count):
    name, dtype = pair
    encoding, data = ENCODINGS[name], np.frombuffer(junk, np.uint8).copy()
    if not encoding.fits(data.size, count, DTYPES[dtype]):
        return
    try:
        array = encoding.decode(data, count, DTYPES[dtype])
    except ArtifactError:
        return
    assert array.shape == (count,) and encoding.encode(array).tobytes() == junk


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_a_size_that_does_not_fit_is_told_beforehand(name, dtype):
    encoding, kind = ENCODINGS[name], DTYPES[dtype]
    array = np.ones(50, kind)
    assert not encoding.fits(encoding.size(array) + kind.itemsize, 50, kind)
    assert not encoding.fits(0, 50, kind)
    # What bounds the memory that a small file can ask for: see docs/format.md.
    assert not encoding.fits(1 << 20, 33 * (1 << 20) // kind.itemsize, kind)


def test_the_smallest_encoding_is_chosen():
    for density in (0.0, 0.5, 0.9, 1.0):
        array = sparse(np.dtype("<f4"), (400,), density)
        able = [n for n in ENCODINGS if ENCODINGS[n].accepts(array.dtype)]
        sizes = {n: ENCODINGS[n].size(array) for n in able}
        assert sizes[smallest_encoding(array)] == min(sizes.values())
    assert smallest_encoding(np.ones(8, np.float32)) == "dense"
    assert smallest_encoding(np.zeros(8, np.int64)) == "dense"  # bitmap takes no 8-byte types
    assert smallest_encoding(np.zeros(80, np.float32)) == "bitmap"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_codes_of_few_bits_take_their_bits(bits, dtype):
    kind = DTYPES[dtype]
    rng = np.random.default_rng(bits)
    for lowest in (np.iinfo(kind).min, 0, np.iinfo(kind).max + 1 - 2**bits):
        if not np.iinfo(kind).min <= lowest <= np.iinfo(kind).max + 1 - 2**bits:
            continue
        codes = lowest + rng.integers(0, 2**bits, 1001)
        codes[:2] = lowest, lowest + 2**bits - 1
        array = codes.astype(kind)
        assert ENCODINGS["packed"].size(array) == 2 + -(-1001 * bits // 8)
        assert bits_of(round_trip("packed", array)) == bits_of(array)


@pytest.mark.parametrize(
    ("data", "count", "dtype", "message"),
    [
        ([2, 0, 0b0100], 2, "int8", "shortest form"),  # 0 and 1 need one bit
        ([2, 0, 0b1101], 2, "uint8", "shortest form"),  # the lowest, 0, is not there
        ([1, 0, 0b0110], 2, "uint8", "shortest form"),  # a bit behind the last element
        ([0, 0, 1], 2, "int8", "elements of 0 bits"),
        ([9, 0, 1], 2, "int8", "elements of 9 bits"),
    ],
)
def test_a_packed_tensor_in_another_form_is_refused(data, count, dtype, message):
    with pytest.raises(ArtifactError, match=message):
        ENCODINGS["packed"].decode(np.array(data, np.uint8), count, DTYPES[dtype])


@pytest.mark.parametrize(
    ("data", "count", "dtype", "message"),
    [
        ([0b11, 1], 2, "int8", "marks 2 elements, but 1 are stored"),
        ([0b01, 1, 1], 2, "int8", "marks 1 elements, but 2 are stored"),
        ([0b100, 1], 2, "int8", "behind the last one"),
        ([0b01, 0], 2, "int8", "zero is stored among the nonzero"),
        ([0b01, 2], 2, "bool", "is 2, not 0 or 1"),
    ],
)
def test_a_bitmap_that_contradicts_itself_is_refused(data, count, dtype, message):
    with pytest.raises(ArtifactError, match=message):
        ENCODINGS["bitmap"].decode(np.array(data, np.uint8), count, DTYPES[dtype])
