"""Distilled targets on disk: computed in shards, once, by as many processes as there are.

A directory holds one run: ``manifest.json`` and a safetensors file of token ids per shard. Files appear whole, by
renaming, so whatever a killed run leaves is finished work.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.models.loading import verifier_fingerprint
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.records.paths import written_whole
from recurrent_drafter.records.provenance import hash_of, hash_of_tensors, write_json
from recurrent_drafter.training.distillation import GREEDY, TokenDraw, packed_for_passes, with_distilled_targets
from recurrent_drafter.training.examples import RootExample

MANIFEST = "manifest.json"
SHARD_TEXTS = 32  # texts in a shard: what a kill costs at most
POLL_SECONDS = 0.2


def distilled_dataset(
    verifier: Verifier,
    examples: Sequence[TrainExample],
    depths: int,
    end_ids: Sequence[int],
    directory: Path,
    *,
    draw: TokenDraw = GREEDY,
    fingerprint: str | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    process: tuple[int, int] = (0, 1),
) -> list[RootExample]:
    """Every text with the verifier's own K tokens after each of its roots, from ``directory`` where it has them.

    Process i of n computes every n-th shard, the i-th first, then waits for the others'. ``on_progress`` is given
    how far in the list of texts it is, and how many there are; ``fingerprint`` is the verifier's, if known already.
    Raises ValueError, in one line, where the directory holds targets of another verifier, data or settings.
    """
    settings = {
        "verifier": fingerprint or verifier_fingerprint(verifier),
        "data": hash_of_texts(examples),
        "texts": len(examples),
        "depths": depths,
        "end_ids": sorted(end_ids),
        "temperature": draw.temperature,
        "seed": draw.seed if draw.temperature > 0 else None,
    }
    starts = range(0, len(examples), SHARD_TEXTS)
    paths = _claimed(directory, settings, len(starts))
    own = range(process[0], len(paths), process[1])
    with packed_for_passes(verifier) if not all(paths[i].exists() for i in own) else nullcontext():
        for i in own:
            if not paths[i].exists():
                some = examples[starts[i] : starts[i] + SHARD_TEXTS]
                _write_shard(paths[i], with_distilled_targets(verifier, some, depths, end_ids, draw, starts[i]))
            on_progress(min((i + 1) * SHARD_TEXTS, len(examples)), len(examples))
    while not all(path.exists() for path in paths):  # other processes' shards
        time.sleep(POLL_SECONDS)
    return [row for path in paths for row in _read_shard(path)]


def hash_of_texts(examples: Sequence[TrainExample]) -> str:
    return hash_of_tensors(tensor for example in examples for tensor in (example.input_ids, example.span_ids))


def _claimed(directory: Path, settings: Mapping[str, Any], shards: int) -> list[Path]:
    """The paths of so many shards, with a manifest beside them, once it is written or found to be of these settings."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"shard-{number:05d}.safetensors" for number in range(shards)]
    manifest = directory / MANIFEST
    if manifest.exists():
        theirs = json.loads(manifest.read_text())["settings"]
        differing = [name for name in settings if theirs.get(name) != settings[name]]
        if differing:
            raise ValueError(
                f"{directory} holds the distilled targets of another run, which differs in {', '.join(differing)}: "
                "give another directory, or remove this one"
            )
        return paths
    if any(directory.glob("shard-*.safetensors")):
        raise ValueError(f"{directory} holds shards without their {MANIFEST}: give another directory")
    record = {"hash": hash_of(settings), "settings": dict(settings), "shards": [path.name for path in paths]}
    write_json(manifest, record)
    return paths


def _write_shard(path: Path, rows: Sequence[RootExample]) -> None:
    shard = {name: torch.cat([getattr(row, name) for row in rows]) for name in ("input_ids", "positions", "targets")}
    shard["lengths"] = torch.tensor([len(row.input_ids) for row in rows])
    shard["roots"] = torch.tensor([len(row.positions) for row in rows])
    with written_whole(path) as unfinished:
        save_file({name: tensor.int() for name, tensor in shard.items()}, unfinished)


def _read_shard(path: Path) -> list[RootExample]:
    try:
        shard = {name: tensor.long() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, and it will be computed again") from error
    lengths, roots = shard["lengths"].tolist(), shard["roots"].tolist()
    columns = (shard["input_ids"].split(lengths), shard["positions"].split(roots), shard["targets"].split(roots))
    return [RootExample(*row) for row in zip(*columns, strict=True)]
