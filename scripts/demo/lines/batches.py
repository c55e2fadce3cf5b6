"""Training batches of rendered lines, determined by batch number and difficulty."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from scripts.demo.lines.lines import resize_to_input, sample_line
from scripts.demo.lines.text import LONGEST

TRAIN_SEED = 20_303
EASIER = 0.15  # share of lines below the current difficulty, against forgetting


@dataclass
class LineBatch:
    """One training batch."""

    pixels: torch.Tensor  # (B, 3, 32, 256) uint8
    ids: torch.Tensor  # (B, T) bos, characters, eos, padding


def training_seed(number: int, row: int) -> str:
    """The seed of a line of the training stream."""
    return f"{TRAIN_SEED}/{number}/{row}"


def make_batch(number: int, size: int, difficulty: float, tokenizer: PreTrainedTokenizerFast) -> LineBatch:
    """Batch `number` of the training stream at a difficulty from 0 to 1; low difficulties have short lines."""
    rng = random.Random(training_seed(number, size))
    lines = []
    for row in range(size):
        level = difficulty * (rng.random() if rng.random() < EASIER else 1.0)
        longest = round(8 + (LONGEST - 8) * min(1.0, level / 0.15))
        lines.append(sample_line(training_seed(number, row), level, longest=longest))
    pixels = torch.from_numpy(np.stack([resize_to_input(line.image) for line in lines]))
    ids = tokenizer([line.text for line in lines], padding=True, return_tensors="pt")["input_ids"]
    return LineBatch(pixels.permute(0, 3, 1, 2).contiguous(), ids)
