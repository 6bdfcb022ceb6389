"""Arms side by side: one process, interleaved, output compared first (layer 4)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recurrent_drafter.metrics import median_interval
from recurrent_drafter.verifier import Verifier
from recurrent_drafter.verify import first_divergence


@dataclass(frozen=True)
class Run:
    """One generation: the ids emitted, verifications after prefill (None where it is not our loop), seconds."""

    tokens: list[int]
    steps: int | None
    seconds: float


@dataclass
class ArmResult:
    """An arm's runs over the prompts, in order, and how its output compares with the first arm's."""

    name: str
    runs: list[Run] = field(default_factory=list)
    identical: int = 0
    ties: int = 0
    bugs: list[str] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each prompt, prefill included."""
        return [len(run.tokens) / run.seconds for run in self.runs]

    @property
    def tokens_per_step(self) -> float:
        """Tokens after prefill's own, per verification; NaN for an arm that does not count steps."""
        steps = sum(run.steps or 0 for run in self.runs)
        return sum(len(run.tokens) - 1 for run in self.runs) / steps if steps else float("nan")

    def speedup(self, base: "ArmResult") -> tuple[float, float, float]:
        """Median over the prompts of the ratio of rates, with its 95 % interval.

        Both arms' runs of a prompt are near each other in time, so that the machine's moods cancel.
        """
        ratios = [own / other for own, other in zip(self.rates, base.rates, strict=True)]
        return (float(torch.tensor(ratios).median()), *median_interval(ratios))

    @property
    def equality(self) -> str:
        """``yes``, or how many prompts differed, and how."""
        if self.bugs:
            return f"NO: {len(self.bugs)}"
        return f"ties: {self.ties}" if self.ties else "yes"


Generate = Callable[[Tensor], tuple[list[int], int | None]]  # prompt (1, S) -> new ids, steps


def compare(
    arms: dict[str, Generate],
    prompts: Sequence[Tensor],
    verifier: Verifier,
    *,
    done: Callable[[], None] = lambda: None,
) -> list[ArmResult]:
    """Run every arm on every prompt (S,), changing their order from prompt to prompt; the first arm is the reference.

    The first prompt is run once more in front, as warm-up. Equality is judged prompt by prompt: identical, a numeric
    tie at the first divergence, or a bug.
    """
    results = {name: ArmResult(name) for name in arms}
    names = list(arms)
    for name in names:
        arms[name](prompts[0][None].to(verifier.device))
    for number, prompt in enumerate(prompts):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            input_ids = prompt[None].to(verifier.device)
            begun = time.perf_counter()
            tokens, steps = arms[name](input_ids)
            results[name].runs.append(Run(tokens, steps, time.perf_counter() - begun))
        expected = results[names[0]].runs[number].tokens
        for result in results.values():
            difference = first_divergence(verifier, prompt, expected, result.runs[number].tokens)
            if difference is None:
                result.identical += 1
            elif difference.is_tie:
                result.ties += 1
            else:
                result.bugs.append(f"prompt {number}, token {difference.position}, margin {difference.margin:.2g}")
        done()
    return list(results.values())
