"""A reproduction without its trainings: the plan, the statistics, the folder, the report."""

import itertools
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from models import random_drafter, tiny_model

from recurrent_drafter.cli import reproduce, train
from recurrent_drafter.cli.main import launch, reporting
from recurrent_drafter.cli.parser import OptionParser
from recurrent_drafter.core.beam import Beams
from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.provenance import provenance
from recurrent_drafter.report.document import markdown_table
from recurrent_drafter.report.document import page as html_page
from recurrent_drafter.report.reproduction import write_report
from recurrent_drafter.reproduce.findings import Findings, Place, Recipe, Walks, gain, says, tokens_per_step
from recurrent_drafter.reproduce.plan import ReproduceOptions, Source, plan_of, training_flags
from recurrent_drafter.reproduce.results import RESULTS, Results, failure
from recurrent_drafter.reproduce.sweeps import distinct_prefixes, with_fewer_tokens
from recurrent_drafter.training.examples import frequent_tokens, with_text_targets


def test_the_quick_plan():
    plan = plan_of(ReproduceOptions(quick=True))
    grid = [cell for cell in plan.cells if cell.rnn]
    assert len(grid) == 3 * 2 * 1 * 2 and len(set(plan.names)) == len(plan.names)
    assert len(plan.cells) == len(grid) + 2, "and one without recurrence for each seed"
    assert (plan.showcase.method, plan.showcase.scope, plan.showcase.rnn) == ("distilled", "assistant", True)
    assert plan_of(ReproduceOptions(quick=True, sweeps=False)).names == ["calibration", *(c.name for c in grid)]


def test_the_whole_plan_crosses_sets_and_evaluates_on_mt_bench():
    options = ReproduceOptions()
    assert len([cell for cell in plan_of(options).cells if cell.rnn]) == 3 * 2 * 2 * 3
    assert [source.label for source in options.evaluation_sets] == ["sharegpt", "alpaca", "mtbench"]
    assert Source("mtbench", None).held_out_split(options.training_sets) == "all"
    assert [Source(name, None).held_out_split(options.training_sets) for name in ("sharegpt", "wikitext")] == [
        "eval"
    ] * 2


def test_every_cell_is_a_training_that_the_trainer_accepts(tmp_path):
    options = ReproduceOptions(quick=True, train_flags="--num_train_epochs 7")
    for cell in plan_of(options).cells:
        args = train.options(training_flags(cell, options, tmp_path))
        assert (args.method, args.seed, args.rnn, args.depths) == (cell.method, cell.seed, cell.rnn, 5)
        assert args.train_on_assistant_only == (cell.scope == "assistant")
        assert args.num_train_epochs == 7 and not args.load_best_model_at_end


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--methods magic", "--methods has magic"),
        ("--seeds 1 1", "expected different values"),
        ("--dataset_name sharegpd", "--dataset_name has sharegpd"),
        ("--lengths 6", "at most 5"),
        ("--widths 0", "at least 1"),
        ("--cell_seconds 0", "more than 0"),
        ("--dataset_path a/x.jsonl b/x.jsonl", "two data sets have one name"),
        ("--dataset_path nowhere.jsonl", "nowhere.jsonl"),
        ("--train_flags '--learning_rate fast'", "--learning_rate"),
        ("--train_flags '--kd_alpha 0.5'", "--kd_alpha does nothing without"),
        ("--beam_width 3", "unknown argument --beam_width"),
        ("", "dataset 'sharegpt' cannot be loaded from the hub"),
    ],
)
def test_wrong_input_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    import shlex

    monkeypatch.chdir(tmp_path)
    assert launch("reproduce", shlex.split(flags)) == 2
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch("reproduce", ["--quick", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "14 trainings of about 90 seconds: 21 minutes" in shown and "demo-assistant-distilled-no_rnn-seed1" in shown
    assert launch("reproduce", ["--dry_run"]) == 0
    assert "by epochs" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_an_interval_is_that_of_all_resamples():
    walks = Walks(np.array([[2.0, 4.0]]), np.array([8.0, 8.0]))
    every = sorted(
        16 / (walks.steps[0, a] + walks.steps[0, b]) for a, b in itertools.product(range(2), repeat=2)
    )  # each with probability 1/4
    found = tokens_per_step(walks)
    assert (found.low, found.value, found.high) == (every[0], 16 / 6, every[-1])


def test_pairing_takes_out_what_replies_and_seeds_share():
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 60, 40).astype(float)
    steps = tokens / generator.uniform(1.2, 4, 40) * np.array([[1.0], [1.2], [0.9]])
    base, better = Walks(steps, tokens), Walks(steps / 1.1, tokens)
    ratio = gain(better, base)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1.1,) * 3) and says(ratio) == "more"
    assert says(gain(base, better)) == "fewer" and says(gain(base, base)) == "undecided"
    alone = tokens_per_step(base)
    assert alone.high / alone.low > 1.1, "apart, replies and seeds vary by more than the methods differ"


