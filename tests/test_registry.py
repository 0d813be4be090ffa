"""Names: exact, unique, sorted, and a near miss gets the right one named."""

import sys

import pytest

from tersor.errors import SpecError, TersorError, UnknownNameError
from tersor.registry import Registry, did_you_mean, load_all


@pytest.fixture
def pets():
    registry = Registry("pet")
    for name in ("dog", "cat", "chinchilla"):
        registry.register(name)(name.upper())
    return registry


def test_it_holds_what_was_registered_in_sorted_order(pets):
    assert list(pets) == ["cat", "chinchilla", "dog"] and len(pets) == 3
    assert pets["dog"] == "DOG" and "dog" in pets and "cow" not in pets and 5 not in pets


def test_the_decorator_gives_the_function_back(pets):
    @pets.register("cow")
    def cow():
        return "moo"

    assert cow() == pets["cow"]() == "moo"


def test_a_name_taken_is_refused_and_the_holder_named(pets):
    with pytest.raises(SpecError, match="pet 'dog' is already registered by 'DOG'"):
        pets.register("dog")("other")
    assert pets["dog"] == "DOG"


def test_an_unknown_name_lists_the_known_and_the_nearest(pets):
    with pytest.raises(UnknownNameError) as refused:
        pets["chinchila"]
    message = "unknown pet 'chinchila'; expected one of cat, chinchilla, dog. "
    assert str(refused.value) == message + "Did you mean 'chinchilla'?"
    for kind in (TersorError, SpecError, ValueError, KeyError):
        assert isinstance(refused.value, kind)


def test_nothing_is_proposed_for_a_name_far_from_all():
    assert did_you_mean("zebra", ["cat", "dog"]) == "" and did_you_mean("x", []) == ""


def test_every_module_of_a_package_is_imported_and_errors_surface(tmp_path, monkeypatch):
    package = tmp_path / "toy_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_all("toy_plugins")
    assert sys.modules["toy_plugins.one"].LOADED
    (package / "two.py").write_text("import no_such_library_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library_anywhere"):
        load_all("toy_plugins")
    for name in [n for n in sys.modules if n.startswith("toy_plugins")]:
        del sys.modules[name]
