"""What this installation is and can use: `kvcomp env`."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from kvcomp import _C

_PACKAGES = ("numpy", "torch", "transformers")


def installed(package: str) -> str | None:
    """The version of a package; None: it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda_version(number: int) -> str | None:
    """13000 -> "13.0"; 0, which is none, -> None."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def environment() -> dict[str, Any]:
    """Versions, CPU, CUDA and the chosen backend, all JSON values. Imports neither torch nor transformers.

    `backend` is "cuda" where CUDA tensors can be used, else "cpu", and `cuda["why"]` is the sentence that says why.
    """
    cuda = _C.cuda_info()
    return {
        "kvcomp": _C.VERSION,
        "page_format": _C.FORMAT_VERSION,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        **{package: installed(package) for package in _PACKAGES},
        "cpu": {
            "name": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "simd": _C.simd(),
            "threads": _C.threads(),
        },
        "cuda": {
            "built": Path(_C.__file__).with_name("libkvcomp_cuda.so").exists(),
            "architectures": cuda["architectures"].split(",") if cuda["architectures"] else [],
            "runtime": _cuda_version(cuda["runtime"]),
            "driver": _cuda_version(cuda["driver"]),
            "devices": [
                {"name": name, "compute_capability": f"{capability // 10}.{capability % 10}"}
                for name, capability in cuda["devices"]
            ],
            "why": cuda["why"],
        },
        "backend": "cuda" if cuda["available"] else "cpu",
    }


def environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """`environment()` as (label, text) rows for people."""
    cpu, cuda = found["cpu"], found["cuda"]
    rows = [("kvcomp", f"{found['kvcomp']} (page format {found['page_format']})")]
    rows += [("python", f"{found['python']} ({found['platform']})")]
    rows += [(package, found[package] or "not installed") for package in _PACKAGES]
    rows += [("cpu", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['simd']}")]
    if cuda["architectures"]:
        rows += [("cuda library", f"for {', '.join(cuda['architectures'])} with CUDA {cuda['runtime']}")]
        rows += [("cuda driver", f"for CUDA {cuda['driver']}" if cuda["driver"] else "none")]
    else:
        rows += [("cuda library", "built, not loaded" if cuda["built"] else "not built")]
    rows += [
        (f"cuda:{i}", f"{device['name']}, compute capability {device['compute_capability']}")
        for i, device in enumerate(cuda["devices"])
    ]
    rows += [("backend", found["backend"])]
    if cuda["why"]:
        rows += [("no CUDA because", cuda["why"])]
    return rows


def print_environment() -> None:
    """Prints a table; plain lines where Rich is not installed."""
    rows = environment_rows(environment())
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        width = max(len(label) for label, _ in rows)
        print("\n".join(f"{label:<{width}}  {text}" for label, text in rows))
        return
    table = Table(show_header=False)
    for label, text in rows:
        table.add_row(label, text)
    Console().print(table)
