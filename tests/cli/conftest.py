"""Fixtures of the command tests."""

import pytest

from tests.conftest import noise
from tests.support.commands import answer, script


@pytest.fixture
def ground(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        return answer(script(), argv, capsys)

    return run


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    noise(120, 80).save(path)
    return path
