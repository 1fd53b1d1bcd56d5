import pytest

from llama_engine.measure import stats


def test_percentiles_are_linear():
    assert stats.percentile([1, 2, 3, 4], 50) == 2.5
    assert stats.percentile([10, 20], 90) == pytest.approx(19.0)


def test_summary_by_hand():
    result = stats.summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert result["p50"] == result["mean"] == 3.0
    assert result["std"] == pytest.approx(2.5**0.5)
    assert result["spread"] == pytest.approx(2 / 3)
    assert (result["min"], result["max"], result["count"]) == (1.0, 5.0, 5)
    with pytest.raises(ValueError, match="no samples"):
        stats.summary([])


def test_bootstrap_is_seeded_and_brackets_the_ratio():
    a, b = [10.0, 11.0, 12.0, 10.5, 11.5], [5.0, 5.5, 6.1, 5.2, 5.8]
    first = stats.bootstrap_ratio(a, b)
    assert first == stats.bootstrap_ratio(a, b)
    assert first["ratio"] == pytest.approx(2.0)
    assert first["ci95"][0] <= first["ratio"] <= first["ci95"][1]
    assert first["verdict"] == "faster"
    assert stats.bootstrap_ratio(b, a)["verdict"] == "slower"


def test_pairing_cancels_common_drift():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    paired = stats.bootstrap_ratio([2 * x for x in drift], drift)
    unpaired = stats.bootstrap_ratio([2 * x for x in drift], drift, paired=False)
    assert paired["ci95"] == [2.0, 2.0]
    assert unpaired["verdict"] == "inconclusive"


@pytest.mark.parametrize(("a", "b"), [([], [1.0]), ([1.0, 2.0], [1.0]), ([0.0], [1.0])])
def test_bad_samples(a, b):
    with pytest.raises(ValueError, match=r"samples"):
        stats.bootstrap_ratio(a, b)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1.1, 2, "faster"), (0.5, 0.9, "slower"), (0.9, 1.1, "inconclusive")]
)
def test_verdict(low, high, expected):
    assert stats.verdict(low, high) == expected


def test_drift_is_between_quarters_of_the_run_and_not_between_samples():
    assert stats.drift([[100] * 8]) == 0
    assert stats.drift([[100, 90] * 8]) == 0  # quarters of four: as many of each
    assert stats.drift([[110, 110, 100, 100], [100, 100, 90, 90]]) == pytest.approx(0.2)
    assert stats.drift([[100, 100, 80, 80, 110, 110, 110, 110]]) == pytest.approx(0.3)  # a dip that has passed
    assert stats.drift([[90, 110]]) == pytest.approx(0.2)


def test_drift_compares_whole_repetitions():
    turn = [80, 100, 120]  # of any work with more than one phase
    assert stats.drift([turn] * 5) == 0
    assert stats.drift([turn, [], turn, turn, [75, 95, 115], turn]) == pytest.approx(0.05, rel=0.02)


def test_the_interval_of_a_share():
    low, high = stats.wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert stats.wilson(0, 64) == [0.0, pytest.approx(0.0566, abs=1e-4)]
    assert stats.wilson(64, 64)[1] == 1.0
