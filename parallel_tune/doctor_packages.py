"""What is installed, against what this package says it needs."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from parallel_tune.doctor_check import INSTALL, Check
from parallel_tune.shadowing import find_shadow

OURSELVES = "parallel-tune"
UNSLOTH_EXTRA = "unsloth"


def packages(gpus: bool) -> list[Check]:
    """Python, the packages that a run needs, and Unsloth's.

    Args:
        gpus: GPUs are here, for which Unsloth is wanted.
    """
    try:
        about = importlib.metadata.metadata(OURSELVES)
        lines = importlib.metadata.requires(OURSELVES) or []
    except importlib.metadata.PackageNotFoundError:
        said = f"{OURSELVES} itself is not installed; torchrun cannot find its rendezvous"
        return [python(None), Check("packages", "problem", said, f"In its folder: {INSTALL}")]
    needed, of_unsloth = [], []
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed.append(requirement)
        elif requirement.marker.evaluate({"extra": UNSLOTH_EXTRA}):
            of_unsloth.append(requirement)
    return [python(about["Requires-Python"]), *required(needed), *optional(of_unsloth, gpus)]


def python(needs: str | None) -> Check:
    """This interpreter."""
    here = platform.python_version()
    if needs and not SpecifierSet(needs).contains(here, prereleases=True):
        return Check("Python", "problem", f"{here}, and {needs} is needed", "Make an environment with such a Python.")
    return Check("Python", "ok", here)


def required(requirements: Iterable[Requirement]) -> list[Check]:
    """Present ones in a line; each that is missing, or of a version that was never tried, in a line of its own."""
    present, checks = [], []
    for requirement in requirements:
        version = version_of(requirement.name)
        if version is None:
            checks.append(Check("packages", "problem", f"{requirement.name} is not installed", INSTALL))
        elif outside := _outside(requirement, version):
            checks.append(Check("packages", "warning", outside, f"`{INSTALL}` brings tested versions."))
        else:
            present.append(f"{requirement.name} {version}")
    return [Check("packages", "ok", ", ".join(present)), *checks]


def optional(requirements: Iterable[Requirement], gpus: bool) -> list[Check]:
    """Unsloth and what belongs to it: wanted where there are GPUs."""
    present, checks = [], []
    for requirement in requirements:
        version = version_of(requirement.name)
        if version is None:
            without = "4-bit and 8-bit optimizers" if requirement.name == "bitsandbytes" else "Unsloth's speed"
            said = f"{requirement.name} is not installed: runs go without {without}"
            hint = "pip install --no-deps -r constraints-unsloth.txt" if gpus else ""
            checks.append(Check("unsloth", "warning" if gpus else "note", said, hint))
        elif outside := _outside(requirement, version):
            checks.append(
                Check("unsloth", "warning", outside, "pip install --no-deps -r constraints-unsloth.txt")
            )  # fmt: skip
        else:
            present.append(f"{requirement.name} {version}")
    return [*([Check("unsloth", "ok", ", ".join(present))] if present else []), *checks]


def shadows(folder: Path) -> list[Check]:
    """Other packages named `strategies`: one that is imported in place of ours, or was installed over it."""
    shadow = find_shadow()
    if shadow is not None:
        said = f"another package named strategies, {shadow}, shadows ours"
        return [Check("strategies", "problem", said, "Take it off PYTHONPATH, or start from another folder.")]
    owners = sorted(set(importlib.metadata.packages_distributions().get("strategies", [])) - {OURSELVES})
    if owners:
        said = f"{', '.join(owners)} brings a package named strategies too: files of ours may be overwritten"
        return [Check("strategies", "problem", said, f"Keep them in separate environments, then {INSTALL}")]
    beside = folder / "strategies"
    ours = Path(__file__).resolve().parent.parent / "strategies"
    if beside.is_dir() and beside.resolve() != ours:
        said = f"{beside} is not ours; `python -m parallel_tune` here would take it, the command parallel-tune does not"
        return [Check("strategies", "note", said)]
    return []


def version_of(name: str) -> str | None:
    """A package's installed version, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _outside(requirement: Requirement, version: str) -> str:
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is outside what was tried, {requirement.specifier}"
