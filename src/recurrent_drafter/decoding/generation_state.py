"""When a reply ends, and the text so far."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import stopping_criteria as hf

from recurrent_drafter.core.accept import Accepted
from recurrent_drafter.core.metrics import Walk
from recurrent_drafter.core.tree import VERIFIER, DraftTree

# What these say of a row depends on that row alone, so it is asked of alone: a whole batch would cost its square.
ROW_BY_ROW = (hf.MaxTimeCriteria, hf.StopStringCriteria)


@dataclass(frozen=True)
class Step:
    """What a verification yielded, on the host: ``tokens`` and the visited nodes (``path``), M for each row.

    ``drafted`` is how deep the tree was: 0 where nothing was drafted. ``log_probs`` (B, N) are claims of the nodes
    verified, and ``sources`` (B, N) says whose they are.
    """

    n_accepted: list[int]
    tokens: list[list[int]]
    path: list[list[int]]
    drafted: int
    log_probs: npt.NDArray[np.float32]
    sources: npt.NDArray[np.int64]

    @classmethod
    def on_host(cls, accepted: Accepted, logits: Tensor, tree: DraftTree, state: "GenerationState") -> "Step":
        """All of it in one transfer; ValueError where the logit (B, N, V) of a token drawn is NaN."""
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        invalid = logits[rows, accepted.path, accepted.tokens].isnan()
        parts = [accepted.tokens, accepted.path, invalid, accepted.n_accepted[:, None], tree.sources, tree.log_probs]
        if logits.device.type == "cpu":
            tokens, path, nan, n_accepted, sources, log_probs = (part.numpy() for part in parts)
        else:
            parts[-1] = tree.log_probs.view(torch.int32)  # their bits, for tokens are integers
            ends = np.cumsum([part.shape[1] for part in parts])[:-1]
            moved = np.split(torch.cat(parts, dim=1).cpu().numpy(), ends, axis=1)
            tokens, path, nan, n_accepted, sources, bits = moved
            log_probs = bits.astype(np.int32).view(np.float32)
        if any(map(any, nan.tolist())):
            row, place = np.argwhere(nan)[0]
            index = state.rows[row]
            raise ValueError(
                f"the verifier's logits are NaN in row {index}, at token {len(state.generated[index]) + place} of the "
                "reply (counted from 0): expected numbers; look for overflow in half precision, or for damaged weights"
            )
        return cls(
            n_accepted=n_accepted[:, 0].tolist(),
            tokens=tokens.tolist(),
            path=path.tolist(),
            drafted=tree.max_depth,
            log_probs=log_probs,
            sources=sources,
        )


@dataclass(frozen=True)
class DecodeStats(Walk):
    """What a generation took: steps after prefill, and the tokens emitted in them, summed over the rows.

    ``drafts`` has an entry for each row: of every step, how many tokens deep the draft was and how many were emitted.
    ``sources`` tells of every token of each row's reply whose it was: `VERIFIER`, `DRAFTER` or `LOOKUP`.
    """

    drafts: Sequence[Sequence[tuple[int, int]]] = ()
    sources: Sequence[Sequence[int]] = ()


class GenerationState:
    """The replies of a batch as they grow; which rows have ended, and what became of each row's drafts.

    Args:
        prompts: (B, S), pads included.
        max_new_tokens: the most tokens of a reply.
        end_ids: tokens that end a reply; they belong to it.
        criteria: asked token by token; one that may know rows apart finds each in its place of a batch that repeats it.
    """

    def __init__(
        self,
        prompts: Tensor,
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
        criteria: Sequence[hf.StoppingCriteria] = (),
    ) -> None:
        batch, _ = prompts.shape
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.end_ids = frozenset(end_ids)
        self.criteria = tuple(criteria)
        self.generated: list[list[int]] = [[] for _ in range(batch)]
        self.drafts: list[list[tuple[int, int]]] = [[] for _ in range(batch)]  # as in `DecodeStats`
        self.sources: list[list[int]] = [[] for _ in range(batch)]  # as in `DecodeStats`
        self.rows = list(range(batch))  # those that have not ended; row i of the loop is row rows[i] of the batch
        self.stayed: list[int] | None = None  # which of the loop's rows the last step left, if it ended any
        self._texts = GrowingRows(prompts)

    @classmethod
    def from_hf(
        cls, prompts: Tensor, criteria: hf.StoppingCriteriaList | None, config: GenerationConfig
    ) -> "GenerationState":
        """Transformers' criteria: length and end token as this class has them, any other asked.

        Raises ValueError when nothing limits the reply's length.
        """
        end_ids = set(as_tuple(config.eos_token_id))
        max_length = config.max_length
        others: list[hf.StoppingCriteria] = []
        for criterion in criteria or ():
            if isinstance(criterion, hf.MaxLengthCriteria):
                max_length = criterion.max_length
            elif isinstance(criterion, hf.EosTokenCriteria):
                end_ids.update(criterion.eos_token_id.tolist())
            else:
                others.append(criterion)
        if max_length is None:
            raise ValueError("neither max_new_tokens nor max_length is given: expected a limit on the reply")
        return cls(prompts, max_length - prompts.shape[1], tuple(end_ids), others)

    @property
    def done(self) -> bool:
        return not self.rows

    @property
    def lengths(self) -> list[int]:
        """Tokens generated so far by each unfinished row."""
        return [len(self.generated[row]) for row in self.rows]

    @property
    def remaining(self) -> int:
        """The most tokens that any unfinished row may still emit."""
        return self.max_new_tokens - min(self.lengths)

    @property
    def stats(self) -> DecodeStats:
        steps, tokens = sum(map(len, self.drafts)), sum(map(len, self.generated))
        return DecodeStats(steps, tokens - len(self.generated), self.drafts, self.sources)

    def sequences(self, pad: int) -> Tensor:
        """Prompts and replies (B, S + the longest reply), shorter ones padded."""
        longest = max(map(len, self.generated))
        replies = [reply + [pad] * (longest - len(reply)) for reply in self.generated]
        return torch.cat([self.prompts, torch.tensor(replies, device=self.prompts.device)], dim=1)

    def prefix(self, index: int, drawn: Sequence[int] = ()) -> Tensor:
        """Prompt and reply (1, T) of the unfinished row ``index``, then ``drawn``: a view, to be read only."""
        row = self.rows[index]
        return self._texts.extended(row, self.generated[row], drawn)

    def vocabulary(self, index: int, drawn: Sequence[int] = ()) -> Tensor:
        """The same tokens (1, T), but each of the reply's only where it first occurs in the text."""
        row = self.rows[index]
        return self._vocabularies.extended(row, self.generated[row], drawn)

    @cached_property
    def _vocabularies(self) -> "GrowingRows":
        return GrowingRows(self.prompts, [set(prompt) for prompt in self.prompts.tolist()])

    def emit(self, step: Step) -> list[list[int]]:
        """Add each unfinished row's new tokens, up to an end token, the limit or a criterion.

        Returns what was added, for every row of the batch (nothing for those that had ended before).
        """
        emitted: list[list[int]] = [[] for _ in self.generated]
        stayed = []
        for index, row in enumerate(self.rows):
            reply, before = self.generated[row], len(self.generated[row])
            for token in step.tokens[index][: step.n_accepted[index] + 1]:
                reply.append(token)
                if token in self.end_ids or len(reply) == self.max_new_tokens or self._asked_to_stop(index):
                    break
            else:
                stayed.append(index)
            emitted[row] = reply[before:]
            accepted = step.path[index][1 : step.n_accepted[index] + 1]
            whose = [*step.sources[index, accepted].tolist(), VERIFIER]
            self.sources[row] += whose[: len(emitted[row])]
            if before:
                self.drafts[row].append((step.drafted, min(step.n_accepted[index], len(emitted[row]))))
        self.stayed = stayed if len(stayed) < len(self.rows) else None
        self.rows = [self.rows[index] for index in stayed]
        return emitted

    def _asked_to_stop(self, index: int) -> bool:
        if not self.criteria:
            return False
        prefix, batch = self.prefix(index), len(self.generated)
        for criterion in self.criteria:
            if batch == 1 or type(criterion) in ROW_BY_ROW:
                asked, row = prefix, 0
            else:  # it may ask which row it is given: it finds this one at its place
                asked, row = prefix.repeat(batch, 1), self.rows[index]
            answers = torch.as_tensor(criterion(asked, None)).flatten()  # one for each row, or one for all
            if answers[row] if len(answers) > 1 else answers.any():
                return True
        return False


