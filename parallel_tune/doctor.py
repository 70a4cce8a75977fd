"""`parallel-tune doctor`: what is here, and whether a run could start. Imports neither torch nor transformers."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from parallel_tune import __version__, refusal
from parallel_tune.cache import cache_folder
from parallel_tune.doctor_check import GIB, INSTALL, Check
from parallel_tune.hardware import available_memory_bytes
from parallel_tune.memory.lookup import hub_cache
from strategies.errors import ParallelTuneError
from strategies.registry import load_registry

LITTLE_DISK_BYTES = 20 * GIB
"""Less than this is soon full: a checkpoint of an 8B full fine-tune alone takes more."""


def examine(environ: Mapping[str, str], output_dir: Path) -> list[Check]:
    """Look at everything. Takes some seconds, since processes are started and must meet."""
    # Imported here: they need packages whose lack is the first thing to be said.
    try:
        from parallel_tune import doctor_machine, doctor_packages
    except ImportError as error:
        return [Check("packages", "problem", f"{error.name} is not installed", INSTALL)]

    looks: list[tuple[str, Callable[[], list[Check]]]] = [
        ("packages", lambda: doctor_packages.packages(bool(doctor_machine.cards()))),
        ("strategies", lambda: [*doctor_packages.shadows(Path.cwd()), *extensions()]),
        ("GPUs", lambda: doctor_machine.gpus(environ)),
        ("launcher", lambda: launcher(environ)),
        ("processes", lambda: doctor_machine.meeting(environ)),
        ("memory", memory),
        ("outputs", lambda: [outputs(output_dir)]),
        ("caches", caches),
        ("Hub", lambda: [hub(environ)]),
    ]
    return [check for name, look in looks for check in _safely(name, look)]


def _safely(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """What a user's mistake, or a file's rights, stop is a finding; the other looks go on."""
    try:
        return look()
    except ParallelTuneError as error:
        return [Check(name, "problem", error.message, error.hint)]
    except OSError as error:
        return [Check(name, "warning", f"could not be looked at: {error}", "See to the path that it names.")]


def is_ready(checks: Sequence[Check]) -> bool:
    """Whether a run could start."""
    return all(check.state != "problem" for check in checks)


def to_json(checks: Sequence[Check]) -> str:
    """One object: version, ready, checks."""
    found = {"version": __version__, "ready": is_ready(checks), "checks": [asdict(check) for check in checks]}
    return json.dumps(found, indent=2)


def render(checks: Sequence[Check]) -> str:
    """One screen."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 140))
    name_width = max(len(check.name) for check in checks)
    lines = [f"parallel-tune {__version__}", ""]
    for check in checks:
        state = "" if check.state in ("ok", "note") else check.state
        head = f"{state:<8} {check.name:<{name_width}}  "
        for text, first in ((check.said, head), (f"-> {check.hint}" if check.hint else "", " " * len(head))):
            lines += textwrap.wrap(
                text, width, initial_indent=first, subsequent_indent=" " * len(head), break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
    problems = sum(check.state == "problem" for check in checks)
    verdict = (
        f"{problems} problem{'s' if problems > 1 else ''} to solve before a run." if problems else "A run can start."
    )
    return "\n".join([*lines, "", verdict])


def extensions() -> list[Check]:
    """The strategies that are installed, and those that would not load."""
    registry = load_registry()
    warnings = [
        Check("strategies", "warning", warning, "Remove or repair that package.") for warning in registry.warnings()
    ]
    return [Check("strategies", "ok", ", ".join(registry.names())), *warnings]


def launcher(environ: Mapping[str, str]) -> list[Check]:
    """Whether another launcher has started this process.

    Raises:
        ParallelTuneError: its variables are incomplete.
    """
    launch = refusal.find_launch(environ)
    if launch is None:
        return []
    said = f"{launch.launcher} started this process, one of {launch.world_size}"
    return [Check("launcher", "note", said, "model_parallel needs one process alone.")]


def memory() -> list[Check]:
    """Main memory and processor cores."""
    cores = len(os.sched_getaffinity(0))
    return [Check("memory", "note", f"{available_memory_bytes() / GIB:.1f} GiB of main memory free, {cores} cores")]


def outputs(folder: Path) -> Check:
    """Whether run directories can be written, and how much fits."""
    place = _nearest(folder)
    hint = "Start from another folder, or give --output_dir."
    if not place.is_dir():
        return Check("outputs", "problem", f"{place} is no folder, so {folder} cannot be made", hint)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check("outputs", "problem", f"{place} cannot be written: {error.strerror}", hint)
    free = shutil.disk_usage(place).free
    said = f"{free / GIB:.0f} GiB free for runs in {folder.absolute()}"
    if free < LITTLE_DISK_BYTES:
        return Check("outputs", "warning", said, "Checkpoints may fill it; give --output_dir on another disk.")
    return Check("outputs", "ok", said)


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def caches() -> list[Check]:
    """Where things are kept between runs, and how large they are."""
    folders = (("cache", cache_folder()), ("models", hub_cache()))
    return [_cache(name, folder) for name, folder in folders]


def _cache(name: str, folder: Path) -> Check:
    if not folder.exists():
        place = _nearest(folder)
        if place.is_dir() and os.access(place, os.W_OK):
            return Check(name, "note", f"{folder}, not made yet")
        return Check(name, "warning", f"{folder} cannot be made: {place} cannot be written", _UNKEPT[name])
    said = f"{folder}, {size_bytes(folder) / GIB:.1f} GiB"
    if not os.access(folder, os.W_OK):
        return Check(name, "warning", f"{said}, cannot be written", _UNKEPT[name])
    return Check(name, "note", said)


_UNKEPT = {
    "cache": "What is found out is not kept; set XDG_CACHE_HOME to a folder that can be written.",
    "models": "Models and datasets cannot be fetched; set HF_HOME to a folder that can be written.",
}


def size_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed; what cannot be read is left out."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118  a cache has many files
            except OSError:
                continue
    return total


def hub(environ: Mapping[str, str]) -> Check:
    """Whether models may be fetched, from where, and with a login. The token itself is never looked at."""
    truth = {"1", "ON", "YES", "TRUE"}
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if environ.get(name, "").upper() in truth]
    parts = [f"offline ({' and '.join(offline)} set): only what is cached is found" if offline else "online"]
    if environ.get("HF_ENDPOINT"):
        # An address may hold a password.
        parts.append(f"models come from {urlsplit(environ['HF_ENDPOINT']).hostname or 'HF_ENDPOINT'}")
    set_token = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if environ.get(name)), None)
    stored = Path(environ.get("HF_TOKEN_PATH") or hub_home(environ) / "token").expanduser()
    if set_token:
        parts.append(f"a token is set in {set_token}")
    elif stored.is_file() and stored.stat().st_size:
        parts.append(f"a login is stored in {stored}")
    else:
        parts.append("no token: gated models and pushes need one")
    return Check("Hub", "note", "; ".join(parts))


def hub_home(environ: Mapping[str, str]) -> Path:
    """The Hub library's folder, by the variables that it reads itself."""
    cache_home = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("HF_HOME") or Path(cache_home) / "huggingface").expanduser()
