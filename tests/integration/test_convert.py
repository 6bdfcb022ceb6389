"""Checkpoints of Apple's layout and of ours: the same weights, bit for bit, both ways."""

import json
import shutil

import pytest
import torch
from models import random_drafter, tiny_model
from safetensors.torch import load_file, save_file
from torch.nn import functional

from recurrent_drafter import RecurrentDrafter
from recurrent_drafter.assets import demo_drafter_path, demo_verifier_path
from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.publishing import open_drafter
from recurrent_drafter.models.loading import load_drafter

H, V = 8, 12


def apples(folder, exit_dim=H, layers=2, rnn=True, dtype=torch.float32, **config):
    """A checkpoint as that project's own code saves it."""
    torch.manual_seed(1)
    weights = {}

    def linear(name, rows, columns, bias=True):
        weights[f"{name}.weight"] = torch.randn(rows, columns).to(dtype)
        if bias:
            weights[f"{name}.bias"] = torch.randn(rows).to(dtype)

    if exit_dim != 2 * H:
        linear("input_proj", exit_dim, 2 * H)
    for layer in range(layers):
        linear(f"lm_head.{layer}.linear", exit_dim, exit_dim)
    linear(f"lm_head.{layers}", V, exit_dim, bias=False)
    if rnn:
        linear("rnn_u", H, H)
        linear("rnn_w", H, H, bias=False)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        **{"model_type": "recurrent_drafting_drafter", "architectures": ["Drafter"], "transformers_version": "4.36.0"},
        **{"vocab_size": V, "hidden_size": H, "exit_dim": exit_dim, "num_draft_layers": layers, "rnn": rnn},
        **{"num_lookback_tokens": -1, "torch_dtype": str(dtype).removeprefix("torch."), **config},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return weights


def theirs(weights, layers, rnn, hidden, embedded):
    """Logits of two depths by the formulas of the paper, from the tensors alone."""
    w = {name: tensor.float() for name, tensor in weights.items()}
    state, depths = torch.zeros_like(hidden), []
    for e in embedded.unbind(1):
        if rnn:
            state = functional.silu(e @ w["rnn_w.weight"].T + state @ w["rnn_u.weight"].T + w["rnn_u.bias"])
        else:
            state = e + state
        z = torch.cat([hidden, state], -1)
        if "input_proj.weight" in w:
            z = z @ w["input_proj.weight"].T + w["input_proj.bias"]
        for i in range(layers):
            z = z + functional.silu(z @ w[f"lm_head.{i}.linear.weight"].T + w[f"lm_head.{i}.linear.bias"])
        depths.append(z @ w[f"lm_head.{layers}.weight"].T)
    return torch.stack(depths, 1)


def same(ours, others):
    return ours.keys() == others.keys() and all(
        ours[name].dtype == others[name].dtype and torch.equal(ours[name], others[name]) for name in others
    )


@pytest.mark.parametrize("exit_dim", [H, 2 * H, 5])
@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize(("layers", "dtype"), [(0, torch.bfloat16), (2, torch.float32), (1, torch.float16)])
def test_from_apple_and_back(exit_dim, rnn, layers, dtype, tmp_path):
    weights = apples(tmp_path / "apple", exit_dim, layers, rnn, dtype)
    assert launch("convert", [str(tmp_path / "apple"), str(tmp_path / "ours")]) == 0
    drafter = load_drafter(tmp_path / "ours")
    assert drafter.dtype == dtype
    assert same({name: w for name, w in drafter.state_dict().items() if name != "draft_ids"}, weights)
    assert drafter.draft_ids.tolist() == list(range(V))
    hidden, embedded = torch.randn(3, H), torch.randn(3, 2, H)
    logits = drafter.float().unroll(hidden, embedded)
    torch.testing.assert_close(logits, theirs(weights, layers, rnn, hidden, embedded), rtol=1e-4, atol=1e-4)
    assert launch("convert", [str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "apple"]) == 0
    assert same(load_file(tmp_path / "back/model.safetensors"), weights)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("apple", "back"))
    del before["transformers_version"]
    assert after.items() >= before.items()


