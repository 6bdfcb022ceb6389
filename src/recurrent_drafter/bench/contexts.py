"""What a step takes after contexts of many lengths, where query heads share a key head: our attention and the model's.

The same pass over the same cache, in turns, with `recurrent_drafter.models.grouped_attention` and without it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recurrent_drafter.bench.workload import random_model
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import DraftTree, prefix_tree, root_tree
from recurrent_drafter.measure.ruler import now
from recurrent_drafter.models.grouped_attention import NAME, grouped_attention
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.models.verifier import Verifier

LENGTHS = (500, 1_000, 2_000, 4_000, 8_000)
MOST = 1.5  # a step at the longest context over one at the shortest
LEAST = 4.0  # a step of a batch with the model's own attention over one with ours
CONFIG = LlamaConfig(  # a third of Qwen2.5-0.5B: 8 of its 24 layers, and a third of its vocabulary
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=8,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=50_645,
    max_position_embeddings=16_384,
)


@dataclass(frozen=True)
class StepCell:
    """A step that verifies a tree of so many nodes in each row, after texts of up to so many tokens.

    Rows of a batch differ in length, as they do while text is written: then every step has a mask.
    """

    rows: int
    columns: int
    nodes: int


CELLS = (StepCell(64, 400, 1), StepCell(64, 400, 12), *(StepCell(1, columns, 12) for columns in LENGTHS))


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a cell's step, and of all its layers' attention, with ours and with the model's own.

    ``difference``: how far apart the logits of the two are at most.
    """

    cell: StepCell
    ours: float
    own: float
    ours_attending: float
    own_attending: float
    difference: float

    def as_record(self) -> dict[str, Any]:
        return {"kind": "context", **asdict(self)}


def measure_contexts(
    config: LlamaConfig = CONFIG, cells: Sequence[StepCell] = CELLS, device: str = "cpu", rounds: int = 9
) -> Iterator[StepTimes]:
    """Medians over ``rounds`` in turns, of a random model in float32 with its weights packed as while decoding.

    Raises AssertionError where the two attentions' logits are further apart than rounding takes them.
    """
    model = random_model(config, torch.float32, device)
    verifier, packed = Verifier(model), PackedLinears(model)
    generator = torch.Generator().manual_seed(0)
    for cell in cells:
        text = torch.randint(config.vocab_size, (cell.rows, cell.columns + 1), generator=generator).to(device)
        own = torch.arange(cell.columns) >= torch.arange(cell.rows)[:, None] % (cell.columns // 2)
        with torch.inference_mode(), packed.applied(), timed_attention() as attending:
            session, _ = verifier.open(text[:, :-1], own.long().to(device), cell.columns + cell.nodes)
            tree = chains(text[:, -1], cell.nodes)

            def step(ours: bool, session=session, tree=tree) -> Tensor:  # type: ignore[no-untyped-def]
                verifier.groups_heads = ours
                return session.forward_tree(tree).logits

            found, expected = step(True), step(False)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
            difference = float((found - expected).abs().max())
            del found, expected
            seconds = []
            for _ in range(rounds):
                for ours in (True, False):
                    attending.clear()
                    begun = now()
                    step(ours)
                    seconds.append((now() - begun, sum(attending)))
        (ours_ms, ours_in_it), (own_ms, own_in_it) = 1e3 * np.median(np.reshape(seconds, (rounds, 2, 2)), axis=0)
        yield StepTimes(cell, float(ours_ms), float(own_ms), float(ours_in_it), float(own_in_it), difference)
    verifier.groups_heads = True


@contextmanager
def timed_attention() -> Iterator[list[float]]:
    """Seconds of every call of either attention."""
    seconds: list[float] = []

    def timed(attend: Callable[..., Any]) -> Callable[..., Any]:
        def attention(*args: Any, **options: Any) -> Any:
            begun = now()
            result = attend(*args, **options)
            seconds.append(now() - begun)
            return result

        return attention

    both = {NAME: grouped_attention, "sdpa": sdpa_attention_forward}
    for name, attend in both.items():
        AttentionInterface.register(name, timed(attend))
    try:
        yield seconds
    finally:
        for name, attend in both.items():
            AttentionInterface.register(name, attend)


def chains(root: Tensor, nodes: int) -> DraftTree:  # (B,)
    """A tree of ``nodes`` nodes: chains of at most 4 tokens after each root."""
    if nodes == 1:
        return root_tree(root)
    width = -(-(nodes - 1) // 4)
    slots = torch.arange(width, device=root.device).expand(len(root), 4, -1)
    return prefix_tree(root, Beams(slots + 1, slots, -1.0 - slots), nodes)


def reached(found: Sequence[StepTimes]) -> dict[str, bool]:
    """Whether long contexts and batches cost no more than they may."""
    single = [times for times in found if times.cell.rows == 1]
    batch = next(times for times in found if times.cell.rows > 1)
    growth, gain = single[-1].ours / single[0].ours, batch.own / batch.ours
    return {
        f"a step after the longest context takes {growth:.2f} times one after the shortest (at most {MOST})": (
            growth <= MOST
        ),
        f"a batch is {gain:.1f} times as fast as with the model's own attention (at least {LEAST})": gain >= LEAST,
    }


CONTEXT_COLUMNS = (
    *("rows", "columns", "nodes", "step, ms", "with the model's own attention", "times as fast"),
    *("attention, ms", "the model's own", "times as fast", "logits differ by"),
)


def context_rows(found: Sequence[StepTimes]) -> list[list[str]]:
    """As `CONTEXT_COLUMNS` says."""
    rows = []
    for times in found:
        row = [f"{number:,}" for number in (times.cell.rows, times.cell.columns, times.cell.nodes)]
        for ours, own in ((times.ours, times.own), (times.ours_attending, times.own_attending)):
            row += [f"{ours:.1f}", f"{own:.1f}", f"{own / ours:.2f}"]
        rows.append([*row, f"{times.difference:.1g}"])
    return rows
