"""What users ask of a chat model, in six kinds: open questions, code, maths, service, and two that repeat their prompt.

Each prompt is what the model's own chat template makes of a conversation, up to where the reply begins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from recurrent_drafter.assets import sample_path
from recurrent_drafter.bench.columns import Record, Row, rows_of, run_record, trials_of
from recurrent_drafter.data.dialogues import DataError, Dialogue, Turn
from recurrent_drafter.data.questions import load_questions, spread
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.measure.arms import HF
from recurrent_drafter.measure.ruler import Trial

SAMPLES = sample_path("mt_bench.jsonl").parent
REWRITE = "Rewrite this function with type hints and a docstring.\n\n```python\n{}\n```"
AGREED = "List what was agreed in this conversation.\n\n{}"
SPEAKERS = {"user": "Customer", "assistant": "Agent", "system": "Note"}


def rewriting(dialogue: Dialogue) -> Dialogue:
    """The code of an answer, to be written again."""
    return Dialogue((Turn("user", REWRITE.format(dialogue.turns[-1].content.strip())),))


def listing(dialogue: Dialogue) -> Dialogue:
    """A whole conversation, to be summed up."""
    said = "\n".join(f"{SPEAKERS[turn.role]}: {turn.content}" for turn in dialogue.turns)
    return Dialogue((Turn("user", AGREED.format(said)),))


@dataclass(frozen=True)
class Kind:
    """A kind of task: how many there are of it, the pattern of its file's name, and what it makes of a dialogue."""

    count: int
    file: str
    ask: Callable[[Dialogue], Dialogue] = lambda dialogue: dialogue


QUESTIONS, CODE, MATHS, SERVICE, REWRITING, LISTING = "MT-Bench", "MBPP", "GSM8K", "SGD", "rewrite code", "list agreed"
KINDS = {
    QUESTIONS: Kind(20, "mt_bench*"),
    CODE: Kind(20, "mbpp*"),
    MATHS: Kind(20, "gsm8k*"),
    SERVICE: Kind(20, "sgd_dev*"),
    REWRITING: Kind(10, "mbpp*", rewriting),
    LISTING: Kind(10, "sgd_dev*", listing),
}
GROUPS = {**{name: (name,) for name in KINDS}, "code, maths": (CODE, MATHS), "copying": (REWRITING, LISTING)}


@dataclass(frozen=True)
class Task:
    """A prompt (S,) of a kind."""

    kind: str
    prompt: Tensor


def load_tasks(
    tokenizer: PreTrainedTokenizerBase, counts: Mapping[str, int], longest: int, folder: Path | None = None
) -> list[Task]:
    """So many tasks of each kind with prompts of at most ``longest`` tokens, kinds mixed evenly.

    Of a ``folder`` of whole sets only the conversations that training on them holds out are taken; by default these are
    the bundled samples. Raises DataError where a file is missing or holds too few.
    """
    placed = []
    for name, count in counts.items():
        dialogues = [KINDS[name].ask(dialogue) for dialogue in _dialogues(name, count, folder)]
        prompts = prompts_from_dialogues(dialogues, tokenizer, count=count, max_length=longest)
        placed += [((place + 0.5) / count, Task(name, prompt)) for place, prompt in enumerate(prompts)]
    return [task for _, task in sorted(placed, key=lambda one: one[0])]


def _dialogues(name: str, count: int, folder: Path | None) -> list[Dialogue]:
    """Enough dialogues for this kind."""
    path = _file(name, folder or SAMPLES)
    if name == QUESTIONS:
        return [Dialogue((Turn("user", question.turns[0]),)) for question in spread(load_questions(str(path)), count)]
    return list(load_dialogues(None, str(path), "all" if folder is None else "eval"))


def _file(name: str, folder: Path) -> Path:
    """The one file of the folder that has this kind's name."""
    pattern = KINDS[name].file
    found = sorted(path for path in folder.expanduser().glob(pattern) if path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder} has {names} for {name}: expected one file called {pattern}")
    return found[0]


def task_record(number: int, task: Task, trial: Trial, tokenizer: PreTrainedTokenizerBase) -> Record:
    """Everything about one task."""
    runs = [
        {**run_record(trial, arm, number), "drafts": run.drafts, "sources": run.sources}
        for arm, run in trial.runs.items()
    ]
    reply = tokenizer.decode(list(trial.runs[HF].ids[0]))
    return {"kind": "task", "task": task.kind, "prompt_tokens": len(task.prompt), "reply": reply, "runs": runs}


def said(task: Task, trial: Trial) -> Iterator[str]:
    """A line of speeds, and one for each reply that differs."""
    speeds = ", ".join(f"{arm} {run.rate:.1f}" for arm, run in trial.runs.items())
    yield f"{task.kind}, {len(task.prompt)} + {trial.runs[HF].count} tokens: {speeds} tokens/s"
    for arm, (verdict,) in trial.verdicts.items():
        if (found := verdict.divergence) is not None:
            yield f"{task.kind}: {arm} differs at token {found.position}: {found.verdict}"


def task_rows(lines: Sequence[Record]) -> list[Row]:
    """The arms of each kind of task, then of kinds together."""
    rows = []
    for name, kinds in GROUPS.items():
        runs = [run for line in lines if line["task"] in kinds for run in line["runs"]]
        if len({line["task"] for line in lines} & set(kinds)) == len(kinds):
            rows += rows_of(trials_of(runs), [{"kind": "task", "name": name}])
    return rows
