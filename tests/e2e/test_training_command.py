"""What training leaves: figures that evaluation gives again, records, trackers; and how it fails."""

import itertools
import json
import re

import pytest
from running import Command
from tracked import scalars, wandb_records
from transformers.integrations import is_deepspeed_available

from recurrent_drafter.assets import sample_path
from recurrent_drafter.data.parsing import read_records

FEW = ["--eval_max_examples", "2", "--eval_max_new_tokens", "12"]
DEMO = ["train_speculator.py", "--llm_name_or_path", "demo"]
SMALL = [*DEMO, *FEW, "--model_max_length", "64", "--draft_vocab_size", "512", "--logging_steps", "1"]
QUESTIONS = str(sample_path("gsm8k.alpaca.json"))


def conversations(folder, count=60):
    folder.mkdir(exist_ok=True)
    records = (r for _, r in itertools.islice(read_records(sample_path("sgd_dev.sharegpt.jsonl.gz")), count))
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, records)))
    return ["--dataset_path", "few.jsonl"]


def done(argv, folder, **options):
    ended = Command(argv, folder, **options).ended()
    assert ended.code == 0, ended.out + ended.err
    return ended.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training with checkpoints, a best one among them, and TensorBoard; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    command = [*SMALL, *conversations(folder), "--train_on_assistant_only", "--max_steps", "4", "--save_steps", "2"]
    return folder, done([*command, "--report_to", "tensorboard", "--output_dir", "out"], folder)


def test_the_account_is_printed(trained):
    _, out = trained
    assert "training data: few.jsonl (sharegpt records): 60 conversations" in out
    assert float(re.search(r"padding: ([\d.]+)%", out)[1]) < 10
    assert re.search(r"draft vocabulary of 512 .* covers [\d.]+% of the targets", out)
    assert re.search(r"predicted speed-up on this machine: \d+\.\d\dx", out)


def test_every_checkpoint_has_its_record(trained):
    folder, _ = trained
    for name in ("checkpoint-2", "checkpoint-4", "."):
        record = json.loads((folder / "out" / name / "run.json").read_text())
        assert record["argv"][0] == "train_speculator.py" and record["seed"] == 42
        assert len(record["data"]["sha256"]) == 64 and record["options"]["drafter_num_layers"] == 2
        assert {"commit", "versions", "hardware", "verifier", "method"} <= record.keys()


def test_the_best_checkpoint_was_chosen_by_acceptance(trained):
    folder, _ = trained
    state = json.loads((folder / "out/checkpoint-4/trainer_state.json").read_text())
    values = [entry["eval_tokens_per_step"] for entry in state["log_history"] if "eval_tokens_per_step" in entry]
    assert state["best_metric"] == max(values) and "checkpoint-" in state["best_model_checkpoint"]


def test_tensorboard_has_the_figures(trained):
    folder, _ = trained
    found = scalars(folder / "out")
    assert len(found["train/loss"]) == 4 and len(found["train/learning_rate"]) == 4
    history = json.loads((folder / "out/run.json").read_text())["history"]
    evaluated = [entry["eval_tokens_per_step"] for entry in history if "eval_tokens_per_step" in entry]
    assert found["eval/tokens_per_step"] == pytest.approx(evaluated) and len(evaluated) == 2  # no third one at the end


def test_evaluation_gives_the_figures_of_training_again(trained):
    folder, _ = trained
    figures = json.loads((folder / "out/run.json").read_text())["metrics"]
    evaluate = [*DEMO, *FEW, "--phase", "eval", "--drafter_name_or_path", "./out"]
    record = (folder / "out/run.json").read_bytes()
    out = done([*evaluate, "--dataset_path", "few.jsonl", "--output_dir", "out"], folder)
    assert (folder / "out/run.json").read_bytes() == record, "training's own record stays"
    again = json.loads((folder / "out/evaluation.json").read_text())["metrics"]
    assert {k: v for k, v in again.items() if k.startswith("eval_")} == {
        k: v for k, v in figures.items() if k.startswith("eval_")
    }
    assert f"eval_tokens_per_step: {figures['eval_tokens_per_step']:g}" in out
    out = done([*evaluate, "--dataset_path", QUESTIONS, "--output_dir", "other"], folder)
    assert "held-out prompts of " + QUESTIONS in out


