"""Cost of batch runs end to end: decode, preprocess, 5 captions with all tokens by Grad-CAM and rollout, write shards.

A CLIP of ViT-B/16's size with random weights, on JPEGs of 500 x 375 pixels, decoded in one worker process. The ratio is
CPU time of the main process, all its threads, divided by that of the bare image tower on the same pixels in batches of
the same size, measured in the same process before and after each run. The text side (tokenization, text tower with all
leave-one-out variants) is timed separately. `peak_mb` is the peak memory of the main process, with the model;
`growth_after_100` is how much larger it is than the peak while the first 100 images were computed, as a fraction.
"""

from __future__ import annotations

import csv
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import clip
from benchmarks.meter import PeakMemory, no_progress, print_progress
from grounding.adapter.base import Adapter
from grounding.batch.config import BATCH_SIZE, RunConfig
from grounding.batch.executors import LocalExecutor
from grounding.batch.progress import Progress
from grounding.batch.run import run_batch

SIZES = "dataset"
UNIT = "the bare image tower on the same pixels"
MODEL = "CLIP ViT-B/16 size"
WIDTH, HEIGHT = 500, 375
# Images of the bare passes before and after a run.
SAMPLE = 3 * BATCH_SIZE
EARLY = 100


def measure(dataset: Sequence[int], repeats: int, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure one case per number of images, each run `repeats` times."""
    torch.set_num_threads(1)
    report = no_progress if quiet else print_progress
    adapter = clip.make_adapter()
    stopwatch = Stopwatch(adapter)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for count in dataset:
            home = Path(folder) / str(count)
            make_dataset(home, count)
            runs = []
            for number in range(repeats):
                report(f"{count} images, run {number + 1} of {repeats}")
                runs.append(_run(adapter, stopwatch, home, Path(folder) / f"run-{count}-{number}"))
            cases.append(_case(count, runs))
            report(f"{cases[-1]}")
    return cases


class Stopwatch:
    """CPU seconds spent in the text side of an adapter, whose methods it replaces by timed ones."""

    def __init__(self, adapter: Adapter) -> None:
        self.seconds = 0.0
        for name in ("prepare_texts", "targets"):
            setattr(adapter, name, self._timed(getattr(adapter, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.process_time() - started

        return timed


class Growth(Progress):
    """Records the peak memory while the first `EARLY` images are computed, as `early` in MB."""

    def __init__(self, memory: PeakMemory) -> None:
        self.memory, self.done, self.early = memory, 0, 0.0

    def on_shard(self, sidecar: dict[str, Any]) -> None:
        """Count a committed shard."""
        if self.done < EARLY:
            self.early = self.memory.mb
        self.done += sidecar["rows"] // clip.CAPTIONS


def make_dataset(home: Path, count: int) -> None:
    """Write noisy JPEGs with five captions each, in the layout of Flickr30k."""
    (home / "Images").mkdir(parents=True)
    with (home / "captions.txt").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(count):
            grains = np.random.default_rng(number).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
            Image.fromarray(grains).resize((WIDTH, HEIGHT)).save(home / "Images" / f"{number:05d}.jpg", quality=90)
            table.writerows([f"{number:05d}.jpg", caption] for caption in clip.captions())


def _run(adapter: Any, stopwatch: Stopwatch, home: Path, output: Path) -> dict[str, float]:
    config = RunConfig(str(home), threads=1)
    data = config.dataset()
    pixels = _pixels(adapter, data)
    before = _tower(adapter, pixels)
    stopwatch.seconds = 0.0
    cpu, wall = time.process_time(), time.perf_counter()
    executor = LocalExecutor(lambda: adapter, config, lambda _rows, _images: None)
    with PeakMemory() as memory:
        growth = Growth(memory)
        run_batch(output, config, data, data.ids, executor, progress=growth)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tower = statistics.mean([before, _tower(adapter, pixels)]) * len(data.ids)
    stored = sum(path.stat().st_size for path in output.glob("part-*"))
    return {
        "without": (cpu - stopwatch.seconds) / tower,
        "with": cpu / tower,
        "rate": len(data.ids) / wall,
        "peak": memory.mb,
        "growth": memory.mb / growth.early - 1,
        "stored": stored / len(data.ids),
    }


def _pixels(adapter: Any, data: Any) -> list[torch.Tensor]:
    """Return the preprocessed pixels of the first images, in batches."""
    chosen = [data.read(name).image for name in data.ids[:SAMPLE]]
    batches = [chosen[first : first + BATCH_SIZE] for first in range(0, len(chosen), BATCH_SIZE)]
    return [
        adapter.prepare_images([io.BytesIO(path.read_bytes()) for path in batch]).tensors["pixel_values"]
        for batch in batches
    ]


def _tower(adapter: Any, pixels: Sequence[torch.Tensor]) -> float:
    """Return CPU seconds per image."""
    started = time.process_time()
    with torch.inference_mode():
        for batch in pixels:
            adapter.model.get_image_features(pixel_values=batch)
    return (time.process_time() - started) / sum(map(len, pixels))


def _case(count: int, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "model": MODEL,
        "pictures": count,
        "ratio_to_tower": round(middle["without"], 3),
        "ratio_with_text": round(middle["with"], 3),
        "pictures_per_s": round(middle["rate"], 3),
        "peak_mb": round(max(run["peak"] for run in runs)),
        "growth_after_100": round(middle["growth"], 4),
        "stored_mb_per_1000": round(middle["stored"] / 1e3, 3),
    }
