"""First stage of a training: the verifier, and the text to train and to evaluate on."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recurrent_drafter.data import sources
from recurrent_drafter.data.dialogues import Dialogue, LoadReport, Turn
from recurrent_drafter.data.templates import RefusedError, encode_prompt, prompts_from_dialogues
from recurrent_drafter.decoding.generation_state import as_tuple
from recurrent_drafter.measure.replies import HeldOutReplies, Reply, greedy_replies
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.provenance import RUN_RECORD
from recurrent_drafter.training.arguments import TrainingArguments
from recurrent_drafter.training.callbacks import OnProgress, Progress, counting
from recurrent_drafter.training.options import DataOptions, read_template

HELD_OUT_PROMPT = 256  # tokens of a held-out prompt at most
STREAMED_PROMPTS = 8  # of a stream so many times as many conversations are read as prompts are wanted

TrainingText = sources.LoadedDialogues | sources.DialogueStream  # to train on; of a stream as it is read


@dataclass(frozen=True)
class Pair:
    """A verifier with its tokenizer, and the tokens that end a reply of it."""

    verifier: Verifier
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]


def open_pair(
    verifier: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, args: TrainingArguments
) -> Pair:
    """The verifier, loaded where it is a name, with the chat template asked for.

    Raises ValueError for lengths beyond its context, and for a model without its tokenizer or on another device.
    """
    if isinstance(verifier, str):
        dtype, device = "float32" if args.quick else "auto", str(args.device)
        verifier, own = load_verifier(verifier, dtype=dtype, device=device, cache_dir=args.cache_dir)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise ValueError("the verifier is given as a model: give its tokenizer too")
    if verifier.device.type != args.device.type:
        raise ValueError(f"the verifier is on {verifier.device} and training runs on {args.device}: move it there")
    if args.chat_template is not None:
        tokenizer = copy.copy(tokenizer)  # the caller's own stays as it is
        tokenizer.chat_template = read_template(args.chat_template)
    pair = pair_of(verifier, tokenizer)
    context = pair.verifier.context_length
    beyond = args.distill_num_future_tokens - 1 if args.use_distilled_dataset else 0
    for flag, length, most in (
        ("model_max_length", 0 if args.quick else args.model_max_length, context and context - beyond),
        ("eval_max_new_tokens", args.eval_max_new_tokens, context and context - 1),
    ):
        if most is not None and length > most:
            name = args.llm_name_or_path or "the verifier"
            raise ValueError(f"--{flag} is {length}, expected at most {most}: {name} has a context of {context} tokens")
    return pair


def pair_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """A reply ends at what the model or the tokenizer calls an end."""
    ends = {*as_tuple(model.generation_config.eos_token_id), *as_tuple(tokenizer.eos_token_id)}
    return Pair(Verifier(model), tokenizer, tuple(sorted(ends)))


def training_text(
    data: Sequence[sources.DialogueLike] | None, pair: Pair, args: TrainingArguments, tell: OnProgress
) -> TrainingText:
    """The conversations to train on; questions without answers get the verifier's own."""
    if args.streaming:
        earlier = read_before(args.resume_from_checkpoint)
        return sources.DialogueStream(args.dataset_name, args.dataset_path, args.cache_dir, earlier)
    loaded = load_part(data, args, "train")
    source, report = loaded.report.source, loaded.report
    tell(Progress("data", f"training data: {source} ({report.schema} records): {report.summary()}"))
    if any(dialogue.turns and not dialogue.has_reply for dialogue in loaded.dialogues):
        tell(Progress("data", f"{source} has questions only: the verifier's own greedy replies are the answers"))
        return sources.LoadedDialogues(answered(loaded.dialogues, pair, args, tell), report)
    return loaded


def load_part(
    data: Sequence[sources.DialogueLike] | None, args: TrainingArguments, split: sources.Split
) -> sources.LoadedDialogues:
    """One part of the data given or, without any, of the set that the options name: another, maybe, to evaluate on."""
    name, path = args.dataset_name, args.dataset_path
    if split == "eval" and (args.eval_dataset_name or args.eval_dataset_path):
        name, path, data = args.eval_dataset_name, args.eval_dataset_path, None
    if data is not None:
        return sources.divide_dialogues(data, split)
    limit = STREAMED_PROMPTS * args.eval_max_examples if args.streaming else None
    return sources.load_dialogues(name, path, split, limit=limit, cache_dir=args.cache_dir)


def read_before(checkpoint: str | None) -> LoadReport | None:
    """The account of the data up to a checkpoint; None where there is none, or a kill came before its record."""
    record = Path(checkpoint or "") / RUN_RECORD
    return LoadReport(**json.loads(record.read_text())["data"]) if checkpoint and record.is_file() else None


def answered(dialogues: Sequence[Dialogue], pair: Pair, args: DataOptions, tell: OnProgress) -> tuple[Dialogue, ...]:
    """Conversations of these questions with the verifier's greedy replies, for as long as they fit its context."""
    context = pair.verifier.context_length
    most = args.model_max_length if context is None else min(args.model_max_length, context)
    new_tokens = max(most // 4, 1)
    talks: list[list[Turn]] = [[] for _ in dialogues]
    for number in range(max(len(dialogue.turns) for dialogue in dialogues)):
        asked, prompts = [], []
        for talk, dialogue in zip(talks, dialogues, strict=True):
            if len(dialogue.turns) <= number or len(talk) < 2 * number:
                continue
            try:
                prompt = encode_prompt([*talk, dialogue.turns[number]], pair.tokenizer)
            except RefusedError:
                continue
            if 0 < len(prompt) <= most - new_tokens:
                asked.append((talk, dialogue.turns[number]))
                prompts.append(prompt)
        told = counting("data", tell)
        replies = greedy_replies(pair.verifier, prompts, new_tokens, pair.end_ids, on_progress=told)
        for (talk, question), reply in zip(asked, replies, strict=True):
            text = str(pair.tokenizer.decode(reply.tokens, skip_special_tokens=True)).strip()
            if text:
                talk += [question, Turn("assistant", text)]
    return tuple(Dialogue(tuple(talk)) for talk in talks if talk)


def held_out_replies(
    data: Sequence[sources.DialogueLike] | None, pair: Pair, args: TrainingArguments, tell: OnProgress
) -> HeldOutReplies:
    """The verifier's replies to prompts of the evaluation part; ``--quick`` goes on past end tokens."""
    end_ids = () if args.quick else pair.end_ids
    loaded, lengths = load_part(data, args, "eval"), (args.eval_max_examples, args.eval_max_new_tokens)
    return HeldOutReplies(pair.verifier, replies_to(pair, loaded, *lengths, end_ids, tell))


def replies_to(
    pair: Pair, loaded: sources.LoadedDialogues, most: int, new_tokens: int, end_ids: Sequence[int], tell: OnProgress
) -> list[Reply]:
    """The verifier's greedy replies to prompts of these conversations, ``most`` of them or as many as there are."""
    context = pair.verifier.context_length
    longest = HELD_OUT_PROMPT if context is None else min(HELD_OUT_PROMPT, context - new_tokens)
    count = min(most, len({dialogue.digest() for dialogue in loaded.dialogues}))
    prompts = prompts_from_dialogues(loaded.dialogues, pair.tokenizer, count=count, max_length=longest, fewest=1)
    source = loaded.report.source
    tell(Progress("evaluation", f"evaluation: the verifier's replies to {len(prompts)} held-out prompts of {source}"))
    return greedy_replies(pair.verifier, prompts, new_tokens, end_ids, on_progress=counting("evaluation", tell))
