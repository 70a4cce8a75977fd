"""What a strategy is: pure judgement before a run, and the session that a worker opens during it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from strategies.contracts import Arrangement, Device, Hardware, MemoryEstimate, Part, Plan, Verdict, Workload

if TYPE_CHECKING:
    import torch


class Estimator(Protocol):
    """Predicts memory and time of a part of the model; built by the application for one model and its settings."""

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        """Bytes at the peak on the device that holds `part`; non-decreasing in the part's layers."""

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        """Device seconds of one micro-batch, forward and backward, through `part`."""

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        """Host seconds that issuing one micro-batch through `part` takes, device aside."""


class Schedule(Protocol):
    """Works off the micro-batches of an optimizer step in an order of its own, with the result of taking turns."""

    sums_gradients: bool
    """Whether it also averages gradients over all processes."""

    @property
    def devices(self) -> Sequence[torch.device]:
        """Where a micro-batch is worked on, each once, that of the inputs first."""

    @property
    def labels_device(self) -> torch.device:
        """Where the loss is computed, hence where labels should lie."""

    def run(
        self,
        micro_batches: Sequence[Any],
        forward: Callable[[int, Any], Any],
        *,
        backward: Callable[[Any], None],
        key: int | None = None,
    ) -> list[Any]:
        """Forward and backward of all micro-batches; returns their losses, detached, in order.

        Args:
            forward: (index, micro-batch) -> loss; may be called in another thread.
            backward: runs a loss's backward; likewise.
            key: tells this step's random numbers from those of others.
        """


class Session(Protocol):
    """What a training process holds open while it trains; the trainer sees nothing else of its strategy."""

    rank: int
    world_size: int
    is_main: bool

    @property
    def device(self) -> torch.device:
        """Where inputs go."""

    @property
    def schedule(self) -> Schedule | None:
        """What works off a step's micro-batches; None where the trainer takes them in turn."""

    def device_map(self) -> dict[str, int | str]:
        """The explicit map that the model is loaded with; never a string such as "balanced"."""

    def place(self, model: Any) -> None:
        """Make the loaded model, adapters included, run as the plan says. Called once, before the trainer exists."""

    def training_arguments(self) -> dict[str, Any]:
        """TrainingArguments that the strategy needs, by their transformers names."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Every rank calls it."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64. Every rank calls it."""

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank. Every rank calls it."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def report(self) -> dict[str, Any]:
        """What the strategy has measured of the run, for the run's report. `stages`, if any, is one entry a device of
        the plan, `timeline` the schedule of the last step, `stage_seconds` what a micro-batch took at each stage."""

    def close(self) -> None:
        """Release what the session holds. The process ends soon after."""


class Strategy(Protocol):
    """One way of laying a training run on devices.

    Attributes:
        name: what `--strategy` calls it.
        auto_order: `auto` asks strategies in ascending order and takes the first that fits.
    """

    name: str
    auto_order: int

    def assess(self, workload: Workload, hardware: Hardware, estimate: Estimator) -> Verdict:
        """Whether some plan fits, with the numbers that decide it. Pure."""

    def plan(self, workload: Workload, hardware: Hardware, estimate: Estimator) -> Plan:
        """The fastest plan that fits; if none does, the one that comes closest, with `fits` False. Pure."""

    def open(self, plan: Plan, timeout_seconds: int) -> Session:
        """Open the session of this training process; a collective that waits longer than the timeout fails."""
