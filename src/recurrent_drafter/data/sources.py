"""Where dialogues come from: bundled samples, local files, and the hub (this file alone may reach it)."""

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from recurrent_drafter.assets import sample_path
from recurrent_drafter.data.dialogues import DataError, Dialogue, LoadReport, SkippedError, find_schema, parse_record
from recurrent_drafter.data.parsing import Place, read_records, text_pieces

logger = logging.getLogger(__name__)

Split = Literal["train", "eval", "all"]
DialogueLike = Dialogue | Mapping[str, Any] | str
_ONE_IN = 20  # share of a set without an evaluation set of its own that is held out


@dataclass(frozen=True)
class HubDataset:
    """Where a dataset lies on the hub. Its records have a schema of ``dialogues.py``, or hold one line of text each.

    Its evaluation set, if it has one, is a split of the same repository or a file (repository, name) of another.
    """

    repository: str
    config: str | None = None
    evaluation_split: str | None = None
    evaluation_file: tuple[str, str] | None = None
    lines: bool = False


HUB_DATASETS = {
    "sharegpt": HubDataset("Aeala/ShareGPT_Vicuna_unfiltered"),
    "alpaca": HubDataset("tatsu-lab/alpaca", evaluation_file=("tatsu-lab/alpaca_eval", "alpaca_eval.json")),
    "mtbench": HubDataset("HuggingFaceH4/mt_bench_prompts"),
    "wikitext": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", evaluation_split="validation", lines=True),
}
DATASET_NAMES = ("demo", *HUB_DATASETS)
HAVE_EVALUATION_SET = (
    "demo",
    *(name for name, found in HUB_DATASETS.items() if found.evaluation_split or found.evaluation_file),
)


@dataclass(frozen=True)
class LoadedDialogues:
    dialogues: tuple[Dialogue, ...]
    report: LoadReport

    def __iter__(self) -> Iterator[Dialogue]:
        return iter(self.dialogues)


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
    records, own_split = _records(dataset_name, dataset_path, split, cache_dir, streaming=False)
    source = str(dataset_path or dataset_name)
    loaded = _collect(records, source, "all" if own_split else split, limit)
    logger.info("%s (schema %s): %s", source, loaded.report.schema, loaded.report.summary())
    return loaded


def divide_dialogues(records: Sequence[DialogueLike], split: Split) -> LoadedDialogues:
    """One split of what is in memory, divided as `load_dialogues` divides a file. Raises DataError as it does.

    All of one kind: dialogues, records of one of the schemas that files may have, or strings: prompts of one question.
    """
    places = ((f"dialogue {number}", _as_record(given)) for number, given in enumerate(records, start=1))
    return _collect(places, "the data given", split, None)


def _as_record(given: DialogueLike) -> Mapping[str, Any]:
    if isinstance(given, str):
        return {"turns": [given]}
    if not isinstance(given, Dialogue):
        return given
    if given.text is not None:
        return {"text": given.text}
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in given.turns]}


def _records(
    dataset_name: str | None, dataset_path: str | None, split: Split, cache_dir: str | None, *, streaming: bool
) -> tuple[Iterator[Place], bool]:
    """Records, and whether they are of this split already."""
    if dataset_path is not None:
        return read_records(Path(dataset_path).expanduser()), False
    if dataset_name == "demo":
        sample = sample_path(f"sgd_{'dev' if split == 'eval' else 'train'}.sharegpt.jsonl.gz")
        return read_records(sample), True
    name = str(dataset_name)
    check_name(name)
    return _hub_records(name, split, cache_dir, streaming), name in HAVE_EVALUATION_SET


def check_name(name: str) -> None:
    """Raise DataError for a name that is none of a dataset."""
    if name not in DATASET_NAMES:
        names = ", ".join(DATASET_NAMES)
        raise DataError(f"unknown dataset {name!r}: the names are {names}; a local file goes by --dataset_path")


