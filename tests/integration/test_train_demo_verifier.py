"""The recipe of the demo verifier: killed at any moment, it goes on to the same weights."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recurrent_drafter.assets import sample_path
from recurrent_drafter.data.sources import load_dialogues

SCRIPT = Path(__file__).resolve().parents[2] / "dev" / "train_demo_verifier.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT.exists(), reason="dev/ is not part of an installed package"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The full sets' file names, filled from the bundled samples."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("sgd_train.sharegpt.jsonl.gz", 400), ("sgd_dev.sharegpt.jsonl.gz", 3)):
        lines = gzip.decompress(sample_path(name).read_bytes()).splitlines(keepends=True)
        (folder / name).write_bytes(gzip.compress(b"".join(lines[:count])))
    problems = load_dialogues(None, str(sample_path("gsm8k.alpaca.json")), "all").dialogues
    records = [{"messages": [{"role": t.role, "content": t.content} for t in d.turns]} for d in problems]
    text = "\n".join(json.dumps(record) for record in records)
    (folder / "gsm8k_train.sharegpt.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def start(data: Path, output: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output_dir", str(output), "--device", "cpu"]
    settings = ["--max_steps", "6", "--save_steps", "2", "--batch_size", "1", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command + settings, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_run_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    whole = start(data, tmp_path / "whole")
    assert "step 6/6" in whole.communicate(timeout=300)[0] and whole.returncode == 0

    broken = start(data, tmp_path / "broken")
    assert broken.stdout is not None
    while not broken.stdout.readline().startswith("step 2/6"):
        assert broken.poll() is None
    broken.send_signal(signal.SIGKILL)  # in the middle of a later step, or of writing
    broken.communicate(timeout=60)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    resumed = start(data, tmp_path / "broken")
    output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0 and "going on from step" in output

    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    recipe = json.loads((tmp_path / "broken" / "recipe.json").read_text())
    assert recipe["sha256"] == hashlib.sha256(weights[0]).hexdigest()
    measured = start(data, tmp_path, "--eval_only", str(tmp_path / "broken")).communicate(timeout=300)[0]
    assert measured == f"held-out loss {recipe['heldout']['loss']:.4f}\n"
    assert start(data, tmp_path / "broken", "--batch_size", "2").wait(timeout=300) == 2  # another run's checkpoint
