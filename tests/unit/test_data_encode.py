"""Span masks, token by token: with generation marks, without them, with Vicuna's layout, cut, and refused."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recurrent_drafter.assets import demo_verifier_path, sample_path
from recurrent_drafter.data.dialogues import DataError, Dialogue, Turn
from recurrent_drafter.data.encoding import EncodedDialogues, EncodeReport, TrainExample
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import VICUNA_TEMPLATE, chat_template_of, encode_prompt, prompts_from_dialogues

SYSTEM, HI, HELLO = Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello!")
BYE, GOODBYE = Turn("user", "Bye"), Turn("assistant", "Goodbye.")
CHAT = Dialogue((SYSTEM, HI, HELLO, BYE, GOODBYE))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_verifier_path())  # type: ignore[no-any-return]


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerBase:
    """The demo tokenizer without its template."""
    loaded = AutoTokenizer.from_pretrained(demo_verifier_path())
    loaded.chat_template = None
    return loaded  # type: ignore[no-any-return]


def encoded(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, **settings: Any
) -> tuple[tuple[TrainExample, ...], EncodeReport]:
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    found = EncodedDialogues(dialogues, tokenizer, **settings)
    return tuple(found), found.report


def spans_of(
    dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, template: str | None = None, **options: Any
) -> list[str]:
    """The encoded conversation as runs of one span id: ``["-1:<|user|>Hi<|end|><|assistant|>", "0:Hello!<|end|>"]``."""
    settings: dict[str, Any] = {"max_length": 512, "assistant_only": True, **options}
    (example,), _ = encoded([dialogue], tokenizer, chat_template=template, **settings)
    assert example.input_ids.dtype == example.span_ids.dtype == torch.int64
    runs: list[tuple[int, list[int]]] = []
    for token, span in zip(example.input_ids.tolist(), example.span_ids.tolist(), strict=True):
        if not runs or runs[-1][0] != span:
            runs.append((span, []))
        runs[-1][1].append(token)
    return [f"{span}:{tokenizer.decode(tokens)}" for span, tokens in runs]


DEMO_SPANS = [
    "-1:<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>",
    "0:Hello!<|end|>",
    "-1:<|user|>Bye<|end|><|assistant|>",
    "1:Goodbye.<|end|>",
]


def without_marks(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def test_marks_of_the_demo_template(tokenizer: PreTrainedTokenizerBase) -> None:
    assert spans_of(CHAT, tokenizer) == DEMO_SPANS


def test_the_same_template_without_marks_gives_the_same_spans(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = without_marks(chat_template_of(tokenizer))
    assert "generation %" not in plain and spans_of(CHAT, tokenizer, plain) == DEMO_SPANS
    dialogues = load_dialogues("demo", None, "eval").dialogues
    marked, report = encoded(dialogues, tokenizer, max_length=512, assistant_only=True)
    found, same = encoded(dialogues, tokenizer, max_length=512, assistant_only=True, chat_template=plain)
    assert report == same and len(marked) == 300
    for a, b in zip(marked, found, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.span_ids, b.span_ids)


def test_spans_against_a_reading_of_the_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """In the demo layout a span is whatever stands between <|assistant|> and the next <|end|>, that one included."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|assistant|>", "<|end|>")}
    examples, _ = encoded(
        load_dialogues("demo", None, "eval").dialogues, tokenizer, max_length=512, assistant_only=True
    )
    for example in examples:
        span, inside, expected = -1, False, []
        for token in example.input_ids.tolist():
            expected.append(span if inside else -1)
            if token == ids["<|end|>"]:
                inside = False
            elif token == ids["<|assistant|>"]:
                inside, span = True, span + 1
        assert example.span_ids.tolist() == expected


def test_vicuna_layout_for_a_tokenizer_without_template(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    expected = ["-1:Be brief. USER: Hi ASSISTANT:", "0: Hello!<|end|>", "-1:USER: Bye ASSISTANT:", "1: Goodbye.<|end|>"]
    assert chat_template_of(bare_tokenizer) == VICUNA_TEMPLATE
    assert spans_of(CHAT, bare_tokenizer) == expected
    assert spans_of(CHAT, bare_tokenizer, without_marks(VICUNA_TEMPLATE)) == expected
    bare_tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a chat template nor an end token"):
        chat_template_of(bare_tokenizer)


TURN = "{{ '<|' + m['role'] + '|>\n' + m['content'] | trim }}"
LINES = "{% for m in messages %}" + TURN + "{{ '<|end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"


def marked(body: str, after: str = "") -> str:
    """The line-wise layout with ``body`` under generation marks and ``after`` after them."""
    return (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% generation %}{{ " + body + " }}"
        "{% endgeneration %}" + after + "{% endfor %}" + PROMPT
    )