class GrowingRows:
    """Rows that begin with prompts (B, S) and grow in place, so that asking again costs what is new.

    ``seen`` are the tokens of each row that are not to be added again; None adds all.
    """

    def __init__(self, prompts: Tensor, seen: list[set[int]] | None = None) -> None:
        batch, length = prompts.shape
        self._ids, self._seen = prompts, seen
        self._lengths, self._taken = [length] * batch, [0] * batch  # columns; tokens of the reply that were looked at

    def extended(self, row: int, reply: Sequence[int], drawn: Sequence[int]) -> Tensor:
        """The row (1, T) with what its reply has got since the last time, and for this once with ``drawn``: a view."""
        new, self._taken[row] = reply[self._taken[row] :], len(reply)
        if self._seen is not None:
            new = [token for token in dict.fromkeys(new) if token not in self._seen[row]]
            self._seen[row].update(new)
        start = self._lengths[row]
        self._lengths[row] += len(new)
        end = self._lengths[row] + len(drawn)
        if end > self._ids.shape[1]:
            self._ids = nn.functional.pad(self._ids, (0, end))
        if end > start:
            self._ids[row, start:end] = torch.tensor([*new, *drawn]).to(self._ids.device, non_blocking=True)
        return self._ids[row, None, :end]


def as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids as transformers gives them: none, one or several."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def bind_stop_strings(options: dict[str, Any]) -> None:
    """Put a criterion in the place of ``generate``'s ``stop_strings`` and their ``tokenizer``.

    Raises ValueError for strings without a tokenizer.
    """
    tokenizer, stop_strings = options.pop("tokenizer", None), options.pop("stop_strings", None)
    config = options.get("generation_config")
    if config is not None and config.stop_strings is not None:
        stop_strings = stop_strings or config.stop_strings
        options["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if stop_strings is None:
        return
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: pass tokenizer=...")
    criteria = hf.StoppingCriteriaList(options.pop("stopping_criteria", None) or ())
    criteria.append(hf.StopStringCriteria(tokenizer, stop_strings))
    options["stopping_criteria"] = criteria
