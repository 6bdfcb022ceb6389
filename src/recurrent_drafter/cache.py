"""A key-value cache that a tree is verified in (layer 2).

Written in place and never concatenated: a forward pass writes its columns behind the kept ones, and accepting moves
the accepted columns to the front of those. Columns that a row did not accept stay as holes that its mask hides.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeCache(Cache):
    """Keys and values of all layers, each in one preallocated tensor (layers, B, heads, capacity, head width).

    Args:
        layers: the number of attention layers; all must have the same heads and head width.
        capacity: columns to allocate at first; doubled whenever it does not suffice.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[_Columns(self, index) for index in range(layers)])
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:  # (B, heads, N, width) each
        """Put one layer's new columns behind the kept ones; return all of that layer's columns, kept and new."""
        end = self.length + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = self._allocate(keys), self._allocate(values)
        if end > self.capacity:
            self.capacity = max(2 * self.capacity, end)
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        own_keys, own_values = self.keys[layer], self.values[layer]
        own_keys[:, :, self.length : end] = keys
        own_values[:, :, self.length : end] = values
        return own_keys[:, :, :end], own_values[:, :, :end]

    def keep(self, columns: Tensor) -> None:  # (B, M), relative to the kept length, each row's in ascending order
        """Keep these of the columns just written, moved to the front of them."""
        batch, kept = columns.shape
        if kept > 1:  # a lone column is the root's, and already in its place
            for store in (self.keys, self.values):
                assert store is not None
                window = store[:, :, :, self.length :]
                if batch == 1:
                    moved = window.index_select(3, columns[0])
                else:
                    index = columns[None, :, None, :, None]
                    moved = window.gather(3, index.expand(*store.shape[:3], kept, store.shape[4]))
                window[:, :, :, :kept] = moved
        self.length += kept

    def _allocate(self, sample: Tensor) -> Tensor:
        batch, heads, _, width = sample.shape
        return sample.new_zeros(len(self.layers), batch, heads, self.capacity, width)

    def _grown(self, store: Tensor) -> Tensor:
        grown = store.new_zeros(*store.shape[:3], self.capacity, store.shape[4])
        grown[:, :, :, : store.shape[3]] = store
        return grown


class _Columns(CacheLayerMixin):
    """One layer's face towards transformers."""

    def __init__(self, cache: TreeCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        self.is_initialized = True  # the storage is the cache's

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._cache.write(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.length + query_length, 0

    def get_max_length(self) -> int:
        return -1
