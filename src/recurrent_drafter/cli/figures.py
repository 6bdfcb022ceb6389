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
    return terminal(
        rows_of(trials),
        NARROW,
        f"{decoding.protocol}, {decoding.drawing}, {named(dtype)}, batch {batch_size}",
        tight=True,
    )


def compared(
    arms: Sequence[Arm], batches: Sequence[Batch], verifier: Verifier, decoding: Decoding, console: Console
) -> list[Trial]:
    """All arms on all batches, judged, with a bar meanwhile."""
    trials = compare(arms, batches, explaining(verifier, decoding))
    said = f"{len(batches)} batches, {len(arms)} arms"
    return list(track(trials, said, total=len(batches), console=console, transient=True))


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
