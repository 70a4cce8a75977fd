"""How torch's memory allocator is set up in processes that train: its segments grow, unless the user says otherwise.

Freed blocks of a segment that grows can serve a larger tensor later, so that little is held beyond live tensors, and
what is held can be predicted. torch reads the variable when its allocator is first used, so it has to be there before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Any of them is a user's own set-up, which stays as it is."""
SETTING = "expandable_segments"
TEGRA_FILE = Path("/etc/nv_tegra_release")


def allocator_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment; nothing where the user has set the allocator up, or segments cannot grow."""
    if any(environ.get(name) for name in VARIABLES) or not _can_grow(environ):
        return {}
    return {VARIABLES[0]: f"{SETTING}:True"}


def segments_grow(environ: Mapping[str, str]) -> bool:
    """Whether they do in the processes that are started from this environment."""
    words = ",".join(value for name, value in {**environ, **allocator_variables(environ)}.items() if name in VARIABLES)
    return f"{SETTING}:true" in words.lower().replace(" ", "")


def _can_grow(environ: Mapping[str, str]) -> bool:
    # The driver calls that growing is made of do not work under Windows' Linux and on Tegra boards.
    windows = bool(environ.get("WSL_DISTRO_NAME")) or "microsoft" in os.uname().release.lower()
    return not windows and not TEGRA_FILE.exists()
