"""Tables for the terminal that several commands show."""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from recurrent_drafter.bench.columns import NARROW, rows_of
from recurrent_drafter.bench.profile import Profile
from recurrent_drafter.measure.arms import Batch, Decoding, explaining
from recurrent_drafter.measure.ruler import Arm, Trial, compare
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.report.tables import Columns, terminal


def arm_table(trials: Sequence[Trial], decoding: Decoding, dtype: torch.dtype, batch_size: int) -> Table:
    """Ways of decoding side by side: speed, tokens per step, and whether the output is the same."""
    return terminal(rows_of("", trials), NARROW, title(decoding, dtype, batch_size), gap=0)


def compared(
    arms: Sequence[Arm], batches: Sequence[Batch], verifier: Verifier, decoding: Decoding, console: Console
) -> list[Trial]:
    """All arms on all batches, judged, with a bar meanwhile."""
    trials = compare(arms, batches, explaining(verifier, decoding))
    said = f"{len(batches)} batches, {len(arms)} arms"
    return list(track(trials, said, total=len(batches), console=console, transient=True))


def title(decoding: Decoding, dtype: torch.dtype, batch_size: int) -> str:
    """Protocol, temperature, dtype and batch: what a figure is nothing without."""
    protocol = (
        f"reply (up to the end token, at most {decoding.new_tokens})"
        if decoding.end_ids
        else f"sustained (exactly {decoding.new_tokens} new tokens)"
    )
    how = f"temperature {decoding.sampling['temperature']:g}" if decoding.is_sampled else "greedy"
    return f"{protocol}, {how}, {str(dtype).removeprefix('torch.')}, batch {batch_size}"


def profile_table(profile: Profile, name: str = "") -> Table:
    """Where a step's time goes."""
    total = 1e3 * profile.total / max(profile.steps, 1)
    rows = [*profile.rows, ("outside verify and draft", total * profile.overhead, profile.overhead)]
    columns: Columns = {
        "stage": lambda row: str(row[0]),
        "ms per step": lambda row: f"{row[1]:.3f}",
        "share": lambda row: f"{row[2]:.1%}",
    }
    return terminal(rows, columns, f"{name}: {profile.steps} steps".removeprefix(": "))
