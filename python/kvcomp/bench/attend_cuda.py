"""``kvcomp bench attend --device cuda``: decode attention over packed pages on the GPU, rivals and ceilings beside it.

A cell is decode steps of 32 layers in CUDA graphs: every layer attends, over tables and pages of its own (more memory
than three times the L2). One launch divides the work of all layers. The package makes it in every 16th step: steps
with and without it are timed, a layer's part of each is in the cell, and ``samples_us`` are their mean, 1 to 15.
``divide_us`` is a layer's part of the launch by itself. All cells are checked on the inputs that were timed, against
fp64 on the values that they read.

Shapes are measured one after the other, torch's attentions first. Cells that the results file has already are not
measured again, so that a bench can be made in slices of some minutes each; every cell says which run it is of, and
its rate stands beside the fastest read of that run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from .. import _C, results
from ..errors import first_line
from ..store import BFLOAT16, Layout
from ..store_cuda import DIVIDE_EVERY
from . import attend_rivals_cuda as rivals
from . import goals, timing_cuda
from .lists_cuda import Form, Layers, mixed, uniform
from .near import Errors

SECTIONS = ("table", "rivals", "mixed", "shapes")
SAMPLES_LEAST = 5
LAYERS = 32  # of a decode step, whose work is divided in one launch
# What the design asks for (H200, microseconds), by batch and tokens: bits -> target.
TARGETS = {
    (64, 32768): {4: 515.0, 2: 280.0, 8: 985.0},
    (8, 32768): {4: 69.0, 2: 41.0, 8: 128.0},
    (8, 4096): {4: 12.0, 2: 10.0, 8: 19.0},
    (1, 131072): {4: 37.0, 2: 24.0, 8: 66.0},
    (1, 32768): {4: 12.5, 2: 10.5, 8: 20.0},
    (1, 4096): {4: 5.0, 2: 5.0, 8: 6.0},
}
# What the design's prototype took on an H200 (uniform 64-token pages, 2 bits 128): no cell may be slower.
PROTOTYPE = {
    (64, 32768): {4: 520.0, 2: 282.0, 8: 986.0},
    (8, 32768): {4: 71.4, 2: 42.7, 8: 129.0},
    (8, 4096): {4: 13.3, 2: 11.2, 8: 20.1},
    (1, 131072): {4: 39.4, 2: 25.5, 8: 68.4},
    (1, 32768): {4: 14.2, 2: 12.2, 8: 21.0},
    (1, 4096): {4: 6.3, 2: 6.4, 8: 7.3},
}
MIXED_TARGET = 1.15  # times the time of uniform pages of as many bytes
CALL_TARGET_US = 2.0  # that a call from Python may keep the host
_TABLE_BITS = (4, 2, 8, 3, 16)
_CHECKED = 4  # lists of a layer
_DIVISIONS = 20  # of all layers in a graph, so that its start is a small part of it
_RIVALS = ("cudnn", "flash", "flex")

Save = Callable[[dict[str, Any]], object]
Tell = Callable[[str], object]
Cell = dict[str, Any]


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


@dataclass(frozen=True)
class _Part:
    """What is measured without a break: the cells that it makes, and how."""

    names: tuple[tuple[str, Cell], ...]  # impl and case
    measure: Callable[[_Run], None]


def bench(
    *,
    command: str,
    sections: Sequence[str] = SECTIONS,
    cases: Iterable[tuple[int, int]] = tuple(TARGETS),
    bits: Sequence[int] = _TABLE_BITS,
    samples: int = timing_cuda.REPLAYS,
    minutes: float | None = None,
    seed: int = 0,
    before: Cell | None = None,
    save: Save | None = None,
    tell: Tell = print,
) -> Cell:
    """A results object of kind ``attend``. ``cases``: batch and tokens of the table's rows; ``before``: an object to go
    on with, of the same machine, versions, samples and seed; ``minutes``: nothing is begun later than this; ``save`` is
    called with the object after every part. ValueError for unknown sections; RuntimeError where CUDA cannot be used."""
    for name in sections:
        if name not in SECTIONS:
            raise ValueError(f"bench: --sections: expected among {', '.join(SECTIONS)}, got {name}")
    if samples < SAMPLES_LEAST:
        raise ValueError(f"bench: --samples: expected at least {SAMPLES_LEAST}, got {samples}")
    if not torch.cuda.is_available():
        raise RuntimeError("bench: --device: expected CUDA to be usable by torch, got none")
    began = time.perf_counter()
    found = results.new("attend", command=command) | {"layers": LAYERS, "runs": 0}
    found["settings"] = {"samples": samples, "seed": seed}
    found["absent"] = []  # rivals that do not run, and why
    found = results.continued(found, before, ("machine", "versions", "layers", "settings"), tell)
    done = {_key(cell["impl"], cell["case"]) for cell in found["cells"]}
    wanted = _parts(sections, [Shape(b, s) for b, s in cases], bits, seed)
    parts = [part for part in wanted if any(_key(*name) not in done for name in part.names)]
    if not parts:
        return found
    run = _Run(found, samples, seed, tell)
    run.ceilings()
    for part in parts:
        if minutes is not None and time.perf_counter() - began > 60 * minutes:
            left = sum(_key(*name) not in run.done for part in parts for name in part.names)
            tell(f"{left} cells are left for the next run, after {minutes:g} minutes")
            break
        part.measure(run)
        relate(found["cells"])
        if save is not None:
            save(found)
    return found


def _key(impl: str, case: Cell) -> tuple[Any, ...]:
    return (impl, *sorted(case.items()))


def relate(cells: list[Cell]) -> None:
    """Every cell's rate beside the fastest read of its run, and the time that its bytes take at that rate; kvcomp's
    time beside torch's best at the same shape; 3 bits beside 4 and 2."""
    peaks = {run: timing_cuda.peak([cell for cell in cells if cell["run"] == run]) for run in {c["run"] for c in cells}}
    best: dict[tuple[Any, ...], Cell] = {}
    widths: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        peak = peaks[cell["run"]]
        cell["fraction_of_peak"] = cell["gb_per_s"] / peak
        if cell.get("role") == "ceiling":
            continue
        cell["floor_us"] = cell["bytes"] / peak / 1e3
        shape = _shape_of(cell)
        if cell["impl"].startswith("torch "):
            if shape not in best or cell["median_us"] < best[shape]["median_us"]:
                best[shape] = cell
        elif cell.get("role") == "table":
            widths[cell["impl"], shape, cell["case"]["k_bits"]] = cell
    for cell in cells:
        if not cell["impl"].startswith("kvcomp"):
            continue
        shape = _shape_of(cell)
        if shape in best and cell["case"]["k_bits"] != "mixed":  # whose lists are of many lengths
            cell["times_torch"] = best[shape]["median_us"] / cell["median_us"]
        four, two = (widths.get((cell["impl"], shape, bits)) for bits in (4, 2))
        if cell.get("role") == "table" and cell["case"]["k_bits"] == 3 and four and two:
            cell["target_us"] = round(four["median_us"], 2)  # between 2 and 4 bits
            cell["times_2_bits"] = cell["median_us"] / two["median_us"]
        if excess := goals.excess(cell):
            cell["over_target"] = excess


