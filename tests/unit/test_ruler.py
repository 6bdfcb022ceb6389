"""The one ruler: who runs when, what a verdict says, and intervals against their definition."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from recurrent_drafter.measure.divergence import Divergence
from recurrent_drafter.measure.ruler import (
    BUG,
    IDENTICAL,
    NOT_COMPARED,
    TIE,
    Arm,
    Estimate,
    Run,
    Trial,
    compare,
    interleave,
    interval,
    judge,
    median_of_ratios,
    ratio,
    ratio_of_rates,
    ratio_of_sums,
    tokens_per_step,
    until_end,
    verdict,
)


def trial(**seconds):
    """Ten tokens an arm, in so many seconds, of which prefill takes half a one."""
    return Trial(None, {arm: Run([range(10)], taken, first_seconds=0.5, steps=3) for arm, taken in seconds.items()})


def test_arms_take_turns_and_warm_up_before_the_clock():
    calls = []
    arms = [Arm(name, lambda batch, name=name: calls.append((name, batch)) or Run([[1]], 1.0)) for name in "abc"]
    asked = []

    def batches():
        for number in range(3):
            asked.append((number, len(calls)))
            yield number

    trials = [found.batch for found in interleave(arms, batches(), warm_up=lambda batch: f"a little of {batch}")]
    assert calls[:3] == [("a", "a little of 0"), ("b", "a little of 0"), ("c", "a little of 0")]
    assert [name for name, _ in calls[3:]] == [*"abc", *"bca", *"cab"]
    assert trials == [0, 1, 2]
    assert asked == [(0, 0), (1, 6), (2, 9)], "a batch may depend on what became of the one before"
    calls.clear()
    list(interleave(arms, [4], start=4))
    assert [name for name, _ in calls] == [*"abc", *"bca"], "what is gone on with has the turns of one run"
    assert [list(found.runs) for found in interleave(arms, [0, 1])] == [[*"abc"]] * 2, "in the arms' order"


def test_a_verdict_for_every_row():
    def explain(row, expected, found):
        tie = Divergence(position=2, expected=expected[2], found=found[2], margin=0.1, tolerance=0.2)
        return tie if row == 1 else dataclasses.replace(tie, margin=0.3)

    reference = Run([[1, 2, 3], [1, 2, 3], [1, 2, 3]], 1.0)
    judged = judge(Run([[1, 2, 3], [1, 2, 4], [1, 2, 5]], 1.0), reference, explain)
    assert [found.outcome for found in judged] == [IDENTICAL, TIE, BUG]
    assert (judged[1].margin, judged[2].divergence.found) == (0.1, 5)
    assert (verdict(judged[:1]), verdict(judged[:2]), verdict(judged)) == ("yes", "ties: 1 (0.1)", "NO: 1")


def test_the_first_arm_that_can_be_compared_is_the_reference():
    arms = [Arm("other law", lambda _: Run([[7]], 1.0), is_compared=False), Arm("base", lambda _: Run([[1]], 1.0))]
    arms.append(Arm("wrong", lambda _: Run([[2]], 1.0)))
    bug = Divergence(0, 1, 2, margin=9.0, tolerance=0.1)
    (found,) = compare(arms, ["batch"], lambda batch: lambda *_: bug if batch == "batch" else None)
    assert {arm: [one.outcome for one in rows] for arm, rows in found.verdicts.items()} == {
        "other law": [NOT_COMPARED], "base": [IDENTICAL], "wrong": [BUG]
    }  # fmt: skip
    assert verdict(found.verdicts["other law"]) == "same law"


def test_ids_are_counted_through_the_first_end_token():
    rows = [5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 2, 2]
    assert [len(until_end(row, [2, 9])) for row in rows] == [2, 4, 1]
    assert [len(until_end(row, [])) for row in rows] == [4, 4, 4]
    assert until_end([3, 5, 1, 5, 1], (5,)) == [3, 5]


def test_rates_with_and_without_prefill():
    run = Run([range(5), range(3)], seconds=3.0, first_seconds=1.0, steps=4)
    assert (run.count, run.rate) == (8, 8 / 3)
    assert run.speed(decoding_only=True) == (6, 2.0)
    assert tokens_per_step([Trial(None, {"a": run})], "a") == 6 / 4
    assert math.isnan(tokens_per_step([Trial(None, {"a": Run([[1]], 1.0)})], "a"))


def test_a_ratio_is_the_median_over_trials_of_both_arms():
    trials = [trial(fast=0.5, slow=1.0), trial(fast=1.0, slow=2.0), trial(fast=4.0, slow=4.0)]
    found = ratio(trials, "fast", "slow")
    assert found.value == 2.0 and 1.0 <= found.low <= found.high <= 2.0
    assert ratio(trials[1:], "fast", "slow", statistic=ratio_of_rates).value == 6 / 5
    assert ratio(trials[:2], "fast", "slow", decoding_only=True).value == pytest.approx(np.median([0.5 / 1e-9, 3]))


def test_what_emitted_nothing_that_counts_says_nothing():
    only_prefill = Trial(None, {name: Run([[1]], 1.0, first_seconds=1.0) for name in ("fast", "slow")})
    assert ratio([only_prefill, trial(fast=1.0, slow=2.5)], "fast", "slow", decoding_only=True) == Estimate(4.0)
    assert math.isnan(ratio([only_prefill], "fast", "slow", decoding_only=True).value)


def test_the_moods_of_the_machine_cancel():
    """Both arms of a prompt are slower by the same factor: neither the ratio nor its interval notices."""
    generator = np.random.default_rng(0)
    taken = [(float(own), float(base)) for own, base in generator.uniform(1, 2, (12, 2))]
    calm = [trial(own=own, base=base) for own, base in taken]
    moody = [trial(own=own * mood, base=base * mood) for (own, base), mood in zip(taken, range(1, 13), strict=True)]
    one, other = (ratio(trials, "own", "base") for trials in (calm, moody))
    assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other))
    alone = [interval([(10, run.runs["own"].seconds) for run in trials], ratio_of_sums) for trials in (calm, moody)]
    assert alone[1].high / alone[1].low > alone[0].high / alone[0].low, "apart they would not"


def test_an_interval_is_scipys_over_whole_rows():
    rows = np.random.default_rng(1).uniform(1, 5, (20, 2))
    expected = bootstrap(
        tuple(rows.T), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, n_resamples=4000, rng=0
    ).confidence_interval
    found = interval(rows.tolist(), ratio_of_sums)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)
    opposed = interval([(1.0, 10.0), (10.0, 1.0)] * 20, ratio_of_sums)
    assert 0.1 < opposed.low < 1 < opposed.high < 10
    assert opposed.value == 1.0


def test_an_interval_holds_the_median():
    found = interval([(value, 1, 1, 1) for value in (1.0, 2.0, 3.0, 4.0, 100.0)], median_of_ratios)
    assert found.value == 3.0 and 1.0 <= found.low <= 3.0 <= found.high <= 100.0
    assert interval([(2.0, 1, 1, 1)] * 9, median_of_ratios) == Estimate(2.0, 2.0, 2.0)


def test_small_samples_do_not_claim_to_be_sure():
    assert interval([(3, 2)], ratio_of_sums) == Estimate(1.5), "one observation has no interval"
    assert f"{Estimate(1.5):.2f}" == "1.50"
    assert interval([(3, 2)] * 5, ratio_of_sums) == Estimate(1.5, 1.5, 1.5)  # equal ones: by percentiles
    assert all(math.isnan(interval(rows, ratio_of_sums).value) for rows in ([], [(1, 0)] * 3))
    some = interval([(1, 1), (1, 0)], ratio_of_sums)  # a resample of the second alone has no ratio
    assert some.value == 2.0 and math.isfinite(some.low) and math.isfinite(some.high)


def test_an_estimate_in_a_table_a_file_and_a_picture():
    estimate = Estimate(2.0, 1.5, 2.25)
    assert f"{estimate:.2f}" == "2.00 (1.50-2.25)" and f"{Estimate(math.nan):.2f}" == ""
    assert estimate.named("x") == {"x": 2.0, "x_low": 1.5, "x_high": 2.25} and Estimate(2.0).named("x") == {"x": 2.0}
    assert estimate.reach == (0.5, 0.25) and Estimate(2.0).reach == (0.0, 0.0)
    assert Estimate(2.0, 2.1, 2.2).reach == (0.0, pytest.approx(0.2)), "an interval need not hold the figure"
