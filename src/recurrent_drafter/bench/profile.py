"""Where a step's time and memory go, seen from outside: the loop's callables are wrapped meanwhile."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recurrent_drafter.decoding import decode as decode_module
from recurrent_drafter.decoding import speculator as speculator_module
from recurrent_drafter.decoding.draft_controller import TreeController
from recurrent_drafter.decoding.generation_state import GenerationState, Step
from recurrent_drafter.decoding.sampler import Sampler
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.ruler import now
from recurrent_drafter.models.verifier import Verifier, VerifierSession

# Every callable of the loop, by what it is for. None of them calls another one.
STAGES: dict[str, list[tuple[Any, str]]] = {
    "verify": [(VerifierSession, "forward_tree")],
    "draft": [(decode_module.BeamDrafter, "__call__")],
    "tree": [(decode_module, "prefix_tree"), (decode_module, "root_tree")],
    "accept": [(decode_module, "follow_tree"), (decode_module, "hidden_after"), (Sampler, "draws")],
    "cache": [(VerifierSession, "keep"), (VerifierSession, "select")],
    "controller": [(TreeController, name) for name in ("plan", "budget", "observe")],
    "host": [(Step, "on_host"), (GenerationState, "emit")],
}
MIB = 2**20


@dataclass
class Profile:
    """Seconds of each stage over the steps after prefill; ``total`` is theirs altogether."""

    steps: int = 0
    total: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _in_step: bool = False  # prefill calls some of the same functions

    @property
    def rows(self) -> list[tuple[str, float, float]]:
        """Stage, milliseconds per step, share of the step; what no stage explains comes last."""
        parts = {**self.seconds, "other": self.total - sum(self.seconds.values())}
        return [
            (name, 1e3 * seconds / max(self.steps, 1), seconds / (self.total or 1.0)) for name, seconds in parts.items()
        ]

    @property
    def overhead(self) -> float:
        """The share of a step that is neither verification nor drafting."""
        return 1 - (self.seconds["verify"] + self.seconds["draft"]) / self.total if self.total else float("nan")

    def timing(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time within steps added to a stage."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._in_step:
                return function(*args, **kwargs)
            begun = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += now() - begun

        return timed

    def timing_steps(self, decode: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The same loop; its steps counted and timed, but for the first, which is prefill."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            steps = decode(*args, **kwargs)
            yield next(steps)
            while True:
                begun, self._in_step = now(), True
                emitted = next(steps, None)
                self._in_step = False
                if emitted is None:
                    return
                self.steps += 1
                self.total += now() - begun
                yield emitted

        return timed


@contextmanager
def profiled() -> Iterator[Profile]:
    """Time every step of every generation inside; on a GPU each stage waits for the device, so steps take longer."""
    profile = Profile()
    with ExitStack() as stack:
        for name, places in STAGES.items():
            for owner, attribute in places:
                timed = profile.timing(name, getattr(owner, attribute))
                stack.enter_context(patch.object(owner, attribute, timed))
        stack.enter_context(patch.object(speculator_module, "decode", profile.timing_steps(speculator_module.decode)))
        yield profile


class TensorCount(TorchDispatchMode):
    """Counts the bytes of tensors made inside, while they live: ``peak`` is the most at once.

    Exact for what PyTorch's operators return; what a kernel allocates and frees within one call is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.held)
        return result

    def _freed(self, key: int) -> None:
        self.held -= self._sizes.pop(key, 0)


def memory_of(speculator: RecurrentDraftingSpeculator, generate: Callable[[], object]) -> dict[str, float]:
    """Run ``generate``, which decodes with the speculator, once more and count MiB; it must have run before.

    ``cache``: keys and values as allocated. ``packed``: the rearranged copy of float32 weights on a CPU, the drafter's
    included. ``working``: the most that all other tensors together took, prefill included. ``beyond`` is what
    speculation needs besides model, drafter and cache.
    """
    sessions: list[VerifierSession] = []
    sizes: list[int] = []
    open_session = Verifier.open

    def noted(*args: Any, **kwargs: Any) -> Any:
        session, read = open_session(*args, **kwargs)
        sessions.append(session)
        sizes.append(_cache_size(session))
        return session, read

    with patch.object(Verifier, "open", noted), TensorCount() as count:
        generate()
    model, drafter = (
        sum(weight.nbytes for weight in module.parameters()) if module is not None else 0
        for module in (speculator.verifier.model, speculator.drafter)
    )
    cache = max(*sizes, *map(_cache_size, sessions))  # it grows with the text, and shrinks as rows end
    packed, working = sum(linears.nbytes for linears in speculator.packed), max(count.peak - cache, 0)
    parts = {"model": model, "drafter": drafter, "cache": cache, "packed": packed, "working": working}
    return {name: size / MIB for name, size in {**parts, "beyond": packed + working}.items()}


def _cache_size(session: VerifierSession) -> int:
    leaves = tree_leaves(list(vars(session.cache).values()))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    """Those of all tensors in a nest of values; oneDNN's packed weights have none that can be seen."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn:
            yield leaf.untyped_storage()
