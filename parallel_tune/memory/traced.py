"""An estimator whose live tensors are counted on the model's own code, for architectures that the closed form lacks."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

from parallel_tune.launch import without_launcher
from parallel_tune.memory.closed_form import ClosedFormEstimator
from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.settings import TrainingSettings
from parallel_tune.memory.states import optimizer_named, optimizer_state_bytes
from parallel_tune.process import die_with_parent
from strategies.contracts import Arrangement, Device, MemoryEstimate, ModuleNames, Part
from strategies.errors import ConfigError, RunFailed

WORKER = (sys.executable, "-P", "-m", "parallel_tune.memory.trace_worker")
ANSWER_SECONDS = 600
"""How long one answer may take: a few seconds a trace, more where a wide mixture is built first."""


class TraceProcess:
    """A process that traces one model; a context manager that ends it.

    Attributes:
        facts: the model's, completed by what only its code says.
    """

    def __init__(self, facts: ModelFacts, config: Mapping[str, Any], command: Sequence[str] = WORKER) -> None:
        self.facts = facts
        self._config, self._command = config, command
        self._known: dict[tuple[TrainingSettings, Part, Arrangement], dict[str, Any]] = {}

    def __enter__(self) -> TraceProcess:
        """Start it and let it read the model.

        Raises:
            ConfigError: the model cannot be traced, and why.
        """
        self._errors = tempfile.TemporaryFile()
        # No GPU is touched, and no launcher's variables may make a library wait for other processes.
        env = {**without_launcher(os.environ), "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            self._command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            preexec_fn=die_with_parent,
            bufsize=0,
        )
        self._unread = b""
        try:
            said = self._ask({"config": dict(self._config), "known": self.facts.closed_form_known})
        except BaseException:
            self.__exit__(None, None, None)
            raise
        if not self.facts.closed_form_known:
            modules: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said["modules"].items()}
            self.facts = replace(
                self.facts,
                sliding_window=said["sliding_window"],
                windowed_layers=tuple(said["windowed_layers"]),
                tied_embeddings=said["tied_embeddings"],
                modules=ModuleNames(**modules),
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
        self._errors.close()

    def trace(self, settings: TrainingSettings, part: Part, arrangement: Arrangement) -> dict[str, Any]:
        """{"phases": ..., "kept": ...} of a step; see `trace.Tracer`.

        Raises:
            ConfigError: it cannot be traced with these settings.
            RunFailed: the process failed.
        """
        key = (settings, part, arrangement)
        if key not in self._known:
            question = {"settings": asdict(settings), "part": asdict(part), "arrangement": asdict(arrangement)}
            self._known[key] = self._ask(question)
        return self._known[key]

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._line())
        except (OSError, ValueError) as error:
            raise self._failure() from error
        if "failed" in answer:
            raise self._failed(answer["failed"], answer["trace"])
        if "error" in answer:
            raise ConfigError(f"cannot trace: {answer['error']}", answer["hint"])
        return answer

    def _line(self) -> bytes:
        """The next line that the process writes; an empty one if it has ended or takes too long."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + ANSWER_SECONDS
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))
            read = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not read:
                return b""
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _failure(self) -> RunFailed:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        trace = self._errors.read().decode(errors="replace").strip()
        return self._failed(f"the process ended; its last line is {trace.splitlines()[-1:]}", trace)

    def _failed(self, what: str, trace: str) -> RunFailed:
        failure = RunFailed(f"tracing a {self.facts.model_type} model failed: {what}", "--debug shows the whole story.")
        failure.trace = trace
        return failure


@dataclass(frozen=True)
class TracedEstimator:
    """`strategies.base.Estimator` whose memory is traced; time, and what the machine adds, are the closed form's.

    The traced layers are transformers'. Unsloth's own kernels keep no more, so that for its engine this is an upper
    bound; its fused loss is counted as such, its offloaded checkpoints as if they stayed on the card.
    """

    closed: ClosedFormEstimator
    process: TraceProcess

    def memory(self, part: Part, arrangement: Arrangement, device: Device) -> MemoryEstimate:
        """Bytes at the peak on the device that holds `part`."""
        settings = as_traced(self.closed.settings, arrangement.micro_batch)
        phases = self.process.trace(settings, part, arrangement)["phases"]
        above_loss = max(phases.values()) - phases.get("cross_entropy", 0)
        return self.closed.on_device(self.peak(part, arrangement), part, arrangement, device, above_loss)

    def peak(self, part: Part, arrangement: Arrangement) -> MemoryEstimate:
        """Live tensors at the traced peak, by what they are."""
        settings = as_traced(self.closed.settings, arrangement.micro_batch)
        traced = self.process.trace(settings, part, arrangement)
        kept, phases = traced["kept"], traced["phases"]
        phase = max(phases, key=lambda name: phases[name])
        # Other lanes wait with what their micro-batch has stored; see `closed_form`.
        waiting = 0 if part.head or arrangement.captured else (arrangement.lanes - 1) * kept["stored"]
        # A trace steps AdamW; another optimizer's moments take their place.
        moments = _moments(settings, kept)
        gradients_wait = arrangement.gradient_accumulation_steps > 1 or arrangement.processes > 1
        gradients = kept["gradients"] if gradients_wait or phase in ("optimizer", "backward_bottom") else 0
        rest = phases[phase] - kept["weights"] - kept["adapters"] - kept["optimizer"] - gradients
        is_loss = phase == "cross_entropy"
        return MemoryEstimate(
            weights_bytes=kept["weights"],
            adapters_bytes=kept["adapters"],
            gradients_bytes=gradients,
            optimizer_bytes=moments,
            activations_bytes=waiting + (0 if is_loss else rest),
            cross_entropy_bytes=rest if is_loss else 0,
            phase="cross_entropy" if is_loss else "optimizer" if phase == "optimizer" else "backward",
        )

    def micro_batch_seconds(self, part: Part, arrangement: Arrangement, device: Device) -> float:
        """The closed form's, for layers like Llama's of these sizes."""
        return self.closed.micro_batch_seconds(part, arrangement, device)

    def host_seconds(self, part: Part, arrangement: Arrangement) -> float:
        """The closed form's."""
        return self.closed.host_seconds(part, arrangement)


def as_traced(settings: TrainingSettings, micro_batch: int) -> TrainingSettings:
    """The same training as transformers' layers do it, which is what a trace runs; its masks are still the engine's."""
    return replace(settings, engine="transformers", attention_mask=settings.masked(micro_batch))


def _moments(settings: TrainingSettings, kept: Mapping[str, int]) -> int:
    optimizer = optimizer_named(settings.optimizer)
    if optimizer.paged:
        return 0
    element = settings.adapter_bytes if settings.method == "lora" else settings.weight_bytes
    return optimizer_state_bytes(optimizer, kept["trainable"], kept["float32_states"], element)
