"""From beams to a prefix tree, and two trees as one."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from recurrent_drafter.core.beam import Beams

VERIFIER, DRAFTER, LOOKUP = 0, 1, 2  # where a token comes from; the verifier's own are never nodes but the root


@dataclass(frozen=True)
class DraftTree:
    """N nodes per row in topological order; node 0 is the root token, its own parent.

    ``log_probs`` are cumulative log-probabilities of acceptance as the drafter claims them, 0 at the root;
    ``sources`` says whose each node is.
    """

    tokens: Tensor  # (B, N) int64
    parents: Tensor  # (B, N) int64
    depths: Tensor  # (B, N) int64
    log_probs: Tensor  # (B, N) float32
    sources: Tensor  # (B, N) int64
    max_depth: int

    @cached_property
    def ancestors(self) -> Tensor:  # (B, N, N) bool
        """Entry [j, i]: node i lies on the path from the root to node j, both included. The tree's attention mask."""
        batch, nodes = self.tokens.shape
        reach = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).expand(batch, -1, -1).clone()
        node = self.parents
        for _ in range(self.max_depth):
            reach.scatter_(2, node[:, :, None], True)
            node = self.parents.gather(1, node)
        return reach


def root_tree(root: Tensor) -> DraftTree:  # (B,)
    """The tree that speculates nothing: decoding with it is plain autoregression."""
    zeros = torch.zeros_like(root)[:, None]
    return DraftTree(root[:, None], zeros, zeros, zeros.float(), zeros, max_depth=0)


def prefix_tree(root: Tensor, beams: Beams, max_nodes: int | None = None) -> DraftTree:
    """The beams' prefixes as one tree, each prefix once; of these the ``max_nodes`` most probable, if it is given.

    Beams of one level are distinct and continue slots of the level before, so the lattice of the beam search *is* the
    tree of their prefixes; it holds every prefix of the final beams and the shorter beams that were outscored on the
    way. No node is more probable than its parent, so the best n are closed under ancestors (ties go to the earlier).

    Examples:
        >>> import torch
        >>> red, planet, dot, and_, with_, in_ = range(6)
        >>> beams = Beams(
        ...     tokens=torch.tensor([[[planet, dot, in_], [and_, with_, in_]]]),
        ...     parents=torch.tensor([[[0, 0, 0], [0, 0, 1]]]),
        ...     log_probs=torch.tensor([[[0.6, 0.3, 0.05], [0.3, 0.2, 0.1]]]).log())
        >>> tree = prefix_tree(torch.tensor([red]), beams, max_nodes=6)
        >>> tree.tokens.tolist()[0]        # red planet dot and with in
        [0, 1, 2, 3, 4, 5]
        >>> tree.parents.tolist()[0]
        [0, 0, 0, 1, 1, 2]
        >>> tree.ancestors.int().tolist()[0][4]     # red planet with
        [1, 1, 0, 0, 1, 0]
    """
    batch, length, width = beams.tokens.shape
    origin = torch.zeros(batch, 1, dtype=torch.int64, device=root.device)
    level = torch.arange(length, device=root.device)[:, None]
    # Level i begins at node 1 + i W. A parent of level 0 is the root.
    parents = (beams.parents + (1 + (level - 1) * width)).clamp_(min=0)
    parents[:, 0] = 0
    tree = DraftTree(
        tokens=torch.cat([root[:, None], beams.tokens.flatten(1)], dim=1),
        parents=torch.cat([origin, parents.flatten(1)], dim=1),
        depths=torch.cat([origin[0], (level + 1).expand(-1, width).flatten()]).expand(batch, -1),
        log_probs=torch.cat([origin.float(), beams.log_probs.flatten(1)], dim=1),
        sources=torch.cat([origin[0], torch.full_like(level, DRAFTER).expand(-1, width).flatten()]).expand(batch, -1),
        max_depth=length,
    )
    return tree if max_nodes is None else _best(tree, max_nodes)


