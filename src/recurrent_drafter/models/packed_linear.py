"""Weights reordered for few rows, on CPUs in float32.

A tree of n nodes is a matrix product with n rows. PyTorch's default float32 kernels on a CPU rearrange the weight
on every call once there are two rows, so verifying eight tokens costs twice as much as one, and speculation hardly
pays. oneDNN computes from a weight that was rearranged once; a single row (plain autoregression) gains a little
from it too if several threads share it. Long prompts keep the default kernels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FEW_ROWS = range(1, 65)
SAMPLED = 256  # numbers of a weight that are looked at to see whether it was changed

Forwards = list[tuple[nn.Module, Callable[[Tensor], Tensor]]]
Fingerprint = tuple[int, int, bytes]


def pays(rows: int, few: range = FEW_ROWS) -> bool:
    """Whether passes over so many rows gain from packed weights: one row does only if threads share it."""
    return rows in few and (rows > 1 or torch.get_num_threads() > 1)


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


class PackedLinears:
    """The linear layers of a model with their weights packed; `applied` makes the model use them.

    A layer whose forward reads a part of its weight, and no bias, says so by its ``forward_weight``.

    Costs one more copy of those weights (``nbytes``). Only weights that are float32 and on the CPU are packed;
    elsewhere this does nothing. ``rows``: for how many rows at a time the packed weights are used.
    """

    def __init__(self, model: nn.Module, rows: range = FEW_ROWS) -> None:
        self._rows = rows
        self._layers = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear | Conv1D)
            and (type(module) in (nn.Linear, Conv1D) or hasattr(module, "forward_weight"))
        ]
        self._packed: dict[nn.Module, tuple[Fingerprint, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(packed.numel() * packed.element_size() for _, packed in self._packed.values())

    def forwards(self) -> Forwards:
        """Layers with the forward that computes from packed weights, packed anew where these have changed."""
        return [
            (layer, _few_row_forward(layer, self._pack(layer), self._rows))
            for layer in self._layers
            if _packable(layer.weight) and "forward" not in vars(layer)
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the layers compute few rows from their packed weights; outside they are untouched."""
        with swapped(self.forwards()):
            yield

    def _pack(self, layer: nn.Linear | Conv1D) -> Tensor:
        before, packed = self._packed.get(layer, (None, layer.weight))
        now = fingerprint(layer.weight)
        if before != now:  # packed before the weights were changed
            weight = getattr(layer, "forward_weight", layer.weight).detach()
            weight = (weight.t() if isinstance(layer, Conv1D) else weight).contiguous()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
            self._packed[layer] = (now, packed)
        return packed


def fingerprint(weight: Tensor) -> Fingerprint:
    """What changes with a weight: its version, its place in memory and `SAMPLED` of its numbers.

    A write through ``.data`` leaves the version as it was, so it is seen where it touches a number of the sample: any
    change of the whole weight, but not that of a few numbers. In-place operations on the weight itself always are.
    """
    flat = weight.detach().flatten()
    sample = flat[:: max(len(flat) // SAMPLED, 1)]
    return weight._version, weight.data_ptr(), sample.numpy().tobytes()


def _packable(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.float32
        and not weight.is_inference()  # such weights do not tell when they are changed
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and min(weight.shape) >= 64
    )


def _few_row_forward(layer: nn.Linear | Conv1D, packed: Tensor, few: range) -> Callable[[Tensor], Tensor]:
    default, bias = layer.forward, None if hasattr(layer, "forward_weight") else layer.bias
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        return multiply(x, packed, bias, "none", [], "") if pays(x.numel() // x.shape[-1], few) else default(x)

    return forward
