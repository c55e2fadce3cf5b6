"""Score maps against annotated boxes: of the object that a phrase names, or of the character that a token is.

python scripts/evaluate.py
python scripts/evaluate.py --data data/demo/lines --aimed
python scripts/evaluate.py --model openai/clip-vit-base-patch16 --data flickr30k_entities --captions all --peak pixel
python scripts/evaluate.py --run runs/entities --protocol mention-anybox chain-unionbox
"""

from __future__ import annotations

import argparse
import sys

from grounding.cli import evaluate, options
from grounding.cli.main import parse, run


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.model_options(made)
    group = made.add_argument_group("data")
    group.add_argument("--data", metavar="DIR", help="like Flickr30k Entities, or lines with labels.jsonl")
    group.add_argument("--split", help="as in <split>.txt or <split>/labels.jsonl (default: test)")
    group.add_argument("--run", metavar="DIR", help="a run of ground_flickr30k.py: score its maps, without the model")
    group.add_argument("--protocol", nargs="+", choices=evaluate.PROTOCOLS, help="of --run (default: all with maps)")
    group.add_argument("--captions", choices=["first", "all"], help="of which captions (default: first; --run: all)")
    group.add_argument("--min-entities", type=int, metavar="N", help="boxed entities an image needs (demo: 3; else 1)")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N images that qualify, or lines")
    group = made.add_argument_group("maps")
    group.add_argument("--methods", nargs="+", metavar="NAME", help="default: the model's; for lines, all available")
    group.add_argument("--target", help="the scalar to explain; an unknown name lists those of the model")
    group.add_argument("--layer", action="append", default=[], metavar="LAYER", help="as in ground.py; repeatable")
    group.add_argument("--option", action="append", default=[], metavar="METHOD.OPTION=VALUE", help="repeatable")
    group = made.add_argument_group("scores")
    group.add_argument("--peak", choices=["patch", "pixel"], help="strongest patch (default) or pixel")
    group.add_argument("--threshold", type=float, help="share of a map's range for its box (default: 0.5)")
    group.add_argument("--tune-threshold", action="store_true", help="choose it per method on the split val")
    group.add_argument("--faithfulness", action="store_true", help="deletion, insertion, sensitivity, randomisation")
    group.add_argument("--aimed", action="store_true", help="lines: also explain other characters there")
    group.add_argument("--baseline", choices=["blur", "black", "mean"], help="replaces removed patches (default: blur)")
    group = made.add_argument_group("output")
    group.add_argument("--format", choices=["text", "json"], default="text", help="Markdown tables, or JSON")
    group.add_argument("--output", metavar="FILE", help="also write the JSON document to this file")
    group.add_argument("-v", "--verbose", action="store_true", help="show the traceback of a failure")
    group.add_argument("-q", "--quiet", action="store_true", help="no warnings and no progress on stderr")
    # Each phrase is explained as a caption: options for parts of captions keep their defaults.
    parts = {"token_target": None, "tokens": [], "words": False, "phrase": []}
    made.set_defaults(**parts, average_layers=False, attention_layer=None, head=None, target_class=None)
    return made


def score(args: argparse.Namespace) -> int:
    """Score a model on a data set, print the scores and return the exit code; images that fail give warnings."""
    from adapters import load
    from grounding.core.demo import demo_model
    from grounding.evaluation import kinds, report

    loading = {"device": args.device, "dtype": args.dtype, "revision": args.revision}
    adapter = load(args.model, **loading) if args.model and not args.data else None  # its type decides which demo data
    kind = kinds.evaluation_of(args.data) if args.data else kinds.evaluation_for(adapter)
    config = kind.config_from({name: getattr(args, name) for name in kinds.OPTIONS})
    dataset = kind.open(args.data or kind.demo(), args.split)
    path = report.check_file(args.output) if args.output else None
    request = options.request_of(args)
    default = str(demo_model("trocr")) if kind.name == "lines" else None
    adapter = adapter or load(args.model or default, **loading)
    document = kind.score(adapter, dataset, config, request, progress=sys.stderr.isatty() and not args.quiet)
    return evaluate.print_report(args, document, [document], kind.markdown, path)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 failed, 2 invalid option, 130 interrupted."""
    args = parse(parser(), argv)
    return run(evaluate.score_run if args.run or args.protocol else score, args)


if __name__ == "__main__":
    sys.exit(main())
