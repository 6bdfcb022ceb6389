"""Parsing of every schema and file kind, errors that name the line, skips that are counted, splits that never meet."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recurrent_drafter.assets import demo_verifier_path, sample_path
from recurrent_drafter.data.dialogues import DataError, Dialogue, Turn
from recurrent_drafter.data.sources import DATASET_NAMES, load_dialogues

HELLO = Dialogue((Turn("user", "Hi"), Turn("assistant", "Hello")))

RECORDS: dict[str, dict[str, Any]] = {
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "openai": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def chat(number: int) -> dict[str, Any]:
    """A ShareGPT record that differs from its neighbors."""
    return {"conversations": [{"from": "human", "value": f"Say {number}"}, {"from": "gpt", "value": f"{number}"}]}


@pytest.mark.parametrize("schema", RECORDS)
def test_schema_is_found_from_the_content(schema: str, tmp_path: Path) -> None:
    loaded = load_dialogues(None, write(tmp_path / "data.jsonl", RECORDS[schema]), "all")
    assert loaded.dialogues == (HELLO,)
    assert loaded.report.schema == schema


def test_the_same_conversation_has_the_same_hash_in_every_schema_and_file_kind(tmp_path: Path) -> None:
    record = RECORDS["sharegpt"]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([record], indent=2), encoding="utf-8")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([record]).encode()))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(RECORDS["openai"]).encode()))
    (tmp_path / "d.json").write_text(json.dumps(RECORDS["alpaca"]) + "\n\n")  # JSON lines in a .json file
    reports = [load_dialogues(None, str(path), "all").report for path in sorted(tmp_path.iterdir())]
    assert len({report.sha256 for report in reports}) == 1 and len(reports) == 4


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([RECORDS["sharegpt"], RECORDS["sharegpt"]]), path)
    assert load_dialogues(None, str(path), "all").dialogues == (HELLO, HELLO)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"data\.parquet: not a readable Parquet file"):
        load_dialogues(None, str(path), "all")


def test_roles_systems_and_text_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    record = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "USER", "content": "Hi"},
            {"role": "assistant", "content": parts},
        ]
    }
    (dialogue,) = load_dialogues(None, write(tmp_path / "data.jsonl", record), "all").dialogues
    assert dialogue == Dialogue((Turn("system", "Be brief."), *HELLO.turns))


def test_alpaca_input_is_joined_to_the_instruction(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    (dialogue,) = load_dialogues(None, write(tmp_path / "data.jsonl", record), "all").dialogues
    assert dialogue.turns == (Turn("user", "Add.\n\n1, 2"), Turn("assistant", "3"))


@pytest.mark.parametrize("key", ["turns", "prompt"])
def test_mt_bench_questions_are_kept_although_nobody_answers(key: str, tmp_path: Path) -> None:
    (dialogue,) = load_dialogues(None, write(tmp_path / "data.jsonl", {key: ["One?", "Two?"]}), "all").dialogues
    assert dialogue.turns == (Turn("user", "One?"), Turn("user", "Two?")) and not dialogue.has_reply


def test_plain_text_pieces_join_to_the_whole(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {n} of a text.\n{'It goes on. ' * 60}\n\n" for n in range(21)) + "x" * 20_000
    path = tmp_path / "text.txt"
    path.write_text(text)
    loaded = load_dialogues(None, str(path), "all")
    assert "".join(str(dialogue.text) for dialogue in loaded.dialogues) == text
    assert len(loaded.dialogues) == 8  # three paragraphs each, and the long line


def test_skips_are_counted_with_their_reasons(tmp_path: Path) -> None:
    def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
        return {"conversations": [{"from": who, "value": what} for who, what in pairs]}

    path = write(
        tmp_path / "data.jsonl",
        chat(1),
        turns(),
        turns(("human", " "), ("gpt", "")),
        turns(("human", "Hi")),
        turns(("human", "Hi"), ("gpt", "")),
        turns(("human", "Hi"), ("tool", "42"), ("gpt", "Hello")),
        turns(("human", "Hi"), ("gpt", None)),
        turns(("system", ""), ("human", "Hi"), ("gpt", "Hello")),
    )
    loaded = load_dialogues(None, path, "all")
    assert loaded.report.summary() == (
        "8 conversations, 6 skipped: 2 empty, 1 with a turn that is not text, 1 with an empty turn, "
        "1 with an unknown role, 1 without assistant turn"
    )
    assert (loaded.report.total, loaded.report.kept) == (8, 2)
    assert loaded.dialogues[1] == HELLO  # an empty system turn is the same as none


GOOD = json.dumps(RECORDS["sharegpt"])
BAD_LINES = {
    '{"conversations": [': "not JSON",
    "[1, 2]": "the record is list",
    '{"text": "no"}': "no `conversations` in the record",
    '{"conversations": "no"}': "`conversations` is str, expected a list",
    '{"conversations": ["no"]}': "turn 1 of `conversations` is str",
    '{"conversations": [{"value": "Hi"}]}': "turn 1 of `conversations` has no `from`",
    '{"conversations": [{"from": "human"}]}': "turn 1 of `conversations` has no `value`",
    '{"conversations": [{"from": "human", "value": 3}]}': "`value` of turn 1 is int, expected a string",
}


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES.items())
def test_a_bad_line_is_one_error_with_file_and_line(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DataError) as error:
        load_dialogues(None, str(path), "train")
    assert str(error.value).startswith(f"{path}:3: ") and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_record_of_an_array_is_found_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(f"[\n{GOOD},\n{GOOD},\n\n" + '{"other": 1}\n]')
    with pytest.raises(DataError, match=r"data\.json:5: no `conversations`"):
        load_dialogues(None, str(path), "all")
    path.write_text(f"[\n{GOOD},\n{GOOD}\n")
    with pytest.raises(DataError, match=r"data\.json:4: the file ends within the array"):
        load_dialogues(None, str(path), "all")
    path.write_text(json.dumps([RECORDS["alpaca"], RECORDS["alpaca"], {"other": 1}], indent=1))  # 5 lines each
    with pytest.raises(DataError, match=r"data\.json:12: no `instruction`"):
        load_dialogues(None, str(path), "all")
    path.write_text(f"[\n{GOOD},\n{{'a'}}]")
    with pytest.raises(DataError, match=r"data\.json:3: not JSON"):
        load_dialogues(None, str(path), "all")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"data\.txt:2: byte 0xff is not UTF-8"):
        load_dialogues(None, str(path), "all")
    path = tmp_path / "data.json"
    path.write_bytes(b'[\n\n"\xff"]')
    with pytest.raises(DataError, match=r"data\.json:3: byte 0xff is not UTF-8"):
        load_dialogues(None, str(path), "all")


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes, str]] = {
        "empty.jsonl": (b"", "is empty"),
        "blank.jsonl": (b"\n\n", "holds no records"),
        "array.json": (b"[]", "holds no records"),
        "other.jsonl": (b'{"a": 1, "b": 2}', ":1: unknown schema: the record's keys are `a`, `b`; expected one of"),
        "data.csv": (b"a,b", "unknown kind of file, expected one of .json"),
        "cut.jsonl.gz": (gzip.compress(GOOD.encode() * 99)[:-12], "damaged or cut off"),
        "not.jsonl.gz": (b"hello", "damaged or cut off"),
        "silent.jsonl": (b'{"conversations": []}\n' * 2, "none of the 2 records can be used (2 empty)"),
    }
    for name, (content, complaint) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            load_dialogues(None, str(path), "all")
        assert complaint in str(error.value) and name in str(error.value)
    with pytest.raises(DataError, match="does not exist"):
        load_dialogues(None, str(tmp_path / "none.jsonl"), "all")
    with pytest.raises(DataError, match="is a folder"):
        load_dialogues(None, str(tmp_path), "all")


def test_names() -> None:
    with pytest.raises(DataError, match="unknown dataset 'sharegtp': the names are demo, sharegpt, alpaca, mtbench"):
        load_dialogues("sharegtp", None, "train")
    with pytest.raises(DataError, match="limit of 0"):
        load_dialogues("demo", None, "train", limit=0)


@pytest.mark.parametrize("name", [name for name in DATASET_NAMES if name != "demo"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_hub_that_cannot_be_reached_is_an_error_with_two_ways_out(
    name: str, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError) as error:
        load_dialogues(name, None, split)
    assert str(error.value) == (
        f"dataset {name!r} cannot be loaded from the hub (no route to host). "
        "Without the hub, use --dataset_name demo or --dataset_path FILE"
    )


def test_hub_rows_go_through_the_same_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def fake(repository: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        asked.append((repository, config, options["split"]))
        if "wikitext" in repository:
            return [{"text": " = Title = \n"}, {"text": ""}, {"text": "A line . \n"}]
        return [chat(n) for n in range(100)]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    train, held_out = (load_dialogues("sharegpt", None, split).dialogues for split in ("train", "eval"))  # type: ignore[arg-type]
    assert len(train) + len(held_out) == 100 and not set(train) & set(held_out)
    (text,) = load_dialogues("wikitext", None, "eval").dialogues
    assert text.text == " = Title = \nA line . \n"
    assert [part for _, _, part in asked] == ["train", "train", "validation"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"id": 1}])
    with pytest.raises(DataError, match="sharegpt: record 1: unknown schema"):
        load_dialogues("sharegpt", None, "train")


@pytest.mark.parametrize("count", [2, 30, 400])
def test_splits_cover_everything_and_never_meet(count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *(chat(n % 200) for n in range(count)))  # 400: each one twice
    train, held_out, everything = (load_dialogues(None, path, s).dialogues for s in ("train", "eval", "all"))  # type: ignore[arg-type]
    assert train and held_out and not set(train) & set(held_out)
    assert sorted((*train, *held_out), key=str) == sorted(everything, key=str)
    assert len(held_out) <= max(5, 0.1 * count)  # about one in twenty, by the hash of each
    for limit in range(1, 4):  # a limit takes the first ones of the same split
        assert load_dialogues(None, path, "train", limit=limit).dialogues == train[:limit]
        assert load_dialogues(None, path, "eval", limit=limit).dialogues == held_out[:limit]


def test_one_conversation_cannot_be_on_both_sides(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", chat(1), chat(1))
    assert len(load_dialogues(None, path, "eval").dialogues) == 2
    with pytest.raises(DataError, match="nothing is left for train"):
        load_dialogues(None, path, "train")


def test_bundled_samples() -> None:
    train, held_out = load_dialogues("demo", None, "train"), load_dialogues("demo", None, "eval")
    assert (train.report.summary(), held_out.report.summary()) == ("3,000 conversations", "300 conversations")
    assert not set(train.dialogues) & set(held_out.dialogues)
    expected = {"gsm8k.alpaca.json": (300, "alpaca"), "mt_bench.jsonl": (80, "mtbench"), "wikitext2.txt": (31, "text")}
    for name, (count, schema) in expected.items():
        report = load_dialogues(None, str(sample_path(name)), "all").report
        assert (report.kept, report.schema) == (count, schema)
    with pytest.raises(FileNotFoundError, match=r"no bundled sample 'x'; the samples are gsm8k\.alpaca\.json"):
        sample_path("x")
    assert (demo_verifier_path() / "model.safetensors").stat().st_size <= 26_000_000


def test_bundled_data_loads_without_the_hub_libraries_or_torch() -> None:
    code = (
        "import sys; from recurrent_drafter.data.sources import load_dialogues; load_dialogues('demo', None, 'eval'); "
        "sys.exit(len({'datasets', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            r'{"conversations": [{"from": "human", "value": "hi \ud800"}, {"from": "gpt", "value": "x"}]}',
            "half of a surro",
        ),
        ("[" * 100_000, "cannot be read"),
        ('{"conversations": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_what_json_allows_and_nobody_can_use_is_named_with_its_line(line, message, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n' + line)
    with pytest.raises(DataError, match=f"odd.jsonl:2: .*{message}"):
        load_dialogues(None, str(path), "train")
