"""What every test shares: no network, and the three kinds of tests that run only when asked for."""

import os
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RECURRENT_DRAFTER_CACHE"] = tempfile.mkdtemp(prefix="recurrent-drafter-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of two layers: a second thread mostly waits

OPT_IN = {"gpu": "needs a CUDA device", "slow": "takes minutes", "vllm": "needs vLLM"}


def pytest_addoption(parser):
    for marker, reason in OPT_IN.items():
        parser.addoption(f"--run-{marker}", action="store_true", help=f"also run tests marked {marker} ({reason})")


def pytest_collection_modifyitems(config, items):
    skipped = {marker: reason for marker, reason in OPT_IN.items() if not config.getoption(f"--run-{marker}")}
    for item in items:
        for marker, reason in skipped.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{reason}: run with --run-{marker}"))
