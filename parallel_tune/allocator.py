"""How torch's memory allocator is set up in processes that train: its segments grow, unless the user says otherwise.

Freed blocks of a segment that grows can serve a larger tensor later, so that little is held beyond live tensors, and
what is held can be predicted. torch reads the variable when its allocator is first used, so it has to be there before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "PYTORCH_ALLOC_CONF"
OLDER_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
VARIABLES = (*OLDER_NAMES, VARIABLE)
"""torch takes the first that is there, and no other; an older name even if it is empty, and on any GPU. A user's own
set-up stays as it is."""
SETTING = "expandable_segments"
TEGRA_FILE = Path("/etc/nv_tegra_release")


def allocator_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment; nothing where the user has set the allocator up, or segments cannot grow."""
    if any(name in environ for name in OLDER_NAMES) or environ.get(VARIABLE) or not _can_grow(environ):
        return {}
    return {VARIABLE: f"{SETTING}:True"}


def segments_grow(environ: Mapping[str, str]) -> bool:
    """Whether they do in the processes that are started from this environment."""
    env = {**environ, **allocator_variables(environ)}
    words = next((env[name] for name in VARIABLES if name in env), "")
    return f"{SETTING}:True" in words.replace(" ", "")


def _can_grow(environ: Mapping[str, str]) -> bool:
    # The driver calls that growing is made of do not work under Windows' Linux and on Tegra boards.
    windows = bool(environ.get("WSL_DISTRO_NAME")) or "microsoft" in os.uname().release.lower()
    return not windows and not TEGRA_FILE.exists()
