"""From beams to a prefix tree."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recurrent_drafter.core.beam import Beams


@dataclass(frozen=True)
class DraftTree:
    """N nodes per row in topological order; node 0 is the root token, its own parent.

    ``log_probs`` are the drafter's cumulative log-probabilities, 0 at the root.
    """

    tokens: Tensor  # (B, N) int64
    parents: Tensor  # (B, N) int64
    depths: Tensor  # (B, N) int64
    log_probs: Tensor  # (B, N) float32
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
    return DraftTree(root[:, None], zeros, zeros, zeros.float(), max_depth=0)


def prefix_tree(root: Tensor, beams: Beams, max_nodes: int) -> DraftTree:
    """The beams' prefixes as one tree, each prefix once, pruned to the ``max_nodes`` most probable.

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
        max_depth=length,
    )
    return tree if 1 + length * width <= max_nodes else _pruned(tree, max_nodes)


def _pruned(tree: DraftTree, nodes: int) -> DraftTree:
    """The most probable nodes of each row, renumbered in their order."""
    order = tree.log_probs.sort(dim=1, descending=True, stable=True).indices[:, :nodes].sort(dim=1).values
    numbers = torch.arange(nodes, device=order.device).expand_as(order)
    renumbered = torch.empty_like(tree.parents).scatter_(1, order, numbers)
    parents = renumbered.gather(1, tree.parents.gather(1, order))
    tokens, depths, log_probs = (column.gather(1, order) for column in (tree.tokens, tree.depths, tree.log_probs))
    return DraftTree(tokens, parents, depths, log_probs, tree.max_depth)
