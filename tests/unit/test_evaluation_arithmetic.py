"""Figures of an evaluation, checked by hand."""

import doctest
import io
import json

import pytest
from rich.console import Console

from recurrent_drafter.bench.evaluation import AUTOREGRESSIVE, SPECULATIVE, Answer, Skipped
from recurrent_drafter.bench.scores import Evaluation, join, read_evaluation
from recurrent_drafter.cli.figures import category_table
from recurrent_drafter.core import metrics
from recurrent_drafter.core.metrics import Acceptance
from recurrent_drafter.data import questions
from recurrent_drafter.data.dialogues import DataError
from recurrent_drafter.data.questions import Question, load_questions, spread
from recurrent_drafter.measure.ruler import Run, Trial


def answer(question, turn, ids, drafts, category="math", outcome=""):
    return Answer(question, turn, category, 5, ids, "text", len(drafts), Acceptance.of(drafts), outcome)


def run(seconds, answers):
    return Run([answer.ids for answer in answers], seconds, more=answers)


def speculative():
    first = [answer("a", 1, [1, 2, 3, 4, 5], [(4, 2), (0, 0)]), answer("b", 1, [7], [], "writing")]
    second = [answer("a", 2, [1, 2, 3], [(2, 1)]), answer("b", 2, [4, 5], [(0, 0)], "writing")]
    return [run(2.0, first), run(1.0, second)]


def alone(**changed):
    ids = {"a": [[1, 2, 3, 4, 5], [1, 2, 3]], "b": [[7], [4, 5]], **changed}
    batches = []
    for turn, seconds in ((1, 4.0), (2, 2.0)):
        answers = [
            answer(name, turn, ids[name][turn - 1], [(0, 0)] * (len(ids[name][turn - 1]) - 1), category)
            for name, category in (("a", "math"), ("b", "writing"))
        ]
        batches.append(run(seconds, answers))
    return batches


def evaluation(name, batches, settings=None, **more):
    trials = [Trial(None, {name: batch}) for batch in batches]
    return Evaluation(settings or {"dtype": "float32"}, 4, [name], trials, is_complete=True, **more)


@pytest.mark.parametrize("module", [metrics, questions])
def test_worked_examples(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_acceptance_by_hand():
    assert Acceptance.of([]).rate != Acceptance.of([]).rate  # nothing was drafted
    steps = Acceptance.of([(4, 2), (2, 2), (0, 0), (3, 0)])
    assert (steps.drafted, steps.accepted) == ((3, 3, 2, 1), (2, 2, 0, 0))
    assert steps.rate == 4 / 9 and steps.by_position == [2 / 3, 2 / 3, 0, 0]
    both = Acceptance.total([steps, Acceptance.of([(1, 1)])])
    assert (both.drafted, both.accepted) == ((4, 3, 2, 1), (3, 2, 0, 0))


def test_an_arm_by_hand():
    alone = evaluation(SPECULATIVE, speculative())
    arm = alone.main
    assert (arm.tokens, arm.seconds, arm.rate) == (11, 3.0, 11 / 3)
    assert arm.tokens_per_step.value == (4 + 0 + 2 + 1) / 4
    assert arm.acceptance_rate.value == (2 + 1) / (4 + 2)
    assert arm.figures()["acceptance_pos2"] == 1 / 2 and arm.figures()["tokens_per_prompt"] == 11 / 4
    assert alone.of_category("math").main.tokens == 8


def test_joined_files_give_what_one_run_would(tmp_path):
    files = {}
    for name, batches in ((SPECULATIVE, speculative()), (AUTOREGRESSIVE, alone())):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(evaluation(name, batches).as_record()))
    joined = join([(str(path), read_evaluation(path)) for path in files.values()])
    assert joined.speedup().value == 2.0  # 6 seconds over 3
    assert joined.equality == "yes, 4 of 4 prompts" and joined.is_complete
    assert joined.figures()["baseline/tokens_per_second"] == 11 / 6
    assert not joined.times_categories  # batches hold both


