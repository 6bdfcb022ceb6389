"""Checkpoints in the layout of Apple's ``ml-recurrent-drafter``, read and written.

Weights carry the same names there. Its config.json has another ``model_type`` and fewer fields, and its drafters
predict the whole vocabulary, so there are no draft ids.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter

MODEL_TYPE = "recurrent_drafting_drafter"
ARCHITECTURE = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "rnn")
# Fields of ours alone. Apple's config class keeps what it does not know, so they come back with the drafter.
KEPT = (
    *("verifier_name_or_path", "verifier_architectures", "tokenizer_hash"),
    *("beam_width", "beam_length", "max_tree_nodes"),
)


def is_apples(folder: Path) -> bool:
    """Whether a folder's config.json is of Apple's layout."""
    return (folder / "config.json").is_file() and _config(folder).get("model_type") == MODEL_TYPE


def from_apple(folder: Path) -> RecurrentDrafter:
    """A drafter with the weights as they lie in the folder, bit for bit and in their dtype.

    Raises OSError for weights that cannot be read, ValueError for a config.json that says too little or does not belong
    to them.
    """
    theirs = _config(folder)
    unsaid = [name for name in ARCHITECTURE if name not in theirs]
    if unsaid:
        raise ValueError(f"{folder / 'config.json'} does not say {', '.join(unsaid)}: expected Apple's drafter config")
    config = RecurrentDraftingConfig(**{name: theirs[name] for name in (*ARCHITECTURE, *KEPT) if name in theirs})
    with torch.device("meta"):
        drafter = RecurrentDrafter(config)
    weights = {**_weights(folder), "draft_ids": torch.arange(config.vocab_size)}
    expected = {name: tensor.shape for name, tensor in drafter.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"{folder} is damaged: its weights and its config.json do not belong together ({wrong[0]})")
    drafter.load_state_dict(weights, assign=True)
    return drafter


def to_apple(drafter: RecurrentDrafter, folder: Path) -> None:
    """Write a drafter into an empty folder. Raises ValueError, by name, for what Apple's drafters do not have."""
    config, draft_ids = drafter.config, drafter.draft_ids
    if config.draft_vocab_size < config.vocab_size:
        raise ValueError(
            f"draft_vocab_size is {config.draft_vocab_size:,} of {config.vocab_size:,}: Apple's layout has the whole "
            "vocabulary only (train with --draft_vocab_size all)"
        )
    if not torch.equal(draft_ids.cpu(), torch.arange(config.vocab_size)):
        raise ValueError("draft_ids are not 0, 1, 2, ...: Apple's layout has the verifier's own order only")
    if config.emb_norm:
        raise ValueError("emb_norm is on: Apple's layout does not normalize embeddings (train without --emb_norm)")
    weights = {name: tensor.contiguous() for name, tensor in drafter.state_dict().items() if name != "draft_ids"}
    theirs = {name: getattr(config, name) for name in (*ARCHITECTURE, *KEPT)}
    dtype = str(drafter.dtype).removeprefix("torch.")
    # num_lookback_tokens: a field of theirs that nothing reads, at its default.
    theirs |= {"model_type": MODEL_TYPE, "architectures": ["Drafter"], "torch_dtype": dtype, "num_lookback_tokens": -1}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n")


def _config(folder: Path) -> dict[str, Any]:
    return PreTrainedConfig.get_config_dict(folder)[0]


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"{folder} holds no .safetensors, and no other weights are read")
    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise OSError(f"the drafter at {folder} is damaged ({error}): copy it again") from error
