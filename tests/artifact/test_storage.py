"""Files are written as a whole or not at all, whatever fails."""

import errno
import os
import stat

import numpy as np
import pytest

from tersor.artifact import storage
from tersor.errors import ArtifactError, RunError

PARTS = [b"head", np.arange(50, dtype=np.uint8).data, b"", b"tail"]
WHOLE = b"".join(bytes(part) for part in PARTS)


def write(path):
    storage.write_whole(path, PARTS, len(WHOLE))


class FailAt:
    """Stands in for an os function; its N-th call raises."""

    def __init__(self, real, number, error):
        self.real, self.number, self.error, self.calls = real, number, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.number:
            raise self.error
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("old", [None, b"old content"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("function", ["open", "write", "fsync", "close", "replace"])
def test_the_nth_failing_call_leaves_the_old_or_the_whole_new_file(
    tmp_path, monkeypatch, function, code, old
):
    path = tmp_path / "a.tersor"
    for number in range(1, 20):
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)
        with monkeypatch.context() as patch:
            failing = FailAt(getattr(os, function), number, OSError(code, os.strerror(code)))
            patch.setattr(os, function, failing)
            try:
                write(path)
                failed = False
            except RunError as error:
                failed = True
                assert str(path) in str(error)
                if (
                    code == errno.ENOSPC
                    and b"".join(p.read_bytes() for p in [path] if p.exists()) != WHOLE
                ):
                    assert f"{len(WHOLE)} bytes of free space" in str(error)
        content = path.read_bytes() if path.exists() else None
        assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else [path.name])
        if not failed:
            assert content == WHOLE and failing.calls < number
            break
        assert content in (old, WHOLE)
    else:
        pytest.fail("never succeeded")
    assert number > 1


@pytest.mark.parametrize("number", range(1, 4))
def test_an_interruption_leaves_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "a.tersor"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "write", FailAt(os.write, number, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tersor"] and path.read_bytes() == b"old"


def test_short_writes_are_gone_on_with(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    write(tmp_path / "a.tersor")
    assert (tmp_path / "a.tersor").read_bytes() == WHOLE


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    seen = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name, **k: (seen.append(name), real(*a, **k))[1]
        )
    write(tmp_path / "a.tersor")
    assert [n for n in seen if n != "write"] == ["fsync", "replace", "fsync"]
    assert seen[-3:] == ["fsync", "replace", "fsync"]


def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"there is no directory .*make it first"):
        write(tmp_path / "none" / "a.tersor")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="there is no directory"):
        write(tmp_path / "file" / "a.tersor")
    with pytest.raises(RunError, match="not a regular file"):
        write(tmp_path)
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / "a\0b")
    with pytest.raises(RunError, match="cannot be written"):
        write(tmp_path / ("n" * 300))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(RunError, match="is not writable"):
        write(tmp_path / "a.tersor")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_not_a_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="not a regular file"):
        write(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_the_file_gets_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    write(tmp_path / "a.tersor")
    assert (tmp_path / "a.tersor").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_is_not_a_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("link")
    for place, message in [
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular file"),
        (storage.pathlib.Path(os.devnull), "not a regular file"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "link", "cannot be read"),
        (tmp_path / "a\0b", "cannot be read|does not exist"),
    ]:
        with pytest.raises(ArtifactError, match=message), storage.open_regular(place):
            pass


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"12345678")
    with storage.open_regular(tmp_path / "a") as (file, size_bytes):
        os.truncate(tmp_path / "a", 4)
        with pytest.raises(ArtifactError, match="ends inside the middle"):
            storage.read_exactly(file, size_bytes, "the middle")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), MemoryError()])
def test_failing_reads_are_typed(tmp_path, error):
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(ArtifactError, match=str(tmp_path)), storage.open_regular(tmp_path / "a"):
        raise error
