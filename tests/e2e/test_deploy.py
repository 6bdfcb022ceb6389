"""A drafter goes to a Hub and comes back: what is published, what is refused, and who never sees the token."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_stand_in import TOKEN, USER, Repository, hub_running
from huggingface_hub import ModelCard, constants
from running import ROOT, Command

from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path
from recurrent_drafter.cli.main import launch
from recurrent_drafter.records.provenance import RUN_RECORD, provenance, write_json

NAME = f"{USER}/demo-drafter"
FEW = ["--prompts", "2", "--new_tokens", "8", "--dtype", "float32"]
NO_VERIFICATION = "was never verified"
COMMAND = "huggingface_deployment.py"


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    """A drafter that was verified and tuned, with all of its records and a bench file."""
    folder = tmp_path_factory.mktemp("published") / "drafter"
    shutil.copytree(demo_drafter_path(), folder)
    pair = ["--base_model", "demo", "--speculator_path", str(folder)]
    assert launch("verify", [*pair, *FEW]) == 0
    assert launch("tune", [*pair, *FEW, "--widths", "2", "--lengths", "3", "--confirm", "1"]) == 0
    assert launch("bench", [*pair, *FEW, "--output_file", str(folder.parent / "bench.jsonl")]) == 0
    argv = ["train_speculator.py", "--quick", "--hub_token", TOKEN, f"--token={TOKEN}"]
    metrics = {"eval_tokens_per_step": 5.25, "eval_acceptance_pos1": 0.75, "eval_loss": 1.5}
    data = {"source": "demo", "kept": 1500, "sha256": "ab" * 32}
    run = {"method": "distilled_dataset", "data": data, "metrics": metrics}
    write_json(folder / RUN_RECORD, provenance(argv) | run)
    return folder


@pytest.fixture
def copied(drafter, tmp_path):
    return shutil.copytree(drafter, tmp_path / "drafter")


@pytest.fixture
def online(monkeypatch):
    """A Hub that this process reaches."""
    with hub_running() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def python(hub, folder, *argv, token=TOKEN):
    """Run a program of its own that reaches the Hub as users do: by the environment."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


