"""Whether tokens of a long reply cost more: what a step takes besides model and draft, early and late in a reply."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from recurrent_drafter.bench.oracle import OracleDrafter
from recurrent_drafter.bench.profile import profiled
from recurrent_drafter.bench.workload import oracle_for, random_model, random_prompts
from recurrent_drafter.decoding.costs import Costs
from recurrent_drafter.decoding.draft_controller import LONGEST
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator

MOST = 1.2  # times as long as early that a step's own work may take late
STAGES = ("host", "accept", "tree", "controller")  # generation state, sampler, tree and controller
HIT_RATE = 0.98
# A verification takes a tick of the controller's clock, whatever it verifies, and so does the longest draft.
COSTS = Costs(rows=(1, 64), verify=(1.0, 1.0), draft_level=1 / LONGEST)
PENALTIES = (1.0, 1.1)  # for repetition; 1 is none
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=4096,
    max_position_embeddings=8192,
)


@dataclass(frozen=True)
class Windows:
    """Which steps are timed: those within ``around`` tokens of two places of a reply, in so many replies."""

    early: int = 200
    late: int = 4_000
    around: int = 150
    replies: int = 3


@dataclass(frozen=True)
class LongReplies:
    """Medians over steps, in seconds by stage, in both windows; and the ratio of all stages together."""

    arm: str
    penalty: float
    places: tuple[int, int]
    early: dict[str, float]
    late: dict[str, float]
    ratio: float


def measure_long_replies(windows: Windows = Windows()) -> Iterator[LongReplies]:  # noqa: B008
    """Autoregression and adaptive drafts with an oracle, each without and with a repetition penalty.

    Of adaptive steps those count that accept a whole draft, for they all do the same work.
    """
    model = random_model(CONFIG, torch.float32, "cpu")
    alone = RecurrentDraftingSpeculator(None)
    alone.attach_verifier(model)
    for penalty in PENALTIES:
        options: dict[str, Any] = {"max_new_tokens": windows.late + windows.around, "eos_token_id": [-1]}
        options |= {"do_sample": False, "repetition_penalty": penalty}
        plain, drafted = Timings(windows, lambda _: True), Timings(windows, lambda step: step == (LONGEST, LONGEST))
        for prompt in random_prompts(CONFIG.vocab_size, windows.replies, 32):
            speculator = oracle_for(model, HIT_RATE)
            speculator.costs, speculator.clock = COSTS, itertools.count(0.0).__next__
            assert isinstance(speculator.drafter, OracleDrafter)
            speculator.drafter.learn(prompt, plain.decode(alone, prompt, options))
            drafted.decode(speculator, prompt, options)
        yield plain.result("autoregression", penalty)
        yield drafted.result("auto", penalty)


class Timings:
    """Seconds of steps by stage, in two windows.

    ``counts`` says of a step that drafted and accepted so many tokens whether it counts.
    """

    def __init__(self, windows: Windows, counts: Callable[[tuple[int, int]], bool]) -> None:
        self._windows, self._counts = windows, counts
        self._seconds: dict[int, list[list[float]]] = {windows.early: [], windows.late: []}

    def decode(self, speculator: RecurrentDraftingSpeculator, prompt: Tensor, options: dict[str, Any]) -> list[int]:
        """The reply, its steps timed."""
        reply: list[int] = []
        with profiled() as profile:
            before = np.zeros(len(STAGES))
            for emitted in speculator.stream(prompt[None], **options):
                reply += emitted
                now = np.array([profile.seconds[stage] for stage in STAGES])
                for place, seconds in self._seconds.items():
                    within = abs(len(reply) - place) <= self._windows.around and len(emitted) < len(reply)
                    if within and self._counts(speculator.stats.drafts[0][-1]):
                        seconds.append((now - before).tolist())
                before = now
        return reply

    def result(self, arm: str, penalty: float) -> LongReplies:
        """The medians of all replies."""
        early, late = self._seconds.values()
        stages = [dict(zip(STAGES, np.median(steps, axis=0).tolist(), strict=True)) for steps in (early, late)]
        ratio = float(np.median(np.sum(late, 1)) / np.median(np.sum(early, 1)))
        return LongReplies(arm, penalty, (self._windows.early, self._windows.late), stages[0], stages[1], ratio)


LONG_COLUMNS = ("arm", "repetition penalty", "at token", *STAGES, "late over early")


def long_rows(found: Sequence[LongReplies]) -> list[list[str]]:
    """Milliseconds of a step by stage, early and late, and the ratio: as `LONG_COLUMNS` says."""
    rows = []
    for measured in found:
        for place, seconds in zip(measured.places, (measured.early, measured.late), strict=True):
            ratio = f"{measured.ratio:.2f}" if place == measured.places[-1] else ""
            figures = [f"{1e3 * seconds[stage]:.3f}" for stage in STAGES]
            rows.append([measured.arm, f"{measured.penalty:g}", f"{place:,}", *figures, ratio])
    return rows
