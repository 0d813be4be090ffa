"""Rows go in, the same rows come out, in a file that reads as one JSON object per line."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.errors import RunError
from tersor.runs.journal import Journal, Rows, read_rows
from tersor.runs.owner import LOCK_NAME

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
json_rows = st.dictionaries(st.text(), json_values, max_size=4)


@settings(max_examples=30, deadline=None)  # every example waits for the disk
@given(rows=st.lists(json_rows, max_size=5))
def test_any_rows_are_read_back_equal_and_in_order(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("run") / "rows.jsonl"
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
        assert journal.rows() == rows
    with Journal(path) as journal:
        assert journal.rows() == rows and journal.recovered == ""
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_lines_are_canonical_so_equal_rows_are_equal_bytes(tmp_path):
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"b": 1, "a": ["x y", 0.1, {"d": None, "c": True}]})
        journal.append({"a": ("x y", 0.1, {"c": True, "d": None}), "b": 1})
    first, second = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    assert first == second == b'{"a":["x y",0.1,{"c":true,"d":null}],"b":1}\n'


def test_text_of_any_language_and_odd_line_ends_stays_one_ascii_line(tmp_path):
    row = {"text": "é\u2028\r\n\x85\ud800"}
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append(row)
    with Journal(tmp_path / "rows.jsonl") as journal:
        assert journal.rows() == [row]
    assert (tmp_path / "rows.jsonl").read_bytes().isascii()


def test_a_row_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    with Journal(tmp_path / "rows.jsonl") as journal:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
        journal.append({"n": 1})
        assert (tmp_path / "rows.jsonl").read_bytes() == b'{"n":1}\n'
    assert synced == [8]


def test_find_answers_whether_a_measurement_is_there(tmp_path):
    rows = [
        {"kind": "accuracy", "model": "a", "sparsity": 0.1, "shape": [1, 2]},
        {"kind": "accuracy", "model": "a", "sparsity": 0.3},
        {"kind": "timing", "model": "a", "interval": None},
    ]
    with Journal(tmp_path / "rows.jsonl") as journal:
        for row in rows:
            journal.append(row)
    with Journal(tmp_path / "rows.jsonl") as journal:
        assert journal.find(kind="accuracy", model="a", sparsity=0.1) == rows[:1]
        assert journal.find(kind="accuracy") == rows[:2]
        assert journal.find() == rows
        assert journal.find(shape=(1, 2)) == rows[:1]
        assert journal.find(kind="accuracy", model="b") == []
        assert journal.find(interval=None) == rows[2:], "an absent key is not None"


def test_rows_handed_out_are_copies(tmp_path):
    given_row = {"layers": [1]}
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append(given_row)
        given_row["layers"].append(2)
        journal.rows()[0]["layers"].append(3)
        journal.find()[0]["layers"].append(4)
        assert journal.rows() == [{"layers": [1]}]


@pytest.mark.parametrize(
    ("row", "culprit"),
    [
        ({"a": {"b": [1, float("nan")]}}, r"a\.b\[1\]=nan"),
        ({"accuracy": float("inf")}, "accuracy=inf"),
        ({"accuracy": -float("inf")}, "accuracy=-inf"),
        ({"path": b"x"}, "bytes"),
        ({"set": {1}}, "set"),
        ({"deep": {1: 2}}, "key 1 in deep"),
        ({2: 1}, "key 2"),
        ({"n": 10**5000}, "digits"),
        ([1], "a row is a dict, got list"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place_and_nothing_is_written(
    tmp_path, row, culprit
):
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"n": 1})
        with pytest.raises(RunError, match=culprit):
            journal.append(row)
        journal.append({"n": 2})
    with Journal(tmp_path / "rows.jsonl") as journal:
        assert journal.rows() == [{"n": 1}, {"n": 2}]


def test_numpy_float64_is_a_float_but_other_scalars_are_refused_by_name(tmp_path):
    numpy = pytest.importorskip("numpy")
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"accuracy": numpy.float64(0.5)})
        with pytest.raises(RunError, match=r"accuracy=.*float32"):
            journal.append({"accuracy": numpy.float32(0.5)})


def test_a_closed_journal_refuses_rows_and_gives_the_directory_back(tmp_path):
    journal = Journal(tmp_path / "rows.jsonl")
    journal.close()
    journal.close()
    with pytest.raises(RunError, match="is closed"):
        journal.append({})
    Journal(tmp_path / "rows.jsonl").close()


def test_a_second_journal_in_one_process_is_refused_too(tmp_path):
    with Journal(tmp_path / "rows.jsonl"):
        for name in ("rows.jsonl", "other.jsonl"):
            with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
                Journal(tmp_path / name)


def test_the_directory_is_free_again_after_a_refused_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"rubbish\n{}\n")
    with pytest.raises(RunError, match="line 1"):
        Journal(path)
    path.write_bytes(b"{}\n")
    with Journal(path) as journal:
        assert journal.rows() == [{}]


def test_a_lock_file_left_by_a_killed_run_does_not_lock(tmp_path):
    (tmp_path / LOCK_NAME).write_text("999999\n")
    with Journal(tmp_path / "rows.jsonl"):
        assert (tmp_path / LOCK_NAME).read_text().split()[0] == str(os.getpid())


def test_rows_are_read_while_another_owns_the_journal_and_a_torn_end_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Journal(path) as journal:
        journal.append({"n": 1})
        assert read_rows(path) == [{"n": 1}]
    torn = path.read_bytes() + b'{"n":2'
    path.write_bytes(torn)
    assert read_rows(path) == [{"n": 1}]
    assert path.read_bytes() == torn


def test_reading_a_missing_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RunError, match="cannot be read: No such file"):
        read_rows(path)
    path.write_bytes(b"rubbish\n{}\n")
    with pytest.raises(RunError, match="line 1: not a row"):
        read_rows(path)


def test_an_owner_on_another_machine_is_named_with_it(tmp_path, monkeypatch):
    import platform

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "node", lambda: "far")
        journal = Journal(tmp_path / "rows.jsonl")
    with journal, pytest.raises(RunError, match=f"process {os.getpid()} on far"):
        Journal(tmp_path / "other.jsonl")


def test_rows_in_memory_are_found_checked_and_copied_as_those_on_disk(tmp_path):
    held = [{"kind": "a", "shape": [1, 2]}]
    rows = Rows(held)
    held[0]["kind"] = "changed"
    rows.append({"kind": "b", "shape": (3,)})
    assert rows.rows() == [{"kind": "a", "shape": [1, 2]}, {"kind": "b", "shape": [3]}]
    assert rows.find(shape=(3,)) == [{"kind": "b", "shape": [3]}]
    with pytest.raises(RunError, match="loss=nan"):
        rows.append({"loss": float("nan")})
    assert len(rows.rows()) == 2
