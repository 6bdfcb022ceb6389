"""Verifiers and drafters from a directory, the Hub or the package; whether the two belong together; fingerprints."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recurrent_drafter.assets import demo_verifier_path
from recurrent_drafter.models.config import RecurrentDraftingConfig
from recurrent_drafter.models.drafter import RecurrentDrafter
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.paths import check_drafter, check_model
from recurrent_drafter.records.provenance import hash_of, hash_of_tensors


def load_verifier(
    name: str, *, dtype: str = "auto", device: str | None = None, cache_dir: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a directory, the Hub, or the package (``demo``), ready to generate.

    Raises OSError, in one line, when there is no such model or it cannot be read.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the device {device!r} cannot be used here ({reason}): expected cpu, or one that is there"
        ) from error
    if dtype == "auto":
        dtype = "bfloat16" if computes_in_bfloat16(device) else "float32"
    with _loading(name) as path:
        tokenizer = AutoTokenizer.from_pretrained(path, cache_dir=cache_dir)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, cache_dir=cache_dir
        )
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def load_outline(name: str, drafter: RecurrentDrafter, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without its weights (on torch's meta device), and its tokenizer: enough to say what is made for it.

    Raises OSError as `load_verifier` does, ValueError if the drafter, which is at ``path``, is for another model.
    """
    with _loading(name) as place, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
        tokenizer = AutoTokenizer.from_pretrained(place)
    verifier = Verifier(model)
    check_pair(drafter.config, verifier.hidden_size, verifier.vocab_size)
    check_tokenizer(path, drafter.config, tokenizer)
    return model, tokenizer


@contextmanager
def _loading(name: str) -> Iterator[str]:
    """Where to load a model from; whatever goes wrong with it is one OSError."""
    check_model(name)
    try:
        yield str(demo_verifier_path()) if name == "demo" else name
    except (OSError, ValueError, SafetensorError, ImportError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"the model {name!r} could not be loaded ({type(error).__name__}: {reason}): expected a directory or a hub "
            "name of a causal language model in safetensors, or 'demo' (the bundled one)"
        ) from error


def computes_in_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 arithmetic; a CPU without it emulates, many times slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_drafter(path: str | Path, **options: Any) -> RecurrentDrafter:
    """A drafter from a directory or the Hub; only safetensors are read. Raises OSError or ValueError, in one line."""
    check_drafter(str(path))
    try:
        found = PreTrainedConfig.get_config_dict(path, **options)[0].get("model_type")
    except OSError as error:
        if not Path(path).exists():
            raise
        raise OSError(f"the drafter at {path} is damaged (its config.json is no JSON): copy it again") from error
    if found != RecurrentDraftingConfig.model_type:
        raise ValueError(f"{path} holds a model of type {found!r}, expected {RecurrentDraftingConfig.model_type!r}")
    with reading_weights(path):
        both: Any = RecurrentDrafter.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    drafter, loaded = both
    wrong = sorted(
        str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loaded[kind]
    )
    if wrong:
        raise ValueError(f"{path} is damaged: its weights and its config.json do not belong together ({wrong[0]})")
    assert isinstance(drafter, RecurrentDrafter)
    return drafter


def save_drafter(drafter: RecurrentDrafter, folder: Path) -> None:
    """Write the files to the side, then put them in place, config last: an older drafter is never half overwritten."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
        drafter.save_pretrained(unfinished)
        for file in sorted(Path(unfinished).iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)


@contextmanager
def reading_weights(path: str | Path) -> Iterator[None]:
    """What is read within it are a drafter's weights. Raises OSError, in one line, where a file is cut short."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"the drafter at {path} is damaged ({error}): copy it again, or train it again with train_speculator.py"
        ) from error


def check_weights(path: str) -> None:
    """Raise OSError for a weights file in a folder that is missing or cut short; the Hub's are whole."""
    if not (folder := Path(path)).is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise OSError(f"{path} holds no *.safetensors: expected the weights of a trained drafter")
    for file in files:
        with reading_weights(path), safe_open(file, framework="pt"):
            pass


def check_pair(config: RecurrentDraftingConfig, hidden_size: int, vocab_size: int) -> None:
    """Raise ValueError unless the drafter was made for a verifier of this width and vocabulary."""
    for name, own, found in (("width", config.hidden_size, hidden_size), ("vocabulary", config.vocab_size, vocab_size)):
        if own != found:
            made_for = f" ({config.verifier_name_or_path})" if config.verifier_name_or_path else ""
            raise ValueError(
                f"the drafter is for a verifier of {name} {own:,}{made_for}, and this verifier's {name} is {found:,}: "
                "use the drafter with the model that it was trained for, or train one for this model"
            )


def check_tokenizer(path: str, config: RecurrentDraftingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError when the drafter was trained with another vocabulary."""
    trained_for, here = config.tokenizer_hash, tokenizer_hash(tokenizer)
    if trained_for is not None and trained_for != here:
        raise ValueError(
            f"the drafter at {path} is for another tokenizer (vocabulary {trained_for}, this model's is {here}): use "
            "it with the model that it was trained for, or train one for this model"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of the vocabulary: which id stands for which token."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]


def verifier_fingerprint(verifier: Verifier) -> str:
    """Of the verifier's architecture and all of its weights (a second or so per gigabyte)."""
    # What says where a model came from and how it is run does not change what it computes.
    config = verifier.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation", "torch_dtype", "dtype"):
        config.pop(name, None)
    state = verifier.model.state_dict()
    return hash_of({"config": config, "names": list(state), "weights": hash_of_tensors(state.values())})
