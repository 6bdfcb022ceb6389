"""Killed at any moment and resumed; shared among processes: always the same weights, the same shards."""

import json

import pytest
import torch
from models import tiny_model
from runs import KILLED, run_distillation, run_shards, run_training, texts
from safetensors.torch import load_file

from recurrent_drafter.target_shards import MANIFEST, distilled_dataset
from recurrent_drafter.train import last_checkpoint
from recurrent_drafter.verifier import Verifier


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_training(folder) == [0]
    return folder


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("kill", [{"behind": 1}, {"behind": 5}, {"while_saving": True}])
def test_a_killed_training_ends_with_the_same_weights(kill, whole, tmp_path):
    assert run_training(tmp_path, **kill) == [KILLED]
    newest = last_checkpoint(tmp_path)
    assert (newest and newest.name) == {1: None, 5: "checkpoint-4", None: "checkpoint-2"}[kill.get("behind")]
    assert run_training(tmp_path) == [0]
    ours, theirs = (load_file(folder / "final.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(tmp_path) == losses(whole)
    assert {path.name for path in tmp_path.glob("*")} == {path.name for path in whole.glob("*")}  # nothing left over


def test_two_processes_train_as_one_on_the_same_batches(tmp_path):
    assert run_training(tmp_path / "one", batch=4) == [0]
    assert run_training(tmp_path / "two", batch=2, processes=2) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    # Adam divides by the size of gradients, so that rounding of tiny ones shows.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-4)


def test_a_sharded_drafter_has_the_whole_ones_loss_and_gradient(tmp_path):
    assert run_shards(tmp_path) == [0, 0]
    results = load_file(tmp_path / "shards.safetensors")
    for name in ("loss", "lm_head.2", "rnn_u"):
        torch.testing.assert_close(results[f"sharded.{name}"], results[f"whole.{name}"])


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """An uninterrupted distillation."""
    folder = tmp_path_factory.mktemp("distilled")
    assert run_distillation(folder) == [0]
    return folder


@pytest.mark.parametrize("kill", ["between", "writing"])
def test_a_killed_distillation_ends_with_the_same_shards(kill, distilled, tmp_path):
    assert run_distillation(tmp_path, kill=kill) == [KILLED]
    begun = shards(tmp_path)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in begun}
    assert len(begun) == 3  # the manifest and two shards
    assert run_distillation(tmp_path) == [0]
    assert shards(tmp_path) == shards(distilled)
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in times.items())  # used again


def test_two_processes_distil_what_one_does(distilled, tmp_path):
    assert run_distillation(tmp_path, processes=2) == [0, 0]
    assert shards(tmp_path) == shards(distilled)


def test_a_directory_of_another_distillation_is_refused(tmp_path):
    verifier, examples = Verifier(tiny_model("gpt2")), texts(3)
    done = []
    first = distilled_dataset(verifier, examples, 3, (), tmp_path, on_progress=lambda *counts: done.append(counts))
    assert done == [(3, 3)]
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["settings"]["depths"] == 3 and manifest["shards"] == ["shard-00000.safetensors"]
    assert manifest["hash"]
    before = shards(tmp_path)
    again = distilled_dataset(verifier, examples, 3, (), tmp_path)
    assert shards(tmp_path) == before
    for one, other, example in zip(first, again, examples, strict=True):
        assert torch.equal(one.targets, other.targets) and torch.equal(one.positions, other.positions)
        assert torch.equal(one.input_ids, example.input_ids)
    for change, named in (({"depths": 4}, "depths"), ({"temperature": 1.0}, "temperature"), ({"end_ids": (5,)}, "end")):
        options = {"depths": 3, "end_ids": (), **change}
        with pytest.raises(ValueError, match=f"another run, which differs in {named}"):
            distilled_dataset(verifier, examples, directory=tmp_path, **options)
    with pytest.raises(ValueError, match="differs in verifier"):
        distilled_dataset(Verifier(tiny_model("llama")), examples, 3, (), tmp_path)
    with pytest.raises(ValueError, match="differs in data, texts"):
        distilled_dataset(verifier, examples[:2], 3, (), tmp_path)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"shard-00000.safetensors cannot be read .* remove it"):
        distilled_dataset(verifier, examples, 3, (), tmp_path)
