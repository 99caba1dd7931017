"""CPU time and memory of processes and their children, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

MIB = 2**20


def children() -> dict[int, list[int]]:
    """Return the ids of child processes by the id of their parent."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # the process has ended
                continue
            children.setdefault(parent, []).append(int(entry.name))
    return children


def cpu(pid: int) -> float:
    """Return the CPU seconds of a process and its children, with a resolution of 10 ms."""
    ticks = 0
    for member in (pid, *children().get(pid, ())):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        # Fields 13 and 14 hold the time of children that have ended.
        ticks += sum(map(int, fields[11 : 15 if member == pid else 13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident(pid: int, children: dict[int, list[int]]) -> float:
    """Return the resident MiB. The proportional set size counts shared memory once."""
    resident_mib = 0.0
    for member in (pid, *children.get(pid, ())):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        resident_mib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / MIB
    return resident_mib


def highest(pid: int) -> float:
    """Return the peak of the resident memory in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / MIB