@pytest.mark.parametrize(
    "template",
    [
        LINES + PROMPT,
        # marks around too much, too little, exactly enough; the user's turn is marked with them for brevity
        marked("m['content'] + '<|end|>\n'"),
        marked("m['content']", "{{ '<|end|>\n' }}"),
        marked("m['content'] + '<|end|>'", "{{ '\n' }}"),
    ],
)
def test_the_span_ends_with_the_end_token_wherever_the_marks_end(
    template: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    runs = spans_of(Dialogue((HI, HELLO)), tokenizer, template)
    assert runs[-2:] == [f"{0 if template.startswith(LINES) else 1}:Hello!<|end|>", "-1:\n"]


def test_a_space_between_reply_and_end_token_is_generated_too(tokenizer: PreTrainedTokenizerBase) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    assert spans_of(Dialogue((HI, HELLO, BYE, GOODBYE)), tokenizer, template) == [
        "-1:[INST] Hi [/INST]",
        "0: Hello! <|end|>",
        "-1:[INST] Bye [/INST]",
        "1: Goodbye. <|end|>",
    ]


def test_a_template_without_end_token_ends_the_span_with_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    runs = spans_of(Dialogue((HI, HELLO)), tokenizer, template + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert runs == ["-1:user: Hi\nassistant:", "0: Hello!", "-1:\n"]


def test_multibyte_replies_are_covered_to_the_last_byte(tokenizer: PreTrainedTokenizerBase) -> None:
    dialogue = Dialogue((Turn("user", "héé 🚀"), Turn("assistant", "🚀 naïve 日本"), BYE, GOODBYE))
    for template in (None, without_marks(chat_template_of(tokenizer))):
        assert spans_of(dialogue, tokenizer, template)[1] == "0:🚀 naïve 日本<|end|>"


def test_equal_replies_and_replies_inside_prompts_are_told_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "a"), Turn("user", "a"), Turn("assistant", "a"))
    runs = spans_of(Dialogue(turns), tokenizer, without_marks(chat_template_of(tokenizer)))
    assert runs == ["-1:<|user|>a<|end|><|assistant|>", "0:a<|end|>", "-1:<|user|>a<|end|><|assistant|>", "1:a<|end|>"]


def test_a_cut_conversation_keeps_its_beginning(tokenizer: PreTrainedTokenizerBase) -> None:
    (whole,), _ = encoded([CHAT], tokenizer, max_length=512, assistant_only=True)
    first = int((whole.span_ids == 0).nonzero()[0])
    for length in range(2, len(whole.input_ids) + 1):
        if length <= first:
            with pytest.raises(DataError, match="1 left out without a reply in that length"):
                encoded([CHAT], tokenizer, max_length=length, assistant_only=True)
            continue
        (cut,), report = encoded([CHAT], tokenizer, max_length=length, assistant_only=True)
        assert torch.equal(cut.input_ids, whole.input_ids[:length])
        assert torch.equal(cut.span_ids, whole.span_ids[:length])
        assert report.truncated == (length < len(whole.input_ids))
        assert (report.tokens, report.trained_tokens) == (length, int((cut.span_ids >= 0).sum()))


def test_without_assistant_only_the_whole_conversation_is_one_span(bare_tokenizer: PreTrainedTokenizerBase) -> None:
    (run,) = spans_of(CHAT, bare_tokenizer, assistant_only=False)
    assert run.startswith("0:Be brief. USER: Hi")
    template = "{{ bos_token }}" + VICUNA_TEMPLATE  # nobody generates the beginning token
    assert spans_of(CHAT, bare_tokenizer, template, assistant_only=False)[0] == "-1:<|endoftext|>"


