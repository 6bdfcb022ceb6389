"""What trials, profiles and evaluations look like at the terminal."""

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from recurrent_drafter.bench.columns import NARROW, figure, rows_of
from recurrent_drafter.bench.profile import Profile
from recurrent_drafter.bench.scores import ArmScores, Evaluation
from recurrent_drafter.cli.progress import tracked
from recurrent_drafter.measure.arms import Batch, Decoding, explaining
from recurrent_drafter.measure.ruler import Arm, Trial, compare
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.report.document import Columns, terminal


def arm_table(trials: Sequence[Trial], decoding: Decoding, dtype: torch.dtype, batch_size: int) -> Table:
    """Ways of decoding side by side: speed, tokens per step, and whether the output is the same."""
    title = f"{decoding.protocol}, {decoding.drawing}, {named(dtype)}, batch {batch_size}"
    return terminal(rows_of(trials), NARROW, title, tight=True)


def compared(
    arms: Sequence[Arm], batches: Sequence[Batch], verifier: Verifier, decoding: Decoding, console: Console
) -> list[Trial]:
    """All arms on all batches, judged, with a bar meanwhile, and their table at the end."""
    judged = compare(arms, batches, explaining(verifier, decoding))
    prompts = sum(len(batch.row_ids) for batch in batches)
    rows = lambda trial: len(trial.batch.row_ids)  # noqa: E731
    trials = list(tracked(judged, f"decoding {len(arms)} ways", "prompts", total=prompts, counted=rows))
    console.print(arm_table(trials, decoding, verifier.model.dtype, len(batches[0].row_ids)))
    for row in rows_of(trials):
        if sum(row.sources.values()) > row.sources.get("verifier", 0):
            say(console, f"{row.arm}, tokens by source: {shares_told(row.sources)}")
    return trials


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def profile_table(profile: Profile, name: str = "") -> Table:
    total = 1e3 * profile.total / max(profile.steps, 1)
    rows = [*profile.rows, ("outside verify and draft", total * profile.overhead, profile.overhead)]
    columns: Columns = {
        "stage": lambda row: str(row[0]),
        "ms per step": lambda row: f"{row[1]:.3f}",
        "share": lambda row: f"{row[2]:.1%}",
    }
    return terminal(rows, columns, f"{name}: {profile.steps} steps".removeprefix(": "))


def show(console: Console, evaluation: Evaluation) -> None:
    """The summary, the comparison if there are two arms, the categories, and whatever was left out or differs."""
    arms = [arm for arm in evaluation.arms.values() if arm.answers]
    if not evaluation.is_complete:
        console.print(f"INTERRUPTED after {evaluation.done} of {evaluation.prompts} prompts: figures are of these.")
    if len(arms) == 1:
        console.print("Evaluation Summary:")
        for label, value in summary_rows(arms[0]).items():
            if value:
                say(console, f"   {label}: {value}")
    elif arms:
        shown = [summary_rows(arm) for arm in arms]
        columns: Columns = {"Method": str, **{own["Method"]: own.__getitem__ for own in shown}}
        console.print(terminal(list(shown[0])[1:], columns, "Evaluation Summary"))
        print_comparison(console, evaluation)
    if arms and len(evaluation.categories) > 1:
        console.print(category_table(evaluation))
    if evaluation.skipped:
        console.print(f"{len(evaluation.skipped)} of {evaluation.prompts} prompts were not answered:")
    for skipped in evaluation.skipped:
        say(console, f"   question {skipped.question}, turn {skipped.turn}: {skipped.reason}")
    for bug in evaluation.bugs:
        say(console, f"DIFFERS: {bug}")


def say(console: Console, line: str) -> None:
    """A line as it is: names from files may hold brackets."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary_rows(arm: ArmScores) -> dict[str, str]:
    count = len(arm.answers)
    return {
        "Method": arm.name.capitalize(),
        "Total prompts": f"{count:,}",
        "Total tokens": f"{arm.tokens:,}",
        "Total time": f"{arm.seconds:.1f}s",
        "Average tokens/prompt": f"{arm.tokens / count:.1f}",
        "Overall tokens/sec": f"{arm.rate:.1f}",
        "Tokens/step": f"{arm.tokens_per_step:.2f}",
        "Acceptance rate": f"{arm.acceptance_rate:.1%}",
        "Acceptance by position": " ".join(f"{share:.0%}" for share in arm.acceptance.by_position),
        "Tokens by source": shares_told(arm.sources) if arm.acceptance.drafted else "",
    }


def shares_told(counts: Mapping[str, int]) -> str:
    """Of tokens by source.

    >>> shares_told({"verifier": 60, "drafter": 0, "lookup": 20})
    'verifier 75%, lookup 25%'
    """
    return ", ".join(f"{name} {count / sum(counts.values()):.0%}" for name, count in counts.items() if count)


def print_comparison(console: Console, evaluation: Evaluation) -> None:
    main, base = evaluation.main, evaluation.base
    assert base is not None
    console.print("\nPerformance vs Baseline:")
    for arm in (main, base):
        say(console, f"   {arm.name.capitalize()}: {arm.rate:.1f} tok/s")
    alone = f"{evaluation.speedup(decoding_only=True):.2f}"
    say(console, f"   Speedup: {evaluation.speedup():.2f}" + (f"; decoding only: {alone}" if alone else ""))
    say(console, "   In brackets: 95 % intervals")
    say(console, f"   Identical output: {evaluation.equality} ({evaluation.settings['dtype']})")


def category_table(evaluation: Evaluation) -> Table:
    """The main arm by category; speeds where no batch mixes categories."""
    columns: Columns = {
        "category": lambda part: part.categories[0],
        "prompts": lambda part: f"{len(part.main.answers)}",
        "tokens": lambda part: f"{part.main.tokens:,}",
        "tokens/step": lambda part: figure(part.main.tokens_per_step.value),
        "acceptance": lambda part: figure(part.main.acceptance_rate.value, ".0%"),
    }
    if evaluation.times_categories and evaluation.base is not None:
        columns = {**columns, "speedup": lambda part: f"{part.speedup():.2f}"}
    elif evaluation.times_categories:
        columns = {**columns, "tok/s": lambda part: f"{part.main.rate:.1f}"}
    parts = [evaluation.of_category(category) for category in evaluation.categories]
    return terminal(parts, columns, f"{evaluation.main.name.capitalize()}, by category")