def test_a_checkpoint_of_another_run_is_refused(trained):
    folder, _ = trained
    command = [*SMALL, "--dataset_path", "few.jsonl", "--max_steps", "6", "--output_dir", "other"]  # all tokens count
    line = refused([*command, "--resume_from_checkpoint", "out/checkpoint-2"], folder)
    assert line.startswith("error: out/checkpoint-2 belongs to another run")
    assert not list((folder / "other").glob("checkpoint-*"))


def test_other_data_to_evaluate_on(tmp_path):
    command = [*SMALL, *conversations(tmp_path), "--eval_dataset_path", QUESTIONS, "--max_steps", "1"]
    command += ["--eval_strategy", "no", "--report_to", "tensorboard", "--output_dir", "out"]
    assert "held-out prompts of " + QUESTIONS in done(command, tmp_path)
    figures = json.loads((tmp_path / "out/run.json").read_text())["metrics"]  # told once, though training told none
    assert scalars(tmp_path / "out")["eval/tokens_per_step"] == pytest.approx([figures["eval_tokens_per_step"]])


def test_several_trackers_at_once_and_the_environment_is_the_users(tmp_path):
    pytest.importorskip("wandb")
    environment = {
        "WANDB_MODE": "offline", "WANDB_PROJECT": "mine", "WANDB_ENTITY": "team", "WANDB_TAGS": "first,second",
        "WANDB_NOTES": "a note", "WANDB_LOG_MODEL": "checkpoint", "WANDB_WATCH": "gradients", "WANDB_SILENT": "true",
    }  # fmt: skip
    command = [*SMALL, *conversations(tmp_path), "--max_steps", "2", "--save_steps", "1", "--output_dir", "out"]
    done([*command, "--report_to", "wandb", "tensorboard", "--run_name", "two"], tmp_path, environment=environment)
    records = wandb_records(tmp_path)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (runs[-1].project, runs[-1].entity, runs[-1].display_name, runs[-1].notes) == (
        "mine", "team", "two", "a note"
    )  # fmt: skip
    assert {"first", "second", "recurrent-drafter", "ground_truth"} <= {tag for run in runs for tag in run.tags}
    updates = [u for r in records for u in (*r.config.update, *r.run.config.update)]
    config = {update.key or "/".join(update.nested_key): update.value_json for update in updates}
    assert config["draft_vocab_size"] and config["drafter_num_layers"] == "2" and config["exit_dim"]
    logged = {item.key or "/".join(item.nested_key) for record in records for item in record.history.item}
    assert {"train/loss", "eval/tokens_per_step"} <= logged
    assert {"train/global_step", "gradients/rnn_u.weight"} & logged
    artifacts = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    assert any(alias.startswith("checkpoint") for artifact in artifacts for alias in artifact.aliases)
    assert scalars(tmp_path / "out")["train/loss"]


def test_a_stream_trains_too_and_early_stopping_stops(tmp_path):
    command = [*SMALL, *conversations(tmp_path), "--streaming", "--shuffle_buffer", "20", "--max_steps", "40"]
    command += ["--save_steps", "1", "--early_stopping_patience", "1", "--learning_rate", "0", "--output_dir", "out"]
    out = done([*command, "--use_knowledge_distillation"], tmp_path)
    assert "step 2: held-out" in out and "step 4: held-out" not in out


def test_a_stream_goes_on_with_the_data_that_it_began_with_and_no_other(tmp_path):
    data = conversations(tmp_path, 120)
    command = [*SMALL, *data, "--streaming", "--shuffle_buffer", "20", "--save_steps", "6", "--output_dir", "out"]
    done([*command, "--max_steps", "6"], tmp_path)
    resume = ["--max_steps", "12", "--resume_from_checkpoint", "True"]
    read = json.loads((tmp_path / "out/checkpoint-6/run.json").read_text())["data"]
    assert 20 < read["kept"] < 120 and len(read["sha256"]) == 64
    lines = (tmp_path / "few.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join([*lines[:25], *lines[60:]]))  # the first buffer is the same
    assert "few.jsonl does not begin with the" in refused([*command, *resume], tmp_path)
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    done([*command, *resume], tmp_path)
    more = json.loads((tmp_path / "out/checkpoint-12/run.json").read_text())["data"]
    assert more["kept"] > read["kept"] and more["sha256"] != read["sha256"]


def test_questions_are_answered_by_the_verifier_first(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"turns": [f"What is {n} plus 2?", "And twice that?"]}) for n in range(8)))
    command = [*DEMO, *FEW, "--model_max_length", "96", "--draft_vocab_size", "512", "--max_steps", "1"]
    out = done([*command, "--dataset_path", str(path), "--train_on_assistant_only", "--output_dir", "out"], tmp_path)
    assert "the verifier's own greedy replies are the answers" in out


