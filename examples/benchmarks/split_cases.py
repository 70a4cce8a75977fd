"""Cases and ways of split_speed.py: what is trained, and how a step's micro-batches pass through the stages."""

from __future__ import annotations

from dataclasses import dataclass, replace

WAYS = {
    "naive": ("--pipeline=off", "--capture=off"),
    "lanes": ("--pipeline=on", "--capture=off"),
    "captured-naive": ("--pipeline=off", "--capture=on"),
    "captured-lanes": ("--pipeline=on", "--capture=on"),
}
"""By name, the options that make them. Capturing is possible only where no activation is recomputed."""

EXTRAS = ("tokens", "checkpointing", "ballast")


@dataclass(frozen=True)
class Case:
    """A model and a step.

    Attributes:
        name: as it was given.
        shape: of filled_models.py; one that ends in -nf4 is trained in 4 bit.
        micro_batches: of a step, a row each.
        tokens: of a row.
        checkpointing: as `--use_gradient_checkpointing` takes it.
        ballast_gib: of each card, held by another process.
    """

    name: str
    shape: str
    engine: str
    micro_batches: int
    tokens: int
    checkpointing: str
    ballast_gib: float = 0.0

    def options(self) -> list[str]:
        """What all ways of this case are given."""
        return [
            f"--engine={self.engine}", f"--global_batch_size={self.micro_batches}", "--per_device_train_batch_size=1",
            f"--max_seq_length={self.tokens}", f"--use_gradient_checkpointing={self.checkpointing}",
            *(["--load_in_4bit"] if self.shape.endswith("-nf4") else []),
        ]  # fmt: skip


def read_case(text: str, tokens: int, checkpointing: str, ballast_gib: float) -> Case:
    """SHAPE:ENGINE:MICRO_BATCHES, and further tokens=N, checkpointing=WORD, ballast=GIB, in place of those given here.

    Raises:
        ValueError: it is none.
    """
    shape, engine, count, *extras = text.split(":")
    case = Case(text, shape, engine, int(count), tokens, checkpointing, ballast_gib)
    for extra in extras:
        name, _, value = extra.partition("=")
        if name == "tokens":
            case = replace(case, tokens=int(value))
        elif name == "checkpointing":
            case = replace(case, checkpointing=value)
        elif name == "ballast":
            case = replace(case, ballast_gib=float(value))
        else:
            raise ValueError(f"{text}: {name} is none of {', '.join(EXTRAS)}")
    return case
