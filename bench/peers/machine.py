"""Which machine, driver, clocks and versions a record was made with."""

import ctypes
import datetime
import functools
import importlib
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


@functools.cache
def _nvml():
    """(library, handle of GPU 0), or None. The driver brings the library; no Python package is needed."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    gpu = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu)):
        return None
    return library, gpu


def clocks() -> dict | None:
    """Present clocks (MHz), temperature (C) and power (W) of the GPU; what the driver does not tell is None, as is all without NVML."""
    if not (nvml := _nvml()):
        return None
    library, gpu = nvml

    def ask(function: str, *arguments) -> int | None:
        value = ctypes.c_uint()
        return None if getattr(library, function)(gpu, *arguments, ctypes.byref(value)) else value.value

    sm, memory, sensor = 1, 2, 0  # nvmlClockType_t, nvmlTemperatureSensors_t
    power = ask("nvmlDeviceGetPowerUsage")
    return {
        "sm_mhz": ask("nvmlDeviceGetClockInfo", sm),
        "memory_mhz": ask("nvmlDeviceGetClockInfo", memory),
        "celsius": ask("nvmlDeviceGetTemperature", sensor),
        "watts": None if power is None else power / 1000,
    }


def _version(module: str) -> str | None:
    try:
        return getattr(importlib.import_module(module), "__version__", "unknown")
    except ImportError:
        return None


def describe(command: list[str] | None = None) -> dict:
    """`command` is what repeats the measurement, by default this program's own."""
    import torch

    import strobe

    smi = _run("nvidia-smi", "-i", "0", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader")
    gpu, driver, power_limit = (x.strip() for x in smi.split(",")) if smi else (None, None, None)
    return {
        "gpu": gpu,
        "driver": driver,
        "power_limit": power_limit,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash_attn_3": _version("flash_attn_3"),
        "strobe": strobe.__version__,
        "commit": commit(),
        "command": command or [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
