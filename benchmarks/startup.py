"""How long commands take to answer help, version, an unknown flag and a missing path: `python benchmarks/startup.py`.

Exits with 1 if a median of the last checkout given is above the limit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOWHERE = "./nowhere"
PAIR = ["--base_model", NOWHERE]
MISSING = {  # what a command or script is told to read and cannot
    "train": ["--llm_name_or_path", NOWHERE],
    "generate": [*PAIR, "--prompt", "Hi"],
    "bench": PAIR,
    "verify": PAIR,
    "tune": ["--speculator_path", NOWHERE],
    "reproduce": ["--dataset_path", "nowhere.jsonl"],
    "deploy": ["--model_path", NOWHERE, "--repo_name", "user/name"],
    "serve": ["demo", "--speculator", NOWHERE, "--dry_run"],
    "convert": [NOWHERE, "./new"],
    "demo": ["--speculator_path", NOWHERE],
}
MISSING |= {
    "train_speculator.py": MISSING["train"],
    "generate_speculator.py": MISSING["generate"],
    "experiment_paper_reproduction.py": MISSING["reproduce"],
    "huggingface_deployment.py": MISSING["deploy"],
    "test_distilled_dataset.py": MISSING["reproduce"],
    "demonstrate_training_scope.py": PAIR,
    "test_simple_end_to_end.py": PAIR,
    "test_end_to_end.py": PAIR,
}
CASES = ("--help", "--version", "unknown flag", "missing path")


def words(name: str, case: str) -> list[str]:
    """What stands after the command's name."""
    unknown = ["--spec-model" if name == "serve" else "--beem_width", "3"]  # what serve does not know is vLLM's
    return {"unknown flag": [*MISSING[name], *unknown], "missing path": MISSING[name]}.get(case, [case])


def seconds(checkout: Path, name: str, case: str, folder: str) -> float:
    """Of one process, from its start to its end."""
    program = [str(checkout / name)] if name.endswith(".py") else ["-m", "recurrent_drafter.cli.main", name]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}
    begun = time.perf_counter()
    subprocess.run([sys.executable, *program, *words(name, case)], cwd=folder, env=environment, capture_output=True)
    return time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.5, help="seconds that a median may be")
    parser.add_argument("--output_file", type=Path, help="every time, as JSON")
    options = parser.parse_args()
    cells = [(str(checkout), name, case) for name in MISSING for case in CASES for checkout in options.checkouts]
    times: dict[tuple[str, str, str], list[float]] = {cell: [] for cell in cells}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):  # checkouts side by side: what else runs on the machine slows both
            for checkout, name, case in cells:
                times[checkout, name, case].append(seconds(Path(checkout).resolve(), name, case, folder))
    for checkout in map(str, options.checkouts):
        print(f"\n{checkout}: medians of {options.runs} runs, in seconds\n{'':34}" + "".join(f"{c:>14}" for c in CASES))
        for name in MISSING:
            print(f"{name:34}" + "".join(f"{statistics.median(times[checkout, name, c]):14.2f}" for c in CASES))
    if options.output_file is not None:
        records = [{"checkout": c, "name": name, "case": k, "seconds": found} for (c, name, k), found in times.items()]
        options.output_file.write_text(json.dumps(records, indent=1) + "\n")
    last = [statistics.median(found) for (checkout, _, _), found in times.items() if checkout == cells[-1][0]]
    print(f"\nslowest median {max(last):.2f} s, expected at most {options.limit:g} s")
    return 1 if max(last) > options.limit else 0


if __name__ == "__main__":
    sys.exit(main())
