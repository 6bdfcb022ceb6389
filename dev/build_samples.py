"""Build the bundled samples (``assets/data``) from the full public sets.

    python dev/build_samples.py --data FOLDER

FOLDER holds ``sgd_train.sharegpt.jsonl.gz``, ``sgd_dev.sharegpt.jsonl.gz``, ``gsm8k_train.sharegpt.jsonl.gz``,
``mbpp_874.alpaca.json``, ``mt_bench_question.jsonl`` and ``wikitext2_valid.txt``. Records are taken evenly over each
file, so every service and domain of Schema-Guided Dialogue occurs; of MBPP those that training on the whole file holds
out. The gzip header carries no time: the same input gives the same bytes.
"""

import argparse
import gzip
import json
import shutil
from pathlib import Path

from recurrent_drafter.data.sources import load_dialogues


def evenly(items: list[str], count: int) -> list[str]:
    """``count`` of the items, at equal distances, in their order."""
    if len(items) < count:
        raise SystemExit(f"error: {count} records were asked of a file that has {len(items)}")
    return [items[i * len(items) // count] for i in range(count)]


def read_gzip_lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def write_gzip(path: Path, lines: list[str]) -> None:
    """Write lines at the highest compression, without name or time in the header."""
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


def alpaca_record(line: str) -> dict[str, str]:
    """A GSM8K conversation (question, worked answer) as an Alpaca record."""
    question, answer = (turn["value"] for turn in json.loads(line)["conversations"])
    return {"instruction": "Solve this problem step by step.", "input": question, "output": answer}


def held_out(path: Path) -> list[dict[str, str]]:
    """The problems of MBPP that training on its file would not see."""
    dialogues = load_dialogues(None, str(path), "eval")
    return [{"instruction": d.turns[0].content, "input": "", "output": d.turns[1].content} for d in dialogues]


def write_alpaca(path: Path, records: list[dict[str, str]]) -> None:
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def excerpt(text: str, size: int) -> str:
    """The beginning of a text, cut at the first article heading (`` = Title = ``) after ``size`` characters."""
    end = text.find("\n = ", size)
    while end >= 0 and text[end + 4] == "=":  # " = = Section = = " is no article
        end = text.find("\n = ", end + 1)
    return text if end < 0 else text[: end + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the full sets")
    assets = Path(__file__).resolve().parents[1] / "src/recurrent_drafter/assets/data"
    parser.add_argument("--out", type=Path, default=assets, help="folder to write (default: the package's assets)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    for part, count in (("train", 3000), ("dev", 300)):
        name = f"sgd_{part}.sharegpt.jsonl.gz"
        write_gzip(args.out / name, evenly(read_gzip_lines(args.data / name), count))
    gsm8k = evenly(read_gzip_lines(args.data / "gsm8k_train.sharegpt.jsonl.gz"), 300)
    write_alpaca(args.out / "gsm8k.alpaca.json", [alpaca_record(line) for line in gsm8k])
    write_alpaca(args.out / "mbpp.alpaca.json", held_out(args.data / "mbpp_874.alpaca.json"))
    shutil.copyfile(args.data / "mt_bench_question.jsonl", args.out / "mt_bench.jsonl")
    text = (args.data / "wikitext2_valid.txt").read_text(encoding="utf-8")
    (args.out / "wikitext2.txt").write_text(excerpt(text, 100_000), encoding="utf-8")
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:>9,} bytes  {path.name}")


if __name__ == "__main__":
    main()
