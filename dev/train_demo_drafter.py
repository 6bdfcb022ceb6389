"""Train the bundled drafter: the demo verifier's own greedy text is the training set.

    python dev/train_demo_drafter.py --data DIRECTORY --output src/recurrent_drafter/assets/demo-drafter

DIRECTORY holds ``sgd_train.sharegpt.jsonl.gz`` and ``gsm8k_train.sharegpt.jsonl.gz``; their conversations, cut before a
reply, are the prompts. The verifier goes on from each, past end tokens; `quick_text` says what that is good for.
"""

import argparse
import json
from pathlib import Path

import torch

from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies, load_replies, save_replies
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.training import TrainingArguments
from recurrent_drafter.training.callbacks import RunRecord, facts
from recurrent_drafter.training.corpus import Pair, pair_of
from recurrent_drafter.training.examples import with_text_targets
from recurrent_drafter.training.pipeline import learn, prepared
from recurrent_drafter.training.targets import Material


def write_text(pair: Pair, options: argparse.Namespace, text: Path, held_out: Path) -> None:
    """The verifier's own text, and its replies to the demo set's prompts."""
    prompts = []
    for name, count in (("sgd_train", options.dialogues), ("gsm8k_train", options.problems)):
        dialogues = load_dialogues(None, str(options.data / f"{name}.sharegpt.jsonl.gz"), "train").dialogues
        chosen = dialogues[:: max(len(dialogues) // (2 * count), 1)]
        prompts += prompts_from_dialogues(chosen, pair.tokenizer, count=count, max_length=128)
    save_replies(text, greedy_replies(pair.verifier, prompts, options.new_tokens, (), batch_size=64))
    dialogues = load_dialogues("demo", None, "eval").dialogues
    prompts = prompts_from_dialogues(dialogues, pair.tokenizer, count=40, max_length=256)
    save_replies(held_out, greedy_replies(pair.verifier, prompts, 128, ()))


def main() -> None:
    """Generate (once; kept in the work directory), train, save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default="models/demo-drafter-work", help="generated text, checkpoints")
    parser.add_argument("--dialogues", type=int, default=1600)
    parser.add_argument("--problems", type=int, default=192)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--depths", type=int, default=6)
    parser.add_argument("--draft_vocab_size", default="2048")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=str(options.work), llm_name_or_path="demo", drafter_predict_n_tokens=options.depths,
        draft_vocab_size=options.draft_vocab_size, num_train_epochs=options.epochs, per_device_train_batch_size=8,
        train_sampling_strategy="random", learning_rate=options.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=20, weight_decay=0.0, adam_beta2=0.98, seed=0, data_seed=42, eval_strategy="steps", eval_steps=50,
        logging_steps=10, save_steps=100, save_total_limit=1, load_best_model_at_end=False,
        resume_from_checkpoint="True", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    args, pair = prepared(arguments, print), pair_of(*load_verifier("demo", dtype="float32"))
    text, held_out = options.work / "text.safetensors", options.work / "held_out.safetensors"
    if not held_out.exists():
        write_text(pair, options, text, held_out)
    rows = [with_text_targets(reply.as_example(), options.depths, ()) for reply in load_replies(text)]
    material = Material(pair, rows, HeldOutReplies(pair.verifier, load_replies(held_out)))
    trained = learn(material, args, RunRecord(["dev/train_demo_drafter.py"], (), **facts(args)), on_progress=print)
    trained.drafter.save_pretrained(options.output)
    (options.output / "history.json").write_text(json.dumps(trained.history, indent=1))


if __name__ == "__main__":
    main()
