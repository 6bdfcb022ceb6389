"""What ``train --estimate`` shows: whether a drafter can pay on this machine, and what training one costs."""

from collections.abc import Iterator

from recurrent_drafter.measure.estimate import expected_tokens
from recurrent_drafter.training.estimation import STEPS, TrainingEstimate

RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ATTAINABLE = 0.8  # acceptance per draft token that a good drafter can be hoped to have
GIB = 2**30


def estimate_lines(found: TrainingEstimate) -> Iterator[str]:
    """The times, the break-even of every draft length, the ceiling at several acceptances, and what training costs."""
    costs, plain = found.costs, found.costs.verify[0]
    relative = ", ".join(f"{n}: {t / plain:.2f}" for n, t in zip(costs.rows, costs.verify, strict=True))
    drafting = f"drafting, per token: {costs.draft_level / plain:.2f}"
    yield f"a plain step takes {plain * 1e3:.1f} ms; verifying n tokens, in plain steps: {relative}; {drafting}"
    lengths = ", ".join(f"{length}: {tokens:.2f}" for length, tokens in enumerate(found.break_evens, start=1))
    yield f"break-even tokens per step, by draft length: {lengths}"
    yield "ceiling of the speed-up, by how often a draft token is accepted:"
    for rate in RATES:
        gain, levels = found.ceiling(rate)
        how = f"{levels} drafted, {expected_tokens(rate, levels):.2f} tokens per step" if levels else "plain decoding"
        yield f"  {rate:.0%}: {gain:.2f}x ({how})"
    if found.ceiling(1.0)[0] <= 1:
        yield "warning: it cannot pay here, not even if every draft token were accepted"
    elif found.ceiling(ATTAINABLE)[0] < 1.1:
        yield f"warning: at {ATTAINABLE:.0%} accepted, which a good drafter reaches, it gains less than a tenth here"
    whole = duration(found.steps * found.step_seconds)
    yield f"training: {found.steps:,.0f} steps of {found.step_seconds:.2f} s: {whole}, evaluations not counted"
    if found.distilled:
        yield f"distilling {found.distilled:,} conversations before that: {duration(found.distilled_seconds)}"
    yield (
        f"memory: {found.peak_bytes / GIB:.2f} GiB at the peak of {STEPS} steps, of which "
        f"{found.kept_bytes / GIB:.2f} are the verifier's weights and the drafter's with gradients and optimizer; "
        "nothing was trained"
    )


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
