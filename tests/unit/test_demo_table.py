"""The table that `recurrent-drafter demo` ends with."""

import io

from rich.console import Console

from recurrent_drafter.bench.compare import ArmResult, Run
from recurrent_drafter.cli.demo import table


def test_it_fits_a_terminal_of_80_columns():
    results = [
        ArmResult(name, [Run([1] * 128, None if name == "HF generate" else 30, seconds) for _ in range(8)])
        for name, seconds in (("HF generate", 1.2), ("autoregression", 1.0), ("bundled drafter", 0.5))
    ]
    results[2].ties = 12
    output = io.StringIO()
    for protocol in ("sustained", "reply"):
        Console(file=output, width=80).print(table(protocol, results, 128, "bfloat16"))
    text = output.getvalue()
    assert text.count("2.40 (2.40-2.40)") == text.count("2.00 (2.00-2.00)") == 2
    assert text.count("ties: 12") == 2 and "…" not in text
    assert sum("bundled drafter" in line for line in text.splitlines()) == 2
