"""How a weight may lie in memory for products of few rows, and which way is the fastest here."""

import ctypes
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.backends import mkldnn
from torch.nn import functional

COUNTS = {1: 2, 4: 3, 12: 3}  # rows that arrangements are timed for, and how much each counts
BESIDE = {1: 0, 4: 1, 12: 1}  # the same beside the weights as they are, which serve for one row
CACHED, ROUNDS = 2**26, 3  # numbers that no cache holds; how often each product is timed


Kind = tuple[int, int, bool]


class Packed(Protocol):
    """A rearranged weight (N, K)."""

    nbytes: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``functional.linear`` of x (..., K): (..., N)."""

    def dense(self) -> Tensor:
        """The weight (N, K) as it was, bit by bit."""


class Blocks:
    """``WIDTH`` columns of the product at a time: (blocks, K, WIDTH), a small product each."""

    WIDTH = 32

    def __init__(self, weight: Tensor) -> None:
        self._width, inner = weight.shape
        whole, rest = divmod(self._width, self.WIDTH)
        self._blocks = on_huge_pages((whole + (rest > 0), inner, self.WIDTH))
        self._blocks[:whole] = weight[: whole * self.WIDTH].reshape(whole, self.WIDTH, inner).transpose(1, 2)
        if rest:
            self._blocks[whole, :, rest:] = 0
            self._blocks[whole, :, :rest] = weight[whole * self.WIDTH :].t()
        self.nbytes = self._blocks.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = len(flat)
        if rows == 1:  # MKL takes longer for one row than for two
            flat = flat.expand(2, -1).contiguous()
        product = torch.bmm(flat.expand(len(self._blocks), -1, -1), self._blocks)  # (blocks, rows, WIDTH)
        joined = product.transpose(0, 1)[:rows].reshape(*x.shape[:-1], -1)[..., : self._width]
        return joined if bias is None else joined + bias

    def dense(self) -> Tensor:
        return self._blocks.transpose(1, 2).reshape(-1, self._blocks.shape[1])[: self._width].contiguous()


class Reordered:
    """As oneDNN arranges it, which tells nobody how."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = self._multiply(x, self._weight, bias, "none", [], "")
        return product

    def dense(self) -> Tensor:
        return self._weight.to_dense()


def kind_of(weight: Tensor) -> Kind:
    """What an arrangement is chosen for: the shape (N, K), and whether it is the transpose of what lies in memory."""
    width, inner = weight.shape
    return width, inner, weight.stride(0) == 1


@dataclass(frozen=True)
class Arrangement:
    """How weights of a shape are packed; None leaves them. ``for_one``: also faster than PyTorch's for one row."""

    pack: Callable[[Tensor], Packed] | None
    for_one: bool = True


AT_ONCE = Arrangement(Reordered if mkldnn.is_available() else None, for_one=False)
_found: dict[tuple[Any, ...], Arrangement] = {}  # what was measured in this process


def arrangement_found(weight: Tensor, counts: Mapping[int, int]) -> Arrangement:
    """What was measured for such weights (N, K) and so many rows; unmeasured, what takes the least time to pack."""
    return _found.get(_key(kind_of(weight), counts), AT_ONCE)


def _key(kind: Kind, counts: Mapping[int, int]) -> tuple[Any, ...]:
    return kind, torch.get_num_threads(), tuple(counts.items())


def arrangements(
    weights: Sequence[Tensor], counts: Mapping[int, int], clock: Callable[[], float]
) -> dict[Kind, Arrangement]:
    """The fastest for each kind of weight (N, K) of a model, by the time of products with so many rows."""
    groups: dict[Kind, list[Tensor]] = defaultdict(list)
    for weight in weights:
        groups[kind_of(weight)].append(weight)
    found = {}
    for kind, alike in groups.items():
        key = _key(kind, counts)
        if key not in _found:
            _found[key] = _measured(list(_first(alike)), counts, clock)
        found[kind] = _found[key]
    return found


def _measured(weights: Sequence[Tensor], counts: Mapping[int, int], clock: Callable[[], float]) -> Arrangement:
    """Products with weights of one kind by turns, so that each comes from memory, as it does in a step."""
    kinds: list[Callable[[Tensor], Packed] | None] = [None, *([Reordered] if mkldnn.is_available() else []), Blocks]
    seconds = torch.full((ROUNDS, len(kinds), len(counts)), torch.inf, dtype=torch.float64)
    for way, make in enumerate(kinds):  # one after another: each is a copy
        products = [_plain(weight) if make is None else make(weight) for weight in weights]
        for turn in seconds:
            for column, rows in enumerate(counts):
                x = torch.ones(1, rows, weights[0].shape[1])
                begun = clock()
                for product in products:
                    product(x, None)
                turn[way, column] = clock() - begun
        del products
    times = seconds.amin(0)  # what else runs on a machine only ever adds to it
    relative = times / times[0].clamp(min=1e-9)
    best = int((relative * torch.tensor(list(counts.values()))).sum(1).argmin())
    return Arrangement(kinds[best], bool(relative[best, 0] < 1))


def _plain(weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda x, bias: functional.linear(x, weight, bias)


def _first(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """Of one shape, as many as no cache holds."""
    left = CACHED
    for weight in weights:
        if left > 0:
            yield weight[: max(left // weight.shape[1], 1)]
        left -= weight.numel()


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library (glibc) would keep it."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def on_huge_pages(shape: tuple[int, ...]) -> Tensor:
    """Memory of its own for float32 numbers, which goes back to the system with the tensor, on huge pages if it can."""
    count = torch.Size(shape).numel()
    if count < 2**19:  # fewer bytes than a huge page has
        return torch.empty(shape)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    else:
        memory = mmap.mmap(-1, 4 * count)
    return torch.frombuffer(memory, dtype=torch.float32, count=count).view(shape)