def test_distinct_prefixes_are_counted():
    drafter = random_drafter(draft_vocab_size=20)
    draft = BeamDrafter(drafter, Verifier(tiny_model("gpt2")).embed)
    with torch.inference_mode():
        beams: Beams = draft(torch.randn(6, drafter.config.hidden_size), torch.arange(6), 5, 4)
    expected = [len({tuple(path[:n]) for path in row for n in range(1, 5)}) for row in beams.paths.tolist()]
    assert distinct_prefixes(beams).tolist() == expected and min(expected) < 20


def test_a_smaller_draft_vocabulary_is_a_part_of_the_larger():
    drafter = random_drafter(draft_vocab_size=30)
    drafter.draft_ids.copy_(torch.arange(10, 40))
    texts = [TrainExample(torch.randint(10, 40, (50,)), torch.zeros(50, dtype=torch.int64)) for _ in range(3)]
    kept = frequent_tokens([with_text_targets(text, 3, ()) for text in texts], 8, 97, [12])
    smaller = with_fewer_tokens(drafter, kept)
    hidden, embedded = torch.randn(4, drafter.config.hidden_size), torch.randn(4, 2, drafter.config.hidden_size)
    with torch.inference_mode():
        whole, part = drafter(hidden, embedded), smaller(hidden, embedded)
    assert smaller.draft_ids.tolist() == kept.tolist() and len(drafter.draft_ids) == 30
    torch.testing.assert_close(part, whole[..., kept - 10])


def training(method, seed, steps, **more):
    walked = {"set": "demo", "beam_width": 3, "beam_length": 5, "nodes": 16, "steps": steps, "tokens": [12, 20, 16]}
    record = {
        "kind": "training", "status": "finished", "training_set": "demo", "scope": "assistant", "method": method,
        "seed": seed, "rnn": True, "steps": 10, "train_seconds": 3.0, "targets_seconds": 1.0, "seconds": 5.0,
        "texts": 5, "roots": 50, "draft_vocab_size": 64, "coverage": 0.9, "made": provenance(["x"]),
        "curve": [{"step": 5, "tokens_per_step": 1.5}], "evaluations": [walked],
    }  # fmt: skip
    return record | more


def small(folder, **options) -> Results:
    given = {"methods": ["ground_truth", "distilled"], "scopes": ["assistant"], "seeds": [0, 1], "sweeps": False}
    given |= {"dataset_name": ["demo"], "eval_dataset_name": ["demo"], "output_dir": str(folder)}
    return Results.of(ReproduceOptions(**given | options))


def launched_by(script, folder) -> Results:
    return small(folder, launcher=f"{sys.executable} {script}")


def test_arms_are_compared_by_the_seeds_that_both_have():
    records = [training("ground_truth", 0, [10, 10, 10]), training("distilled", 0, [8, 8, 8]),
               training("distilled", 1, [1, 1, 1]), failure("lost") | {"name": "the other"}]  # fmt: skip
    findings, where = Findings(records), Place("demo", 3, 5)
    text, distilled = (Recipe("demo", "assistant", method, True) for method in ("ground_truth", "distilled"))
    assert findings.gain(distilled, text, where).value == pytest.approx(10 / 8)
    assert findings.gain(distilled, Recipe("demo", "full", "ground_truth", True), where) is None
    assert findings.estimate(distilled, where).value == pytest.approx(2 * 48 / 27)


def test_a_folder_is_of_one_reproduction(tmp_path):
    results = small(tmp_path)
    results.claim()
    small(tmp_path).claim()
    small(tmp_path, seeds=[0, 1, 2]).claim()  # more of the same
    with pytest.raises(ValueError, match="other settings .max_examples., and results are not mixed"):
        small(tmp_path, max_examples=5).claim()
    assert Results.from_folder(tmp_path).options.seeds == [0, 1, 2]


