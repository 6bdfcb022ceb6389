"""Questions of several turns, answered by one or several ways of decoding in one process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.core.metrics import Acceptance
from recurrent_drafter.data.dialogues import Turn
from recurrent_drafter.data.prompts import encode_prompt
from recurrent_drafter.data.questions import Question
from recurrent_drafter.data.templates import RefusedError
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.comparison import Batch, emitted, now
from recurrent_drafter.measure.divergence import Draw, first_divergence, processors_of
from recurrent_drafter.measure.replies import left_padded

SPECULATIVE, AUTOREGRESSIVE = "speculative", "autoregressive"  # the arms
IDENTICAL, TIE, BUG = "identical", "tie", "bug"  # outcomes
OTHER_PROMPT = "other prompt"  # outcome where an earlier reply already differed
WARM_UP_TOKENS = 32
TURNS_AT_MOST = 256


@dataclass(frozen=True)
class Answer:
    """One reply: its ids, through the end token, and the steps that it took after prefill.

    ``outcome`` compares it with the reference arm's; the reference has none.
    """

    question: str
    turn: int
    category: str
    prompt_tokens: int
    ids: list[int]
    text: str
    steps: int
    acceptance: Acceptance
    outcome: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Which prompt it answers, the same in every arm."""
        return self.question, self.turn


@dataclass(frozen=True)
class AnsweredBatch:
    """Replies that were generated together, and the seconds that it took, prefill included."""

    seconds: float
    answers: list[Answer]

    @property
    def tokens(self) -> int:
        """Ids emitted."""
        return sum(len(answer.ids) for answer in self.answers)


@dataclass(frozen=True)
class Skipped:
    """A prompt that was not answered, and why."""

    question: str
    turn: int
    reason: str


@dataclass(frozen=True)
class Round:
    """One turn of a batch of questions: every arm's answers, what had to be skipped, what differs beyond ties."""

    answered: dict[str, AnsweredBatch]
    skipped: list[Skipped] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asking:
    """How every arm is asked: the arguments of ``generate``, the seed, tokens of a prompt at most."""

    arguments: dict[str, Any]
    seed: int
    end_ids: tuple[int, ...]
    batch_size: int
    longest: int | None


@dataclass
class _Conversation:
    """A question, and what each arm has said to it so far."""

    question: Question
    histories: dict[str, list[Turn]]
    is_over: bool = False


