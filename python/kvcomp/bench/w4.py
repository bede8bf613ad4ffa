"""``kvcomp bench w4``: linear layers of packed 4-bit weights, against cuBLAS in 16 bits, torch's int4, Humming and
bitsandbytes' NF4.

Every cell is checked before it is timed: kvcomp's against fp64 on the weights that its packed bytes hold, within the
bound of csrc/kvcomp/w4.h; a rival's against fp64 on its own. On a GPU calls are recorded as graphs, and weights take
turns, more of them than three times the L2 holds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from .. import _C, results
from ..env import installed
from ..errors import first_line
from ..w4 import weights
from . import timing, timing_cuda, w4_rivals

SECTIONS = ("table", "sweep", "scales", "weights")
SAMPLES_LEAST = 5
# What the design asks for (H200, microseconds): (n, k) -> rows of x -> goal.
GOALS: dict[tuple[int, int], dict[int, float]] = {
    (8192, 8192): {1: 12.0, 8: 12.5, 16: 13.5},
    (14336, 4096): {1: 11.0, 16: 12.0, 64: 17.0, 256: 47.0, 4096: 672.0},
    (4096, 4096): {1: 6.0, 16: 6.5, 64: 8.5},
    (8192, 81920): {1: 88.0},
}
SWEEP = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
_SWEPT = ((4096, 4096), (8192, 8192), (14336, 4096))
# (group, mantissa bits): the first is what the others are compared with.
FORMATS = ((128, -1), (128, 5), (128, 3), (128, 0), (64, 3), (32, 3), (32, -1))
_SCALED = {(8192, 8192): (1, 16), (14336, 4096): (1, 64, 256, 4096)}
_CPU = {(4096, 4096): (1, 16, 256)}
GROUP, MBITS = 128, 5
_DENSE = ("cuBLAS fp16", "cuBLAS bf16", "torch fp16", "torch bf16")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HALF_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_MANY_ROWS = 32  # more of them take the other kernels of CUDA, which w4.h bounds apart
# There weights are rounded to x's type, unless scales have so few mantissa bits that it holds them.
_ROUNDED = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
_HELD_MBITS = {torch.float16: 7, torch.bfloat16: 4}
_SAMPLED = 256  # outputs and rows of x that are checked

Save = Callable[[dict[str, Any]], object]
Tell = Callable[[str], object]


def bench(
    *,
    command: str,
    device: str = "cuda",
    sections: Sequence[str] | None = None,
    samples: int | None = None,
    seed: int = 0,
    save: Save | None = None,
    tell: Tell = print,
) -> dict[str, Any]:
    """A results object of kind ``w4``. ``save`` is called with it after every matrix. ValueError for numbers out of
    range; RuntimeError where CUDA is asked for and cannot be used."""
    sections = (SECTIONS if device == "cuda" else ("table", "weights")) if sections is None else sections
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"bench: --sections: expected among {', '.join(SECTIONS)}, got {name}")
    samples = timing_cuda.REPLAYS if samples is None else samples
    if samples < SAMPLES_LEAST:
        raise ValueError(f"bench: --samples: expected at least {SAMPLES_LEAST}, got {samples}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("bench: --device: expected CUDA to be usable by torch, got none")
    found = results.new("w4", command=command)
    found["absent"] = []  # rivals that do not run, and why
    run = _Run(found, torch.device(device), samples, seed, save or (lambda found: None), tell)
    if device == "cuda":
        found["cells"] += timing_cuda.read_rate(replays=samples)
        tell(f"reading: {timing_cuda.peak(found['cells']):.0f} GB/s")
    else:
        found["threads"] = found["machine"]["cores"]
        _C.set_threads(found["threads"])
        torch.set_num_threads(found["threads"])
    for name in sections:
        {"table": run.table, "sweep": run.sweep, "scales": run.scales, "weights": run.weights}[name]()
        relate(found["cells"])
        run.save(found)
    return found


def relate(cells: list[dict[str, Any]]) -> None:
    """kvcomp's time beside those of the rivals at the same shape, beside its own with exact scales, and its rate beside
    the fastest read of this run."""
    timed = [cell for cell in cells if "median_us" in cell and cell.get("role") != "ceiling"]
    reads = [cell for cell in cells if cell.get("role") == "ceiling"]
    peak = timing_cuda.peak(cells) if reads else None
    for cell in timed:
        if peak is not None:
            cell["fraction_of_peak"] = cell["gb_per_s"] / peak
        if cell["impl"] != "kvcomp":
            continue
        case = cell["case"]
        shape = [(name, case[name]) for name in ("n", "k", "m")]
        for other in timed:
            if [(name, other["case"][name]) for name in ("n", "k", "m")] != shape:
                continue
            ratio = cell["median_us"] / other["median_us"]
            if other["impl"] in _DENSE and other["case"]["dtype"] == case["dtype"]:
                cell["over_dense"] = ratio
                cell["over_dense_allowed"] = allowed_over_dense(case["n"], case["k"], case["m"])
            elif other["impl"] in w4_rivals.INT4 and other["case"]["dtype"] == case["dtype"]:
                cell[f"over_{other['impl'].split()[0].lower()}"] = ratio
            elif other["impl"] == "kvcomp" and other["case"] == case | {"group": 128, "scale_mbits": -1}:
                cell["over_exact"] = ratio


def allowed_over_dense(n: int, k: int, m: int) -> float:
    """How many times cuBLAS's time the design lets kvcomp take."""
    return 1.10 if n == k == 4096 and 128 <= m <= 512 else 1.05


