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


Forwards = list[tuple[nn.Module, Callable[[Tensor], Tensor]]]


@contextmanager
def swapped(forwards: Forwards) -> Iterator[None]:
    """Within this context the layers have these forwards, but for any that has another one of its own already."""
    mine = [(layer, forward) for layer, forward in forwards if "forward" not in vars(layer)]
    for layer, forward in mine:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in mine:
            del layer.forward


class PackedLinears:
    """The linear layers of a model with their weights packed; `applied` makes the model use them.

    A layer whose forward reads a part of its weight, and no bias, says so by its ``forward_weight``.

    Costs one more copy of those weights. Only weights that are float32 and on the CPU are packed;
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
        self._packed: dict[nn.Module, tuple[tuple[int, int, float, float], Tensor]] = {}

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
        state, packed = self._packed.get(layer, (None, layer.weight))
        now = _state(layer.weight)
        if state != now:  # packed before the weights were changed
            weight = getattr(layer, "forward_weight", layer.weight).detach()
            weight = (weight.t() if isinstance(layer, Conv1D) else weight).contiguous()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
            self._packed[layer] = (now, packed)
        return packed


def _state(weight: Tensor) -> tuple[int, int, float, float]:
    """What changes with a weight. Its version does not when it is written through ``.data``, so two sums are taken."""
    flat = weight.detach().flatten()
    return weight._version, weight.data_ptr(), float(flat.sum()), float(flat[::97].abs().sum())


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
        rows = x.numel() // x.shape[-1]
        if rows not in few or (rows == 1 and torch.get_num_threads() == 1):
            return default(x)
        return multiply(x, packed, bias, "none", [], "")

    return forward
