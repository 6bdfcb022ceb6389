"""Whether going on for long costs more: steps late in a reply, and generations late among many (`soak`)."""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig

from recurrent_drafter.bench.profile import MIB, profiled
from recurrent_drafter.bench.workload import OracleDrafter, oracle_for, random_model, random_prompts
from recurrent_drafter.decoding.costs import Costs, Tuning
from recurrent_drafter.decoding.draft_controller import LONGEST
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import AUTO, PLAIN, Decoding
from recurrent_drafter.measure.ruler import now

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


class LongReplies:
    """Seconds of an arm's steps by stage, in two windows of its replies.

    ``counts`` says of a step that drafted and accepted so many tokens whether it counts.
    """

    def __init__(self, arm: str, penalty: float, windows: Windows, counts: Callable[[tuple[int, int]], bool]) -> None:
        self.arm, self.penalty, self.around, self.counts = arm, penalty, windows.around, counts
        self.seconds: dict[int, list[list[float]]] = {windows.early: [], windows.late: []}  # of steps, by place

    def decode(self, speculator: RecurrentDraftingSpeculator, prompt: Tensor, options: dict[str, Any]) -> list[int]:
        """The reply, its steps timed."""
        reply: list[int] = []
        with profiled() as profile:
            before = np.zeros(len(STAGES))
            for emitted in speculator.stream(prompt[None], **options):
                reply += emitted
                after = np.array([profile.seconds[stage] for stage in STAGES])
                for place, seconds in self.seconds.items():
                    within = abs(len(reply) - place) <= self.around and len(emitted) < len(reply)
                    if within and self.counts(speculator.stats.drafts[0][-1]):
                        seconds.append((after - before).tolist())
                before = after
        return reply

    @property
    def medians(self) -> dict[int, dict[str, float]]:
        """Of each stage, by place."""
        steps = self.seconds.items()
        return {place: dict(zip(STAGES, np.median(found, axis=0).tolist(), strict=True)) for place, found in steps}

    @property
    def ratio(self) -> float:
        """All stages together, late over early."""
        early, late = (np.median(np.sum(steps, 1)) for steps in self.seconds.values())
        return float(late / early)

    def as_record(self) -> dict[str, Any]:
        early, late = self.medians.values()
        names = {"kind": "long", "arm": self.arm, "penalty": self.penalty, "places": list(self.seconds)}
        return {**names, "early": early, "late": late, "ratio": self.ratio}


def measure_long_replies(windows: Windows = Windows()) -> Iterator[LongReplies]:  # noqa: B008
    """Autoregression and adaptive drafts with an oracle, each without and with a repetition penalty.

    Of adaptive steps those count that accept a whole draft, for they all do the same work.
    """
    model = random_model(CONFIG, torch.float32, "cpu")
    alone = RecurrentDraftingSpeculator(lookup=False)
    alone.attach_verifier(model)
    for penalty in PENALTIES:
        options: dict[str, Any] = {"max_new_tokens": windows.late + windows.around, "eos_token_id": [-1]}
        options |= {"do_sample": False, "repetition_penalty": penalty}
        plain = LongReplies(PLAIN, penalty, windows, lambda _: True)
        drafted = LongReplies(AUTO, penalty, windows, lambda step: step == (LONGEST, LONGEST))
        for prompt in random_prompts(CONFIG.vocab_size, windows.replies, 32):
            speculator = oracle_for(model, HIT_RATE)
            oracle = speculator.drafter
            assert isinstance(oracle, OracleDrafter)
            speculator.clock = itertools.count(0.0).__next__
            speculator = speculator.with_tuning(Tuning(oracle.config.draft_shape, COSTS, holds_for={}))
            oracle.learn(prompt, plain.decode(alone, prompt, options))
            drafted.decode(speculator, prompt, options)
        yield from (plain, drafted)


LONG_COLUMNS = ("arm", "repetition penalty", "at token", *STAGES, "late over early")


def long_rows(found: Sequence[LongReplies]) -> list[list[str]]:
    """Milliseconds of a step by stage, early and late, and the ratio: as `LONG_COLUMNS` says."""
    rows = []
    for measured in found:
        for ratio, (place, stages) in zip(("", f"{measured.ratio:.2f}"), measured.medians.items(), strict=True):
            figures = [f"{1e3 * seconds:.3f}" for seconds in stages.values()]
            rows.append([measured.arm, f"{measured.penalty:g}", f"{place:,}", *figures, ratio])
    return rows


@dataclass
class Soak:
    """One entry for each generation: seconds per step, and resident bytes after it."""

    tokens: int = 0
    step_seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Growth is from the second fifth of the generations to the last: the first one fills pools and caches."""
        series = self.step_seconds, self.resident
        times, sizes = ([np.median(fifth) for fifth in np.array_split(values, 5)] for values in series)
        return {
            "tokens": self.tokens,
            "generations": len(self.resident),
            "step_ms": 1e3 * float(np.median(self.step_seconds)),
            "time_growth": float(times[4] / times[1]),
            "memory_growth_mib": float(sizes[4] - sizes[1]) / MIB,
        }


def soak(speculator: RecurrentDraftingSpeculator, prompt: Tensor, tokens: int, decoding: Decoding) -> Soak:
    """Generate ``tokens`` tokens after a prompt (S,), each prompt being the last S tokens of all that came before.

    Lengths are the same in every generation, so that times can be compared; prefill's share is within them. Raises
    ValueError when ``tokens`` are fewer than five generations, which growth is read from.
    """
    if tokens < 5 * decoding.new_tokens:
        raise ValueError(f"{tokens} tokens are asked for, expected at least five times {decoding.new_tokens}")
    result = Soak()
    (length,) = prompt.shape
    text = prompt[None].to(speculator.verifier.device)
    while result.tokens < tokens:
        begun = now()
        output = speculator.generate(text, torch.ones_like(text), **decoding.arguments())
        seconds = now() - begun
        assert isinstance(output, Tensor)
        result.tokens += output.shape[1] - length
        result.step_seconds.append(seconds / max(speculator.stats.steps, 1))
        text = output[:, -length:].clone()
        del output
        gc.collect()
        result.resident.append(psutil.Process().memory_info().rss)
    return result
