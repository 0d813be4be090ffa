"""Files of version 1, which are still read, written to do harm: refused, named, before memory is
taken.

`assemble` writes a file from its parts with all digests and lengths right, so that each attack
reaches the check it is meant for.
"""

import copy
import hashlib
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tersor.artifact import ENCODINGS, load, pack, save
from tersor.artifact.checks import canonical_json, digest_of
from tersor.artifact.version1 import ENCODINGS_1
from tersor.errors import ArtifactError


def small_graph():
    rng = np.random.default_rng(0)
    sparse = rng.standard_normal((6, 4)).astype(np.float32)
    sparse[rng.random(sparse.shape) < 0.8] = 0
    tensors = [
        numpy_helper.from_array(sparse, "a.weight"),
        numpy_helper.from_array(np.array([True, False, True]), "b.flags"),
        numpy_helper.from_array(np.array([1.5, -0.0], np.float16), "c.scale"),
        numpy_helper.from_array(np.arange(24, dtype=np.int8) % 7 - 3, "d.codes"),
    ]
    nodes = [helper.make_node("Identity", ["input"], ["output"])]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("input", "output")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def assemble(header, packed, sections, *, repair=True, total=None, version=1):
    """A file with right lengths and digests; `header` dict or bytes, `packed` the skeleton."""
    header = copy.deepcopy(header)
    if repair and isinstance(header, dict):
        try:
            header["skeleton"].update(digest=digest_of(packed), size_bytes=len(packed))
            for name, section in zip(sorted(header["tensors"]), sections, strict=True):
                header["tensors"][name].update(digest=digest_of(section), size_bytes=len(section))
        except (LookupError, TypeError, AttributeError, ValueError):
            pass  # the attack is on these very fields
    text = header if isinstance(header, bytes) else canonical_json(header)
    size = 56 + len(text) + len(packed) + sum(map(len, sections))
    start = struct.pack("<8sIIQ", b"\x89TERSOR\n", version, len(text), total or size)
    seal = hashlib.sha256(start + text).digest()
    return b"".join([start, seal, text, packed, *sections])


def disassemble(data):
    """header (dict), the skeleton's section, the tensor sections."""
    length = struct.unpack_from("<I", data, 12)[0]
    header = json.loads(data[56 : 56 + length])
    position = 56 + length
    sizes = [header["skeleton"]["size_bytes"]]
    sizes += [header["tensors"][name]["size_bytes"] for name in sorted(header["tensors"])]
    parts = []
    for size in sizes:
        parts.append(data[position : position + size])
        position += size
    assert position == len(data)
    return header, parts[0], parts[1:]


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """The bytes of a valid file of version 1 under 2 KB that holds every encoding of its time."""
    path = tmp_path_factory.mktemp("seed") / "seed.tersor"
    artifact = pack(small_graph(), plan={"kind": "plan"}, provenance={"n": 1})
    ways = {"a.weight": "bitmap", "b.flags": "dense", "c.scale": "dense", "d.codes": "packed"}
    assert set(ways.values()) == set(ENCODINGS_1)
    sections = [bytes(ENCODINGS[w].encode(artifact.tensors[n])) for n, w in sorted(ways.items())]
    header = {
        "plan": {"kind": "plan"},
        "provenance": {"n": 1},
        "skeleton": {"decoded_bytes": len(artifact.skeleton), "encoding": "zlib"},
        "tensors": {
            name: {
                "dtype": artifact.tensors[name].dtype.name,
                "encoding": way,
                "shape": list(artifact.tensors[name].shape),
            }
            for name, way in ways.items()
        },
    }
    path.write_bytes(assemble(header, zlib.compress(artifact.skeleton, 9), sections))
    assert {n: a.tobytes() for n, a in load(path).tensors.items()} == {
        n: a.tobytes() for n, a in artifact.tensors.items()
    }
    assert path.stat().st_size < 2048
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


