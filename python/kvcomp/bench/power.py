"""What a GPU draws, and how it is doing: energy by NVML, clocks, temperature, throttle reasons.

NVML comes with the driver; its Python module, ``pynvml`` (PyPI: nvidia-ml-py), is optional. Where either is missing
figures are None, beside the sentence that says why.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import one_line

SAMPLE_SECONDS = 0.1
# Energy counters and power readings are renewed about ten times a second.
LEAST_SECONDS = 1.0
IDLE_SECONDS = 1.0
HOT_CELSIUS = 75
_IDLE_REASON = 1  # nvmlClocksEventReasonGpuIdle: nothing runs, nothing is slowed down
_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}


class Gpu:
    """One GPU as NVML sees it. ``why``: the sentence why there is none; then every figure is None."""

    def __init__(self, ordinal: int | None, nvml: Any = None) -> None:
        """``ordinal``: CUDA's; None: the run is on the CPU. ``nvml``: the module, for tests."""
        self.why: str | None = None
        self._nvml, self._handle = nvml, None
        if ordinal is None:
            self.why = "the run is on the CPU"
            return
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByPciBusId(_bus_id(ordinal))
        except ImportError:
            self.why = "pynvml is not installed (pip install nvidia-ml-py)"
        except Exception as error:  # NVMLError, of the module that may be missing
            self.why = f"NVML: {one_line(error)}"

    def state(self) -> dict[str, Any]:
        """{sm_clock_mhz, mem_clock_mhz, temperature_c, power_w, throttle_reasons (bits), throttle_names}, a figure that
        this GPU does not give being None; or {pynvml_error}."""
        if self.why is not None:
            return {"pynvml_error": self.why}
        nvml, handle = self._nvml, self._handle
        bits = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return {
            "sm_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "mem_clock_mhz": self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "temperature_c": self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "power_w": None if power is None else power / 1e3,
            "throttle_reasons": bits,
            "throttle_names": _names(bits),
        }

    def joules(self) -> float | None:
        """The energy counter (Volta and newer); None: there is none."""
        counted = self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if counted is None else counted / 1e3

    def watts(self) -> float | None:
        drawn = self._ask(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle))
        return None if drawn is None else drawn / 1e3

    def _ask(self, question: Callable[[], Any]) -> Any:
        if self.why is not None:
            return None
        try:
            return question()
        except Exception:  # NVMLError: this GPU, or this driver, does not say
            return None


@dataclass(frozen=True)
class Energy:
    """What a stretch of time took. ``joules`` is all of it, ``net`` less what the idle GPU would have taken; None: why
    says why. ``source``: "counter" or "samples" (power every 0.1 s, trapezoids)."""

    joules: float | None
    net: float | None
    seconds: float
    source: str | None
    why: str | None = None


def idle_watts(gpu: Gpu, seconds: float = IDLE_SECONDS) -> float | None:
    """Mean power while nothing runs."""
    energy = measure(gpu, lambda: time.sleep(seconds), idle=0.0, least=0.0)
    return None if energy.joules is None else energy.joules / energy.seconds


def measure(gpu: Gpu, work: Callable[[], object], *, idle: float | None, least: float = LEAST_SECONDS) -> Energy:
    """The energy of ``work``, which returns when the GPU has done it. Shorter than ``least`` seconds says nothing."""
    if gpu.why is not None:
        return Energy(None, None, 0.0, None, gpu.why)
    samples: list[tuple[float, float]] = []

    def take() -> None:
        watts = gpu.watts()
        if watts is not None:
            samples.append((time.perf_counter(), watts))

    before = gpu.joules()
    sampler = None if before is not None else _Sampler(take)
    start = time.perf_counter()
    if sampler is not None:
        sampler.start()
    try:
        work()
    finally:
        seconds = time.perf_counter() - start
        if sampler is not None:
            sampler.stop()
    after = gpu.joules()
    source: str | None = "counter"
    joules = None if before is None or after is None else after - before
    if joules is None:
        source, joules = "samples", trapezoids(samples)
    if joules is None:
        return Energy(
            None, None, seconds, None, "NVML gives neither energy nor power of this GPU, or it ran too briefly"
        )
    if seconds < least:
        return Energy(None, None, seconds, source, f"{seconds:.2f} s are too few to tell (at least {least:g})")
    return Energy(joules, None if idle is None else joules - idle * seconds, seconds, source)


def trapezoids(samples: Sequence[tuple[float, float]]) -> float | None:
    """Joules under (seconds, watts); None: fewer than two samples."""
    if len(samples) < 2:
        return None
    return sum((t - s) * (p + q) / 2 for (s, p), (t, q) in itertools.pairwise(samples))


def watch(gpu: Gpu, work: Callable[[], object]) -> list[dict[str, Any]]:
    """The states of the GPU every 0.1 s while ``work`` runs, and at both ends: once it is idle it says nothing."""
    states: list[dict[str, Any]] = []
    sampler = _Sampler(lambda: states.append(gpu.state()))
    sampler.start()
    try:
        work()
    finally:
        sampler.stop()
    return states


def worst(*states: dict[str, Any]) -> dict[str, Any]:
    """One state of several: the lowest clocks, the highest temperature and power, every reason that one of them has."""
    if any("pynvml_error" in state for state in states):
        return states[0]

    def of(name: str, choose: Callable[[list[Any]], Any]) -> Any:
        known = [state[name] for state in states if state[name] is not None]
        return choose(known) if known else None

    bits = of("throttle_reasons", lambda found: functools.reduce(operator.or_, found))
    return {
        "sm_clock_mhz": of("sm_clock_mhz", min),
        "mem_clock_mhz": of("mem_clock_mhz", min),
        "temperature_c": of("temperature_c", max),
        "power_w": of("power_w", max),
        "throttle_reasons": bits,
        "throttle_names": _names(bits),
    }


def _names(bits: int | None) -> list[str] | None:
    return None if bits is None else [name for bit, name in _REASONS.items() if bits & bit]


def flags(*states: dict[str, Any]) -> list[str]:
    """Why a sample taken between these states should not be trusted: heat, throttling. Empty: nothing known."""
    found = []
    for state in states:
        temperature, reasons = state.get("temperature_c"), state.get("throttle_reasons")
        if temperature is not None and temperature > HOT_CELSIUS:
            found.append(f"{temperature} C (above {HOT_CELSIUS})")
        if reasons is not None and reasons & ~_IDLE_REASON:
            names = [name for bit, name in _REASONS.items() if reasons & bit & ~_IDLE_REASON]
            found.append("throttled: " + (", ".join(names) or hex(reasons)))
    return list(dict.fromkeys(found))


class _Sampler(threading.Thread):
    """Calls ``take`` every 0.1 s, and at both ends."""

    def __init__(self, take: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._take, self._enough = take, threading.Event()

    def run(self) -> None:
        self._take()
        while not self._enough.wait(SAMPLE_SECONDS):
            self._take()

    def stop(self) -> None:
        self._enough.set()
        self.join()
        self._take()


def _bus_id(ordinal: int) -> bytes:
    """NVML counts all GPUs of a machine, CUDA those that CUDA_VISIBLE_DEVICES shows: the PCI address names one."""
    import torch

    properties: Any = torch.cuda.get_device_properties(ordinal)
    return f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0".encode()
