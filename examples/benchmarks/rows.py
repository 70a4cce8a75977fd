"""Rows of text as long as fine-tuning data's: `python examples/benchmarks/rows.py MODEL FILE COUNT [TOKENS]`.

Without TOKENS the lengths are those of short instructions and answers (about 110 tokens on average, most between 50
and 250); with it every row has at least so many, to be cut there.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

DATASET = Path(__file__).parents[1] / "short_answers.jsonl"
MEDIAN_TOKENS, SPREAD, SHORTEST, LONGEST = 95, 0.5, 24, 512


def make_rows(model: str, path: Path, count: int, tokens: int | None = None, seed: int = 0) -> Path:
    """Write `count` rows of example sentences, cut at lengths drawn by the seed, as JSONL with one column "text"."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sentences = [" ".join(json.loads(line).values()) for line in DATASET.read_text().splitlines()]
    draws = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            wanted = tokens or round(min(LONGEST, max(SHORTEST, draws.lognormvariate(0, SPREAD) * MEDIAN_TOKENS)))
            ids: list[int] = []
            while len(ids) < wanted:
                ids += tokenizer(draws.choice(sentences) + "\n", add_special_tokens=False)["input_ids"]
            text = tokenizer.decode(ids if tokens else ids[:wanted])
            file.write(json.dumps({"text": text}) + "\n")
    return path


if __name__ == "__main__":
    make_rows(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
