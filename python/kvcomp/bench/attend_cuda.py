"""``kvcomp bench attend --device cuda``: decode attention over packed pages on the GPU, rivals and ceilings beside it.

A cell is a decode step of 32 layers in a CUDA graph: one launch divides the work of all of them, then every layer
attends, over tables and pages of its own (more memory than three times the L2). All cells are checked on the inputs
that were timed, against fp64 on the values that they read.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from .. import _C, results
from ..store import BFLOAT16, Layout
from . import attend_rivals_cuda as rivals
from . import timing_cuda
from .lists_cuda import Form, Layers, mixed, uniform

SECTIONS = ("table", "mixed", "shapes", "rivals")
SAMPLES_LEAST = 5
LAYERS = 32  # of a decode step, whose work is divided in one launch
BOUND = 1e-3
# What the design asks for (H200, microseconds), by batch and tokens: bits -> target.
TARGETS = {
    (64, 32768): {4: 515.0, 2: 280.0, 8: 985.0},
    (8, 32768): {4: 69.0, 2: 41.0, 8: 128.0},
    (8, 4096): {4: 12.0, 2: 10.0, 8: 19.0},
    (1, 131072): {4: 37.0, 2: 24.0, 8: 66.0},
    (1, 32768): {4: 12.5, 2: 10.5, 8: 20.0},
    (1, 4096): {4: 5.0, 2: 5.0, 8: 6.0},
}
MIXED_TARGET = 1.15  # times the time of uniform pages of as many bytes
_TABLE_BITS = (4, 2, 8, 3, 16)
_HALF_UNIT = 2.0**-8  # of bf16, relative
_CHECKED = 4  # lists of a layer

Save = Callable[[dict[str, Any]], object]
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Shape:
    b: int
    s: int
    q_heads: int = 32
    kv_heads: int = 8
    d: int = 128
    q: int = 1

    def case(self, k_bits: int | str, v_bits: int | str, **more: Any) -> dict[str, Any]:
        shape = {"b": self.b, "s": self.s, "q_heads": self.q_heads, "kv_heads": self.kv_heads, "d": self.d}
        return {**shape, "q": self.q, "k_bits": k_bits, "v_bits": v_bits, "device": "cuda", **more}

    @property
    def lists(self) -> int:
        return self.b * self.kv_heads

    def layout(self, *, zero_point: int = 1, scale_dtype: int = 0, group: int | None = None) -> Layout:
        return Layout(self.d, group or self.d, zero_point, BFLOAT16, scale_dtype)


def bench(
    *,
    command: str,
    sections: Sequence[str] = SECTIONS,
    cases: Iterable[tuple[int, int]] = tuple(TARGETS),
    bits: Sequence[int] = _TABLE_BITS,
    samples: int = timing_cuda.REPLAYS,
    seed: int = 0,
    save: Save | None = None,
    tell: Tell = print,
) -> dict[str, Any]:
    """A results object of kind ``attend``. ``cases``: batch and tokens of the table's rows; ``save`` is called with the
    object after every section. ValueError for unknown sections; RuntimeError where CUDA cannot be used."""
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"bench: --sections: expected among {', '.join(SECTIONS)}, got {name}")
    if samples < SAMPLES_LEAST:
        raise ValueError(f"bench: --samples: expected at least {SAMPLES_LEAST}, got {samples}")
    if not torch.cuda.is_available():
        raise RuntimeError("bench: --device: expected CUDA to be usable by torch, got none")
    found = results.new("attend", command=command)
    found["layers"] = LAYERS
    found["absent"] = []  # rivals that do not run, and why
    cells = found["cells"]
    cells += timing_cuda.read_rate(replays=samples)
    for cell in cells:
        tell(f"{cell['impl']}: {cell['gb_per_s']:.0f} GB/s")
    found["call_cost"] = call_cost()
    tell(f"a call from Python: {found['call_cost']['host_us']:.2f} us on the host")
    shapes = [Shape(b, s) for b, s in cases]
    run = _Run(cells, found["absent"], samples, seed, tell)
    for name in sections:
        {"table": run.table, "mixed": run.mixed, "shapes": run.shapes, "rivals": run.rivals}[name](shapes, bits)
        relate(cells)
        if save is not None:
            save(found)
    return found


def relate(cells: list[dict[str, Any]]) -> None:
    """Every cell's rate beside the fastest read of this run, kvcomp's time beside torch's best at the same shape."""
    peak = timing_cuda.peak(cells)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells:
        cell["fraction_of_peak"] = cell["gb_per_s"] / peak
        if cell["impl"].startswith("torch ") and cell.get("role") != "ceiling":
            shape = _shape_of(cell)
            if shape not in best or cell["median_us"] < best[shape]["median_us"]:
                best[shape] = cell
    for cell in cells:
        rival = best.get(_shape_of(cell)) if cell["impl"].startswith("kvcomp") else None
        if rival is not None and cell["case"]["k_bits"] != "mixed":  # whose lists are of many lengths
            cell["times_torch"] = rival["median_us"] / cell["median_us"]


