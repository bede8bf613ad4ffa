"""``kvcomp bench bsr``: block-sparse times dense, square, against dense and other sparse products of the same matrix.

Nothing is timed before its result was found right: kvcomp's with float32 out, as ``bsr_gate`` says, and everything's in
the dtype that is timed. Useful TFLOPS are 2 · stored blocks · block² · N / time, whatever was executed; what a dense
product would have had to reach is the field ``dense_equivalent_tflops``. Making a matrix, its plan and its copies is
not timed; ``first_call_ms`` is a first product with all of that, ``host_us`` how long a later one keeps the host.

On CUDA kvcomp's samples alternate with those of the dense product and of torch's BSR product: a board at its power
limit lowers its clock under lasting load, and so for all three. Where kvcomp takes the dense product, they alternate
with the dense rival's alone, on any device. What kvcomp makes of the stored blocks, a dense copy or joined ones, would
be made at every replay of a CUDA graph: such products, and those that take turns with them, are not timed in one.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from .. import _C, results
from ..bsr import BSRMatrix, matmul, random_bsr, way_of
from ..bsr.multiply import Method
from . import bsr_goals, bsr_rivals, bsr_samples, timing
from .bsr_gate import SCALE, difference, exact
from .bsr_goals import DENSE, OURS, Where, tflops
from .bsr_rivals import Call, Problem
from .bsr_settings import DTYPES, SAMPLES_LEAST, Settings

_RIVAL_ROOM = 4.0  # half units of a rival's output: some round more than once
# Settings that a file is gone on with others of.
_SWEPT = ("sizes", "sparsity", "blocks", "patterns", "rivals", "minutes", "design")
_FULL, _HALVED = "torch dense, full", "cusparselt 2:4"  # ceilings
_HOST_MOST_US = 5e3  # calls that are longer are not asked how long they keep the host

_SHOWN = {
    "tflops": "{:.1f} TFLOPS",
    "useful_tflops": "{:.2f} useful TFLOPS",
    "speedup": "{:.2f}x dense",
    "way": "{}",
}

Save = Callable[[dict[str, Any]], object]
Tell = Callable[[str], object]
# Rivals whose samples alternate with ours: by them we are judged, and lasting load lowers a GPU's clock.
_JUDGES = {"cuda": (DENSE, "torch bsr"), "cpu": ()}


def bench(
    settings: Settings,
    *,
    command: str,
    before: dict[str, Any] | None = None,
    save: Save | None = None,
    tell: Tell = print,
) -> dict[str, Any]:
    """A results object of kind ``bsr``. ``before``: one to go on with, of the same machine, versions and settings but
    for ``_SWEPT``; ``save`` is called with the object after every matrix. ValueError for numbers out of range,
    NotImplementedError without a GPU that was asked for."""
    settings, began = settings.resolved(), time.perf_counter()
    found = results.new("bsr", command=command)
    found["settings"] = {name: value for name, value in asdict(settings).items() if name not in _SWEPT}
    found["absent"] = []  # rivals that do not run, and why
    found = results.continued(found, before, ("machine", "versions", "settings"), tell)
    if settings.device == "cpu":
        found["threads"] = found["machine"]["cores"]
        _C.set_threads(found["threads"])
        torch.set_num_threads(found["threads"])
    run = _Run(settings, found, tell)
    for where in settings.without_room():
        run.leave_out(OURS, run.case(*where), f"no room for so few empty blocks in the pattern {where[3]}")
    todo = [where for where in settings.cases() if not run.is_done(where)]
    for number, where in enumerate(todo):
        if settings.minutes is not None and time.perf_counter() - began > 60 * settings.minutes:
            left = f"{len(todo) - number} of {len(todo)} matrices"
            tell(f"left for the next run, after {settings.minutes:g} minutes: {left}")
            break
        run.ceilings(where[0])
        run.free()
        run.measure(where)
        run.free()
        if save is not None:
            save(found)
    for verdict in bsr_goals.verdicts(found["cells"]):
        if settings.design or verdict.found is not None:
            tell(verdict.line())
    return found


class _Run:
    """Adds cells."""

    def __init__(self, settings: Settings, found: dict[str, Any], tell: Tell) -> None:
        self.settings, self.found, self.tell = settings, found, tell
        self.device, self.iterations = str(settings.device), int(settings.iterations or 0)
        self.dtype, self.out_dtype = DTYPES[str(settings.dtype)], DTYPES[str(settings.out_dtype)]

    def case(self, size: int, block: int | None, sparsity: float, pattern: str) -> dict[str, Any]:
        shape = {"m": size, "n": size, "k": size, "block": block, "sparsity": sparsity, "pattern": pattern}
        kinds = {"dtype": self.settings.dtype, "out_dtype": self.settings.out_dtype, "device": self.device}
        return {**shape, **kinds}

    def has(self, impl: str, case: dict[str, Any]) -> bool:
        """Whether it was timed; a wrong one is measured again."""
        timed = (cell for cell in self.found["cells"] if "median_us" in cell)
        return any(cell["impl"] == impl and cell["case"] == case for cell in timed)

    def is_done(self, where: Where) -> bool:
        """Whether kvcomp was timed on a matrix, and each of its rivals beside it, or found not to run."""
        case = self.case(*where)
        return self.has(OURS, case) and all(self.is_settled(name, case) for name in self.settings.rivals_of(where))

    def is_settled(self, rival: str, case: dict[str, Any]) -> bool:
        absent = any(entry["impl"] == rival and entry["case"] == case for entry in self.found["absent"])
        return absent or self.has(rival, case)

    def drop(self, case: dict[str, Any]) -> None:
        """What was found for a case before."""
        for name in ("cells", "absent"):
            self.found[name] = [entry for entry in self.found[name] if entry["case"] != case]

    def leave_out(self, impl: str, case: dict[str, Any], reason: str) -> None:
        entry = {"impl": impl, "case": case, "reason": reason}
        if entry not in self.found["absent"]:
            self.found["absent"].append(entry)
        of = f"({case['m']}, block {case['block']}, {case['sparsity']:g} {case['pattern']})"
        self.tell(f"{impl} {of}: not measured: {reason}")

    # ---- inputs

    def normal(self, size: int, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        made = torch.empty(size, size, dtype=self.dtype, device=self.device)
        return made.normal_(0, SCALE, generator=generator)

    def copies(self, nbytes: int) -> int:
        """So many that no input is in a cache when it is read again."""
        if self.device == "cpu":
            return timing.copies(nbytes, most=4)
        from . import timing_cuda

        return timing_cuda.copies(nbytes)

    def problem(self, matrix: BSRMatrix) -> Problem:
        size = matrix.shape[0]
        other = self.normal(size, self.settings.seed + 1)
        count = self.copies(matrix.nbytes + other.nbytes + size * size * self.out_dtype.itemsize)
        matrices = [matrix, *(matrix.with_values(matrix.values.clone()) for _ in range(count - 1))]
        outs = [torch.empty(size, size, dtype=self.out_dtype, device=self.device) for _ in range(count)]
        return Problem(matrices, [other, *(other.clone() for _ in range(count - 1))], outs)

    # ---- one matrix

    def measure(self, where: Where) -> None:
        size, block, sparsity, pattern = where
        how: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "seed": self.settings.seed, "scale": SCALE}
        matrix = random_bsr(size, size, block, sparsity, pattern=pattern, **how)
        problem, case = self.problem(matrix), self.case(*where)
        self.drop(case)
        reference = exact(matrix.to_dense(), problem.others[0])
        rivals = self.settings.rivals_of(where)
        ours, call = self.ours(OURS, problem, reference, case, "auto")
        cells = [ours]
        sparse = ours["way"] == "sparse"
        turns = self.taking_turns(ours, rivals) if call is not None else ()
        if call is not None:
            made = [self.rival(name, problem, reference, case) for name in turns]
            cells += self.timed_in_turn([(ours, call), *filter(None, made)], case, len(problem), graph=sparse)
            del made
            self.free()
        if not sparse:
            blocks, its = self.ours("kvcomp sparse", problem, reference, case, "sparse")
            cells.append(blocks | self.timed(its, len(problem)))
        for name in rivals:
            if name not in turns and (other := self.rival(name, problem, reference, case)) is not None:
                cells += self.timed_in_turn([other], case, len(problem))
            other = None
            self.free()
        lengths = matrix.row_ptr.diff().double()
        row_blocks = {"least": float(lengths.min()), "mean": float(lengths.mean()), "most": float(lengths.max())}
        for cell in cells:
            cell |= {"blocks": matrix.blocks, "density": matrix.density, "row_blocks": row_blocks}
        self.found["cells"] = bsr_goals.related([*self.found["cells"], *cells])
        for cell in self.found["cells"][-len(cells) :]:
            self.tell(line(cell))

    def ours(
        self, impl: str, problem: Problem, reference: torch.Tensor, case: dict[str, Any], method: Method
    ) -> tuple[dict[str, Any], Call | None]:
        """The cell of one way, and what is to be timed for it: nothing where a result is wrong."""
        matrices, others = problem.matrices, problem.others
        k, n = others[0].shape
        begin = time.perf_counter()
        single = matmul(matrices[0], others[0], out_dtype=torch.float32, method=method)
        if self.device == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - begin
        error = difference(single, reference, k)
        del single

        call = self.call(problem, method)
        error_timed = difference(call(0), reference, k)
        more = {
            "way": way_of(matrices[0], n) if method == "auto" else method,
            "first_call_ms": first * 1e3,
            "kept_bytes": matrices[0].kept_nbytes,
            "error_timed": error_timed,
        }
        for found in (error, error_timed):
            if not found["value"] <= found["bound"]:
                return results.cell(impl, case, error=found, **more), None
        return results.cell(impl, case, error=error, **more), call

    def call(self, problem: Problem, method: Method) -> Call:
        matrices, others, outs = problem.matrices, problem.others, problem.outs

        def multiply(number: int) -> torch.Tensor:
            at = number % len(matrices)
            return matmul(matrices[at], others[at], out=outs[at], method=method)

        return multiply

    def taking_turns(self, ours: dict[str, Any], rivals: Sequence[str]) -> tuple[str, ...]:
        names = (DENSE,) if ours["way"] == "dense" else _JUDGES[self.device]
        return tuple(name for name in names if name in rivals)

    def rival(
        self, name: str, problem: Problem, reference: torch.Tensor, case: dict[str, Any]
    ) -> tuple[dict[str, Any], Call] | None:
        """Its cell, and what is to be timed for it; None, and an entry among the absent ones, where it is wrong or does
        not run."""
        return self.checked(name, functools.partial(bsr_rivals.of(self.device)[name], problem), reference, case)

    def checked(
        self, name: str, make: Callable[[], Call], reference: torch.Tensor, case: dict[str, Any]
    ) -> tuple[dict[str, Any], Call] | None:
        """``writes``: a dtype that is not the case's."""
        try:
            call = make()
            first = call(0)
            error = difference(first, reference, case["k"], half_units=_RIVAL_ROOM)
            if not error["value"] <= error["bound"]:
                raise ArithmeticError(f"wrong by {error['value']:.3g}, more than {error['bound']:.3g}")
            kind = str(first.dtype).removeprefix("torch.")
            more = {} if kind == case["out_dtype"] else {"writes": kind}
            return results.cell(name, case, error=error, **more), call
        except Exception as reason:  # whatever a rival's library makes of it: that is its result here
            self.leave_out(name, case, _said(reason))
            return None

    def timed_in_turn(
        self, cells: Sequence[tuple[dict[str, Any], Call]], case: dict[str, Any], copies: int, *, graph: bool = True
    ) -> list[dict[str, Any]]:
        """Adds times to cells, which take turns; those of rivals are given back. Where one fails now, each is timed
        alone, and a rival that fails there is left out."""
        calls = {cell["impl"]: call for cell, call in cells}
        try:
            samples, how = bsr_samples.in_turn(calls, copies, self.iterations, SAMPLES_LEAST, self.device, graph=graph)
        except Exception as reason:
            if len(cells) > 1:
                return [cell for pair in cells for cell in self.timed_in_turn([pair], case, copies, graph=graph)]
            if OURS in calls:
                raise
            self.leave_out(cells[0][0]["impl"], case, _said(reason))
            return []
        if len(calls) > 1:
            how += ", in turn"
        for cell, call in cells:
            cell |= self.times(call, samples[cell["impl"]], how)
        return [cell for cell, _ in cells if cell["impl"] != OURS]

    def ceilings(self, size: int) -> None:
        """Once for a size: the dense product of a full matrix, and, on CUDA, of a 2:4 one by cuSPARSELt."""
        case, halved = self.case(size, None, 0.0, "full"), self.case(size, None, 0.5, "2:4")
        wanted = {_FULL: case}
        if self.device == "cuda" and self.settings.rivals != ():
            wanted[_HALVED] = halved
        if all(self.is_settled(name, where) for name, where in wanted.items()):
            return
        left, other = self.normal(size, self.settings.seed + 2), self.normal(size, self.settings.seed + 1)
        count = self.copies(2 * left.nbytes + size * size * self.out_dtype.itemsize)
        lefts = [left, *(left.clone() for _ in range(count - 1))]
        others = [other, *(other.clone() for _ in range(count - 1))]
        outs = [torch.empty(size, size, dtype=self.out_dtype, device=self.device) for _ in range(count)]
        self.drop(case)
        make = functools.partial(bsr_rivals.multiplied, lefts, others, outs)
        self.ceiling(_FULL, make, exact(left, other), case, count, "tflops")
        if _HALVED in wanted:
            lefts = [bsr_rivals.pruned(part) for part in lefts]
            self.drop(halved)
            make = functools.partial(bsr_rivals.two_of_four, lefts, others)
            self.ceiling(_HALVED, make, exact(lefts[0], other), halved, count, "dense_equivalent_tflops")

    def ceiling(
        self, name: str, make: Callable[[], Call], reference: torch.Tensor, case: dict[str, Any], copies: int, rate: str
    ) -> None:
        made = self.checked(name, make, reference, case)
        for cell in self.timed_in_turn([made], case, copies) if made is not None else ():
            cell[rate] = tflops(2 * case["m"] ** 3, cell["median_us"])
            if name == _FULL:
                cell["role"] = "ceiling"
            self.tell(line(cell))
            self.found["cells"].append(cell)

    def timed(self, call: Call | None, copies: int, *, graph: bool = True) -> dict[str, Any]:
        """Times for a cell; none for what is wrong."""
        if call is None:
            return {}
        samples, how = bsr_samples.of(call, copies, self.iterations, SAMPLES_LEAST, self.device, graph=graph)
        return self.times(call, samples, how)

    def times(self, call: Call, samples: list[float], how: str) -> dict[str, Any]:
        middle = median(samples)
        found = {"median_us": middle, "samples_us": samples, "timing": how}
        if self.device == "cuda" and middle < _HOST_MOST_US:
            from . import timing_cuda

            found["host_us"] = median(timing_cuda.host_us(lambda: call(0), calls=20, rounds=5))
        return found

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _said(reason: Exception) -> str:
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]


def line(cell: dict[str, Any]) -> str:
    """One cell in words."""
    case = cell["case"]
    said = f"{cell['impl']} ({case['m']}, block {case['block']}, {case['sparsity']:g} {case['pattern']}): "
    if "writes" in cell:
        said += f"{cell['writes']} out, "
    if "median_us" not in cell:
        return said + f"wrong: {cell['error']['metric']} {cell['error']['value']:.3g}"
    said += f"{cell['median_us']:.1f} us"
    for name, form in _SHOWN.items():
        if name in cell:
            said += ", " + form.format(cell[name])
    error = cell["error"]
    return said + ("" if error is None else f", error {error['value']:.1e} of {error['bound']:.1e}")
