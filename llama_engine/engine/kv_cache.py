"""Paged KV cache bookkeeping: which blocks belong to whom. The tensors themselves live in the executor."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block's content: its token ids and, through ``parent``, all before it (b"" before the first).

    Keys and values depend on nothing else within one engine, and no cache outlives its engine.
    """
    return hashlib.sha256(parent + array("i", tokens).tobytes()).digest()


class BlockManager:
    """``num_blocks`` blocks of ``tokens_per_block`` positions. Block 0 is scratch, never given out.

    Any other is *free*, *referenced* by one or more block tables, or *cached*: registered under the key of its content
    and referenced by none. A cached block counts as free: it is evicted when blocks are short, the least recently used
    first.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a paged KV cache needs at least 2 blocks (one is scratch), got {num_blocks}")
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self._free = list(range(num_blocks - 1, 0, -1))
        self._references = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def usable(self) -> int:
        return self.num_blocks - 1

    @property
    def free(self) -> int:
        """Blocks that :meth:`grow` can give out, cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.usable - self.free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` positions."""
        return -(-num_tokens // self.tokens_per_block)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend ``table`` in place to hold ``num_tokens`` positions; False, and no change, when blocks are short."""
        need = self.blocks_for(num_tokens) - len(table)
        if need > self.free:
            return False
        for _ in range(need):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._references[block] = 1
            table.append(block)
        return True

    def release(self, table: list[int]) -> None:
        """Drop the references of ``table`` and empty it."""
        for block in reversed(table):  # the end of a sequence is evicted before the prefix that others may share
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)
        table.clear()

    def register(self, block: int, key: bytes) -> None:
        """Let :meth:`match` find a referenced block, which is never written again. The first block of a key stays."""
        if key not in self._block_of:
            self._block_of[key], self._key_of[block] = block, key

    def match(self, table: list[int], keys: Iterable[bytes]) -> None:
        """Extend the empty ``table`` by the longest run of registered blocks, from the first of ``keys`` on."""
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                return
            self._cached.pop(block, None)
            self._references[block] += 1
            table.append(block)

    def forget_all(self) -> None:
        """Nothing can be found any more; cached blocks become free."""
        self._free.extend(self._cached)
        for book in (self._cached, self._block_of, self._key_of):
            book.clear()

    def check(self, tables: Iterable[list[int]]) -> None:
        """Raise ``AssertionError`` unless each usable block is one of free, cached, or referenced by as many of
        ``tables`` as is counted, and what can be found is full of one key."""
        held = Counter(block for table in tables for block in table)
        counted = {block: count for block, count in enumerate(self._references) if count}
        everything = sorted([*held, *self._free, *self._cached])
        if held != counted or everything != list(range(1, self.num_blocks)):
            raise AssertionError(
                f"block tables are inconsistent: {len(held)} held, {len(counted)} counted, {len(self._free)} free, "
                f"{len(self._cached)} cached"
            )
        found = {block: key for key, block in self._block_of.items()}
        if found != self._key_of or not self._cached.keys() <= found.keys() or found.keys() & set(self._free):
            raise AssertionError(f"the prefix cache is inconsistent: {len(found)} keys, {len(self._key_of)} blocks")
