"""``train_speculator.py`` and ``recurrent-drafter train``."""

import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from recurrent_drafter.cli.callbacks import ShowProgress, StopWhenInterrupted, progress_bar
from recurrent_drafter.cli.errors import INTERRUPTED, parse, reporting
from recurrent_drafter.cli.output import checkpoint_to_resume, make_writable, save_drafter
from recurrent_drafter.config import DataOptions, DraftShape, ModelOptions, RecurrentDraftingConfig
from recurrent_drafter.data import encode_examples, load_dialogues, prompts_from_dialogues
from recurrent_drafter.drafter import RecurrentDrafter
from recurrent_drafter.replies import HeldOutReplies, Reply, greedy_replies, load_replies, save_replies
from recurrent_drafter.tracking import write_run
from recurrent_drafter.train import (
    DrafterTrainer,
    RootExample,
    TimeBudget,
    TrainingOptions,
    coverage,
    frequent_tokens,
    with_distilled_targets,
    with_text_targets,
)
from recurrent_drafter.verifier import Verifier, load_verifier, tokenizer_hash

QUICK_SECONDS = 222  # all of --quick, from the first line of `main` to the saved drafter, stays below 240
QUICK_TEXT_SECONDS = 70
QUICK_REPLIES, QUICK_REPLY_TOKENS = 64, 192  # that are generated at a time
QUICK_TEXT = "text.safetensors"  # in the output folder, for a resumed training
QUICK_DEPTHS = 5
QUICK_DRAFT_VOCABULARY = 2048
HELD_OUT_REPLIES, HELD_OUT_TOKENS = 16, 96


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Train a drafter for a causal language model."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = {argument.split("=")[0] for argument in arguments}
    if "--output_dir" not in named:  # the only default of TrainingArguments that depends on other flags
        arguments += ["--output_dir", ""]
    model, data, training = parse(arguments, main.__doc__ or "", ModelOptions, DataOptions, TrainingOptions)
    model, data = with_defaults(model, data, named)
    training.output_dir = training.output_dir or default_output(model)
    if model.demo:
        print(plan(model, data, training))
        return 0
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    prepare(training)
    try:
        return train(model, data, training, arguments, started)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again; with --resume_from_checkpoint True it goes on from the last "
              f"checkpoint in {training.output_dir}, if there is one", file=sys.stderr)  # fmt: skip
        return INTERRUPTED


def with_defaults(model: ModelOptions, data: DataOptions, named: set[str]) -> tuple[ModelOptions, DataOptions]:
    """What ``--quick`` and the methods imply for flags that were not given."""
    changes: dict[str, Any] = {}
    if model.quick:
        if "--llm_name_or_path" not in named:
            changes["llm_name_or_path"] = "demo"
        if model.draft_vocab_size is None:
            changes["draft_vocab_size"] = QUICK_DRAFT_VOCABULARY
        if model.drafter_predict_n_tokens is None:
            changes["drafter_predict_n_tokens"] = QUICK_DEPTHS
        if data.dataset_name is None and data.dataset_path is None:
            data = dataclasses.replace(data, dataset_name="demo")
    elif model.drafter_predict_n_tokens is None:
        changes["drafter_predict_n_tokens"] = data.distill_num_future_tokens if data.use_distilled_dataset else 4
    model = dataclasses.replace(model, **changes)
    if data.dataset_name is None and data.dataset_path is None:
        data = dataclasses.replace(data, dataset_name="sharegpt")
    depths = model.drafter_predict_n_tokens or 0
    if data.use_distilled_dataset and not model.quick and depths > data.distill_num_future_tokens:
        raise ValueError(
            f"--drafter_predict_n_tokens {depths} exceeds --distill_num_future_tokens "
            f"{data.distill_num_future_tokens}: distil at least as many tokens as are predicted"
        )
    return model, data


def default_output(model: ModelOptions) -> str:
    """``./models/demo-recurrent-drafter``, ``./models/gpt2-recurrent-drafter-trained``."""
    name = Path(model.llm_name_or_path).name
    return f"./models/{name}-recurrent-drafter" + ("" if name == "demo" else "-trained")


