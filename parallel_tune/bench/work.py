"""The process that lays out the work: the rows of each step, for counting and for a reference command.

python -m parallel_tune.bench.work FOLDER STEPS < config.yaml
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from parallel_tune.config import TrainConfig, make_config
from parallel_tune.process import importing
from parallel_tune.rundir import write_atomically
from strategies.errors import ConfigError

STEPS, ROWS = "steps.json", "rows.jsonl"


@dataclass(frozen=True)
class Work:
    """What every arm does.

    Attributes:
        row_lengths: tokens of each row of each step.
        rows: a file with the rows' texts in the order of the steps, a `{"text": ...}` a line.
    """

    row_lengths: list[list[int]]
    rows: Path

    @property
    def tokens(self) -> list[int]:
        """Tokens of each step."""
        return [sum(lengths) for lengths in self.row_lengths]


def lay_out(config: TrainConfig, steps: int, folder: Path) -> Work:
    """Read the dataset in a process of its own, so that this one stays light.

    Raises:
        ConfigError: the dataset or the tokenizer cannot be read.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "parallel_tune.bench.work", str(folder), str(steps)],
        input=config.to_yaml(),
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    found = folder / STEPS
    if not found.exists():
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise ConfigError(f"the rows of {config.data_source} could not be read: {last}", "Check --dataset and --model.")
    said = json.loads(found.read_text(encoding="utf-8"))
    if "message" in said:
        raise ConfigError(said["message"], said["hint"])
    return Work(said["row_lengths"], folder / ROWS)


def main() -> None:
    """Write the steps' row lengths and texts, or what is wrong."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    config = make_config(yaml.safe_load(sys.stdin))
    try:
        lengths, texts = steps_of(config, steps)
        write_atomically(folder / ROWS, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        said: dict[str, Any] = {"row_lengths": lengths}
    except ConfigError as error:
        said = {"message": error.message, "hint": error.hint}
    write_atomically(folder / STEPS, json.dumps(said))


def steps_of(config: TrainConfig, steps: int) -> tuple[list[list[int]], list[str]]:
    """Row lengths of each step, and all their texts. The texts lack what tokenizers add at both ends: BOS and EOS."""
    from parallel_tune.data.prepare import prepare_data
    from parallel_tune.engines.transformers import load_tokenizer
    from parallel_tune.sampler import GlobalBatches

    with importing():
        tokenizer = load_tokenizer(config)
    rows, _, _ = prepare_data(config, tokenizer)
    assert config.global_batch_size is not None
    batches = GlobalBatches(tuple(rows.lengths), (), config.global_batch_size, config.seed)
    each = rows.row_lengths
    lengths, texts = [], []
    for step in range(steps):
        ids = batches.sample_ids(step)
        lengths.append([length for sample in ids for length in each[sample]])
        for sample in ids:
            tokens, start = rows[sample]["input_ids"], 0
            for length in each[sample]:
                texts.append(_text(tokens[start : start + length], tokenizer))
                start += length
    return lengths, texts


def _text(tokens: list[int], tokenizer: Any) -> str:
    first = 1 if tokens[0] == tokenizer.bos_token_id else 0
    last = -1 if tokens[-1] == tokenizer.eos_token_id else None
    text: str = tokenizer.decode(tokens[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


if __name__ == "__main__":
    main()
