"""Which targets make the better drafter: the three methods on equal steps, several seeds, held-out replies.

    python benchmarks/methods.py --dataset_path TRAIN --eval_dataset_path DEV --output_dir results/methods

TRAIN and DEV are conversations as `train_speculator.py` takes them. Every drafter is trained by that command on the
same conversations, as many steps, in a process of its own; finished ones are kept and not trained again. Then all of
them are walked along the verifier's greedy replies to the same held-out prompts. The intervals resample replies and
seeds.
"""

import argparse
import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from recurrent_drafter.config import DraftShape
from recurrent_drafter.data import load_dialogues, prompts_from_dialogues
from recurrent_drafter.metrics import Walk
from recurrent_drafter.replies import HeldOutReplies, greedy_replies
from recurrent_drafter.speculator import load_drafter
from recurrent_drafter.stop import as_tuple
from recurrent_drafter.tracking import provenance, write_json
from recurrent_drafter.tune import measure_acceptance
from recurrent_drafter.verifier import Verifier, load_verifier

METHODS = {
    "ground truth": [],
    "knowledge distillation": ["--use_knowledge_distillation"],
    "distilled": ["--use_distilled_dataset", "--distill_max_examples", "1000000"],
}
BASE = "ground truth"
SHAPE = DraftShape(beam_width=3, beam_length=5, max_tree_nodes=12)
PROTOCOLS = {"reply": (300, 128), "sustained": (60, 128)}  # held-out prompts, new tokens


def subset(source: Path, count: int, target: Path) -> Path:
    """``count`` conversations of a file, evenly spread over it."""
    with gzip.open(source, "rt") if source.suffix == ".gz" else source.open() as lines:
        records = list(lines)
    target.write_text("".join(records[:: max(len(records) // count, 1)][:count]))
    return target


def train(method: str, seed: int, data: Path, options: argparse.Namespace) -> Path:
    """A drafter by the training command, unless it is there already."""
    folder = options.output_dir / f"{method.replace(' ', '-')}-{seed}"
    if (folder / "run.json").exists():
        return folder
    # The distilled targets are the same for every seed: one store, found by the hash of what they were made of.
    for store in options.output_dir.glob("distilled-0/distilled-*") if method == "distilled" else ():
        folder.mkdir(exist_ok=True)
        (folder / store.name).symlink_to(store.resolve())
    command = [
        *(sys.executable, "train_speculator.py", "--llm_name_or_path", options.llm_name_or_path),
        *("--dataset_path", str(data), "--eval_dataset_path", options.eval_dataset_path, "--train_on_assistant_only"),
        *("--drafter_predict_n_tokens", str(SHAPE.beam_length), "--draft_vocab_size", "2048", *METHODS[method]),
        *("--max_steps", str(options.max_steps), "--per_device_train_batch_size", "8", "--learning_rate", "2e-3"),
        *("--lr_scheduler_type", "cosine", "--warmup_steps", "10", "--save_strategy", "no"),
        *("--seed", str(seed), "--output_dir", str(folder)),
    ]
    subprocess.run(command, check=True)
    return folder


def held_out(verifier: Verifier, tokenizer: object, path: str, protocol: str) -> HeldOutReplies:
    """The verifier's own replies, to their end or for exactly so many tokens."""
    count, new_tokens = PROTOCOLS[protocol]
    dialogues = load_dialogues(None, path, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=count, max_length=256, fewest=1)
    end_ids = as_tuple(verifier.model.generation_config.eos_token_id) if protocol == "reply" else ()
    return HeldOutReplies(verifier, greedy_replies(verifier, prompts, new_tokens, end_ids))


def counts(walks: dict[str, list[list[Walk]]]) -> dict[str, np.ndarray]:
    """By method (seeds, replies, 2): tokens and steps."""
    return {
        method: np.array([[(walk.tokens, walk.steps) for walk in row] for row in rows])
        for method, rows in walks.items()
    }


def resampled(table: dict[str, np.ndarray], resamples: int = 4000) -> dict[str, np.ndarray]:
    """Tokens per step by method, for draws with replacement of replies and of seeds, the same draws for all methods."""
    generator = np.random.default_rng(0)
    seeds, replies, _ = next(iter(table.values())).shape
    figures: dict[str, list[float]] = {method: [] for method in table}
    for _ in range(resamples):
        chosen = np.ix_(generator.integers(seeds, size=seeds), generator.integers(replies, size=replies))
        for method, walks in table.items():
            tokens, steps = walks[chosen].sum((0, 1))
            figures[method].append(tokens / steps)
    return {method: np.array(values) for method, values in figures.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def summary(table: dict[str, np.ndarray]) -> list[dict[str, object]]:
    """A row for each method: tokens per step by seed and altogether, and the gain over text targets."""
    draws, rows = resampled(table), []
    for method, walks in table.items():
        tokens, steps = walks.sum((0, 1))
        base_tokens, base_steps = table[BASE].sum((0, 1))
        rows.append({
            "method": method,
            "by_seed": [float(row[:, 0].sum() / row[:, 1].sum()) for row in walks],
            "tokens_per_step": float(tokens / steps),
            "interval": interval(draws[method]),
            "gain": float(tokens / steps / (base_tokens / base_steps) - 1),
            "gain_interval": interval(draws[method] / draws[BASE] - 1),
        })  # fmt: skip
    return rows


def markdown(protocol: str, rows: list[dict[str, object]]) -> str:
    lines = [f"| {protocol} | tokens/step | by seed | over {BASE} |", "| --- | --- | --- | --- |"]
    for row in rows:
        (low, high), (least, most) = row["interval"], row["gain_interval"]
        gain = "" if row["method"] == BASE else f"{row['gain']:+.1%} ({least:+.1%} to {most:+.1%})"
        seeds = ", ".join(f"{figure:.2f}" for figure in row["by_seed"])
        lines.append(f"| {row['method']} | {row['tokens_per_step']:.2f} ({low:.2f}-{high:.2f}) | {seeds} | {gain} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--llm_name_or_path", default="demo")
    parser.add_argument("--dataset_path", type=Path, required=True)
    parser.add_argument("--eval_dataset_path", required=True)
    parser.add_argument("--conversations", type=int, default=600, help="to train on, spread over the file")
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train_only", nargs="*", choices=list(METHODS), help="train these, compare nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("results/methods"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    data = subset(options.dataset_path, options.conversations, options.output_dir / "conversations.jsonl")
    trained = {
        method: [train(method, seed, data, options) for seed in options.seeds]
        for method in options.train_only or METHODS
    }
    if options.train_only is not None:
        return 0
    model, tokenizer = load_verifier(options.llm_name_or_path, dtype="float32")
    verifier = Verifier(model)
    drafters = {method: [load_drafter(path).float() for path in paths] for method, paths in trained.items()}
    results = {}
    for protocol in PROTOCOLS:
        replies = held_out(verifier, tokenizer, options.eval_dataset_path, protocol)
        with torch.inference_mode():
            walks = {
                method: [
                    measure_acceptance(replies, one, SHAPE.beam_width, SHAPE.beam_length).walks(
                        SHAPE.beam_length, SHAPE.nodes
                    )
                    for one in those
                ]
                for method, those in drafters.items()
            }
        results[protocol] = summary(counts(walks))
        print(markdown(protocol, results[protocol]), "\n")
    settings = {name: str(value) for name, value in vars(options).items()}
    write_json(options.output_dir / "methods.json", {**provenance(sys.argv), "options": settings, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
