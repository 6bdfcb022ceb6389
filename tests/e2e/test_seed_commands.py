"""Command lines that users have been given, and what their flags come to."""

import dataclasses
import shlex

import pytest

from recurrent_drafter import RecurrentDraftingConfig, TrainingArguments
from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.train import options

ASSISTANT = "--train_on_assistant_only"
SHAREGPT = f"{ASSISTANT} --dataset_name sharegpt"
DISTILLED = f"--use_distilled_dataset --distill_num_future_tokens 5 --distill_temperature 0.0 {SHAREGPT}"
SOFT = f"--use_knowledge_distillation --kd_temperature 4.0 --kd_alpha 0.7 {SHAREGPT}"
GPT2 = "--llm_name_or_path gpt2"
EVAL = f"--phase eval {GPT2} --drafter_name_or_path ./models/gpt2-recurrent-drafter"
COMMANDS = [
    "--quick",
    f"{GPT2} --output_dir ./models/gpt2-recurrent-drafter --num_train_epochs 3 --per_device_train_batch_size 8 "
    "--learning_rate 5e-4 --drafter_predict_n_tokens 4 --drafter_num_layers 2 --rnn",
    f"{GPT2} {DISTILLED}",
    f"{GPT2} {SOFT}",
    f"{GPT2} {SHAREGPT}",
    f"--report_to wandb --run_name gpt2-experiment-v1 {GPT2} --num_train_epochs 5 --per_device_train_batch_size 16",
    f"--report_to wandb tensorboard --run_name multi-tracking-experiment {GPT2} --num_train_epochs 3",
    "--llm_name_or_path microsoft/DialoGPT-medium --output_dir ./models/dialogpt-recurrent-drafter "
    "--num_train_epochs 3 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 3e-4 "
    "--drafter_predict_n_tokens 6 --drafter_num_layers 3 --model_max_length 1024 --rnn --report_to wandb "
    "--run_name dialogpt-v2-6tokens",
    f"--report_to wandb --run_name experiment-1 {GPT2}",
    "--report_to wandb tensorboard --run_name multi-service-tracking",
    "--report_to wandb --run_name team-experiment",
    "--report_to wandb --run_name 6token-experiment --drafter_predict_n_tokens 6",
    f"{EVAL} --report_to wandb --run_name final-evaluation",
    f"{EVAL} --report_to wandb --run_name gpt2-eval-final",
    f"{EVAL} --dataset_name alpaca --report_to wandb --run_name sharegpt-model-alpaca-eval",
    f"{DISTILLED} --report_to wandb --run_name paper-exact-method",
    f"{SOFT} --run_name standard-kd-method",
    f"--dataset_name sharegpt {ASSISTANT} --run_name ground-truth-baseline",
    f"--use_distilled_dataset {ASSISTANT} --report_to wandb --run_name distilled-dataset-experiment",
    f"{GPT2} --num_train_epochs 2 --per_device_train_batch_size 4 --dataset_name sharegpt",
    f"{GPT2} {DISTILLED} --num_train_epochs 3",
    f"{GPT2} {SOFT} --num_train_epochs 3",
    f"{GPT2} {SHAREGPT} --num_train_epochs 3",
    f"{GPT2} --use_distilled_dataset {ASSISTANT} --dataset_name alpaca --num_train_epochs 5 --distill_max_examples 500",
    f"--llm_name_or_path gpt2-medium --use_distilled_dataset {ASSISTANT} --num_train_epochs 3 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --report_to wandb "
    "--run_name medium-model-distilled-dataset",
    f"--llm_name_or_path gpt2-large --use_knowledge_distillation {ASSISTANT} --num_train_epochs 3 "
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 8 --drafter_num_layers 3 --model_max_length 1024",
    # the complete list of flags, once for each of the two methods that it shows
    f"{GPT2} --output_dir ./models/output {DISTILLED} --distill_max_examples 1000 --model_max_length 512 "
    "--drafter_predict_n_tokens 4 --drafter_num_layers 2 --rnn --exit_dim_multiplier 1.0 --num_train_epochs 3 "
    "--per_device_train_batch_size 8 --learning_rate 5e-4 --phase train --report_to wandb "
    "--run_name my-experiment --quick",
    f"{GPT2} --output_dir ./models/output --use_knowledge_distillation --kd_temperature 4.0 --kd_alpha 0.7 {SHAREGPT} "
    "--model_max_length 512 --phase train --report_to none --run_name my-experiment",
    f"--use_distilled_dataset {ASSISTANT} --dataset_name sharegpt",
    "--phase eval --llm_name_or_path gpt2 --drafter_name_or_path ./models/my-drafter",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_what_it_would_do(command, capsys):
    assert launch("train", [*shlex.split(command), "--demo"]) == 0, capsys.readouterr().err
    assert "nothing was" in capsys.readouterr().out


DEFAULTS = {
    "llm_name_or_path": "gpt2", "dataset_name": "sharegpt", "num_train_epochs": 3.0, "per_device_train_batch_size": 4,
    "learning_rate": 5e-4, "drafter_predict_n_tokens": 4, "drafter_num_layers": 2, "rnn": True,
    "exit_dim_multiplier": 1.0, "kd_temperature": 4.0, "kd_alpha": 0.7, "distill_num_future_tokens": 5,
    "distill_temperature": 0.0, "distill_max_examples": 1000, "model_max_length": 512, "phase": "train",
    "train_on_assistant_only": False, "report_to": [], "method": "ground_truth",
    "output_dir": "./models/gpt2-recurrent-drafter-trained", "metric_for_best_model": "eval_tokens_per_step",
}  # fmt: skip


def test_defaults():
    args = options([])
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS
    assert dataclasses.replace(args) == args
    assert options(["--use_distilled_dataset"]).drafter_predict_n_tokens == 5
    assert options(["--use_distilled_dataset", "--distill_num_future_tokens", "3"]).drafter_predict_n_tokens == 3
    assert options(["--no_rnn"]).rnn is False
    quick = options(["--quick"])
    assert (quick.llm_name_or_path, quick.dataset_name, quick.output_dir) == (
        "demo", "demo", "./models/demo-recurrent-drafter"
    )  # fmt: skip


def test_from_python(tmp_path):
    config = RecurrentDraftingConfig(
        hidden_size=768, vocab_size=50257, exit_dim=768, num_draft_layers=2, rnn=True, emb_norm=False
    )
    assert config.exit_dim == 768
    args = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        drafter_predict_n_tokens=4,
        drafter_num_layers=2,
        use_wandb=True,
    )
    assert args.report_to == ["wandb"] and args.drafter_num_layers == 2
    assert TrainingArguments(report_to=["tensorboard"], use_wandb=True).report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--use_distilled_dataset --use_knowledge_distillation", "exclude each other"),
        ("--kd_temperature 4.0", "--kd_temperature does nothing without --use_knowledge_distillation"),
        ("--use_distilled_dataset --kd_alpha 0.5", "--kd_alpha does nothing without"),
        ("--distill_max_examples 10", "--distill_max_examples does nothing without --use_distilled_dataset"),
        ("--use_distilled_dataset --drafter_predict_n_tokens 6", "distil at least as many tokens"),
        ("--dataset_name demo --dataset_path x.jsonl", "exclude each other"),
        ("--eval_dataset_name demo --eval_dataset_path x.jsonl", "exclude each other"),
        ("--drafter_name_or_path ./x", "is for --phase eval"),
        ("--phase eval", "give --drafter_name_or_path"),
        ("--quick --use_knowledge_distillation", "exclude each other"),
        ("--streaming", "needs --max_steps"),
        ("--streaming --max_steps 5 --use_distilled_dataset", "keeps no distilled targets"),
        ("--shuffle_buffer 5", "does nothing without --streaming"),
        ("--use_knowledge_distillation --kd_alpha 1.5", "expected 0 to 1"),
        ("--use_knowledge_distillation --kd_temperature 0", "expected more than 0"),
        ("--draft_vocab_size some", "'auto' or 'all'"),
        ("--early_stopping_patience 2 --eval_strategy no", "needs evaluations"),
        ("--exit_dim_multiplier 0", "expected more than 0"),
    ],
)
def test_contradictions_are_refused(command, message):
    with pytest.raises(ValueError, match=message):
        options(shlex.split(command))
