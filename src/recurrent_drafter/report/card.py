"""The card of a published drafter: what is known of it, each figure with the command that measured it."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from recurrent_drafter.bench.columns import ARMS, NONE, recorded_rows
from recurrent_drafter.formats.hub_names import is_hub_name
from recurrent_drafter.measure.ruler import Estimate
from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.report.tables import Columns, markdown, markdown_table

Record = Mapping[str, Any]
UNSTATED = "not-stated"


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of; a record that there is none of is empty."""

    config: RecurrentDraftingConfig
    parameters: int
    base_model: str
    license: str | None = None
    run: Record = field(default_factory=dict)
    verified: Record = field(default_factory=dict)
    tuning: Record = field(default_factory=dict)
    bench: Sequence[Record] = ()


def model_card(repo_id: str, known: CardFacts) -> str:
    """README.md of the repository, with its front matter."""
    linked = is_hub_name(known.base_model)
    data = ModelCardData(
        base_model=known.base_model if linked else None,
        library_name="transformers",
        license=known.license or "other",
        license_name=None if known.license else UNSTATED,
        pipeline_tag="text-generation",
        tags=["custom_generate", "recurrent-drafter", "speculative-decoding"],
    )
    parts = [*_opening(repo_id, known, linked), *_use(repo_id, known.base_model), *_verification(known.verified)]
    figures = [*_training(known.run), *_tuning(known.tuning), *_bench(known.bench)]
    parts += ["## Figures", *(figures or ["None were recorded."])]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _opening(repo_id: str, known: CardFacts, linked: bool) -> Iterator[str]:
    config, base = known.config, known.base_model
    name = f"[{base}](https://huggingface.co/{base})" if linked else f"`{base}`"
    yield f"# {repo_id.partition('/')[2]}"
    yield (
        f"A recurrent drafter (ReDrafter, [arXiv 2403.09919](https://arxiv.org/abs/2403.09919)) for {name}. It makes "
        "that model generate faster and changes none of its tokens: the model verifies every draft, and its own choice "
        "is what is written. It drafts for this one model and is of no use alone."
    )
    residual = f"{config.num_draft_layers} residual layers"
    state = "recurrent state" if config.rnn else "sum of embeddings"
    shape = config.draft_shape
    license = known.license or f"not stated by its publisher; the terms of {name} and of the training data apply"
    rows = {
        "verifier": f"{name}: width {config.hidden_size:,}, vocabulary {config.vocab_size:,}",
        "drafter": f"{known.parameters:,} parameters: {state}, {residual} of width {config.exit_dim:,}",
        "draft vocabulary": f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens",
        "saved shape of draft": f"{shape.beam_width} beams of {shape.beam_length} tokens, {shape.nodes} nodes at most",
        "license": license,
    }
    yield markdown_table(["", ""], list(rows.items()))


def _use(repo_id: str, base_model: str) -> Iterator[str]:
    imported, name = "", f'"{base_model}"'
    if base_model == "demo":
        imported, name = "\nfrom recurrent_drafter.assets import demo_verifier_path", "demo_verifier_path()"
    yield "## Use"
    yield "With the package `recurrent-drafter` installed, transformers alone is imported:"
    yield f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer{imported}

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(**inputs, custom_generate="{repo_id}", trust_remote_code=True, max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
    yield (
        "Sampling, batches, a `streamer` and `stop_strings` work as in `generate`; the same `seed=` gives the same "
        "sampled tokens. From a shell:"
    )
    command = ["python", "generate_speculator.py", "--base_model", base_model, "--speculator_path", repo_id]
    yield _command([*command, "--interactive"])


def _verification(verified: Record) -> Iterator[str]:
    yield "## Verification"
    if not verified:
        yield "**This drafter was published without a passed verification.** Verify it before you rely on it."
        return
    yield (
        f"Output compared token by token on {verified['prompts']} prompts, {_dtype(verified)}, "
        f"{_machine(verified)}. A tie is a difference that rounding explains."
    )
    rows = []
    for name, pairs in verified["counts"].items():
        for pair in pairs:
            per_step = "" if pair["tokens_per_step"] is None else f"{pair['tokens_per_step']:.2f}"
            counts = (str(pair.get(kind, 0)) for kind in ("identical", "tie", "BUG"))
            rows.append([name, pair["candidate"], per_step, pair["reference"], *counts])
    yield markdown_table(["pass", "decoding", "tokens/step", "against", "identical", "ties", "bugs"], rows)
    yield _command(["recurrent-drafter", "verify", *verified["argv"]])


def _training(run: Record) -> Iterator[str]:
    if not run:
        return
    yield "### Training"
    metrics, data = run.get("metrics") or {}, run.get("data") or {}
    said = [f"Method: {str(run.get('method', 'not recorded')).replace('_', ' ')}", f"{_made(run)}, {_machine(run)}"]
    if data:
        said.append(f"data {data['source']}: {data['kept']:,} conversations or texts (sha256 {data['sha256'][:16]}...)")
    yield "; ".join(said) + "."
    names = ["eval_tokens_per_step", *sorted(name for name in metrics if name.startswith("eval_acceptance_pos"))]
    rows = [[name, f"{metrics[name]:.3f}"] for name in names if name in metrics]
    if rows:
        yield markdown_table(["on held-out prompts, greedy, by the acceptance walk", ""], rows)
    if run["argv"]:  # else it was trained from Python
        yield _command(["python", *run["argv"]])


def _tuning(tuning: Record) -> Iterator[str]:
    if not tuning:
        return
    yield "### Speed by shape of draft"
    asked = tuning["asked"]
    protocol = f"{'sustained, exactly' if asked['sustained'] else 'reply, up to'} {asked['new_tokens']} new tokens"
    yield f"{protocol}, greedy, {tuning['dtype']}, {_machine(tuning)}; over autoregression, with 95 % intervals."
    rows = [(batch["batch_size"], *item) for batch in tuning["batches"] for item in batch["decoded"].items()]
    columns: Columns = {
        "batch": lambda row: str(row[0]),
        "shape": lambda row: row[1],
        "tokens/step": lambda row: f"{row[2]['tokens_per_step']:.2f}",
        "speed-up": lambda row: f"{Estimate(*row[2]['speedup']):.2f}",
        "decoding only": lambda row: f"{Estimate(*row[2].get('decoding_only', [NONE])):.2f}",  # older files lack it
    }
    yield markdown(rows, columns).rstrip()
    yield _command(["recurrent-drafter", "tune", *tuning["argv"]])


def _bench(bench: Sequence[Record]) -> Iterator[str]:
    if not bench:
        return
    made = next(record for record in bench if record["kind"] == "circumstances")
    options = made["options"]
    protocol = f"{'reply, up to' if options['reply'] else 'sustained, exactly'} {options['new_tokens']} new tokens"
    how = "greedy" if options["temperature"] == 0 else f"temperature {options['temperature']:g}"
    yield "### Ways of decoding compared"
    yield f"{protocol}, {how}, batch {options['batch_size']}, {_machine(made)}."
    yield markdown(recorded_rows([dict(record) for record in bench]), ARMS).rstrip()
    yield _command(["recurrent-drafter", "bench", *made["argv"]])


def _command(words: Sequence[str]) -> str:
    return f"```bash\n{shlex.join(words)}\n```"


def _machine(record: Record) -> str:
    hardware = record["hardware"]
    return f"{hardware['device']}, threads: {hardware['threads']}"


def _made(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"made {record['date']} with {versions}"


def _dtype(record: Record) -> str:
    return str(record["dtype"]).removeprefix("torch.")
