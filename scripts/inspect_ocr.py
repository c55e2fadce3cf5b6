"""Show for each token that an OCR model generated where in the image it was read.

python scripts/inspect_ocr.py
python scripts/inspect_ocr.py --image line.png --model microsoft/trocr-base-printed
python scripts/inspect_ocr.py --text 'Total $12.60'       why was this text not generated?
python scripts/inspect_ocr.py --contrast 5 6              why a 5 and not a 6?
python scripts/inspect_ocr.py --tokens @0 --where z       is there a z anywhere, at the first position?
"""

from __future__ import annotations

import argparse
import sys

from grounding.cli import ocr, options
from grounding.cli.main import parse, run
from grounding.cli.report import Report


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ocr.reading_options(made)
    options.image_options(made)
    options.model_options(made)
    options.explain_options(made)
    options.figure_options(made)
    options.output_options(made)
    return made


def inspect(args: argparse.Namespace) -> int:
    """Explain every image. A failure on one image is one line and the exit code; the others are still explained."""
    from adapters import load
    from grounding.core.demo import demo_line, demo_model
    from grounding.core.errors import OptionError
    from grounding.core.images import open_image
    from grounding.engine.explain import explain_request
    from grounding.engine.layers import list_layers
    from grounding.explanation.text_table import layer_table

    if args.revision and not args.model:
        raise OptionError("--revision needs --model")
    images = args.image or [str(demo_line())]
    folders = options.output_folders(args, images, demo="demo-trocr")
    text, request = ocr.reading_request(args, options.request_of(args))
    report = Report(args, several=len(images) > 1)
    adapter = load(args.model or str(demo_model("trocr")), device=args.device, dtype=args.dtype, revision=args.revision)
    if not adapter.generates:
        raise OptionError(f"{adapter.info.type} generates no text: use scripts/ground.py with --caption")
    if args.list_layers:
        print(layer_table(list_layers(adapter, images[0], "a", args.target)))
        return 0
    for image, folder in zip(images, folders, strict=True):
        with report.guarded(image, own_text=args.text is None):
            opened = open_image(image, **options.image_keywords(args))
            found = explain_request(adapter, opened, text, request)
            report.add(found, folder, options.inspected(args, adapter, opened, text, request))
    return report.end()


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 failed, 2 wrong option or text, 130 interrupted."""
    return run(inspect, parse(parser(), argv))


if __name__ == "__main__":
    sys.exit(main())
