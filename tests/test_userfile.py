"""`FILE.py:FUNCTION`: the function of the file named, or a message about what the file holds."""

import pytest

from tersor.errors import SpecError, UnknownNameError
from tersor.userfile import is_user_file, load_function


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("net.py:build", True),
        ("/some/where/net.py:build", True),
        ("C:/some/net.py:build", True),
        ("net.py", False),
        ("net.txt:build", False),
        ("torchvision:resnet18", False),
        ("folder:some.py", False),
        ("resnet18", False),
        ("", False),
    ],
)
def test_which_names_mean_a_file(name, answer):
    assert is_user_file(name) is answer


@pytest.fixture
def file(tmp_path):
    def write(content, name="mine.py"):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return write


def test_functions_and_classes_are_found(file):
    path = file("def build(x): return x + 1\nclass Net: pass\nlimit = 5\n")
    assert load_function(f"{path}:build")(2) == 3
    assert load_function(f"{path}:Net").__name__ == "Net"


def test_dataclasses_of_the_file_can_be_made(file):
    path = file(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Box:\n    side: int = 3\n"
    )
    assert load_function(f"{path}:Box")().side == 3


def test_two_files_of_one_name_stay_apart(file, tmp_path):
    (tmp_path / "other").mkdir()
    first = load_function(f"{file('def f(): return 1')}:f")
    second = load_function(f"{file('def f(): return 2', 'other/mine.py')}:f")
    assert (first(), second()) == (1, 2)


def test_a_missing_file_is_refused(tmp_path):
    for name in ("none.py", "directory.py"):
        if name.startswith("directory"):
            (tmp_path / name).mkdir()
        with pytest.raises(SpecError, match=rf"no such file: .*{name}"):
            load_function(f"{tmp_path / name}:f")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("def f(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_library_anywhere\n", "No module named 'no_such_library_anywhere'"),
        ("\0", "SyntaxError"),
    ],
)
def test_a_file_that_fails_is_told_with_its_error(file, content, told):
    path = file(content)
    with pytest.raises(SpecError, match=rf"mine\.py failed while it was run: .*{told}"):
        load_function(f"{path}:f")


@pytest.mark.parametrize("function", ["buld", "limit", "", "_hidden_not_there"])
def test_a_missing_function_is_refused_with_those_there(file, function):
    path = file("def build(): pass\ndef _hidden(): pass\nlimit = 5\n")
    with pytest.raises(UnknownNameError, match="it defines build") as refused:
        load_function(f"{path}:{function}")
    assert "_hidden," not in str(refused.value)
    if function == "buld":
        assert "Did you mean 'build'?" in str(refused.value)


def test_an_empty_file_defines_none(file):
    with pytest.raises(UnknownNameError, match="it defines none"):
        load_function(f"{file('')}:f")