def plan(model: ModelOptions, data: DataOptions, training: TrainingArguments) -> str:
    """What would run, for ``--demo``."""
    method = "distilled" if data.use_distilled_dataset or model.quick else "ground truth"
    source = data.dataset_path or data.dataset_name
    return (
        f"would train a drafter for {model.llm_name_or_path} on {source}, targets: {method}, "
        f"{model.drafter_predict_n_tokens} tokens ahead, {model.drafter_num_layers} layers, "
        f"{'four minutes at most' if model.quick else f'{training.num_train_epochs:g} epochs'}, and save it to "
        f"{training.output_dir}; nothing was trained"
    )


def train(
    options: ModelOptions, data: DataOptions, training: TrainingArguments, argv: Sequence[str], started: float
) -> int:
    """Make targets, train, save."""
    model, tokenizer = load_verifier(options.llm_name_or_path, dtype="float32" if options.quick else "auto")
    verifier = Verifier(model)
    dialogues = load_dialogues(data.dataset_name, data.dataset_path, "train")
    print(f"training text: {dialogues.report.summary()}")
    depths = options.drafter_predict_n_tokens or 4
    with progress_bar() as progress:
        held_out = held_out_replies(verifier, tokenizer, data, quick=options.quick)
        if options.quick:
            kept = Path(str(training.output_dir)) / QUICK_TEXT
            if training.resume_from_checkpoint is None:
                save_replies(kept, quick_text(verifier, tokenizer, dialogues.dialogues, progress, started))
            elif not kept.is_file():
                raise OSError(f"{kept} is missing, the text that this training began with: begin a new one")
            examples = [with_text_targets(reply.as_example(), depths, ()) for reply in load_replies(kept)]
        else:
            examples = make_examples(verifier, tokenizer, dialogues.dialogues, options, data, progress)
    end_ids = end_tokens(tokenizer)
    size = min(options.draft_vocab_size or verifier.vocab_size, verifier.vocab_size)
    draft_ids = frequent_tokens(examples, size, verifier.vocab_size, end_ids)
    roots = sum(len(example.positions) for example in examples)
    print(
        f"{len(examples):,} texts, {roots:,} roots; "
        f"the draft vocabulary of {size:,} covers {coverage(examples, draft_ids):.1%}"
    )

    shape = DraftShape(beam_width=3, beam_length=depths, max_tree_nodes=min(12, 1 + 3 * depths))
    drafter = new_drafter(options, verifier, tokenizer, draft_ids, shape)
    budget = None
    if options.quick:
        quick_schedule(training)
        budget = TimeBudget(started + QUICK_SECONDS - time.monotonic(), training.learning_rate, evaluations=4)
    stop = StopWhenInterrupted()
    trainer = DrafterTrainer(
        drafter,
        training,
        verifier=verifier,
        train_examples=examples,
        held_out=held_out,
        shape=shape,
        callbacks=[stop] if budget is None else [stop, budget],
    )
    for default in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(default)
    with stop.listening():
        with progress_bar() as progress:
            trainer.add_callback(ShowProgress(progress, budget))
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        if stop.interrupted:
            print(f"\ninterrupted at step {trainer.state.global_step}, which is kept in {training.output_dir}: run the "
                  "same command with --resume_from_checkpoint True to go on", file=sys.stderr)  # fmt: skip
            return INTERRUPTED
        metrics = trainer.evaluate()
        save_drafter(drafter.to(dtype=torch.bfloat16), Path(str(training.output_dir)))  # type: ignore[call-arg]
    write_run(
        Path(str(training.output_dir)),
        argv=["train_speculator.py", *argv],
        options={**dataclasses.asdict(options), **dataclasses.asdict(data)},
        data=dataclasses.asdict(dialogues.report),
        metrics=metrics,
        history=trainer.state.log_history,
    )
    minutes = (time.monotonic() - started) / 60
    print(
        f"held-out tokens per step: {metrics['eval_tokens_per_step']:.2f}; "
        f"{minutes:.1f} minutes; saved to {training.output_dir}"
    )
    print(f"try it: python generate_speculator.py --base_model {options.llm_name_or_path} "
          f"--speculator_path {training.output_dir} --interactive")  # fmt: skip
    return 0


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token, if it has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def held_out_replies(
    verifier: Verifier, tokenizer: PreTrainedTokenizerBase, data: DataOptions, *, quick: bool
) -> HeldOutReplies:
    """The verifier's replies to prompts of the evaluation split; ``quick`` goes on past end tokens."""
    dialogues = load_dialogues(data.dataset_name, data.dataset_path, "eval").dialogues
    count = min(HELD_OUT_REPLIES, len(dialogues))
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=count, max_length=256)
    return HeldOutReplies(
        verifier, greedy_replies(verifier, prompts, HELD_OUT_TOKENS, () if quick else end_tokens(tokenizer))
    )


