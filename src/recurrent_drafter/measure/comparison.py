"""Arms side by side: one process, interleaved, output compared."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper

from recurrent_drafter.core.metrics import median_interval
from recurrent_drafter.measure.divergence import Draw, first_divergence
from recurrent_drafter.measure.replies import left_padded
from recurrent_drafter.models.verifier import Verifier


@dataclass(frozen=True)
class Decoding:
    """How every arm decodes: reply lengths, end tokens (none: sustained), temperature (0: greedy), seed."""

    new_tokens: int
    end_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    seed: int = 0

    def draw(self, batch: "Batch", row: int) -> Draw:
        """How a row's tokens are drawn; each batch has a seed of its own."""
        if self.temperature == 0:
            return Draw(batch.input_ids[row])
        return Draw(batch.input_ids[row], (TemperatureLogitsWarper(self.temperature),), self.seed + batch.number, row)


@dataclass(frozen=True)
class Batch:
    """Prompts (B, S) to generate from together, left-padded where ``attention_mask`` is 0; the how-manieth they are."""

    input_ids: Tensor
    attention_mask: Tensor
    number: int = 0

    def prompt(self, row: int) -> Tensor:  # (S,), without its pads
        """One row's own tokens."""
        return self.input_ids[row][self.attention_mask[row].bool()]


def batches_of(prompts: Sequence[Tensor], size: int, device: torch.device) -> list[Batch]:
    """Prompts (S,) in their order, ``size`` at a time; what does not fill a batch is left out."""
    starts = range(0, len(prompts) - size + 1, size)
    return [Batch(*left_padded(prompts[start : start + size], device), start // size) for start in starts]


@dataclass(frozen=True)
class Arm:
    """A way of generating: a batch and the number of new tokens to replies (B, R), and the steps of all rows if known.

    ``is_compared`` is false where the output is of the same law only, as when transformers samples.
    """

    name: str
    generate: Callable[[Batch, int], tuple[Tensor, int | None]]
    is_compared: bool = True


@dataclass(frozen=True)
class Run:
    """One generation: how many ids each row emitted, verifications after prefill of all rows, seconds.

    ``first_seconds`` is what it took to generate a single token; ``outcome`` holds ``identical``, ``tie``, ``bug`` or
    ``not compared`` for each row.
    """

    tokens: list[int]
    steps: int | None
    seconds: float
    first_seconds: float
    outcome: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Ids emitted, all rows together."""
        return sum(self.tokens)

    @property
    def rate(self) -> float:
        """Tokens per second, prefill included."""
        return self.count / self.seconds

    @property
    def step_rate(self) -> float:
        """Tokens per second once every row has its first token: prefill and that token left out."""
        return (self.count - len(self.tokens)) / max(self.seconds - self.first_seconds, 1e-9)


@dataclass
class ArmResult:
    """An arm's runs over the batches, in order; ``bugs`` says where its output differs beyond numeric ties.

    ``replies`` are the ids of each run's rows; they are not written to files.
    """

    name: str
    runs: list[Run] = field(default_factory=list)
    replies: list[list[list[int]]] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Tokens after prefill's own, per verification and row; NaN for an arm that does not count steps."""
        steps = sum(run.steps or 0 for run in self.runs)
        return sum(run.count - len(run.tokens) for run in self.runs) / steps if steps else float("nan")

    @property
    def rate(self) -> float:
        """Tokens per second: median over the batches."""
        return float(np.median([run.rate for run in self.runs]))

    def speedup(self, base: "ArmResult", *, prefill: bool = True) -> tuple[float, float, float]:
        """Median over the batches of the ratio of rates, with its 95 % interval.

        Both arms' runs of a batch are near each other in time, so that the machine's moods cancel.
        """
        rates = [(run.rate, other.rate) if prefill else (run.step_rate, other.step_rate)
                 for run, other in zip(self.runs, base.runs, strict=True)]  # fmt: skip
        ratios = [own / other for own, other in rates]
        return (float(np.median(ratios)), *median_interval(ratios))

    def outcomes(self, kind: str) -> int:
        """How many rows ended so."""
        return sum(run.outcome.count(kind) for run in self.runs)

    @property
    def equality(self) -> str:
        """``yes``, or how many prompts differed, and how."""
        if self.bugs:
            return f"NO: {len(self.bugs)}"
        if self.outcomes("not compared"):
            return "same law"
        ties = self.outcomes("tie")
        return f"ties: {ties}" if ties else "yes"


def compare(
    arms: Sequence[Arm],
    batches: Sequence[Batch],
    verifier: Verifier,
    decoding: Decoding,
    *,
    done: Callable[[], None] = lambda: None,
) -> list[ArmResult]:
    """Run every arm on every batch, changing their order from batch to batch; the first one compared is the reference.

    The first batch is run once more in front, as warm-up. Each arm also generates a single token, so that prefill can
    be told apart. Equality is judged row by row: identical, a numeric tie at the first divergence, or a bug.
    """
    results = [ArmResult(arm.name) for arm in arms]
    for arm in arms:
        arm.generate(batches[0], decoding.new_tokens)
    for batch in batches:
        turn = batch.number % len(arms)
        for index in [*range(turn, len(arms)), *range(turn)]:
            run, replies = timed(arms[index], batch, decoding)
            results[index].runs.append(run)
            results[index].replies.append(replies)
        judge(verifier, batch, decoding, arms, results)
        done()
    return results


def timed(arm: Arm, batch: Batch, decoding: Decoding) -> tuple[Run, list[list[int]]]:
    """Generate one token, then the reply; a clock around each. The run, and the ids of its rows."""
    begun = now(batch.input_ids.device)
    arm.generate(batch, 1)
    first = now(batch.input_ids.device)
    replies, steps = arm.generate(batch, decoding.new_tokens)
    ended = now(batch.input_ids.device)
    ids = emitted(replies, decoding.end_ids)
    return Run(list(map(len, ids)), steps, ended - first, first - begun), ids


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def emitted(replies: Tensor, end_ids: Iterable[int]) -> list[list[int]]:  # (B, R)
    """What each row generated, through its first end token: the one counter of every arm.

    >>> emitted(torch.tensor([[7, 2, 0, 0], [7, 8, 9, 7]]), end_ids=[2])
    [[7, 2], [7, 8, 9, 7]]
    """
    ends = set(end_ids)
    rows = replies.tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def judge(
    verifier: Verifier, batch: Batch, decoding: Decoding, arms: Sequence[Arm], results: Sequence[ArmResult]
) -> None:
    """Compare the newest replies of every arm with the reference's, row by row, and note the outcomes."""
    reference = next(result.replies[-1] for arm, result in zip(arms, results, strict=True) if arm.is_compared)
    for arm, result in zip(arms, results, strict=True):
        for row, (expected, found) in enumerate(zip(reference, result.replies[-1], strict=True)):
            difference = None
            if arm.is_compared:
                difference = first_divergence(verifier, batch.prompt(row), expected, found, decoding.draw(batch, row))
            if difference is None:
                outcome = "identical" if arm.is_compared else "not compared"
            elif difference.is_tie:
                outcome = "tie"
            else:
                outcome = "bug"
                where = f"prompt {batch.number}, row {row}, token {difference.position}"
                result.bugs.append(f"{where}, margin {difference.margin:.2g}")
            result.runs[-1].outcome.append(outcome)
