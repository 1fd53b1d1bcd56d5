import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_engine.engine.kv_cache import BlockManager


def test_growth_takes_only_what_is_needed():
    blocks = BlockManager(num_blocks=5, tokens_per_block=16)
    table = []
    assert blocks.grow(table, 16)
    assert len(table) == 1
    assert blocks.grow(table, 17)
    assert len(table) == 2
    assert blocks.grow(table, 20)
    assert (len(table), blocks.used, blocks.free) == (2, 2, 2)


def test_refused_growth_changes_nothing():
    blocks = BlockManager(num_blocks=3, tokens_per_block=4)
    table = []
    assert blocks.grow(table, 5)
    assert not blocks.grow(table, 9)
    assert len(table) == 2
    blocks.check([table])


def test_scratch_block_is_never_given_out():
    blocks = BlockManager(num_blocks=4, tokens_per_block=1)
    table = []
    assert blocks.grow(table, 3)
    assert sorted(table) == [1, 2, 3]
    with pytest.raises(ValueError, match="at least 2"):
        BlockManager(num_blocks=1, tokens_per_block=1)


def test_check_finds_a_leak_and_a_block_in_two_tables():
    blocks = BlockManager(num_blocks=4, tokens_per_block=1)
    table = []
    blocks.grow(table, 2)
    with pytest.raises(AssertionError, match="inconsistent"):
        blocks.check([table[:1]])
    with pytest.raises(AssertionError, match="inconsistent"):
        blocks.check([table, table[:1]])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_any_order_of_growth_and_release_partitions_the_blocks(operations):
    blocks = BlockManager(num_blocks=12, tokens_per_block=4)
    tables = [[], [], [], []]
    for index, tokens in operations:
        if tokens == 0:
            blocks.release(tables[index])
        else:
            blocks.grow(tables[index], tokens)
        blocks.check(tables)


def test_a_block_shared_by_two_tables_is_free_when_both_have_gone():
    blocks = BlockManager(num_blocks=4, tokens_per_block=1)
    first, second = [], []
    blocks.grow(first, 2)
    for block, key in zip(first, (b"a", b"b")):
        blocks.register(block, key)
    blocks.match(second, [b"a", b"x", b"b"])  # a gap ends the run
    assert second == first[:1]
    blocks.check([first, second])
    blocks.release(first)
    assert (blocks.used, blocks.free) == (1, 2)
    blocks.check([second])
    blocks.release(second)
    assert blocks.used == 0
    blocks.check([])


def test_eviction_takes_the_oldest_and_of_one_sequence_its_end():
    blocks = BlockManager(num_blocks=5, tokens_per_block=1)
    for keys in ([b"a", b"b"], [b"c", b"d"]):
        table = []
        blocks.grow(table, 2)
        for block, key in zip(table, keys):
            blocks.register(block, key)
        blocks.release(table)
    for key, found in ((b"b", b"acd"), (b"a", b"cd"), (b"d", b"c")):
        blocks.grow(table, len(table) + 1)
        blocks.check([table])
        assert bytes(sorted(k[0] for k in blocks._block_of)) == found, key
    assert not blocks.grow(table, 5)
    assert blocks.grow(table, 4)


def test_forgetting_makes_cached_blocks_free_and_leaves_referenced_ones():
    blocks = BlockManager(num_blocks=4, tokens_per_block=1)
    gone, held = [], []
    for table, key in ((gone, b"a"), (held, b"b")):
        blocks.grow(table, 1)
        blocks.register(table[0], key)
    blocks.release(gone)
    blocks.forget_all()
    blocks.check([held])
    for key in (b"a", b"b"):
        blocks.match(gone, [key])
        assert gone == []


def test_check_finds_a_count_that_is_off_and_a_free_block_that_can_be_found():
    blocks = BlockManager(num_blocks=3, tokens_per_block=1)
    table, other = [], []
    blocks.grow(table, 1)
    blocks.register(table[0], b"a")
    blocks.match(other, [b"a"])
    with pytest.raises(AssertionError, match="block tables"):
        blocks.check([table])
    blocks.release(other)
    blocks._free.append(table[0])
    blocks._references[table.pop()] = 0
    with pytest.raises(AssertionError, match="prefix cache"):
        blocks.check([])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), max_size=60))
def test_any_order_of_sharing_keeps_every_count(operations):
    """A few prompts of up to 9 blocks, alike in their first three, come and go."""
    blocks = BlockManager(num_blocks=12, tokens_per_block=1)
    tables = [[], [], [], []]
    for index, count, kind in operations:
        table = tables[index]
        if table:
            blocks.release(table)
        else:
            keys = [bytes([i, kind if i > 2 else 0]) for i in range(count)]
            blocks.match(table, keys)
            if blocks.grow(table, count):
                for block, key in zip(table, keys):
                    blocks.register(block, key)
        blocks.check(tables)
    for table in tables:
        blocks.release(table)
    blocks.check(tables)
    assert blocks.used == 0
