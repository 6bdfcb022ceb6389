"""What is measured, defined once.

``n_accepted`` counts the draft tokens accepted in a step, without the bonus token; ``tokens_per_step`` is the mean of
``n_accepted + 1`` over the steps after prefill. Prefill's own pass and token are not counted, and the last step counts
the tokens that were emitted.

The acceptance rate is accepted over drafted tokens: a step with beams of L tokens drafts L, however many beams there
are, for no more than L can be accepted. At position k it is the share of the steps that drafted k tokens or more in
which k or more were accepted. A step that drafts nothing counts in neither.

Every token of a reply has a source: the verifier alone, which drew it where no draft was accepted, or what drafted it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

SOURCES = ("verifier", "drafter", "lookup")  # as `core.tree` numbers them


def tokens_by_source(sources: Iterable[Iterable[int]]) -> dict[str, int]:
    """How many tokens of some replies each source gave; empty for replies of which that is not known.

    >>> tokens_by_source([[0, 1, 2, 0], [0, 2]])
    {'verifier': 3, 'drafter': 1, 'lookup': 2}
    """
    counts = Counter(source for reply in sources for source in reply)
    return {name: counts[number] for number, name in enumerate(SOURCES)} if counts else {}


@dataclass(frozen=True)
class Walk:
    """Steps that decoding takes, or would take along known replies, and the tokens that they emit."""

    steps: int
    tokens: int

    def __add__(self, other: "Walk") -> "Walk":
        return Walk(self.steps + other.steps, self.tokens + other.tokens)

    @property
    def tokens_per_step(self) -> float:
        """Tokens over steps; NaN without a step."""
        return self.tokens / self.steps if self.steps else float("nan")


def walk(n_accepted: list[int]) -> Walk:
    """Jump along one reply as decoding would: a draft with token i as its root would have ``n_accepted[i]`` accepted.

    The reply's first token is prefill's; its last is nobody's root because nothing follows it. A jump that would pass
    the end emits only what is left.

    >>> walk([2, 0, 0, 1, 0])     # 5 tokens, the first from prefill: root 0 emits 3, root 3 emits the last
    Walk(steps=2, tokens=4)
    """
    return Walk(len(visited(n_accepted)), max(len(n_accepted) - 1, 0))


def visited(n_accepted: list[int]) -> list[int]:
    """The roots that `walk` drafts from.

    >>> visited([2, 0, 0, 1, 0])
    [0, 3]
    """
    roots, position = [], 0
    while position < len(n_accepted) - 1:
        roots.append(position)
        position += n_accepted[position] + 1
    return roots


@dataclass(frozen=True)
class Acceptance:
    """How many steps drafted, and how many accepted, k tokens or more: entry k - 1 of each."""

    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @classmethod
    def of(cls, drafts: Iterable[tuple[int, int]]) -> "Acceptance":
        """Count steps that drafted and accepted so many tokens.

        >>> Acceptance.of([(3, 1), (3, 3), (2, 0), (0, 0)])
        Acceptance(drafted=(3, 3, 2), accepted=(2, 1, 1))
        """
        steps = list(drafts)
        depths = range(1, max((drafted for drafted, _ in steps), default=0) + 1)
        return cls(
            tuple(sum(drafted >= k for drafted, _ in steps) for k in depths),
            tuple(sum(accepted >= k for _, accepted in steps) for k in depths),
        )

    @classmethod
    def total(cls, parts: Sequence["Acceptance"]) -> "Acceptance":
        """All steps together."""
        return cls(
            tuple(map(sum, zip_longest(*(part.drafted for part in parts), fillvalue=0))),
            tuple(map(sum, zip_longest(*(part.accepted for part in parts), fillvalue=0))),
        )

    @property
    def rate(self) -> float:
        """Accepted over drafted tokens; NaN when nothing was drafted."""
        return sum(self.accepted) / sum(self.drafted) if self.drafted else float("nan")

    @property
    def by_position(self) -> list[float]:
        """The rate at positions 1, 2, ... of a draft."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True)]
