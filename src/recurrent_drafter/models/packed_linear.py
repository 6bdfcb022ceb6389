"""Weights rearranged for few rows, on CPUs in float32.

A tree of n nodes is a matrix product with n rows. PyTorch's default float32 kernels on a CPU rearrange the weight on
every call once there are two rows, so verifying eight tokens costs three times as much as one, and speculation hardly
pays. A weight that was rearranged once costs the same for up to four rows. Which arrangement is the fastest depends on
processor, threads and shape, so a short measurement picks one for each shape, or none.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recurrent_drafter.models.weight_layouts import (
    AT_ONCE,
    BESIDE,
    COUNTS,
    Packed,
    arrangement_found,
    arrangements,
    kind_of,
    trim_memory,
)

FEW_ROWS = range(1, 65)
SAMPLED = 256  # numbers of a weight that are looked at to see whether it was changed
TRIMMED = 2**26  # bytes of freed weights that may stay the allocator's

Forwards = list[tuple[nn.Module, Callable[[Tensor], Tensor]]]
Fingerprint = tuple[int, int, bytes]


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
            how = arrangement_found(_weight(layer), BESIDE) if self._rows == FEW_ROWS else AT_ONCE
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
        if all(linears.is_complete for linears in self._packed):
            return
        before = self._clock()
        earned = self.SHARE * (before - self._began) - self._spent
        if earned > 0:
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
    version = 0 if weight.is_inference() else weight._version
    if 0 in weight.stride():  # one number for all: the place of a weight that was packed
        return version, weight.data_ptr(), b""
    flat = weight.detach().flatten()
    sample = flat[:: max(len(flat) // SAMPLED, 1)].float().cpu()
    return version, weight.data_ptr(), sample.numpy().tobytes()


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


def arrange(model: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
    """Measure how weights like this model's are packed best beside it: what `PackedLinears` does from now on."""
    arrangements([_weight(layer) for layer in linears(model) if _packable(layer.weight)], BESIDE, clock)
