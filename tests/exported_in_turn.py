"""Several exports of a run, each by a process of its own, whose libraries are imported once: it forks for each.

python exported_in_turn.py RUN_DIRECTORY < [{"wanted": ..., "card": ..., "environment": ..., "folder": ...}, ...]
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from parallel_tune import export_worker
from parallel_tune.export import Export, unfinished
from parallel_tune.process import die_with_parent, importing, redirect_output

TIMEOUT_SECONDS = 600
"""Only so that a hang ends."""


@dataclass(frozen=True)
class Asked:
    """One export.

    Attributes:
        folder: it works there.
        environment: its own variables beside those of all.
    """

    wanted: Export
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)


def exported_in_turn(run: Path, asked: list[Asked], environment: dict[str, str]) -> list[dict[str, Any]]:
    """What the worker of each export said of its end, with its log; all of them have said something."""
    for one in asked:
        unfinished(Path(one.wanted.save_path)).mkdir(parents=True)
    told = json.dumps([asdict(one) | {"card": "its card"} for one in asked], default=str)
    done = subprocess.run(
        [sys.executable, __file__, str(run)], input=told, env=environment | {"PYTHONSAFEPATH": "1"},
        capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(asked), said
    return said


def main(run: Path) -> None:
    """Export as stdin says, and say how each ended."""
    die_with_parent()
    asked = json.load(sys.stdin)
    with importing():
        import peft  # noqa: F401  # what every export begins with

    said, log = run / "logs" / "export.json", run / "logs" / "in-turn.log"
    for one in asked:
        said.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            export(run, one, log)
        os.waitpid(process, 0)
        assert said.exists(), log.read_text()
        print(json.dumps(json.loads(said.read_text()) | {"log": log.read_text()}))


def export(run: Path, asked: dict[str, Any], log: Path) -> NoReturn:
    """As `parallel-tune export` has it done."""
    die_with_parent()
    os.environ.update(asked.pop("environment"))
    os.chdir(asked.pop("folder"))
    sys.stdin = io.StringIO(json.dumps(asked))
    redirect_output(log)
    export_worker.main([str(run)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
