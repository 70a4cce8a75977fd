"""The cases of examples/benchmarks/choices.py, and what is planned for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from prediction_again import read_arguments
from prediction_edges import facts_of
from prediction_rows import HF, OPTIM, Row

from parallel_tune.hardware import parse_hardware
from parallel_tune.planning import make_plan
from strategies.contracts import Device, Plan
from strategies.registry import load_registry

STRATEGIES: Final = ("ddp", "model_parallel")
LARGER_CARDS = "2xH200-141GB"
"""What a run is planned for that the plan for the case's own cards refuses."""

Side = Literal["no replica", "replica", "replica that recomputes", "replica on one card"]


@dataclass(frozen=True)
class Case:
    """A run that may be laid out in either way.

    Attributes:
        shape: the model, by its name in shapes.py.
        tokens: of every row.
        hardware: the two devices that it is planned for.
        side: what a card of these has room for: no replica; one; one only if it recomputes activations where a split
            need not; or one, but not what two need to sum their gradients.
        rows: of an optimizer step, over all devices.
        options: what else the command line has.
    """

    shape: str
    method: Literal["lora", "4bit", "full"]
    tokens: int
    hardware: str
    side: Side
    steps: int
    rows: int = 8
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Tells it from all others, in the results too."""
        return " ".join([self.shape, self.method, str(self.tokens), self.hardware, *self.options[1:2]])

    def arguments(self, strategy: str, capture: str) -> list[str]:
        """The command line, files and pins aside."""
        methods = {"lora": [], "4bit": ["--load_in_4bit"], "full": ["--full_finetuning", "--learning_rate", "1e-5"]}
        optimizer = [] if "--optim" in self.options else ["--optim", OPTIM]
        return [
            "--engine", HF, "--strategy", strategy, *methods[self.method], "--max_seq_length", str(self.tokens),
            "--global_batch_size", str(self.rows), "--max_steps", str(self.steps), "--capture", capture, *optimizer,
            *self.options,
        ]  # fmt: skip

    @property
    def data(self) -> Row:
        """What `prediction_data.write_data` has to know of the rows."""
        return Row(self.name, self.shape, HF, self.method, self.tokens, self.rows, "none", "full", 1, self.steps)

    @property
    def device(self) -> Device:
        """One of its devices, which are alike."""
        return parse_hardware(self.hardware).devices[0]


EIGHT_BIT = ("--optim", "adamw_8bit")
RECOMPUTED = ("--use_gradient_checkpointing", "full")
FEW, MORE = 3, 8
"""Steps of a case in which one run fails, and of one in which speeds are compared."""

CASES: tuple[Case, ...] = (
    Case("llama-1b", "full", 768, "2xRTX3080-10GB", "no replica", FEW),
    Case("llama-1b", "lora", 2048, "2xRTX3090-24GB", "replica", MORE),
    Case("llama-3b", "lora", 1024, "2xRTX3070-8GB", "no replica", FEW),
    Case("llama-3b", "4bit", 1024, "2xRTX3090-24GB", "replica", MORE),
    Case("llama-3b", "full", 768, "2xRTX3090-24GB", "no replica", FEW),
    Case("llama-3b", "lora", 2048, "2xRTX4080-16GB", "replica that recomputes", MORE),
    Case("qwen3-4b", "lora", 1536, "2xRTX3080-10GB", "no replica", FEW),
    Case("llama-1b", "full", 1024, "2xRTX3090-24GB", "replica", MORE, options=EIGHT_BIT),
    Case("qwen3-4b", "full", 1024, "2xRTX3090-24GB", "no replica", FEW, options=(*EIGHT_BIT, *RECOMPUTED)),
    Case("llama-3b", "4bit", 2048, "2xRTX3070-8GB", "replica on one card", MORE),
    Case("llama-8b", "4bit", 1536, "2xRTX3070-8GB", "no replica", FEW),
    Case("llama-8b", "4bit", 1536, "2xRTX4080-16GB", "replica that recomputes", MORE),
)
"""Both sides early, those of large models late: these take longest to make."""

SMALL_CASES: tuple[Case, ...] = (
    Case("tiny", "lora", 128, "cpu:2", "replica", FEW),
    Case("tiny", "full", 64, "cpu:2", "replica", FEW),
)


def planned(case: Case, strategy: str, capture: str) -> Plan:
    """The plan for the case's own cards; one that does not fit comes closest to it."""
    config = read_arguments([*case.arguments(strategy, capture), "--hardware", case.hardware], case.shape)
    return make_plan(config, facts_of(case.shape), HF, parse_hardware(case.hardware), load_registry())


def layout(case: Case, plan: Plan) -> list[str]:
    """The options that give a run this plan's devices; and if it does not fit them, on larger ones its thrift too.

    A larger card would else be used to the full, which the case's own could not hold in any way.
    """
    if plan.fits:
        return ["--hardware", case.hardware]
    return [
        "--hardware", LARGER_CARDS, "--max_devices", str(len(plan.devices)),
        "--per_device_train_batch_size", str(plan.micro_batch),
        "--use_gradient_checkpointing", plan.gradient_checkpointing,
    ]  # fmt: skip
