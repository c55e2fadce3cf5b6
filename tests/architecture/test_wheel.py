"""What is installed: the wheel alone, in a folder of its own, explains the default picture with the default model."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, grounding, adapters
from grounding import explain
from grounding.core.demo import demo_image
assert grounding.__file__.startswith(sys.argv[1]), grounding.__file__
assert adapters.__file__.startswith(sys.argv[1]), adapters.__file__
assert str(demo_image()).startswith(sys.argv[1]), demo_image()
found = explain(adapters.load(), demo_image(), "man in red jacket")
assert not any("cartoon" in warning for warning in found.warnings), found.warnings
print(sorted(path.name for path in found.save("out").values()))
"""


@pytest.mark.slow
def test_the_wheel_works_from_any_folder(tmp_path):
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    [wheel] = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"grounding", "adapters"}
    assert wheel.stat().st_size < 8 * 2**20
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site)],
        cwd=elsewhere,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "['explanation.json', 'figure.png', 'maps.npz']"
