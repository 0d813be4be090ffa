"""Files that were written to do harm or broke on the way: refused, named, before memory is taken.

`assemble` writes a file from its parts with all digests and lengths right, so that each attack
reaches the check it is meant for.
"""

import copy
import dataclasses as dc
import hashlib
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tersor.artifact import ENCODINGS, load, pack, save
from tersor.artifact.checks import canonical_json
from tersor.artifact.columns import collapse
from tersor.artifact.cursor import varint
from tersor.artifact.encoding import DTYPES, Steps
from tersor.artifact.header import groups, squeeze, unsqueeze
from tersor.errors import ArtifactError

WAYS = {
    "a.weight": "sparse",
    "b.flags": "bitmap",
    "c.scale": "planes",
    "d.codes": "packed",
    "e.codes": "codes",  # in context
    "f.runs": "codes",
    "g.levels": "codebook",
    "h.bias": "integers",
    "i.scale": "derived",
    "j.one": "dense",
}


def seed_graph():
    rng = np.random.default_rng(0)
    sparse = rng.standard_normal((6, 4)).astype(np.float32)
    sparse[rng.random(sparse.shape) < 0.8] = 0
    codes = rng.integers(-9, 10, (2, 16, 1, 1)) * np.ones((3, 3)) + (
        rng.random((2, 16, 3, 3)) < 0.1
    )
    scale = np.float32([0.25, 0.75, 0.5, 1.5, 0.75])
    tensors = {
        "a.weight": sparse,
        "b.flags": np.array([True, False, True]),
        "c.scale": scale,
        "d.codes": np.arange(24, dtype=np.int8) % 7 - 3,
        "e.codes": codes.astype(np.int8),
        "f.runs": rng.integers(0, 3, (4, 9)).astype(np.uint8),
        "g.levels": rng.choice(np.float32([-1, 0, 2]), (4, 8)),
        "h.bias": np.array([100_000, -3, 0, 77], np.int32),
        "i.scale": np.float32(0.3) * scale,
        "j.one": np.float32(0.3),
    }
    nodes = [helper.make_node("Identity", ["input"], ["output"])]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("input", "output")]
    held = [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def assemble(header, skeleton, sections, *, repair=True, total=None, version=2, columns=None):
    """A file with right lengths and digests; `header` dict or bytes, `skeleton` a ModelProto or, as
    `columns`, what is to be decompressed."""
    header = copy.deepcopy(header)
    columns = collapse(skeleton) if columns is None else columns
    packed = squeeze(columns)
    if repair and isinstance(header, dict):
        try:
            kept = header["skeleton"]
            kept.update(columns_bytes=len(columns), size_bytes=len(packed))
            kept["decoded_bytes"] = len(skeleton)
            header["sizes"] = [len(section) for section in sections]
            whole = [packed, *sections]
            header["digests"] = [
                hashlib.sha256(b"".join(whole[part.start : part.stop])).hexdigest()[:16]
                for part in groups([len(packed), *header["sizes"]])
            ]
        except (LookupError, TypeError, AttributeError, ValueError):
            pass  # the attack is on these very fields
    text = header if isinstance(header, bytes) else canonical_json(header)
    text = varint(len(text)) + squeeze(text)
    return finish(text, [packed, *sections], total, version)


def finish(head, sections, total=None, version=2):
    """Prologue, seal, packed header and sections."""
    size = 56 + len(head) + sum(map(len, sections))
    start = struct.pack("<8sIIQ", b"\x89TERSOR\n", version, len(head), total or size)
    return b"".join([start, hashlib.sha256(start + head).digest(), head, *sections])


def disassemble(data):
    """header (dict), the skeleton (a ModelProto's bytes), the tensor sections."""
    length = struct.unpack_from("<I", data, 12)[0]
    head = memoryview(data)[56 : 56 + length]
    size = head[0] if head[0] < 128 else (head[0] & 127) | head[1] << 7
    header = json.loads(unsqueeze(head[1 if head[0] < 128 else 2 :], size, "the header"))
    position, parts = 56 + length, []
    for size in (header["skeleton"]["size_bytes"], *header["sizes"]):
        parts.append(data[position : position + size])
        position += size
    assert position == len(data)
    return header, seed_skeleton(), parts[1:]


def seed_skeleton():
    return pack(seed_graph(), quick=True).skeleton


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """The bytes of a valid file under 3 KB that holds every encoding, and a tensor of the state."""
    path = tmp_path_factory.mktemp("seed") / "seed.tersor"
    artifact = pack(
        seed_graph(), plan={"kind": "plan"}, provenance={"n": 1}, state={"mean": np.ones(3)}
    )
    assert artifact.encodings["i.scale"] == "derived"
    chosen = {**WAYS, "state/mean": artifact.encodings["state/mean"]}
    save(dc.replace(artifact, encodings=chosen), path)
    found = load(path)
    assert found.encodings == chosen and set(WAYS.values()) == {*ENCODINGS, "derived"}
    sections = dict(zip([*WAYS, "mean"], disassemble(path.read_bytes())[2], strict=True))
    assert [sections[name][0] for name in ("e.codes", "f.runs")] == [2, 1]
    assert path.stat().st_size < 3072
    return path.read_bytes()


def refill(path, data):
    """Give the file at `path` new content. Cutting it to nothing first would make ext4 flush it."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


@pytest.fixture
def refused(tmp_path):
    """A function: load these bytes, expect ArtifactError naming the file, give back the message."""
    path = tmp_path / "hostile.tersor"
    path.touch()

    def check(data):
        refill(path, data)
        with pytest.raises(ArtifactError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and len(message) < 600 and message.isprintable()
        return message

    return check


def test_the_tool_of_these_tests_is_right(seed):
    assert assemble(*disassemble(seed)) == seed


def test_every_prefix_is_refused(seed, refused):
    for length in range(len(seed)):
        refused(seed[:length])


def test_every_single_bit_flip_is_refused(seed, tmp_path):
    path = tmp_path / "flipped.tersor"
    path.write_bytes(seed)
    load(path)
    with path.open("r+b", buffering=0) as file:
        for position in range(len(seed)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([seed[position] ^ 1 << bit]), position)
                with pytest.raises(ArtifactError):
                    load(path)
            os.pwrite(file.fileno(), seed[position : position + 1], position)
    load(path)


def sections_of(seed):
    """name, encoding, shape, type and bytes of the seed's tensors that are stored."""
    graph = seed_graph().graph
    for tensor, section in zip(graph.initializer, disassemble(seed)[2][:-1], strict=True):
        array = numpy_helper.to_array(tensor)
        if WAYS[tensor.name] != "derived":
            yield tensor.name, WAYS[tensor.name], array, section


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bit_flip_behind_a_repaired_digest_gives_an_error_or_a_tensor(seed, every):
    """What a digest would have caught reaches the decoders here: they may only refuse, or give some
    tensor of the right shape and type."""
    refusals = 0
    for _, way, array, section in sections_of(seed):
        for position in range(0, 8 * len(section), every):
            data = bytearray(section)
            data[position // 8] ^= 1 << position % 8
            try:
                found = ENCODINGS[way].decode(
                    memoryview(bytes(data)), array.shape, array.dtype, Steps(10_000)
                )
            except ArtifactError:
                refusals += 1
            else:
                assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert refusals > 100 // every


def test_trailing_bytes_are_refused(seed, refused):
    assert "bytes that do not belong" in refused(seed + b"\0")
    assert "bytes that do not belong" in refused(seed + seed)
    header, skeleton, sections = disassemble(seed)
    assert "the sections take" in refused(
        assemble(header, skeleton, [*sections, b"x"], repair=False)
    )


def test_damage_is_told_by_its_section(seed, refused):
    assert "sections 0 to 11 (0 is the graph) is damaged" in refused(seed[:-1] + b"\xff")
    large = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    header, skeleton, sections = disassemble(seed)
    header["state"]["mean"] = ["float32", [3000]]
    header["encodings"][-1] = "dense"
    sections[-1] = large.tobytes()
    whole = assemble(header, skeleton, sections)
    assert "sections 0 to 11" in refused(
        whole[:-1] + b"\xff"
    )  # the first group ends with 4096 bytes
    assert "tensor 'c.scale': " in refused(
        assemble(header, skeleton, [*sections[:2], sections[2] + b"\0", *sections[3:]])
    )


def test_a_newer_format_is_told_by_its_number(seed, refused):
    for version in (3, 7, 2**32 - 1):
        message = refused(assemble(*disassemble(seed), version=version))
        assert f"written by a newer Tersor: format {version}, this one reads up to 2; " in message
        assert "pip install -U tersor" in message
    assert "newer Tersor: format 7" in refused(struct.pack("<8sI", b"\x89TERSOR\n", 7))
    assert "format 0" in refused(assemble(*disassemble(seed), version=0))


@pytest.mark.parametrize(
    "data", [b"", b"\x89", b"PK\x03\x04" + bytes(99), b"\x80\x04K\x01.", bytes(200)]
)
def test_other_kinds_of_files_are_told(refused, data):
    assert re.search("not a .tersor file|cut off", refused(data))


def test_a_header_longer_than_the_file_or_the_limit_takes_no_memory(seed, refused):
    for length, message in [(2**32 - 1, "at most 16777216"), (1 << 24, "does not fit")]:
        start = struct.pack("<8sIIQ", b"\x89TERSOR\n", 2, length, len(seed))
        assert message in refused(start + seed[24:])


def change(*path, to):
    """An attack: set one field of the header."""

    def apply(header):
        target = header
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return apply


def state(to, name="mean"):
    def apply(header):
        header["state"] = {name: to}

    return apply


SMALL = ["float64", [3]]
HEADERS = [
    (lambda h: h.pop("plan"), "header lacks the key 'plan'"),
    (change("run", to="os.system"), "unknown key 'run'"),
    (change("plan", to=[]), "plan is not a JSON object"),
    (change("plan", to={"a": "\ud800"}), "not Unicode"),
    (change("plan", to={"a": 2**63}), "64 bits"),
    (change("skeleton", to=None), "skeleton is not a JSON object"),
    (change("skeleton", "decoded_bytes", to=2**40), "from 0 to 4194304"),
    (change("skeleton", "decoded_bytes", to=1), "bytes declared|1 are declared"),
    (change("skeleton", "columns_bytes", to=1), "does not decompress to the 1 bytes"),
    (change("skeleton", "columns_bytes", to=1 << 20), "does not decompress"),
    (change("skeleton", "size_bytes", to=1.0), "skeleton.size_bytes must be an integer"),
    (change("digests", to=[]), "digests must be a list of 1"),
    (change("digests", to=["0" * 16] * 2), "digests must be a list of 1"),
    (change("digests", to=[7]), "is damaged"),
    (change("digests", to=["A" * 16]), "is damaged"),
    (change("encodings", to={}), "encodings must be a list"),
    (change("encodings", to=[]), "0 encodings and 11 sizes"),
    (change("encodings", 0, to="rans"), "uses the encoding 'rans'.*pip install -U"),
    (change("encodings", 0, to="pickle"), "encoding 'pickle'"),
    (change("encodings", 0, to=None), "encoding 'None'"),
    (change("encodings", 0, to=["dense"]), "encoding"),
    (change("encodings", 0, to="dense"), r"'a.weight': \d+ bytes cannot hold 24 elements"),
    (change("encodings", 4, to="planes"), "cannot hold 288 elements of type int8 as planes"),
    (change("encodings", 10, to="derived"), "'state/mean'"),
    (change("sizes", to=[-1] * 11), "the size of a section must be"),
    (change("sizes", 0, to=True), "the size of a section must be"),
    (change("sizes", 0, to=2**63), "the size of a section must be|64 bits"),
    (change("sizes", 0, to=2), "the sections take"),
    (state([]), "must have a type and a shape"),
    (state(["object", [3]]), "has the type 'object'"),
    (state(["complex64", [3]]), "has the type 'complex64'"),
    (state([["float32"], [3]]), "has the type"),
    (state(["float64", 3]), "must be a list"),
    (state(["float64", [1] * 9]), "at most 8 dimensions"),
    (state(["float64", [-3]]), "a dimension must be"),
    (state(["float64", [True, 3]]), "a dimension must be"),
    (state(["float64", [3.0]]), "a dimension must be"),
    (state(["float64", [2**62, 2**62]]), "a dimension must be"),
    (state(["float64", [2**30] * 8]), "takes more than"),
    (state(["float64", [0, 2**31 - 1, 2**31 - 1]]), "takes more than"),
    (state(["float64", [2**27]]), "cannot hold|of memory"),
    (state(["int64", [4]]), "'state/mean'"),
    (state(SMALL, "../mean"), "'..' as a step"),
    (state(SMALL, "..\\mean"), "'..' as a step"),
    (state(SMALL, "a\0b"), "cannot be printed"),
    (state(SMALL, "a\nb"), "cannot be printed"),
    (state(SMALL, "a\u202eb"), "cannot be printed"),
    (state(SMALL, "\ud800"), "cannot be printed"),
    (state(SMALL, ""), "has 0 characters"),
    (state(SMALL, "n" * 100_000), "has 100000 characters"),
    (change("state", to={}), "10 tensors are needed, 11 sections are there"),
    (change("state", to={"mean": SMALL, "more": SMALL}), "12 tensors are needed, 11 sections"),
    (change("state", to=[]), "state must be"),
]


@pytest.mark.parametrize(("attack", "message"), HEADERS, ids=[m for _, m in HEADERS])
def test_a_hostile_header_is_refused(seed, refused, attack, message):
    header, skeleton, sections = disassemble(seed)
    attack(header)
    assert re.search(message, refused(assemble(header, skeleton, sections, repair=False)))


def test_more_than_the_largest_number_of_tensors_is_refused(seed, refused):
    header, skeleton, sections = disassemble(seed)
    header["sizes"] = [0] * 100_001
    assert "at most 100000" in refused(assemble(header, skeleton, sections, repair=False))


def test_more_memory_than_such_a_file_may_take_is_refused_unless_asked_for(seed, tmp_path):
    header, skeleton, sections = disassemble(seed)
    header["state"] = {"mean": ["uint8", [100 << 20]]}
    header["encodings"][-1] = "codes"
    sections[-1] = b"\0\7"  # 100 MiB of sevens
    path = tmp_path / "wide.tersor"
    path.write_bytes(assemble(header, skeleton, sections))
    with pytest.raises(ArtifactError, match=r"of memory, at most 58720256 .*max_bytes=1048\d+"):
        load(path)
    found = load(path, max_bytes=200 << 20).state()["mean"]
    assert found.size == 100 << 20 and found.min() == found.max() == 7


TEXTS = {
    "not valid JSON": b"{",
    "not valid JSON ": b"\xff\xfe",
    "not valid JSON  ": b"",
    "not valid JSON   ": b'{"plan":"\\',
    "the header is not a JSON object": b"[]",
    "key 'plan' twice": b'{"plan":{},"plan":{}}',
    "holds NaN": b'{"plan":NaN}',
    "holds -Infinity": b'{"plan":-Infinity}',
    "not valid JSON    ": b'{"plan":1e999}',
    "canonical form": b'{"plan": {}}',
    "canonical form ": b'{"b":1,"a":1}',
    "canonical form  ": b'{"a":"\xc3\xa9"}',
    "canonical form   ": b'{"a":1.50}',
    "more than 20 digits": b'{"plan":' + b"9" * 5000 + b"}",
    "more than 20 digits ": b'{"plan":1.' + b"9" * 5000 + b"}",
    "more than 32 levels": b"[" * 100_000,
    "more than 32 levels ": b'{"a":' * 33 + b"1" + b"}" * 33,
    "not valid JSON     ": b'"' + b'\\"' * 100_000 + b"\\",
}


@pytest.mark.parametrize("message", list(TEXTS))
def test_a_header_that_is_not_canonical_json_is_refused(refused, message):
    assert message.strip() in refused(assemble(TEXTS[message], b"", []))


def test_a_header_that_is_not_one_lzma_stream_is_refused(seed, refused):
    header, _, sections = disassemble(seed)
    text = canonical_json(header)
    packed = squeeze(text)
    for head, message in [
        (varint(len(text)) + packed + b"\0", "decompress"),
        (varint(len(text)) + packed[:-1], "decompress"),
        (varint(len(text) - 1) + packed, "decompress"),
        (varint(len(text) + 1) + packed, "decompress"),
        (varint(len(text)) + squeeze(text[:9]) + squeeze(text[9:]), "decompress"),
        (varint(len(text)), "decompress"),
        (varint(3 << 20) + squeeze(bytes(3 << 20)), "at most 1048576"),
        (b"\xff" * 9, "more than 5 bytes"),
        (b"\x80\0" + packed, "shortest form"),
        (b"", "1 bytes are needed"),
    ]:
        assert message in refused(finish(head, sections))


def number(value):
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def field(tag, content):
    """A length-delimited protobuf field."""
    return number(tag << 3 | 2) + number(len(content)) + content


def in_graph(content):
    return b"\x08\x0a" + field(7, content) + field(8, b"\x10\x14")


def in_attribute(content):
    return in_graph(field(1, field(5, content)))


def nested(depth):
    content = b""
    for _ in range(depth):
        content = field(1, field(5, field(6, content)))
    return in_graph(content)


SKELETONS = {
    "lacks an ONNX graph": b"",
    "unknown field 500": number(500 << 3) + b"\1",
    "functions of its own": field(25, b""),
    "sparse initializers": in_graph(field(15, b"")),
    "data outside the file": in_graph(
        field(5, field(13, field(1, b"location") + field(2, b"/etc/passwd")))
    ),
    "data of tensor": in_graph(field(5, field(8, b"a.weight") + field(9, b"1234"))),
    "initializer 'a' twice": in_graph(field(5, field(8, b"a")) * 2),
    "the operator domain 'evil'": in_graph(field(1, field(7, b"evil"))),
    "reads other files": in_graph(field(1, field(7, b"com.microsoft") + field(4, b"EPContext"))),
    "not UTF-8": in_graph(field(2, b"\xff")),
    "runs over its end": in_graph(b"")[:-1],
    "in a wrong form": b"\x38\x01",
    "cut off or too long": b"\xff" * 20,
    "nested more than": nested(40),
    "of memory": in_graph(field(1, b"") * 200_000),
    "of memory ": in_graph(field(1, field(5, b"") * 200_000)),
    "of memory  ": in_attribute(b"\x40\x01" * 600_000),
    "of memory   ": in_attribute(field(8, b"\x01" * 3_500_000)),
    "tensor '0' is of a type": in_graph(field(5, field(8, b"0") + b"\x10\x10")),
    "name '../x'": in_graph(field(5, field(8, b"../x") + b"\x10\x01")),
    "1 tensors are needed": in_graph(field(5, field(8, b"0") + b"\x10\x01")),
    "takes more than": in_graph(
        field(5, b"\x08" + number(2**31 - 1) + b"\x10\x0b" + field(8, b"0"))
    ),
    "a dimension must be": in_graph(field(5, b"\x08" + b"\xff" * 9 + b"\1\x10\1" + field(8, b"0"))),
}


@pytest.mark.parametrize("message", list(SKELETONS))
@pytest.mark.parametrize("form", ["plain", "columns"])
def test_a_hostile_skeleton_is_refused(seed, refused, message, form):
    header, _, sections = disassemble(seed)
    raw = SKELETONS[message]
    header["state"] = {}
    columns = b"\0" + raw if form == "plain" else collapse(raw)
    found = refused(assemble(header, raw, sections, columns=columns))
    assert message.strip() in found.replace("the tensor name", "tensor name")


def lists(*columns):
    """Columns of numbers behind the tables of a graph that has nothing else."""
    return b"".join(varint(len(c)) + b"".join(map(varint, c)) for c in columns)


def texts(*items):
    return lists([len(item) for item in items]) + b"".join(items)


HEAD = b"\1" + texts(b"\x08\x0a", b"", b"", b"", field(8, b"\x10\x14"))
COLUMNS = {
    "the form of the skeleton is 2": b"\2",
    "a count in the skeleton": b"\1\x7f",
    "bytes are needed": HEAD + texts() + b"\1\5",
    "lacks a part": b"\1" + texts(b"") + texts() * 2 + lists([]) + texts() * 2 + lists(*[[]] * 8),
    "before the first": HEAD + texts(b"") + texts() + lists([0]) + texts(b"a") + texts()
    + lists([], [0], [1], [0], [5], [0], [], []),
    "do not fit together": HEAD + texts() * 2 + lists([]) + texts() * 2
    + lists([], [0], [1], [0], [0], [0], [], []),
    "do not fit together ": HEAD + texts() * 2 + lists([0, 0]) + texts(b"a") + texts()
    + lists([], [], [], [], [], [], [], []),
    "do not fit together  ": HEAD + texts(b"") + texts() + lists([]) + texts() * 2
    + lists([], [0], [9], [0], [], [0], [], []),
    "do not fit together   ": HEAD + texts() * 2 + lists([]) + texts() * 2
    + lists([], [], [], [], [], [], [0], []),
    "before the first ": HEAD + texts() * 2 + lists([]) + texts() * 2
    + lists([1, 0], [], [], [], [], [], [1], []),
    "beyond the bytes declared": HEAD + texts(b"x" * 1000) + texts() + lists([]) + texts() * 2
    + lists([], [0] * 5000, [0] * 5000, [0] * 5000, [], [0] * 5000, [], []),
    "beyond the bytes declared ": HEAD + texts() * 2 + lists([1 << 20] * 500)
    + texts(*[b"y" * 100] * 500) + texts() + lists(*[[]] * 8),
    "do not belong": HEAD + texts() * 2 + lists([]) + texts() * 2 + lists(*[[]] * 8) + b"\0",
}  # fmt: skip


@pytest.mark.parametrize("message", list(COLUMNS))
def test_columns_that_do_not_fit_together_are_refused(seed, refused, message):
    header, _, sections = disassemble(seed)
    raw = in_graph(b"")
    assert message.strip() in refused(assemble(header, raw, sections, columns=COLUMNS[message]))


DERIVED = {
    "how a tensor is derived is 2": b"\2\0",
    "1 bytes are needed": b"\1\2",
    "bytes do not belong": b"\0\2\2",
    "place of a tensor is 10": b"\0\x0a",
    "derived itself": b"\0\x08",
    "another shape or type": b"\0\0",
    "another shape or type ": b"\1\x03\2",
    "a float32 scalar": b"\1\2\2",
}


@pytest.mark.parametrize("message", list(DERIVED))
def test_a_tensor_that_cannot_be_derived_is_refused(seed, refused, message):
    header, skeleton, sections = disassemble(seed)
    sections[8] = DERIVED[message]
    found = refused(assemble(header, skeleton, sections))
    assert "tensor 'i.scale': " in found and message.strip() in found


def bombs(seed):
    """Files of at most 1 MiB that try to take much more memory."""
    header, skeleton, sections = disassemble(seed)
    mib = 1 << 20

    def with_plan(text):
        bare = {**header, "plan": {"a": 0}}
        sealed = assemble(bare, skeleton, sections)
        bare["digests"] = disassemble(sealed)[0]["digests"]
        return assemble(canonical_json(bare).replace(b'{"a":0}', text), skeleton, sections)

    def with_tensor(section, dtype, shape, way="codes"):
        bare = {**header, "state": {"mean": [dtype, shape]}}
        bare["encodings"] = [*header["encodings"][:-1], way]
        return assemble(bare, skeleton, [*sections[:-1], section])

    def with_skeleton(raw, columns=None):
        return assemble({**header, "state": {}}, raw, sections, columns=columns)

    constant = b"\0\0"
    empty = b"\1\0\1\0\0"  # runs of two values, no bit at all
    context = b"\2\0\1\0\0\0"
    return {
        "json": with_plan(b'{"a":[' + b"[]," * 200_000 + b"1]}"),
        "more json": with_plan(b'{"a":[' + b"[]," * 300_000 + b"[]]]}"),
        "objects": with_plan(b'{"a":[' + b"{}," * 300_000 + b"{}]]}"),
        "words": with_plan(b'{"a":[' + b'"ab",' * 200_000 + b'"ab"]]}'),
        "quotes": with_plan(b'"' + b'\\"' * 500_000),
        "header": finish(varint(mib + 1) + squeeze(bytes(80 * mib)), sections),
        "nodes": with_skeleton(in_graph(field(1, b"") * 110_000)),
        "nodes in columns": with_skeleton(
            in_graph(field(1, field(1, b"name") + field(4, b"Relu")) * 99_000)
        ),
        "attributes": with_skeleton(in_graph(field(1, field(5, b"") * 110_000))),
        "packed": with_skeleton(in_attribute(field(8, b"\x01" * 1_500_000))),
        "lzma": with_skeleton(b"\0" * (4 * mib), columns=b"\0" + bytes(80 * mib)),
        "constant": with_tensor(constant + b"\0", "int8", [50 * mib]),
        "wide constant": with_tensor(constant, "int8", [500 * mib]),
        "runs": with_tensor(empty + b"\1", "int8", [48 * mib]),
        "runs of rows": with_tensor(b"\1\0\1\1\0\1", "int8", [6 * mib, 8]),
        "context": with_tensor(context + b"\1", "int8", [512, 512, 3, 3]),
        "one row": with_tensor(context + b"\1", "int8", [1, 8 * mib]),
        "many positions": with_tensor(context + b"\1", "int8", [8, 4096, 8, 8]),
        "places": with_tensor(bytes([0]) + b"\0\0\x80?" + empty + b"\1", "float32", [10 * mib], "codebook"),
        "planes": with_tensor(b"\5" + empty, "float32", [9 * mib], "planes"),
        "sparse": with_tensor(b"\2\0\1\1" + b"\2\0\1" * 3, "float32", [5 * mib], "sparse"),
    }  # fmt: skip


CHILD = """
import os, resource, sys, time
from tersor.artifact import load
from tersor.errors import ArtifactError
load(sys.argv[1])
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for path in sys.argv[2:]:
    # Each in a process of its own: what one leaves behind must not hide what the next takes.
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), -1))
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        try:
            load(path)
            told = "loaded"  # odd, but valid: it took what it declares
        except ArtifactError as error:
            told = str(error)
        print(os.path.basename(path), time.process_time(), told[-200:], flush=True)
        os._exit("more memory than there is" in told)
    if status := os.waitstatus_to_exitcode(os.wait()[1]):
        sys.exit(f"{path}: status {status} (1: took more than 64 MiB)")
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_hostile_file_of_1_mib_takes_at_most_64_mib(seed, tmp_path):
    paths = [tmp_path / "seed.tersor"]
    paths[0].write_bytes(seed)
    for name, data in bombs(seed).items():
        assert len(data) <= 1 << 20, name
        paths.append(tmp_path / f"{name}.tersor")
        paths[-1].write_bytes(data)
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("loaded") < len(paths) // 2


AUDIT = """
import os, sys
from tersor.artifact import load
load(sys.argv[1])
seen = []
refused = "exec compile import subprocess pickle marshal ctypes socket code function shutil".split()
refused += "os.system os.exec os.fork os.posix_spawn os.spawn os.remove os.rename os.mkdir".split()
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def hook(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if flags & writing or (path != sys.argv[1] and not isinstance(path, int)):
            seen.append((event, arguments))
    elif event in refused or event.split(".")[0] in refused:
        seen.append((event, arguments))
sys.addaudithook(hook)
load(sys.argv[1])
ours = list(seen)
exec("1")  # the hook does see
print(len(ours), len(seen) > len(ours), ours[:3])
"""


def test_loading_executes_and_writes_nothing(seed, tmp_path):
    (tmp_path / "seed.tersor").write_bytes(seed)
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, tmp_path / "seed.tersor"], capture_output=True, text=True
    )
    assert done.stdout.split()[:2] == ["0", "True"], done.stdout + done.stderr


def test_a_valid_load_takes_its_decoded_size_and_little_more(tmp_path):
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((2, 1 << 20)).astype(np.float32)
    floats[0] *= rng.random(1 << 20) < 0.7
    floats += 0.0  # -0.0 becomes 0.0
    few = rng.choice(np.float32([-1, -0.5, 0, 3]), (1024, 1024))
    codes = np.round(rng.laplace(0, 4, (1024, 1024))).astype(np.int8)
    arrays = {"a": floats[0], "b": floats[1], "c": few, "d": codes}
    graph = seed_graph()
    graph.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    save(pack(graph, quick=True), tmp_path / "large.tersor")
    tracemalloc.start()
    try:
        artifact = load(tmp_path / "large.tersor")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    ways = [artifact.encodings[name] for name in "abcd"]
    assert ways == ["sparse", "planes", "codebook", "codes"]
    sizes = [array.nbytes for array in artifact.tensors.values()]
    assert peak <= sum(sizes) + max(sizes) + (16 << 20)


def mutated(rng, header, skeleton, sections):
    """A few random changes of the parts; digests and lengths are repaired in most mutants."""
    header, sections, columns = copy.deepcopy(header), list(sections), None
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(8)
        if kind == 0:
            skeleton = bent(rng, skeleton)
        elif kind == 1:
            columns = bent(rng, collapse(skeleton))
        elif kind <= 4:
            index = rng.randrange(len(sections))
            sections[index] = bent(rng, sections[index])
        elif kind == 5:
            place = rng.randrange(len(header["encodings"]))
            header["encodings"][place] = rng.choice([*ENCODINGS, "derived", *WILD])
        elif kind == 6:
            target = rng.choice([header["skeleton"], header["plan"], header["state"]])
            target[rng.choice([*target, "extra"])] = rng.choice(
                [*WILD, ["float32", [4]], ["int8", [24]], ["int32", [2, 3]]]
            )
        else:  # nothing that follows would know the form of what this leaves
            header[rng.choice([*header, "extra"])] = rng.choice(WILD)
            text = header if rng.random() < 0.5 else bent(rng, canonical_json(header))
            return assemble(text, skeleton, sections)
    return assemble(header, skeleton, sections, repair=rng.random() < 0.9, columns=columns)


WILD = [
    None, True, False, 0, 1, -1, 7, 24, 2**31, 2**63, -(2**63), 1e300, 0.5, "", "dense", "bitmap",
    "bool", "float16", "float32", "int64", "uint8", "x" * 600, "\ud800", "a/../b", [], [0], [24],
    [6, 4], [3], [2], [2**31] * 8, [[]], [1] * 9, {}, {"a": 1}, {"digest": 0},
]  # fmt: skip


def bent(rng, data):
    """`data` with bytes flipped, cut, doubled, inserted or replaced."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        action = rng.randrange(5)
        if action == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1 and place < len(data):
            data[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif action == 2:
            del data[place : place + rng.randint(1, 8)]
        elif action == 3:
            data[place:place] = rng.randbytes(rng.randint(1, 8))
        else:
            data[place:place] = data[place : place + rng.randint(1, 16)]
    return bytes(data)


def fuzz(seed, tmp_path, count, start):
    """Each mutant is refused by ArtifactError or is valid, within a second of computing; some of the
    valid ones are saved and loaded again."""
    parts = disassemble(seed)
    path, again = tmp_path / "mutant.tersor", tmp_path / "again.tersor"
    path.touch()
    outcomes = {}
    for number_ in range(start, start + count):
        rng = random.Random(number_)
        data = bent(rng, seed) if rng.random() < 0.1 else mutated(rng, *parts)
        refill(path, data)
        began = time.process_time()
        try:
            artifact = load(path)
        except ArtifactError as error:
            text = re.sub(r"[0-9]+|'[^']*'", "_", str(error).split(": ", 1)[1])
        else:
            text = "loaded"
            artifact.to_onnx().SerializeToString()
            if number_ % 7 == 0:
                again.unlink(missing_ok=True)
                save(artifact, again)
                assert {n: a.tobytes() for n, a in load(again).tensors.items()} == {
                    n: a.tobytes() for n, a in artifact.tensors.items()
                }
        assert time.process_time() - began < 1, f"mutant {number_} hangs"
        outcomes[text] = outcomes.get(text, 0) + 1
    return outcomes


def test_fuzzed_files_are_refused_or_valid(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    outcomes = fuzz(seed, tmp_path, 800, start=0)
    assert "loaded" in outcomes  # some changes are harmless: the plan, a value, a node's name
    assert len(outcomes) > 40, "the mutants must reach many different checks"


@pytest.mark.slow
def test_a_hundred_thousand_fuzzed_files_are_refused_or_valid(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert "loaded" in fuzz(seed, tmp_path, 100_000, start=1_000_000)


def test_the_library_may_panic_as_it_likes(seed, tmp_path, monkeypatch):
    """A panic of the entropy coder is no Exception; it comes out as an ArtifactError all the same."""
    from tersor.artifact import entropy

    class Panic(BaseException):
        pass

    class Coder:
        def __init__(self, words):
            pass

        def decode(self, *arguments):
            raise Panic

    monkeypatch.setattr(entropy.constriction.stream.stack, "AnsCoder", Coder)
    (tmp_path / "a.tersor").write_bytes(seed)
    with pytest.raises(ArtifactError, match=r"cannot be decoded \(Panic\)"):
        load(tmp_path / "a.tersor")


def test_types_of_the_format_are_the_ones_of_the_file():
    assert [kind.itemsize for kind in DTYPES.values()] == [1, 2, 4, 8, 1, 4, 8, 1]
