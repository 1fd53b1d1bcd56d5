from tests.sabotage import ROWS, stale


def test_every_sabotage_can_be_done():
    assert not stale(ROWS)
