"""What decoding holds beyond the model, the drafter and the key-value cache."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recurrent_drafter.bench.profile import replaced
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.models.verifier import Verifier, VerifierSession

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes. ``packed``: the rearranged copy of float32 weights on a CPU, the drafter's included. ``cache``: keys and
    values as allocated. ``working``: the most that all other tensors together took, prefill included.
    """

    model: int
    drafter: int
    cache: int
    packed: int
    working: int

    @property
    def beyond(self) -> int:
        """What speculation needs besides model, drafter and cache."""
        return self.packed + self.working

    def mebibytes(self) -> dict[str, float]:
        """Every part in MiB, for a table or a file."""
        return {name: count / MIB for name, count in {**asdict(self), "beyond": self.beyond}.items()}


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


def memory_of(speculator: RecurrentDraftingSpeculator, generate: Callable[[], object]) -> Memory:
    """Run ``generate``, which decodes with the speculator, once more and count; it must have run before."""
    sessions: list[VerifierSession] = []
    cache_sizes: list[int] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def open_session(*args: Any, **kwargs: Any) -> Any:
            session, read = function(*args, **kwargs)
            sessions.append(session)
            cache_sizes.append(_cache_size(session))
            return session, read

        return open_session

    with replaced(Verifier, "open", noting), TensorCount() as count:
        generate()
    cache = max(*cache_sizes, *map(_cache_size, sessions))  # it grows with the text, and shrinks as rows end
    drafter = speculator.drafter
    return Memory(
        model=sum(map(_nbytes, speculator.verifier.model.parameters())),
        drafter=sum(map(_nbytes, drafter.parameters())) if drafter is not None else 0,
        cache=cache,
        packed=sum(linears.nbytes for linears in speculator.packed),
        working=max(count.peak - cache, 0),
    )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


def _cache_size(session: VerifierSession) -> int:
    return sum(map(_nbytes, tree_leaves(list(vars(session.cache).values()))))


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    """Those of all tensors in a nest of values; oneDNN's packed weights have none that can be seen."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn:
            yield leaf.untyped_storage()


def _nbytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
