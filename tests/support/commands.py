"""Run the scripts as a user does, in this process: exit code, stdout, stderr."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "ground.py"


def script(path=SCRIPT):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(module, argv, capsys):
    """Exit code, stdout and stderr of a script's main; never a traceback."""
    try:
        code = module.main([str(a) for a in argv])
    except SystemExit as error:  # argparse
        code = error.code
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return code, out.out, out.err
