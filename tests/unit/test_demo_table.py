"""The table that `recurrent-drafter demo` and `recurrent-drafter bench` end with."""

import io
from types import SimpleNamespace

import torch
from rich.console import Console

from recurrent_drafter.cli.figures import arm_table
from recurrent_drafter.measure.arms import HF, PLAIN
from recurrent_drafter.measure.comparison import ArmResult, Decoding, Run


def test_it_fits_a_terminal_of_80_columns():
    model = SimpleNamespace(dtype=torch.bfloat16)
    ways = (HF, 1.2, "identical"), (PLAIN, 1.0, "identical"), ("bundled drafter", 0.5, "tie")
    results = [
        ArmResult(name, [Run([128], None if name == HF else 30, seconds, 0.0, [outcome] * 12)] * 8)
        for name, seconds, outcome in ways
    ]
    output = io.StringIO()
    for end_ids in ((), (3,)):
        Console(file=output, width=80).print(arm_table(results, Decoding(128, end_ids), model, 1))
    text = output.getvalue()
    assert text.count("2.40 (2.40-2.40)") == text.count("2.00 (2.00-2.00)") == 2
    assert text.count("ties: 96") == 2 and "…" not in text
    assert sum("bundled drafter" in line for line in text.splitlines()) == 2
