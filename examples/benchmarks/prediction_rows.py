"""The runs that examples/benchmarks/prediction.py scores; each engine, method and mode comes early.

None of them was seen while a formula or a constant was made. What was seen then: the rows of results that carry
`in_view`, six steps of Llama and Qwen3 shapes, captured runs of a Qwen3-8B and a Llama-1B shape, and
SEEN_ROWS. Once other rows have changed a formula, they have to be put there in their turn, and more have to take their
place.

A captured step is recorded when its size comes for the second time. Rows of one size have one micro-batch a step, so
that this falls into the second step: the optimizer's states exist, and the predicted peak is met.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

Data = Literal["full", "short", "mixed"]


@dataclass(frozen=True)
class Row:
    """One training run.

    Attributes:
        name: tells it from all others, in the results too.
        shape: the model, by its name in shapes.py.
        tokens: the longest row that is let through.
        rows: of a micro-batch.
        data: rows that are all cut at `tokens`; short ones; or short ones among some long ones.
        accumulation: micro-batches of a step.
        captured: whether steps are captured; there must be enough of them.
        options: what else the command line has.
        on: what the run is planned for; another card than the one there for a run that does not fit it.
        may_fail: it is there to run out of memory.
        allocator: how torch's allocator is set up; "fixed" for segments that do not grow, unlike parallel-tune's own.
    """

    name: str
    shape: str
    engine: Literal["transformers", "unsloth"]
    method: Literal["lora", "4bit", "full"]
    tokens: int
    rows: int
    checkpointing: str
    data: Data = "full"
    accumulation: int = 2
    steps: int = 3
    captured: bool = False
    options: tuple[str, ...] = ()
    on: str = ""
    may_fail: bool = False
    allocator: Literal["", "fixed"] = ""

    def arguments(self) -> list[str]:
        """The command line, files aside."""
        methods = {"lora": [], "4bit": ["--load_in_4bit"], "full": ["--full_finetuning", "--learning_rate", "1e-5"]}
        strategy = [] if "--strategy" in self.options else ["--strategy", "ddp"]
        optimizer = [] if "--optim" in self.options else ["--optim", OPTIM]
        return [
            "--engine", self.engine, *strategy, *methods[self.method], "--max_seq_length", str(self.tokens),
            "--per_device_train_batch_size", str(self.rows), "--gradient_accumulation_steps", str(self.accumulation),
            "--max_steps", str(self.steps), "--use_gradient_checkpointing", self.checkpointing, *optimizer,
            "--capture", "on" if self.captured else "off", *(["--hardware", self.on] if self.on else []), *self.options,
        ]  # fmt: skip

    @property
    def samples(self) -> int:
        """Rows of data that the run needs: a step's, which come again in each, where they are of unlike lengths.

        The largest micro-batch would else come but once, and in the first step, before the optimizer has states, as
        likely as in any other.
        """
        of_a_step = self.rows * self.accumulation
        return of_a_step * self.steps if self.data == "full" or "--packing" in self.options else of_a_step


HF: Final = "transformers"
UNSLOTH: Final = "unsloth"
RANK = "--r"
OPTIM = "adamw_torch_fused"
"""Of rows that name no other."""
QUERY_AND_VALUE = ("--target_modules", "q_proj,v_proj")
EIGHT_BIT = ("--optim", "adamw_8bit")
PADDED = ("--padding_free", "off")
PACKED = ("--packing",)
SPLIT = ("--strategy", "model_parallel", "--stages", "2", "--pipeline", "off")

ROWS: tuple[Row, ...] = (
    Row("qwen2-1.5b full 8-bit, three rows", "qwen2-1.5b", HF, "full", 1024, 3, "none", options=EIGHT_BIT),
    Row("llama-3b unsloth", "llama-3b", UNSLOTH, "lora", 2048, 2, "none"),
    Row("llama-3b joined short", "llama-3b", HF, "lora", 1024, 6, "none", "short"),
    Row("mistral-7b unsloth recomputed", "mistral-7b", UNSLOTH, "lora", 4096, 1, "full"),
    Row("mistral-7b nf4 recomputed", "mistral-7b", HF, "4bit", 4096, 2, "full", options=EIGHT_BIT),
    Row("llama-3b unsloth nf4", "llama-3b", UNSLOTH, "4bit", 1024, 4, "none", options=(RANK, "32")),
    Row("mistral-7b", "mistral-7b", HF, "lora", 3072, 1, "none", options=(RANK, "64")),
    Row("qwen3-4b unsloth captured full rows", "qwen3-4b", UNSLOTH, "lora", 1024, 2, "none", "full", 1, 17, True),
    Row("qwen2-1.5b padded short", "qwen2-1.5b", HF, "4bit", 1024, 10, "none", "short", options=PADDED),
    Row("qwen3-4b unsloth offloaded", "qwen3-4b", UNSLOTH, "lora", 8192, 1, "unsloth"),
    Row("qwen3-4b unsloth full", "qwen3-4b", UNSLOTH, "full", 1024, 1, "none", options=EIGHT_BIT),
    Row("llama-3b unsloth full, kept", "llama-3b", UNSLOTH, "full", 1536, 2, "none", options=EIGHT_BIT),
    Row("qwen2-1.5b unsloth nf4 recomputed", "qwen2-1.5b", UNSLOTH, "4bit", 2048, 3, "full"),
    Row("phi3-mini full recomputed 8-bit", "phi3-mini", HF, "full", 1024, 2, "full", options=EIGHT_BIT),
    Row("mistral-7b unsloth joined short", "mistral-7b", UNSLOTH, "lora", 1024, 4, "none", "short"),
    Row("llama-3b full recomputed 8-bit", "llama-3b", HF, "full", 1024, 3, "full", options=EIGHT_BIT),
    Row("llama-3b unsloth nf4 offloaded", "llama-3b", UNSLOTH, "4bit", 4096, 1, "unsloth", options=EIGHT_BIT),
    Row("llama-3b two stages", "llama-3b", HF, "lora", 2048, 2, "full", options=SPLIT),
    Row("qwen3-4b unsloth recomputed", "qwen3-4b", UNSLOTH, "lora", 2048, 2, "full", options=(RANK, "32")),
    Row("llama-3b captured packed", "llama-3b", HF, "4bit", 3072, 1, "none", "short", 1, 17, True, PACKED),
    Row("llama-3b unsloth padded short", "llama-3b", UNSLOTH, "lora", 1024, 5, "none", "short", options=PADDED),
    Row("llama-3b nf4 padded recomputed", "llama-3b", HF, "4bit", 1024, 8, "full", "short", options=PADDED),
    Row("qwen2-1.5b unsloth captured short", "qwen2-1.5b", UNSLOTH, "lora", 1024, 8, "none", "short", 1, 17, True),
    Row("gemma3-4b recomputed", "gemma3-4b", HF, "lora", 2048, 1, "full"),
    Row("qwen3-4b unsloth nf4 joined short", "qwen3-4b", UNSLOTH, "4bit", 1024, 6, "none", "short"),
    Row("gemma3-4b joined", "gemma3-4b", HF, "lora", 512, 4, "none", "short", options=EIGHT_BIT),
    Row("mistral-7b unsloth nf4 offloaded", "mistral-7b", UNSLOTH, "4bit", 6144, 1, "unsloth", options=(RANK, "64")),
    Row("gemma3-4b nf4", "gemma3-4b", HF, "4bit", 768, 2, "none", options=PADDED),
    Row("gemma3-4b unsloth recomputed", "gemma3-4b", UNSLOTH, "lora", 1024, 1, "full"),
    Row("phi3-mini", "phi3-mini", HF, "lora", 1536, 2, "none"),
    Row("phi3-mini nf4 recomputed", "phi3-mini", HF, "4bit", 3072, 1, "full"),
    Row("qwen2-1.5b nf4 attention", "qwen2-1.5b", HF, "4bit", 2048, 4, "none", options=QUERY_AND_VALUE),
    Row("qwen3-4b recomputed", "qwen3-4b", HF, "lora", 3072, 1, "full", options=(RANK, "8")),
)  # fmt: skip
"""All but those whose length follows from the card, which prediction.py makes."""

SEEN_ROWS: tuple[Row, ...] = (
    Row("qwen2-1.5b unsloth full", "qwen2-1.5b", UNSLOTH, "full", 1024, 2, "none", options=EIGHT_BIT),
    Row("llama-3b unsloth full", "llama-3b", UNSLOTH, "full", 1536, 2, "full", options=EIGHT_BIT),
    Row("llama-3b captured mixed", "llama-3b", HF, "lora", 1536, 2, "none", "mixed", 4, 12, True),
    Row("qwen3-4b unsloth", "qwen3-4b", UNSLOTH, "lora", 1536, 3, "none"),
    Row("llama-3b unsloth captured short", "llama-3b", UNSLOTH, "lora", 1024, 6, "none", "short", 1, 17, True),
    Row("mistral-7b unsloth nf4", "mistral-7b", UNSLOTH, "4bit", 3072, 2, "none", options=(RANK, "8")),
    Row("mistral-7b unsloth offloaded", "mistral-7b", UNSLOTH, "lora", 8192, 1, "unsloth"),
    Row("llama-3b full", "llama-3b", HF, "full", 1024, 1, "none"),
    Row("qwen2-1.5b captured packed", "qwen2-1.5b", HF, "lora", 1024, 3, "none", "short", 1, 17, True, PACKED),
    Row("qwen3-4b unsloth nf4 offloaded, rank 16", "qwen3-4b", UNSLOTH, "4bit", 6144, 1, "unsloth"),
    Row("mistral-7b unsloth nf4 captured", "mistral-7b", UNSLOTH, "4bit", 1536, 1, "none", "full", 1, 17, True),
    Row("mistral-7b captured full rows", "mistral-7b", HF, "lora", 1024, 2, "none", "full", 1, 17, True),
    Row("llama-3b unsloth recomputed", "llama-3b", UNSLOTH, "lora", 2048, 4, "full", options=(RANK, "128")),
    Row("qwen2-1.5b unsloth many rows", "qwen2-1.5b", UNSLOTH, "lora", 512, 16, "none", options=(RANK, "4")),
    Row("qwen2-1.5b unsloth packed", "qwen2-1.5b", UNSLOTH, "lora", 4096, 1, "unsloth", "short", options=PACKED),
    Row("gemma3-4b unsloth nf4", "gemma3-4b", UNSLOTH, "4bit", 1024, 1, "unsloth"),
    Row("qwen2-1.5b long recomputed", "qwen2-1.5b", HF, "lora", 6144, 1, "full", options=(RANK, "32")),
    Row("qwen3-4b unsloth nf4 offloaded", "qwen3-4b", UNSLOTH, "4bit", 6144, 1, "unsloth",
        options=(RANK, "64", *EIGHT_BIT)),
)  # fmt: skip
"""Those that were seen when the allocator's reserve and Unsloth's layers came to their formulas; for `--in-view`."""

TWINS = ("qwen2-1.5b long recomputed", "llama-3b captured mixed")
FIXED_ROWS: tuple[Row, ...] = tuple(
    replace(row, name=f"{row.name}, fixed segments", allocator="fixed") for row in SEEN_ROWS if row.name in TWINS
)
"""The same runs with an allocator whose segments do not grow: what that does to its reserve and to speed. Scored
apart."""
