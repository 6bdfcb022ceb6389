"""How a reproduction's report names and writes things."""

from recurrent_drafter.reproduce.findings import Arm, Place
from recurrent_drafter.reproduce.statistics import Estimate

METHODS = {
    "ground_truth": "ground truth",
    "knowledge_distillation": "knowledge distillation",
    "distilled": "distilled targets",
}
SCOPES = {"full": "whole conversations", "assistant": "replies only"}
VERDICTS = {
    "more": "more tokens per step",
    "fewer": "fewer tokens per step",
    "undecided": "undecided: the interval holds 0 %",
}


def method(arm: Arm) -> str:
    """What an arm learns from."""
    return METHODS[arm.method] + ("" if arm.rnn else ", no recurrence")


def training(arm: Arm) -> str:
    """An arm in a row of a table."""
    return f"{method(arm)}; {SCOPES[arm.scope]}; {arm.training_set}"


def place(where: Place) -> str:
    return f"{where.set}, {beams(where)}"


def beams(where: Place) -> str:
    return f"{where.beam_width} x {where.beam_length}"


def figure(estimate: Estimate) -> str:
    """``2.31 (2.20 to 2.41)``."""
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def percent(ratio: float) -> str:
    """A ratio as a change: ``+7.7 %``."""
    return f"{100 * (ratio - 1):+.1f} %"


def change(estimate: Estimate) -> str:
    """``+7.7 % (+1.2 to +9.9)``."""
    low, high = (percent(value).removesuffix(" %") for value in (estimate.low, estimate.high))
    return f"{percent(estimate.value)} ({low} to {high})"
