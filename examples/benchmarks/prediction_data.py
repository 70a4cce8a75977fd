"""Rows of text for examples/benchmarks/prediction.py, as long as its runs want them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from prediction_rows import Row

DATASET = Path(__file__).parents[1] / "short_answers.jsonl"
SHORT_WORDS, SHORT_SPREAD = 90, 0.5
LONG_ROWS = 1
"""Of a step of mixed data so many rows are as long as is let through: the longest size is recorded in the second."""
PACKED_ROWS = 6
"""Rows to write for each thousand tokens of packed data: enough to fill them."""


def write_data(row: Row, path: Path) -> Path:
    """As JSON lines with a column "text"; a word is a token at least."""
    words = " ".join(" ".join(json.loads(line).values()) for line in DATASET.read_text().splitlines()).split()
    draw = random.Random(f"{row.shape} {row.tokens} {row.rows} {row.data}")
    count = row.samples
    if "--packing" in row.options:
        count = row.samples * row.tokens * PACKED_ROWS // 1000 + row.samples
    lengths = [_words(row, number, draw) for number in range(count)]
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=length))}) + "\n" for length in lengths))
    return path


def _words(row: Row, number: int, draw: random.Random) -> int:
    if row.data == "full" or (row.data == "mixed" and number < LONG_ROWS):
        return row.tokens
    return max(12, min(row.tokens, round(draw.lognormvariate(0, SHORT_SPREAD) * SHORT_WORDS)))
