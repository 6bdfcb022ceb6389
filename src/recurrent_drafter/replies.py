"""The verifier's own greedy replies: known text in which acceptance can be measured without decoding (layer 3)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recurrent_drafter.accept import follow_tree
from recurrent_drafter.config import DraftShape
from recurrent_drafter.data import TrainExample
from recurrent_drafter.decode import BeamDrafter, Draft, FixedPace, decode
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.metrics import Walk, walk
from recurrent_drafter.packing import PackedLinears
from recurrent_drafter.sampler import Sampler
from recurrent_drafter.stop import Stop
from recurrent_drafter.tree import DraftTree, prefix_tree
from recurrent_drafter.verifier import Verifier

PARTS = ("prompt", "tokens")  # of a reply, in a file


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


def save_replies(path: Path, replies: Sequence[Reply]) -> None:
    """Keep replies in one safetensors file, written whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    save_file({f"{n}.{part}": getattr(r, part) for n, r in enumerate(replies) for part in PARTS}, unfinished)
    unfinished.replace(path)


def load_replies(path: Path) -> list[Reply]:
    """What `save_replies` kept, in order."""
    tensors = load_file(path)
    return [Reply(*(tensors[f"{n}.{part}"] for part in PARTS)) for n in range(len(tensors) // len(PARTS))]


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
            self.hiddens = [self._reply_hiddens(reply) for reply in self.replies]

    def _reply_hiddens(self, reply: Reply) -> Tensor:  # (R, H): the state each reply token was predicted from
        text = torch.cat([reply.prompt, reply.tokens]).to(self.verifier.device)
        first = len(reply.prompt) - 1
        return self.verifier.hiddens(text[None])[0, first : first + len(reply.tokens)]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every reply's tokens (R,), and the states (R, H) that they were predicted from."""
        return ((reply.tokens, hiddens) for reply, hiddens in zip(self.replies, self.hiddens, strict=True))

    def tokens_per_step(self, drafter: RecurrentDrafter, shape: DraftShape) -> float:
        """What greedy decoding of these replies yields at this fixed shape, from one drafting pass per reply."""
        total = Walk(0, 0)
        draft = BeamDrafter(drafter, self.verifier)
        with torch.inference_mode():
            for reply, hiddens in zip(self.replies, self.hiddens, strict=True):
                total += walk(self.n_accepted(draft, shape, reply, hiddens.to(drafter.dtype)).tolist())
        return total.tokens_per_step

    def n_accepted(self, draft: Draft, shape: DraftShape, reply: Reply, hiddens: Tensor) -> Tensor:
        """Draft at every token of the reply at once: how many draft tokens each would have had accepted (R,)."""
        root = reply.tokens.to(hiddens.device)
        beams = draft(hiddens, root, shape.beam_width, shape.beam_length)
        return n_accepted_along(root, prefix_tree(root, beams, shape.nodes))


def n_accepted_along(text: Tensor, tree: DraftTree) -> Tensor:  # (R,) -> (R,)
    """How many draft tokens of row i of a tree, whose root is token i of the text, agree with what follows there."""
    (length,) = text.shape
    ahead = torch.arange(length, device=text.device)[:, None] + torch.arange(1, tree.max_depth + 2, device=text.device)
    future = torch.where(ahead < length, text[ahead.clamp(max=length - 1)], -1)  # (R, L + 1)
    return follow_tree(tree, lambda node: future.gather(1, tree.depths.gather(1, node[:, None]))[:, 0]).n_accepted
