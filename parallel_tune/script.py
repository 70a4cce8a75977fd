"""The process that runs a user's script: the guard, then the script as `python SCRIPT` would run it, then its outcome.

python -P -m parallel_tune.script RUN_DIRECTORY SCRIPT [ARGUMENT...]

Nothing here may import `strategies`: the script may have a package of that name.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from parallel_tune import script_guard
from parallel_tune.outcome import Outcome, log_file, outcome_file, process_id_file, save, write_atomically
from parallel_tune.process import die_with_parent, leave, redirect_output, take_sigterm
from parallel_tune.script_placement import placement

MODEL_VARIABLE = "PARALLEL_TUNE_MODEL"
"""Names the model that the plan is for."""


def main(arguments: list[str]) -> NoReturn:
    """Run the script to its end and say how it ended. Never returns."""
    die_with_parent()
    logs, rank = Path(arguments[0]) / "logs", int(os.environ.get("RANK", "0"))
    redirect_output(log_file(logs, rank))
    write_atomically(process_id_file(logs, rank), str(os.getpid()))
    take_sigterm()
    # Whoever watches passes Ctrl-C on, whatever was ignored where it was started, as in a shell script's background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    take_device(os.environ)
    held: list[Any] = []
    outcome = run_script(arguments[1], arguments[2:], held)
    save(outcome_file(logs, rank), outcome)
    # What follows is the interpreter's exit without its end, in which a process group's threads can abort.
    atexit._run_exitfuncs()
    leave(outcome.code)


def take_device(environ: Mapping[str, str]) -> None:
    """Make this rank's GPU the current one: what the script imports, Unsloth above all, uses the first until then."""
    if int(environ.get("WORLD_SIZE", "1")) > 1 and environ.get("CUDA_VISIBLE_DEVICES"):
        import torch

        torch.cuda.set_device(int(environ["LOCAL_RANK"]))


def run_script(script: str, arguments: list[str], held: list[Any]) -> Outcome:
    """The outcome of a script run as `__main__`.

    Args:
        held: takes what must not be freed while the process lives: a process group's last reference can wait for ever.
    """
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    script_guard.install(placement(), os.environ.get(MODEL_VARIABLE))
    try:
        held.append(runpy.run_path(script, run_name="__main__"))
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        return Outcome(0)
    except script_guard.Refused as refused:
        held.append(refused)
        return Outcome(script_guard.COMBINED, refused.message, refused.hint)
    except SystemExit as left:
        held.append(left)
        return _outcome_of_exit(left.code)
    except BaseException as error:
        held.append(error)
        trace = _trace_of(error, script)
        print(trace, end="", file=sys.stderr)
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return Outcome(1, message, _line_of(error, script), trace)


def _outcome_of_exit(code: Any) -> Outcome:
    if code is None or code == 0:
        return Outcome(0)
    if not isinstance(code, int):
        print(code, file=sys.stderr)
    # A script's numbers are its own and would be misread as ours.
    return Outcome(1, f"the script left with sys.exit({code!r})")


def _trace_of(error: BaseException, script: str) -> str:
    """The traceback as the script's own run would print it: from its first frame on."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != script:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame or error.__traceback__))


def _line_of(error: BaseException, script: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script]
    if isinstance(error, SyntaxError) or not lines:
        return ""
    return f"At {script}:{lines[-1]}."


if __name__ == "__main__":
    main(sys.argv[1:])
