"""A key-value cache that a tree is verified in.

Each row keeps its own number of columns and a pass writes right after them, so a row has no holes however much of the
last tree it accepted: accepting moves the accepted columns to the front of those just written. Everything is written
in place and grown by doubling. Columns past those that a row keeps are stale, and the mask hides them.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeCache(Cache):
    """Keys and values of all layers, with ``capacity`` columns allocated at first, doubled whenever they are too few.

    The tensors of one shape share a store (tensors, B, heads, capacity, width): moving columns is then one operation
    for all layers, and models whose layers differ in heads or width have a few stores.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[_Columns(self, index) for index in range(layers)])
        self.capacity = capacity
        self.base: int | Tensor = 0
        self.longest = 0  # the most columns that any row keeps
        self._lengths: list[int] = []
        self._stores: list[Tensor] = []
        self._first: dict[int, tuple[Tensor, Tensor]] = {}  # layer: keys and values of the first pass
        self._where: dict[int, list[tuple[int, int]]] = defaultdict(list)  # layer: its keys' store and place, values'

    @property
    def lengths(self) -> list[int]:
        """Columns kept per row. ``base`` holds the same as one number where the rows agree, else as (B, 1)."""
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: Sequence[int]) -> None:
        self._lengths, self.longest = list(lengths), max(lengths, default=0)
        if len(set(lengths)) == 1:
            self.base = lengths[0]
        else:  # not blocking: a plain copy to an accelerator would wait for all of its work
            self.base = torch.tensor(lengths)[:, None].to(self._stores[0].device, non_blocking=True)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:  # (B, heads, N, width) each
        """Put one layer's new columns after each row's own; return that layer's columns up to the last new one."""
        if not self._stores:
            self._first[layer] = keys, values
            return keys, values
        end = self.longest + keys.shape[2]
        if end > self.capacity:
            capacity = max(2 * self.capacity, end)
            self._stores = [_widened(store, capacity, self.longest) for store in self._stores]
            self.capacity = capacity
        own_keys, own_values = (self._stores[store][index] for store, index in self._where[layer])
        return (
            put_after(own_keys, self.base, keys).narrow(2, 0, end),
            put_after(own_values, self.base, values).narrow(2, 0, end),
        )

    def keep_all(self) -> None:
        """Keep every column of the first pass, and allocate for those to come."""
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for layer, pair in self._first.items():
            for block in pair:
                kind = (*block.shape, block.dtype, block.device)
                group = groups.setdefault(kind, [])
                self._where[layer].append((list(groups).index(kind), len(group)))
                group.append(block)
        for (batch, heads, columns, width, *_), blocks in groups.items():
            store = blocks[0].new_zeros(len(blocks), batch, heads, self.capacity, width)
            for own, block in zip(store, blocks, strict=True):
                own[:, :, :columns] = block
            self._stores.append(store)
        self._first.clear()
        self.lengths = [columns] * batch

    def keep(self, path: Tensor, n_accepted: Sequence[int]) -> None:  # (B, M), each row's in ascending order
        """Keep the first 1 + ``n_accepted`` of each row's columns in ``path``, which count from the first new one."""
        batch, kept = len(n_accepted), max(n_accepted) + 1
        if kept > 1:  # a lone column is the root's, and already in its place
            for store in self._stores:
                if batch == 1:
                    new = store[:, :, :, self._lengths[0] :]
                    new[:, :, :, :kept] = new.index_select(3, path[0, :kept].to(store.device))
                else:
                    shape = *store.shape[:3], kept, store.shape[4]
                    source = (path[:, :kept] + self.base).to(store.device)
                    target = (torch.arange(kept, device=path.device).expand(batch, -1) + self.base).to(store.device)
                    moved = store.gather(3, source[None, :, None, :, None].expand(shape))
                    store.scatter_(3, target[None, :, None, :, None].expand(shape), moved)
        self.lengths = [length + n + 1 for length, n in zip(self._lengths, n_accepted, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, ascending; they move to the front, in place."""
        used = self.longest
        first = next((to for to, row in enumerate(rows) if to != row), len(rows))  # those before stay where they are
        moving = torch.tensor(rows[first:], dtype=torch.int64)
        for number, store in enumerate(self._stores):
            moved = store[:, :, :, :used].index_select(1, moving.to(store.device, non_blocking=True))
            store[:, first : len(rows), :, :used] = moved
            self._stores[number] = store[:, : len(rows)]
        self.lengths = [self._lengths[row] for row in rows]

    def repeat(self, times: int) -> None:
        """Go on with every row ``times`` times, copies side by side."""
        self._stores = [store.repeat_interleave(times, dim=1) for store in self._stores]
        self.lengths = [length for length in self._lengths for _ in range(times)]


def _widened(store: Tensor, capacity: int, used: int) -> Tensor:
    """A store of so many columns with the used ones of this; padding it takes more than twice as long."""
    *shape, _, width = store.shape
    wider = store.new_zeros(*shape, capacity, width)
    wider[..., :used, :] = store[..., :used, :]
    return wider


def put_after(own: Tensor, base: int | Tensor, block: Tensor) -> Tensor:  # (B, h, columns, ...), (B, h, N, ...)
    """Write a block after the first ``base`` columns, (B, 1) where rows differ in them; returns ``own``."""
    if isinstance(base, int):
        own.narrow(2, base, block.shape[2]).copy_(block)
    else:
        columns = base.to(own.device) + torch.arange(block.shape[2], device=own.device)  # (B, N)
        own.scatter_(2, columns.view(len(columns), 1, -1, *[1] * (block.dim() - 3)).expand_as(block), block)
    return own


class _Columns(CacheLayerMixin):
    """One layer's face toward transformers."""

    def __init__(self, cache: TreeCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        self.is_initialized = True  # the storage is the cache's

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._cache.write(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._cache.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.longest + query_length, 0

    def get_max_length(self) -> int:
        return -1