CONSUMER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
verifier, name = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(verifier, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(verifier)
asked = [{"role": "user", "content": "I need a table for two in San Jose."}]
inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": [-1], "pad_token_id": 0}
own = model.generate(**inputs, **options)
assert own.shape[1] == inputs["input_ids"].shape[1] + 40
assert "recurrent_drafter" not in sys.modules
drafted = {"custom_generate": name, "trust_remote_code": True}
assert own.tolist() == model.generate(**inputs, **options, **drafted).tolist()
pieces, passes = [], []
class Streamer:
    put, end = (lambda self, tokens: pieces.extend(tokens.flatten().tolist())), (lambda self: None)
model.register_forward_hook(lambda *_: passes.append(1))
again = model.generate(inputs["input_ids"], **options, **drafted, streamer=Streamer())
assert own.tolist() == again.tolist() == [pieces]
assert len(passes) < 25, passes
from recurrent_drafter import RecurrentDraftingSpeculator, hub
assert hub.loaded.cache_info().hits == 1 and hub.loaded.cache_info().misses == 1
drafter = RecurrentDraftingSpeculator.from_pretrained(name).drafter
drafter.save_pretrained("again")
print("equal")
"""


def test_there_and_back(drafter, tmp_path):
    """Published by the script, loaded from the Hub inside `generate`, in programs of their own."""
    argv = ["--model_path", drafter, "--repo_name", NAME, "--private", "--license", "cc-by-sa-4.0"]
    argv += ["--bench_file", drafter.parent / "bench.jsonl", "--commit_message", "A first drafter"]
    before = {path: path.read_bytes() for path in drafter.rglob("*")}
    with hub_running(large=r"\.safetensors$") as hub:
        ended = python(hub, tmp_path, ROOT / COMMAND, *argv)
        assert ended.returncode == 0, ended.stderr
        held = hub.repositories[NAME]
        assert f"published: {hub.url}/{NAME}/commit/{held.sha}" in ended.stdout
        assert held.private and held.messages == ["A first drafter"] and hub.writes == 1
        assert held.files.keys() == {
            *("README.md", "config.json", "model.safetensors", "run.json", "tuning.json", "verify.json"),
            *("custom_generate/generate.py", "custom_generate/requirements.txt"),
        }
        for name in ("config.json", "model.safetensors", "run.json", "tuning.json", "verify.json"):
            assert held.files[name] == (drafter / name).read_bytes()
        everything = ended.stdout + ended.stderr + "".join(map(repr, held.files.values()))
        assert TOKEN not in everything
        (tmp_path / "use.py").write_text(CONSUMER)
        used = python(hub, tmp_path, "use.py", demo_verifier_path(), NAME)
        assert used.returncode == 0, used.stderr
        assert used.stdout.endswith("equal\n")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (drafter / "model.safetensors").read_bytes()
    assert {path: path.read_bytes() for path in drafter.rglob("*")} == before
    check_card(held.files["README.md"].decode())


def check_card(text):
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["license"] == "cc-by-sa-4.0" and "custom_generate" in data["tags"]
    assert "base_model" not in data  # the bundled model is not on the Hub
    for shown in (
        f'custom_generate="{NAME}", trust_remote_code=True',
        "| eval_tokens_per_step | 5.250 |",
        "python train_speculator.py --quick --hub_token '***' '--token=***'",
        "recurrent-drafter verify --base_model demo",
        "recurrent-drafter tune --base_model demo",
        "recurrent-drafter bench --base_model demo",
        "| greedy | speculation |",
        "| 1 | 2 x 3, ",
        "1,500 conversations",
    ):
        assert shown in text, shown


def publish(drafter, *more):
    return launch("deploy", ["--model_path", str(drafter), "--repo_name", NAME, *more])


def test_a_newer_drafter_takes_the_place_of_the_older(copied, online, capsys):
    assert publish(copied, "--base_model", "gpt2") == 0
    held = online.repositories[NAME]
    data = ModelCard(held.files["README.md"].decode()).data
    assert (data.base_model, data.license, data.license_name) == ("gpt2", "other", "not-stated")
    served = json.loads(held.files["config.json"])
    assert served["verifier_name_or_path"] == served["speculators_config"]["verifier"]["name_or_path"] == "gpt2"
    assert not held.private
    (copied / "tuning.json").unlink()
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "beam_width": 2}))
    assert publish(copied) == 2
    assert "of other weights or another config" in capsys.readouterr().err and online.writes == 1
    assert publish(copied, "--unverified") == 0
    assert json.loads(held.files["config.json"])["beam_width"] == 2
    assert {"run.json"} == {name for name in held.files if name.endswith(".json")} - {"config.json"}
    assert "without a passed verification" in held.files["README.md"].decode()


def test_what_the_hub_refuses(drafter, online, capsys, monkeypatch):
    def refused(*more, repository=NAME):
        assert launch("deploy", ["--model_path", str(drafter), "--repo_name", repository, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and len(line) < 400 and "hf_" not in line
        assert online.writes == 0
        return line

    assert "does not know this access token" in refused("--token", "hf_" + "wrong" * 8)
    assert "may not write there" in refused(repository="somebody/else")
    assert "Invalid metadata in README.md" in refused("--license", "beerware")
    online.repositories[NAME] = Repository(private=False, files={"config.json": b'{"model_type": "gpt2"}'})
    assert "holds a model of type 'gpt2'" in refused()
    online.repositories[NAME] = Repository(private=False)
    assert "exists and is public" in refused("--private")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in refused()


def test_a_failed_verification_is_not_published(copied, tmp_path, capsys):
    record = json.loads((copied / "verify.json").read_text())
    for wrong, message in (({**record, "bugs": 3}, "found 3 bugs"), ({}, "cannot be read")):
        (copied / "verify.json").write_text(json.dumps(wrong))
        assert publish(copied, "--dry_run", "--output_dir", str(tmp_path / "upload")) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "upload").exists()


def test_a_token_in_a_record_is_not_published(copied, tmp_path, capsys):
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**record, "note": TOKEN}))
    assert publish(copied, "--dry_run", "--output_dir", str(tmp_path / "upload")) == 2
    said = capsys.readouterr().err
    assert "holds what looks like an access token" in said and TOKEN not in said
    assert list(tmp_path.glob("upload/*")) == []


def test_a_dry_run_writes_what_would_be_uploaded(drafter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert publish(drafter, "--dry_run") == 0
    assert (tmp_path / "demo-drafter-upload/custom_generate/generate.py").is_file()
    assert publish(drafter, "--dry_run") == 2
    assert "demo-drafter-upload is not empty" in capsys.readouterr().err


def test_from_a_local_folder(drafter, tmp_path):
    """Transformers does not tell where it is: the drafter is named beside."""
    from models import prompts, random_drafter, tiny_model

    model, (ids, mask) = tiny_model("llama"), prompts(2)
    random_drafter().save_pretrained(tmp_path / "one")
    argv = ["--model_path", str(tmp_path / "one"), "--repo_name", NAME, "--dry_run", "--unverified"]
    assert launch("deploy", [*argv, "--output_dir", str(tmp_path / "none")]) == 2  # a drafter of nobody knows what
    argv += ["--base_model", "gpt2"]
    assert launch("deploy", [*argv, "--output_dir", str(tmp_path / "two")]) == 0
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    options |= {"custom_generate": str(tmp_path / "two"), "trust_remote_code": True}
    own = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert model.generate(**options, drafter=str(tmp_path / "two")).tolist() == own.tolist()
    with pytest.raises(ValueError, match="pass drafter=FOLDER too"):
        model.generate(**options)


HERE = ["--model_path", "./drafter"]
CASES = {
    "no such folder": (["--model_path", "./nowhere", "--repo_name", NAME], "no drafter at nowhere"),
    "a name that is none": ([*HERE, "--repo_name", "a/b/c"], "expected user/name"),
    "forbidden characters": ([*HERE, "--repo_name", "me/dr@fter"], "expected user/name"),
    "two hyphens": ([*HERE, "--repo_name", "me/a--b"], "Cannot have -- or .."),
    "no owner": ([*HERE, "--repo_name", "drafter"], "has no owner"),
    "no name": (HERE, "--repo_name"),
    "no token": ([*HERE, "--repo_name", NAME, "--unverified"], "there is no access token"),
    "an unknown flag": ([*HERE, "--repo_name", NAME, f"--tokne={TOKEN}"], "unknown argument --tokne ("),
    "never verified": ([*HERE, "--repo_name", NAME, "--dry_run"], NO_VERIFICATION),
    "a folder for nothing": ([*HERE, "--repo_name", NAME, "--output_dir", "x"], "without --dry_run"),
    "a path for a base": ([*HERE, "--repo_name", NAME, "--base_model", "./drafter"], "no name on the Hub"),
    "no bench file": (
        [*HERE, "--repo_name", NAME, "--dry_run", "--unverified", "--bench_file", "none"],
        "--bench_file none cannot be read",
    ),
    "another file": (
        [*HERE, "--repo_name", NAME, "--dry_run", "--unverified", "--bench_file", "drafter/config.json"],
        "is not what recurrent-drafter bench",
    ),
    "a cut drafter": (["--model_path", "./cut", "--repo_name", NAME, "--dry_run"], "is damaged"),
    "a damaged record": (["--model_path", "./odd", "--repo_name", NAME, "--dry_run", "--unverified"], "run.json"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    for name in ("drafter", "cut", "odd"):
        shutil.copytree(demo_drafter_path(), folder / name)
    (folder / "odd/run.json").write_text('{"argv": [')
    weights = folder / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case, folder):
    argv, expected = CASES[case]
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    ended = Command([COMMAND, *argv], folder, environment={"HF_TOKEN": "", "HF_HUB_OFFLINE": "1"}).ended()
    assert ended.code == 2, ended.out + ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ") and expected in line and TOKEN not in line
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}
    assert after == kept
