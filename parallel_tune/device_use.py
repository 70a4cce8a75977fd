"""What a training process has in use on its GPUs, by NVML, so that a desktop or another run there is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from parallel_tune.hardware import probe_details
from parallel_tune.nvml import own_bytes, used_bytes
from strategies.errors import ConfigError

Whose = Literal["process", "card less others", "card"]


@dataclass(frozen=True)
class CardUse:
    """Figures of the visible GPUs, before and after.

    Attributes:
        nvml: pynvml, initialized; None where there is none.
        before: what was in use before this process came, by the cards' UUIDs.
    """

    nvml: Any = None
    before: Mapping[str, int] = field(default_factory=dict)

    def now(self, uuid: str, reserved_bytes: int, card_bytes: int) -> tuple[int, Whose]:
        """What this process has in use, and whose use that is.

        The process's own where NVML tells it, as it does not under WSL and in some containers; else the card's, less
        what was in use before: what others have taken or given back since is then counted as ours.

        Args:
            reserved_bytes: by torch's allocator.
            card_bytes: in use on the whole card, by CUDA.
        """
        own = self._own(uuid, reserved_bytes)
        if own is not None:
            return own, "process"
        if uuid not in self.before:
            return card_bytes, "card"
        return max(reserved_bytes, card_bytes - self.before[uuid]), "card less others"

    def _own(self, uuid: str, reserved_bytes: int) -> int | None:
        if self.nvml is None:
            return None
        try:
            return own_bytes(self.nvml, self.nvml.nvmlDeviceGetHandleByUUID(uuid), reserved_bytes)
        except self.nvml.NVMLError:
            return None


def look_before(environ: Mapping[str, str], nvml: Any = None) -> CardUse:
    """Read the visible cards; to be called before this process touches one.

    Args:
        nvml: pynvml, but for tests. It stays open as long as the process lives.
    """
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return CardUse()
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return CardUse()
    found: dict[str, int] = {}
    try:
        uuids = probe_details(environ).uuids
    except ConfigError:
        return CardUse(nvml)  # a MIG instance, say: it is for the plan to refuse it
    for uuid in uuids:
        try:
            found[uuid] = used_bytes(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
        except nvml.NVMLError:
            continue  # an old driver, whose figure is another than CUDA's: the card's use is said as it is
    return CardUse(nvml, found)
