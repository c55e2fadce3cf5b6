"""Show which parts of an image a model's score of a caption, or of a class, depends on.

python scripts/ground.py --caption "man in red jacket"
python scripts/ground.py --image photo.jpg --model openai/clip-vit-base-patch16 --caption "a dog on a sofa"
python scripts/ground.py --image shark.jpg --model microsoft/resnet-34 --target-class hammerhead
"""

from __future__ import annotations

import argparse
import sys

from grounding.cli import options
from grounding.cli.main import parse, run
from grounding.cli.report import Report, warn_unread


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--caption",
        metavar="TEXT",
        help="the text to ground (default: the text that the model generates, if it can; a target may need none)",
    )
    options.image_options(made)
    options.model_options(made)
    options.explain_options(made)
    options.figure_options(made)
    options.output_options(made)
    return made


def ground(args: argparse.Namespace) -> int:
    """Explain every image. A failure on one image is one line and the exit code; the others are still explained."""
    from adapters import load
    from grounding.core.demo import demo_image
    from grounding.core.errors import OptionError, TextError
    from grounding.core.images import open_image
    from grounding.core.text import check_text
    from grounding.engine.explain import explain_request
    from grounding.engine.layers import list_layers
    from grounding.engine.queries import needs_text
    from grounding.explanation.text_table import layer_table

    if args.caption is None and not (args.list_layers or args.model or args.target):
        classes = ", or --model of a classifier" if args.target_class else ""
        raise TextError(f"nothing to ground: give --caption TEXT{classes}")
    caption = None if args.caption is None else check_text(args.caption)
    if args.revision and not args.model:
        raise OptionError("--revision needs --model")
    images = args.image or [str(demo_image())]
    folders = options.output_folders(args, images)
    request = options.request_of(args)
    report = Report(args, several=len(images) > 1)
    adapter = load(args.model, device=args.device, dtype=args.dtype, revision=args.revision)
    if args.list_layers:
        print(layer_table(list_layers(adapter, images[0], caption, request.target)))
        return 0
    if caption is None and needs_text(adapter, request.target):
        raise TextError("nothing to ground: this model generates no text, give --caption TEXT")
    if not args.quiet:
        warn_unread(args, adapter)
    for image, folder in zip(images, folders, strict=True):
        with report.guarded(image, own_text=caption is None):
            opened = open_image(image, **options.image_keywords(args))
            found = explain_request(adapter, opened, caption, request)
            report.add(found, folder, options.inspected(args, adapter, opened, caption, request))
    return report.end()


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 failed, 2 wrong option or text, 130 interrupted."""
    return run(ground, parse(parser(), argv))


if __name__ == "__main__":
    sys.exit(main())
