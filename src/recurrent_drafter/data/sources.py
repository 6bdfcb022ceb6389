"""Where dialogues come from: bundled samples, local files, and the hub (this file alone may reach it)."""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from recurrent_drafter.assets import sample_path
from recurrent_drafter.data.dialogues import DataError, Dialogue, LoadReport, SkippedError, find_schema, parse_record
from recurrent_drafter.data.parsing import Place, read_records, text_pieces

logger = logging.getLogger(__name__)

Split = Literal["train", "eval", "all"]
DATASET_NAMES = ("demo", "sharegpt", "alpaca", "mtbench", "wikitext")
HAVE_EVALUATION_SET = ("demo", "alpaca", "wikitext")  # those with an evaluation set of their own

_ONE_IN = 20  # share of a set without an evaluation split of its own that is held out


@dataclass(frozen=True)
class LoadedDialogues:
    """Dialogues and the account of how they were read."""

    dialogues: tuple[Dialogue, ...]
    report: LoadReport


def load_dialogues(
    dataset_name: str | None,
    dataset_path: str | None,
    split: Split,
    limit: int | None = None,
    cache_dir: str | None = None,
) -> LoadedDialogues:
    """Load the dialogues of one split, at most ``limit`` of them.

    A ``dataset_path`` goes before the name. ``demo``, ``alpaca`` and ``wikitext`` have evaluation sets of their own;
    of any other source the conversations whose content hashes to 0 modulo 20 (or, if there is none, the one with the
    smallest hash) are held out, so that equal conversations never lie on both sides. ``all`` is the training source
    with nothing held out. Raises DataError for anything that cannot be read, and never reads something else instead.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} conversations, expected at least 1")
    records, source, own_split = _records(dataset_name, dataset_path, split, cache_dir, streaming=False)
    loaded = _collect(records, source, "all" if own_split else split, limit)
    logger.info("%s (schema %s): %s", source, loaded.report.schema, loaded.report.summary())
    return loaded


def _records(
    dataset_name: str | None, dataset_path: str | None, split: Split, cache_dir: str | None, *, streaming: bool
) -> tuple[Iterator[Place], str, bool]:
    """Records, what their source is called, and whether they are of this split already."""
    if dataset_path is not None:
        return read_records(Path(dataset_path).expanduser()), dataset_path, False
    if dataset_name == "demo":
        sample = sample_path(f"sgd_{'dev' if split == 'eval' else 'train'}.sharegpt.jsonl.gz")
        return read_records(sample), "demo", True
    if dataset_name in DATASET_NAMES:
        records = _hub_records(str(dataset_name), split, cache_dir, streaming)
        return records, str(dataset_name), dataset_name in HAVE_EVALUATION_SET
    names = ", ".join(DATASET_NAMES)
    raise DataError(f"unknown dataset {dataset_name!r}: the names are {names}; a local file goes by --dataset_path")


class DialogueStream:
    """The training dialogues of a source, read anew by every iteration and never held together.

    Divided as `load_dialogues` divides (but a source without any held-out conversation is given whole); ``report`` is
    the account of the last iteration, so far. With the report of an ``earlier`` reading, DataError is raised as soon as
    this one turns out not to begin with the same dialogues.
    """

    def __init__(
        self,
        dataset_name: str | None,
        dataset_path: str | None,
        cache_dir: str | None = None,
        earlier: LoadReport | None = None,
    ) -> None:
        self._source = (dataset_name, dataset_path, "train", cache_dir)
        self._earlier = earlier
        self._count(str(dataset_path or dataset_name), "")

    def _count(self, source: str, schema: str) -> None:
        self._name, self._schema = source, schema
        self._total = self._kept = 0
        self._skipped: Counter[str] = Counter()
        self._hash = hashlib.sha256()

    @property
    def report(self) -> LoadReport:
        """What has been read; the hash, like the counts, is of the beginning of the source, as far as that goes."""
        sha256 = self._hash.hexdigest()
        return LoadReport(self._total, self._kept, dict(self._skipped), self._schema, self._name, sha256)

    def _check_beginning(self, *, ended: bool = False) -> None:
        earlier = self._earlier
        if earlier is None:
            return
        too_short = ended and self._kept < earlier.kept
        if too_short or (self._kept == earlier.kept and self._hash.hexdigest() != earlier.sha256):
            raise DataError(
                f"{self._name} does not begin with the {earlier.kept:,} conversations that this training has "
                "read: resume with the data that it was begun with, or give another output folder"
            )

    def __iter__(self) -> Iterator[Dialogue]:
        name, path, split, cache_dir = self._source
        records, source, own_split = _records(name, path, cast(Split, split), cache_dir, streaming=True)
        self._count(source, "")
        for place, record in records:
            self._total += 1
            try:
                self._schema = self._schema or find_schema(record)
                dialogue = parse_record(record, self._schema)
            except SkippedError as reason:
                self._skipped[str(reason)] += 1
                continue
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            if own_split or not _held_out(dialogue):
                self._kept += 1
                self._hash.update(dialogue.digest())
                self._check_beginning()
                yield dialogue
        if self._total == 0:
            raise DataError(f"{source} is empty: it holds no records")
        self._check_beginning(ended=True)


def _held_out(dialogue: Dialogue) -> bool:
    """Whether a conversation is of the evaluation part: by its content alone."""
    return int.from_bytes(dialogue.digest()[:8]) % _ONE_IN == 0


def _collect(records: Iterable[Place], source: str, split: Split, limit: int | None) -> LoadedDialogues:
    """Parse, count and divide; reads no further than ``limit`` demands."""
    parsed: dict[str, list[Dialogue]] = {"train": [], "eval": []}
    skipped: Counter[str] = Counter()
    schema, total = "", 0
    for place, record in records:
        total += 1
        try:
            schema = schema or find_schema(record)
            dialogue = parse_record(record, schema)
        except SkippedError as reason:
            skipped[str(reason)] += 1
            continue
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        side = "eval" if split != "all" and _held_out(dialogue) else "train"
        parsed[side].append(dialogue)
        # The side of the smallest hash below is settled only once something has been held out.
        enough = limit is not None and len(parsed["eval" if split == "eval" else "train"]) >= limit
        if enough and (split == "all" or parsed["eval"]):
            break
    if total == 0:
        raise DataError(f"{source} is empty: it holds no records")
    if not any(parsed.values()):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        raise DataError(f"{source}: none of the {total:,} records can be used ({reasons})")
    if split != "all" and not parsed["eval"]:
        smallest = min(dialogue.digest() for dialogue in parsed["train"])
        for side in ("eval", "train"):  # all copies of it, so that none stays behind
            parsed[side] = [d for d in parsed["train"] if (d.digest() == smallest) == (side == "eval")]
    dialogues = tuple(parsed["eval" if split == "eval" else "train"][:limit])
    if not dialogues:
        raise DataError(
            f"{source}: nothing is left for {split}, because one conversation cannot be both trained on and held out; "
            "give at least two different ones"
        )
    sha256 = hashlib.sha256(b"".join(dialogue.digest() for dialogue in dialogues)).hexdigest()
    return LoadedDialogues(dialogues, LoadReport(total, len(dialogues), dict(skipped), schema, source, sha256))


def _hub_records(name: str, split: Split, cache_dir: str | None, streaming: bool) -> Iterator[Place]:
    """Records of a hub dataset; every way in which the hub can fail becomes one DataError."""
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # its client's: httpx or httpx2

    try:
        rows = iter(_hub_rows(name, split, cache_dir, streaming))
        first = next(rows, None)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, http_error, DatasetsError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"dataset {name!r} cannot be loaded from the hub ({cause}). "
            "Without the hub, use --dataset_name demo or --dataset_path FILE"
        ) from error
    for number, record in enumerate(itertools.chain([] if first is None else [first], rows), start=1):
        yield f"{name}: record {number}", record


def _hub_rows(name: str, split: Split, cache_dir: str | None, streaming: bool) -> Iterable[Any]:
    import datasets  # type: ignore[import-untyped]  # imported here: slow, and the bundled data does not need it

    def rows(repository: str, part: str, config: str | None = None) -> Iterable[dict[str, Any]]:
        loaded = datasets.load_dataset(repository, config, split=part, cache_dir=cache_dir, streaming=streaming)
        return cast(Iterable[dict[str, Any]], loaded)

    if name == "sharegpt":
        return rows("Aeala/ShareGPT_Vicuna_unfiltered", "train")
    if name == "mtbench":
        return rows("HuggingFaceH4/mt_bench_prompts", "train")
    if name == "wikitext":
        part = "validation" if split == "eval" else "train"
        lines = (row["text"] for row in rows("Salesforce/wikitext", part, "wikitext-2-raw-v1"))
        return ({"text": piece} for _, piece in text_pieces(lines))
    if split != "eval":
        return rows("tatsu-lab/alpaca", "train")
    from huggingface_hub import hf_hub_download

    file = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset", cache_dir=cache_dir)
    return (record for _, record in read_records(Path(file)))
