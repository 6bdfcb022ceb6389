"""Tables for the terminal that several commands show."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel

from recurrent_drafter.bench.profile import Profile
from recurrent_drafter.measure.arms import HF, PLAIN
from recurrent_drafter.measure.comparison import ArmResult, Decoding


def arm_table(results: Sequence[ArmResult], decoding: Decoding, model: PreTrainedModel, batch_size: int) -> Table:
    """Ways of decoding side by side: speed, tokens per step, and whether the output is the same."""
    shown = Table(
        title=title(decoding, model, batch_size), box=SIMPLE_HEAD, show_edge=False, padding=(0, 0, 0, 1)
    )  # so that it fits 80 columns
    for column in ("", "tok/s", "tok/step", "vs HF", "vs autoregr.", "identical"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=not column)
    by_name = {result.name: result for result in results}
    bases = by_name[HF], by_name[PLAIN]
    reference = bases[0] if decoding.temperature == 0 else bases[1]
    for result in results:
        per_step = result.tokens_per_step
        ratios = [
            "{:.2f} ({:.2f}-{:.2f})".format(*result.speedup(base)) if result is not base else "" for base in bases
        ]
        shown.add_row(
            result.name,
            f"{result.rate:.1f}",
            f"{per_step:.2f}" if per_step == per_step else "",
            *ratios,
            "" if result is reference else result.equality,
        )
    return shown


def title(decoding: Decoding, model: PreTrainedModel, batch_size: int) -> str:
    """Protocol, temperature, dtype and batch: what a figure is nothing without."""
    protocol = (
        f"reply (up to the end token, at most {decoding.new_tokens})"
        if decoding.end_ids
        else f"sustained (exactly {decoding.new_tokens} new tokens)"
    )
    how = "greedy" if decoding.temperature == 0 else f"temperature {decoding.temperature:g}"
    return f"{protocol}, {how}, {str(model.dtype).removeprefix('torch.')}, batch {batch_size}"


def profile_table(profile: Profile, name: str = "") -> Table:
    """Where a step's time goes."""
    shown = Table(title=f"{name}: {profile.steps} steps".removeprefix(": "), box=SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "ms per step", "share"):
        shown.add_column(column, justify="left" if column == "stage" else "right")
    for stage, milliseconds, share in profile.rows:
        shown.add_row(stage, f"{milliseconds:.3f}", f"{share:.1%}")
    shown.add_section()
    total = 1e3 * profile.total / max(profile.steps, 1)
    shown.add_row("outside verify and draft", f"{total * profile.overhead:.3f}", f"{profile.overhead:.1%}")
    return shown
