"""Train the demo verifier: a small GPT-2 chat model, from scratch, on two public conversation sets.

    python dev/train_demo_verifier.py --data FOLDER --output_dir models/demo-verifier
    python dev/train_demo_verifier.py --data FOLDER --eval_only demo

FOLDER holds ``sgd_train``, ``gsm8k_train`` and ``sgd_dev`` as ``.sharegpt.jsonl.gz``. Runs on a CPU (hours) or a GPU
(minutes). A run that was killed, at any moment, goes on when the same command is given again, and ends with the same
weights on the same machine: the checkpoint is renamed into place, nothing is drawn at random while training, and the
order of the data follows from the step.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.data.dialogues import DataError, Dialogue
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import render

TRAIN_FILES = ("sgd_train.sharegpt.jsonl.gz", "gsm8k_train.sharegpt.jsonl.gz")
HELD_OUT_FILE, HELD_OUT_COUNT, HELD_OUT_LENGTH = "sgd_dev.sharegpt.jsonl.gz", 150, 512
BOUNDARY, PAD, END = "<|endoftext|>", "<|pad|>", "<|end|>"
SPECIALS = [BOUNDARY, PAD, "<|user|>", "<|assistant|>", "<|system|>", END]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """One course of the learning rate: warm-up, constant up to a share of the steps, then linear to a floor."""

    lr: float
    steps: int
    warmup: int
    constant: float  # share of the steps after which the rate begins to fall
    floor: float  # share of ``lr`` at the end

    def rate(self, step: int) -> float:
        """Of a step, counted from 0 within the stage."""
        begin = self.constant * self.steps
        fall = max(0.0, (step - begin) / max(1.0, self.steps - begin))
        return self.lr * min(1.0, (step + 1) / self.warmup) * (1 - (1 - self.floor) * fall)


# 780 and 520 steps of 20 x 384 tokens: 5.99 and 3.99 million tokens.
STAGES = (Stage(1.5e-3, 780, 60, 0.55, 0.03), Stage(1.2e-3, 520, 30, 0.0, 0.02))
VOCABULARY, POSITIONS, LENGTH, WEIGHT_DECAY, CLIP = 4096, 1024, 384, 0.1, 1.0


def learning_rate(step: int) -> float:
    first = STAGES[0].steps
    return STAGES[0].rate(step) if step < first else STAGES[1].rate(step - first)


def train_tokenizer(sets: Sequence[Sequence[Dialogue]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the turns of the dialogues; the second set, which is smaller, counts twice."""
    texts = [turn.content for dialogues in (*sets, sets[-1]) for dialogue in dialogues for turn in dialogue.turns]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"bos_token": BOUNDARY, "unk_token": BOUNDARY, "eos_token": END, "pad_token": PAD}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, **special, chat_template=CHAT_TEMPLATE, model_max_length=POSITIONS
    )


