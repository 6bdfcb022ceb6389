"""The verifier's own greedy replies: known text in which acceptance can be measured without decoding."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from recurrent_drafter.core.accept import Accepted, follow_tree
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.losses import IGNORED, cross_entropy, depth_weights, draft_labels
from recurrent_drafter.core.metrics import Walk, visited, walk
from recurrent_drafter.core.tree import DraftTree, joined, prefix_tree, pruned, root_tree
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.decoding.decode import BeamDrafter, Drafting, FixedController, decode
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.lookup import Chains, Found, Lookup, Memory
from recurrent_drafter.decoding.rates import AcceptanceByMatch
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.paths import written_whole

PARTS = ("prompt", "tokens")  # of a reply, in a file
NO_TOKEN = -1  # which no text has
LOGITS_AT_A_TIME = 2**24  # that evaluation holds


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
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Reply]:
    """Replies to prompts (S,) each, in batches of similar length; without ``end_ids`` each has ``max_new_tokens``.

    ``on_progress`` is given how many are done, unfinished ones by their share of ``max_new_tokens``, and how many there
    are, whenever that is one more.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, Reply] = {}
    told = 0
    packed = PackedLinears(verifier.model)
    with torch.inference_mode(), packed.applied():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids, attention_mask = left_padded([prompts[index] for index in rows], verifier.device)
            state = GenerationState(input_ids, max_new_tokens, end_ids)
            for _ in decode(verifier, Drafting(), state, Sampler(state), attention_mask):
                done = start + len(rows) - len(state.rows) + int(sum(state.lengths) / max_new_tokens)
                if done > told:
                    on_progress(told := done, len(order))
            for index, tokens in zip(rows, state.generated, strict=True):
                replies[index] = Reply(prompts[index], torch.tensor(tokens))
    return [replies[index] for index in range(len(prompts))]


def save_replies(path: Path, replies: Sequence[Reply]) -> None:
    """Keep replies in one safetensors file, written whole or not at all."""
    with written_whole(path) as unfinished:
        save_file({f"{n}.{part}": getattr(r, part) for n, r in enumerate(replies) for part in PARTS}, unfinished)


