"""``test_simple_end_to_end.py`` and ``test_end_to_end.py``: does the whole path work on this machine?

Every step runs the command that a user would run, in a temporary folder, on the bundled data.
"""

import io
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerBase

from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.options.decoding import VerifierOptions
from recurrent_drafter.cli.progress import Meter
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.models.loading import load_drafter, load_verifier
from recurrent_drafter.records.provenance import EVALUATION, RUN_RECORD, read_verification, write_records

CONVERSATIONS = 60
TRAINING = ["--model_max_length", "128", "--draft_vocab_size", "512", "--max_steps", "12", "--learning_rate", "2e-3"]
TRAINING += ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--train_on_assistant_only"]
EVALUATING = ["--eval_max_examples", "4", "--eval_max_new_tokens", "24", "--report_to", "none"]
VERIFICATION = ["--prompts", "3", "--new_tokens", "24", "--batch_size", "2", "--dtype", "float32"]
METHODS = {
    "ground truth": [],
    "distilled": ["--use_distilled_dataset", "--distill_max_examples", "12"],
    "knowledge distillation": ["--use_knowledge_distillation"],
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, dict[str, int]] = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "num_key_value_heads": 2},
    "gpt_neox": SMALL,
}


class StepError(Exception):
    """Why a step failed."""