def token_ids(dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    text = render(dialogue.turns, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def pack(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Conversations in a fixed random order, joined by the boundary token, as rows (rows, LENGTH) int64."""
    order = torch.randperm(len(dialogues), generator=torch.Generator().manual_seed(0)).tolist()
    boundary = tokenizer.bos_token_id
    stream: list[int] = []
    for index in order:
        stream += [boundary, *token_ids(dialogues[index], tokenizer)]
    rows = len(stream) // LENGTH
    return torch.tensor(stream[: rows * LENGTH]).view(rows, LENGTH)


def batch_of(rows: torch.Tensor, batch_size: int, step: int) -> torch.Tensor:
    """The rows (batch_size, LENGTH) of a step; every epoch's order is drawn from its own number."""
    epoch, position = divmod(step, len(rows) // batch_size)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1 + epoch))
    return rows[order[position * batch_size : (position + 1) * batch_size]]


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """GPT-2 with 6 layers of width 384, 6 heads, 1,024 positions, tied embeddings, no dropout; seeded."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=384, n_layer=6, n_head=6,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def new_optimizer(model: GPT2LMHeadModel) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]  # tied weights come once
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, data: Path) -> float:
    """Cross-entropy per token (nats, float32) of the held-out conversations, each from its second token on."""
    total, count = 0.0, 0
    for dialogue in load_dialogues(None, str(data / HELD_OUT_FILE), "all", limit=HELD_OUT_COUNT).dialogues:
        ids = torch.tensor([token_ids(dialogue, tokenizer)[:HELD_OUT_LENGTH]], device=model.device)
        logits = model(ids).logits[0, :-1].float()
        total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def train(args: Namespace, rows: torch.Tensor, tokenizer: PreTrainedTokenizerFast, key: str) -> GPT2LMHeadModel:
    """Train from the checkpoint, if there is one, to the last step. ``key`` names the run's data and settings."""
    model = new_model(tokenizer).to(args.device).train()
    optimizer = new_optimizer(model)
    path, first = args.output_dir / "checkpoint.pt", 0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        if state["key"] != key:
            raise DataError(f"{path} belongs to a run with other data or settings: give another --output_dir")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimiser"])
        first = int(state["step"])
        print(f"going on from step {first}", flush=True)
    start = time.time()
    for step in range(first, args.max_steps):
        ids = batch_of(rows, args.batch_size, step).to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        with torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16):
            logits = model(ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        if not torch.isfinite(loss):
            raise DataError(f"the loss of step {step} is {float(loss)}; the last checkpoint is kept")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % args.save_steps == 0 or done == args.max_steps:
            state = {"model": model.state_dict(), "optimiser": optimizer.state_dict(), "step": done, "key": key}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)  # a kill leaves the old one or the new one, never half of one
            speed = (done - first) * ids.numel() / (time.time() - start)
            print(f"step {done}/{args.max_steps}  loss {float(loss):.4f}  {speed:,.0f} tokens/s", flush=True)
    return model


def publish(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, args: Namespace, tokens: int) -> dict[str, Any]:
    """Write bf16 weights, tokenizer and ``recipe.json``; the held-out loss is that of the weights as written."""
    temporary = args.output_dir / "new"
    shutil.rmtree(temporary, ignore_errors=True)
    model.bfloat16().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    written = GPT2LMHeadModel.from_pretrained(temporary, dtype=torch.float32).to(args.device).eval()
    recipe = {
        "architecture": "GPT-2, 6 layers, width 384, 6 heads, 1024 positions, tied",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": f"byte-level BPE {VOCABULARY}",
        "data": f"SGD train + GSM8K train, {tokens:,} tokens",
        "batch": [args.batch_size, LENGTH],
        "steps": args.max_steps,
        "stages": [asdict(stage) for stage in STAGES],
        "optimiser": f"AdamW (0.9, 0.95), weight decay {WEIGHT_DECAY} on matrices, gradient clip {CLIP}, "
        "bf16 autocast, float32 master weights",
        "heldout": {
            "set": f"first {HELD_OUT_COUNT} conversations of sgd_dev, cut at {HELD_OUT_LENGTH} tokens",
            "loss": round(held_out_loss(written, tokenizer, args.data), 4),
        },
        "sha256": hashlib.sha256((temporary / "model.safetensors").read_bytes()).hexdigest(),
    }
    (temporary / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    for file in temporary.iterdir():
        file.replace(args.output_dir / file.name)
    temporary.rmdir()
    return recipe


def run(args: Namespace) -> None:
    if args.eval_only is not None:
        folder = demo_verifier_path() if args.eval_only == "demo" else Path(args.eval_only)
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder} holds no model (no config.json)")
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
        loss = held_out_loss(model, PreTrainedTokenizerFast.from_pretrained(folder), args.data)
        print(f"held-out loss {loss:.4f}")
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    loaded = [load_dialogues(None, str(args.data / name), "all") for name in TRAIN_FILES]
    tokenizer = train_tokenizer([part.dialogues for part in loaded])
    rows = pack([dialogue for part in loaded for dialogue in part.dialogues], tokenizer)
    settings = [[part.report.sha256 for part in loaded], [asdict(stage) for stage in STAGES], args.batch_size, LENGTH]
    key = hashlib.sha256(json.dumps([settings, tokenizer.backend_tokenizer.to_str()]).encode()).hexdigest()
    print(f"{rows.numel():,} tokens in {len(rows):,} rows of {LENGTH}", flush=True)
    model = train(args, rows, tokenizer, key)
    recipe = publish(model, tokenizer, args, rows.numel())
    print(f"held-out loss {recipe['heldout']['loss']}  sha256 {recipe['sha256']}")


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the full sets")
    parser.add_argument("--output_dir", type=Path, default=Path("models/demo-verifier"))
    parser.add_argument("--eval_only", metavar="MODEL", help="measure the held-out loss of a model folder, or of demo")
    steps = sum(stage.steps for stage in STAGES)
    parser.add_argument("--max_steps", type=int, default=steps, help="for a trial: fewer")
    parser.add_argument("--save_steps", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--batch_size", type=int, default=20, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on a GPU need
    torch.use_deterministic_algorithms(True)
    try:
        run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
