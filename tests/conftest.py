"""Skips tests marked gpu where no GPU can be used, and says why; workers of pytest-xdist; fixtures of several files."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator

import pytest

CPUS = len(os.sched_getaffinity(0))

# Workers share the CPUs; what a test starts inherits this. Threads of torch and NumPy that wait for a core spin.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KVCOMP_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, CPUS // int(workers))))

# What scripts/sanitize.sh tests. An editable install finds its own before any path does: its finder steps aside.
if package := os.environ.get("KVCOMP_PACKAGE"):
    sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
    sys.path.insert(0, package)
    import kvcomp

    assert package in os.path.relpath(kvcomp._C.__file__), kvcomp._C.__file__

# A suite started in the background inherits an ignored SIGINT, and so would the programs whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of ``pytest -n auto``. Tests of a GPU look at all of its memory: one at a time where there is one."""
    return min(CPUS, 8) if why_no_gpu() else 1


@functools.cache
def why_no_gpu() -> str | None:
    """The reason why CUDA tensors cannot be used here; None: they can."""
    from kvcomp import _C

    cuda = _C.cuda_info()
    if not cuda["available"]:
        return str(cuda["why"])
    if max(capability for _, capability in cuda["devices"]) < 80:
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    try:
        import torch
    except ImportError:
        return "needs torch"
    return None if torch.cuda.is_available() else "needs torch built with CUDA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and why_no_gpu():
            item.add_marker(pytest.mark.skip(reason=str(why_no_gpu())))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products are as fast, and a busy machine does not hold them up at every barrier."""
    import torch
    from kvcomp import _C

    before = torch.get_num_threads(), _C.threads()
    torch.set_num_threads(1)
    _C.set_threads(1)
    yield
    torch.set_num_threads(before[0])
    _C.set_threads(before[1])