def test_to_apple_and_back(tmp_path):
    named = {"verifier_name_or_path": "user/model", "tokenizer_hash": "0123", "verifier_architectures": ["X"]}
    drafter = random_drafter(beam_width=7, beam_length=3, max_tree_nodes=9, exit_dim=16, **named)
    drafter.save_pretrained(tmp_path / "ours")
    assert launch("convert", [str(tmp_path / "ours"), str(tmp_path / "apple"), "--to", "apple"]) == 0
    assert launch("convert", [str(tmp_path / "apple"), str(tmp_path / "back")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_a_verifier_is_named(tmp_path, capsys):
    bundled = RecurrentDrafter.from_pretrained(demo_drafter_path())
    bundled.config.update(dict.fromkeys(("verifier_name_or_path", "verifier_architectures", "tokenizer_hash")))
    bundled.save_pretrained(tmp_path / "nameless")
    assert launch("convert", [str(tmp_path / "nameless"), str(tmp_path / "still")]) == 0
    assert "--verifier NAME adds it" in capsys.readouterr().out
    assert launch("convert", [str(tmp_path / "nameless"), str(tmp_path / "named"), "--verifier", "demo"]) == 0
    assert "--verifier" not in capsys.readouterr().out
    by_path = str(demo_verifier_path())
    assert launch("convert", [str(tmp_path / "nameless"), str(tmp_path / "local"), "--verifier", by_path]) == 0
    assert "names its verifier by a path" in capsys.readouterr().out
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "named" / name).read_bytes() == (demo_drafter_path() / name).read_bytes()


def test_an_empty_target_is_filled(tmp_path):
    apples(tmp_path / "apple")
    (tmp_path / "made").mkdir()
    assert launch("convert", [str(tmp_path / "apple"), str(tmp_path / "made")]) == 0
    assert launch("convert", [str(tmp_path / "apple"), str(tmp_path / "new/deep")]) == 0
    assert (
        open_drafter(tmp_path / "made").config.hidden_size
        == open_drafter(tmp_path / "new/deep").config.hidden_size
        == H
    )


def cut(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:100])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drafters, each with one thing wrong or without a place in the other layout."""
    folder = tmp_path_factory.mktemp("wrong")
    apples(folder / "apple")
    apples(folder / "cut")
    cut(folder / "cut", "model.safetensors")
    apples(folder / "cut_config")
    cut(folder / "cut_config", "config.json")
    apples(folder / "other_shape", exit_dim=5)
    config = json.loads((folder / "apple/config.json").read_text())
    (folder / "other_shape/config.json").write_text(json.dumps(config))
    apples(folder / "unsaid")
    del config["exit_dim"], config["rnn"]
    (folder / "unsaid/config.json").write_text(json.dumps(config))
    apples(folder / "pickled")
    (folder / "pickled/model.safetensors").rename(folder / "pickled/pytorch_model.bin")
    shutil.copytree(demo_drafter_path(), folder / "cut_ours")
    cut(folder / "cut_ours", "model.safetensors")
    random_drafter(emb_norm=True).save_pretrained(folder / "normed")
    shuffled = random_drafter()
    shuffled.draft_ids.copy_(shuffled.draft_ids.flip(0))
    shuffled.save_pretrained(folder / "shuffled")
    random_drafter(draft_vocab_size=40).save_pretrained(folder / "small")
    tiny_model("gpt2").save_pretrained(folder / "model")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    return folder


TO_APPLE = ["--to", "apple"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["./nowhere", "new"], "there is no drafter at ./nowhere"),
        (["user/nowhere", "new"], "could not be fetched from the Hub"),
        (["file", "new"], "there is no drafter at file"),
        (["empty", "new"], "empty holds no config.json"),
        (["model", "new"], "type 'gpt2', expected"),
        (["cut", "new"], "the drafter at cut is damaged"),
        (["cut_ours", "new"], "the drafter at cut_ours is damaged"),
        (["cut_config", "new"], "not a valid JSON file"),
        (["other_shape", "new"], "do not belong together (input_proj.bias)"),
        (["unsaid", "new"], "does not say exit_dim, rnn"),
        (["pickled", "new"], "pickled holds no .safetensors"),
        (["apple", "small"], "small exists already"),
        (["apple", "file"], "file exists already"),
        (["apple", "apple"], "apple exists already"),
        (["apple", "file/new"], "file/new could not be written"),
        (["small", "new", *TO_APPLE], "draft_vocab_size is 40 of 97"),
        (["shuffled", "new", *TO_APPLE], "draft_ids are not 0, 1, 2"),
        (["normed", "new", *TO_APPLE], "emb_norm is on"),
        (["apple", "new", "--to", "ibm"], "invalid choice: 'ibm'"),
        (["apple", "new", "--verifier", "./nowhere"], "there is no model at ./nowhere"),
        (["apple", "new", "--verifier", "./empty"], "could not be loaded"),
        (["apple", "new", "--verifier", "demo"], "verifier of width 8, and this verifier's width is 384"),
        (["apple"], "required: TARGET"),
        (["apple", "new", "one more"], "unknown argument one more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_converted_is_one_line(argv, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert launch("convert", argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1 and len(error) < 400, error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
    assert not (folder / "new").exists()


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recurrent_drafter.formats.apple.save_file", full)
    random_drafter().save_pretrained(tmp_path / "ours")
    assert launch("convert", [str(tmp_path / "ours"), str(tmp_path / "new/one"), *TO_APPLE]) == 2
    assert "new/one could not be written ([Errno 28] No space left" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


def test_a_target_filled_meanwhile_is_left_alone(tmp_path, monkeypatch, capsys):
    from recurrent_drafter.cli import publishing

    def filled(source):
        (tmp_path / "new").mkdir()
        (tmp_path / "new/mine").write_text("mine")
        return located(source)

    located = publishing.located
    monkeypatch.setattr(publishing, "located", filled)
    apples(tmp_path / "apple")
    assert launch("convert", [str(tmp_path / "apple"), str(tmp_path / "new")]) == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple", "new"]


def test_a_config_that_is_no_json_is_said_to_be_the_drafters(folder):
    with pytest.raises(OSError, match="cut_config is damaged .its config.json is no JSON"):
        load_drafter(folder / "cut_config")
