"""Ground every caption of every image of a data set, in a batch run that resumes after any interruption.

python scripts/ground_flickr30k.py
python scripts/ground_flickr30k.py --data flickr30k --model openai/clip-vit-base-patch16 --output runs/flickr30k
python scripts/ground_flickr30k.py --data flickr30k --random 10
python scripts/ground_flickr30k.py --output runs/flickr30k --status
python scripts/ground_flickr30k.py --output runs/flickr30k --render png --random 10
accelerate launch scripts/ground_flickr30k.py --data flickr30k --output runs/flickr30k
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from grounding.cli import batch
from grounding.cli.main import parse, run


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    batch.add_options(made)
    return made


def load(*args: Any, **options: Any) -> Any:
    """Return `adapters.load(...)`, imported only when a model is needed."""
    import adapters

    return adapters.load(*args, **options)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 failed, 2 wrong option or the folder holds another run, 3 done but rows failed,
    4 stopped because too many rows failed, 130 or 143 interrupted."""
    return run(partial(batch.ground, load=load), parse(parser(), argv))


if __name__ == "__main__":
    sys.exit(main())