def test_a_data_file_that_changed_is_another_setting(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n')
    small(tmp_path / "out", dataset_path=[str(data)]).claim()
    data.write_text('{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"other settings .files."):
        small(tmp_path / "out", dataset_path=[str(data)]).claim()


def test_failed_jobs_are_done_again_and_finished_ones_are_not(tmp_path):
    results = small(tmp_path)
    first, second, *rest = results.plan.names
    results.write(first, training("ground_truth", 0, [9, 9, 9]))
    results.write(second, failure("ValueError: the loss is nan"))
    assert results.pending == rest and results.failed(second)
    assert [json.loads(line)["name"] for line in (tmp_path / RESULTS).read_text().splitlines()] == [first, second]
    results.retry()
    assert results.pending == [second, *rest]


WORKER = """
import os, signal, sys
from pathlib import Path
folder = Path(sys.argv[-1])
names = {names}
for name in names:
    if (folder / "jobs" / name / "record.json").exists():
        continue
    (folder / "at_work").write_text(name)
    if name == names[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "jobs" / name).mkdir(parents=True)
    (folder / "jobs" / name / "record.json").write_text('{{"name": "%s", "status": "finished"}}' % name)
"""


def test_a_process_that_dies_costs_its_own_job(tmp_path):
    script = tmp_path / "worker.py"
    results = launched_by(script, tmp_path / "out")
    script.write_text(WORKER.format(names=results.plan.names))
    results.folder.mkdir()
    assert reproduce.do_jobs(results) == 0
    assert [record["status"] for record in results.records] == ["finished", "failed", "finished", "finished"]
    assert "SIGKILL" in results.record(results.plan.names[1])["error"]


@pytest.mark.parametrize(
    ("code", "said"), [(2, "error: no such model"), (1, "ended with exit code 1 before its first")]
)
def test_a_process_that_cannot_begin_ends_the_command(code, said, tmp_path, capfd):
    script = tmp_path / "worker.py"
    script.write_text(f"import sys; print('error: no such model', file=sys.stderr); sys.exit({code})")
    results = launched_by(script, tmp_path / "out")
    results.folder.mkdir()
    run = reporting(lambda: reproduce.do_jobs(results))
    assert run() == 2 and not results.records
    assert said in capfd.readouterr().err.splitlines()[-1]


class Page(HTMLParser):
    """Its words, and the tags that are open; fails where one closes that is not."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.words, self.sources = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.words += " "

    def handle_data(self, data):
        self.words += "" if self.open and self.open[-1] in ("style", "title") else data


def test_the_report_says_what_was_found_and_what_failed(tmp_path):
    results = small(tmp_path)
    for name, record in zip(
        results.plan.names,
        [training("ground_truth", 0, [9, 10, 9]), training("distilled", 0, [8, 9, 8]), failure("gone <b>wrong</b>")],
        strict=False,
    ):
        results.write(name, record)
    page, text, raw = write_report(results, provenance(["python", "experiment_paper_reproduction.py", "--quick"]))
    read = Page(page.read_text())
    assert not read.open and all(source.startswith(("#", "data:image/svg+xml;base64,")) for source in read.sources)
    assert not re.search(r"https?://", page.read_text()) and raw.name == RESULTS
    for shown in (read.words, text.read_text()):
        assert "+12.0 % (+11.1 to +12.5), more tokens per step" in shown and "gone <b>wrong</b>" in shown
        assert "2 of 4 jobs have finished, 1 have failed" in shown and "has not been run yet" in shown
        assert "experiment_paper_reproduction.py --quick" in shown and provenance([])["versions"]["torch"] in shown
    for link in re.findall(r"\]\((.*?)\)", text.read_text()):
        assert (tmp_path / link).read_bytes().startswith(b"<?xml")


def test_a_report_without_anything_in_it_is_one(tmp_path):
    page, *_ = write_report(small(tmp_path), provenance(["x"]))
    assert "0 of 4 jobs have finished" in Page(page.read_text()).words


def test_both_forms_show_the_same_table():
    table = markdown_table(["a", "b"], [["x|y", "1"]])
    assert table == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    page = html_page(f"# A & B\n\n## One\n\n<i>\n\nCaption\n\n{table}\n", {})
    assert Page(page).words.split() == "A & B One One <i> Caption a b x|y 1".split()


def test_a_picture_is_found_whatever_its_set_is_called(tmp_path):
    data = tmp_path / "my dätä (1).jsonl"
    data.write_text('{"text": "one"}\n')
    results = small(tmp_path / "out", eval_dataset_name=[], eval_dataset_path=[str(data)])
    walked = {"set": "my dätä (1)", "beam_width": 3, "beam_length": 5, "nodes": 16, "steps": [9, 9], "tokens": [12, 20]}
    results.write(results.plan.names[0], training("ground_truth", 0, [], evaluations=[walked]))
    page, text, _ = write_report(results, provenance(["x"]))
    assert [src[:15] for src in Page(page.read_text()).sources if not src.startswith("#")] == ["data:image/svg+"] * 2
    assert len(list((tmp_path / "out/pictures").iterdir())) == 2 and "tokens-per-step-my%20d" in text.read_text()


def test_options_come_back_from_the_folder(tmp_path):
    (options,) = OptionParser(ReproduceOptions).options(
        ["--quick", "--output_dir", str(tmp_path), "--seeds", "3", "4", "--no_sweeps"]
    )
    results = Results.of(options)
    results.claim()
    assert Results.from_folder(tmp_path).options == options
