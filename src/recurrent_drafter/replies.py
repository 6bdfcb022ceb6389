"""The verifier's own greedy replies: known text in which acceptance can be measured without decoding (layer 3)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafter.accept import follow_tree
from recurrent_drafter.config import DraftShape
from recurrent_drafter.data import TrainExample
from recurrent_drafter.decode import FixedPace, decode, draft_beams
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.metrics import Walk, walk
from recurrent_drafter.packing import PackedLinears
from recurrent_drafter.sampler import Sampler
from recurrent_drafter.stop import Stop
from recurrent_drafter.tree import prefix_tree
from recurrent_drafter.verifier import Verifier


@dataclass(frozen=True)
class Reply:
    """A prompt (S,) and the verifier's greedy continuation (R,), an end token included."""

    prompt: Tensor
    tokens: Tensor

    def as_example(self) -> TrainExample:
        """Text to train on: the continuation is the one span. Its text targets *are* the distilled targets at T = 0."""
        spans = torch.full((len(self.prompt) + len(self.tokens),), -1)
        spans[len(self.prompt) :] = 0
        return TrainExample(torch.cat([self.prompt, self.tokens]), spans)


def greedy_replies(
    verifier: Verifier,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    end_ids: Sequence[int],
    batch_size: int = 32,
) -> list[Reply]:
    """Replies to prompts (S,) each, in batches of similar length; without ``end_ids`` each has ``max_new_tokens``."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, Reply] = {}
    packed = PackedLinears(verifier.model)
    with torch.inference_mode(), packed.applied():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids, attention_mask = left_padded([prompts[index] for index in rows], verifier.device)
            stop = Stop(input_ids, max_new_tokens, end_ids)
            for _ in decode(verifier, None, FixedPace(None), input_ids, attention_mask, stop, Sampler(stop)):
                pass
            for index, tokens in zip(rows, stop.generated, strict=True):
                replies[index] = Reply(prompts[index], torch.tensor(tokens))
    return [replies[index] for index in range(len(prompts))]


def left_padded(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one batch (B, S) with its attention mask; what stands under a pad does not matter."""
    longest = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt
        attention_mask[row, longest - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


class HeldOutReplies:
    """Replies kept with their hidden states, and the walk along them that greedy decoding would take."""

    def __init__(self, verifier: Verifier, replies: Sequence[Reply]) -> None:
        self.verifier = verifier
        self.replies = [reply for reply in replies if len(reply.tokens) > 1]
        if not self.replies:
            raise ValueError("no held-out reply is longer than one token: nothing to measure acceptance on")
        with torch.inference_mode():
            self._hiddens = [self._reply_hiddens(reply) for reply in self.replies]

    def _reply_hiddens(self, reply: Reply) -> Tensor:  # (R, H): the state each reply token was predicted from
        text = torch.cat([reply.prompt, reply.tokens]).to(self.verifier.device)
        first = len(reply.prompt) - 1
        return self.verifier.hiddens(text[None])[0, first : first + len(reply.tokens)]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every reply's tokens (R,), and the states (R, H) that they were predicted from."""
        return ((reply.tokens, hiddens) for reply, hiddens in zip(self.replies, self._hiddens, strict=True))

    def tokens_per_step(self, drafter: RecurrentDrafter, shape: DraftShape) -> float:
        """What greedy decoding of these replies yields at this fixed shape, from one drafting pass per reply."""
        total = Walk(0, 0)
        with torch.inference_mode():
            for reply, hiddens in zip(self.replies, self._hiddens, strict=True):
                total += walk(self.n_accepted(drafter, shape, reply, hiddens).tolist())
        return total.tokens_per_step

    def n_accepted(self, drafter: RecurrentDrafter, shape: DraftShape, reply: Reply, hiddens: Tensor) -> Tensor:
        """Draft at every token of the reply at once: how many draft tokens each would have had accepted (R,)."""
        root = reply.tokens.to(hiddens.device)
        (length,) = root.shape
        hiddens = hiddens.to(next(drafter.parameters()).dtype)
        beams = draft_beams(drafter, self.verifier.embed, hiddens, root, shape.beam_width, shape.beam_length)
        tree = prefix_tree(root, beams, shape.nodes)
        ahead = torch.arange(length, device=root.device)[:, None] + torch.arange(
            1, shape.beam_length + 2, device=root.device
        )
        future = torch.where(ahead < length, root[ahead.clamp(max=length - 1)], -1)  # (R, L + 1)
        accepted = follow_tree(tree, lambda node: future.gather(1, tree.depths.gather(1, node[:, None]))[:, 0])
        return accepted.n_accepted
