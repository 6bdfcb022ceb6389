"""Options of a training, each written once: a flag on the command line, a keyword from Python."""

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["ground_truth", "distilled", "knowledge_distillation"]
BEST = "eval_tokens_per_step"  # what the best checkpoint is chosen by
QUICK_DEPTHS, QUICK_DRAFT_VOCABULARY = 5, "2048"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunOptions:
    """What to do, and with which verifier."""

    llm_name_or_path: str | None = _option(
        None, "verifier: a hub name, a directory, or 'demo' (the bundled model); default gpt2"
    )
    drafter_name_or_path: str | None = _option(None, "with --phase eval: the drafter to evaluate")
    cache_dir: str | None = _option(None, "where downloads are kept; default the hub's own place")
    phase: Literal["train", "eval"] = _option("train", "train a drafter, or evaluate one as training does")
    quick: bool = _option(False, "train within four minutes on two cores; the verifier is 'demo' unless named")
    demo: bool = _option(False, "only show what would run; trains nothing")
    estimate: bool = _option(False, "whether a drafter can pay here, and what training costs; trains nothing")


@dataclass
class DataOptions:
    """What to train and to evaluate on."""

    dataset_name: str | None = _option(
        None, "sharegpt (default), alpaca, mtbench, wikitext, or 'demo' (the bundled conversations, default for demo)"
    )
    dataset_path: str | None = _option(None, "a local file instead: .json, .jsonl, either with .gz, .txt or .parquet")
    eval_dataset_name: str | None = _option(None, "evaluate on the held-out part of this set; default the training's")
    eval_dataset_path: str | None = _option(None, "evaluate on the held-out part of this file")
    eval_max_examples: int = _option(16, "held-out prompts to evaluate on")
    eval_max_new_tokens: int = _option(96, "tokens of the verifier's reply to each of them")
    model_max_length: int = _option(512, "tokens of an example")
    train_on_assistant_only: bool = _option(False, "roots in assistant replies only")
    chat_template: str | None = _option(None, "a Jinja chat template, or a file of one; default the verifier's own")
    streaming: bool = _option(False, "read the data as training goes: for sets larger than memory, needs --max_steps")
    shuffle_buffer: int = _option(1000, "with --streaming: examples that are shuffled together")


@dataclass
class DrafterOptions:
    """Architecture of the drafter, and what it learns to predict."""

    drafter_predict_n_tokens: int | None = _option(
        None, "K, depths to train: default 4, with distillation as many as are distilled"
    )
    drafter_num_layers: int = _option(2, "residual layers in front of the draft head")
    drafter_top_k: int = _option(5, "report accuracies among the 1 to k most probable draft tokens")
    rnn: bool = _option(True, "recurrent state (otherwise a running sum of embeddings)")
    exit_dim_multiplier: float = _option(1.0, "E as a multiple of the verifier's width")
    emb_norm: bool = _option(False, "normalise the embeddings that enter the recurrence")
    draft_vocab_size: str | None = _option(
        None, "D, how many of the most frequent target tokens can be drafted: a number, 'all', or 'auto' (default)"
    )


@dataclass
class MethodOptions:
    """Which targets are made of the data; without any of these the text itself."""

    use_distilled_dataset: bool = _option(
        False, "the paper's targets: the verifier's own continuation of every position"
    )
    distill_num_future_tokens: int = _option(5, "tokens per continuation")
    distill_temperature: float = _option(0.0, "0 continues greedily, as in the paper")
    distill_max_examples: int = _option(1000, "conversations to distil at most")
    use_knowledge_distillation: bool = _option(False, "learn the verifier's distribution along the text")
    kd_temperature: float = _option(4.0, "softens both distributions")
    kd_alpha: float = _option(0.7, "weight of the distribution; the rest is the text's")


NEEDS = {
    "drafter_name_or_path": "phase",
    "shuffle_buffer": "streaming",
    **dict.fromkeys(
        ("distill_num_future_tokens", "distill_temperature", "distill_max_examples"), "use_distilled_dataset"
    ),
    **dict.fromkeys(("kd_temperature", "kd_alpha"), "use_knowledge_distillation"),
}
LEAST = {
    "drafter_predict_n_tokens": 1,
    "drafter_num_layers": 0,
    "drafter_top_k": 1,
    "model_max_length": 2,
    "eval_max_examples": 1,
    "eval_max_new_tokens": 2,
    "shuffle_buffer": 1,
    "distill_num_future_tokens": 1,
    "distill_temperature": 0,
    "distill_max_examples": 1,
    "early_stopping_patience": 1,
}
