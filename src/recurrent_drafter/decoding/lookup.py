"""Lookup: what the prompt or a reply has said before is a draft for nothing.

The tokens that followed an earlier occurrence of the newest ones are a chain to verify. How often such a token is
accepted depends on how many tokens matched, and is counted on every token of the replies, verified or not: the text
itself tells what a lookup would have found. All of it stays on the host, after the one transfer of a step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recurrent_drafter.core.tree import LOOKUP, DraftTree
from recurrent_drafter.decoding.costs import Floats
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.rates import EARLIER, LONGEST_MATCH, PROMPT, REPLY, AcceptanceByMatch

LOOKED_UP = 5  # of the newest tokens, at most
TRIED = 3  # newest occurrences of each length
LONGEST_CHAIN = 24
LEAST = 0.05  # a chain ends where it is accepted less often
REMEMBERED = 2**14  # tokens of earlier replies
END = -1  # of an earlier reply
BASE, MASK = np.uint64(0x9E3779B97F4A7C15), 2**64 - 1  # an odd number without a pattern


class Occurrences:
    """A text that grows, and the places after every run of 1 to `LOOKED_UP` of its tokens.

    A run is known by a number, of which its tokens are the digits (modulo 2^64). Runs that share one do no harm: tokens
    are compared before a match counts.

    Attributes:
        runs: of the last 1 to `LOOKED_UP` tokens.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self.runs: list[int] = []
        self._newest: list[dict[int, int]] = []  # by length and run: the newest place after it
        self._before: list[list[int]] = []  # by length and place: the one after the run's occurrence before, or -1
        digits = np.array(self.tokens, dtype=np.int64).astype(np.uint64)
        numbers = np.zeros_like(digits)
        for length in range(1, LOOKED_UP + 1):
            numbers = np.concatenate([numbers[:1] * 0, numbers[:-1]]) * BASE + digits
            followed = numbers[length - 1 : -1]
            self.runs.append(int(numbers[-1]) if len(numbers) else 0)
            self._newest.append(dict(zip(followed.tolist(), range(length, len(numbers)), strict=True)))
            self._before.append([-1] * min(length, len(numbers)) + _before(followed, length))

    def add(self, token: int) -> None:
        shorter, place = 0, len(self.tokens)
        for index, run in enumerate(self.runs):
            newest = self._newest[index]
            self._before[index].append(newest.get(run, -1))
            if place > index:
                newest[run] = place
            self.runs[index] = (shorter * int(BASE) + token) & MASK
            shorter = run
        self.tokens.append(token)

    def after(self, run: int, length: int) -> Iterator[int]:
        """The places after the newest occurrences of a run of so many tokens."""
        place = self._newest[length - 1].get(run, -1)
        for _ in range(TRIED):
            if place < 0:
                return
            yield place
            place = self._before[length - 1][place]

    def matched(self, place: int, text: Sequence[int]) -> int:
        """How many tokens before a place are those that a text ends in, as far as rates tell."""
        count, most = 0, min(LONGEST_MATCH, place, len(text))
        while count < most and self.tokens[place - 1 - count] == text[-1 - count]:
            count += 1
        return count


def _before(numbers: npt.NDArray[np.uint64], first: int) -> list[int]:
    """For each number of a row that begins at place ``first``: the place where it stood last before, or -1."""
    order = np.argsort(numbers, kind="stable")
    same = numbers[order[1:]] == numbers[order[:-1]]
    found = np.full(len(numbers), -1)
    found[order[1:][same]] = order[:-1][same] + first
    return found.tolist()