def _shape_of(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell["case"].get(name) for name in ("b", "s", "q_heads", "kv_heads", "d", "q"))


# ---- what is measured, in order


def _parts(sections: Sequence[str], shapes: Sequence[Shape], bits: Sequence[int], seed: int) -> Iterator[_Part]:
    """Shape by shape, torch's attentions before kvcomp's: they are of one run wherever time lasts for both."""
    for shape in shapes:
        if "rivals" in sections:
            yield _torch(shape, _RIVALS)
        for width in bits if "table" in sections else ():
            more: dict[str, Any] = {"role": "table"}
            for name, asked in (("target_us", TARGETS), ("prototype_us", PROTOTYPE)):
                if (us := asked.get((shape.b, shape.s), {}).get(width)) is not None:
                    more[name] = us
            yield _packed(shape, (width, width), shape.case(width, width), in_order=True, **more)
    if "mixed" in sections:
        for shape in (Shape(8, 32768), Shape(8, 4096), Shape(1, 131072), Shape(64, 4096)):
            yield _mixed(shape, seed)
    if "shapes" in sections:
        yield from _shapes()


def _shapes() -> Iterator[_Part]:
    """Head ratios, head dimensions, several new tokens, layouts, K and V apart, a tail."""
    usual = Shape(8, 32768)
    for b in (8, 1, 64):
        here = replace(usual, b=b)
        others = [replace(here, q_heads=heads) for heads in (8, 64)]
        for shape in others + [replace(here, d=d) for d in (64, 256)]:
            yield _torch(shape, ("cudnn", "flash"))
            yield _packed(shape, (4, 4), shape.case(4, 4))
        for q in (2, 4, 8, 16) if b < 64 else ():
            shape = replace(here, q=q)
            yield _packed(shape, (4, 4), shape.case(4, 4))
    for form in ((4, 2), (8, 4), (4, 8)):
        yield _packed(usual, form, usual.case(*form))
    tail = 64 + 6
    yield _packed(usual, (4, 4), usual.case(4, 4, tail_tokens=tail), tail_tokens=tail)
    yield _packed(usual, (4, 4), usual.case(4, 4, scales="e5m3"), usual.layout(scale_dtype=1))
    yield _packed(usual, (4, 4), usual.case(4, 4, scales="symmetric"), usual.layout(zero_point=0))
    yield _packed(usual, (4, 4), usual.case(4, 4, scales="groups of 32"), usual.layout(group=32))


