"""What ``--quick`` does otherwise: text of the verifier's own, and training by the clock."""

import time
from pathlib import Path

from recurrent_drafter.data.templates import prompts_from_dialogues
from recurrent_drafter.measure.replies import Reply, greedy_replies, load_replies, save_replies
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.corpus import Pair, TrainingText
from recurrent_drafter.training.examples import with_text_targets
from recurrent_drafter.training.progress import OnProgress, Progress
from recurrent_drafter.training.targets import Examples

QUICK_SECONDS = 222  # all of --quick, from the verifier's loading to the saved drafter, stays below 240
QUICK_TEXT_SECONDS = 70
QUICK_REPLIES, QUICK_REPLY_TOKENS = 64, 192  # that are generated at a time


def quick_examples(pair: Pair, text: TrainingText, args: TrainingArguments, begun: float, tell: OnProgress) -> Examples:
    """The verifier's own text, kept in the output folder for a training that is resumed."""
    kept = Path(str(args.output_dir)) / "text.safetensors"
    if args.resume_from_checkpoint is None:
        save_replies(kept, quick_text(pair, text, begun, tell))
    elif not kept.is_file():
        raise OSError(f"{kept} is missing, the text that this training began with: begin a new one")
    return [with_text_targets(reply.as_example(), args.depths, ()) for reply in load_replies(kept)]


def quick_text(pair: Pair, text: TrainingText, begun: float, tell: OnProgress) -> list[Reply]:
    """Distilled targets at the price of generation: the text itself is the verifier's greedy continuation of prompts.

    What follows a position of such a text is what the verifier generates there, so every position has its distilled
    target already. As many texts as the time allows that is left of a training ``begun`` then.
    """
    dialogues = list(text)
    most = min(len(dialogues), 640)
    prompts = prompts_from_dialogues(dialogues, pair.tokenizer, count=most, max_length=128, fewest=1)
    replies: list[Reply] = []
    here = time.monotonic()
    for start in range(0, len(prompts), QUICK_REPLIES):
        some = prompts[start : start + QUICK_REPLIES]
        replies += greedy_replies(pair.verifier, some, QUICK_REPLY_TOKENS, (), batch_size=len(some))
        spent = time.monotonic() - here
        done = min(spent, QUICK_TEXT_SECONDS)
        tell(Progress("verifier's own text", f"{len(replies)} texts", done, QUICK_TEXT_SECONDS))
        late = time.monotonic() - begun > QUICK_SECONDS / 2
        if spent * (1 + QUICK_REPLIES / len(replies)) > QUICK_TEXT_SECONDS or late:
            break
    tell(Progress("verifier's own text", f"{len(replies)} texts", QUICK_TEXT_SECONDS, QUICK_TEXT_SECONDS))
    return replies


def quick_schedule(args: TrainingArguments, begun: float) -> float:
    """Set the hyperparameters of ``--quick``; when training is to end, by the monotonic clock."""
    args.num_train_epochs = 1000
    args.per_device_train_batch_size = 4
    args.learning_rate = 2e-3
    args.adam_beta2 = 0.98
    args.logging_steps = 5
    args.save_strategy = "no"
    args.eval_strategy = "no"
    return begun + QUICK_SECONDS