class Interview:
    """Asks questions of every arm. The first arm is the one that the others' answers are compared with.

    A question's later turns come behind the arm's *own* earlier replies. The arms take turns at going first; what they
    need for the first time (costs, buffers) is done in front, untimed. A prompt that does not fit, or that the chat
    template refuses, is skipped for all arms, and so are the turns behind it.
    """

    def __init__(
        self, arms: dict[str, RecurrentDraftingSpeculator], tokenizer: PreTrainedTokenizerBase, asking: Asking
    ) -> None:
        self.arms, self.tokenizer, self.asking = arms, tokenizer, asking
        self.verifier = next(iter(arms.values())).verifier
        self._rounds = 0

    def ask(self, questions: Sequence[Question]) -> Iterator[Round]:
        """Yield a round for every turn of every batch."""
        for start in range(0, len(questions), self.asking.batch_size):
            conversations = [
                _Conversation(question, {name: [] for name in self.arms})
                for question in questions[start : start + self.asking.batch_size]
            ]
            for turn in range(max(len(conversation.question.turns) for conversation in conversations)):
                yield self._round([c for c in conversations if turn < len(c.question.turns)], turn)

    def _round(self, conversations: Sequence[_Conversation], turn: int) -> Round:
        skipped, asked, prompts = [], [], []
        for conversation in conversations:
            reason, encoded = self._prompts(conversation, turn)
            if reason:
                conversation.is_over = True
                skipped.append(Skipped(conversation.question.name, turn + 1, reason))
            else:
                asked.append(conversation)
                prompts.append(encoded)
        if not asked:
            return Round({}, skipped)
        row_ids = [conversation.question.number * TURNS_AT_MOST + turn for conversation in asked]
        batches = {
            name: Batch(*left_padded([encoded[name] for encoded in prompts], self.verifier.device))
            for name in self.arms
        }
        if self._rounds == 0:
            for name, batch in batches.items():
                self._generate(name, batch, row_ids, WARM_UP_TOKENS)
        names = list(self.arms)
        first = self._rounds % len(names)
        self._rounds += 1
        generated = {name: self._generate(name, batches[name], row_ids) for name in names[first:] + names[:first]}
        return self._answered(asked, turn, generated, skipped)

    def _prompts(self, conversation: _Conversation, turn: int) -> tuple[str, dict[str, Tensor]]:
        """Why the question cannot be asked, or nothing; and each arm's prompt (S,)."""
        if conversation.is_over:
            return "an earlier turn was skipped", {}
        question = Turn("user", conversation.question.turns[turn])
        try:
            encoded = {
                name: encode_prompt([*history, question], self.tokenizer)
                for name, history in conversation.histories.items()
            }
        except RefusedError as error:
            return str(error), {}
        length, longest = max(map(len, encoded.values())), self.asking.longest
        if longest is not None and length > longest:
            return f"{length} tokens, {longest} at most", {}
        return "", encoded

    def _generate(self, name: str, batch: Batch, row_ids: list[int], most: int | None = None) -> "_Generated":
        arguments = self.asking.arguments
        if most is not None:
            arguments = {**arguments, "max_new_tokens": min(most, arguments["max_new_tokens"])}
        speculator, device = self.arms[name], batch.input_ids.device
        begun = now(device)
        output = speculator.generate(
            batch.input_ids, batch.attention_mask, seed=self.asking.seed, row_ids=row_ids, **arguments
        )
        seconds = now(device) - begun
        assert isinstance(output, Tensor)
        ids = emitted(output[:, batch.input_ids.shape[1] :], self.asking.end_ids)
        return _Generated(batch, row_ids, seconds, ids, speculator.stats.drafts)

    def _answered(
        self, asked: Sequence[_Conversation], turn: int, generated: dict[str, "_Generated"], skipped: list[Skipped]
    ) -> Round:
        """Compare the replies, and carry them into the conversations."""
        answered, bugs = {}, []
        for name in self.arms:
            own, answers = generated[name], []
            for row, conversation in enumerate(asked):
                outcome, difference = self._compare(generated, name, row)
                answers.append(self._answer(conversation.question, turn, own, row, outcome))
                if outcome == BUG:
                    bugs.append(f"{name}, question {conversation.question.name}, turn {turn + 1}: {difference}")
                said = (Turn("user", conversation.question.turns[turn]), Turn("assistant", answers[-1].text))
                conversation.histories[name] += said
            answered[name] = AnsweredBatch(own.seconds, answers)
        return Round(answered, skipped, bugs)

    def _answer(self, question: Question, turn: int, own: "_Generated", row: int, outcome: str) -> Answer:
        drafts = own.drafts[row]
        return Answer(
            question=question.name,
            turn=turn + 1,
            category=question.category,
            prompt_tokens=len(own.batch.prompt(row)),
            ids=own.ids[row],
            text=str(self.tokenizer.decode(own.ids[row], skip_special_tokens=True)),
            steps=len(drafts),
            acceptance=Acceptance.of(drafts),
            outcome=outcome,
        )

    def _compare(self, generated: dict[str, "_Generated"], name: str, row: int) -> tuple[str, str]:
        """The outcome for a row of an arm, and in words what differs; nothing for the reference arm."""
        reference = next(iter(self.arms))
        if name == reference:
            return "", ""
        own, other, asking = generated[name], generated[reference], self.asking
        batch, prompt = own.batch, own.batch.prompt(row)
        if not prompt.equal(other.batch.prompt(row)):
            return OTHER_PROMPT, ""
        if own.ids[row] == other.ids[row]:
            return IDENTICAL, ""
        processors = processors_of(self.verifier, batch.input_ids, batch.attention_mask, asking.arguments)
        seed = asking.seed if asking.arguments["do_sample"] else None
        draw = Draw(batch.input_ids[row], processors, seed, own.row_ids[row])
        difference = first_divergence(self.verifier, prompt, other.ids[row], own.ids[row], draw)
        assert difference is not None
        return (TIE if difference.is_tie else BUG), f"token {difference.position}, {difference.verdict}"


@dataclass(frozen=True)
class _Generated:
    """What an arm made of a batch: seconds, and for each row ids through the end token and the drafts of its steps."""

    batch: Batch
    row_ids: list[int]
    seconds: float
    ids: list[list[int]]
    drafts: Sequence[Sequence[tuple[int, int]]]
