"""The serving benchmark as a command, with two engines and little to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recurrent_drafter.bench.serving import SYNCHRONOUS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


def test_it_compares_two_engines(tmp_path):
    flags = [
        "--engines",
        SYNCHRONOUS,
        "ours, 4 beams",
        "--no_shed",
        "--concurrency",
        "2",
        "--temperature",
        "0",
        "--quick",
    ]
    command = [sys.executable, "benchmarks/serving.py", *flags, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    turns = {record["arm"]: record for record in records if record["kind"] == "turn"}
    lengths = {len(request["tokens"]) for turn in turns.values() for request in turn["requests"]}
    assert len(turns) == 2 and lengths == {16}
    assert all(request["drafts"] == 0 for request in turns[SYNCHRONOUS]["requests"])
    assert all(request["accepted"] > 0 for request in turns["ours, 4 beams"]["requests"])
    assert not [record["bugs"] for record in records if record["kind"] == "equality" and record["bugs"]]
    assert "| ours, 4 beams |" in (tmp_path / "table.md").read_text()
