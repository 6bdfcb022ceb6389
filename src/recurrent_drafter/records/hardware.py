"""What computes here: measured times hold for this and nothing else."""

import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch


def hardware(device: str | None = None) -> dict[str, Any]:
    """Processor or accelerator, and how many threads compute; ``device`` by default cuda where there is one."""
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def peak_bytes() -> int:
    """The most memory that this process ever held, outside accelerators."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _processor() -> str:
    """The processor's name and what PyTorch uses of it, such as ``AMD EPYC 7763 (AVX2)``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
