"""Peak memory of commands against transformers' own `generate` of the same model: `python benchmarks/memory.py`.

Each runs in a process of its own, in float32. Exits with 1 if one takes more than its limit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from recurrent_drafter.assets import demo_verifier_path

LIMITS = {"generate": 1.2, "chat": 1.2, "verify": 1.3}  # times transformers' peak
PROMPT = "Describe how a key-value cache is filled."
HF = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompt, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
inputs = AutoTokenizer.from_pretrained(path)(prompt, return_tensors="pt")
model.generate(**inputs, do_sample=False, max_new_tokens=int(tokens))
"""


def made(folder: Path, *, tied: bool) -> Path:
    """A Llama of 0.2 billion random parameters in bfloat16, with the demo model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from recurrent_drafter import RecurrentDrafter, RecurrentDraftingConfig

    tokenizer = AutoTokenizer.from_pretrained(demo_verifier_path())
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "num_attention_heads": 16}
    config = LlamaConfig(**shape, vocab_size=32_000, num_key_value_heads=4, tie_word_embeddings=tied)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = tokenizer.eos_token_id
    path = folder / ("tied" if tied else "untied")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    drafting = RecurrentDraftingConfig(hidden_size=1024, vocab_size=32_000, exit_dim=256, draft_vocab_size=1024)
    RecurrentDrafter(drafting).save_pretrained(drafter_of(path))
    return path


def drafter_of(path: Path) -> Path:
    """Where an untrained drafter for a model that was made lies."""
    return path.with_name(f"{path.name}-drafter")


def peak(arguments: Sequence[str], given: str = "") -> float:
    """The most memory (MiB) that a process of these arguments to Python held. Raises RuntimeError if it failed."""
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as lines:
        lines.write(given.encode())
        lines.seek(0)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdin=lines, stdout=told, stderr=told)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:  # what a command that failed held is no figure
            told.seek(0)
            raise RuntimeError(told.read().decode(errors="replace")[-2000:])
    return used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peaks(path: Path, drafter: Path | None, tokens: int) -> Mapping[str, float]:
    """MiB of transformers, then of each command."""
    pair = ["--base_model", str(path), "--dtype", "float32"]
    pair += ["--speculator_path", str(drafter)] if drafter is not None else []
    command = ["-m", "recurrent_drafter.cli.main"]
    reply = [*command, "generate", *pair, "--max_generation_length", str(tokens)]
    reply += [] if drafter is not None else ["--autoregressive"]
    found = {
        "transformers": peak(["-c", HF, str(path), PROMPT, str(tokens)]),
        "generate": peak([*reply, "--prompt", PROMPT]),
        "chat": peak([*reply, "--interactive"], f"{PROMPT}\n{PROMPT}\n/quit\n"),
    }
    if drafter is not None:
        found["verify"] = peak([*command, "verify", *pair, "--prompts", "3", "--new_tokens", str(tokens)])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder, in place of a tied and an untied model that are made")
    parser.add_argument("--speculator_path", type=Path, help="its drafter; without one replies are plain")
    parser.add_argument("--new_tokens", type=int, default=32)
    options = parser.parse_args()
    exceeded = False
    with tempfile.TemporaryDirectory() as folder:
        if options.model is not None:
            models = {options.model: options.speculator_path}
        else:
            models = {path: drafter_of(path) for path in (made(Path(folder), tied=tied) for tied in (True, False))}
        for path, drafter in models.items():
            own = peaks(path, drafter, options.new_tokens)
            for name, size in own.items():
                ratio = size / own["transformers"]
                limit = f" (at most {LIMITS[name]})" if name in LIMITS else ""
                print(f"{path.name:12} {name:13} {size:8,.0f} MiB {ratio:5.2f}{limit}", flush=True)
                exceeded |= ratio > LIMITS.get(name, ratio)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
