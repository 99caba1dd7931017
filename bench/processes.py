"""What processes took of the machine, with their children, from /proc."""

from __future__ import annotations

import os
from pathlib import Path

MIB = 2**20


def children() -> dict[int, list[int]]:
    """By parent."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
            found.setdefault(parent, []).append(int(entry.name))
    return found


def cpu(pid: int) -> float:
    """Seconds that it and its children have run, in steps of a hundredth."""
    took = 0
    for one in (pid, *children().get(pid, ())):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        took += sum(map(int, fields[11 : 15 if one == pid else 13]))  # of those that have ended, the parent's own knows
    return took / os.sysconf("SC_CLK_TCK")


def resident(pid: int, below: dict[int, list[int]]) -> float:
    """MiB. What processes share is counted once: by their proportional set size."""
    held = 0.0
    for one in (pid, *below.get(pid, ())):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        held += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / MIB
    return held


def highest(pid: int) -> float:
    """MiB that it was resident with at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / MIB
