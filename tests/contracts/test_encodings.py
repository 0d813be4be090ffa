"""What every encoding of the artifact must keep, whichever is added later."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.artifact import ENCODINGS
from tersor.artifact.encoding import DTYPES, Steps, smallest
from tersor.artifact.encodings.bitmap import CHUNK
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


def decode(name, data, shape, dtype):
    return ENCODINGS[name].decode(memoryview(bytes(data)), shape, dtype, Steps(10_000))


def round_trip(name, array, quick=False):
    """The array after encode and decode; None where the encoding declines it."""
    encoding = ENCODINGS[name]
    before = array.tobytes()
    data = encoding.encode(array, quick)
    assert array.tobytes() == before
    if data is None:
        return None
    assert bytes(data) == bytes(encoding.encode(array, quick)), "the same twice"
    assert encoding.fits(len(data), array.shape, array.dtype)
    return decode(name, data, array.shape, array.dtype)


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_keeps_every_bit(name, dtype, shape, density):
    array = sparse(DTYPES[dtype], shape, density)
    found = round_trip(name, array)
    assert found is None or bits_of(found) == bits_of(array)


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_every_encoding_takes_what_it_is_for(name, dtype):
    kind = DTYPES[dtype]
    if dtype == "bool":
        array = sparse(kind, (8, 40), 0.1)
    else:  # few values, many zeros, far apart
        values = np.random.default_rng(0).integers(-2, 3, (8, 40)) * 21
        array = (np.abs(values) if dtype == "uint8" else values).astype(kind)
        array += kind.type(0)
    for quick in (False, True):
        found = round_trip(name, array, quick)
        assert found is not None and bits_of(found) == bits_of(array)


@pytest.mark.parametrize("name", ["dense", "bitmap", "packed", "codes", "codebook"])
def test_round_trip_across_chunks(name):
    for extra in (-1, 0, 13):
        array = sparse(np.dtype("u1"), (CHUNK + extra,), 0.3, seed=extra + 1)
        array &= 7
        array *= 36
        found = round_trip(name, array, quick=True)
        assert bits_of(found) == bits_of(array)


@pytest.mark.parametrize("name", [n for n, dtype in PAIRS if dtype == "float32"])
def test_sign_of_zero_and_nan_payload_survive(name):
    few = np.array([0x80000000, 0x7FC00001, 0xFF800001, 0, 1, 0], np.uint32)
    words = np.tile(few, 4)
    found = round_trip(name, words.view(np.float32))
    assert found.view(np.uint32).tolist() == words.tolist()


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    pair=st.sampled_from(PAIRS),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9),
)
def test_round_trip_property(data, pair, shape):
    name, dtype = pair
    array = np.array(data.draw(hnp.arrays(DTYPES[dtype], shape)))
    found = round_trip(name, array)
    assert found is None or bits_of(found) == bits_of(array)


@settings(max_examples=400, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    junk=st.binary(max_size=60),
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6),
)
def test_junk_is_refused_or_is_a_tensor_that_comes_back(pair, junk, shape):
    name, dtype = pair
    encoding, kind = ENCODINGS[name], DTYPES[dtype]
    if not encoding.fits(len(junk), shape, kind):
        return
    try:
        array = decode(name, junk, shape, kind)
    except ArtifactError:
        return
    assert array.shape == shape and array.dtype == kind
    found = round_trip(name, np.ascontiguousarray(array))
    assert found is None or bits_of(found) == bits_of(array)


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_what_is_cut_off_or_goes_on_is_refused_or_another_tensor(name, dtype):
    """A cut may leave a section of its own: no bit at all is a stream of the commonest symbol."""
    values = np.random.default_rng(1).integers(-2, 3, (6, 20)) * 21
    kind = DTYPES[dtype]
    array = (values > 0 if dtype == "bool" else np.abs(values)).astype(kind)
    data = bytes(ENCODINGS[name].encode(array, False))
    for broken in (*(data[:size] for size in range(len(data))), data + b"\0", data + b"\x7f"):
        if ENCODINGS[name].fits(len(broken), array.shape, kind):
            try:
                found = decode(name, broken, array.shape, kind)
            except ArtifactError:
                continue
            assert found.tobytes() != array.tobytes()


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_a_size_that_does_not_fit_is_told_beforehand(name, dtype):
    encoding, kind = ENCODINGS[name], DTYPES[dtype]
    assert not encoding.fits(0, (50,), kind)
    assert not encoding.fits(1, (50,), kind)


def test_the_smallest_encoding_is_chosen():
    for density in (0.0, 0.5, 0.9, 1.0):
        array = sparse(np.dtype("<f4"), (400,), density)
        made = {
            name: ENCODINGS[name].encode(array, False)
            for name in ENCODINGS
            if ENCODINGS[name].accepts(array.dtype)
        }
        sizes = {name: len(data) for name, data in made.items() if data is not None}
        name, data = smallest(array)
        assert sizes[name] == min(sizes.values()) == len(data)
    assert smallest(np.random.default_rng(0).random(8))[0] == "dense"
    assert smallest(np.zeros(8, np.int64))[0] == "integers"
    assert smallest(np.zeros(80, np.int8))[0] == "codes"
    assert smallest(np.zeros((0, 3), np.int8))[0] == "dense"


# The codes of quantized weights: all widths, every small shape, and many.


def both_ways(array):
    """`codes` in both of its forms."""
    return [round_trip("codes", array, quick) for quick in (False, True)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_codes_of_all_widths_come_back(bits, dtype):
    kind = DTYPES[dtype]
    rng = np.random.default_rng(bits)
    for lowest in (np.iinfo(kind).min, 0, np.iinfo(kind).max + 1 - 2**bits):
        if not np.iinfo(kind).min <= lowest <= np.iinfo(kind).max + 1 - 2**bits:
            continue
        codes = lowest + rng.binomial(2**bits - 1, 0.5, (16, 8, 3, 3))
        codes.flat[:2] = lowest, lowest + 2**bits - 1
        array = codes.astype(kind)
        assert ENCODINGS["codes"].encode(array, False)[2] == 2**bits - 1, "the span"
        assert all(bits_of(found) == bits_of(array) for found in both_ways(array))
        packed = ENCODINGS["packed"].encode(array, False)
        assert len(packed) == 2 + -(-array.size * bits // 8)
        assert bits_of(round_trip("packed", array)) == bits_of(array)


def test_every_tensor_of_two_values_up_to_eight_elements_comes_back():
    for size in range(1, 9):
        for values in itertools.product((-1, 2), repeat=size):
            array = np.array(values, np.int8)
            found = round_trip("codes", array, quick=True)
            assert found.tobytes() == array.tobytes()


def test_every_tensor_of_four_values_and_four_elements_comes_back():
    for values in itertools.product((-128, 0, 1, 127), repeat=4):
        array = np.array(values, np.int8).reshape(2, 2)
        assert round_trip("codes", array, quick=True).tobytes() == array.tobytes()
        wide = array.astype(np.int32) * 40_000_001 // 3
        assert round_trip("integers", wide).tobytes() == wide.tobytes()


def test_a_million_random_codes_come_back():
    rng = np.random.default_rng(7)
    codes = np.clip(np.round(rng.laplace(0, 3, (128, 96, 3, 3))), -127, 127)
    codes *= rng.random((128, 1, 1, 1)) < rng.random((1, 96, 1, 1)) + 0.2
    array = codes.astype(np.int8)
    for shaped in (array, array.reshape(128, -1), array[:, :1], array.reshape(2, -1)):
        held = np.ascontiguousarray(shaped)
        assert all(bits_of(found) == bits_of(held) for found in both_ways(held))
    million = rng.integers(-(2**31), 2**31, 100_000).astype(np.int32) >> rng.integers(
        0, 31, 100_000
    )
    million = million.astype(np.int32)
    assert bits_of(round_trip("integers", million)) == bits_of(million)


@pytest.mark.parametrize(
    ("data", "count", "dtype", "message"),
    [
        ([2, 0, 0b0100], 2, "int8", "shortest form"),  # 0 and 1 need one bit
        ([2, 0, 0b1101], 2, "uint8", "shortest form"),  # the lowest, 0, is not there
        ([1, 0, 0b0110], 2, "uint8", "shortest form"),  # a bit behind the last element
        ([0, 0, 1], 2, "int8", "elements of 0 bits"),
        ([9, 0, 1], 2, "int8", "elements of 9 bits"),
        ([17, 0, 1], 2, "int8", "elements of 17 bits"),
    ],
)
def test_a_packed_tensor_in_another_form_is_refused(data, count, dtype, message):
    with pytest.raises(ArtifactError, match=message):
        decode("packed", data, (count,), DTYPES[dtype])


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
        decode("bitmap", data, (count,), DTYPES[dtype])


def codebook(levels, places):
    """The section of a codebook whose places are stored as given."""
    head = bytes([len(levels) - 1]) + np.array(levels, np.float32).tobytes()
    return head + ENCODINGS["codes"].encode(np.array(places, np.uint8), True)


@pytest.mark.parametrize(
    ("name", "data", "dtype", "message"),
    [
        ("codebook", codebook([-1, 0, 1], [0, 1, 3, 2]), "float32", "is 3, it has 3 levels"),
        ("codebook", codebook([1, 0, 2], [0, 1, 2, 2]), "float32", "not in order of value"),
        ("codebook", codebook([1, 1], [0, 1, 0, 1]), "float32", "not in order of value"),
        ("codes", b"\3\0\1\0", "int8", "the form is 3"),
        ("codes", b"\0\5\0", "int8", "1 bytes do not belong"),
        ("codes", b"\0\2", "bool", "codes from 2 to 2"),
        ("codes", b"\1\x7f\1\0\0", "int8", "codes from 127 to 128"),
        ("codes", b"\1\0\0\0\0", "int8", "codes from 0 to 0"),
        ("codes", b"\1\0\1\1\0", "int8", "number of classes is 1; at most 0"),
        ("codes", b"\1\0\1\0\0\5\0", "int8", "ends in a zero byte"),
        ("codes", b"\1\0\1\0\0" + b"\x55" * 40, "int8", "too short or too long"),
        ("codes", b"\1\0\1\0\1\1\1\1", "int8", "too short|not needed"),
        ("codes", b"\1\0\1\0\x81\0", "int8", "at most"),
        ("codes", b"\2\0\1\2\0\0", "int8", "counts as 0 is 2; at most 1"),
        ("codes", b"\2\0\1\0\x40\0", "int8", "the flags is 64"),
        ("codes", b"\2\0\1\0\0\0", "int8", "not coded in context"),
        ("planes", b"\1\0\1\0\1\0\1\0", "float32", "bytes are needed"),
        ("integers", b"\x3f\1\0", "int32", "the shift is 63"),
        ("integers", b"\1\x3f\0", "int32", "bits of the largest is 63"),
        ("integers", b"\x1f\2\0\xff\xff\xff\1", "int32", "33 bits is not of type int32|too short"),
        ("integers", b"\1\1\0", "int32", "too short|no number is 1 bits"),
        ("sparse", b"\2\0\1\3\0", "float32", "stored is 3; at most 2"),
        ("sparse", b"\2\0\1\2" + bytes(16), "float32", "as integers"),
        ("sparse", b"\2\0\1\0" + bytes(15), "float32", "cannot hold 4 elements"),
        ("sparse", b"\2\0\1\0" + bytes(16), "float32", "zero is stored among"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(name, data, dtype, message):
    with pytest.raises(ArtifactError, match=message):
        decode(name, data, (4,), DTYPES[dtype])


def test_more_steps_than_a_file_may_ask_for_are_refused():
    array = np.random.default_rng(0).binomial(4, 0.5, (64, 16, 3, 3)).astype(np.int8)
    array[:, :, 1] *= 3
    data = ENCODINGS["codes"].encode(array, False)
    assert data[0] == 2, "in context"
    with pytest.raises(ArtifactError, match="more steps"):
        ENCODINGS["codes"].decode(memoryview(data), array.shape, array.dtype, Steps(8))