def test_trailing_bytes_are_refused(seed, refused):
    assert "bytes that do not belong" in refused(seed + b"\0")
    assert "bytes that do not belong" in refused(seed + seed)
    header, packed, sections = disassemble(seed)
    assert "the sections take" in refused(assemble(header, packed, [*sections, b"x"], repair=False))


def test_a_damaged_tensor_is_named(seed, refused):
    assert "tensor 'd.codes' is damaged" in refused(seed[:-1] + b"\xff")
    position = len(seed) - sum(map(len, disassemble(seed)[2]))
    assert "tensor 'a.weight' is damaged" in refused(
        seed[:position] + bytes([seed[position] ^ 1]) + seed[position + 1 :]
    )
    assert "skeleton is damaged" in refused(seed[: position - 1] + b"\0" + seed[position:])


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
        start = struct.pack("<8sIIQ", b"\x89TERSOR\n", 1, length, len(seed))
        assert message in refused(start + seed[24:])


def change(*path, to):
    """An attack: set one field of the header."""

    def apply(header):
        target = header
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return apply


def rename(name):
    def apply(header):
        header["tensors"] = {name: header["tensors"]["a.weight"]}

    return apply


WEIGHT = ("tensors", "a.weight")
HEADERS = [
    (lambda h: h.pop("plan"), "header lacks the key 'plan'"),
    (change("run", to="os.system"), "unknown key 'run'"),
    (change("plan", to=[]), "plan is not a JSON object"),
    (change("plan", to={"a": "\ud800"}), "not Unicode"),
    (change("plan", to={"a": 2**63}), "64 bits"),
    (change("tensors", to=[]), "tensors must be"),
    (change("skeleton", to=None), "skeleton is not a JSON object"),
    (change("skeleton", "encoding", to="lzma"), "encoding 'lzma'"),
    (change("skeleton", "decoded_bytes", to=2**40), "from 0 to 4194304"),
    (change("skeleton", "decoded_bytes", to=1), "does not decompress to the 1 bytes"),
    (change("skeleton", "decoded_bytes", to=1 << 20), "does not decompress"),
    (change("skeleton", "size_bytes", to=1.0), "skeleton.size_bytes must be an integer"),
    (change("skeleton", "digest", to="A" * 32), "hexadecimal"),
    (change(*WEIGHT, to={}), "'a.weight' lacks the key 'digest'"),
    (change(*WEIGHT, "dtype", to="object"), "the type 'object'"),
    (change(*WEIGHT, "dtype", to="complex64"), "the type 'complex64'"),
    (change(*WEIGHT, "dtype", to=["float32"]), "the type"),
    (change(*WEIGHT, "dtype", to="int32"), "the graph wants float32"),
    (change(*WEIGHT, "encoding", to="codes"), "'a.weight' uses the encoding 'codes'"),
    (change(*WEIGHT, "encoding", to="rans"), "'a.weight' uses the encoding 'rans'.*pip install -U"),
    (change(*WEIGHT, "encoding", to="pickle"), "encoding 'pickle'"),
    (change(*WEIGHT, "encoding", to=None), "encoding None"),
    (change(*WEIGHT, "shape", to=24), "must be a list"),
    (change(*WEIGHT, "shape", to=[24]), "the graph wants float32"),
    (change(*WEIGHT, "shape", to=[1] * 9), "at most 8 dimensions"),
    (change(*WEIGHT, "shape", to=[-6, -4]), "a dimension must be"),
    (change(*WEIGHT, "shape", to=[True, 24]), "a dimension must be"),
    (change(*WEIGHT, "shape", to=[6.0, 4]), "a dimension must be"),
    (change(*WEIGHT, "shape", to=["6", 4]), "a dimension must be"),
    (change(*WEIGHT, "shape", to=[2**62, 2**62]), "a dimension must be"),
    (change(*WEIGHT, "shape", to=[2**30] * 8), "takes more than"),
    (change(*WEIGHT, "shape", to=[0, 2**31 - 1, 2**31 - 1]), "takes more than"),
    (change(*WEIGHT, "shape", to=[2**29 - 1]), "cannot hold 536870911 elements"),
    (change(*WEIGHT, "size_bytes", to=-1), "size_bytes must be"),
    (change(*WEIGHT, "size_bytes", to=2**63), "size_bytes must be"),
    (change(*WEIGHT, "size_bytes", to=5), "5 bytes cannot hold 24 elements"),
    (change(*WEIGHT, "digest", to="0" * 31), "hexadecimal"),
    (change(*WEIGHT, "digest", to=0), "hexadecimal"),
    (change(*WEIGHT, "offset", to=0), "unknown key 'offset'"),
    (change("tensors", "c.scale", "encoding", to="bitmap"), "cannot hold|marks"),
    (rename("../a.weight"), "'..' as a step"),
    (rename("x/../../a"), "'..' as a step"),
    (rename("..\\a"), "'..' as a step"),
    (rename("a\0b"), "cannot be printed"),
    (rename("a\nb"), "cannot be printed"),
    (rename("a\u202eb"), "cannot be printed"),
    (rename("\ud800"), "cannot be printed"),
    (rename(""), "has 0 characters"),
    (rename("n" * 100_000), "has 100000 characters"),
    (rename("other"), "is not part of the graph|has no data"),
    (lambda h: h["tensors"].pop("c.scale"), "the sections take"),
]