@dataclass(frozen=True)
class Journey:
    """The path of one drafter: trained for ``model`` with more ``flags``, in a folder of its own."""

    name: str
    model: str
    folder: Path
    flags: Sequence[str] = ()
    publish: bool = False

    @property
    def drafter(self) -> Path:
        return self.folder / "drafter"

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """Each says what it found, or raises StepError."""
        steps = [("train", self.train), ("save", self.save), ("load", self.load), ("decode", self.decode)]
        steps += [("verify", self.verify), ("evaluate", self.evaluate)]
        return [*steps, ("publish (dry run)", self.dry_run)] if self.publish else steps

    def train(self) -> str:
        """A few steps on a few conversations: the loss falls."""
        self._command("train", *self._data(), *TRAINING, *self.flags, "--output_dir", str(self.drafter))
        history = json.loads((self.drafter / RUN_RECORD).read_text())["history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        require(all(map(math.isfinite, losses)), f"the losses are not numbers: {losses}")
        first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
        require(last < first, f"the loss does not fall: {losses}")
        return f"loss {first:.2f} > {last:.2f} in {len(losses)} steps"

    def save(self) -> str:
        """Everything lies there, and the weights are numbers."""
        for name in ("config.json", "model.safetensors", "run.json"):
            require((self.drafter / name).is_file(), f"{name} is missing")
        weights = load_file(self.drafter / "model.safetensors")
        require(all(bool(weight.isfinite().all()) for weight in weights.values()), "weights that are not numbers")
        return f"{sum(weight.numel() for weight in weights.values()):,} weights"

    def load(self) -> str:
        """What is loaded and saved again is the same."""
        load_drafter(self.drafter).save_pretrained(self.folder / "copy")
        one, two = (load_file(folder / "model.safetensors") for folder in (self.drafter, self.folder / "copy"))
        same = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        require(same, "the weights differ once they are loaded and saved again")
        return "the same weights again"

    def decode(self) -> str:
        said = self._command("generate", *self._pair(), "--prompt", "Hello!", "--max_generation_length", "24")
        found = re.search(r"Generated \d+ tokens.*", said)
        require(found is not None, f"no reply: {said}")
        return str(found and found[0])

    def verify(self) -> str:
        """Speculation changes no token, greedy and sampled."""
        self._command("verify", *self._pair(), *VERIFICATION)
        pairs = [pair for found in read_verification(self.drafter)["counts"].values() for pair in found]
        identical, ties = (sum(pair.get(kind, 0) for pair in pairs) for kind in ("identical", "tie"))
        return f"{identical} comparisons identical, {ties} numeric ties, no bug"

    def evaluate(self) -> str:
        """The saved drafter has the acceptance that training ended with."""
        folder = self.folder / "evaluation"
        named = ["--phase", "eval", "--drafter_name_or_path", str(self.drafter), "--output_dir", str(folder)]
        self._command("train", *self._data(), *named)
        records = [json.loads(file.read_text()) for file in (self.drafter / RUN_RECORD, folder / EVALUATION)]
        before, after = (record["metrics"]["eval_tokens_per_step"] for record in records)
        require(math.isclose(before, after, rel_tol=1e-3), f"{after:.3f} tokens per step, in training {before:.3f}")
        return f"{after:.2f} tokens per step on held-out prompts, as in training"

    def dry_run(self) -> str:
        folder = self.folder / "upload"
        named = ["--model_path", str(self.drafter), "--repo_name", "user/drafter", "--output_dir", str(folder)]
        self._command("deploy", *named, "--dry_run")
        files = [file for file in folder.rglob("*") if file.is_file()]
        require(folder / "custom_generate/generate.py" in files, "custom_generate/generate.py is missing")
        return f"{len(files)} files"

    def _data(self) -> list[str]:
        path = str(self.folder.parent / "conversations.jsonl")
        return ["--llm_name_or_path", self.model, "--dataset_path", path, *EVALUATING]

    def _pair(self) -> list[str]:
        return ["--base_model", self.model, "--speculator_path", str(self.drafter)]

    @staticmethod
    def _command(name: str, *argv: str) -> str:
        """Run a command, whose output is shown only where it fails; returns the output."""
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            code = launch(name, argv)
        require(code == 0, f"exit code {code}: {name} {' '.join(argv)}\n{output.getvalue()}")
        return output.getvalue()


def require(holds: bool, message: str) -> None:
    if not holds:
        raise StepError(message)


def simple(options: VerifierOptions, *, argv: list[str]) -> int:
    return check(options, lambda folder, model, _: [Journey(model, model, folder / "one")])


def full(options: VerifierOptions, *, argv: list[str]) -> int:
    return check(options, all_journeys)


def all_journeys(folder: Path, model: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Journey]:
    """The model by every method, then small random models of other architectures with its tokenizer."""
    for number, (method, flags) in enumerate(METHODS.items()):
        yield Journey(f"{model}, {method}", model, folder / f"method-{number}", flags, publish=number == 0)
    for name in ARCHITECTURES:
        random_model(name, tokenizer, folder / f"model-{name}")
        # Hardly a draft of theirs is accepted: what is checked is that rejected ones leave no trace.
        yield Journey(f"random {name}", str(folder / f"model-{name}"), folder / name)


def check(options: VerifierOptions, journeys: Callable[[Path, str, PreTrainedTokenizerBase], Iterable[Journey]]) -> int:
    """Go through the steps, a line for each: 0 if all pass, else 1."""
    _, tokenizer = load_verifier(options.base_model)  # one that cannot be loaded is no failed check
    dialogues = load_dialogues("demo", None, "train", limit=CONVERSATIONS).dialogues
    conversations = [{"messages": [asdict(turn) for turn in dialogue.turns]} for dialogue in dialogues]
    begun, passed, failed = time.monotonic(), 0, 0
    errors = Console(file=sys.stderr)  # not a command's, which are collected
    with tempfile.TemporaryDirectory() as temporary:
        write_records(Path(temporary) / "conversations.jsonl", conversations)
        for journey in journeys(Path(temporary), options.base_model, tokenizer):
            for name, step in journey.steps():
                started = time.monotonic()
                try:
                    with Meter(f"{journey.name}: {name}", console=errors):
                        said = step()
                except Exception as error:  # noqa: BLE001  # however a step fails, it has failed, and others go on
                    reason = str(error) if isinstance(error, StepError) else f"{type(error).__name__}: {error}"
                    print(f"FAIL  {journey.name}: {name}: {reason}\n      (its other steps were not run)", flush=True)
                    failed += 1
                    break
                passed += 1
                print(f"PASS  {journey.name}: {name}: {said} ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"{passed} passed, {failed} failed, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


def random_model(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, **ARCHITECTURES[name]}
    config = CONFIG_MAPPING[name](**{**ends, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