@dataclass
class _Matrix:
    """Weights (n, k), and their packed forms on the device, each as often as it takes to get past the caches."""

    n: int
    k: int
    device: torch.device
    seed: int
    weight: torch.Tensor = field(init=False)  # (n, k) float16
    forms: dict[tuple[int, int], _Form] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        self.weight = torch.randn(self.n, self.k, generator=generator, dtype=torch.float16, device=self.device).mul_(
            0.02
        )

    def form(self, group: int, mbits: int) -> _Form:
        if (group, mbits) not in self.forms:
            packed, exponent = weights.pack(self.weight, group, mbits, "nearest")
            rows = _some(self.n, torch.device("cpu"))
            exact = weights.unpack(packed, exponent, self.n, self.k, group, mbits)[rows]
            first = packed.to(self.device)
            copies = [first, *(first.clone() for _ in range(_copies(packed.nbytes, self.device) - 1))]
            self.forms[group, mbits] = _Form(copies, exponent, rows.to(self.device), exact.to(self.device))
        return self.forms[group, mbits]


@dataclass
class _Form:
    copies: list[torch.Tensor]
    exponent: int
    rows: torch.Tensor  # outputs that are checked
    exact: torch.Tensor  # (rows, k) float32: the weights that the bytes hold


def _copies(nbytes: int, device: torch.device) -> int:
    return timing_cuda.copies(nbytes) if device.type == "cuda" else timing.copies(nbytes, most=8)


