"""A conversation whose text is read once: what one reply leaves in the cache, the next prompt begins with."""

from collections.abc import Sequence
from itertools import takewhile

from recurrent_drafter.decoding.generation_state import GenerationState
from recurrent_drafter.models.verifier import Pass, Verifier, VerifierSession


class DecodingSession:
    """One conversation, of one row, for `generate` and `stream`: each prompt is read from where it parts from the text
    before it, so a turn costs what is new in it.

    Replies are those of a fresh start, up to rounding: an edited turn or a rewritten history is read again from its
    first changed token, another model or changed weights from the beginning. A reply may be given up between steps, or
    end in an error; once the next prompt has begun, an unfinished reply cannot go on. Holds the keys and values of the
    longest text so far, as long as it lives.

    Attributes:
        reused: how many tokens of the newest prompt were not read again.
    """

    def __init__(self) -> None:
        self.reused = 0
        self._kept: VerifierSession | None = None
        self._state: GenerationState | None = None  # prompt and reply, of which the cache holds a beginning
        self._weights: object = None  # the version that has read it

    @property
    def tokens(self) -> list[int]:
        """The text that is kept: what was verified of prompt and reply, without the newest token of all."""
        if self._kept is None or self._state is None:
            return []
        text = [*self._state.prompts[0].tolist(), *self._state.generated[0]]
        return text[: self._kept.lengths[0]]  # which a step that was cut short may exceed

    def check(self, state: GenerationState) -> None:
        """Raise ValueError where this is not the reply that was begun last: its columns are another's by now."""
        if self._state is not state:
            raise ValueError("the session went on to another prompt: a reply that was not finished then cannot go on")

    def open(self, verifier: Verifier, state: GenerationState) -> tuple[VerifierSession, Pass]:
        """Read what is new in the prompt (1, S), at least its last token: drafts begin from its hidden state.

        Wherever this is interrupted, columns and tokens that are kept belong together.
        """
        prompt = state.prompts
        self.reused = shared_length(self.tokens, prompt[0, :-1].tolist()) if self._is_read_by(verifier) else 0
        if self._kept is not None and self.reused > 0:
            self._kept.crop(self.reused)
            self._state = state
            return self._kept, self._kept.read(prompt[:, self.reused :])
        self._kept, self._weights = None, verifier.weights_version  # memory first
        opened, read = verifier.open(prompt, None, prompt.shape[1] + state.max_new_tokens + 1)
        self._state, self._kept = state, opened
        return opened, read

    def _is_read_by(self, verifier: Verifier) -> bool:
        kept = self._kept
        return kept is not None and kept.verifier.is_of(verifier.model) and self._weights == verifier.weights_version


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike.

    >>> shared_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
