"""What a record of a measurement says beside its numbers: machine, commit, command, and how busy others kept the machine."""

import datetime
import os
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _field(path, key):
    for line in open(path):
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return ""


def busy_seconds():
    """CPU seconds of the whole machine since it started, idle and waiting left out."""
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _git(*arguments):
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def header():
    """The first entries of a record."""
    return {"command": " ".join([pathlib.Path(sys.executable).name, *sys.argv]),
            "commit": os.environ.get("STROBE_COMMIT")  # for a tree without its history
            or _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno") else ""),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"processor": _field("/proc/cpuinfo", "model name"), "processors": len(os.sched_getaffinity(0)),
                        "memory": _field("/proc/meminfo", "MemTotal")}}


def run(command):
    """Runs a program to its end; returns its output and how many processors others used meanwhile, on average."""
    busy, mine, start = busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - mine.ru_utime - mine.ru_stime
    return done.stdout, max(0.0, busy_seconds() - busy - own) / (time.monotonic() - start)
