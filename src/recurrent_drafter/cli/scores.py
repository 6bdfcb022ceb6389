"""What an evaluation, or two that are joined, look like at the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recurrent_drafter.bench.scores import ArmScores, Evaluation, Interval, join, read_evaluation


def join_files(files: Sequence[str], console: Console) -> int:
    """Put the arms of several evaluations side by side; the exit code. Raises OSError or ValueError."""
    show(console, join([(file, read_evaluation(Path(file))) for file in files]))
    return 0


def show(console: Console, evaluation: Evaluation) -> None:
    """The summary, the comparison if there are two arms, the categories, and whatever was left out or differs."""
    arms = [arm for arm in evaluation.arms.values() if arm.answers]
    if not evaluation.is_complete:
        console.print(f"INTERRUPTED after {evaluation.done} of {evaluation.prompts} prompts: figures are of these.")
    if len(arms) == 1:
        print_summary(console, arms[0])
    elif arms:
        console.print(summary_table(arms))
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
    """What is shown of an arm, by label."""
    count = len(arm.answers)
    shares = [f"{share:.0%}" for share in arm.acceptance.by_position]
    return {
        "Method": arm.name.capitalize(),
        "Total prompts": f"{count:,}",
        "Total tokens": f"{arm.tokens:,}",
        "Total time": f"{arm.seconds:.1f}s",
        "Average tokens/prompt": f"{arm.tokens / count:.1f}",
        "Overall tokens/sec": f"{arm.rate:.1f}",
        "Tokens/step": with_interval(arm.tokens_per_step, ".2f"),
        "Acceptance rate": with_interval(arm.acceptance_rate, ".1%"),
        "Acceptance by position": " ".join(shares),
    }


def with_interval(figure: Interval, form: str) -> str:
    """``2.31 (95 %: 2.20-2.42)``; nothing where there is no such figure."""
    value, low, high = figure
    return f"{value:{form}} (95 %: {low:{form}}-{high:{form}})" if value == value else ""


def print_summary(console: Console, arm: ArmScores) -> None:
    """One arm, line by line."""
    console.print("Evaluation Summary:")
    for label, value in summary_rows(arm).items():
        if value:
            say(console, f"   {label}: {value}")


def summary_table(arms: Sequence[ArmScores]) -> Table:
    """Arms side by side."""
    columns = [summary_rows(arm) for arm in arms]
    table = Table(title="Evaluation Summary", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Method")
    for column in columns:
        table.add_column(column["Method"], justify="right")
    for label in list(columns[0])[1:]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def print_comparison(console: Console, evaluation: Evaluation) -> None:
    """What the drafter gains, and whether the output is the same."""
    main, base = evaluation.main, evaluation.base
    assert base is not None
    speedup = main.speedup(base)
    console.print("\nPerformance vs Baseline:")
    for arm in (main, base):
        say(console, f"   {arm.name.capitalize()}: {arm.rate:.1f} tok/s")
    value, low, high = speedup
    say(console, f"   Speedup: {value:.2f}x (95 %: {low:.2f}-{high:.2f})")
    say(console, f"   Identical output: {evaluation.equality} ({evaluation.settings['dtype']})")


def category_table(evaluation: Evaluation) -> Table:
    """The main arm by category; speeds where no batch mixes categories."""
    main, base, timed = evaluation.main, evaluation.base, evaluation.times_categories
    table = Table(title=f"{main.name.capitalize()}, by category", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    names = ["category", "prompts", "tokens", "tokens/step", "acceptance"]
    for name in [*names, *(["speedup" if base else "tok/s"] if timed else [])]:
        table.add_column(name, justify="left" if name == "category" else "right")
    for category in evaluation.categories:
        arm = main.of_category(category)
        per_step, rate = arm.tokens_per_step[0], arm.acceptance_rate[0]
        cells = [category, f"{len(arm.answers)}", f"{arm.tokens:,}", figure(per_step, ".2f"), figure(rate, ".0%")]
        if timed and base:
            cells.append("{:.2f} ({:.2f}-{:.2f})".format(*arm.speedup(base.of_category(category))))
        elif timed:
            cells.append(f"{arm.rate:.1f}")
        table.add_row(*cells)
    return table


def figure(value: float, form: str) -> str:
    """A number, or nothing where there is none."""
    return f"{value:{form}}" if value == value else ""
