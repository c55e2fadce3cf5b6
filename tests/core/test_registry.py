"""Registries: lazy names, entry points, suggestions; options of methods."""

import sys
from importlib.metadata import EntryPoint

import pytest

from grounding import METHODS
from grounding.core.errors import UnknownNameError
from grounding.core.registry import Registry
from grounding.methods.base import Method, method
from grounding.methods.options import convert


def test_tables_import_only_what_is_asked_for():
    table = Registry("thing", {"good": "json:dumps", "missing": "no_such_module:x"}, "grounding.none")
    assert list(table) == ["good", "missing"]
    assert table["good"] is __import__("json").dumps
    with pytest.raises(ModuleNotFoundError):
        table["missing"]


def test_unknown_names_list_what_there_is():
    with pytest.raises(
        UnknownNameError, match=r"unknown method 'gradcan'; did you mean 'gradcam'\? \(there are: gradcam"
    ):
        METHODS["gradcan"]


def test_entry_points_join_but_never_replace(monkeypatch):
    points = [EntryPoint("mine", "json:loads", "g"), EntryPoint("good", "json:loads", "g")]
    monkeypatch.setattr(
        sys.modules["grounding.core.registry"], "entry_points", lambda group: points if group == "g" else []
    )
    table = Registry("thing", {"good": "json:dumps"}, "g")
    with pytest.warns(UserWarning, match="^entry point 'good' of json:loads is ignored: there is a built-in thing of"):
        assert list(table) == ["mine", "good"]
    assert table["mine"] is __import__("json").loads
    assert table["good"] is __import__("json").dumps


def test_every_method_is_documented_and_typed():
    for name in METHODS:
        found = METHODS[name]
        assert isinstance(found, Method)
        assert "Cost" in found.function.__doc__ or name == "attention"
        found.options(found.defaults, name)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, 3),
        ("0.5", float, 0.5),
        ("none", int | None, None),
        ("2", int | None, 2),
        ("yes", bool, True),
        (False, bool, False),
    ],
)
def test_options_are_read_from_text(value, hint, expected):
    assert convert(value, hint) == expected


@pytest.mark.parametrize(("value", "hint"), [("1.5", int), (1.5, int), ("nan", float), ("maybe", bool), (None, float)])
def test_wrong_values_are_refused(value, hint):
    with pytest.raises(ValueError, match="expected"):
        convert(value, hint)


def test_a_method_declares_known_signals():
    with pytest.raises(ValueError, match="unknown signals"):
        method("x", {"gradients"})
