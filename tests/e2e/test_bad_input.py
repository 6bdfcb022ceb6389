"""What a user can get wrong: one clear line, exit code 2, no traceback, nothing lost."""

import json
import os
import shutil

import pytest
from models import save_wrong_drafters
from running import Command
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from recurrent_drafter import RecurrentDraftingSpeculator
from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path

DEMO = ["generate_speculator.py", "--base_model", "demo"]
SAY = ["--prompt", "Hello"]
EVALUATE = [*DEMO, "--eval_mt_bench"]
TRAIN = ["train_speculator.py", "--llm_name_or_path", "demo"]
COMPARE = ["recurrent-drafter", "demo", "--prompts", "1"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drafters, models and data, each with one thing wrong."""
    folder = tmp_path_factory.mktemp("bad")
    save_wrong_drafters(folder)
    shutil.copytree(demo_drafter_path(), folder / "cut_drafter")
    cut(folder / "cut_drafter/model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(demo_verifier_path())
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer)))
    for name in ("model", "cut_model"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    cut(folder / "cut_model/model.safetensors")
    (folder / "empty").mkdir()
    (folder / "file").write_text("not a folder\n")
    good = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    (folder / "broken.jsonl").write_text(f"{good}\n{good}\n{good[:30]}\n")
    (folder / "keyless.jsonl").write_text(f'{good}\n{{"question": "?"}}\n')
    (folder / "empty.jsonl").write_text("")
    question = json.dumps({"question_id": 1, "category": "math", "turns": ["What is 1 + 1?"]})
    (folder / "broken_questions.jsonl").write_text(f"{question}\n{question[:30]}\n")
    (folder / "same_questions.jsonl").write_text(f"{question}\n{question}\n")
    return folder


CASES = {
    "missing model": (["generate_speculator.py", "--base_model", "./nowhere", *SAY], "no model at ./nowhere"),
    "no such device": ([*DEMO, "--device", "nope", *SAY], "the device 'nope' cannot be used here"),
    "a prompt that is no text": ([*DEMO, "--prompt", "a\udcffb"], "--prompt holds bytes that are no text"),
    "missing drafter": ([*DEMO, "--speculator_path", "./nowhere", *SAY], "no drafter at ./nowhere"),
    "no drafter in the folder": ([*DEMO, "--speculator_path", "./empty", *SAY], "./empty holds no config.json"),
    "a model for a drafter": ([*DEMO, "--speculator_path", "./model", *SAY], "type 'gpt2', expected"),
    "no drafter named": (
        ["generate_speculator.py", "--base_model", "./model", "--no_lookup", *SAY],
        "give --speculator_path",
    ),
    "other width": ([*DEMO, "--speculator_path", "./width", *SAY], "verifier of width 32 (other)"),
    "other vocabulary": ([*DEMO, "--speculator_path", "./vocabulary", *SAY], "verifier of vocabulary 99 (other)"),
    "other tokenizer": ([*DEMO, "--speculator_path", "./tokenizer", *SAY], "another tokenizer"),
    "other tokenizer, compared": ([*COMPARE, "--speculator_path", "./tokenizer"], "another tokenizer"),
    "cut drafter": ([*DEMO, "--speculator_path", "./cut_drafter", *SAY], "./cut_drafter is damaged"),
    "cut model": (["generate_speculator.py", "--base_model", "./cut_model", "--autoregressive", *SAY], "./cut_model"),
    "empty prompt": ([*DEMO, "--prompt", ""], "--prompt is empty"),
    "blank prompt": ([*DEMO, "--prompt", " \n"], "--prompt is empty"),
    "no prompt": (DEMO, "give one of --prompt TEXT, --interactive and --eval_mt_bench"),
    "long prompt": ([*DEMO, "--prompt", "word " * 3000], "exceed the context of"),
    "unreadable question": ([*EVALUATE, "--dataset_path", "broken_questions.jsonl"], "questions.jsonl:2: not JSON"),
    "no question": ([*EVALUATE, "--dataset_path", "broken.jsonl"], "broken.jsonl:1: a sharegpt record, expected a"),
    "a question twice": (
        [*EVALUATE, "--dataset_path", "same_questions.jsonl"],
        "questions.jsonl:2: question 1 is here",
    ),
    "results into nowhere": ([*EVALUATE, "--output_file", "nowhere/a.json"], "nowhere/a.json cannot be written"),
    "results into a folder": ([*EVALUATE, "--output_file", "empty"], "empty is a folder"),
    "two things at once": ([*EVALUATE, "--interactive"], "give one of --prompt TEXT, --interactive and"),
    "a reply as long as the context": ([*EVALUATE, "--max_generation_length", "1024"], "less than the context of 1024"),
    "one file to join": (["recurrent-drafter", "bench", "--join", "file"], "expected two files"),
    "nothing to join": (["recurrent-drafter", "bench", "--join", "nowhere", "file"], "nowhere cannot be read"),
    "no evaluation to join": (["recurrent-drafter", "bench", "--join", "file", "file"], "file holds no evaluation"),
    "no new tokens": ([*DEMO, *SAY, "--max_generation_length", "0"], "--max_generation_length is 0"),
    "no beams": ([*DEMO, *SAY, "--beam_width", "0"], "--beam_width is 0"),
    "no beam length": ([*DEMO, *SAY, "--beam_length", "0"], "--beam_length is 0"),
    "root only": ([*DEMO, *SAY, "--max_tree_nodes", "1"], "--max_tree_nodes is 1"),
    "unknown flag": ([*DEMO, *SAY, "--beem_width", "3"], "unknown argument --beem_width"),
    "unknown training flag": ([*TRAIN, "--quik"], "unknown argument --quik"),
    "not a number": ([*DEMO, *SAY, "--beam_width", "wide"], "invalid int value: 'wide'"),
    "unknown command": (["recurrent-drafter", "dmeo"], "unknown command 'dmeo'"),
    "unknown data": ([*TRAIN, "--dataset_name", "sharegtp"], "unknown dataset 'sharegtp'"),
    "hub out of reach": ([*TRAIN, "--dataset_name", "sharegpt"], "use --dataset_name demo or --dataset_path FILE"),
    "missing data": ([*TRAIN, "--dataset_path", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    "unreadable line": ([*TRAIN, "--dataset_path", "broken.jsonl"], "broken.jsonl:3: not JSON"),
    "unknown record": ([*TRAIN, "--dataset_path", "keyless.jsonl"], "keyless.jsonl:2: no `conversations`"),
    "empty data": ([*TRAIN, "--dataset_path", "empty.jsonl"], "empty.jsonl is empty"),
    "two data sets": ([*TRAIN, "--dataset_path", "x", "--dataset_name", "demo"], "exclude each other"),
    "a file as output": ([*TRAIN, "--dataset_name", "demo", "--output_dir", "file"], "--output_dir file cannot be"),
    "unknown service": ([*TRAIN, "--report_to", "wnadb"], "--report_to wnadb: no such service is installed"),
    "no checkpoint": ([*TRAIN, "--resume_from_checkpoint", "./nowhere"], "no checkpoint at ./nowhere"),
    "too few distilled": ([*TRAIN, "--use_distilled_dataset", "--drafter_predict_n_tokens", "9"], "distil at least"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case, folder):
    argv, expected = CASES[case]
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    ended = Command(argv, folder).ended()
    assert ended.code == 2, ended.out + ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and expected in line
    assert len(line) < 400
    assert all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_an_output_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    ended = Command([*TRAIN, "--dataset_name", "demo", "--output_dir", "locked"], tmp_path).ended()
    assert ended.code == 2 and "--output_dir locked cannot be written to" in ended.err


@pytest.mark.parametrize("name", ["width", "vocabulary"])
def test_from_python_too_a_drafter_of_another_verifier_is_refused(name, folder):
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, n_positions=64, vocab_size=101))
    with pytest.raises(ValueError, match="the drafter is for a verifier of"):
        RecurrentDraftingSpeculator.from_pretrained(folder / name, verifier=model)