@pytest.mark.parametrize(("attack", "message"), HEADERS, ids=[m for _, m in HEADERS])
def test_a_hostile_header_is_refused(seed, refused, attack, message):
    header, packed, sections = disassemble(seed)
    attack(header)
    sections = sections[: len(header["tensors"])] if message != "the sections take" else sections
    assert re.search(message, refused(assemble(header, packed, sections, repair=False)))


def test_wide_types_may_not_use_the_bitmap(seed, refused):
    header, packed, sections = disassemble(seed)
    header["tensors"]["a.weight"]["dtype"] = "int64"
    assert "bitmap does not hold" in refused(assemble(header, packed, sections))


def test_more_than_the_largest_number_of_tensors_is_refused(seed, refused):
    header, packed, sections = disassemble(seed)
    header["tensors"] = {str(i): 0 for i in range(100_001)}
    assert "at most 100000" in refused(assemble(header, packed, sections, repair=False))


def test_tensors_that_are_too_large_together_are_refused(seed, refused):
    header, packed, sections = disassemble(seed)
    one = {
        **header["tensors"]["a.weight"],
        "dtype": "uint8",
        "shape": [1 << 30],
        "size_bytes": 1 << 27,
    }
    header["tensors"] = {"a": one, "b": one}
    assert "at most 2147483647" in refused(assemble(header, packed, sections, repair=False))


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
    "unknown field 0": b"\0\0",
    "functions of its own": field(25, b""),
    "training graphs": field(20, b""),
    "sparse initializers": in_graph(field(15, b"")),
    "data outside the file": in_graph(
        field(5, field(13, field(1, b"location") + field(2, b"/etc/passwd")))
    ),
    "data outside the file ": in_graph(field(5, b"\x70\x01")),
    "data outside the file  ": in_attribute(field(5, field(13, b""))),
    "data of tensor": in_graph(field(5, field(8, b"a.weight") + field(9, b"1234"))),
    "data of tensor ": in_graph(field(5, field(8, b"a.weight") + field(4, b"1234"))),
    "initializer 'a' twice": in_graph(field(5, field(8, b"a")) * 2),
    "the operator domain 'evil'": in_graph(field(1, field(7, b"evil"))),
    "the operator domain 'evil' ": in_attribute(field(6, field(1, field(7, b"evil")))),
    "imports the operator domain 'evil'": in_graph(b"") + field(8, field(1, b"evil")),
    "reads other files": in_graph(field(1, field(7, b"com.microsoft") + field(4, b"EPContext"))),
    "not UTF-8": in_graph(field(2, b"\xff")),
    "runs over its end": in_graph(b"")[:-1],
    "runs over its end ": b"\x3b" + in_graph(b""),
    "in a wrong form": b"\x38\x01",
    "cut off or too long": b"\xff" * 20,
    "nested more than": nested(40),
    "of memory": in_graph(field(1, b"") * 200_000),
    "of memory ": in_graph(field(1, field(5, b"") * 200_000)),
    "of memory  ": in_attribute(b"\x40\x01" * 600_000),
    "of memory   ": in_attribute(field(8, b"\x01" * 3_500_000)),
    "at most 4194304": in_graph(field(2, b"a" * (4 << 20))),
    "tensor '0' has no data": in_graph(field(5, field(8, b"0") + b"\x10\x01")),
    "not part of the graph": in_graph(b""),
}


