"""House rules that a machine can check: import order, package sizes, lazy tables, imports of scripts."""

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
# The packages of `grounding`, lowest first. Each imports itself and those before it only.
# `testing`, a module for users, imports any of them; nothing imports it.
LADDER = ("core", "adapter", "methods", "explanation", "engine", "datasets", "batch", "evaluation", "cli", "testing")
# Narrower than the ladder.
ALLOWED = {"datasets": {"core"}, "adapters": {"core", "adapter"}}
# The tables that name modules by string: the only ways round the ladder.
TABLES = {
    "grounding": "the public face",
    "grounding.explanation.views": "VIEWS",
    "grounding.methods": "METHODS",
    "adapters.table": "ADAPTERS",
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}


def imports(path):
    """Modules of ours that a file imports: at module level, in functions and for type checking alike."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules if len(submodules) == len(node.names) else submodules | {str(node.module)}
    return {name for name in found if name.split(".")[0] in PACKAGES}


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def package_of(module):
    """`core` of `grounding.core.text`, `adapters` of all adapters, `` of the public face."""
    first, _, rest = module.partition(".")
    return first if first == "adapters" else rest.partition(".")[0]


def test_the_graph_was_found():
    assert len(MODULES) > 100
    assert sum(map(len, GRAPH.values())) > 500
    assert {package_of(name) for name in MODULES} == {"", "adapters", *LADDER}


def test_packages_import_downwards():
    offenders = []
    for name, others in GRAPH.items():
        own = package_of(name)
        # The public face is above all packages of `grounding`.
        below = ALLOWED.get(own) or set(LADDER[: LADDER.index(own)] if own in LADDER else LADDER)
        offenders += [f"{name} -> {other}" for other in sorted(others) if package_of(other) not in below | {own}]
    assert offenders == []
    assert not [name for name, others in GRAPH.items() if "grounding.testing" in others]


def test_imports_have_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in GRAPH:
            return
        path.append(name)
        for other in sorted(GRAPH[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in GRAPH:
        visit(name)


def test_packages_are_of_a_size_to_overlook():
    """A sub-package counts by itself."""
    for name in LADDER[:-1]:
        count = len([p for p in (ROOT / "grounding" / name).glob("*.py") if p.name != "__init__.py"])
        assert 5 <= count <= 16, (name, count)


def test_four_tables_name_modules_by_string():
    dotted = re.compile(r"(grounding|adapters)(\.[a-z_0-9]+)+(:\w+)?")
    formats = {"grounding.run", "grounding.explanation", "grounding.evaluation"}  # of stored files
    groups = {"grounding.adapters", "grounding.methods"}  # of entry points
    found = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if dotted.fullmatch(text) and text not in formats | groups:
                found.add(name)
    assert found == TABLES.keys()


def test_modules_are_imported_by_name_in_two_places():
    users = {name for name, path in MODULES.items() if re.search(r"import_module|__import__", path.read_text())}
    assert users == {"grounding", "grounding.core.registry"}


# Architectures and module paths of theirs. "clip" alone is a word of arithmetic, and the demo model's folder.
FAMILIES = re.compile(
    r"CLIP|Clip[A-Z]|clip_model|(?i:flava|trocr|siglip|blip|convnext|donut|llava|vilt|dinov2)|_model\."
)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_submodule_imports_from_its_package_root(package):
    faces = {name for name, path in MODULES.items() if path.name == "__init__.py" and name.split(".")[0] == package}
    assert faces
    offenders = [
        f"{name} -> {face}" for name, others in GRAPH.items() for face in others & faces if name.startswith(f"{face}.")
    ]
    assert offenders == []


def test_scripts_only_parse_call_and_print():
    heavy = ("torch", "transformers", "numpy")
    scripts = [path for path in (ROOT / "scripts").glob("*.py") if path.name != "__init__.py"]
    assert len(scripts) >= 5
    for path in scripts:
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
            assert not FAMILIES.search(word.replace("Grad-ECLIP", "")), (path.name, word)  # the title of a method


@pytest.mark.parametrize("code", ["import grounding, adapters", "import grounding; grounding.METHODS"])
def test_the_public_face_imports_no_torch(code):
    check = f"{code}; import sys; sys.exit(bool({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_one_place_crosses_to_original_pixels():
    """Only geometry samples maps at original pixels; nothing else interpolates or remaps."""
    for path in FILES:
        if path.name in ("geometry.py", "geometry_probe.py"):
            continue
        calls = {
            n.func.attr
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        }
        assert not calls & {"interpolate", "grid_sample", "remap", "warpAffine"}, path.name


def test_no_test_imports_another_test():
    tests = list((ROOT / "tests").rglob("test_*.py"))
    assert len(tests) > 50
    pattern = re.compile(r"^\s*(?:from tests[\w.]*\.test_\w+ import|from tests[\w.]* import .*\btest_)", re.M)
    assert [str(path.relative_to(ROOT)) for path in tests if pattern.search(path.read_text())] == []
