"""Make the virtual environment that the Makefile installs into, unless it is there. It sees this Python's own packages
when they include a PyTorch that pyproject.toml accepts, so that a build chosen for the machine is kept.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path


def torch_is_here():
    """Whether this Python already has a torch in the range of pyproject.toml."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    lower, upper = re.search(r'"torch>=([\d.]+),<([\d.]+)"', text).groups()
    try:
        here = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False

    def release(version):
        return [int(n) for n in re.match(r"[\d.]+\d", version)[0].split(".")]

    return release(lower) <= release(here) < release(upper)


def make_venv(path):
    """Create the environment at `path`; a creation that fails leaves nothing."""
    keep = torch_is_here()
    print(f"making {path} on Python {sys.version.split()[0]}" + (", keeping its PyTorch" if keep else ""), flush=True)
    flags = ["--system-site-packages"] if keep else []
    done = subprocess.run([sys.executable, "-m", "venv", *flags, str(path)])
    if done.returncode:
        shutil.rmtree(path, ignore_errors=True)
        sys.exit(f"error: could not make {path}; on Debian and Ubuntu, apt install python3-venv may be missing")


def main(path):
    if sys.version_info < (3, 11):  # noqa: UP036  (this file runs before pip can refuse)
        have = f"{sys.executable} is {sys.version.split()[0]}"
        sys.exit(f"error: Python 3.11 or newer is needed, {have}: name another with make PYTHON=...")
    if not (path / "bin" / "python").exists():
        if path.exists():
            sys.exit(f"error: {path} is there but holds no working Python: delete it and run make again")
        make_venv(path)
    elif importlib.util.find_spec("pip") is None:
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
