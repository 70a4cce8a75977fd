"""The rules of torch's caching allocator (c10/cuda/CUDACachingAllocator.cpp) for segments that grow, without a GPU."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

MIB = 1 << 20
GRAIN = 512
SMALL = MIB
"""Larger tensors have a pool of their own."""


@dataclass
class Block:
    address: int
    size: int
    free: bool = False
    before: Block | None = None
    after: Block | None = None


@dataclass
class Pool:
    """One address range. A request takes the smallest free block that suffices, the last one only where no other does,
    since that could grow; else the range is mapped further, by whole pages."""

    page_bytes: int
    reserved_bytes: int = 0
    last: Block | None = None
    free: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def allocate(self, size: int) -> int:
        at = bisect.bisect_left(self.free, (size, -1))
        if at < len(self.free) - 1 and self.last is not None and self.free[at][1] == self.last.address:
            at += 1
        block = self.blocks[self.free[at][1]] if at < len(self.free) else self._grown(size)
        self._take(block)
        if block.size > size:
            rest = Block(block.address + size, block.size - size, before=block, after=block.after)
            block.size, block.after = size, rest
            if rest.after is not None:
                rest.after.before = rest
            if self.last is block:
                self.last = rest
            self.blocks[rest.address] = rest
            self._give(rest)
        return block.address

    def release(self, address: int) -> None:
        block = self.blocks[address]
        if block.after is not None and block.after.free:
            self._take(block.after)
            self._join(block, block.after)
        if block.before is not None and block.before.free:
            self._take(block.before)
            block = block.before
            assert block.after is not None
            self._join(block, block.after)
        self._give(block)

    def _grown(self, size: int) -> Block:
        last = self.last
        if last is None or not last.free:
            end = last.address + last.size if last is not None else 0
            block = Block(end, 0, before=last)
            if last is not None:
                last.after = block
            self.last = self.blocks[end] = block
        else:
            self._take(last)
            block = last
        mapped = -(-(size - block.size) // self.page_bytes) * self.page_bytes
        block.size += mapped
        self.reserved_bytes += mapped
        self._give(block)
        return block

    def _join(self, block: Block, after: Block) -> None:
        block.size += after.size
        block.after = after.after
        if after.after is not None:
            after.after.before = block
        if self.last is after:
            self.last = block
        del self.blocks[after.address]

    def _give(self, block: Block) -> None:
        block.free = True
        bisect.insort(self.free, (block.size, block.address))

    def _take(self, block: Block) -> None:
        block.free = False
        del self.free[bisect.bisect_left(self.free, (block.size, block.address))]


def play(events: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Peaks of live and of reserved bytes.

    Args:
        events: bytes and a number for each tensor that is made, and -1 and its number when it is freed.
    """
    pools = {True: Pool(2 * MIB), False: Pool(20 * MIB)}
    where: dict[int, tuple[bool, int, int]] = {}
    live = peak = 0
    for size, number in events:
        if size > 0:
            rounded = -(-size // GRAIN) * GRAIN
            small = rounded <= SMALL
            where[number] = (small, pools[small].allocate(rounded), rounded)
            live += rounded
            peak = max(peak, live)
        elif size < 0 and number in where:
            small, address, rounded = where.pop(number)
            pools[small].release(address)
            live -= rounded
    return peak, sum(pool.reserved_bytes for pool in pools.values())
