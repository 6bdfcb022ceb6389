"""The loop of the paper: draft, verify, follow the tree (layer 3)."""

from collections.abc import Callable, Iterator
from functools import singledispatch
from typing import Protocol

import torch
from torch import Tensor

from recurrent_drafter.accept import Accepted, follow_tree
from recurrent_drafter.beam import Beams, beam_search
from recurrent_drafter.config import DraftShape
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.sampler import Sampler
from recurrent_drafter.stop import Step, Stop
from recurrent_drafter.tree import DraftTree, prefix_tree, root_tree
from recurrent_drafter.verifier import Verifier


class Pace(Protocol):
    """Decides how much to draft and how much of it to verify: the speed of decoding, never its tokens."""

    def plan(self, batch: int, longest: int) -> tuple[int, int]:
        """Beam width and length (at most ``longest``) of the step that begins; length 0 is plain autoregression."""

    def budget(self, beams: Beams) -> int:
        """How many nodes of these beams' tree to verify, the root included."""

    def observe(self, tree: DraftTree, step: Step) -> None:
        """What became of the step."""


class FixedPace:
    """The same shape at every step; without one, plain autoregression."""

    def __init__(self, shape: DraftShape | None) -> None:
        self.shape = shape

    def plan(self, batch: int, longest: int) -> tuple[int, int]:  # noqa: ARG002
        """The shape, cut where the reply ends."""
        return (1, 0) if self.shape is None else (self.shape.beam_width, min(self.shape.beam_length, longest))

    def budget(self, beams: Beams) -> int:
        """The shape's nodes, or all there are."""
        limit = self.shape.max_tree_nodes if self.shape is not None else None
        everything = 1 + beams.tokens[0].numel()
        return everything if limit is None else min(limit, everything)

    def observe(self, tree: DraftTree, step: Step) -> None:
        """Nothing to learn."""


def decode(
    verifier: Verifier,
    drafter: RecurrentDrafter | None,
    pace: Pace,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    stop: Stop,
    sampler: Sampler,
) -> Iterator[list[list[int]]]:
    """Generate from prompts (B, S) until ``stop`` says so; yields every row's new tokens after each verification.

    A step without a draft verifies the root alone, which is plain autoregression. Raises ValueError when the verifier's
    logits are not numbers.
    """
    session, read = verifier.open(input_ids, attention_mask, input_ids.shape[1] + stop.max_new_tokens + 1)
    tree = root_tree(input_ids[:, -1])
    accepted = follow_tree(tree, sampler.draws(tree, read.logits))
    root, hidden = accepted.bonus_token, read.hiddens[:, -1]
    yield stop.emit(Step.on_host(accepted, read.logits, stop))
    while not stop.done:
        if stop.stayed is not None:  # rows have ended: they leave the batch
            session.select(stop.stayed)
            root, hidden = root[stop.stayed], hidden[stop.stayed]
        width, length = pace.plan(len(root), stop.remaining - 1)  # the bonus token comes on top
        tree = root_tree(root)
        if drafter is not None and length > 0:
            beams = draft_beams(drafter, verifier.embed, hidden, root, width, length)
            tree = prefix_tree(root, beams, pace.budget(beams))
        verified = session.forward_tree(tree)
        accepted = follow_tree(tree, sampler.draws(tree, verified.logits))
        step = Step.on_host(accepted, verified.logits, stop)  # the one synchronisation of a step
        session.keep(accepted.path, step.n_accepted)
        root, hidden = accepted.bonus_token, hidden_after(accepted, verified.hiddens)
        pace.observe(tree, step)
        yield stop.emit(step)


@singledispatch
def draft_beams(
    drafter: RecurrentDrafter,
    embed: Callable[[Tensor], Tensor],
    hidden: Tensor,
    root: Tensor,
    width: int,
    length: int,
) -> Beams:
    """Beam search from hidden states (B, H) and root tokens (B,), through the drafter's own step.

    A drafter of another kind may register its own way of drafting: ``@draft_beams.register``.
    """
    context = drafter.context(hidden)[:, None]  # (B, 1, E)

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        logits, state = drafter.step(embed(tokens), state, context)
        return logits.float().log_softmax(-1), state

    return beam_search(step, root, torch.zeros_like(hidden)[:, None], drafter.draft_ids, width, length)


def hidden_after(accepted: Accepted, hiddens: Tensor) -> Tensor:  # (B, N, H) -> (B, H)
    """The hidden state of each row's last accepted node, from which its bonus token was drawn."""
    rows = torch.arange(hiddens.shape[0], device=hiddens.device)
    return hiddens[rows, accepted.path[:, -1]]
