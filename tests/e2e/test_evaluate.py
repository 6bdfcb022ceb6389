"""Evaluations as commands: what trackers get, and the command lines that users have been given."""

import json
import shlex

import pytest
from running import Command
from tracked import scalars, wandb_records

from recurrent_drafter.cli.main import COMMANDS as TABLE

DEMO = ["generate_speculator.py", "--base_model", "demo"]
FEW = ["--eval_mt_bench", "--max_num_prompts", "2", "--max_generation_length", "10"]


def test_trackers_receive_what_the_file_holds(tmp_path):
    pytest.importorskip("wandb")
    environment = {
        "WANDB_MODE": "offline", "WANDB_PROJECT": "mine", "WANDB_ENTITY": "team", "WANDB_TAGS": "first,second",
        "WANDB_NOTES": "a note", "WANDB_SILENT": "true",
    }  # fmt: skip
    flags = ["--compare", "--report_to", "wandb", "tensorboard", "--run_name", "both", "--output_file", "r.json"]
    ended = Command([*DEMO, *FEW, *flags], tmp_path, environment=environment).ended()
    assert ended.code == 0, ended.out + ended.err
    figures = json.loads((tmp_path / "r.json").read_text())["figures"]
    assert {"tokens_per_second", "speedup", "speedup_low", "baseline/tokens_per_second", "acceptance_rate"} <= set(
        figures
    )
    on_board = scalars(tmp_path / "runs" / "both")
    assert {name: on_board[name][-1] for name in figures} == pytest.approx(figures)
    assert len(on_board["so_far/speculative_tokens_per_second"]) == 4

    records = wandb_records(tmp_path)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (runs[-1].project, runs[-1].entity, runs[-1].display_name, runs[-1].notes) == (
        "mine", "team", "both", "a note"
    )  # fmt: skip
    assert {"first", "second"} <= set(runs[-1].tags)
    logged = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        for item in record.history.item
    }
    assert {name: logged[name] for name in figures} == pytest.approx(figures)
    updates = [update for record in records for update in (*record.config.update, *record.run.config.update)]
    config = {update.key or "/".join(update.nested_key): update.value_json for update in updates}
    assert config["base_model"] == '"demo"' and config["batch_size"] == "1" and config["drafter"] == '"demo"'


def test_a_project_by_flag_goes_before_the_environment(tmp_path):
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_PROJECT": "mine", "WANDB_SILENT": "true"}
    flags = ["--use_wandb", "--wandb_project", "other", "--autoregressive", "--max_num_prompts", "1"]
    ended = Command([*DEMO, *FEW, *flags], tmp_path, environment=environment).ended()
    assert ended.code == 0, ended.out + ended.err
    records = wandb_records(tmp_path)
    assert {record.run.project for record in records if record.WhichOneof("record_type") == "run"} == {"other"}


DRAFTER = "--base_model gpt2 --speculator_path ./models/gpt2-recurrent-drafter"
COMMANDS = [
    "--base_model gpt2 --speculator_path ./models/gpt2-recurrent-drafter-trained --interactive",
    f"{DRAFTER} --interactive",
    f"{DRAFTER} --eval_mt_bench --max_num_prompts 100 --batch_size 4",
    f"{DRAFTER} --eval_mt_bench --max_num_prompts 50 --batch_size 8 --use_wandb",
    "--base_model gpt2 --eval_mt_bench --autoregressive --max_num_prompts 50 --batch_size 8 --use_wandb",
    f"{DRAFTER} --eval_mt_bench --max_num_prompts 200 --batch_size 16 --beam_width 20 --beam_length 6 "
    "--temperature 0.8 --max_generation_length 150 --output_file results.json --use_wandb",
    f"{DRAFTER} --eval_mt_bench --max_num_prompts 10 --batch_size 1 --use_wandb",
    f"{DRAFTER} --eval_mt_bench --max_num_prompts 20",
    f"{DRAFTER} --eval_mt_bench --max_num_prompts 500 --batch_size 8 --beam_width 15 --beam_length 5 "
    "--output_file benchmark_results.json",
    f"{DRAFTER} --eval_mt_bench --max_num_prompts 100 --report_to wandb --run_name speculative-generation",
    "--base_model gpt2 --eval_mt_bench --autoregressive --max_num_prompts 100 --report_to wandb "
    "--run_name autoregressive-baseline",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command):
    _, sampling, options, asked = TABLE["generate"].parser().options(shlex.split(command))
    assert options.interactive != options.is_evaluation
    assert asked.services == (["wandb"] if "wandb" in command else [])
    assert sampling.arguments()["do_sample"] == ("--temperature" in command)


def test_the_longest_of_them_runs(tmp_path):
    flags = ["--batch_size", "16", "--beam_width", "20", "--beam_length", "6", "--temperature", "0.8"]
    ended = Command([*DEMO, *FEW, *flags, "--output_file", "results.json"], tmp_path).ended()
    assert ended.code == 0, ended.out + ended.err
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["draft_shape"] == {"beam_width": 20, "beam_length": 6, "max_tree_nodes": None}
    assert record["settings"]["temperature"] == 0.8 and record["figures"]["prompts"] == 4
