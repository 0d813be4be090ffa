"""What stands beside every number: right where the system tells, an answer where it does not."""

import getpass
import json
import pathlib
import platform
import socket
import subprocess
import sys

import pytest

from tersor.bench import environment as measured
from tersor.bench.environment import environment, usable_cores

module = sys.modules[measured.__module__]

X86 = """\
processor\t: 0
model name\t: Some Processor 9000 @ 2.70GHz
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8 avx_vnni ssse3

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\nCPU part\t: 0xd40\n"


@pytest.fixture
def cpuinfo(monkeypatch, tmp_path):
    def write(content):
        path = tmp_path / "cpuinfo"
        path.write_bytes(content)
        monkeypatch.setattr(module, "CPUINFO", path)

    return write


def test_reads_the_first_processor_of_an_x86(cpuinfo):
    cpuinfo(X86.encode())
    found = environment()
    assert found["cpu"] == "Some Processor 9000 @ 2.70GHz"
    assert set(found["flags"]) == {
        *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "avx_vnni")
    }


def test_reads_the_features_of_an_arm(cpuinfo):
    cpuinfo(ARM.encode())
    found = environment()
    assert found["flags"] == ["asimddp", "i8mm", "bf16"]
    assert found["cpu"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00 : \xff\n", b"no colon here\n: :\n"])
def test_an_odd_cpuinfo_still_gives_a_name(cpuinfo, content):
    cpuinfo(content)
    assert environment()["cpu"]


def test_a_missing_cpuinfo_and_missing_packages_still_give_an_answer(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(module, "PACKAGES", ("numpy", "no-such-package"))
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "")
    found = environment()
    assert found["cpu"] == "unknown" and found["flags"] == []
    assert set(found["versions"]) == {"python", "numpy"}


def test_the_versions_are_those_of_the_imported_packages():
    import numpy
    import torch

    versions = environment()["versions"]
    assert versions["numpy"] == numpy.__version__
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert versions["python"] == platform.python_version()
    assert {"tersor", "torchvision", "onnxruntime"} <= set(versions)


def test_it_is_json_and_tells_nothing_of_the_host_the_user_or_the_paths():
    text = json.dumps(environment())
    assert json.loads(text) == environment()
    words = json.dumps(list(environment()["versions"].values()))
    assert str(pathlib.Path.home()) not in text and str(pathlib.Path.cwd()) not in text
    for secret in (socket.gethostname(), platform.node(), getpass.getuser()):
        assert secret not in text or len(secret) < 4 or secret in words
    assert "/" not in text.replace(environment()["cpu"], "")


def test_usable_cores_follow_the_affinity(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    assert usable_cores() == environment()["cores"] == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_cores() == 1


def test_torch_is_not_imported():
    code = (
        "import sys; from tersor.bench.environment import environment; environment(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
