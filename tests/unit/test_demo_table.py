"""The table that `recurrent-drafter demo` and `recurrent-drafter bench` end with."""

import io

import torch
from rich.console import Console

from recurrent_drafter.cli.figures import arm_table
from recurrent_drafter.measure.arms import HF, PLAIN, Decoding
from recurrent_drafter.measure.ruler import Run, Trial, Verdict


def test_it_fits_a_terminal_of_80_columns():
    ways = (HF, 1.2, "identical"), (PLAIN, 1.0, "identical"), ("bundled drafter", 0.5, "tie")
    runs = {name: Run([range(128)], seconds, 0.0, None if name == HF else 30) for name, seconds, _ in ways}
    verdicts = {name: [Verdict(outcome, 0.125 if outcome == "tie" else None)] * 12 for name, _, outcome in ways}
    output = io.StringIO()
    for end_ids in ((), (3,)):
        shown = arm_table([Trial(None, runs, verdicts)] * 8, Decoding(128, end_ids), torch.bfloat16, 1)
        Console(file=output, width=80).print(shown)
    text = output.getvalue()
    assert text.count("2.40 (2.40-2.40)") == text.count("2.00 (2.00-2.00)") == 2
    assert text.count("ties: 96") == 2 and "…" not in text
    assert sum("bundled drafter" in line for line in text.splitlines()) == 2
