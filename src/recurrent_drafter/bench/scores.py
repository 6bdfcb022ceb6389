"""From answers to figures: everything that an evaluation shows is computed from what its file holds."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recurrent_drafter.bench.evaluation import AUTOREGRESSIVE, SPECULATIVE, Answer, AnsweredBatch, Round, Skipped
from recurrent_drafter.core.metrics import Acceptance
from recurrent_drafter.measure import ruler
from recurrent_drafter.measure.ruler import DIFFERENT, IDENTICAL, OTHER_PROMPT, Estimate, Trial, Verdict

KIND = "evaluation"  # of a file


@dataclass
class ArmScores:
    """What one arm answered. Intervals draw questions whole, all turns of each together."""

    name: str
    batches: list[AnsweredBatch] = field(default_factory=list)

    @property
    def answers(self) -> list[Answer]:
        return [answer for batch in self.batches for answer in batch.answers]

    @property
    def tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def seconds(self) -> float:
        return sum(batch.seconds for batch in self.batches)

    @property
    def rate(self) -> float:
        """Tokens per second over everything."""
        return self.tokens / self.seconds if self.seconds else float("nan")

    @property
    def tokens_per_step(self) -> Estimate:
        """Tokens after prefill's own over steps."""
        return self._by_question({answer.key: (len(answer.ids) - 1, answer.steps) for answer in self.answers})

    @property
    def acceptance_rate(self) -> Estimate:
        return self._by_question({a.key: (sum(a.acceptance.accepted), sum(a.acceptance.drafted)) for a in self.answers})

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.total([answer.acceptance for answer in self.answers])

    @property
    def verdicts(self) -> list[Verdict]:
        """How the answers compare with the reference's; none for the reference itself."""
        return [Verdict(answer.outcome, answer.margin) for answer in self.answers if answer.outcome]

    def speedup(self, base: "ArmScores", *, decoding_only: bool = False) -> Estimate:
        """Ratio of the rates over everything; batches are drawn whole, both arms' runs of one together."""
        trials = [
            Trial(None, {"own": own.run, "base": other.run})
            for own, other in zip(self.batches, base.batches, strict=True)
        ]
        return ruler.ratio(trials, "own", "base", decoding_only=decoding_only, statistic=ruler.ratio_of_rates)

    @property
    def times_first(self) -> bool:
        """Whether the time of the first token is known, so that decoding alone has a speed."""
        return all(batch.first_seconds is not None for batch in self.batches)

    def of_category(self, category: str) -> "ArmScores":
        """The answers of one category; the seconds mean something only if no batch holds another one too."""
        batches = []
        for batch in self.batches:
            answers = [answer for answer in batch.answers if answer.category == category]
            if answers:
                batches.append(replace(batch, answers=answers))
        return ArmScores(self.name, batches)

    def figures(self) -> dict[str, float]:
        """All of it, flat, for files and trackers; what is not a number is left out."""
        found = {
            "prompts": float(len(self.answers)),
            "tokens": float(self.tokens),
            "seconds": self.seconds,
            "tokens_per_prompt": self.tokens / max(len(self.answers), 1),
            "tokens_per_second": self.rate,
            **self.tokens_per_step.named("tokens_per_step"),
            **self.acceptance_rate.named("acceptance_rate"),
            **{f"acceptance_pos{k}": share for k, share in enumerate(self.acceptance.by_position, start=1)},
        }
        return {name: value for name, value in found.items() if value == value}

    @staticmethod
    def _by_question(counts: dict[tuple[str, int], tuple[int, int]]) -> Estimate:
        """Sum over sum; all turns of a question are one row."""
        rows: dict[str, list[int]] = {}
        for (question, _), (above, below) in counts.items():
            row = rows.setdefault(question, [0, 0])
            row[0] += above
            row[1] += below
        return ruler.interval(list(rows.values()), ruler.ratio_of_sums)


