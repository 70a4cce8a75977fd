"""Few fixed sizes for micro-batches of many lengths, so that each size is captured once and replayed often."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

STEP_TOKENS = 64
"""Sizes are multiples of it: what matrix kernels work in anyway."""

MOST_STEPS = 128
"""Of long micro-batches sizes are coarser, so that the search stays short."""

MOST_SIZES = 12
SIZE_COSTS_TOKENS = 8_000
"""What a size costs, in tokens that could be trained meanwhile: 0.8 s to run, record and check an 8B model's (seen on
an H200), which replays 10,000 tokens a second."""

WORTH_CAPTURING = 16
"""Micro-batches that a size must have on average: recording one takes as long as about ten eager passes."""


def choose_sizes(tokens: Sequence[int]) -> tuple[int, ...]:
    """Sizes, ascending, of which each micro-batch takes the smallest that holds it: least padding and recording.

    Exact: a size is one of the rounded token counts, and the best last gap is sought for each (dynamic programming
    over sorted counts). Empty where there are too few micro-batches for any size to pay.

    Args:
        tokens: of each micro-batch of the run; of those that several processes work on at once, the largest, for which
            the others wait.
    """
    if len(tokens) < WORTH_CAPTURING:
        return ()
    step = STEP_TOKENS * max(1, -(-max(tokens) // (STEP_TOKENS * MOST_STEPS)))
    counted = Counter(-(-count // step) * step for count in tokens)
    sizes = sorted(counted)
    before = [0]
    for size in sizes:
        before.append(before[-1] + counted[size])
    most = min(MOST_SIZES, len(tokens) // WORTH_CAPTURING, len(sizes))
    # best[k][i]: tokens, filled up, of all micro-batches up to the i-th size, held by k sizes
    best: list[list[float]] = [[0.0] + [float("inf")] * len(sizes)]
    cut: list[list[int]] = [[0] * (len(sizes) + 1)]
    for k in range(1, most + 1):
        row, cuts = [float("inf")] * (len(sizes) + 1), [0] * (len(sizes) + 1)
        for end in range(1, len(sizes) + 1):
            costs = [best[k - 1][start] + sizes[end - 1] * (before[end] - before[start]) for start in range(end)]
            cuts[end] = min(range(end), key=costs.__getitem__)
            row[end] = costs[cuts[end]]
        best.append(row)
        cut.append(cuts)
    count = min(range(1, most + 1), key=lambda k: best[k][-1] + k * SIZE_COSTS_TOKENS)
    chosen, end = [], len(sizes)
    for k in range(count, 0, -1):
        chosen.append(sizes[end - 1])
        end = cut[k][end]
    return tuple(reversed(chosen))


def size_for(tokens: int, sizes: Sequence[int]) -> int | None:
    """The smallest size that holds so many tokens; None if none does."""
    position = bisect_left(sizes, tokens)
    return sizes[position] if position < len(sizes) else None
