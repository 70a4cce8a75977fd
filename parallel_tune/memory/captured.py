"""What a captured step needs beside an eager one."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import replace
from functools import lru_cache

from parallel_tune.memory.facts import ModelFacts
from parallel_tune.memory.operations import FLOAT32_BYTES
from parallel_tune.memory.settings import TrainingSettings

GRADIENT_COPIES = 2
"""While a recording is checked: the gradients that the step has gathered, and the eager ones."""

CAPTURED_RESERVE_BYTES = 1536 << 20
"""What lies idle in the recordings' pool and beside it where segments do not grow, an eager pass of another size aside.
Chosen by five runs of an 8B shape with one size each (both engines, 640 to 8,192 tokens, H200): 1.5 to 1.8 GiB; so
these are no test of it."""

CAPTURED_RESERVE_BESIDE_BYTES = 640 << 20
"""What lies idle beside one copy of the logits where segments grow and the loss makes new ones. Chosen by three runs on
an H100 (two with one size): 0.6 to 0.7 GiB; one of Unsloth's, whose loss works in place, held 0.1 GiB in all. On the
cards of a split (eight on two H200s) 0.5 to 0.7 GiB lie idle with either engine, and logits where such a loss is."""

GRAPHS_CONTEXT_BYTES = 96 << 20
"""What recordings add to the context, outside the allocator: the graphs' executables. Measured on an H100: 90 to 108
MiB in three runs of 28 and 36 layers with one and two sizes, so these are no test of it."""

CAPTURED_STREAMS = 2
"""Streams that have cuBLAS workspaces of their own (torch keys them by handle and stream): that of the eager passes,
and the recorder's."""


def captured_settings(settings: TrainingSettings) -> TrainingSettings:
    """Settings as a captured step has them: Unsloth's goes through torch's attention, and makes all logits."""
    if settings.engine != "unsloth":
        return settings
    return replace(settings, cross_entropy="returned", repeats_heads=varlen_repeats_heads())


def returned_loss_bytes(facts: ModelFacts, settings: TrainingSettings, micro_batch: int) -> int:
    """Unsloth's loss over all logits: it works in place, but accelerate casts the logits it returns to float32."""
    cast_bytes = FLOAT32_BYTES if settings.autocast else 0
    tokens = micro_batch * settings.sequence_length
    return tokens * facts.vocab_size * (settings.compute_bytes + cast_bytes)


@lru_cache(maxsize=1)
def varlen_repeats_heads() -> bool:
    """Whether torch's attention over rows of any length wants keys and values for each head: before 2.12 it does."""
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return found is not None and (int(found[1]), int(found[2])) < (2, 12)
