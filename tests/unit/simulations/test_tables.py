"""The statistics of a benchmark's tables, by hand."""

import math

import pytest
from pydantic import ValidationError

from metamoe.simulations.benchmark.tables import Record, Results, difference, interval_over_samples, paired_difference
from tests.unit.simulations.test_report import BTM, METAMOE, record, results


def test_paired_difference_by_hand() -> None:
    # Reference minus values: 8, 7, 9, 6, 5. Mean 7, variance 10 / 4, and t is 2.7764 for 4 degrees of freedom.
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    assert paired_difference(BTM, METAMOE) == pytest.approx((7, 7 - half, 7 + half), abs=1e-4)
    assert difference(BTM, METAMOE) == "+7.00 [+5.04, +8.96]"
    # With differences that are all the same, pairing leaves no doubt, however much the seeds differ.
    assert paired_difference([80, 90, 70], [81, 91, 71]) == pytest.approx((1, 1, 1))
    assert paired_difference([80], [81.5]) == (1.5, -math.inf, math.inf)
    assert difference([80], [81.5]) == "+1.50"
    with pytest.raises(ValueError, match="zip"):
        paired_difference([80, 81], [80])


def test_interval_over_samples_by_hand() -> None:
    def answered(**right: list[str]) -> Record:
        return record([50.0, 50.0], domains=list(right), right=right)

    ours = answered(digits=["1" * 100, "1" * 100], greek=["10" * 200] * 2)
    # Half of the digits are better by all seeds, nothing of Greek: a mean of 25 with a standard error of 0.5 x 50 / sqrt(100).
    low, high = interval_over_samples(answered(digits=["01" * 50] * 2, greek=["10" * 200] * 2), ours) or (0, 0)
    assert (low, high) == pytest.approx((25 - 1.96 * 2.5, 25 + 1.96 * 2.5), abs=0.3)
    # Samples that only one of two seeds has right count half: the standard error is half as large.
    low, high = interval_over_samples(answered(digits=["01" * 50, "1" * 100], greek=["10" * 200] * 2), ours) or (0, 0)
    assert (low, high) == pytest.approx((12.5 - 1.96 * 1.25, 12.5 + 1.96 * 1.25), abs=0.15)
    assert interval_over_samples(ours, ours) == (0, 0)
    # Other test sets, or none that were kept.
    assert interval_over_samples(answered(digits=["1" * 99] * 2, greek=["10" * 200] * 2), ours) is None
    assert interval_over_samples(record([50.0]), ours) is None
    with pytest.raises(ValidationError, match="as many samples"):
        Results.model_validate(results(methods={"metamoe": answered(digits=["1", "11"])}, seeds=[0, 1]).model_dump())
