"""Which machine, driver, clocks and versions a record was made with."""

import datetime
import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str:
    """STROBE_COMMIT, for a tree without its history; else the commit of this tree."""
    described = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return os.environ.get("STROBE_COMMIT") or _run(*described) or "unknown"


def clocks() -> dict | None:
    """Present clocks (MHz), temperature (C) and power (W) of the GPU; None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
            "celsius": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
            "watts": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        }
    except pynvml.NVMLError:
        return None


def describe() -> dict:
    import torch

    import strobe

    smi = _run("nvidia-smi", "-i", "0", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader")
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu, driver, power_limit = (x.strip() for x in smi.split(",")) if smi else (None, None, None)
    return {
        "gpu": gpu,
        "driver": driver,
        "power_limit": power_limit,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "strobe": strobe.__version__,
        "commit": commit(),
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
