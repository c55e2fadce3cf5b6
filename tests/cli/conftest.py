"""Fixtures of the command tests."""

from functools import partial

import pytest

from tests.support.commands import ROOT, answer, script
from tests.support.images import noise


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command by name in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name, *argv):
        return answer(script(ROOT / "scripts" / f"{name}.py"), argv, capsys)

    return run


@pytest.fixture
def ground(command):
    return partial(command, "ground")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    noise(120, 80).save(path)
    return path
