"""Worker processes that measure units of ``kvcomp policies``, each handed its next unit when it is done with one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .. import _C
from .methods import Entry
from .policies_units import units
from .workload import Workload, load


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: the same for all of them."""

    model: Path
    text: Path
    workload: Workload
    entries: tuple[Entry, ...]


def hand_out(job: Job, names: Sequence[str], jobs: int, limit_seconds: float | None) -> Iterator[tuple[str, Any]]:
    """Names and results of units as they are done, by up to ``jobs`` processes that share the CPUs.

    No unit is begun that would not be done within ``limit_seconds`` if it took as long as the longest of its kind so
    far; those still running then are lost. What a unit raises is raised here.
    """
    begun = time.monotonic()
    waiting = list(names)
    started: dict[Connection, float] = {}
    longest: dict[str, float] = {}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    processes = []

    def left() -> float | None:
        return None if limit_seconds is None else max(0.0, limit_seconds - (time.monotonic() - begun))

    def send(connection: Connection) -> None:
        remaining = left()
        for name in waiting:
            expected = longest.get(_kind(name), max(longest.values(), default=0.0))
            if remaining is None or expected < remaining:
                waiting.remove(name)
                connection.send(name)
                started[connection] = time.monotonic()
                return

    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    try:
        for _ in range(min(jobs, len(names))):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, job, threads), daemon=True)
            # Ctrl-C is this process's, which ends its workers: they inherit that they do not hear it.
            heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
            process.start()
            signal.signal(signal.SIGINT, heard)
            there.close()
            processes.append(process)
            send(here)
        while started and (ready := wait([*started], left())):
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    name, value = connection.recv()
                except EOFError:
                    raise MemoryError("policies: --jobs: expected enough memory for all, got a worker killed") from None
                if isinstance(value, Exception):
                    raise value
                took = time.monotonic() - started.pop(connection)
                longest[_kind(name)] = max(took, longest.get(_kind(name), 0.0))
                yield name, value
                send(connection)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _kind(name: str) -> str:
    """What a unit's time depends on: all but its number."""
    return name.rsplit("/", 1)[0]


def _work(connection: Connection, job: Job, threads: int) -> None:
    """A worker: units by name until the other end is closed."""
    torch.set_num_threads(threads)
    _C.set_threads(threads)
    work = units(load(job.model, job.text), job.workload, job.entries)
    try:
        while True:
            name = connection.recv()
            try:
                value = work[name]()
            except Exception as reason:
                value = reason
            connection.send((name, value))
    except EOFError:
        return
