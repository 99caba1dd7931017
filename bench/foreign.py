"""Judge foreign software: python bench/foreign.py [--only NAME] [--requests N] [--cache FOLDER].

Each service of foreign.yaml runs behind `abreast up`, its old version beside its new one and beside itself. Both run
once under a paced load and once with clients that send the next request at once, which saturates the machine. New
answers a part of the users, since unsafe requests have no second copies. The first run installs the pinned versions in
the cache. All requests are seeded. foreign-results.json keeps the findings, and `--score` judges them by new labels.

The labels in foreign.yaml were made by hand, from release notes, code and responses. Each names a cause and its places:

- `breaking`: clients break. A service without a real finding at it has a missed cause.
- `right`: a difference of new that clients survive.
- `noise`: no difference of the code. A real finding here is wrong, and so is one without a label.

Precision is the share of real findings with a right label, recall the share of causes that have one. The exit code is 1
if a precision is below 95%, a breaking cause is missed, or an old version beside itself has a real finding or `FAIL`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml
from rows import end_in_order

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import eventually, find_free_port
from support_up import CLEAN, Up

DEFINITIONS = Path(__file__).with_suffix(".yaml")
RESULTS = Path(__file__).with_name("foreign-results.json")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "abreast-foreign"
REQUESTS = 2400
RATE, PACED_CLIENTS, SATURATING_CLIENTS = 25.0, 32, 16
NEW_SHARE = "30%"
USERS = 300  # sessions
LOADS = ("paced", "saturated")
OPTIONS = ("--sample-unsafe", "100%", "--baseline", "100%")
LOOK_S, SETTLE_S = 10.0, 45.0
FIRST_PAUSE_S = 0.5  # after each request that prepares the others, for its copy
MTIME = 1_767_225_600  # of all files, so that both versions have the same
MIN_PRECISION = 0.95
CHOICE = re.compile(r"\{\{(.*?)\}\}")


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Run:
    """One run of two versions."""

    verdict: str = ""
    reasons: list[str] = field(default_factory=list)
    failed_after_s: float | None = None
    real: dict[str, str] = field(default_factory=dict)  # summaries of findings that were ever real, by place
    other: dict[str, str] = field(default_factory=dict)  # reasons of the others
    is_settled: bool = False  # the ledger has all requests
    requests: int = 0
    errors: int = 0  # no response, or a 5xx
    per_s: float = 0.0


def generate_requests(definition: dict[str, Any], count: int) -> Iterator[Request]:
    """Yield requests of the weighted templates, such as `5 GET /posts/{{1..20}}`, with a body as the last words."""
    dice = random.Random(1)

    def choose(match: re.Match[str]) -> str:
        first, dots, last = match[1].partition("..")
        return str(dice.randint(int(first), int(last))) if dots else dice.choice(match[1].split("|"))

    templates = [template.split(" ", 3) for template in definition["requests"].splitlines()]
    weights = [int(words[0]) for words in templates]
    first = [f"1 {template}".split(" ", 3) for template in definition.get("first", "").splitlines()]
    for words in (*first, *dice.choices(templates, weights, k=count)):
        _, method, path, *body = (CHOICE.sub(choose, word) for word in words)
        added = definition.get("headers", {})
        headers = {"cookie": f"session={dice.randrange(USERS)}", **added.get("all", {}), **added.get(method, {})}
        yield Request(method, path, headers, "".join(body).encode())


def install(version: dict[str, Any], cache: Path) -> Path:
    """Install the pinned packages once, and return their folder."""
    packages = version["packages"]
    folder = cache / re.sub(r"[^\w.=-]+", "_", "_".join(packages))
    if (folder / "installed").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if version["from"] == "npm":
        commands = [["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--silent", *packages]]
    else:
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        commands = [[sys.executable, "-m", "venv", str(folder)], [*pip, *packages]]
    for command in commands:
        subprocess.run(command, check=True, timeout=600)
    (folder / "installed").touch()
    return folder


@contextlib.contextmanager
def serve(definition: dict[str, Any], version: str, port: int, cache: Path) -> Iterator[None]:
    """Run a version on fresh copies of its files."""
    folder = install(definition[version], cache)
    with tempfile.TemporaryDirectory() as work:
        for name, content in definition.get("files", {}).items():
            path = Path(work, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            os.utime(path, (MTIME, MTIME))
        command = shlex.split(definition[version]["start"].format(folder=folder, port=port))
        log = Path(work, "log").open("w")  # noqa: SIM115  # closed below
        with log, subprocess.Popen(command, cwd=work, env=CLEAN, stdout=log, stderr=subprocess.STDOUT) as process:
            try:
                eventually(lambda: is_serving(port), description=f"{shlex.join(command)} answers")
                yield
            finally:
                process.terminate()


def is_serving(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=2).status_code > 0
    return False


async def send(port: int, requests: Iterator[Request], run: Run, *, is_paced: bool) -> None:
    """Send at a fixed rate, or as fast as the clients get responses."""
    began = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=PACED_CLIENTS)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=limits) as client:
        numbered = enumerate(requests)

        async def work() -> None:
            for number, request in numbered:
                if is_paced:
                    await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
                run.requests += 1
                try:
                    response = await client.request(
                        request.method, request.path, headers=request.headers, content=request.body or None
                    )
                    run.errors += response.status_code >= 500
                except httpx.HTTPError:
                    run.errors += 1

        await asyncio.gather(*(work() for _ in range(PACED_CLIENTS if is_paced else SATURATING_CLIENTS)))
    run.per_s = round(run.requests / (time.monotonic() - began), 1)


def look(up: Up, run: Run, began: float) -> None:
    run.other = {}
    for finding in up.json("findings", "--each", "--noise", "--limit", "1000")["findings"]:
        endpoint, part, kind = finding["endpoint"], finding["part"][5:].lower(), finding["kind"][5:].lower()
        place = f"{endpoint['method']} {endpoint['route']} {part} {finding['path']} {kind}"
        if finding["state"] == "FINDING_STATE_REAL":
            run.real[place] = finding["summary"]
        else:
            run.other[place] = f"{finding['state'][14:].lower()}, {finding['summary']}: {finding['reason']}"
    verdict, summary = up.json("verdict"), up.json("status")["summary"]
    run.verdict = verdict["state"].removeprefix("VERDICT_STATE_")
    run.reasons = [reason["text"] for reason in verdict["reasons"] if not reason["state"].endswith("PASS")]
    run.is_settled = int(summary["pairs"]) >= run.requests and summary["pending"] == "0"
    if run.verdict == "FAIL" and run.failed_after_s is None:
        run.failed_after_s = round(time.monotonic() - began)


def judge(definition: dict[str, Any], new: str, cache: Path, count: int, *, is_paced: bool) -> Run:
    """Run old beside `new` behind `abreast up` under load, and look at findings and verdict all the time."""
    run = Run()
    with contextlib.ExitStack() as opening:
        up = opening.enter_context(Up(find_free_port(), find_free_port(), OPTIONS))
        for version, port in (("old", up.old), (new, up.new)):
            opening.enter_context(serve(definition, version, port, cache))
        up.healthy()
        done = up.command("traffic", "set", "--new", NEW_SHARE, "--force", "--reason", "bench")
        assert done.returncode == 0, done.stderr

        async def measure() -> None:
            requests = generate_requests(definition, count)
            for _ in definition.get("first", "").splitlines():
                await send(up.listen, islice(requests, 1), run, is_paced=True)
                await asyncio.sleep(FIRST_PAUSE_S)
            began = time.monotonic()
            load = asyncio.create_task(send(up.listen, requests, run, is_paced=is_paced))
            while not load.done():
                await asyncio.sleep(LOOK_S)
                await asyncio.to_thread(look, up, run, began)
            await load
            deadline = time.monotonic() + SETTLE_S
            for _ in range(2):  # the second time decides the last pairs
                run.is_settled = False
                while not run.is_settled and time.monotonic() < deadline:
                    await asyncio.sleep(LOOK_S)
                    await asyncio.to_thread(look, up, run, began)

        asyncio.run(measure())
    return run


@dataclass
class Score:
    """Real findings against the labels."""

    right: int
    wrong: list[str]  # places
    unseen: list[str]  # causes without a real finding
    missed: list[str]  # breaking ones
    causes: int

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + len(self.wrong))


def score(definition: dict[str, Any], run: Run) -> Score:
    def find_label(place: str) -> str:
        """Return the label of the first cause with a pattern of the place. In a pattern, % is any text."""
        return next((cause["label"] for cause in definition["causes"] if covers(cause, place)), "")

    def covers(cause: dict[str, Any], place: str) -> bool:
        return any(re.fullmatch(re.escape(pattern).replace("%", ".*"), place) for pattern in cause["places"])

    wrong = [place for place in run.real if find_label(place) not in {"breaking", "right"}]
    causes = [cause for cause in definition["causes"] if cause["label"] != "noise"]
    unseen = [cause for cause in causes if not any(covers(cause, place) for place in run.real)]
    return Score(
        len(run.real) - len(wrong),
        wrong,
        [cause["cause"] for cause in unseen],
        [cause["cause"] for cause in unseen if cause["label"] == "breaking"],
        len(causes),
    )


def describe(run: Run) -> str:
    failed = "" if run.failed_after_s is None else f" after {run.failed_after_s / 60:.1f} min"
    errors = f", {run.errors} errors of users" if run.errors else ""
    return f"{run.verdict}{failed}, {run.requests:,} requests at {run.per_s:.0f} a second{errors}"


def report(name: str, definition: dict[str, Any], load: str, new: Run, same: Run, *, verbose: bool) -> bool:
    """Print both runs. Return whether they keep the goals."""
    result = score(definition, new)
    print(
        f"{name}, {load}: precision {result.precision:.0%} of {len(new.real)} real findings, "
        f"recall {1 - len(result.unseen) / max(1, result.causes):.0%} of {result.causes} causes, "
        f"{len(result.missed)} breaking missed; {describe(new)}"
    )
    for place in result.wrong:
        print(f"  wrong: {place}: {new.real[place]}")
    for cause in result.unseen:
        print(f"  {'missed' if cause in result.missed else 'not found'}: {cause}")
    print(f"  beside itself: {len(same.real)} real findings; {describe(same)}")
    for place, summary in same.real.items():
        print(f"  wrong: {place}: {summary}")
    for title, run in (("new", new), ("itself", same)):
        lines = [*run.reasons, *(f"{place}: {text}" for place, text in (*run.real.items(), *run.other.items()))]
        for line in lines if verbose else ():
            print(f"    {title}: {line}")
    sys.stdout.flush()
    return result.precision >= MIN_PRECISION and not result.missed and not same.real and same.verdict != "FAIL"


def main() -> int:
    definitions = yaml.safe_load(DEFINITIONS.read_text())
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=definitions, action="append", help="this service (repeatable)")
    parser.add_argument("--load", choices=LOADS, action="append", help="this load (repeatable)")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests of each run")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the installed packages")
    parser.add_argument("--score", action="store_true", help="run nothing, and judge the findings of the last runs")
    parser.add_argument("--verbose", action="store_true", help="print all findings and reasons")
    arguments = parser.parse_args()
    end_in_order()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    is_good = True
    for name in arguments.only or definitions:
        for load in arguments.load or LOADS:
            if arguments.score and f"{name}, {load}, old and old" not in results:
                print(f"{name}, {load}: no results")
                continue
            runs = []
            for version in ("new", "old"):
                key = f"{name}, {load}, old and {version}"
                if not arguments.score:
                    run = judge(
                        definitions[name], version, arguments.cache, arguments.requests, is_paced=load == LOADS[0]
                    )
                    results[key] = dataclasses.asdict(run)
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                runs.append(Run(**results[key]))
            is_good &= report(name, definitions[name], load, *runs, verbose=arguments.verbose)
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