def make_examples(
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Any],
    options: ModelOptions,
    data: DataOptions,
    progress: Progress,
) -> list[RootExample]:
    """Texts with the targets of the chosen method."""
    depths = options.drafter_predict_n_tokens or 4
    encoded, report = encode_examples(
        dialogues, tokenizer, max_length=data.model_max_length, assistant_only=data.train_on_assistant_only
    )
    print(report.summary())
    end_ids = end_tokens(tokenizer)
    if not data.use_distilled_dataset:
        return [with_text_targets(example, depths, end_ids) for example in encoded]
    chosen = encoded[: data.distill_max_examples]
    task = progress.add_task("distilling", total=len(chosen), note="")
    examples = []
    for example in chosen:
        examples.append(with_distilled_targets(verifier, example, depths, end_ids))
        progress.advance(task)
    return examples


def quick_text(
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Any],
    progress: Progress,
    started: float,
) -> list[Reply]:
    """Distilled targets at the price of generation: the text itself is the verifier's greedy continuation of prompts.

    What follows a position of such a text is what the verifier generates there, so every position has its distilled
    target already. As many texts as the time allows.
    """
    count = min(len(dialogues), 640)
    prompts = prompts_from_dialogues(dialogues, tokenizer, count=count, max_length=128)
    task = progress.add_task("verifier's own text", total=QUICK_TEXT_SECONDS, note="")
    replies: list[Reply] = []
    begun = time.monotonic()
    for start in range(0, count, QUICK_REPLIES):
        some = prompts[start : start + QUICK_REPLIES]
        replies += greedy_replies(verifier, some, QUICK_REPLY_TOKENS, (), batch_size=len(some))
        spent = time.monotonic() - begun
        progress.update(task, completed=min(spent, QUICK_TEXT_SECONDS), note=f"{len(replies)} texts")
        if (
            spent * (1 + QUICK_REPLIES / len(replies)) > QUICK_TEXT_SECONDS
            or time.monotonic() - started > QUICK_SECONDS / 2
        ):
            break
    progress.update(task, completed=QUICK_TEXT_SECONDS)
    return replies


def new_drafter(
    options: ModelOptions,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    draft_ids: torch.Tensor,
    shape: DraftShape,
) -> RecurrentDrafter:
    """An untrained drafter for this verifier."""
    torch.manual_seed(0)
    drafter = RecurrentDrafter(
        RecurrentDraftingConfig(
            hidden_size=verifier.hidden_size,
            vocab_size=verifier.vocab_size,
            exit_dim=max(1, round(options.exit_dim_multiplier * verifier.hidden_size)),
            num_draft_layers=options.drafter_num_layers,
            rnn=options.rnn,
            emb_norm=options.emb_norm,
            draft_vocab_size=len(draft_ids),
            verifier_name_or_path=options.llm_name_or_path,
            tokenizer_hash=tokenizer_hash(tokenizer),
            beam_width=shape.beam_width,
            beam_length=shape.beam_length,
            max_tree_nodes=shape.max_tree_nodes,
        )
    )
    drafter.draft_ids.copy_(draft_ids)
    return drafter


def quick_schedule(training: TrainingArguments) -> None:
    """Hyperparameters of ``--quick``; how long it takes is `TimeBudget`'s."""
    training.num_train_epochs = 1000
    training.per_device_train_batch_size = 4
    training.learning_rate = 2e-3
    training.adam_beta2 = 0.98
    training.logging_steps = 5
    training.save_strategy = "no"
    training.eval_strategy = "no"


def prepare(training: TrainingArguments) -> None:
    """Settings that the drafter's trainer needs whatever the flags say, a place to write, and where to go on from.

    Raises ValueError or OSError now for what would otherwise end a training later.
    """
    available = get_available_reporting_integrations()
    for service in training.report_to or ():
        if service not in available:
            raise ValueError(
                f"--report_to {service}: no such service is installed here (pip install {service}?); "
                f"there is {', '.join([*available, 'none'])}"
            )
    training.remove_unused_columns = False
    training.disable_tqdm = True
    training.dataloader_pin_memory = torch.cuda.is_available()
    output = Path(str(training.output_dir))
    make_writable(output)
    training.resume_from_checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, output)
