"""The paper's distilled targets (section 4.3.3), for all positions at once.

The targets of a root at position p are the verifier's own next K tokens from the prefix [0..p]. Depth 1 falls out of
the ordinary forward pass. For each further depth one token per root is fed, seeing its own prefix of the text and its
own generated ancestors: K passes in place of one `generate` per position. Two roots, at ``b`` and ``c``, at depth 3::

              text          depth 1   depth 2   depth 3
            a  b  c  d       b1  c1    b2  c2
    b2      x  x             x         x             -> b3
    c2      x  x  x              x         x         -> c3

Roots run in chunks, the last of the text first: no earlier root looks at what lies after the last root of its chunk,
so its own columns may overwrite that.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from recurrent_drafter.core.losses import IGNORED
from recurrent_drafter.core.noise import draw_tokens
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.models.cache import TreeCache
from recurrent_drafter.models.packed_linear import PackedLinears
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.examples import RootExample, cut_after_end, loss_mask

TOKENS = {"cpu": 256}  # that run together in a pass; more fill an accelerator
TOKENS_ELSEWHERE = 2048
PACKED_ROWS = 512  # packed weights still pay: 76 against 64 GFLOP/s at 256 rows, 63 against 40 in a head of 50,257
# A row's roots are masked from each other, which attention computes all the same: on a CPU, with its memory to spare, a
# chunk runs as several rows, each on its own copy of the text's columns.
COPIES, SIDE_BY_SIDE = 4, 32
DEPTHS_AT_MOST = 1024  # positions of the noise are numbered p * this + depth


@dataclass(frozen=True)
class TokenDraw:
    """How a continuation's tokens are drawn: greedily at ``temperature`` 0, else with noise of ``seed``."""

    temperature: float = 0.0
    seed: int = 0

    def __call__(self, logits: Tensor, text_ids: Tensor, roots: Tensor, depth: int) -> Tensor:
        """Tokens (n,) from logits (n, V); text and root number the noise, whatever else runs beside them."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        return draw_tokens(scores, self.seed, text_ids, roots * DEPTHS_AT_MOST + depth)


GREEDY = TokenDraw()


def distilled_targets(
    verifier: Verifier,
    input_ids: Tensor,
    roots: Tensor,
    depths: int,
    end_ids: tuple[int, ...],
    chunk: int | None = None,
) -> Tensor:
    """The verifier's greedy continuations (P, K) of the prefixes [0..p] of one text (S,), p marked in ``roots`` (S,).

    `IGNORED` stands after an end token and after the context's end. ``chunk`` tokens run together in a pass.
    """
    return distil(verifier, [input_ids], [roots.nonzero()[:, 0]], depths, end_ids, chunk=chunk)[0]


@torch.inference_mode()
def distil(
    verifier: Verifier,
    texts: Sequence[Tensor],
    roots: Sequence[Tensor],
    depths: int,
    end_ids: Sequence[int],
    *,
    draw: TokenDraw = GREEDY,
    text_ids: Sequence[int] | None = None,
    chunk: int | None = None,
) -> list[Tensor]:
    """Continuations (P, K) of the prefixes that end at ``roots`` (P,) of every text (S,), as `distilled_targets`.

    Texts of similar length share passes. ``text_ids`` number the texts in the noise, by default in order.
    """
    tokens = chunk or TOKENS.get(verifier.device.type, TOKENS_ELSEWHERE)
    numbers = list(range(len(texts))) if text_ids is None else list(text_ids)
    targets: list[Tensor] = [torch.empty(0, depths, dtype=torch.int64)] * len(texts)
    with packed_for_passes(verifier):
        for group in _groups([len(text) for text in texts], [len(root) for root in roots], tokens):
            batch = _SharedPass(verifier, [texts[i] for i in group], [numbers[i] for i in group], draw)
            for index, rows in zip(group, batch.run([roots[i] for i in group], depths, tokens), strict=True):
                targets[index] = cut_after_end(rows, tuple(end_ids))
    return targets


def packed_for_passes(verifier: Verifier) -> AbstractContextManager[None]:
    """Within it `distil` need not pack the verifier's weights again."""
    return PackedLinears(verifier.model, range(1, PACKED_ROWS + 1)).applied()


