"""Weights rearranged for few rows, on CPUs in float32.

A tree of n nodes is a matrix product with n rows. PyTorch's default float32 kernels on a CPU rearrange the weight on
every call once there are two rows, so verifying eight tokens costs three times as much as one, and speculation hardly
pays. A weight that was rearranged once costs the same for up to four rows. Which arrangement is the fastest depends on
processor, threads and shape, so a short measurement picks one for each shape, or none.
"""

import ctypes
import math
import mmap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

FEW_ROWS = range(1, 65)
COUNTS = {1: 2, 4: 3, 12: 3}  # rows that arrangements are timed for, and how much each counts
SAMPLED = 256  # numbers of a weight that are looked at to see whether it was changed
BESIDE = {1: 0, 4: 1, 12: 1}  # the same beside the weights as they are, which serve for one row
TRIMMED = 2**26  # bytes of freed weights that may stay the allocator's
CACHED, ROUNDS = 2**26, 3  # numbers that no cache holds; how often each product is timed

Forwards = list[tuple[nn.Module, Callable[[Tensor], Tensor]]]
Fingerprint = tuple[int, int, bytes]
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


class PackedLinear(nn.Module):
    """What a linear layer has become, in its place, after `pack` took its weight as it was.

    Whoever asks for ``weight`` gets it as it was, made anew; so `state_dict` and `save_pretrained` write it. One that
    another layer holds too, as a tied embedding, is kept.
    """

    packed: Packed
    was: type[nn.Linear | Conv1D]
    is_shared: bool
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        kept = self._parameters["weight"]
        assert kept is not None
        if self.is_shared:
            return kept
        return self.packed.dense() if self.was is nn.Linear else self.packed.dense().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        """The layer's product, from its packed weight."""
        return self.packed(x, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_shared:
            destination[prefix + "weight"] = self.weight

    def _apply(self, *args: Any, **options: Any) -> Any:
        to_dense(self)  # a layer that is moved or converted is a usual one again
        return self._apply(*args, **options)


def pack(
    model: nn.Module,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Put packed weights in the place of those of a model's linear layers, layer by layer; `to_dense` gives them back.

    Only weights that are float32 and on the CPU are packed, and these where a packed one is the faster.
    ``progress`` gets the layers that are done, and how many there are.
    """
    held = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    layers = [layer for layer in linears(model) if _packable(layer.weight)]
    chosen = arrangements([_weight(layer) for layer in layers], COUNTS, clock)
    kept = 0  # bytes that were given up since the allocator last gave memory back
    for done, layer in enumerate(layers, start=1):
        if (make := chosen[kind_of(_weight(layer))].pack) is not None:
            _replace(layer, make, is_shared=held[id(layer.weight)] > 1)
            kept += layer.packed.nbytes
        if kept > TRIMMED or done == len(layers):
            trim_memory()
            kept = 0
        if progress is not None:
            progress(done, len(layers))


def to_dense(model: nn.Module) -> None:
    """Give the layers that `pack` has taken them from their weights as they were, bit by bit."""
    for layer in [module for module in model.modules() if isinstance(module, PackedLinear)]:
        layer._parameters["weight"].data = layer.weight.detach()  # type: ignore[union-attr]
        layer.__class__ = layer.was  # type: ignore[assignment]
        del layer.packed, layer.was, layer.is_shared
    trim_memory()


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Within it a packed model has its weights as they were; a model that is not packed is left alone."""
    packed = [
        (module, type(module.packed), module.is_shared)
        for module in model.modules()
        if isinstance(module, PackedLinear)
    ]
    to_dense(model)
    try:
        yield
    finally:
        for layer, make, is_shared in packed:
            _replace(layer, make, is_shared=is_shared)
        trim_memory()


def _replace(layer: Any, make: Callable[[Tensor], Packed], *, is_shared: bool) -> None:
    packed = make(_weight(layer))
    if not is_shared:  # shape, dtype and place in the state stay; reading it would be a mistake, and gives no number
        layer.weight.data = torch.full((), torch.nan).expand(layer.weight.shape)
    layer.was, layer.packed, layer.is_shared = type(layer), packed, is_shared
    layer.__class__ = PackedLinear


class PackedLinears:
    """Packed weights beside a model's own, which stays as it is; `applied` makes the model use them.

    A layer whose forward reads a part of its weight, and no bias, says so by its ``forward_weight``.

    Costs one more copy of those weights (``nbytes``). Only weights that are float32 and on the CPU are packed: as
    `arrange` found for them, else as oneDNN does, which takes the least time. ``rows``: for how many rows at a time the
    packed weights are used.
    """

    def __init__(self, model: nn.Module, rows: range = FEW_ROWS) -> None:
        self._rows = rows
        self._layers = linears(model)
        self._packed: dict[nn.Module, tuple[Fingerprint, Packed]] = {}
        self.is_complete = False

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for _, packed in self._packed.values())

    def forwards(self, most: float = math.inf, clock: Callable[[], float] = time.perf_counter) -> Forwards:
        """Layers with the forward that computes from packed weights, packed anew where these have changed.

        After ``most`` seconds no further layer is packed; `is_complete` says whether all are.
        """
        own = [layer for layer in self._layers if not isinstance(layer, PackedLinear)]  # `pack` may come in between
        layers = [layer for layer in own if _packable(layer.weight) and "forward" not in vars(layer)]
        found, end = [], clock() + most
        self.is_complete = True
        for layer in layers:
            how = _found.get(_key(kind_of(_weight(layer)), BESIDE), AT_ONCE) if self._rows == FEW_ROWS else AT_ONCE
            if how.pack is not None:
                few = self._rows if how.for_one else self._rows[1:]
                before, packed = self._packed.get(layer, (None, None))
                now = fingerprint(layer.weight)
                if packed is None or before != now:  # packed before the weights were changed
                    if clock() >= end:
                        self.is_complete = False
                        continue
                    packed = how.pack(_weight(layer))
                    self._packed[layer] = now, packed
                found.append((layer, _few_row_forward(layer, packed, few)))
        return found

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the layers compute few rows from their packed weights; outside they are untouched."""
        with swapped(self.forwards()):
            yield


class GradualPacking:
    """Packs for a share of the time while decoding goes on, so that no reply waits for it; what is packed is used.

    Attributes:
        forwards: of the layers that are packed.
    """

    SHARE = 0.08

    def __init__(self, packed: Sequence[PackedLinears], clock: Callable[[], float] = time.perf_counter) -> None:
        self._packed, self._clock = packed, clock
        self._began, self._spent = clock(), 0.0
        self._pack(0.0)

    def go_on(self) -> None:
        """Another step was decoded: pack as much as that has earned."""
        earned = self.SHARE * (self._clock() - self._began) - self._spent
        if earned > 0 and not all(linears.is_complete for linears in self._packed):
            before = self._clock()
            self._pack(earned)
            self._spent += self._clock() - before

    def _pack(self, seconds: float) -> None:
        self.forwards = [pair for linears in self._packed for pair in linears.forwards(seconds, self._clock)]


@contextmanager
def swapped(forwards: Forwards) -> Iterator[None]:
    """Within this context the layers have these forwards, but for any that has another one of its own already.

    A layer's attributes are set past `torch.nn.Module`, which takes a hundred times as long: this happens at each step.
    """
    mine = [(own, forward) for own, forward in ((vars(layer), new) for layer, new in forwards) if "forward" not in own]
    for own, forward in mine:
        own["forward"] = forward
    try:
        yield
    finally:
        for own, _ in mine:
            del own["forward"]


def _few_row_forward(layer: Any, packed: Packed, few: range) -> Callable[[Tensor], Tensor]:
    default, bias = layer.forward, None if hasattr(layer, "forward_weight") else layer.bias

    def forward(x: Tensor) -> Tensor:
        return packed(x, bias) if x.numel() // x.shape[-1] in few else default(x)

    return forward


def fingerprint(weight: Tensor) -> Fingerprint:
    """What changes with a weight: its version, its place in memory and `SAMPLED` of its numbers.

    A write through ``.data`` leaves the version as it was, so it is seen where it touches a number of the sample: any
    change of the whole weight, but not that of a few numbers. In-place operations on the weight itself always are.
    """
    flat = weight.detach().flatten()
    sample = flat[:: max(len(flat) // SAMPLED, 1)]
    return weight._version, weight.data_ptr(), sample.numpy().tobytes()


def linears(model: nn.Module) -> list[Any]:
    """The layers whose product may be computed from a packed weight."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (type(module) in (nn.Linear, Conv1D) or hasattr(module, "forward_weight"))
    ]


def _packable(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.float32
        and not weight.is_inference()  # such weights do not tell when they are changed
        and weight.device.type == "cpu"
        and min(weight.shape) >= 64
    )


def _weight(layer: Any) -> Tensor:  # (N, K)
    weight: Tensor = getattr(layer, "forward_weight", layer.weight).detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


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


def arrange(model: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
    """Measure how weights like this model's are packed best beside it: what `PackedLinears` does from now on."""
    arrangements([_weight(layer) for layer in linears(model) if _packable(layer.weight)], BESIDE, clock)


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
