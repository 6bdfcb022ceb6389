"""How a reproduction's report names and writes things."""

from recurrent_drafter.measure.ruler import Estimate
from recurrent_drafter.reproduce.findings import Place, Recipe

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


def method(arm: Recipe) -> str:
    """What an arm learns from."""
    return METHODS[arm.method] + ("" if arm.rnn else ", no recurrence")


def training(arm: Recipe) -> str:
    """An arm in a row of a table."""
    return f"{method(arm)}; {SCOPES[arm.scope]}; {arm.training_set}"


def place(where: Place) -> str:
    return f"{where.set}, {beams(where)}"


def beams(where: Place) -> str:
    return f"{where.beam_width} x {where.beam_length}"


def percent(ratio: float) -> str:
    """A ratio as a change: ``+7.7 %``."""
    return f"{100 * (ratio - 1):+.1f} %"


def change(ratio: Estimate) -> str:
    """``+7.7 % (+1.2 to +9.9)``."""
    ends = [percent(end).removesuffix(" %") for end in (ratio.low, ratio.high) if end is not None]
    return percent(ratio.value) + (f" ({' to '.join(ends)})" if ends else "")
