"""In which order examples are trained on: shuffled, with neighbors of like length so that little is padding.

The order is a function of seed and epoch alone: a resumed training goes on with the order that it was begun with.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info

GROUPED_BATCHES = 32  # among which lengths are sorted: more waste less, fewer shuffle better

T = TypeVar("T")


def grouped_order(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
    """A permutation of the indices, in which every ``batch`` in a row are of similar length.

    Shuffled, cut into pools of `GROUPED_BATCHES` batches, each pool sorted by length and cut into batches; those are
    shuffled again. Only the very last batch may be smaller.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), batch * GROUPED_BATCHES):
        pool = sorted(shuffled[start : start + batch * GROUPED_BATCHES], key=lambda index: lengths[index])
        batches += [pool[first : first + batch] for first in range(0, len(pool), batch)]
    rest = [batches.pop()] if batches and len(batches[-1]) < batch else []
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [index for group in [*(batches[number] for number in order), *rest] for index in group]


def padding_share(lengths: Sequence[int], order: Sequence[int], batch: int) -> float:
    """The part of all positions in batches of ``batch``, taken in this order, that holds padding.

    >>> padding_share([4, 2, 4, 4], [0, 1, 2, 3], 2)      # the 2 is padded to 4: two of sixteen
    0.125
    """
    taken = [lengths[index] for index in order]
    groups = [taken[start : start + batch] for start in range(0, len(taken), batch)]
    positions = sum(max(group) * len(group) for group in groups)
    return 1 - sum(taken) / positions if positions else 0.0


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


class LengthGrouped(Sampler[int]):
    """`grouped_order` of every epoch, for a DataLoader."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(grouped_order(self.lengths, self.batch, _generator(self.seed, self.epoch)))


class ShuffledStream(IterableDataset[T]):
    """Examples as they come in, shuffled within a buffer: it is filled, put in `grouped_order`, and emptied.

    ``examples`` begins the source anew; what it raises comes through. ``batch`` of them will be padded to one length.
    """

    def __init__(
        self, examples: Callable[[], Iterator[T]], length: Callable[[T], int], *, buffer: int, batch: int, seed: int
    ) -> None:
        self.examples, self.length = examples, length
        self.buffer, self.batch, self.seed, self.epoch = buffer, batch, seed, 0

    @cached_property
    def beginning(self) -> Sequence[T]:
        """What the first buffer holds, in the order of the source."""
        return list(itertools.islice(self.examples(), self.buffer))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[T]:
        generator = _generator(self.seed, self.epoch)
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        held: list[T] = []
        for number, example in enumerate(self.examples()):
            if number % shares == share:
                held.append(example)
            if len(held) == self.buffer:
                yield from self._emptied(held, generator)
                held = []
        yield from self._emptied(held, generator)

    def _emptied(self, held: list[T], generator: torch.Generator) -> Iterator[T]:
        lengths = [self.length(example) for example in held]
        return (held[index] for index in grouped_order(lengths, self.batch, generator))
