"""Fixtures of the evaluation tests."""

import pytest

from tests.support.commands import ROOT, answer, script


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder: exit code, stdout, stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    module = script(ROOT / "scripts" / "evaluate.py")

    def run(*argv):
        return answer(module, argv, capsys)

    return run