def _shape_of(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell["case"].get(name) for name in ("b", "s", "q_heads", "kv_heads", "d", "q"))


class _Run:
    """The sections; each adds its cells."""

    def __init__(
        self, cells: list[dict[str, Any]], absent: list[dict[str, Any]], replays: int, seed: int, tell: Tell
    ) -> None:
        self.cells, self.absent, self.replays, self.seed, self.tell = cells, absent, replays, seed, tell

    def add(self, cell: dict[str, Any]) -> dict[str, Any]:
        self.cells.append(cell)
        error = cell["error"]
        case = ", ".join(f"{name} {value}" for name, value in cell["case"].items() if name != "device")
        self.tell(
            f"{cell['impl']} ({case}): {cell['median_us']:.2f} us, {cell['gb_per_s']:.0f} GB/s, "
            f"error {error['value']:.1e} of {error['bound']:.0e}"
        )
        return cell

    def packed(self, shape: Shape, form: Form, layout: Layout, case: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Times the step with overlapping launches, as after appends, and in order; returns the first one's cell."""
        step = Step(shape, form, layout, self.seed)
        first = self.add(self._timed("kvcomp", step, 1, case) | more)
        self.add(self._timed("kvcomp in order", step, 0, case))
        del step
        _free()
        return first

    def _timed(self, impl: str, step: Step, early: int, case: dict[str, Any]) -> dict[str, Any]:
        samples = timing_cuda.graph_us(lambda: step.run(early), step.layers, replays=self.replays)
        middle, nbytes = median(samples), step.packed.nbytes
        metric = "largest error over the root mean square of its head's exact output"
        return results.cell(
            impl,
            case,
            error={"metric": metric, "value": step.error(), "bound": BOUND},
            median_us=middle,
            samples_us=samples,
            bytes=nbytes,
            gb_per_s=nbytes / middle / 1e3,
        )

    def table(self, shapes: Sequence[Shape], bits: Sequence[int]) -> None:
        for shape in shapes:
            for width in bits:
                target = TARGETS.get((shape.b, shape.s), {}).get(width)
                more = {} if target is None else {"target_us": target}
                form = uniform(shape.lists, shape.s, width, width)
                self.packed(shape, form, shape.layout(), shape.case(width, width), **more)

    def mixed(self, shapes: Sequence[Shape], bits: Sequence[int]) -> None:
        """Ragged lists of mixed pages, and uniform 4-bit pages of as many bytes."""
        for shape in (Shape(8, 32768), Shape(8, 4096), Shape(1, 131072), Shape(64, 4096)):
            layout = shape.layout()
            form = mixed(shape.lists, shape.s, self.seed)
            nbytes = int(form.page_bytes(layout).sum())
            pages = max(1, round(nbytes / _C.page_bytes(layout, 4, 4) / shape.lists))
            plain = uniform(shape.lists, pages * _C.page_tokens(4, 4), 4, 4)
            beside = self.packed(
                replace(shape, s=pages * _C.page_tokens(4, 4)),
                plain,
                layout,
                replace(shape, s=pages * _C.page_tokens(4, 4)).case(4, 4, beside="mixed", mean_tokens=shape.s),
            )
            cell = self.packed(shape, form, layout, shape.case("mixed", "mixed"), target_ratio=MIXED_TARGET)
            per_byte = [entry["median_us"] / entry["bytes"] for entry in (cell, beside)]
            cell["times_uniform"] = per_byte[0] / per_byte[1]
            self.tell(f"mixed over uniform: {cell['times_uniform']:.3f} (at most {MIXED_TARGET})")

    def shapes(self, shapes: Sequence[Shape], bits: Sequence[int]) -> None:
        """Head ratios, head dimensions, several new tokens, layouts, K and V apart, a tail."""
        usual = Shape(8, 32768)
        for b in (8, 1):
            here = replace(usual, b=b)
            others = [replace(here, q_heads=heads) for heads in (8, 64)]
            others += [replace(here, d=d) for d in (64, 256)]
            for shape in others:
                self.packed(shape, uniform(shape.lists, shape.s, 4, 4), shape.layout(), shape.case(4, 4))
                if b == 8:
                    self.torch(shape, ("cudnn", "flash"))
            for q in (2, 4, 8, 16):
                shape = replace(here, q=q)
                self.packed(shape, uniform(shape.lists, shape.s, 4, 4), shape.layout(), shape.case(4, 4))
        for k_bits, v_bits in ((4, 2), (8, 4), (4, 8)):
            form = uniform(usual.lists, usual.s, k_bits, v_bits)
            self.packed(usual, form, usual.layout(), usual.case(k_bits, v_bits))
        tailed = uniform(usual.lists, usual.s, 4, 4, tail_tokens=64 + 6)
        self.packed(usual, tailed, usual.layout(), usual.case(4, 4, tail_tokens=64 + 6))
        for name, options in (
            ("e5m3", {"scale_dtype": 1}),
            ("symmetric", {"zero_point": 0}),
            ("groups of 32", {"group": 32}),
        ):
            form = uniform(usual.lists, usual.s, 4, 4)
            self.packed(usual, form, usual.layout(**options), usual.case(4, 4, scales=name))

    def rivals(self, shapes: Sequence[Shape], bits: Sequence[int]) -> None:
        for shape in shapes:
            self.torch(shape, ("cudnn", "flash", "efficient", "math", "flex"))

    def torch(self, shape: Shape, names: Sequence[str]) -> None:
        case = shape.case(16, 16)
        tensors = rivals.Tensors(shape.b, shape.s, shape.q_heads, shape.kv_heads, shape.d, self.seed)
        for name in names:
            for impl, call in rivals.calls(name, tensors):
                try:
                    if tensors.nbytes > rivals.MOST_BYTES.get(name, tensors.nbytes):
                        raise RuntimeError(f"left out above {rivals.MOST_BYTES[name] >> 20} MiB of keys and values")
                    samples = timing_cuda.rotated_us(call, len(tensors.copies), replays=self.replays)
                    error = tensors.error(call)
                except Exception as reason:  # whatever a rival raises is its own reason for not being here
                    said = (str(reason).splitlines() or [type(reason).__name__])[0]
                    self.absent.append({"impl": impl, "case": case, "reason": said[:300]})
                    self.tell(f"{impl}: not run: {said[:100]}")
                    continue
                middle = median(samples)
                self.add(
                    results.cell(
                        impl,
                        case,
                        error=error,
                        median_us=middle,
                        samples_us=samples,
                        bytes=tensors.nbytes,
                        gb_per_s=tensors.nbytes / middle / 1e3,
                    )
                )
        del tensors
        _free()


class Step:
    """A decode step's attention: ``run`` queues it, ``error`` checks what the last run left."""

    def __init__(self, shape: Shape, form: Form, layout: Layout, seed: int) -> None:
        self.shape = shape
        self.packed = packed = Layers(form, layout, heads=shape.kv_heads, group=LAYERS, seed=seed)
        self.layers, n, c = packed.tables.shape
        generator = torch.Generator("cuda").manual_seed(seed + 1)
        rows = (self.layers, shape.b, shape.q_heads, shape.q, shape.d)
        self.queries = torch.randn(rows, dtype=torch.bfloat16, device="cuda", generator=generator)
        self.out = torch.full_like(self.queries, torch.nan)
        self.divisions = torch.zeros(
            self.layers, _C.divide_words(n, torch.cuda.current_device()), dtype=torch.int32, device="cuda"
        )
        nbytes = _C.attend_workspace_cuda(n, c, shape.q_heads // shape.kv_heads, shape.q, shape.d, 0)
        self.workspace = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cuda")

    def attend(self, layer: int, out: torch.Tensor, early: int) -> None:
        packed = self.packed
        _C.attend(
            out,
            None,
            self.queries[layer],
            packed.arena,
            packed.tables[layer],
            packed.lists[layer],
            None,
            self.workspace,
            packed.layout,
            1,
            self.shape.d**-0.5,
            0.0,
            0,
            self.divisions[layer],
            early,
        )

    def run(self, early: int) -> None:
        """Layer by layer; the first after a division has to wait for it."""
        packed = self.packed
        for first in range(0, self.layers, LAYERS):
            part = slice(first, first + LAYERS)
            _C.divide(self.divisions[part], packed.tables[part], packed.lists[part], packed.layout)
            for layer in range(first, min(first + LAYERS, self.layers)):
                self.attend(layer, self.out[layer], early if layer > first else 0)

    def error(self) -> float:
        """The largest of the first and the last layer, over a few lists: of the bf16 output that was timed, beyond half
        a unit, and of the same in float32."""
        shape, packed, worst = self.shape, self.packed, 0.0
        group, n = shape.q_heads // shape.kv_heads, packed.lists.shape[1]
        chosen = sorted({0, n - 1, *(int(i) for i in torch.randperm(n)[: _CHECKED - 2])})
        for layer in (0, self.layers - 1):
            wide = torch.empty(self.queries.shape[1:], device="cuda")
            self.attend(layer, wide, 0)
            for i, (keys, values) in zip(chosen, packed.rows(layer, chosen), strict=True):
                b, head = divmod(i, shape.kv_heads)
                part = b, slice(head * group, (head + 1) * group)
                exact = rivals.attention(self.queries[layer][part], keys, values)
                rms = exact.square().mean(-1, keepdim=True).sqrt()
                rounded = (self.out[layer][part].double() - exact).abs() - _HALF_UNIT * exact.abs()
                for gap in (rounded, (wide[part].double() - exact).abs()):
                    ratio = float((gap / rms).nan_to_num(torch.inf).max())
                    worst = max(worst, min(ratio, 1e30))
        return worst


def call_cost() -> dict[str, Any]:
    """Microseconds that one call from Python keeps the host (one list of one page, the kernel runs behind it), beside
    a launch of torch's and what the kernel takes by itself."""
    step = Step(Shape(1, 64, 4, 1), uniform(1, 64, 4, 4), Shape(1, 64, 4, 1).layout(), 0)
    packed = step.packed
    step.run(0)
    fixed: list[Any] = [
        step.out[0],
        None,
        step.queries[0],
        packed.arena,
        packed.tables[0],
        packed.lists[0],
        None,
        step.workspace,
        packed.layout,
        1,
        0.1,
        0.0,
        0,
    ]
    division, small = step.divisions[0], torch.zeros(64, device="cuda")
    sleep: Callable[[int], object] = torch.cuda._sleep  # a kernel that ends at once

    attend: Any = _C.attend

    def hundred() -> None:
        for _ in range(100):
            attend(*fixed, division, 0)

    samples = {
        "host_us": timing_cuda.host_us(lambda: attend(*fixed, division, 0)),
        "host_early_us": timing_cuda.host_us(lambda: attend(*fixed, division, 1)),
        "host_without_division_us": timing_cuda.host_us(lambda: attend(*fixed, None, 0)),
        "torch_add_us": timing_cuda.host_us(lambda: torch.add(small, small, out=small)),
        "empty_launch_us": timing_cuda.host_us(lambda: sleep(0)),
        "kernel_us": timing_cuda.graph_us(hundred, 100),
    }
    return {name: median(taken) for name, taken in samples.items()} | {"samples_us": samples}


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
