"""Questions of several turns, answered by one or several ways of decoding in one process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.core.metrics import Acceptance, tokens_by_source
from recurrent_drafter.data.dialogues import Turn
from recurrent_drafter.data.questions import Question
from recurrent_drafter.data.templates import RefusedError, encode_prompt
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import Batch, Decoding, explaining, our_arm
from recurrent_drafter.measure.replies import left_padded
from recurrent_drafter.measure.ruler import OTHER_PROMPT, Arm, Run, Trial, Verdict, interleave, judge

SPECULATIVE, AUTOREGRESSIVE = "speculative", "autoregressive"  # the arms
TURNS_AT_MOST = 256


@dataclass(frozen=True)
class Answer:
    """One reply: its ids, through the end token, and the steps that it took after prefill.

    ``outcome`` compares it with the reference arm's, which has none itself; ``difference`` says where they part.
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
    margin: float | None = None
    difference: str = ""
    sources: dict[str, int] = field(default_factory=dict)  # `tokens_by_source`; nothing in older files


@dataclass(frozen=True)
class Skipped:
    """A prompt that was not answered, and why."""

    question: str
    turn: int
    reason: str


@dataclass
class _Conversation:
    """A question, and what each arm has said to it so far."""

    question: Question
    histories: dict[str, list[Turn]]
    is_over: bool = False


@dataclass(frozen=True)
class _Asked:
    """A turn of several conversations, and each arm's prompts: the turn after the arm's own earlier replies."""

    conversations: list[_Conversation]
    turn: int
    batches: dict[str, Batch]


class Interview:
    """Asks questions of every arm. The first arm is the one that the others' answers are compared with.

    A question's later turns come after the arm's *own* earlier replies. A prompt of more than ``longest`` tokens, or
    one that the chat template refuses, is skipped for all arms, and so are the turns after it.
    """

    def __init__(
        self,
        arms: dict[str, RecurrentDraftingSpeculator],
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        batch_size: int,
        longest: int | None,
    ) -> None:
        self.tokenizer, self.decoding, self.batch_size, self.longest = tokenizer, decoding, batch_size, longest
        self.arms = [self._arm(name, speculator) for name, speculator in arms.items()]
        self.verifier = next(iter(arms.values())).verifier
        self.skipped: list[Skipped] = []

    def _arm(self, name: str, speculator: RecurrentDraftingSpeculator) -> Arm:
        inner = our_arm(name, speculator, self.decoding)
        return Arm(name, lambda asked: inner.run(asked.batches[name]))

    def ask(self, questions: Sequence[Question]) -> Iterator[Trial]:
        """A trial for every turn of every batch that can be asked; a run's ``more`` are its answers."""
        yield from map(self._answered, interleave(self.arms, self._turns(questions)))

    def _turns(self, questions: Sequence[Question]) -> Iterator[_Asked]:
        for start in range(0, len(questions), self.batch_size):
            chosen = questions[start : start + self.batch_size]
            conversations = [_Conversation(one, {arm.name: [] for arm in self.arms}) for one in chosen]
            for turn in range(max(len(question.turns) for question in chosen)):
                asked, prompts = [], []
                for conversation in (c for c in conversations if turn < len(c.question.turns)):
                    try:
                        prompts.append(self._prompts(conversation, turn))
                        asked.append(conversation)
                    except RefusedError as error:
                        conversation.is_over = True
                        self.skipped.append(Skipped(conversation.question.name, turn + 1, str(error)))
                if asked:
                    row_ids = [conversation.question.number * TURNS_AT_MOST + turn for conversation in asked]
                    padded = {
                        arm.name: left_padded([own[arm.name] for own in prompts], self.verifier.device)
                        for arm in self.arms
                    }
                    yield _Asked(asked, turn, {name: Batch(*batch, row_ids) for name, batch in padded.items()})

    def _prompts(self, conversation: _Conversation, turn: int) -> dict[str, Tensor]:
        """Each arm's prompt (S,). Raises RefusedError, which says why, where the question cannot be asked."""
        if conversation.is_over:
            raise RefusedError("an earlier turn was skipped")
        said = Turn("user", conversation.question.turns[turn])
        histories = conversation.histories.items()
        encoded = {name: encode_prompt([*history, said], self.tokenizer) for name, history in histories}
        length = max(map(len, encoded.values()))
        if self.longest is not None and length > self.longest:
            raise RefusedError(f"{length} tokens, {self.longest} at most")
        return encoded

    def _answered(self, trial: Trial) -> Trial:
        """Compare the replies, and carry them into the conversations."""
        asked: _Asked = trial.batch
        reference, *_ = trial.runs
        runs = {}
        for name, run in trial.runs.items():
            verdicts = [Verdict("")] * len(run.ids) if name == reference else self._judge(trial, name, reference)
            answers = [self._answer(asked, name, run, row, verdict) for row, verdict in enumerate(verdicts)]
            runs[name] = replace(run, more=answers)
            for conversation, answer in zip(asked.conversations, answers, strict=True):
                said = Turn("user", conversation.question.turns[asked.turn]), Turn("assistant", answer.text)
                conversation.histories[name] += said
        return Trial(None, runs)

    def _judge(self, trial: Trial, name: str, reference: str) -> list[Verdict]:
        """An arm's replies against the reference's, where both were asked the same."""
        own, other = (trial.batch.batches[arm] for arm in (name, reference))
        explained = explaining(self.verifier, self.decoding)(own)
        alike = [own.prompt(row).equal(other.prompt(row)) for row in range(len(own.row_ids))]
        runs = trial.runs[name], trial.runs[reference]
        verdicts = judge(*runs, lambda row, *ids: explained(row, *ids) if alike[row] else None)
        return [found if same else Verdict(OTHER_PROMPT) for found, same in zip(verdicts, alike, strict=True)]

    def _answer(self, asked: _Asked, name: str, run: Run, row: int, verdict: Verdict) -> Answer:
        question, ids, found = asked.conversations[row].question, list(run.ids[row]), verdict.divergence
        return Answer(
            question=question.name,
            turn=asked.turn + 1,
            category=question.category,
            prompt_tokens=len(asked.batches[name].prompt(row)),
            ids=ids,
            text=str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            steps=len(run.drafts[row]),
            acceptance=Acceptance.of(run.drafts[row]),
            outcome=verdict.outcome,
            margin=verdict.margin,
            difference=f"token {found.position}, {found.verdict}" if found is not None else "",
            sources=tokens_by_source(run.sources[row : row + 1]),
        )