def _packed(
    shape: Shape,
    bits: tuple[int, int],
    case: Cell,
    layout: Layout | None = None,
    *,
    tail_tokens: int = 0,
    in_order: bool = False,
    **more: Any,
) -> _Part:
    """Uniform lists: with overlapping launches, as after appends, and, if asked for, in order."""
    impls = ("kvcomp", "kvcomp in order")[: 1 + in_order]

    def measure(run: _Run) -> None:
        form = uniform(shape.lists, shape.s, *bits, tail_tokens=tail_tokens)
        run.packed(shape, form, layout or shape.layout(), case, impls, **more)

    return _Part(tuple((impl, case) for impl in impls), measure)


def _mixed(shape: Shape, seed: int) -> _Part:
    """Ragged lists of mixed pages, and uniform 4-bit pages of as many bytes."""
    layout, room = shape.layout(), _C.page_tokens(4, 4)
    form = mixed(shape.lists, shape.s, seed)
    nbytes = int(form.page_bytes(layout).sum())
    pages = max(1, round(nbytes / _C.page_bytes(layout, 4, 4) / shape.lists))
    same = replace(shape, s=pages * room)
    ours, plain = shape.case("mixed", "mixed"), same.case(4, 4, beside="mixed", mean_tokens=shape.s)

    def measure(run: _Run) -> None:
        beside = run.packed(same, uniform(shape.lists, same.s, 4, 4), layout, plain, ("kvcomp",))
        cell = run.packed(shape, form, layout, ours, ("kvcomp",), target_ratio=MIXED_TARGET)
        per_byte = [entry["median_us"] / entry["bytes"] for entry in (cell, beside)]
        cell["times_uniform"] = per_byte[0] / per_byte[1]
        run.tell(f"mixed over uniform: {cell['times_uniform']:.3f} ({goals.verdict(cell)})")

    return _Part((("kvcomp", plain), ("kvcomp", ours)), measure)


def _torch(shape: Shape, names: Sequence[str]) -> _Part:
    case = shape.case(16, 16)
    made = [(name, impl, rows) for name in names for impl, rows in rivals.forms(name).items()]
    return _Part(tuple((impl, case) for _, impl, _ in made), lambda run: run.torch(shape, case, made))


