"""Batch runs in this process: a small data set, a run of it, and what two runs have in common."""

import csv
import json
from dataclasses import fields

from grounding.batch.config import RunConfig, RunDescription
from grounding.batch.executors import LocalExecutor
from grounding.batch.progress import Progress
from grounding.batch.rows import RunMetadata, deduplicate_shared_maps, explained, failed
from grounding.batch.run import run_batch
from grounding.datasets.subset import chosen_ids
from grounding.engine.request import Request
from tests.conftest import noise
from tests.support import models
from tests.support.explanations import explanation

CAPTIONS = ("a man in a red jacket", "two dogs playing on the green grass", "red car and red bus")


def listing(folder, rows):
    """captions.txt as the release has it."""
    with (folder / "captions.txt").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])


def data(folder, count=5, captions=CAPTIONS[:2]):
    """A data set of `count` pictures, each with these captions."""
    (folder / "Images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(40 + i, 30, seed=i).save(folder / "Images" / f"{i}.png")
    listing(folder, [(f"{i}.png", text) for i in range(count) for text in captions])
    return folder


class Counting:
    """Makes an adapter, and knows how often; `seen` are the pictures that it was shown."""

    def __init__(self, adapter=None):
        self.adapter, self.loads, self.seen = adapter or models.clip_adapter(), 0, []
        see = self.adapter.prepare_images

        def counted(images):
            self.seen += [str(getattr(image, "path", image)).rpartition("/")[2] for image in images]
            return see(images)

        self.adapter.prepare_images = counted

    def __call__(self):
        self.loads += 1
        return self.adapter


def work(folder, **changed):
    """What is computed: in this process, one thread, two pictures a shard."""
    settings = {"methods": ("gradcam", "rollout"), "workers": 0, "threads": 1, "shard_size": 2, "batch_size": 2}
    settings |= changed
    names = {field.name for field in fields(Request)} & settings.keys()
    request = Request(**{name: settings.pop(name) for name in names})
    return RunConfig(data=str(folder), request=request, **settings)


def run(output, what, load=None, *, limit=None, drawn=None, **options):
    """Begin or resume a run."""
    load = load or Counting()
    dataset = what.dataset() if "dataset" not in options else options.pop("dataset")
    ids = chosen_ids(dataset, limit, drawn, 0)
    return run_batch(output, what, dataset, ids, LocalExecutor(load, what, lambda _rows, _images: None), **options)


def rows(folder):
    """All rows of a finished run."""
    return [row for own in folder.images() for row in own]


def statuses(folder):
    """Status by id."""
    return {row["id"]: row["status"] for row in rows(folder)}


def content(path):
    """The bytes of a run's files; of sidecars and the manifest what does not tell the time or the folder."""
    found = {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".json":
            said = json.loads(file.read_bytes())
            found[file.name] = {name: value for name, value in said.items() if name != "seconds"}
        elif file.is_file() and file.name != "run.lock":
            found[file.name] = file.read_bytes()
    return found


def leftovers(path):
    """Files that were being written."""
    return [p.name for p in path.iterdir() if ".tmp-" in p.name]


# ---------------------------------------------------------------- without a model


MADE = explanation()


def about(made):
    """What rows of explanations like this one have in common."""
    names = ("method", "title", "layer", "options", "signed", "text_conditioned")
    methods = {key: {name: getattr(column, name) for name in names} for key, column in made.methods.items()}
    return RunMetadata(methods, made.target, made.token_target, dict(made.model), plain(made.provenance))


ABOUT = about(MADE)


class Executor:
    """Commits rows that are made beforehand; `done` are the shards it was asked for."""

    def __init__(self, fails=(), **fingerprint):
        self.done, self.described, self.fails = [], 0, fails
        self.fingerprint = {"shard_size": 2, "max_pixels": 100, **fingerprint}

    def describe(self, ids):
        self.described += 1
        return RunDescription(self.fingerprint, ABOUT, 1)

    def compute(self, run, shards, retry):
        for shard in shards:
            self.done.append(shard)
            yield run.commit(shard, self.rows(run, shard), 0.5)

    def rows(self, run, shard):
        made = []
        for name in run.members(shard):
            made.append(explained(name, 0, MADE, {}))
            bad = failed(name, 1, "x", "failed_model", "why") if name in self.fails else explained(name, 1, MADE, {})
            made.append(bad)
        deduplicate_shared_maps(made, ABOUT.shared)
        return made


class Heard(Progress):
    """Remembers what it is told."""

    def __init__(self):
        self.said, self.todo, self.images = [], None, None

    def begins(self, run, todo, images):
        self.todo, self.images = list(todo), images

    def damaged(self, path):
        self.said.append(path.name)


def driven(tmp_path):
    """A function that begins or resumes a run of five pictures in three shards."""
    what = RunConfig(data=str(data(tmp_path / "data", 5)))
    dataset = what.dataset()

    def go(folder="run", hands=None, **options):
        return run_batch(tmp_path / folder, what, dataset, dataset.ids, hands or Executor(), **options)

    return go
