"""The programs of the demo: their command lines, and the order in which their packages import each other."""

import ast
import importlib
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "scripts/demo"
PROGRAMS = (
    "scenes.make_scenes",
    "lines.make_lines",
    *(f"{model}.{program}" for model in ("clip", "flava", "trocr", "classifier") for program in ("train", "score")),
    "trocr.robustness",
)
# Each package imports only those in its set.
ALLOWED = {
    "paths": set(),
    "training": set(),
    "scenes": {"paths"},
    "lines": {"paths"},
    "clip": {"paths", "training", "scenes"},
    "flava": {"paths", "training", "scenes", "clip"},
    "classifier": {"paths", "training", "scenes", "clip"},
    "trocr": {"paths", "training", "lines"},
}


def parts(path):
    return path.relative_to(DEMO).with_suffix("").parts


@pytest.mark.parametrize("name", PROGRAMS)
def test_help(name, capsys):
    program = importlib.import_module(f"scripts.demo.{name}")
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    assert " ".join(program.__doc__.splitlines()[0].split()) in " ".join(capsys.readouterr().out.split())
    assert f"python -m scripts.demo.{name}" in program.__doc__


def test_every_program_is_listed():
    found = {".".join(parts(path)) for path in DEMO.rglob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert found == set(PROGRAMS)


def test_packages_import_in_order():
    files = [path for path in DEMO.rglob("*.py") if path.name != "__init__.py"]
    assert {parts(path)[0] for path in files} == set(ALLOWED)
    for path in files:
        own = parts(path)[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                package = (node.module.split(".") + [""] * 3)[:3]
                if package[:2] == ["scripts", "demo"]:
                    assert package[2] in ALLOWED[own] | {own}, (path, node.module)
