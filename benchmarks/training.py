"""What training costs: distillation and the drafter's loss, each against the straightforward way.

    python benchmarks/training.py --quick --output training.jsonl

Both on the GPT-2-small shape with random weights: what is measured does not depend on what the model says. Times are
processor seconds of one process (``torch.set_num_threads(1)``): other work on the machine disturbs them least.
"""

import argparse
import multiprocessing
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from recurrent_drafter import RecurrentDrafter, RecurrentDraftingConfig
from recurrent_drafter.core.losses import IGNORED, cross_entropy, depth_weights
from recurrent_drafter.measure.replies import left_padded
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.provenance import hardware, peak_bytes, write_records
from recurrent_drafter.report.document import markdown_table
from recurrent_drafter.training.distillation import distilled_targets, packed_for_passes
from recurrent_drafter.training.loss import roots_at_a_time

SHARE = 0.5  # of positions under the loss mask


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least processor time of some runs."""
    return min(timeit.repeat(work, number=1, repeat=repeats, timer=time.process_time))


def prefixes(length: int, blocks: int, width: int) -> list[torch.Tensor]:
    """Blocks of neighboring positions whose mean is the middle of the text, as those of all positions is."""
    centers = [(2 * block + 1) * length // (2 * blocks) for block in range(blocks)]
    return [torch.arange(center - width // 2, center - width // 2 + width) for center in centers]


@torch.inference_mode()
def generated(model: GPT2LMHeadModel, text: torch.Tensor, positions: torch.Tensor, depths: int) -> torch.Tensor:
    """Per-position `generate`: each prefix encoded anew, a batch of them, left-padded."""
    ids, mask = left_padded([text[: position + 1] for position in positions.tolist()], text.device)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=depths, do_sample=False)
    return output[:, ids.shape[1] :]


def distillation(length: int, depths: int, blocks: int, repeats: int) -> dict[str, object]:
    """Positions per second, and how many ordinary forward passes all of them cost."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    verifier = Verifier(model)
    text = torch.randint(model.config.vocab_size, (length,))
    roots = torch.ones(length, dtype=torch.bool)
    targets = distilled_targets(verifier, text, roots, depths, ())  # and warm-up
    sample = prefixes(length, blocks, 8)
    own = torch.cat([generated(model, text, block, depths) for block in sample])
    with torch.inference_mode():
        forward = seconds(lambda: model(text[None], use_cache=False).logits, repeats)
    with packed_for_passes(verifier):  # once for many texts, as `distilled_dataset` does
        ours = seconds(lambda: distilled_targets(verifier, text, roots, depths, ()), repeats)
    theirs = seconds(lambda: [generated(model, text, block, depths) for block in sample], 1) / (8 * blocks)
    same = (targets[torch.cat(sample)] == own).all(1)
    return {
        "part": "distillation",
        "length": length,
        "depths": depths,
        "sampled_positions": 8 * blocks,
        "sampled_positions_equal": int(same.sum()),
        "seconds_distilled_targets": ours,
        "seconds_forward": forward,
        "positions_per_second": length / ours,
        "positions_per_second_generate": 1 / theirs,
        "times_generate": theirs * length / ours,
        "times_forwards": ours / (depths * forward),
    }


def drafter_part(arm: str, batch: int, length: int, depths: int) -> dict[str, Any]:
    """Loss and gradient of a batch, twice: time, peak memory and gradients, which are not sent as tensors."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = RecurrentDraftingConfig(hidden_size=768, vocab_size=50257)
    drafter = RecurrentDrafter(config)
    positions = batch * length
    hidden, embedded = torch.randn(positions, 768), torch.randn(positions, depths, 768)
    labels = torch.randint(config.vocab_size, (positions, depths))
    rooted = torch.rand(positions) < SHARE
    weights = depth_weights(rooted.sum().expand(depths), 1.0)

    def straightforward() -> None:
        logits = drafter(hidden, embedded)  # (B S, K, V)
        masked = labels.masked_fill(~rooted[:, None], IGNORED)
        losses = [functional.cross_entropy(logits[:, k], masked[:, k], ignore_index=IGNORED) for k in range(depths)]
        torch.stack(losses).mean().backward()

    def ours() -> None:
        targets = labels[rooted]

        def loss(logits: torch.Tensor, some: slice) -> torch.Tensor:
            return (weights * cross_entropy(logits, targets[some])).sum()

        drafter(hidden[rooted], embedded[rooted], loss, roots_at_a_time(drafter.draft_ids, depths)).backward()

    def work() -> None:
        drafter.zero_grad()
        {"straightforward": straightforward, "ours": ours}[arm]()

    before, least = peak_bytes(), seconds(work, 2)
    gradients = [parameter.grad.numpy() for parameter in drafter.parameters()]
    return {"seconds": least, "bytes": peak_bytes() - before, "gradients": gradients}


def training(batch: int, length: int, depths: int) -> dict[str, object]:
    """The drafter's forward and backward pass, gradients compared."""
    results = {}
    for arm in ("straightforward", "ours"):
        # a process of its own: peak memory never falls
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results[arm] = process.submit(drafter_part, arm, batch, length, depths).result()
    plain, ours = results["straightforward"], results["ours"]
    pairs = zip(ours["gradients"], plain["gradients"], strict=True)
    error = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    if error > 1e-4:
        raise RuntimeError(f"gradients differ by {error:.1e} of their size")
    return {
        "part": "training",
        "batch": batch,
        "length": length,
        "depths": depths,
        "share_of_positions": SHARE,
        "gradient_error": error,
        "seconds": ours["seconds"],
        "seconds_straightforward": plain["seconds"],
        "times_as_fast": plain["seconds"] / ours["seconds"],
        "peak_bytes": ours["bytes"],
        "peak_bytes_straightforward": plain["bytes"],
        "share_of_memory": ours["bytes"] / plain["bytes"],
    }


def gates(result: dict) -> list[tuple[str, float, str]]:
    if result["part"] == "training":
        speed, memory = result["times_as_fast"], result["share_of_memory"]
        return [
            ("training: speed of the drafter's part over the plain loop", speed, f">= {0.85 / SHARE}"),
            ("training: peak memory beyond the weights, over the plain loop's", memory, "<= 0.25"),
        ]
    sampled = f"{result['sampled_positions_equal']} of {result['sampled_positions']} sampled positions equal"
    return [
        (f"distillation: speed over per-position `generate` ({sampled})", result["times_generate"], ">= 40"),
        ("distillation: time over that of K plain forward passes", result["times_forwards"], "<= 1.5"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and smaller batches: minutes")
    parts = ["distillation", "training"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--output", type=Path, default=Path("training.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    blocks, repeats, batch, length = (3, 2, 4, 256) if options.quick else (8, 3, 4, 512)
    measure = {
        "distillation": lambda: distillation(512, 5, blocks, repeats),
        "training": lambda: training(batch, length, 5),
    }
    facts = {"quick": options.quick, "torch": torch.__version__, **hardware()}
    results = [{**measure[part](), **facts} for part in options.parts]
    write_records(options.output, results)
    rows = [(what, f"{figure:.2f}", goal) for result in results for what, figure, goal in gates(result)]
    print(markdown_table(("what", "figure", "goal"), rows))


if __name__ == "__main__":
    main()