def test_plain_text_is_divided_and_never_half_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Mars is a red planet. " * 100
    ids = tokenizer(text)["input_ids"]
    examples, report = encoded([Dialogue((), text)], tokenizer, max_length=64, assistant_only=False)
    assert torch.cat([example.input_ids for example in examples]).tolist() == ids
    assert all(not example.span_ids.any() for example in examples)
    assert (report.examples, report.tokens, report.truncated) == (-(-len(ids) // 64), len(ids), 0)
    with pytest.raises(DataError, match="plain text: leave out --train_on_assistant_only"):
        encoded([Dialogue((), text)], tokenizer, max_length=64, assistant_only=True)


def test_conversations_without_reply_and_refused_ones_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + LINES + PROMPT
    dialogues = [Dialogue((HI, HELLO)), Dialogue((HI,)), CHAT, Dialogue((HELLO, HI, HELLO))]
    examples, report = encoded(dialogues, tokenizer, max_length=512, assistant_only=True, chat_template=strict)
    assert (len(examples), report.without_reply, report.refused, report.dialogues) == (1, 1, 2, 4)
    assert report.summary().endswith("1 left out without assistant turn; 2 refused by the chat template")
    with pytest.raises(DataError, match="user first"):
        encoded([CHAT], tokenizer, max_length=512, assistant_only=True, chat_template=strict)
    with pytest.raises(DataError, match="nothing to train on in 1 dialogues"):
        encoded([Dialogue((HI,))], tokenizer, max_length=512, assistant_only=True)
    with pytest.raises(DataError, match="maximal length of 1"):
        encoded([CHAT], tokenizer, max_length=1, assistant_only=True)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (  # marks around nothing
            LINES + "{% generation %}{% endgeneration %}",
            "generation marks cover no reply",
        ),
        (  # marks that a condition never reaches
            LINES + "{% if false %}{% generation %}x{% endgeneration %}{% endif %}",
            "generation marks cover no reply",
        ),
        (  # marks inside a macro, which transformers places too early
            "{% macro reply(m) %}{{ 'The assistant says: ' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
            "{% endmacro %}{% for m in messages if m['role'] == 'assistant' %}{{ reply(m) }}{% endfor %}",
            "generation marks miss the reply in turn 3",
        ),
        (  # no marks, and a layout that changes as the conversation grows
            "{{ messages | length }}" + LINES + PROMPT,
            "turn 3 cannot be placed exactly",
        ),
        (  # no marks, and a reply that is rewritten
            LINES.replace("| trim", "| upper") + PROMPT,
            "turn 3 cannot be placed exactly",
        ),
    ],
)
def test_a_reply_that_cannot_be_placed_exactly_is_an_error(
    template: str, complaint: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=complaint):
        encoded([CHAT], tokenizer, max_length=512, assistant_only=True, chat_template=template)


def test_a_slow_tokenizer_is_refused(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
    with pytest.raises(DataError, match="slow tokenizer"):
        encoded([CHAT], tokenizer, max_length=512, assistant_only=True)


def test_prompts_end_where_a_reply_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    dialogues = load_dialogues("demo", None, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=100, max_length=256)
    again = prompts_from_dialogues(dialogues, tokenizer, count=100, max_length=256)
    other = prompts_from_dialogues(dialogues, tokenizer, count=100, max_length=256, seed=1)
    texts = [str(tokenizer.decode(prompt)) for prompt in prompts]
    assert len(set(texts)) == 100 and texts != [tokenizer.decode(prompt) for prompt in other]
    assert all(
        torch.equal(a, b) and a.dtype == torch.int64 and len(a) <= 256 for a, b in zip(prompts, again, strict=True)
    )
    assert all(text.endswith("<|end|><|assistant|>") for text in texts)
    replies = [text.count("<|assistant|>") for text in texts]
    assert min(replies) == 1 and max(replies) >= 4  # early and middle turns


def test_prompts_of_questions_texts_and_too_few(tokenizer: PreTrainedTokenizerBase) -> None:
    questions = load_dialogues(None, str(sample_path("mt_bench.jsonl")), "all").dialogues
    (prompt,) = prompts_from_dialogues(questions[:1], tokenizer, count=1, max_length=512)
    assert prompt.tolist() == encode_prompt(questions[0].turns[:1], tokenizer).tolist()
    (half,) = prompts_from_dialogues([Dialogue((), "Mars is red. " * 8)], tokenizer, count=1, max_length=512)
    assert half.tolist() == tokenizer("Mars is red. " * 8)["input_ids"][: len(half)]
    twice: Sequence[Dialogue] = [CHAT, CHAT]
    with pytest.raises(DataError, match="2 prompts of at most 512 tokens were asked of 2 dialogues, which give 1"):
        prompts_from_dialogues(twice, tokenizer, count=2, max_length=512)
    with pytest.raises(DataError, match="which give 0"):
        prompts_from_dialogues([CHAT], tokenizer, count=1, max_length=3)
