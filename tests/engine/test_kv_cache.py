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
