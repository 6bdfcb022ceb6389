"""Train the bundled drafter: the demo verifier's own greedy text is the training set.

    python dev/train_demo_drafter.py --data DIRECTORY --output src/recurrent_drafter/assets/demo-drafter

DIRECTORY holds ``sgd_train.sharegpt.jsonl.gz`` and ``gsm8k_train.sharegpt.jsonl.gz``; their conversations, cut before a
reply, are the prompts. The verifier goes on from each, past end tokens as in the sustained protocol, so the text that
follows a position is what the verifier itself generates there: every position has its distilled target already.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.data.prompts import prompts_from_dialogues
from recurrent_drafter.data.sources import load_dialogues
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies
from recurrent_drafter.models.config import DraftShape, RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.loading import tokenizer_hash
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training.examples import coverage, frequent_tokens, with_text_targets
from recurrent_drafter.training.trainer import DrafterTrainer


def main() -> None:
    """Generate (once; kept in the work directory), train, save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("models/demo-drafter-work"), help="generated text, checkpoints"
    )
    parser.add_argument("--dialogues", type=int, default=1600)
    parser.add_argument("--problems", type=int, default=192)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--depths", type=int, default=6)
    parser.add_argument("--draft_vocab_size", type=int, default=2048)
    options = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_verifier_path())
    verifier = Verifier(AutoModelForCausalLM.from_pretrained(demo_verifier_path(), dtype=torch.float32).eval())
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "replies.pt"
    if kept.exists():
        replies, held_out = torch.load(kept, weights_only=False)
    else:
        prompts = []
        for name, count in (("sgd_train", options.dialogues), ("gsm8k_train", options.problems)):
            path = options.data / f"{name}.sharegpt.jsonl.gz"
            dialogues = load_dialogues(None, str(path), "train").dialogues
            chosen = dialogues[:: max(len(dialogues) // (2 * count), 1)]
            prompts += prompts_from_dialogues(chosen, tokenizer, count=count, max_length=128)
        replies = greedy_replies(verifier, prompts, options.new_tokens, (), batch_size=64)
        dialogues = load_dialogues("demo", None, "eval").dialogues
        held_out = greedy_replies(
            verifier, prompts_from_dialogues(dialogues, tokenizer, count=40, max_length=256), 128, ()
        )
        torch.save((replies, held_out), kept)

    examples = [with_text_targets(reply.as_example(), options.depths, ()) for reply in replies]
    draft_ids = frequent_tokens(examples, options.draft_vocab_size, verifier.vocab_size, [tokenizer.eos_token_id])
    print(f"{len(examples)} texts; draft vocabulary of {len(draft_ids)} covers {coverage(examples, draft_ids):.2%}")
    config = RecurrentDraftingConfig(
        hidden_size=verifier.hidden_size,
        vocab_size=verifier.vocab_size,
        draft_vocab_size=len(draft_ids),
        verifier_name_or_path="demo",
        verifier_architectures=verifier.model.config.architectures,
        tokenizer_hash=tokenizer_hash(tokenizer),
    )
    drafter = RecurrentDrafter(config)
    drafter.draft_ids.copy_(draft_ids)
    arguments = TrainingArguments(
        output_dir=str(options.work),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.0,
        adam_beta2=0.98,
        eval_strategy="steps",
        eval_steps=50,
        logging_steps=10,
        save_steps=100,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    shape = DraftShape(beam_width=3, beam_length=options.depths, max_tree_nodes=12)
    walk = HeldOutReplies(verifier, held_out)
    trainer = DrafterTrainer(drafter, arguments, verifier=verifier, train_examples=examples, held_out=walk, shape=shape)
    trainer.train(resume_from_checkpoint=any(options.work.glob("checkpoint-*")))
    trainer.evaluate()
    config.update({"beam_width": shape.beam_width, "beam_length": shape.beam_length, "max_tree_nodes": 12})
    drafter.to(torch.bfloat16).save_pretrained(options.output)
    (options.output / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
