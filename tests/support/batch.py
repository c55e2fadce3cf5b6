"""Batch runs in this process: small data sets, runs of them with or without a model, and comparison of two runs."""

import csv
import json
from dataclasses import fields

from grounding.batch.config import RunConfig, RunDescription
from grounding.batch.executors import LocalExecutor
from grounding.batch.progress import Progress
from grounding.batch.rows import RunMetadata, deduplicate_shared_maps, failed_row, to_row
from grounding.batch.run import run_batch
from grounding.datasets.subset import chosen_ids
from grounding.engine.request import Request
from grounding.explanation.serialization import to_builtin
from tests.support import models
from tests.support.explanations import explanation
from tests.support.images import noise

CAPTIONS = ("a man in a red jacket", "two dogs playing on the green grass", "red car and red bus")


def listing(folder, rows):
    """Write captions.txt in the layout of the Flickr30k release."""
    with (folder / "captions.txt").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])


def data(folder, count=5, captions=CAPTIONS[:2]):
    """Write a data set of `count` images, each with these captions; return its folder."""
    (folder / "Images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(40 + i, 30, seed=i).save(folder / "Images" / f"{i}.png")
    listing(folder, [(f"{i}.png", text) for i in range(count) for text in captions])
    return folder


class Counting:
    """Load an adapter; count `loads`, and list the file names of the images it prepares in `seen`."""

    def __init__(self, adapter=None):
        self.adapter, self.loads, self.seen = adapter or models.clip_adapter(), 0, []
        prepare_images = self.adapter.prepare_images

        def counted(images):
            self.seen += [str(getattr(image, "path", image)).rpartition("/")[2] for image in images]
            return prepare_images(images)

        self.adapter.prepare_images = counted

    def __call__(self):
        self.loads += 1
        return self.adapter


def run_config(folder, **changed):
    """The configuration of a run in this process: one thread, two images per shard."""
    settings = {"methods": ("gradcam", "rollout"), "workers": 0, "threads": 1, "shard_size": 2, "batch_size": 2}
    settings |= changed
    names = {field.name for field in fields(Request)} & settings.keys()
    request = Request(**{name: settings.pop(name) for name in names})
    return RunConfig(data=str(folder), request=request, **settings)


def run(output, config, load=None, *, limit=None, **options):
    """Begin or resume a run in this process; return its folder."""
    dataset = config.dataset()
    ids = chosen_ids(dataset, limit, None, 0)
    executor = LocalExecutor(load or Counting(), config, lambda _rows, _images: None)
    return run_batch(output, config, dataset, ids, executor, **options)


def rows(folder):
    """All rows of a run."""
    return [row for own in folder.images() for row in own]


def statuses(folder):
    """Status of each row, by id."""
    return {row["id"]: row["status"] for row in rows(folder)}


def content(path):
    """The files of a run by name: JSON documents without their times, all others as bytes."""
    found = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".json":
            document = json.loads(file.read_bytes())
            found[file.name] = {name: value for name, value in document.items() if name != "seconds"}
        elif file.is_file() and file.name != "run.lock":
            found[file.name] = file.read_bytes()
    return found


def leftovers(path):
    """Names of temporary files."""
    return [p.name for p in path.iterdir() if ".tmp-" in p.name]


# ---------------------------------------------------------------- without a model


MADE = explanation()


def metadata_of(made):
    """The metadata of a run whose explanations are like this one."""
    names = ("method", "title", "layer", "options", "signed", "text_conditioned")
    methods = {key: {name: getattr(method, name) for name in names} for key, method in made.methods.items()}
    return RunMetadata(methods, made.target, made.token_target, dict(made.model), to_builtin(made.provenance))


METADATA = metadata_of(MADE)


class Executor:
    """Commit rows without a model: two captions per image, the second failed for the ids in `failing`.

    `done` are the shards it committed, `described` counts its descriptions of the run.
    """

    def __init__(self, failing=(), **fingerprint):
        self.done, self.described, self.failing = [], 0, failing
        self.fingerprint = {"shard_size": 2, "max_pixels": 100, **fingerprint}

    def describe(self, ids):
        self.described += 1
        return RunDescription(self.fingerprint, METADATA, 1)

    def compute(self, run, shards, retry):
        for shard in shards:
            self.done.append(shard)
            yield run.commit(shard, self.rows(run, shard), 0.5)

    def rows(self, run, shard):
        made = []
        for name in run.members(shard):
            made.append(to_row(name, 0, MADE, {}))
            failed = name in self.failing
            made.append(failed_row(name, 1, "x", "failed_model", "why") if failed else to_row(name, 1, MADE, {}))
        deduplicate_shared_maps(made, METADATA.shared)
        return made


class RecordedProgress(Progress):
    """Record the calls: `shards` and `images` to compute, names of the `damaged` tables."""

    def __init__(self):
        self.damaged, self.shards, self.images = [], None, None

    def on_start(self, run, shards, images):
        self.shards, self.images = list(shards), images

    def on_damaged(self, path):
        self.damaged.append(path.name)


def modelless(tmp_path):
    """A function that begins or resumes a run of five images in three shards, without a model."""
    config = RunConfig(data=str(data(tmp_path / "data", 5)))
    dataset = config.dataset()

    def go(folder="run", executor=None, **options):
        return run_batch(tmp_path / folder, config, dataset, dataset.ids, executor or Executor(), **options)

    return go