def _groups(lengths: Sequence[int], roots: Sequence[int], tokens: int) -> list[list[int]]:
    """Texts that have roots, in batches of about ``tokens`` tokens, pads included; a longer text is alone."""
    groups: list[list[int]] = []
    for index in sorted((i for i in range(len(lengths)) if roots[i]), key=lambda i: (lengths[i], roots[i])):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class _SharedPass:
    """Texts read once, side by side, whose roots then run in chunks."""

    def __init__(self, verifier: Verifier, texts: Sequence[Tensor], numbers: Sequence[int], draw: TokenDraw) -> None:
        self.verifier, self.texts, self.draw = verifier, texts, draw
        self.numbers = torch.tensor(numbers, device=verifier.device)[:, None]  # (B, 1)

    def run(self, roots: Sequence[Tensor], depths: int, tokens: int) -> list[Tensor]:  # [(P,)] -> [(P, K)]
        batch, device = len(self.texts), self.verifier.device
        most = max(map(len, roots))
        width = max(1, min(most, tokens // batch))
        copies = max(1, min(COPIES, width // SIDE_BY_SIDE)) if device.type == "cpu" else 1
        width -= width % copies
        # Aligned at their ends, so that the chunks of all rows come to the beginnings of their texts together.
        grid = functional.pad(pad_sequence(list(roots), batch_first=True, padding_side="left"), (-most % copies, 0))
        cache, hiddens = self._read(width // copies * (depths - 1))
        if copies > 1:
            cache.repeat(copies)
        chunks = []
        for root in reversed(grid.to(device).split(width, dim=1)):
            hidden = hiddens.gather(1, root[:, :, None].expand(-1, -1, hiddens.shape[2]))
            logits, parts = self.verifier.logits(hidden), (batch * copies, root.shape[1] // copies)
            found = self._continue(cache, root.reshape(parts), logits.view(*parts, -1), depths)
            chunks.append(found.view(*root.shape, depths))
        targets = torch.cat(chunks[::-1], dim=1).cpu()
        return [row[len(row) - len(own) :] for row, own in zip(targets, roots, strict=True)]

    def _read(self, columns: int) -> tuple[TreeCache, Tensor]:
        """One pass over the texts (B, S), right-padded: their cache, and their hidden states (B, S, H)."""
        verifier = self.verifier
        input_ids = pad_sequence(list(self.texts), batch_first=True).to(verifier.device)
        batch, length = input_ids.shape
        everywhere = torch.arange(length, device=verifier.device)
        distance = (everywhere[:, None] - everywhere).expand(batch, -1, -1)
        cache = TreeCache(verifier.config.num_hidden_layers, length + columns)
        visible = verifier.as_bias(distance[0] >= 0).expand(batch, -1, -1)
        positions = everywhere.expand(batch, -1)
        result = verifier.forward(input_ids, positions, visible, cache, distance=distance, last_only=True)
        cache.keep_all()
        return cache, result.hiddens

    def _continue(self, cache: TreeCache, root: Tensor, logits: Tensor, depths: int) -> Tensor:
        """Targets (B, c, K) of roots (B, c) from the logits (B, c, V) after them."""
        verifier, (batch, count), base = self.verifier, root.shape, int(root.max()) + 1
        cache.lengths = [base] * batch
        text = torch.arange(base, device=root.device).expand(batch, -1)
        own = torch.eye(count, dtype=torch.bool, device=root.device).repeat(1, depths - 1).expand(batch, -1, -1)
        visible = verifier.as_bias(torch.cat([text[:, None] <= root[:, :, None], own], dim=2))
        columns = torch.cat([text, *(root + depth for depth in range(1, depths))], dim=1)  # what each stands for
        targets = [self._drawn(logits, root, 1)]
        last = verifier.last_position
        for depth in range(1, depths):
            position, width = root + depth, base + count * depth
            distance = None
            if verifier.window is not None:
                distance = position[:, :, None] - columns[:, None, :width]
            inside = position if last is None else position.clamp(max=last)
            step = verifier.forward(targets[-1], inside, visible[:, :, :width], cache, distance=distance)
            cache.lengths = [width] * batch
            targets.append(self._drawn(step.logits, root, depth + 1))
        every = torch.stack(targets, dim=2)
        if last is not None:  # there is no logit after the context's end
            every[root[:, :, None] + torch.arange(depths, device=root.device) > last] = IGNORED
        return every

    def _drawn(self, logits: Tensor, root: Tensor, depth: int) -> Tensor:  # (B, c, V), (B, c) -> (B, c)
        number = self.numbers.repeat(1, root.numel() // len(self.texts)).flatten()
        return self.draw(logits.flatten(0, 1), number, root.flatten(), depth).view_as(root)


def with_distilled_targets(
    verifier: Verifier,
    examples: Sequence[TrainExample],
    depths: int,
    end_ids: Sequence[int],
    draw: TokenDraw = GREEDY,
    first_id: int = 0,
) -> list[RootExample]:
    """The paper's distilled dataset: each root's targets are the verifier's own continuation of its prefix.

    The texts are numbered from ``first_id`` on in the noise of a ``draw`` at a temperature.
    """
    roots = [loss_mask(example, end_ids).nonzero()[:, 0] for example in examples]
    texts, numbers = [example.input_ids for example in examples], range(first_id, first_id + len(examples))
    targets = distil(verifier, texts, roots, depths, end_ids, draw=draw, text_ids=numbers)
    return [RootExample(*row) for row in zip(texts, roots, targets, strict=True)]
