#!/usr/bin/env python3
"""What the assembler says of every CUDA kernel: registers, spills, static shared memory.

As a compiler launcher (kernel_budget.py COMPILER ARGS...): runs the compiler, keeps its assembler's report beside the object file and
fails the build when a kernel of a plain row spills more than cmake/kernel_spills.txt allows it, under the compiler that the file names.

kernel_budget.py --table BUILD_DIR: all reports of a build as a Markdown table.
"""
import json
import pathlib
import re
import subprocess
import sys

ROWS = pathlib.Path(__file__).parents[1] / "src" / "variants.def"
SPILLS = pathlib.Path(__file__).with_name("kernel_spills.txt")
ROW = re.compile(r"^sm\d+_(forward|backward)_")


def reports_of(log):
    """(architecture, kernel, registers, stack, spilled, static shared memory) of every kernel in the assembler's output."""
    reports, arch, kernel, numbers = [], "", "", (0, 0)
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel, arch = found.groups()
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            numbers = tuple(int(n) for n in found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            plain_name = re.search(r"([a-z][a-z_]*)IL", kernel)
            reports.append({"arch": arch, "kernel": plain_name.group(1) if plain_name else kernel, "registers": int(found.group(1)),
                            "stack_bytes": numbers[0], "spilled_bytes": numbers[1],
                            "static_shared_bytes": int(shared.group(1)) if shared else 0})
    return reports


def allowances():
    """The compiler release that the recorded spills belong to, and (pattern, bytes) of each."""
    release, allowed = "", []
    for line in SPILLS.read_text().splitlines():
        words = line.split("#")[0].split()
        if len(words) == 2 and words[0] == "nvcc":
            release = words[1]
        elif len(words) == 2:
            allowed.append((re.compile(words[0]), int(words[1])))
    return release, allowed


def excess(row, reports):
    """A line for each kernel that spills more than it may."""
    _, allowed = allowances()
    lines = []
    for r in reports:
        name = f"{r['arch']}/{row}/{r['kernel']}"
        most = max((size for pattern, size in allowed if pattern.search(name)), default=0)
        if r["spilled_bytes"] > most:
            lines.append(f"{name}: {r['registers']} registers and {r['spilled_bytes']} bytes spilled, {most} are allowed")
    return lines


def compiler_release(command):
    nvcc = next((word for word in command if pathlib.Path(word).name == "nvcc"), None)
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else ""


def launch(command):
    run = subprocess.run(command, capture_output=True, text=True)
    log = run.stdout + run.stderr
    quiet = re.compile(r"^ptxas info|^\s+\d+ bytes stack frame|^\s*$")
    sys.stderr.write("".join(line + "\n" for line in log.splitlines() if not quiet.search(line)))
    target = command[command.index("-o") + 1] if "-o" in command else ""
    row = pathlib.Path(target).name.removesuffix(".cu.o")
    if run.returncode != 0 or not ROW.search(row):
        return run.returncode
    reports = reports_of(log)
    pathlib.Path(target + ".budget").write_text(json.dumps({"row": row, "kernels": reports}))
    too_much = excess(row, reports) if "_plain_" in row else []
    if not too_much:
        return 0
    recorded = allowances()[0]
    strict = compiler_release(command) == recorded
    print(f"{'error' if strict else 'warning'}: a plain kernel must keep its tile in registers:", *too_much, sep="\n  ", file=sys.stderr)
    if not strict:
        return 0
    print(f"choose another tile in src/variants.def, or record the spill in {SPILLS}", file=sys.stderr)
    pathlib.Path(target).unlink()
    return 1


def rows_of_today():
    """The names of all rows; a build folder may hold reports of others."""
    fields = re.findall(r"^STROBE_VARIANT\(([^)]*)\)", ROWS.read_text(), re.MULTILINE)
    return {"_".join(field.strip() for field in row.split(",")) for row in fields}


def table(build):
    today = rows_of_today()
    print("| row | kernel | target | registers | spilled bytes | static shared bytes |")
    print("|---|---|---|---|---|---|")
    for path in sorted(pathlib.Path(build).rglob("*.cu.o.budget")):
        report = json.loads(path.read_text())
        for k in report["kernels"] if report["row"] in today else []:
            print(f"| {report['row']} | {k['kernel']} | {k['arch']} | {k['registers']} | {k['spilled_bytes']} | {k['static_shared_bytes']} |")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--table":
        table(sys.argv[2])
    elif len(sys.argv) > 1:
        sys.exit(launch(sys.argv[1:]))
    else:
        sys.exit(__doc__)
