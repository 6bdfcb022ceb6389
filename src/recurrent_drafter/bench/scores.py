"""From answers to figures: everything that an evaluation shows is computed from what its file holds."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recurrent_drafter.bench.evaluation import AUTOREGRESSIVE, SPECULATIVE, Answer, Skipped
from recurrent_drafter.core.metrics import Acceptance
from recurrent_drafter.measure import ruler
from recurrent_drafter.measure.ruler import BUG, DIFFERENT, IDENTICAL, OTHER_PROMPT, Estimate, Run, Trial, Verdict

KIND = "evaluation"  # of a file


@dataclass(frozen=True)
class ArmScores:
    """What one arm answered. Intervals draw questions whole, all turns of each together."""

    name: str
    trials: Sequence[Trial]

    @property
    def runs(self) -> list[Run]:
        return [trial.runs[self.name] for trial in self.trials]

    @property
    def answers(self) -> list[Answer]:
        return [answer for run in self.runs for answer in run.more]

    @property
    def tokens(self) -> int:
        return sum(run.count for run in self.runs)

    @property
    def seconds(self) -> float:
        """Of generating, prefill included."""
        return sum(run.seconds for run in self.runs)

    @property
    def rate(self) -> float:
        """Tokens per second over everything."""
        return self.tokens / self.seconds if self.seconds else float("nan")

    @property
    def tokens_per_step(self) -> Estimate:
        """Tokens after prefill's own over steps."""
        return self._by_question(lambda answer: (len(answer.ids) - 1, answer.steps))

    @property
    def acceptance_rate(self) -> Estimate:
        """Accepted over drafted tokens."""
        return self._by_question(lambda answer: (sum(answer.acceptance.accepted), sum(answer.acceptance.drafted)))

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.total([answer.acceptance for answer in self.answers])

    @property
    def sources(self) -> Counter[str]:
        """How many tokens each source gave."""
        return sum((Counter(answer.sources) for answer in self.answers), Counter())

    @property
    def verdicts(self) -> list[Verdict]:
        """How the answers compare with the reference's; none for the reference itself."""
        return [Verdict(answer.outcome, answer.margin) for answer in self.answers if answer.outcome]

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
            **{f"tokens_from_{source}": float(count) for source, count in self.sources.items()},
        }
        return {name: value for name, value in found.items() if value == value}

    def _by_question(self, counts: Callable[[Answer], tuple[int, int]]) -> Estimate:
        """Sum over sum; all turns of a question are one row."""
        rows: dict[str, list[tuple[int, int]]] = {}
        for answer in self.answers:
            rows.setdefault(answer.question, []).append(counts(answer))
        return ruler.interval([tuple(map(sum, zip(*row, strict=True))) for row in rows.values()], ruler.ratio_of_sums)


