"""The loop of the paper: draft, verify, follow the tree."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from recurrent_drafter.core.accept import Accepted, follow_tree
from recurrent_drafter.core.beam import Beams, Deeper, DraftStep, beam_search
from recurrent_drafter.core.tree import DraftTree, joined, prefix_tree, pruned, root_tree
from recurrent_drafter.decoding.costs import Floats
from recurrent_drafter.decoding.generation_state import GenerationState, Step
from recurrent_drafter.decoding.lookup import Found, Lookup
from recurrent_drafter.decoding.rates import logarithms
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.decoding.session import DecodingSession
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier

Embed = Callable[[Tensor], Tensor]  # tokens (...) to a verifier's input embeddings (..., H)


class Draft(Protocol):
    """Makes beams: `BeamDrafter`, or another way."""

    def follow(self, state: GenerationState) -> None:
        """A generation begins, whose replies these are."""

    def __call__(self, hidden: Tensor, root: Tensor, width: int, length: int, deeper: Deeper | None = None) -> Beams:
        """W beams of L tokens, or of fewer where ``deeper`` says so, from hidden states (B, H) and root tokens (B,)."""


class DraftController(Protocol):
    """Decides how much to draft and how much of it to verify: the speed of decoding, never its tokens."""

    def plan(self, batch: int, longest: int, found: Found | None = None) -> tuple[int, int]:
        """Beam width and length (at most ``longest``) of the step that begins; length 0 leaves the drafter out.

        ``found`` is what lookup has to offer.
        """

    def deeper(self, log_probs: Tensor) -> bool:
        """Whether to draft one more level after the one with these cumulative log-probabilities (B, W)."""

    def claims(self, probabilities: Floats) -> Floats | None:
        """Log-probabilities at which the drafter's nodes are as likely to be accepted as lookup's (B, C).

        None where it does not pay to join these to what the drafter has drafted.
        """

    def budget(self, log_probs: Tensor, levels: int) -> int:
        """How many nodes to verify, the root included, of one that claims (B, n) for the others; L = ``levels``."""

    def observe(self, step: Step) -> None:
        """What became of the step."""


class FixedController:
    """The same shape at every step; without one, plain autoregression."""

    def __init__(self, shape: DraftShape | None) -> None:
        self.shape = shape

    def plan(self, batch: int, longest: int, found: Found | None = None) -> tuple[int, int]:  # noqa: ARG002
        """The shape, cut where the reply ends."""
        return (1, 0) if self.shape is None else (self.shape.beam_width, min(self.shape.beam_length, longest))

    def deeper(self, log_probs: Tensor) -> bool:  # noqa: ARG002
        return True

    def claims(self, probabilities: Floats) -> Floats:
        """The drafter is taken at its word."""
        return logarithms(probabilities)

    def budget(self, log_probs: Tensor, levels: int) -> int:  # noqa: ARG002
        """The shape's nodes, or all there are of a shape that names none."""
        limit = self.shape.max_tree_nodes if self.shape is not None else 1
        return limit or 1 + log_probs.shape[1]

    def observe(self, step: Step) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class Drafting:
    """What makes the tree of a step: a drafter's beams and what was said before, either or none of them.

    Without a controller nothing is drafted.
    """

    controller: DraftController = field(default_factory=lambda: FixedController(None))
    draft: Draft | None = None
    lookup: Lookup | None = None

    def tree(self, hidden: Tensor, root: Tensor, longest: int) -> DraftTree:  # (B, H), (B,)
        """The tree to verify, of drafts of at most ``longest`` tokens, as the controller decides."""
        found = self.lookup.find(longest) if self.lookup is not None else None
        width, length = self.controller.plan(len(root), longest, found)
        beams = self.draft(hidden, root, width, length, self.controller.deeper) if self.draft and length else None
        claims = self.controller.claims(found.probabilities) if found is not None else None
        if beams is None and (found is None or claims is None):
            return root_tree(root)
        if found is None or claims is None:
            assert beams is not None
            return prefix_tree(root, beams, self.controller.budget(beams.log_probs.flatten(1), beams.tokens.shape[1]))
        tree, levels = found.tree(root, claims), 0
        if beams is not None:
            tree, levels = joined(prefix_tree(root, beams), tree), beams.tokens.shape[1]
        return pruned(tree, self.controller.budget(tree.log_probs[:, 1:], levels))