def joined(tree: DraftTree, other: DraftTree) -> DraftTree:
    """Two trees of the same roots as one: equal prefixes become one node, which has the larger of its probabilities.

    The nodes of ``other`` come last. One that ``tree`` has too keeps its place there, with probability 0 and no
    children: pruning drops it first.

    Examples:
        >>> import torch
        >>> chain = lambda *tokens, p: DraftTree(
        ...     torch.tensor([tokens]), torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 2]]),
        ...     torch.tensor([[1.0, *p]]).log(), torch.tensor([[0, 2, 2]]), max_depth=2)
        >>> both = joined(chain(7, 3, 4, p=(0.5, 0.4)), chain(7, 3, 5, p=(0.75, 0.25)))     # 7 3 4 and 7 3 5
        >>> both.tokens.tolist(), both.parents.tolist()
        ([[7, 3, 4, 3, 5]], [[0, 0, 1, 0, 1]])
        >>> [round(x, 2) for x in both.log_probs.exp().tolist()[0]]
        [1.0, 0.75, 0.4, 0.0, 0.25]
    """
    own = tree.tokens.shape[1] - 1 + torch.arange(other.tokens.shape[1], device=tree.tokens.device)
    place = own.where(own >= tree.tokens.shape[1], 0).expand_as(other.tokens)  # the roots are one already
    known = torch.zeros_like(place, dtype=torch.bool)
    for _ in range(min(tree.max_depth, other.max_depth)):  # a parent is found before its children are
        parents = place.gather(1, other.parents)
        equal = (tree.parents[:, None] == parents[:, :, None]) & (tree.tokens[:, None] == other.tokens[:, :, None])
        equal[:, 0], equal[:, :, 0] = False, False
        before, (known, index) = known, equal.max(dim=2)
        place = index.where(known | (place == 0), own)
        if known.device.type == "cpu" and bool((known == before).all()):
            break  # where looking costs nothing
    parents = place.gather(1, other.parents)
    claimed = other.log_probs.masked_fill(~known, -torch.inf)
    best = tree.log_probs.scatter_reduce(1, place.masked_fill(~known, 0), claimed, "amax")
    sources = torch.where(best > tree.log_probs, other.sources[:, -1:], tree.sources)
    return DraftTree(
        tokens=torch.cat([tree.tokens, other.tokens[:, 1:]], dim=1),
        parents=torch.cat([tree.parents, parents[:, 1:]], dim=1),
        depths=torch.cat([tree.depths, other.depths[:, 1:]], dim=1),
        log_probs=torch.cat([best, other.log_probs.masked_fill(known, -torch.inf)[:, 1:]], dim=1),
        sources=torch.cat([sources, other.sources[:, 1:]], dim=1),
        max_depth=max(tree.max_depth, other.max_depth),
    )


def pruned(tree: DraftTree, max_nodes: int) -> DraftTree:
    """The most probable nodes of each row; no deeper than they are, where looking costs nothing."""
    if max_nodes == 1:
        return root_tree(tree.tokens[:, 0])
    tree = _best(tree, max_nodes)
    return replace(tree, max_depth=int(tree.depths.max())) if tree.depths.device.type == "cpu" else tree


def _best(tree: DraftTree, max_nodes: int) -> DraftTree:
    """The most probable nodes of each row, renumbered in their order."""
    if tree.tokens.shape[1] <= max_nodes:
        return tree
    order = tree.log_probs.sort(dim=1, descending=True, stable=True).indices[:, :max_nodes].sort(dim=1).values
    numbers = torch.arange(max_nodes, device=order.device).expand_as(order)
    renumbered = torch.empty_like(tree.parents).scatter_(1, order, numbers)
    parents = renumbered.gather(1, tree.parents.gather(1, order))
    columns = (tree.tokens, tree.depths, tree.log_probs, tree.sources)
    tokens, depths, log_probs, sources = (column.gather(1, order) for column in columns)
    return DraftTree(tokens, parents, depths, log_probs, sources, tree.max_depth)
