"""Measure the memory of every process under load: python bench/memory.py [--minutes 10] [--rate 150].

The stack is that of bench/mirror.py with every request mirrored, at a steady rate. The script reads the resident memory
of each process and its children once per second, in MiB, and draws it into bench/memory.svg.

- `memory_NAME_mib` is the median of the last tenth of the time, with the minimum and maximum of the whole.
- `memory_NAME_growth` is the growth since the second tenth, as a share. It is near 0 if memory is bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import processes
from asgi import request
from load import Users
from mirror import deployed, sample
from rows import Row, end_in_order

from abreast_sidecar.stack.stack import Stack

USERS = 8
PLOT = Path(__file__).with_name("memory.svg")
COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#555555")
WIDTH, HEIGHT, LEFT, BELOW, LEGEND = 760, 300, 60, 40, 130


async def watch(stack: Stack, pids: Mapping[str, int], minutes: float, rate: float) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in pids}
    await sample(stack, 1.0)
    async with Users(
        stack.envoy_settings.listen.port, lambda number: request(sampled=False, number=number), count=USERS
    ) as users:
        load = asyncio.create_task(users.pace(rate, minutes * 60))
        until = time.monotonic() + minutes * 60
        while time.monotonic() < until and not load.done():
            children = processes.children()
            for name, pid in pids.items():
                samples[name].append(processes.resident(pid, children))
            await asyncio.sleep(1.0)
        answers = await load
    if answers.errors:
        raise RuntimeError(f"users saw {answers.errors} errors")
    return samples


def list_pids(stack: Stack, versions: Mapping[str, int]) -> dict[str, int]:
    servers = {name: server.process.pid for name, server in stack.servers.items() if server.process is not None}
    return {**servers, **versions}


def summarise(name: str, values: Sequence[float]) -> list[Row]:
    tenth = max(1, len(values) // 10)
    early, late = statistics.median(values[tenth : 2 * tenth] or values), statistics.median(values[-tenth:])
    return [
        {
            "name": f"memory_{name}_mib",
            "value": round(late, 1),
            "unit": "MiB",
            "min": round(min(values), 1),
            "max": round(max(values), 1),
            "runs": 1,
        },
        {
            "name": f"memory_{name}_growth",
            "value": round(late / early - 1, 3),
            "unit": "",
            "min": round(late / early - 1, 3),
            "max": round(late / early - 1, 3),
            "runs": 1,
        },
    ]


def plot(samples: Mapping[str, Sequence[float]], minutes: float) -> str:
    """Draw a line per process over time, as SVG."""
    maximum = max(max(values) for values in samples.values()) * 1.1
    across, up = WIDTH - LEFT - LEGEND, HEIGHT - BELOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<path d="M{LEFT} 0V{up}H{LEFT + across}" fill="none" stroke="#999"/>',
    ]
    for step in range(5):
        y = up - up * step / 5
        parts.append(f'<text x="{LEFT - 6}" y="{y:.0f}" text-anchor="end">{maximum * step / 5:.0f} MiB</text>')
        parts.append(f'<text x="{LEFT + across * step / 5:.0f}" y="{up + 16}">{minutes * step / 5:.1f} min</text>')
    for number, (name, values) in enumerate(samples.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{LEFT + across * n / max(1, len(values) - 1):.1f},{up - up * value / maximum:.1f}"
            for n, value in enumerate(values)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        y = 14 + 16 * number
        parts.append(f'<text x="{WIDTH - LEGEND + 8}" y="{y}" fill="{colour}">{name} {values[-1]:.0f} MiB</text>')
    return "\n".join([*parts, "</svg>\n"])


def rows(minutes: float = 10.0, rate: float = 150.0) -> list[Row]:
    with deployed() as (stack, versions):
        samples = asyncio.run(watch(stack, list_pids(stack, versions), minutes, rate))
    PLOT.write_text(plot(samples, minutes))
    return [result for name, values in samples.items() for result in summarise(name, values)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=150.0)
    arguments = parser.parse_args()
    end_in_order()
    for result in rows(arguments.minutes, arguments.rate):
        print(json.dumps(result))


if __name__ == "__main__":
    main()
