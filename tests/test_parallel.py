"""The thread pool: the same bits from any number of threads, several callers at once, and life after fork."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from kvcomp import _C
from kvcomp.layer_input import LayerInput
from kvcomp.policy import Policy
from kvcomp.prompt import compress_prompt
from kvcomp.selectors import PyramidKV


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = _C.threads()
    yield
    _C.set_threads(before)


def digest(seed: int = 0) -> str:
    """Everything there is: score, select, plan, pack, append, attend with mass, unpack."""
    random = np.random.default_rng(seed)
    keys, values, queries = (random.standard_normal((2, h, 700, 64)).astype(np.float32) for h in (2, 2, 8))
    inputs = [LayerInput(keys, values, queries[:, :, -32:]), LayerInput(values, keys, queries[:, :, -32:])]
    policy = Policy(target_ratio=4, select=PyramidKV(keep=0.6), sinks=4, window=32, stochastic=True)
    total = hashlib.sha256()
    for layer in compress_prompt(inputs, policy).layers:
        out = layer.append_attend(queries[:, :, :100], keys[:, :, :100], values[:, :, :100], scale=0.125)
        mass = np.zeros((4, int(layer.tokens.max())), np.float32)
        last = layer.attend(queries[:, :, :3], scale=0.125, mass=mass)
        for array in (out, last, mass, *layer.unpack()):
            total.update(array.tobytes())
    return total.hexdigest()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    found = {}
    for threads in (1, 2, 3, 8, 64, 1):
        _C.set_threads(threads)
        assert _C.threads() == threads
        found[threads] = digest()
    assert len(set(found.values())) == 1


def test_callers_at_once() -> None:
    """Threads of Python share the pool; each gets its own result."""
    expected = [digest(seed) for seed in range(6)]
    _C.set_threads(3)
    results = [""] * 6

    def work(seed: int) -> None:
        results[seed] = digest(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == expected


def run_in_child() -> str:
    """digest() in a forked child, or how the child ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, digest().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"status {status}"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork() -> None:
    """A child, and a child of it, start workers of their own; the parent's go on."""
    _C.set_threads(4)
    expected = digest()
    assert run_in_child() == expected
    assert digest() == expected
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            assert digest() == expected
            os.write(write, run_in_child().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == expected
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_works() -> None:
    _C.set_threads(4)
    expected, stop = digest(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            digest(1)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert [run_in_child() for _ in range(5)] == [expected] * 5
    finally:
        stop.set()
        worker.join()


def test_number_of_threads_from_the_environment() -> None:
    def threads(value: str | None) -> int:
        environment = {name: text for name, text in os.environ.items() if name != "KVCOMP_NUM_THREADS"}
        if value is not None:
            environment["KVCOMP_NUM_THREADS"] = value
        code = f"import sys; sys.path[:] = {sys.path!r}; from kvcomp import _C; print(_C.threads())"
        site = ["-S"] if sys.flags.no_site else []
        result = subprocess.run(
            [sys.executable, *site, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        return int(result.stdout)

    assert threads("3") == 3 and threads("1000") == 64
    assert threads(None) == threads("") == threads("0") == min(len(os.sched_getaffinity(0)), 64)
