"""Hashes that tell one run from another (layer 3)."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurrent_drafter.rows import RootExample
from recurrent_drafter.verifier import Verifier


def hash_of(settings: Mapping[str, Any]) -> str:
    """Of plain settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_of_tensors(tensors: Iterable[Tensor]) -> str:
    """Of shapes, dtypes and every byte, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def verifier_fingerprint(verifier: Verifier) -> str:
    """Of the verifier's architecture and all of its weights (a second or so per gigabyte)."""
    # What says where a model came from and how it is run does not change what it computes.
    config = verifier.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation", "torch_dtype", "dtype"):
        config.pop(name, None)
    state = verifier.model.state_dict()
    return hash_of({"config": config, "names": list(state), "weights": hash_of_tensors(state.values())})


def saved_fingerprint(folder: Path) -> str:
    """Of what is saved of a drafter: its config and its weights, as the files are."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run_fingerprint(verifier: str, examples: Sequence[RootExample], settings: Mapping[str, Any]) -> str:
    """Of what makes a training the same training, for ``DrafterTrainer(fingerprint=...)``.

    Args:
        verifier: its `verifier_fingerprint`.
        examples: the training set, targets included.
        settings: what else must not change before the training is resumed: method, drafter, learning rate, ...
    """
    data = hash_of_tensors(tensor for e in examples for tensor in (e.input_ids, e.positions, e.targets))
    return hash_of({"verifier": verifier, "data": data, "settings": dict(settings)})
