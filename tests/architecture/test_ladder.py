"""The house rules that a machine can check: import order, file sizes, what scripts may import, one name per place."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("grounding", "adapters")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
# The public faces resolve names lazily; they import nothing at module level.
LAZY = {"grounding", "adapters"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, *, type_checking=False):
    """Names of our modules that a file imports, imports inside functions counted."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {id(n) for n in ast.walk(node)}
    known = {module_name(p) for p in FILES}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= submodules if len(submodules) == len(node.names) else submodules | {node.module}
    return {name for name in found if name.split(".")[0] in PACKAGES}


# Architectures and module paths of theirs. "clip" alone is a word of arithmetic, and the demo model's folder.
FAMILIES = re.compile(
    r"CLIP|Clip[A-Z]|clip_model|(?i:flava|trocr|siglip|blip|convnext|donut|llava|vilt|dinov2)|_model\."
)


def test_grounding_never_imports_adapters():
    offenders = [
        p.name
        for p in (ROOT / "grounding").rglob("*.py")
        if any(name.split(".")[0] == "adapters" for name in imports(p, type_checking=True))
    ]
    assert offenders == []


def test_imports_have_no_circle():
    graph = {module_name(p): imports(p) - {module_name(p)} for p in FILES}
    # Result objects offer figure(), strip() and save() as methods; the modules behind them import the class back.
    graph["grounding.explanation.explanation"] -= {
        "grounding.explanation.figures.overlays",
        "grounding.explanation.figures.reading_strip",
        "grounding.explanation.storage",
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in graph:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_submodule_imports_from_its_package_root(package):
    offenders = [p.name for p in (ROOT / package).glob("*.py") if p.name != "__init__.py" and package in imports(p)]
    assert offenders == []


def test_files_stay_below_300_lines():
    long = {str(p.relative_to(ROOT)): n for p in [*FILES, *SCRIPTS] if (n := len(p.read_text().splitlines())) >= 300}
    assert long == {}


def test_scripts_only_parse_call_and_print():
    heavy = ("torch", "transformers", "numpy")
    for path in (ROOT / "scripts").glob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 80, path.name
        names = {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.module}
        assert not [n for n in names if n.split(".")[0] in heavy], path.name


def test_engine_names_no_architecture():
    for path in (ROOT / "grounding").rglob("*.py"):
        tree = ast.parse(path.read_text())
        strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        docs = {
            ast.get_docstring(n, clean=False)
            for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
        }
        names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        for word in [*names, *(s for s in strings if s not in docs)]:
            assert not FAMILIES.search(word), (path.name, word)


@pytest.mark.parametrize("code", ["import grounding, adapters", "import grounding; grounding.METHODS"])
def test_the_public_face_imports_no_torch(code):
    check = f"{code}; import sys; sys.exit(bool({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_one_place_crosses_to_original_pixels():
    """Only geometry samples maps at original pixels; nothing else interpolates or remaps."""
    for path in FILES:
        if path.name in ("geometry.py", "axes.py", "probe.py"):
            continue
        calls = {
            n.func.attr
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        }
        assert not calls & {"interpolate", "grid_sample", "remap", "warpAffine"}, path.name
