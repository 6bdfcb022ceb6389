"""Questions of several turns in categories, as MT-Bench asks them: FastChat's file format.

    {"question_id": 81, "category": "writing", "turns": ["Compose a blog post.", "Rewrite it."]}

Replies are not among them: the second question of a conversation is asked once the first has been answered.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recurrent_drafter.assets import sample_path
from recurrent_drafter.data.dialogues import DataError, SkippedError, find_schema, parse_record
from recurrent_drafter.data.parsing import read_records


@dataclass(frozen=True)
class Question:
    """What a user asks, turn by turn. ``number`` is its place in the file, from 0."""

    number: int
    name: str
    category: str
    turns: tuple[str, ...]


def load_questions(path: str | None = None) -> list[Question]:
    """The questions of a file, by default MT-Bench's 80, which are bundled.

    Raises DataError, with the line, for a record that is not a question or repeats the name of another one: an
    evaluation leaves nothing out without saying so.
    """
    file = sample_path("mt_bench.jsonl") if path is None else Path(path).expanduser()
    questions: dict[str, Question] = {}
    for place, record in read_records(file):
        try:
            question = _parse(record, len(questions))
            if question.name in questions:
                raise DataError(f"question {question.name} is here for the second time")
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        questions[question.name] = question
    if not questions:
        raise DataError(f"{file} holds no questions")
    return list(questions.values())


def _parse(record: object, number: int) -> Question:
    schema = find_schema(record)
    if schema not in ("mtbench", "mtbench_hub") or not isinstance(record, dict):
        raise DataError(
            f'a {schema} record, expected a question: {{"question_id": 1, "category": "writing", "turns": ["..."]}}'
        )
    try:
        dialogue = parse_record(record, schema)
    except SkippedError:
        raise DataError("a question is empty") from None
    name = record.get("question_id", record.get("prompt_id", number + 1))
    category = record.get("category") or "other"
    return Question(number, str(name), str(category), tuple(turn.content for turn in dialogue.turns))


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """At most ``count`` questions, as evenly over the categories as that goes, in their order.

    >>> asked = [Question(n, str(n), category, ("?",)) for n, category in enumerate("aaabbb")]
    >>> [question.name for question in spread(asked, 3)]
    ['0', '1', '3']
    """
    categories: dict[str, list[Question]] = {}
    for question in questions:
        categories.setdefault(question.category, []).append(question)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*categories.values()))
    chosen = [question for question in rounds if question is not None][:count]
    return sorted(chosen, key=lambda question: question.number)