class _Run:
    """The sections; each adds its cells."""

    def __init__(
        self, found: dict[str, Any], device: torch.device, samples: int, seed: int, save: Save, tell: Tell
    ) -> None:
        self.found, self.device, self.samples, self.seed = found, device, samples, seed
        self.save, self.tell = save, tell

    def table(self) -> None:
        """The design's cells, with rivals."""
        cuda = self.device.type == "cuda"
        for (n, k), ms in (GOALS if cuda else {shape: dict.fromkeys(ms) for shape, ms in _CPU.items()}).items():
            matrix = _Matrix(n, k, self.device, self.seed)
            for m, goal in ms.items():
                for dtype in ("fp16", "bf16") if cuda else ("bf16",):
                    xs = self._inputs(m, k, dtype)
                    more: dict[str, Any] = {} if goal is None else {"goal_us": goal}
                    cell = self.kvcomp(matrix, xs, dtype, GROUP, MBITS, more)
                    if goal is not None:
                        cell["goal_met"] = cell["median_us"] <= goal
                    self.rivals(matrix, xs, dtype)
            self._done(matrix)

    def sweep(self) -> None:
        """Every number of rows, against cuBLAS alone."""
        for n, k in _SWEPT:
            matrix = _Matrix(n, k, self.device, self.seed)
            for m in SWEEP:
                xs = self._inputs(m, k, "fp16")
                if not self._has(n, k, m, "fp16", GROUP, MBITS):
                    self.kvcomp(matrix, xs, "fp16", GROUP, MBITS, {})
                    self.rivals(matrix, xs, "fp16", ("dense",))
            self._done(matrix)

    def scales(self) -> None:
        """Groups and mantissa bits, against groups of 128 with exact scales."""
        for (n, k), ms in _SCALED.items():
            matrix = _Matrix(n, k, self.device, self.seed)
            for group, mbits in FORMATS:
                for m in ms:
                    if not self._has(n, k, m, "fp16", group, mbits):
                        self.kvcomp(matrix, self._inputs(m, k, "fp16"), "fp16", group, mbits, {})
                matrix.forms.pop((group, mbits), None)
            self._done(matrix)

    def weights(self) -> None:
        """Errors of weights, without times: what compressed scales lose, and what smaller groups with them gain."""
        self.found["cells"] += weight_errors(self.seed)
        for cell in self.found["cells"]:
            if "rel_mse" in cell:
                case = cell["case"]
                self.tell(
                    f"{case['distribution']}, groups of {case['group']}, {_format(case['scale_mbits'])} "
                    f"{case['rounding']}: error {cell['rel_mse']:.5f} at {cell['bits_per_weight']:.3f} bits"
                )

    def kvcomp(
        self, matrix: _Matrix, xs: list[torch.Tensor], dtype: str, group: int, mbits: int, more: dict[str, Any]
    ) -> dict[str, Any]:
        form = matrix.form(group, mbits)
        m, n, k = xs[0].shape[0], matrix.n, matrix.k
        out = torch.full((m, n), torch.nan, dtype=xs[0].dtype, device=self.device)
        cuda = self.device.type == "cuda"
        need = _C.w4_workspace(m, n, k) if cuda else 0
        workspace = torch.full((need,), 0xFF, dtype=torch.uint8, device=self.device) if cuda else None

        def call(number: int) -> None:
            packed = form.copies[number % len(form.copies)]
            _C.w4_matmul(out, xs[number % len(xs)], packed, None, workspace, group, mbits, form.exponent, 0, int(cuda))

        call(0)
        value = bound_error(out, xs[0], form.rows, form.exact, self.device, mbits)
        error = {"metric": "largest error over the bound of w4.h, against fp64", "value": value, "bound": 1.0}
        case = {"n": n, "k": k, "m": m, "group": group, "scale_mbits": mbits, "dtype": dtype}
        return self._timed("kvcomp", case, call, len(form.copies), form.copies[0].nbytes, error, more)

    def rivals(
        self, matrix: _Matrix, xs: list[torch.Tensor], dtype: str,
        names: Sequence[str] = ("dense", "int4", "humming", "nf4"),
    ) -> None:  # fmt: skip
        m, n, k = xs[0].shape[0], matrix.n, matrix.k
        weight = matrix.weight.to(_DTYPES[dtype])
        copies = _copies(n * k // 2, self.device)

        def int4() -> w4_rivals.Rival:
            form = matrix.form(GROUP, MBITS)
            codes, scales = weights.codes_of(form.copies[0], form.exponent, n, k, GROUP, MBITS)
            return w4_rivals.torch_int4(codes, scales, xs, copies)

        made: dict[str, Callable[[], w4_rivals.Rival]] = {
            "dense": lambda: w4_rivals.dense(weight, xs, _copies(weight.nbytes, self.device)),
            "nf4": lambda: w4_rivals.nf4(weight, xs, copies),
        }
        if dtype == "bf16":
            made["int4"] = int4
        if dtype == "fp16" and self.device.type == "cuda":
            made["humming"] = lambda: w4_rivals.humming(weight, xs, copies)
        for name in names:
            if name not in made:
                continue
            group = {"dense": None, "nf4": 64}.get(name, GROUP)
            case = {"n": n, "k": k, "m": m, "group": group, "scale_mbits": None, "dtype": dtype}
            try:
                rival = made[name]()
                error = self._relative(rival, xs[0])
                package = w4_rivals.PACKAGES.get(rival.impl)
                more = {"version": installed(package)} if package else {}
                self._timed(rival.impl, case, rival.call, copies, rival.nbytes, error, more)
            except Exception as reason:  # whatever a rival raises is its own reason for not being here
                said = first_line(reason)[:300]
                self.found["absent"].append({"impl": name, "case": case, "reason": said})
                self.tell(f"{name}: not run: {said[:100]}")
            _free(self.device)

    def _relative(self, rival: w4_rivals.Rival, x: torch.Tensor) -> dict[str, Any]:
        rows = _some(len(rival.reference), self.device)
        seen = _some(len(x), x.device)
        exact = x[seen].double() @ rival.reference[rows].double().T
        got = rival.call(0)[seen][:, rows].double()
        value = float((got - exact).norm() / exact.norm())
        return {"metric": "relative error (L2) against fp64", "value": min(value, 1e30) if value == value else 1e30,
                "bound": rival.bound}  # fmt: skip

    def _timed(
        self, impl: str, case: dict[str, Any], call: Callable[[int], Any], copies: int, nbytes: int,
        error: dict[str, Any], more: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        if self.device.type == "cuda":
            taken = timing_cuda.rotated_us(call, copies, replays=self.samples)
        else:
            taken = timing.rotate({impl: call}, self.samples)[impl]
        middle = median(taken)
        # What has to move: the weights, x and the output once.
        moved = nbytes + 2 * case["m"] * (case["n"] + case["k"])
        cell = results.cell(
            impl,
            case | {"device": self.device.type},
            error=error,
            median_us=middle,
            samples_us=taken,
            bytes=moved,
            weight_bytes=nbytes,
            gb_per_s=moved / middle / 1e3,
            useful_tflops=2 * case["n"] * case["k"] * case["m"] / middle / 1e6,
            **more,
        )
        self.found["cells"].append(cell)
        self.tell(
            f"{case['n']}x{case['k']}, {case['m']} rows, {case['dtype']}: {impl}"
            + (f" {_format(case['scale_mbits'])} of {case['group']}" if impl == "kvcomp" else "")
            + f": {middle:.2f} us, error {error['value']:.1e} of {error['bound']:.0e}"
        )
        return cell

    def _inputs(self, m: int, k: int, dtype: str) -> list[torch.Tensor]:
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        count = 4 if m * k * 2 < 1 << 20 else 2
        return [
            torch.randn(m, k, generator=generator, dtype=torch.float32, device=self.device).to(_DTYPES[dtype])
            for _ in range(count)
        ]

    def _has(self, n: int, k: int, m: int, dtype: str, group: int, mbits: int) -> bool:
        case = {"n": n, "k": k, "m": m, "group": group, "scale_mbits": mbits, "dtype": dtype}
        return any(cell["impl"] == "kvcomp" and case.items() <= cell["case"].items() for cell in self.found["cells"])

    def _done(self, matrix: _Matrix) -> None:
        matrix.forms.clear()
        _free(self.device)
        relate(self.found["cells"])
        self.save(self.found)


def bound_error(
    out: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, exact: torch.Tensor, device: torch.device, mbits: int
) -> float:
    """The largest error of out (m, n) at the outputs ``rows``, whose weights are exact (rows, k), over what w4.h
    allows for scales of ``mbits`` mantissa bits."""
    seen = _some(len(x), x.device)
    inputs, held = x[seen].double(), exact.double()
    want, size = inputs @ held.T, inputs.abs() @ held.abs().T
    allowed = _slack(device, len(x), x.dtype, mbits) * size + _HALF_UNIT[out.dtype] * want.abs() + 2.0**-25
    ratio = float(((out[seen][:, rows].double() - want).abs() / allowed).nan_to_num(torch.inf).max())
    return min(ratio, 1e30)


def _slack(device: torch.device, m: int, dtype: torch.dtype, mbits: int) -> float:
    """What w4.h allows of S = sum |x| |q s|."""
    if device.type != "cuda" or m <= _MANY_ROWS:
        return 2.0**-20
    bits = weights.MOST_PACKED_MBITS if mbits < 0 else mbits  # fp16's
    if bits <= _HELD_MBITS[dtype]:
        return 2.0**-16
    return 2.0**-16 + _ROUNDED[dtype] * (2 if dtype == torch.bfloat16 and bits > 7 else 1)


def weight_errors(seed: int, shape: tuple[int, int] = (1024, 4096)) -> list[dict[str, Any]]:
    """Relative squared error of weights of two distributions in every format, each with the bound that the design puts
    on it: E5M3 and E5M5 at most 1 % above exact scales; groups of 32 with E5M3 and search at most 60 % of groups of 128
    with exact scales, in 4.29 bits. What no claim is about may lose what 4 bits lose at most here."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    chi = torch.randn((5, *shape), generator=generator).square().sum(0)
    cells = []
    for name, weight in (("normal", normal), ("student t, 5 degrees", normal / torch.sqrt(chi / 5))):
        exact: float | None = None
        for group, mbits, rounding in (
            (128, -1, "nearest"), (128, 5, "nearest"), (128, 3, "nearest"), (128, 0, "nearest"), (128, 0, "floor"),
            (128, -1, "search"), (128, 3, "search"), (128, 0, "search"), (64, 3, "search"), (32, 3, "nearest"),
            (32, 3, "search"),
        ):  # fmt: skip
            packed, exponent = weights.pack(weight, group, mbits, rounding)
            near = weights.unpack(packed, exponent, *shape, group, mbits)
            error = weights.quant_error(weight, near, group)
            bits = 8 * packed.nbytes / weight.numel()
            exact = error["rel_mse"] if exact is None else exact
            bound = 0.1
            if rounding == "nearest" and group == 128 and mbits in (3, 5):
                bound = 1.01 * exact
            if (group, mbits, rounding) == (32, 3, "search"):
                bound = 0.6 * exact if bits <= 4.29 else 0.0
            case = {"n": shape[0], "k": shape[1], "group": group, "scale_mbits": mbits, "rounding": rounding,
                    "distribution": name}  # fmt: skip
            cells.append(
                results.cell(
                    "kvcomp weights", case,
                    error={"metric": "relative squared error, mean of groups", "value": error["rel_mse"],
                           "bound": bound},
                    **error, bits_per_weight=bits, over_exact_error=error["rel_mse"] / exact,
                )
            )  # fmt: skip
    return cells


def _some(length: int, device: torch.device) -> torch.Tensor:
    """Evenly spaced places that are checked, both ends among them."""
    count = min(length, _SAMPLED)
    return torch.arange(count, device=device) * (length - 1) // max(count - 1, 1)


def _format(mbits: int) -> str:
    return "exact" if mbits < 0 else f"E5M{mbits}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
