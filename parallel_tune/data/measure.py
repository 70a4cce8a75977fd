"""The process that reads a dataset for the plan: the lengths of its training rows.

python -m parallel_tune.data.measure FILE [--without-torch] < config.yaml

Tokenizers need no torch, whose import takes longer than all else here. A tokenizer that does need it cannot be loaded
without: then nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml

from parallel_tune.config import make_config
from parallel_tune.data.prepare import prepare_data
from parallel_tune.engines.transformers import load_tokenizer
from parallel_tune.outcome import write_atomically
from parallel_tune.process import WATCHER, die_with_parent, importing
from strategies.errors import ConfigError

WITHOUT_TORCH = "--without-torch"


def main() -> None:
    """Write the lengths, or what is wrong, as JSON."""
    watcher = os.environ.get(WATCHER)
    die_with_parent(int(watcher) if watcher is not None else None)
    config = make_config(yaml.safe_load(sys.stdin))
    if without_torch := WITHOUT_TORCH in sys.argv:
        sys.modules["torch"] = None  # type: ignore[assignment]  # which is how Python says that there is none
    try:
        try:
            with importing():
                tokenizer = load_tokenizer(config)
        except (ConfigError, ImportError) as error:
            if without_torch:
                sys.exit(str(error))
            raise
        rows, held_out, _ = prepare_data(config, tokenizer)
        said: dict[str, object] = {"lengths": rows.lengths}
        said["longest_held_out"] = max(held_out.lengths) if held_out is not None else 0
    except ConfigError as error:
        said = {"message": error.message, "hint": error.hint}
    write_atomically(Path(sys.argv[1]), json.dumps(said))


if __name__ == "__main__":
    main()
