"""Paged KV cache bookkeeping: which blocks belong to whom. The tensors themselves live in the executor."""

from __future__ import annotations

from collections.abc import Iterable


class BlockManager:
    """A free list over ``num_blocks`` blocks of ``tokens_per_block`` positions. Block 0 is scratch, never given out."""

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a paged KV cache needs at least 2 blocks (one is scratch), got {num_blocks}")
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def usable(self) -> int:
        return self.num_blocks - 1

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.usable - self.free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` positions."""
        return -(-num_tokens // self.tokens_per_block)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend ``table`` in place to hold ``num_tokens`` positions; False, and no change, when blocks are short."""
        need = self.blocks_for(num_tokens) - len(table)
        if need > len(self._free):
            return False
        for _ in range(need):
            table.append(self._free.pop())
        return True

    def release(self, table: list[int]) -> None:
        """Return all blocks of ``table`` and empty it."""
        self._free.extend(reversed(table))
        table.clear()

    def check(self, tables: Iterable[list[int]]) -> None:
        """Raise ``AssertionError`` unless the tables and the free list partition the usable blocks."""
        held = [block for table in tables for block in table]
        everything = sorted(held + self._free)
        if everything != list(range(1, self.num_blocks)):
            raise AssertionError(f"block tables are inconsistent: {len(held)} held, {len(self._free)} free")