@dataclass
class Evaluation:
    """The answers of one or more arms to the same prompts. ``settings`` are those that all arms share.

    ``prompts`` is how many were to be answered; ``is_complete`` is false where the evaluation was interrupted.
    """

    settings: dict[str, Any]
    prompts: int
    arms: dict[str, ArmScores]
    skipped: list[Skipped] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    is_complete: bool = False

    def add(self, done: Round) -> None:
        for name, batch in done.answered.items():
            self.arms[name].batches.append(batch)
        self.skipped += done.skipped
        self.bugs += done.bugs

    @property
    def done(self) -> int:
        """Prompts that were answered or skipped."""
        return len(self.main.answers) + len(self.skipped)

    @property
    def main(self) -> ArmScores:
        """The arm that the figures are about: with the drafter, if it is there."""
        return self.arms.get(SPECULATIVE) or next(iter(self.arms.values()))

    @property
    def base(self) -> ArmScores | None:
        """The arm that it is compared with."""
        return self.arms.get(AUTOREGRESSIVE) if len(self.arms) > 1 else None

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(answer.category for answer in self.main.answers))

    @property
    def times_categories(self) -> bool:
        """Whether every batch is of one category, so that categories have a speed."""
        return all(len({answer.category for answer in batch.answers}) == 1 for batch in self.main.batches)

    @property
    def equality(self) -> str:
        """The verdict, how many answers are identical, and how many had another prompt by then."""
        counts = Counter(one.outcome for one in self.main.verdicts)
        others = f"; {counts[OTHER_PROMPT]:,} {OTHER_PROMPT}" if counts[OTHER_PROMPT] else ""
        return f"{ruler.verdict(self.main.verdicts)}, {counts[IDENTICAL]:,} of {counts.total():,} prompts{others}"

    def figures(self) -> dict[str, float]:
        """For files and trackers: the main arm's figures, the baseline's with that word in front, and their ratio."""
        found = {**self.main.figures(), "complete": float(self.is_complete), "skipped": float(len(self.skipped))}
        for category in self.categories if len(self.categories) > 1 else ():
            value = self.main.of_category(category).tokens_per_step.value
            found |= {f"{category}/tokens_per_step": value} if value == value else {}
        if self.base is not None and self.base.answers:
            found |= {f"baseline/{name}": value for name, value in self.base.figures().items()}
            found |= self.main.speedup(self.base).named("speedup")
            if (alone := self.decoding_only) is not None:
                found |= alone.named("speedup_decoding_only")
            outcomes = Counter(one.outcome for one in self.main.verdicts)
            found |= {outcome.replace(" ", "_"): float(count) for outcome, count in outcomes.items()}
        return found

    @property
    def decoding_only(self) -> Estimate | None:
        """The speed-up without prefill and its token, where files hold what that takes."""
        if self.base is None or not (self.main.times_first and self.base.times_first):
            return None
        return self.main.speedup(self.base, decoding_only=True)

    def as_record(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "complete": self.is_complete,
            "settings": self.settings,
            "figures": self.figures(),
            "prompts": self.prompts,
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "bugs": self.bugs,
            "arms": {name: [asdict(batch) for batch in arm.batches] for name, arm in self.arms.items()},
        }


def read_evaluation(path: Path) -> Evaluation:
    """What `Evaluation.as_record` wrote. Raises OSError or ValueError, naming the file, for anything else."""
    try:
        record = json.loads(path.read_text())
        if record["kind"] != KIND:
            raise KeyError(KIND)
        arms = {name: ArmScores(name, list(map(_batch, batches))) for name, batches in record["arms"].items()}
        skipped = [Skipped(**entry) for entry in record["skipped"]]
        return Evaluation(
            record["settings"], record["prompts"], arms, skipped, list(record["bugs"]), bool(record["complete"])
        )
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no evaluation: expected what --eval_mt_bench --output_file writes") from error


def join(files: Sequence[tuple[str, Evaluation]]) -> Evaluation:
    """One evaluation of all arms, from files that each hold some; the names of the files are for messages.

    Raises ValueError for runs that one ratio cannot be made of: other settings, hardware or prompts, an arm twice.
    """
    (first_name, first), *others = files
    arms = dict(first.arms)
    for name, other in others:
        both = f"{first_name} and {name}"
        for key in sorted({*first.settings, *other.settings}):
            own, its = first.settings.get(key), other.settings.get(key)
            if own != its:
                raise ValueError(f"{both} cannot be joined: {key} is {own} in one and {its} in the other")
        if twice := [arm for arm in other.arms if arm in arms]:
            raise ValueError(
                f"{both} both hold the {twice[0]} arm: expected one file with --autoregressive, one without"
            )
        arms |= other.arms
    base = arms[AUTOREGRESSIVE]  # arms have two names only, and none is here twice
    layouts = [[[answer.key for answer in batch.answers] for batch in arm.batches] for arm in arms.values()]
    if any(layout != layouts[0] for layout in layouts):
        counts = " and ".join(f"{len(arm.answers)} ({name})" for name, arm in arms.items())
        raise ValueError(f"the files hold answers to other prompts, {counts}: run the one that was interrupted again")
    return Evaluation(
        first.settings,
        first.prompts,
        {name: arm if arm is base else _judged(arm, base) for name, arm in arms.items()},
        first.skipped,
        is_complete=all(evaluation.is_complete for _, evaluation in files),
    )


def _judged(arm: ArmScores, base: ArmScores) -> ArmScores:
    """The arm with its outcomes, by the ids alone."""
    expected = {answer.key: answer.ids for answer in base.answers}
    diverged: set[str] = set()
    batches = []
    for batch in arm.batches:
        answers = []
        for answer in batch.answers:
            alike = answer.ids == expected[answer.key]
            outcome = OTHER_PROMPT if answer.question in diverged else IDENTICAL if alike else DIFFERENT
            if not alike:
                diverged.add(answer.question)
            answers.append(replace(answer, outcome=outcome))
        batches.append(replace(batch, answers=answers))
    return ArmScores(arm.name, batches)


def _batch(record: dict[str, Any]) -> AnsweredBatch:
    answers = []
    for entry in record["answers"]:
        acceptance = Acceptance(*(tuple(entry["acceptance"][name]) for name in ("drafted", "accepted")))
        answers.append(Answer(**{**entry, "acceptance": acceptance}))
    return AnsweredBatch(record["seconds"], answers, record.get("first_seconds"))
