"""Killed at any moment and resumed; shared among processes: always the same weights, the same shards."""

import json
from pathlib import Path

import pytest
import torch
from models import tiny_model
from runs import KILLED, REFUSED, run_distillation, run_shards, run_training, texts
from safetensors.torch import load_file

from recurrent_drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.checkpoints import last_checkpoint
from recurrent_drafter.training.distillation import TokenDraw
from recurrent_drafter.training.target_store import MANIFEST, distilled_dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_training(folder) == [0]
    return folder


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


def final(folder, process=0):
    return load_file(folder / f"final-{process}.safetensors")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kill", [{"after": 1}, {"after": 5}, {"while_saving": True}])
def test_a_killed_training_ends_with_the_same_weights(kill, whole, tmp_path):
    assert run_training(tmp_path, **kill) == [KILLED]
    newest = last_checkpoint(tmp_path)
    assert (newest and newest.name) == {1: None, 5: "checkpoint-4", None: "checkpoint-2"}[kill.get("after")]
    assert run_training(tmp_path) == [0]
    assert same(final(tmp_path), final(whole))
    assert losses(tmp_path) == losses(whole)
    assert {path.name for path in tmp_path.glob("*")} == {path.name for path in whole.glob("*")}  # nothing left over


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A training by one process, in batches of four."""
    folder = tmp_path_factory.mktemp("one")
    assert run_training(folder, per_device_train_batch_size=4) == [0]
    return folder


def close(ours, theirs):
    """Adam divides by the size of gradients, so that rounding of tiny ones shows."""
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-4)


def test_two_processes_train_as_one_on_the_same_batches(one, tmp_path):
    assert run_training(tmp_path, processes=2) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-4)
    close(final(tmp_path), final(one))


def test_processes_that_shard_train_as_one_and_leave_plain_checkpoints(one, tmp_path):
    assert run_training(tmp_path / "whole", processes=2, fsdp="full_shard") == [0, 0]
    assert losses(tmp_path / "whole") == pytest.approx(losses(one), rel=1e-4)
    close(final(tmp_path / "whole"), final(one))
    layers = {name for name, _ in tiny_model("llama").named_parameters() if ".layers." in name}
    assert set(json.loads((tmp_path / "whole/shared.json").read_text())) == layers
    drafter = RecurrentDrafter.from_pretrained(tmp_path / "whole/checkpoint-8")
    assert same(load_file(tmp_path / "whole/checkpoint-8/model.safetensors"), drafter.state_dict())
    assert same(drafter.state_dict(), final(tmp_path / "whole"))

    assert run_training(tmp_path / "killed", processes=2, fsdp="full_shard", after=5) == [KILLED, KILLED]
    assert run_training(tmp_path / "killed", processes=2, fsdp="full_shard") == [0, 0]
    assert same(final(tmp_path / "killed"), final(tmp_path / "whole"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("fsdp", ["", "full_shard"])
def test_all_processes_end_with_the_best_checkpoint(fsdp, tmp_path):
    wild = {"learning_rate": 0.3, "load_best_model_at_end": True, "greater_is_better": False}  # so never the last
    assert run_training(tmp_path, processes=2, fsdp=fsdp, **wild) == [0, 0]
    best = Path((tmp_path / "best").read_text())
    assert best.parent == tmp_path and best.name != "checkpoint-8"
    kept = load_file(best / "model.safetensors")
    assert same(final(tmp_path, 0), kept) and same(final(tmp_path, 1), kept)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"fsdp": True, "on_cpu": True}, "--fsdp shards a drafter on accelerators"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "is sharded by FSDP version 2"),
    ],
)
def test_sharding_that_would_not_be_done_or_would_not_leave_plain_checkpoints(options, why, tmp_path):
    assert run_training(tmp_path, processes=2, **options) == [REFUSED, REFUSED]
    assert all(why in (tmp_path / f"refused-{process}").read_text() for process in range(2))


def test_a_checkpoint_is_resumed_sharded_only_if_it_was_begun_so(tmp_path):
    assert run_training(tmp_path, max_steps=2) == [0]
    assert run_training(tmp_path, processes=2, fsdp=True) == [REFUSED, REFUSED]
    assert "checkpoint-2 was saved without --fsdp" in (tmp_path / "refused-0").read_text()


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
    for change, named in (
        ({"depths": 4}, "depths"),
        ({"draw": TokenDraw(1.0)}, "temperature"),
        ({"end_ids": (5,)}, "end"),
    ):
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
