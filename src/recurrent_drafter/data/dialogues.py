"""What a conversation is, and how the records of six public schemas become one.

The schema is found from a record's keys:

    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}    sharegpt
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "..."}]}  openai
    {"instruction": "Add.", "input": "1, 2", "output": "3"}                                     alpaca
    {"turns": ["A question", "A second one"]}                                                   mtbench
    {"prompt": ["A question", "A second one"]}                                                  mtbench_hub
    {"text": "Mars is a red planet."}                                                           text

A record that breaks its schema is an error; a record that keeps to it and cannot be used (empty, no reply) is skipped
and counted.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model"), "assistant"),
}


class DataError(ValueError):
    """Data that cannot be used. The message says where, what was wrong, what was expected and what to do."""


class SkippedError(Exception):
    """A well-formed record that holds nothing to learn from; the message is the reason it is counted under."""


@dataclass(frozen=True)
class Turn:
    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """A conversation (``turns``) or a piece of plain text (``text``, and then no turns)."""

    turns: tuple[Turn, ...]
    text: str | None = None

    @property
    def has_reply(self) -> bool:
        return any(turn.role == "assistant" for turn in self.turns)

    def digest(self) -> bytes:
        """SHA-256 of the content alone: equal conversations have equal digests wherever they came from."""
        parts = [self.text] if self.text is not None else [part for t in self.turns for part in (t.role, t.content)]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class LoadReport:
    """What was read and what became of it.

    ``total`` records were read, those in ``skipped`` (reason -> count) were unusable, and ``kept`` were returned; the
    rest belongs to the other split or lies beyond the limit. ``sha256`` is of the returned dialogues, in their order.
    """

    total: int
    kept: int
    skipped: dict[str, int]
    schema: str
    source: str
    sha256: str

    def summary(self) -> str:
        """One line, such as "3,000 conversations, 31 skipped: 9 empty, 22 without assistant turn"."""
        line = f"{self.total:,} {'texts' if self.schema == 'text' else 'conversations'}"
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
            line += f", {sum(self.skipped.values()):,} skipped: {reasons}"
        return line


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {type(value).__name__}, expected a string")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{what} holds half of a surrogate pair, which is no character")
    return value


def _content(value: object, what: str) -> str:
    """Text of a message: a string, or OpenAI's list of parts when all of them are text."""
    if value is None:
        raise SkippedError("with a turn that is not text")
    if isinstance(value, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
            raise SkippedError("with a turn that is not text")
        return "".join(_text(part.get("text"), f"{what}, a part's `text`,") for part in value)
    return _text(value, what)


def _turns(messages: object, key: str) -> Dialogue:
    """ShareGPT's and OpenAI's list of messages; either spelling of the two keys is understood."""
    if not isinstance(messages, list):
        raise DataError(f"`{key}` is {type(messages).__name__}, expected a list of turns")
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise DataError(f"turn {number} of `{key}` is {type(message).__name__}, expected an object")
        role_key = "from" if "from" in message else "role"
        content_key = "value" if "value" in message else "content"
        for name, other in ((role_key, "from"), (content_key, "value")):
            if name not in message:
                raise DataError(f"turn {number} of `{key}` has no `{other}` (or `{name}`)")
        name = _text(message[role_key], f"`{role_key}` of turn {number}")
        if (role := _ROLES.get(name.strip().lower())) is None:
            raise SkippedError("with an unknown role")
        content = _content(message[content_key], f"`{content_key}` of turn {number}")
        if role != "system" or content.strip():  # an empty system prompt says the same as none
            turns.append(Turn(role, content))
    if not any(turn.content.strip() for turn in turns):
        raise SkippedError("empty")
    if not all(turn.content.strip() for turn in turns):
        raise SkippedError("with an empty turn")
    return _replied(Dialogue(tuple(turns)))


def _replied(dialogue: Dialogue) -> Dialogue:
    if not dialogue.has_reply:
        raise SkippedError("without assistant turn")
    return dialogue


def _alpaca(record: Mapping[str, Any]) -> Dialogue:
    if "output" not in record:
        raise DataError("the record has no `output` beside `instruction`")
    instruction = _text(record["instruction"], "`instruction`").strip()
    extra = _text(record.get("input") or "", "`input`").strip()
    output = _text(record["output"], "`output`")
    question = "\n\n".join(part for part in (instruction, extra) if part)
    if not question:
        raise SkippedError("empty")
    if not output.strip():
        raise SkippedError("without assistant turn")
    return Dialogue((Turn("user", question), Turn("assistant", output)))


def _questions(questions: object, key: str) -> Dialogue:
    if not isinstance(questions, list):
        raise DataError(f"`{key}` is {type(questions).__name__}, expected a list of questions")
    turns = tuple(Turn("user", _text(q, f"question {n} of `{key}`")) for n, q in enumerate(questions, start=1))
    if not turns or not all(turn.content.strip() for turn in turns):
        raise SkippedError("empty")
    return Dialogue(turns)


def _plain(record: Mapping[str, Any]) -> Dialogue:
    text = _text(record["text"], "`text`")
    if not text.strip():
        raise SkippedError("empty")
    return Dialogue((), text)


_PARSERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Dialogue]]] = {
    "sharegpt": ("conversations", lambda record: _turns(record["conversations"], "conversations")),
    "openai": ("messages", lambda record: _turns(record["messages"], "messages")),
    "alpaca": ("instruction", _alpaca),
    "mtbench": ("turns", lambda record: _questions(record["turns"], "turns")),
    "mtbench_hub": ("prompt", lambda record: _questions(record["prompt"], "prompt")),
    "text": ("text", _plain),
}


def find_schema(record: object) -> str:
    """Name of the schema whose key the record has; DataError names the keys that were looked for."""
    known = ", ".join(f"`{key}`" for key, _ in _PARSERS.values())
    if not isinstance(record, Mapping):
        raise DataError(f"the record is {type(record).__name__}, expected an object with one of the keys {known}")
    for schema, (key, _) in _PARSERS.items():
        if key in record:
            return schema
    keys = ", ".join(f"`{key}`" for key in record) or "none"
    raise DataError(f"unknown schema: the record's keys are {keys}; expected one of {known}")


def parse_record(record: object, schema: str) -> Dialogue:
    """Turn a record into a dialogue; DataError if it breaks the schema, SkippedError if it holds nothing usable."""
    key, parse = _PARSERS[schema]
    if not isinstance(record, Mapping):
        raise DataError(f"the record is {type(record).__name__}, expected an object with `{key}`")
    if key not in record:
        keys = ", ".join(f"`{k}`" for k in record) or "none"
        raise DataError(f"no `{key}` in the record (its keys: {keys}), although the first record has it")
    return parse(record)
