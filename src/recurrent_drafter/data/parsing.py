"""Records of a local file, each with the place it stands at, so that an error can name the line."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from recurrent_drafter.data.dialogues import DataError

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".txt", ".parquet")

_BETWEEN = re.compile(r"[ \t\r\n,]*")  # records
_PIECE = 2_000  # characters after which a plain text is divided at the next blank line ...
_LONG_PIECE = 8_000  # ... and at the next line end if no blank line comes

Place = tuple[str, Any]  # ("FILE:17", the record)


def check_file(path: str | Path) -> None:
    """Raise DataError unless there is such a file."""
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a folder, expected a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}: give a {', '.join(SUFFIXES)} file")


def read_records(path: Path) -> Iterator[Place]:
    """Yield ``(place, record)`` from a .json, .jsonl (plain or .gz), .txt or .parquet file.

    Plain text comes as records ``{"text": ...}``, divided at blank lines into pieces of about 2,000 characters that
    join to the whole. Raises DataError, with the line number, for whatever cannot be read.
    """
    check_file(path)
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith((".json", ".json.gz")):
            yield from _json(path)
        elif name.endswith(".txt"):
            yield from ((f"{path}:{line}", {"text": text}) for line, text in text_pieces(_lines(path)))
        else:
            yield from _json_lines(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut off ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n")
        path, _, first = place.rpartition(":")
        raise DataError(f"{path}:{int(first) + line}: byte 0x{raw[error.start]:02x} is not UTF-8 text") from error


def _lines(path: Path) -> Iterator[str]:
    with _open(path) as raw:
        for number, line in enumerate(raw, start=1):
            yield _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{path}:{number}")


def _json_lines(path: Path) -> Iterator[Place]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from error
        except (RecursionError, ValueError) as error:  # nested too deep, a number too long
            raise DataError(f"{path}:{number}: cannot be read ({error})") from error
        yield f"{path}:{number}", record


def _json(path: Path) -> Iterator[Place]:
    """An array of records, or records that follow one another; decoded one by one to know their lines."""
    with _open(path) as raw:
        text = _decode(raw.read().removeprefix(b"\xef\xbb\xbf"), f"{path}:1")
    decoder, line, position = json.JSONDecoder(), 1, 0
    is_array = text.lstrip().startswith("[")
    if is_array:
        position = text.index("[") + 1
        line += text.count("\n", 0, position)
    while True:
        start, position = position, _BETWEEN.match(text, position).end()  # type: ignore[union-attr]  # it always matches
        line += text.count("\n", start, position)
        if position == len(text):
            if is_array:
                raise DataError(f"{path}:{line}: the file ends within the array, expected `]`")
            return
        if is_array and text[position] == "]":
            return
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}:{line}: cannot be read ({error})") from error
        yield f"{path}:{line}", record
        line += text.count("\n", position, end)
        position = end


def text_pieces(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Divide lines (with their line ends) into pieces at blank lines; yields the first line's number and the piece."""
    piece: list[str] = []
    size, first = 0, 1
    for number, line in enumerate(lines, start=1):
        piece.append(line)
        size += len(line)
        if (size >= _PIECE and not line.strip()) or size >= _LONG_PIECE:
            yield first, "".join(piece)
            piece, size, first = [], 0, number + 1
    if piece:
        yield first, "".join(piece)


def _parquet(path: Path) -> Iterator[Place]:
    import pyarrow  # imported here: a second's work that other files do not need
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1_000):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