def load_replies(path: Path) -> list[Reply]:
    """What `save_replies` kept, in order."""
    tensors = load_file(path)
    return [Reply(*(tensors[f"{n}.{part}"] for part in PARTS)) for n in range(len(tensors) // len(PARTS))]


def left_padded(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one batch (B, S) with its attention mask; what stands under a pad does not matter."""
    ids, mask = (
        pad_sequence(rows, batch_first=True, padding_side="left").to(device)
        for rows in (list(prompts), [torch.ones_like(prompt) for prompt in prompts])
    )
    return ids, mask


class HeldOutReplies:
    """Replies kept with their hidden states, and the walk along them that greedy decoding would take.

    With lookup the walk is of decoding them one by one in this order, each without memory of the others, where no reply
    may be longer than the longest of them.
    """

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
        """Every reply's tokens (R,), and the states (R, H) that they were predicted from, on one device."""
        for reply, hiddens in zip(self.replies, self.hiddens, strict=True):
            yield reply.tokens.to(hiddens.device), hiddens

    @torch.inference_mode()
    def drafts(self, drafter: RecurrentDrafter, width: int, length: int) -> Iterator[tuple[Tensor, Beams]]:
        """Every reply's tokens (R,), and what is drafted with each of them as the root."""
        draft = BeamDrafter(drafter, self.verifier.embed)
        for root, hiddens in self.pairs():
            yield root, draft(hiddens.to(drafter.dtype), root, width, length)

    @cached_property
    def looked_up(self) -> list[DraftTree]:
        """For each reply, what lookup finds with each of its tokens as the root.

        That depends on the text before it alone and not on the steps that led there, so the walk is as fast as without.
        """
        rates, claims = AcceptanceByMatch(), FixedController(None).claims
        trees = []
        for reply, (root, _) in zip(self.replies, self.pairs(), strict=True):
            state, rows = GenerationState(reply.prompt[None], self.most), []
            lookup = Lookup(state, rates, Memory(0))
            for token in reply.tokens.tolist():
                state.generated[0].append(token)
                found = lookup.find(state.remaining - 1)
                rows.append(found.rows[0] if found is not None else Chains())
            lookup.close()
            together = Found.of(rows)
            trees.append(root_tree(root) if together is None else together.tree(root, claims(together.probabilities)))
        return trees

    @property
    def most(self) -> int:
        """Tokens of the longest reply."""
        return max(len(reply.tokens) for reply in self.replies)

    def walks_with_lookup(self, shape: DraftShape, drafts: Sequence[Beams] | None = None) -> list[Walk]:
        """What decoding makes of each reply where lookup joins what is drafted, or is alone, at this fixed shape.

        ``drafts`` are those of every reply's tokens, at the shape's width and length.
        """
        walks = []
        for number, (root, _) in enumerate(self.pairs()):
            tree = self.looked_up[number]
            if drafts is not None:
                tree = joined(self._within(prefix_tree(root, drafts[number])), tree)
            tree = pruned(tree, shape.max_tree_nodes or tree.tokens.shape[1])
            tree = replace(tree, tokens=tree.tokens.masked_fill(tree.log_probs.isneginf(), NO_TOKEN))  # fillers
            walks.append(walk(accepted_along(root, tree).n_accepted.tolist()))
        return walks

    def _within(self, tree: DraftTree) -> DraftTree:
        """Of a tree for each token of a reply what decoding would draft there: nothing beyond the longest reply."""
        longest = self.most - 2 - torch.arange(len(tree.tokens), device=tree.tokens.device)  # the bonus comes on top
        return replace(tree, log_probs=tree.log_probs.masked_fill(tree.depths > longest[:, None], -torch.inf))

    def tokens_per_step(self, drafter: RecurrentDrafter, shape: DraftShape) -> float:
        """What greedy decoding of these replies yields at this fixed shape."""
        return self.measure(drafter, shape, top_k=0)["tokens_per_step"]

    def tokens_per_step_of_lookup(self, nodes: int) -> float:
        """What lookup alone yields with at most so many nodes, the root included."""
        return sum(self.walks_with_lookup(DraftShape(1, nodes - 1, nodes)), Walk(0, 0)).tokens_per_step

    @torch.inference_mode()
    def measure(self, drafter: RecurrentDrafter, shape: DraftShape, top_k: int = 5) -> dict[str, float]:
        """Acceptance along the replies, and what a drafter knows of them, from one pass over all of their tokens.

        ``tokens_per_step`` is greedy decoding's own figure at this shape; ``acceptance_pos{k}`` the share of its steps
        that accept k draft tokens or more. ``tokens_per_step_with_lookup`` is that figure where lookup joins the tree,
        ``tokens_per_step_of_lookup`` where it is alone in a tree of as many nodes.

        Teacher-forced, over every token of the replies and each depth d of the beams: ``topk_accuracy_{k}_depth{d}``,
        for which a token that the draft vocabulary lacks is a miss, and ``loss``, which such tokens do not count in.
        """
        verifier = self.verifier
        if drafter.dtype != verifier.model.dtype:  # decoding casts it too
            drafter = copy.deepcopy(drafter).to(verifier.model.dtype)  # type: ignore[arg-type]
        hiddens = torch.cat(self.hiddens)
        root = torch.cat([reply.tokens for reply in self.replies]).to(hiddens.device)
        future = torch.cat([_future(reply.tokens, shape.beam_length + 1) for reply in self.replies]).to(hiddens.device)
        chunk = max(1, LOGITS_AT_A_TIME // (max(shape.beam_width, shape.beam_length) * len(drafter.draft_ids)))
        pieces = list(zip(*(x.split(chunk) for x in (hiddens, root, future)), strict=True))
        draft, lengths = BeamDrafter(drafter, verifier.embed), list(map(len, self.hiddens))
        beams = [draft(hidden, token, shape.beam_width, shape.beam_length) for hidden, token, _ in pieces]
        trees = (prefix_tree(token, drafted, shape.nodes) for (_, token, _), drafted in zip(pieces, beams, strict=True))
        found = [_followed(tree, ahead).n_accepted for tree, (_, _, ahead) in zip(trees, pieces, strict=True)]
        accepted = [of_reply.tolist() for of_reply in torch.cat(found).split(lengths)]
        steps = [of_reply[place] for of_reply in accepted for place in visited(of_reply)]
        walks = {
            "tokens_per_step": map(walk, accepted),
            "tokens_per_step_with_lookup": self.walks_with_lookup(shape, split_beams(beams, lengths)),
        }
        results = {name: sum(each, Walk(0, 0)).tokens_per_step for name, each in walks.items()}
        results["tokens_per_step_of_lookup"] = self.tokens_per_step_of_lookup(shape.nodes)
        for k in range(1, shape.beam_length + 1):
            results[f"acceptance_pos{k}"] = sum(n >= k for n in steps) / len(steps)
        if top_k > 0:
            results |= _teacher_forced(drafter, verifier, pieces, min(top_k, len(drafter.draft_ids)))
        return results


def split_beams(pieces: Sequence[Beams], lengths: Sequence[int]) -> list[Beams]:
    """Beams of many rows, in pieces of so many rows each."""
    names = ("tokens", "parents", "log_probs")
    columns = (torch.cat([getattr(beams, name) for beams in pieces]).split(list(lengths)) for name in names)
    return [Beams(*parts) for parts in zip(*columns, strict=True)]


def _future(tokens: Tensor, count: int) -> Tensor:  # (R,) -> (R, count), IGNORED after the reply's end
    padded = functional.pad(tokens, (0, count), value=IGNORED)
    return padded.unfold(0, count, 1)[1:]


def accepted_along(text: Tensor, tree: DraftTree) -> Accepted:  # (R,)
    """What row i of a tree, whose root is token i of the text, has accepted where the text goes on as it does."""
    return _followed(tree, _future(text, tree.max_depth + 1))


def _followed(tree: DraftTree, future: Tensor) -> Accepted:  # (n, L + 1)
    return follow_tree(tree, lambda node: future.gather(1, tree.depths.gather(1, node[:, None]))[:, 0])


def _teacher_forced(
    drafter: RecurrentDrafter, verifier: Verifier, pieces: Sequence[Sequence[Tensor]], top_k: int
) -> dict[str, float]:
    """From hidden states (n, H), roots (n,) and the tokens (n, L + 1) that follow them."""
    sums = []
    for hidden, root, future in pieces:
        targets = future[:, :-1]
        logits = drafter(hidden, verifier.embed(torch.cat([root[:, None], targets[:, :-1].clamp(min=0)], dim=1)))
        best = drafter.draft_ids[logits.topk(top_k).indices]  # (n, L, top_k)
        hits = (best == targets[:, :, None]).cumsum(-1).sum(0)
        labels = draft_labels(targets, drafter.draft_ids, verifier.vocab_size)
        known = (targets != IGNORED).sum(0), cross_entropy(logits, labels).double(), (labels != IGNORED).sum(0)
        sums.append((hits.cpu(), *(one.cpu() for one in known)))
    hits, tokens, losses, counted = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    shares = (hits / tokens.clamp(min=1)[:, None]).tolist()  # (L, top_k)
    accuracies = {
        f"topk_accuracy_{k}_depth{d}": share for d, row in enumerate(shares, 1) for k, share in enumerate(row, 1)
    }
    return {**accuracies, "loss": float((losses * depth_weights(counted, 1.0)).sum())}


def chain_tokens_per_step(held_out: HeldOutReplies, drafter: RecurrentDrafter, width: int, length: int) -> float:
    """What decoding of these replies yields where of each step's beams only the best is verified."""
    drafts = held_out.drafts(drafter, width, length)
    accepted = (accepted_along(root, prefix_tree(root, best_beam(beams), length + 1)) for root, beams in drafts)
    return sum((walk(one.n_accepted.tolist()) for one in accepted), Walk(0, 0)).tokens_per_step


def best_beam(beams: Beams) -> Beams:
    """The most probable beam of full length alone, as one that was searched with width 1.

    >>> beams = Beams(torch.tensor([[[5, 6], [7, 8]]]), torch.tensor([[[0, 0], [1, 0]]]), torch.zeros(1, 2, 2))
    >>> best_beam(beams).tokens.tolist()
    [[[6], [7]]]
    """
    tokens: Tensor = beams.paths[:, 0, :, None]  # (B, L, 1)
    return Beams(tokens, torch.zeros_like(tokens), torch.zeros(tokens.shape, device=tokens.device))
