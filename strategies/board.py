"""Who may work where: the tokens that lanes pass around, without any knowledge of tensors.

A segment is one stage's part of a micro-batch's forward or backward. Micro-batches are admitted to every segment in
index order, forwards and backwards alike: gradients are then summed in one order, whatever the threads do. A segment
goes back only after as many forwards as there are segments from it on, as in one forward, one backward
(PipeDream-Flush, Narayanan et al. 2021, arXiv:2006.09503): threads run ahead of GPUs, which work in the order of issue,
and a backward issued too early would hold up the next forward and the GPUs that wait for it.

No lane waits while it holds a token, the smallest unfinished micro-batch waits for forwards of lanes alone, and these
may go on, so lanes cannot deadlock.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence


class Aborted(BaseException):
    """Another lane failed; ends this one. Not an Exception, so that nothing in a model's forward swallows it."""


class Board:
    """The tokens of one run of `num_micro_batches` micro-batches.

    Args:
        tokens: the token that each segment needs; segments with the same token never run at once.
        num_lanes: how many micro-batches may be under way.

    Attributes:
        error: the first failure, None while all is well.
    """

    def __init__(self, tokens: Sequence[int], num_micro_batches: int, num_lanes: int) -> None:
        self.error: BaseException | None = None
        self._tokens = tuple(tokens)
        self._num_micro_batches = num_micro_batches
        self._ahead = [min(num_lanes, len(tokens) - segment) - 1 for segment in range(len(tokens))]
        self._changed = threading.Condition()
        self._started = 0
        self._holders: dict[int, int] = {}
        self._turn = {False: [0] * len(tokens), True: [0] * len(tokens)}
        self._backwards_waiting: set[tuple[int, int]] = set()

    def take(self) -> int | None:
        """The next micro-batch that no lane has; None when all are taken, or the run failed."""
        with self._changed:
            if self.error is not None or self._started >= self._num_micro_batches:
                return None
            self._started += 1
            return self._started - 1

    def acquire(self, segment: int, micro_batch: int, backward: bool) -> None:
        """Wait for this micro-batch's turn in the segment, and for its token. A backward that may go goes first.

        Raises:
            Aborted: the run failed meanwhile.
        """
        token = self._tokens[segment]
        with self._changed:
            if backward:
                self._backwards_waiting.add((segment, micro_batch))
            try:
                while not self._may_enter(segment, micro_batch, backward):
                    self._changed.wait()
            finally:
                self._backwards_waiting.discard((segment, micro_batch))
            self._holders[token] = micro_batch

    def release(self, segment: int, micro_batch: int, backward: bool) -> None:
        """Give the token back; the segment's turn passes to the next micro-batch."""
        with self._changed:
            del self._holders[self._tokens[segment]]
            self._turn[backward][segment] = micro_batch + 1
            self._changed.notify_all()

    def drop(self, micro_batch: int) -> None:
        """Take back whatever token a failed micro-batch holds, without passing its turn on."""
        with self._changed:
            for token in [token for token, holder in self._holders.items() if holder == micro_batch]:
                del self._holders[token]
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End the run: every lane that waits, or comes to wait, is aborted. The first error stays."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    @property
    def held(self) -> dict[int, int]:
        """The tokens out at the moment, and the micro-batches that hold them."""
        with self._changed:
            return dict(self._holders)

    def _may_enter(self, segment: int, micro_batch: int, backward: bool) -> bool:
        if self.error is not None:
            raise Aborted
        token = self._tokens[segment]
        if token in self._holders:
            return False
        if backward:
            return self._may_go_back(segment, micro_batch)
        return self._turn[False][segment] == micro_batch and not any(
            self._tokens[other] == token and self._may_go_back(other, index) for other, index in self._backwards_waiting
        )

    def _may_go_back(self, segment: int, micro_batch: int) -> bool:
        last_ahead = min(micro_batch + self._ahead[segment], self._num_micro_batches - 1)
        return self._turn[True][segment] == micro_batch and self._turn[False][segment] > last_ahead