class Memory:
    """Replies of earlier generations, of which the newest are kept: at most so many tokens, END tokens included."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self.most, self.replies = most, Occurrences()

    def add(self, reply: Sequence[int]) -> None:
        if len(self.replies.tokens) + len(reply) >= self.most:  # half of it goes at once: reading anew takes a while
            kept = max(self.most // 2 - len(reply), 0)
            self.replies = Occurrences(self.replies.tokens[len(self.replies.tokens) - kept :])
        for token in (*reply, END)[-self.most :] if self.most else ():
            self.replies.add(token)


@dataclass(frozen=True)
class Continuation:
    """Where a chain may be read; ``rank`` is 0 for the likeliest, and each begins with a token of its own."""

    text: Occurrences
    place: int
    matched: int
    source: int
    rank: int

    @property
    def token(self) -> int:
        return self.text.tokens[self.place]

    def chain(self, longest: int) -> Sequence[int]:
        """At most so many tokens; where the text ends, what was read repeats: a text may be about to do so."""
        tokens = self.text.tokens[self.place : self.place + longest]
        if self.source == EARLIER:
            return tokens[: tokens.index(END)] if END in tokens else tokens
        return (tokens * -(-longest // len(tokens)))[:longest]


@dataclass
class Chains:
    """What was found for one row: nodes after the root, whose number is 0, each after its parent."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)

    def add(self, token: int, parent: int, depth: int, probability: float) -> int:
        """The new node's number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth)
        self.probabilities.append(probability)
        return len(self.tokens)


@dataclass(frozen=True)
class Found:
    """Chains for every row of a batch: C nodes each, of which those of probability 0 are fillers."""

    rows: Sequence[Chains]

    @classmethod
    def of(cls, rows: Sequence[Chains]) -> "Found | None":
        """Filled up to the longest of them; None where nothing was found."""
        width = max(len(row.tokens) for row in rows)
        for row in rows:
            while len(row.tokens) < width:
                row.add(token=0, parent=0, depth=1, probability=0.0)
        return cls(rows) if width else None

    @property
    def probabilities(self) -> Floats:  # (B, C)
        return np.array([row.probabilities for row in self.rows])

    def tree(self, root: Tensor, log_probs: Floats) -> DraftTree:  # (B,), (B, C)
        """The chains after their roots (B,), claimed to be as probable as ``log_probs`` says."""
        tokens, parents, depths = (
            torch.tensor([[0, *getattr(row, name)] for row in self.rows]).to(root.device, non_blocking=True)
            for name in ("tokens", "parents", "depths")
        )
        tokens[:, 0] = root
        claims = nn.functional.pad(torch.from_numpy(log_probs).float(), (1, 0)).to(root.device, non_blocking=True)
        deepest = max(max(row.depths) for row in self.rows)
        return DraftTree(tokens, parents, depths, claims, (depths > 0) * LOOKUP, deepest)


class Lookup:
    """Chains for the replies of one generation: from its prompts, the replies, and a memory of earlier ones."""

    def __init__(self, state: GenerationState, rates: AcceptanceByMatch, memory: Memory) -> None:
        self._state, self._rates, self._memory = state, rates, memory
        self._prompt = state.prompts.shape[1]
        self._texts = [Occurrences(prompt) for prompt in state.prompts.tolist()]
        self._found = [self._continuations(text) for text in self._texts]  # at the end of each

    def find(self, longest: int) -> Found | None:
        """Chains of at most so many tokens after each unfinished row; None where nothing is found."""
        self._read()
        longest = min(longest, LONGEST_CHAIN)
        return Found.of([self._chains(row, longest) for row in self._state.rows])

    def close(self) -> None:
        """The generation is over: its replies are remembered."""
        self._read()
        for reply in self._state.generated:
            self._memory.add(reply)

    def _read(self) -> None:
        """Take in what the replies have got since; each of their tokens tells whether it would have been found."""
        for row, (text, reply) in enumerate(zip(self._texts, self._state.generated, strict=True)):
            for token in reply[len(text.tokens) - self._prompt :]:
                for found in self._found[row]:
                    self._rates.verified(found.source, found.rank, found.matched, accepted=found.token == token)
                text.add(token)
                self._found[row] = self._continuations(text)

    def _chains(self, row: int, longest: int) -> Chains:
        chains = Chains()
        for found in self._found[row] if longest > 0 else ():
            parent, probability = 0, 1.0
            for depth, token in enumerate(found.chain(longest), 1):
                rank = found.rank if depth == 1 else 0
                probability *= self._rates(found.source, rank, found.matched + depth - 1)
                if probability < LEAST:
                    break
                parent = chains.add(token, parent, depth, probability)
        return chains

    def _continuations(self, text: Occurrences) -> list[Continuation]:
        """The longest matches, the newest first, that go on with different tokens; a row's own text comes first."""
        found: dict[int, Continuation] = {}
        for length in range(LOOKED_UP, 0, -1):
            for where in (text, self._memory.replies):
                for place in where.after(text.runs[length - 1], length):
                    token = where.tokens[place]
                    if token not in found and token != END:
                        source = EARLIER if where is not text else PROMPT if place < self._prompt else REPLY
                        matched = where.matched(place, text.tokens)
                        found[token] = Continuation(where, place, matched, source, len(found))
                        if len(found) == AcceptanceByMatch.RANKS:
                            return list(found.values())
        return list(found.values())
