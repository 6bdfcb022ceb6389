"""Lookup: what the prompt or a reply has said before is a draft for nothing.

The tokens that followed an earlier occurrence of the newest ones are a chain to verify. How often such a token is
accepted depends on how many tokens matched, and is counted on every token of the replies, verified or not: the text
itself tells what a lookup would have found. All of it stays on the host, after the one transfer of a step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from recurrent_drafter.core.tree import LOOKUP, DraftTree
from recurrent_drafter.decoding.costs import Floats
from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.decoding.rates import EARLIER, LONGEST_MATCH, PROMPT, REPLY, AcceptanceByMatch

LOOKED_UP = 5  # of the newest tokens, at most
TRIED = 3  # newest occurrences of each length
LONGEST_CHAIN = 24
LEAST = 0.02  # a chain ends where it is accepted less often
REMEMBERED = 2**14  # tokens of earlier replies
END = -1  # of an earlier reply


class Occurrences:
    """A text that grows, and the places after every run of 1 to `LOOKED_UP` of its tokens."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self._newest: list[dict[int, int]] = [{} for _ in range(LOOKED_UP)]  # by length and hash of the run
        self._before: list[list[int]] = [[] for _ in range(LOOKED_UP)]  # by place: the same run's one before, or -1
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        place = len(self.tokens)
        for run, newest, before in zip(runs(self.tokens), self._newest, self._before, strict=True):
            before.append(newest.get(run, -1))
            newest[run] = place
        self.tokens.append(token)

    def after(self, run: int, length: int) -> Iterator[int]:
        """The places after the newest occurrences of a run of so many tokens, by its hash."""
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


def runs(tokens: Sequence[int]) -> list[int]:
    """Hashes of a text's last 1 to `LOOKED_UP` tokens; runs of equal hash that differ match less than they claim to."""
    end = tuple(tokens[-LOOKED_UP:])
    return [hash(end[-length:]) for length in range(1, LOOKED_UP + 1)]


class Memory:
    """Replies of earlier generations, of which the newest are kept."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self.most, self.replies = most, Occurrences()

    def add(self, reply: Sequence[int]) -> None:
        for token in (*reply, END) if self.most else ():
            self.replies.add(token)
        if len(self.replies.tokens) > self.most:
            self.replies = Occurrences(self.replies.tokens[-self.most // 2 :])


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
        for text, reply in zip(self._texts, self._state.generated, strict=True):
            for token in reply[len(text.tokens) - self._prompt :]:
                for found in self._continuations(text):
                    self._rates.verified(found.source, found.rank, found.matched, accepted=found.token == token)
                text.add(token)

    def _chains(self, row: int, longest: int) -> Chains:
        chains, text = Chains(), self._texts[row]
        for found in self._continuations(text) if longest > 0 else ():
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
        hashes = runs(text.tokens)
        for length in range(LOOKED_UP, 0, -1):
            for where in (text, self._memory.replies):
                for place in where.after(hashes[length - 1], length):
                    token = where.tokens[place]
                    if token not in found and token != END:
                        source = EARLIER if where is not text else PROMPT if place < self._prompt else REPLY
                        matched = where.matched(place, text.tokens)
                        found[token] = Continuation(where, place, matched, source, len(found))
                        if len(found) == AcceptanceByMatch.RANKS:
                            return list(found.values())
        return list(found.values())