def test_an_estimate_trains_nothing(tmp_path):
    command = ["recurrent-drafter", "train", "--estimate", "--llm_name_or_path", "demo", *FEW]
    command += ["--model_max_length", "64", *conversations(tmp_path), "--use_distilled_dataset"]
    out = done(command, tmp_path)
    for what in ("a plain step takes", "break-even tokens per step", "ceiling", "training: ", "distilling", "memory: "):
        assert what in out
    assert not (tmp_path / "models").exists()


def refused(argv, folder, **options):
    ended = Command(argv, folder, **options).ended()
    assert ended.code == 2, ended.out + ended.err
    return ended.err.splitlines()[-1]


def test_a_tracker_without_a_login(tmp_path):
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    command = [*SMALL, *conversations(tmp_path), "--max_steps", "1", "--report_to", "wandb", "--output_dir", "out"]
    assert "Weights & Biases: " in refused(command, tmp_path, environment=environment)


def test_a_full_disk(tmp_path):
    command = [*SMALL, *conversations(tmp_path), "--max_steps", "2", "--save_steps", "1", "--output_dir", "out"]
    line = refused(command, tmp_path, environment={"FILE_LIMIT": "300000"})
    assert line.startswith("error: ") and "could not be written" in line and "make room" in line


def test_a_full_disk_while_distilling(tmp_path):
    command = [*SMALL, *conversations(tmp_path), "--max_steps", "2", "--use_distilled_dataset", "--output_dir", "out"]
    line = refused(command, tmp_path, environment={"FILE_LIMIT": "20000"})
    assert line.startswith("error: ") and "could not be written" in line and "make room" in line
    (store,) = (tmp_path / "out").glob("distilled-*")
    assert [path.name for path in store.iterdir()] == ["manifest.json"]  # no torn shard


def test_sharding_that_is_not_to_be_had_here(tmp_path):
    command = [*SMALL, *conversations(tmp_path), "--max_steps", "1", "--output_dir", "out"]
    assert "Using fsdp only works in distributed training" in refused([*command, "--fsdp", "full_shard"], tmp_path)
    (tmp_path / "zero.json").write_text("{}")
    deepspeed = [*command, "--deepspeed", "zero.json"]
    if not is_deepspeed_available():
        assert "--deepspeed needs DeepSpeed, which is not installed here" in refused(deepspeed, tmp_path)


def test_a_loss_that_is_not_a_number(tmp_path):
    command = [*SMALL, *conversations(tmp_path), "--max_steps", "9", "--save_steps", "1", "--learning_rate", "1e30"]
    line = refused([*command, "--max_grad_norm", "0", "--warmup_steps", "0", "--output_dir", "out"], tmp_path)
    assert re.search(r"loss is (nan|inf) at step \d, on training examples \d|weights are not numbers", line), line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model_max_length", "100000"], "demo has a context of"),
        (["--eval_max_new_tokens", "100000"], "demo has a context of"),
        (["--drafter_predict_n_tokens", "200"], "no text goes on for more than"),
        (["--draft_vocab_size", "1000000"], "--draft_vocab_size is 1000000"),
        (["--chat_template", "nowhere.jinja"], "neither a Jinja template nor a file"),
        (["--chat_template", "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}"],
         "generation marks cover no reply"),
        (["--dataset_path", "text.txt"], "this is plain text"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on(flags, expected, tmp_path):
    data = conversations(tmp_path, 30)
    (tmp_path / "text.txt").write_text("Mars is a red planet.\n\n" * 900)
    flags = flags if "--dataset_path" in flags else [*data, *flags]
    line = refused([*SMALL, "--train_on_assistant_only", *flags, "--output_dir", "out"], tmp_path)
    assert line.startswith("error: ") and expected in line
