"""Sample from the verifier, follow the tree.

Every emitted token is the verifier's own draw given its prefix, so the law of the output is exactly that of plain
autoregression, for any tree; the tree only decides how many draws one verification can serve. There is no second rule
for sampling.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_drafter.core.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """What one verification yields.

    ``path`` holds the visited nodes, the root first; beyond a row's ``n_accepted`` it repeats the last one. ``tokens``
    are those to emit: the accepted draft tokens, then at index ``n_accepted`` the bonus token (repeated beyond it).
    Both have M columns, at least as many as the longest path and at most 1 + the tree's depth.
    """

    path: Tensor  # (B, M) int64
    tokens: Tensor  # (B, M) int64
    n_accepted: Tensor  # (B,) int64
    bonus_token: Tensor  # (B,) int64


def follow_tree(tree: DraftTree, draw: Callable[[Tensor], Tensor]) -> Accepted:
    """Walk down while a child carries the verifier's draw; the first draw that none carries is the bonus token.

    Args:
        tree: the verified tree.
        draw: maps nodes (B,) to the verifier's token after each (B,). A node's draw must not change within a step.
    """
    batch, _ = tree.tokens.shape
    node = torch.zeros(batch, dtype=torch.int64, device=tree.tokens.device)
    n_accepted = torch.zeros_like(node)
    if tree.max_depth == 0:
        token = draw(node)
        return Accepted(node[:, None], token[:, None], n_accepted, token)
    own_parent = tree.parents.clone()
    own_parent[:, 0] = -1  # the root is nobody's child
    token = draw(node)
    path, tokens = [node], [token]
    for _ in range(tree.max_depth):
        is_child = (own_parent == node[:, None]) & (tree.tokens == token[:, None])  # (B, N)
        found, child = is_child.max(dim=1)
        if found.device.type == "cpu" and not found.any():
            break  # where looking costs nothing; elsewhere it would be a synchronization per depth
        node = torch.where(found, child, node)
        n_accepted += found
        token = draw(node)  # the same once more for a row that stopped
        path.append(node)
        tokens.append(token)
    return Accepted(torch.stack(path, 1), torch.stack(tokens, 1), n_accepted, token)