def test_a_reply_that_differs_excuses_what_follows_it():
    files = [("s", evaluation(SPECULATIVE, speculative())), ("a", evaluation(AUTOREGRESSIVE, alone(a=[[9], [9]])))]
    joined = join(files)
    assert [a.outcome for a in joined.main.answers] == ["different", "identical", "other prompt", "identical"]
    assert joined.equality == "different: 1, 2 of 4 prompts; 1 other prompt"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (evaluation(AUTOREGRESSIVE, alone(), {"dtype": "bfloat16"}), "dtype is float32 in one and bfloat16"),
        (evaluation(SPECULATIVE, speculative()), "both hold the speculative arm"),
        (evaluation(AUTOREGRESSIVE, alone()[:1]), "answers to other prompts, 4 .speculative. and 2 .autoregressive."),
    ],
)
def test_what_no_ratio_can_be_made_of(other, message):
    with pytest.raises(ValueError, match=message):
        join([("s.json", evaluation(SPECULATIVE, speculative())), ("o.json", other)])


def test_categories_have_a_speed_where_batches_do_not_mix_them():
    trials = [
        Trial(None, {
            name: run(seconds, [answer("a", 1, [1, 2], [(2, 1)])]) for name, seconds in
            ((AUTOREGRESSIVE, 3.0), (SPECULATIVE, 2.0))
        }),
        Trial(None, {
            name: run(1.0, [answer("b", 1, [1, 2], [(0, 0)], "writing")]) for name in (AUTOREGRESSIVE, SPECULATIVE)
        }),
    ]  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(category_table(Evaluation({}, 2, [AUTOREGRESSIVE, SPECULATIVE], trials, is_complete=True)))
    rows = {line.split()[0]: line.split() for line in console.export_text().splitlines() if line.strip()}
    assert rows["math"] == ["math", "1", "2", "1.00", "50%", "1.50"]  # one batch: no interval
    assert rows["writing"] == ["writing", "1", "2", "1.00", "1.00"]


def test_what_is_left_out_and_what_differs_is_counted():
    found = Evaluation({}, 4, [SPECULATIVE], skipped=[Skipped("c", 1, "too long")])
    wrong = Answer("a", 1, "math", 5, [1], "text", 0, Acceptance.of([]), "bug", 3.0, "token 0, BUG")
    found.trials.append(Trial(None, {SPECULATIVE: run(2.0, [wrong, answer("b", 1, [7], [])])}))
    assert (found.done, found.is_complete) == (3, False)
    assert found.bugs == ["speculative, question a, turn 1: token 0, BUG"]
    assert found.figures()["complete"] == 0 and found.figures()["skipped"] == 1


def test_mt_bench_is_bundled_whole():
    asked = load_questions()
    assert len(asked) == 80 and all(len(question.turns) == 2 for question in asked)
    few = spread(asked, 16)
    assert len({question.category for question in few}) == 8 and len(few) == 16
    assert [question.number for question in few] == sorted(question.number for question in few)
    assert spread(asked, 500) == asked


def test_questions_as_the_hub_has_them(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": ["One?", "Two?"], "prompt_id": 7, "category": "math"}\n')
    assert load_questions(str(tmp_path / "q.jsonl")) == [Question(0, "7", "math", ("One?", "Two?"))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["Hi", ""]}', "q.jsonl:2: a question is empty"),
        ('{"turns": "Hi"}', "q.jsonl:2: `turns` is str"),
        ('{"text": "Hi"}', "q.jsonl:2: a text record, expected a question"),
        ("{", "q.jsonl:2: not JSON"),
        ('{"question_id": 1, "turns": ["Hi"]}', "q.jsonl:2: question 1 is here for the second time"),
    ],
)
def test_a_question_that_is_none(line, message, tmp_path):
    (tmp_path / "q.jsonl").write_text(f'{{"question_id": 1, "turns": ["Hi"]}}\n{line}\n')
    with pytest.raises(DataError) as error:
        load_questions(str(tmp_path / "q.jsonl"))
    assert message in str(error.value)