class _Run:
    """One process: adds the cells that are not there yet."""

    def __init__(self, found: Cell, replays: int, seed: int, tell: Tell) -> None:
        self.found, self.replays, self.seed, self.tell = found, replays, seed, tell
        found["runs"] += 1
        self.number = found["runs"]
        self.done = {_key(cell["impl"], cell["case"]) for cell in found["cells"]}

    def ceilings(self) -> None:
        """What this run's rates are compared with, and what a call costs."""
        for cell in timing_cuda.read_rate(replays=self.replays):
            self.found["cells"].append(cell | {"run": self.number})
            self.tell(f"{cell['impl']}: {cell['gb_per_s']:.0f} GB/s")
        self.found["call_cost"] = cost = call_cost()
        self.tell(f"a call from Python: {cost['host_us']:.2f} us on the host (at most {cost['target_us']:g})")

    def add(self, cell: Cell) -> Cell:
        """In the place of one of the same name, if a part is measured again."""
        key, cells = _key(cell["impl"], cell["case"]), self.found["cells"]
        cells[:] = [other for other in cells if _key(other["impl"], other["case"]) != key]
        cells.append(cell | {"run": self.number})
        self.done.add(key)
        error = cell["error"]
        case = ", ".join(f"{name} {value}" for name, value in cell["case"].items() if name != "device")
        said = goals.verdict(cell)
        self.tell(
            f"{cell['impl']} ({case}): {cell['median_us']:.2f} us, {cell['gb_per_s']:.0f} GB/s, "
            f"error {error['value']:.1e} of {error['bound']:.0e}" + (f"; {said}" if said else "")
        )
        added: Cell = cells[-1]
        return added

    def packed(self, shape: Shape, form: Form, layout: Layout, case: Cell, impls: Sequence[str], **more: Any) -> Cell:
        """Times the same step once for each name; returns the first one's cell."""
        step = Step(shape, form, layout, self.seed)
        divide_us = timing_cuda.graph_us(step.divide_often, _DIVISIONS * step.layers, replays=self.replays)
        division = {"divide_us": median(divide_us), "divide_samples_us": divide_us}
        # What is in order has no target: the package overlaps launches.
        first, *_ = [
            self.add(self._timed(impl, step, int(i == 0), case) | division | (more if i == 0 else {}))
            for i, impl in enumerate(impls)
        ]
        del step
        _free()
        return first

    def _timed(self, impl: str, step: Step, early: int, case: Cell) -> Cell:
        dividing, between = (
            timing_cuda.graph_us(lambda: step.run(early, divide), step.layers, replays=self.replays)  # noqa: B023
            for divide in (True, False)
        )
        rest = DIVIDE_EVERY - 1
        samples = [(one + rest * other) / DIVIDE_EVERY for one, other in zip(dividing, between, strict=True)]
        middle, nbytes = median(samples), step.packed.nbytes
        errors = step.errors()
        return results.cell(
            impl,
            case,
            error=errors.error(),
            row_error=errors.row,
            channel_error=errors.channel,
            median_us=middle,
            samples_us=samples,
            dividing_samples_us=dividing,
            between_samples_us=between,
            bytes=nbytes,
            gb_per_s=nbytes / middle / 1e3,
        )

    def torch(self, shape: Shape, case: Cell, made: Sequence[tuple[str, str, bool | None]]) -> None:
        absent = self.found["absent"]
        tensors = rivals.Tensors(shape.b, shape.s, shape.q_heads, shape.kv_heads, shape.d, self.seed)
        for name, impl, rows in made:
            if _key(impl, case) in self.done:
                continue
            absent[:] = [entry for entry in absent if (entry["impl"], entry["case"]) != (impl, case)]
            call = rivals.call_of(name, rows, tensors)
            try:
                samples = timing_cuda.rotated_us(call, len(tensors.copies), replays=self.replays)
                error = tensors.error(call)
            except Exception as reason:  # whatever a rival raises is its own reason for not being here
                said = first_line(reason)
                absent.append({"impl": impl, "case": case, "reason": said[:300]})
                self.tell(f"{impl}: not run: {said[:100]}")
                continue
            middle, nbytes = median(samples), tensors.nbytes
            rate = nbytes / middle / 1e3
            self.add(
                results.cell(impl, case, error=error, median_us=middle, samples_us=samples, bytes=nbytes, gb_per_s=rate)
            )
        del tensors
        _free()


class Step:
    """A decode step's attention: ``run`` queues it, ``errors`` checks what the last run left."""

    def __init__(self, shape: Shape, form: Form, layout: Layout, seed: int) -> None:
        self.shape, self.seed = shape, seed
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

    def run(self, early: int, divide: bool) -> None:
        """Layer by layer; the first after a division has to wait for it."""
        for first in range(0, self.layers, LAYERS):
            if divide:
                self._divide(first)
            for layer in range(first, first + LAYERS):
                self.attend(layer, self.out[layer], 0 if divide and layer == first else early)

    def divide_often(self) -> None:
        """The divisions of ``run`` alone, _DIVISIONS times."""
        for _ in range(_DIVISIONS):
            for first in range(0, self.layers, LAYERS):
                self._divide(first)

    def _divide(self, first: int) -> None:
        part, packed = slice(first, first + LAYERS), self.packed
        _C.divide(self.divisions[part], packed.tables[part], packed.lists[part], packed.layout)

    def errors(self) -> Errors:
        """Of the first and the last layer, over a few lists: of the bf16 output that was timed, and of the same in
        float32."""
        shape, packed, found = self.shape, self.packed, Errors()
        group, n = shape.q_heads // shape.kv_heads, packed.lists.shape[1]
        some = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[: _CHECKED - 2]
        chosen = sorted({0, n - 1, *some.tolist()})
        for layer in (0, self.layers - 1):
            wide = torch.empty(self.queries.shape[1:], device="cuda")
            self.attend(layer, wide, 0)
            for i, (keys, values) in zip(chosen, packed.rows(layer, chosen), strict=True):
                b, head = divmod(i, shape.kv_heads)
                part = b, slice(head * group, (head + 1) * group)
                exact = rivals.attention(self.queries[layer][part], keys, values)
                largest = float(values.abs().max())
                for out in (self.out[layer], wide):
                    found.add(out[part], exact, largest)
        return found


def call_cost() -> Cell:
    """Microseconds that one call from Python keeps the host (one list of one page, the kernel runs behind it), beside
    a launch of torch's and what the kernel takes by itself."""
    step = Step(Shape(1, 64, 4, 1), uniform(1, 64, 4, 4), Shape(1, 64, 4, 1).layout(), 0)
    packed = step.packed
    step.run(0, True)
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
    middle = {name: median(taken) for name, taken in samples.items()}
    return middle | {"target_us": CALL_TARGET_US, "samples_us": samples}


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