def decode(
    verifier: Verifier,
    drafting: Drafting,
    state: GenerationState,
    sampler: Sampler,
    attention_mask: Tensor | None = None,
    conversation: DecodingSession | None = None,
) -> Iterator[list[list[int]]]:
    """Generate after the prompts (B, S) of ``state``; yields every row's new tokens after each verification.

    A step without a draft verifies the root alone, which is plain autoregression. What a ``conversation`` has read of
    its one prompt is not read again. Raises ValueError when the verifier's
    logits are not numbers.
    """
    _, length = state.prompts.shape
    if conversation is not None:
        session, read = conversation.open(verifier, state)
    else:
        session, read = verifier.open(state.prompts, attention_mask, length + state.max_new_tokens + 1)
    tree = root_tree(state.prompts[:, -1])
    accepted = follow_tree(tree, sampler.draws(tree, read.logits))
    root, hidden = accepted.bonus_token, read.hiddens[:, -1]
    yield state.emit(Step.on_host(accepted, read.logits, tree, state))
    while not state.done:
        if state.stayed is not None:  # rows have ended: they leave the batch
            session.select(state.stayed)
            root, hidden = root[state.stayed], hidden[state.stayed]
        tree = drafting.tree(hidden, root, state.remaining - 1)  # the bonus token comes on top
        verified = session.forward_tree(tree)
        accepted = follow_tree(tree, sampler.draws(tree, verified.logits))
        step = Step.on_host(accepted, verified.logits, tree, state)  # the one synchronization of a step
        session.keep(accepted.path, step.n_accepted)
        root, hidden = accepted.bonus_token, hidden_after(accepted, verified.hiddens)
        drafting.controller.observe(step)
        yield state.emit(step)


class BeamDrafter:
    """Drafts by beam search over a drafter's own step.

    What a draft token contributes to the recurrence is the same every time, so it is computed once for all of them:
    (D, H) numbers, as long as these are few.
    """

    TABLE_ENTRIES = 2**23

    def __init__(self, drafter: RecurrentDrafter, embed: Embed) -> None:
        self.drafter, self.embed = drafter, embed
        self._reads: Tensor | None = None
        self._version = -1

    def follow(self, state: GenerationState) -> None:
        """Nothing of the replies counts here but each one's newest hidden state and token."""

    def _look_up(self) -> None:
        """Compute the table, and again when the drafter has been trained."""
        version = sum(0 if weight.is_inference() else weight._version for weight in self.drafter.parameters())
        draft_ids = self.drafter.draft_ids
        if version != self._version and len(draft_ids) * self.drafter.config.hidden_size <= self.TABLE_ENTRIES:
            with torch.inference_mode():
                self._reads = self.drafter.read(self.embed(draft_ids))
            self._version = version

    def __call__(self, hidden: Tensor, root: Tensor, width: int, length: int, deeper: Deeper | None = None) -> Beams:
        return beam_search(self.steps(hidden, root), self.drafter.draft_ids, width, length, deeper)

    def steps(self, hidden: Tensor, root: Tensor) -> DraftStep:
        """The drafter's own steps from hidden states (B, H) and root tokens (B,)."""
        self._look_up()
        context = self.drafter.context(hidden)[:, None]  # (B, 1, E)

        def step(tokens: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
            if tokens is not None and self._reads is not None:
                read = self._reads[tokens]
            else:  # the root may be any of the verifier's tokens
                ids = root[:, None] if tokens is None else self.drafter.draft_ids[tokens]
                read = self.drafter.read(self.embed(ids))  # (B, W, H)
            logits, state = self.drafter.step(read, torch.zeros_like(read) if state is None else state, context)
            return logits.float().log_softmax(-1), state

        return step


def hidden_after(accepted: Accepted, hiddens: Tensor) -> Tensor:  # (B, N, H) -> (B, H)
    """The hidden state of each row's last accepted node, from which its bonus token was drawn."""
    rows = torch.arange(hiddens.shape[0], device=hiddens.device)
    return hiddens[rows, accepted.path[:, -1]]
