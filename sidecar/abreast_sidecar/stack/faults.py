"""Faults that a drill injects, and how it repairs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from abreast_sidecar.stack.stack import Stack

KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Fault:
    inject: Callable[[], None]
    repair: Callable[[], None]


def stack_faults(stack: Stack) -> dict[str, Fault]:
    """Return the faults of the parts that Abreast itself consists of, by the name of their drill."""

    def fault(name: str, *, kill: bool) -> Fault:
        return Fault(lambda: stack.stop_server(name, kill=kill), lambda: stack.start_server(name))

    return {
        "sidecar-killed": fault("sidecar", kill=True),
        "redis-down": fault("redis", kill=True),
        "postgres-down": fault("postgres", kill=False),
    }


def pause_fault(pid: int) -> Fault:
    """Return a fault that stops a process and all of its children, so that they hang."""

    def for_each(action: str) -> None:
        for process in process_tree(pid):
            with suppress(psutil.NoSuchProcess):
                getattr(process, action)()

    return Fault(lambda: for_each("suspend"), lambda: for_each("resume"))


def kill_tree(pid: int) -> None:
    """Kill a process and all of its children, and wait until the kernel has ended them."""
    processes = process_tree(pid)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=KILL_TIMEOUT_S)


def process_tree(pid: int) -> list[psutil.Process]:
    """Return the process and all of its descendants, such as the workers of a server."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