@dataclass
class Evaluation:
    """The answers of one or more arms to the same prompts. ``settings`` are those that all arms share.

    ``prompts`` is how many were to be answered; ``is_complete`` is false where the evaluation was interrupted.
    """

    settings: dict[str, Any]
    prompts: int
    names: Sequence[str]
    trials: list[Trial] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    is_complete: bool = False

    @property
    def arms(self) -> dict[str, ArmScores]:
        return {name: ArmScores(name, self.trials) for name in self.names}

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
        return self.arms.get(AUTOREGRESSIVE) if len(self.names) > 1 else None

    def speedup(self, *, decoding_only: bool = False) -> Estimate:
        """Ratio of the rates over everything; NaN for decoding alone where older files lack what that takes."""
        names = self.main.name, AUTOREGRESSIVE
        return ruler.ratio(self.trials, *names, decoding_only=decoding_only, statistic=ruler.ratio_of_rates)

    @property
    def bugs(self) -> list[str]:
        """Where output differs beyond numeric ties."""
        return [
            f"{arm.name}, question {answer.question}, turn {answer.turn}: {answer.difference}"
            for arm in self.arms.values()
            for answer in arm.answers
            if answer.outcome == BUG
        ]

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(answer.category for answer in self.main.answers))

    @property
    def times_categories(self) -> bool:
        """Whether every batch is of one category, so that categories have a speed."""
        return all(len({answer.category for answer in trial.runs[self.main.name].more}) == 1 for trial in self.trials)

    def of_category(self, category: str) -> "Evaluation":
        """The answers of one category; the seconds mean something only if no batch holds another one too."""

        def part(run: Run) -> Run:
            answers = [answer for answer in run.more if answer.category == category]
            return replace(run, ids=[answer.ids for answer in answers], more=answers)

        trials = [Trial(None, {name: part(run) for name, run in trial.runs.items()}) for trial in self.trials]
        return replace(self, trials=[trial for trial in trials if trial.runs[self.main.name].more])

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
            value = self.of_category(category).main.tokens_per_step.value
            found |= {f"{category}/tokens_per_step": value} if value == value else {}
        if self.base is not None and self.base.answers:
            found |= {f"baseline/{name}": value for name, value in self.base.figures().items()}
            found |= self.speedup().named("speedup")
            found |= self.speedup(decoding_only=True).named("speedup_decoding_only")
            outcomes = Counter(one.outcome for one in self.main.verdicts)
            found |= {outcome.replace(" ", "_"): float(count) for outcome, count in outcomes.items()}
        return found

    def as_record(self) -> dict[str, Any]:
        def batch(run: Run) -> dict[str, Any]:
            seconds = {"seconds": run.seconds, "first_seconds": run.first_seconds}
            return {**seconds, "answers": list(map(asdict, run.more))}

        return {
            "kind": KIND,
            "complete": self.is_complete,
            "settings": self.settings,
            "figures": self.figures(),
            "prompts": self.prompts,
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "bugs": self.bugs,
            "arms": {name: [batch(trial.runs[name]) for trial in self.trials] for name in self.names},
        }


def read_evaluation(path: Path) -> Evaluation:
    """What `Evaluation.as_record` wrote. Raises OSError or ValueError, naming the file, for anything else."""
    try:
        record = json.loads(path.read_text())
        if record["kind"] != KIND:
            raise KeyError(KIND)
        names = list(record["arms"])
        batches = [map(_run, own) for own in record["arms"].values()]
        trials = [Trial(None, dict(zip(names, runs, strict=True))) for runs in zip(*batches, strict=True)]
        skipped = [Skipped(**entry) for entry in record["skipped"]]
        return Evaluation(record["settings"], record["prompts"], names, trials, skipped, bool(record["complete"]))
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
        for arm in other.arms:
            if arm in arms:
                raise ValueError(
                    f"{both} both hold the {arm} arm: expected one file with --autoregressive, one without"
                )
        arms |= other.arms
    layouts = [[[(answer.question, answer.turn) for answer in run.more] for run in arm.runs] for arm in arms.values()]
    if any(layout != layouts[0] for layout in layouts):
        counts = " and ".join(f"{len(arm.answers)} ({name})" for name, arm in arms.items())
        raise ValueError(f"the files hold answers to other prompts, {counts}: run the one that was interrupted again")
    # arms have two names only, and none is here twice
    diverged: set[str] = set()
    pairs = zip(arms[SPECULATIVE].runs, arms[AUTOREGRESSIVE].runs, strict=True)
    trials = [Trial(None, {SPECULATIVE: _judged(*pair, diverged), AUTOREGRESSIVE: pair[1]}) for pair in pairs]
    complete = all(evaluation.is_complete for _, evaluation in files)
    return Evaluation(first.settings, first.prompts, list(arms), trials, first.skipped, complete)


def _judged(run: Run, reference: Run, diverged: set[str]) -> Run:
    """The answers with their outcomes, by the ids alone; questions whose answers differ are added to ``diverged``."""
    answers = []
    for answer, expected in zip(run.more, reference.more, strict=True):
        outcome = IDENTICAL if answer.ids == expected.ids else DIFFERENT
        answers.append(replace(answer, outcome=OTHER_PROMPT if answer.question in diverged else outcome))
        if outcome == DIFFERENT:
            diverged.add(answer.question)
    return replace(run, more=answers)


def _run(record: dict[str, Any]) -> Run:
    answers = [Answer(**{**entry, "acceptance": Acceptance(**entry["acceptance"])}) for entry in record["answers"]]
    first = record.get("first_seconds", float("nan"))  # which older files lack
    return Run([answer.ids for answer in answers], record["seconds"], first, more=answers)