@dataclass
class DialogueStream:
    """The training dialogues of a source, read anew by every iteration and never held together.

    Divided as `load_dialogues` divides (but a source without any held-out conversation is given whole); ``report`` is
    the account of the last iteration, so far. With the report of an ``earlier`` reading, DataError is raised as soon as
    this one turns out not to begin with the same dialogues.
    """

    dataset_name: str | None
    dataset_path: str | None
    cache_dir: str | None = None
    earlier: LoadReport | None = None

    def __post_init__(self) -> None:
        self._reading = _Reading(str(self.dataset_path or self.dataset_name))

    @property
    def report(self) -> LoadReport:
        """What has been read; the hash, like the counts, is of the beginning of the source, as far as that goes."""
        return self._reading.report()

    def __iter__(self) -> Iterator[Dialogue]:
        records, own_split = _records(self.dataset_name, self.dataset_path, "train", self.cache_dir, streaming=True)
        self._reading = reading = _Reading(self._reading.source)
        for dialogue in reading.dialogues(records):
            if own_split or not _held_out(dialogue):
                reading.keep(dialogue)
                self._check_beginning()
                yield dialogue
        self._check_beginning(ended=True)

    def _check_beginning(self, *, ended: bool = False) -> None:
        earlier, reading = self.earlier, self._reading
        if earlier is None:
            return
        too_short = ended and reading.kept < earlier.kept
        if too_short or (reading.kept == earlier.kept and reading.hash.hexdigest() != earlier.sha256):
            raise DataError(
                f"{reading.source} does not begin with the {earlier.kept:,} conversations that this training has "
                "read: resume with the data that it was begun with, or give another output folder"
            )


@dataclass
class _Reading:
    """The running account of a source: parses its records, counts them, and hashes what is kept of them."""

    source: str
    schema: str = ""
    total: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    hash: Any = field(default_factory=hashlib.sha256)

    def dialogues(self, records: Iterable[Place]) -> Iterator[Dialogue]:
        """The usable records, parsed by the first one's schema; DataError names the place of one that breaks it."""
        for place, record in records:
            self.total += 1
            try:
                self.schema = self.schema or find_schema(record)
                dialogue = parse_record(record, self.schema)
            except SkippedError as reason:
                self.skipped[str(reason)] += 1
                continue
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            yield dialogue
        if self.total == 0:
            raise DataError(f"{self.source} is empty: it holds no records")

    def keep(self, dialogue: Dialogue) -> None:
        self.kept += 1
        self.hash.update(dialogue.digest())

    def report(self) -> LoadReport:
        skipped, sha256 = dict(self.skipped), self.hash.hexdigest()
        return LoadReport(self.total, self.kept, skipped, self.schema, self.source, sha256)


def _held_out(dialogue: Dialogue) -> bool:
    """Whether a conversation is of the evaluation part: by its content alone."""
    return int.from_bytes(dialogue.digest()[:8]) % _ONE_IN == 0


def _collect(records: Iterable[Place], source: str, split: Split, limit: int | None) -> LoadedDialogues:
    """Read and divide; no further than ``limit`` demands."""
    reading, side = _Reading(source), "eval" if split == "eval" else "train"
    parts: dict[str, list[Dialogue]] = {"train": [], "eval": []}
    for dialogue in reading.dialogues(records):
        parts["eval" if split != "all" and _held_out(dialogue) else "train"].append(dialogue)
        # The side of the smallest hash below is settled only once something has been held out.
        enough = limit is not None and len(parts[side]) >= limit
        if enough and (split == "all" or parts["eval"]):
            break
    if not any(parts.values()):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reading.skipped.items()))
        raise DataError(f"{source}: none of the {reading.total:,} records can be used ({reasons})")
    if split != "all" and not parts["eval"]:
        smallest = min(dialogue.digest() for dialogue in parts["train"])
        parts[side] = [d for d in parts["train"] if (d.digest() == smallest) == (side == "eval")]  # with all its copies
    dialogues = tuple(parts[side][:limit])
    if not dialogues:
        raise DataError(
            f"{source}: nothing is left for {split}, because one conversation cannot be both trained on and held out; "
            "give at least two different ones"
        )
    for dialogue in dialogues:
        reading.keep(dialogue)
    return LoadedDialogues(dialogues, reading.report())


def _hub_records(name: str, split: Split, cache_dir: str | None, streaming: bool) -> Iterator[Place]:
    """Records of a hub dataset; every way in which the hub can fail becomes one DataError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HTTPError  # its client's: httpx or httpx2

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
    import datasets  # imported here: slow, and the bundled data does not need it
    from huggingface_hub import hf_hub_download

    found = HUB_DATASETS[name]
    if split == "eval" and found.evaluation_file:
        repository, filename = found.evaluation_file
        file = hf_hub_download(repository, filename, repo_type="dataset", cache_dir=cache_dir)
        return (record for _, record in read_records(Path(file)))
    part = found.evaluation_split if split == "eval" and found.evaluation_split else "train"
    rows = datasets.load_dataset(found.repository, found.config, split=part, cache_dir=cache_dir, streaming=streaming)
    if found.lines:
        return ({"text": piece} for _, piece in text_pieces(row["text"] for row in rows))
    return cast(Iterable[Any], rows)