@pytest.mark.parametrize("message", list(SKELETONS))
def test_a_hostile_skeleton_is_refused(seed, refused, message):
    header, _, sections = disassemble(seed)
    raw = SKELETONS[message]
    header["skeleton"]["decoded_bytes"] = len(raw)
    found = refused(assemble(header, zlib.compress(raw), sections))
    assert message.strip() in found or (
        message.startswith("at most") and "from 0 to 4194304" in found
    )


def test_a_skeleton_section_that_is_not_one_zlib_stream_is_refused(seed, refused):
    header, packed, sections = disassemble(seed)
    raw = zlib.decompress(packed)
    for broken in (
        packed + b"\0",
        packed[:-1],
        b"",
        b"junk",
        zlib.compress(raw) * 2,
        zlib.compress(b""),
    ):
        assert re.search("decompress", refused(assemble(header, broken, sections)))


def bombs(seed):
    """Files of at most 1 MiB that try to take much more."""
    header, packed, sections = disassemble(seed)
    mib = 1 << 20

    def with_skeleton(raw, declared=None):
        bomb = copy.deepcopy(header)
        bomb["skeleton"]["decoded_bytes"] = len(raw) if declared is None else declared
        return assemble(bomb, zlib.compress(raw, 9), sections)

    def with_plan(text):
        bare = copy.deepcopy(header)
        bare["skeleton"].update(digest=digest_of(packed), size_bytes=len(packed))
        bare["plan"] = {"a": 0}
        return assemble(canonical_json(bare).replace(b'{"a":0}', text), packed, sections[:2])

    def with_zeros(raw_skeleton, num_lists, size):
        """A valid bitmap of no elements at all, the last tensor damaged: all the rest is read."""
        bomb = copy.deepcopy(header)
        bomb["tensors"]["a.weight"].update(shape=[size * 8])
        bomb["skeleton"]["decoded_bytes"] = len(raw_skeleton)
        bomb["plan"] = {"a": [[]] * num_lists}
        model = zlib.compress(raw_skeleton, 9)
        *kept, last = sections[1:]
        return assemble(bomb, model, [bytes(size), *kept, last[:-1] + b"\x81"])[:-1] + b"\1"

    def graph_with(extra, size):
        """The seed's graph whose first tensor has 8 * size elements, and more fields."""
        graph = small_graph().graph
        graph.initializer[0].ClearField("raw_data")
        for tensor in graph.initializer:
            tensor.ClearField("raw_data")
        graph.initializer[0].dims[:] = [8 * size]
        return in_graph(graph.SerializeToString() + extra)

    all_, half = mib - 3000, mib // 2 - 3000
    return {
        "zlib": with_skeleton(bytes(80 * mib), declared=4 * mib),
        "nodes": with_skeleton(in_graph(field(1, b"") * 110_000)),
        "attributes": with_skeleton(in_graph(field(1, field(5, b"") * 110_000))),
        "numbers": with_skeleton(in_attribute(b"\x40\x01" * 500_000)),
        "packed": with_skeleton(in_attribute(field(8, b"\x01" * 1_500_000))),
        "text": with_skeleton(in_graph(field(1, field(1, b"a") * 370_000))),
        "lists": with_plan(b'{"a":[' + b"[]," * (mib // 3 - 2000) + b"[]]}"),
        "objects": with_plan(b'{"a":[' + b"{}," * (mib // 3 - 2000) + b"{}]}"),
        "words": with_plan(b'{"a":[' + b'"ab",' * (mib // 5 - 2000) + b'"ab"]}'),
        "floats": with_plan(b'{"a":[' + b"1.5," * (mib // 4 - 2000) + b"1.5]}"),
        "quotes": with_plan(b'"' + b'\\"' * half),
        "keys": with_plan(b"{" + b",".join(b'"%06d":{}' % i for i in range(85_000)) + b"}"),
        "digits": with_plan(b'{"a":' + b"9" * (mib - 4000) + b"}"),
        "depth": with_plan(b'{"a":' + b"[" * (mib - 4000) + b"}"),
        "zeros": with_zeros(graph_with(b"", all_), 0, all_),
        "three at once": with_zeros(graph_with(field(1, b"") * 100_000, half), half // 3, half),
    }


CHILD = """
import os, resource, sys
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
        except ArtifactError as error:
            print(path, error)
            os._exit("more memory than there is" in str(error))
        os._exit(2)
    if status := os.waitstatus_to_exitcode(os.wait()[1]):
        sys.exit(f"{path}: status {status} (1: took more than 64 MiB, 2: was loaded)")
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


def mutated(rng, header, packed, sections):
    """A few random changes of the parts; digests and lengths are repaired in most mutants."""
    header, raw, sections = copy.deepcopy(header), zlib.decompress(packed), list(sections)
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(5)
        if kind == 0:
            raw = bent(rng, raw)
        elif kind == 1:
            index = rng.randrange(len(sections))
            sections[index] = bent(rng, sections[index])
        elif kind == 2:
            entry = rng.choice(list(header["tensors"].values()))
            entry[rng.choice(["dtype", "encoding", "shape", "size_bytes"])] = rng.choice(WILD)
        elif kind == 3:
            target = rng.choice([header["skeleton"], header["plan"], header["tensors"]["a.weight"]])
            target[rng.choice([*target, "extra"])] = rng.choice(WILD)
        else:  # nothing that follows would know the form of what this leaves
            where = rng.choice([header, header["tensors"]])
            where[rng.choice([*where, "extra"])] = rng.choice(WILD)
            text = header if rng.random() < 0.5 else bent(rng, canonical_json(header))
            return assemble(text, zlib.compress(raw), sections)
    if rng.random() < 0.9:
        header["skeleton"]["decoded_bytes"] = len(raw)
    return assemble(header, zlib.compress(raw), sections, repair=rng.random() < 0.9)


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
    """Each mutant is refused by ArtifactError or is valid, and is then saved and loaded again."""
    parts = disassemble(seed)
    path, again = tmp_path / "mutant.tersor", tmp_path / "again.tersor"
    path.touch()
    outcomes = {}
    for number_ in range(start, start + count):
        rng = random.Random(number_)
        data = bent(rng, seed) if rng.random() < 0.1 else mutated(rng, *parts)
        refill(path, data)
        try:
            artifact = load(path)
        except ArtifactError as error:
            text = re.sub(r"[0-9]+|'[^']*'", "_", str(error).split(": ", 1)[1])
        else:
            again.unlink(missing_ok=True)
            save(artifact, again)
            artifact.to_onnx().SerializeToString()
            assert sorted(artifact.tensors) == list(artifact.tensors)
            assert {n: a.tobytes() for n, a in load(again).tensors.items()} == {
                n: a.tobytes() for n, a in artifact.tensors.items()
            }
            text = "loaded"
        outcomes[text] = outcomes.get(text, 0) + 1
    return outcomes


def test_fuzzed_files_are_refused_or_valid(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    outcomes = fuzz(seed, tmp_path, 1000, start=0)
    assert "loaded" in outcomes  # some changes are harmless: the plan, a value, a node's name
    assert len(outcomes) > 40, "the mutants must reach many different checks"
