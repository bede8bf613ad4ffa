"""Tables of what was measured on a GPU: attend beside torch's attentions, decode beside transformers' caches,
append, pack and score beside what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from ..bench import decode_goals, goals
from .report import NOTHING, Results, Row

_NAMES = {4096: "4k", 32768: "32k", 131072: "128k"}
_USUAL = {"q_heads": 32, "kv_heads": 8, "d": 128, "q": 1}
_KNOWN = {"b", "s", *_USUAL, "k_bits", "v_bits", "device"}
_PARTS = ("attend", "append", "divide", "attention", "linear")


def attend_rows(found: Results) -> tuple[Row, list[Row]]:
    """One row per batch and length of the usual shape: torch's best and every width in microseconds."""
    return _by_width(
        found,
        "µs",
        lambda cell: (
            f"{cell['median_us']:.1f}" + (f" ({said})" if (said := goals.verdict(cell, prototype=False)) else "")
        ),
        lambda cell: f"{cell['median_us']:.1f} ({_short(cell['impl'])})",
    )


def gain_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same cells: torch's best time over kvcomp's."""
    return _by_width(
        found,
        "times faster than torch's best",
        lambda cell: f"{cell['times_torch']:.2f}×" if "times_torch" in cell else NOTHING,
        lambda cell: f"{cell['median_us']:.1f} µs",
    )


def rate_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same cells: GB/s, and percent of the fastest read of that run."""
    return _by_width(found, "GB/s (of the read rate)", _rate, _rate)


def part_rows(found: Results) -> tuple[Row, list[Row]]:
    """The same cells one by one: what has to be read, how long that takes at the read rate of the cell's run, the whole
    step's time a layer, that of a step that divides the work anew, and what was asked for."""
    rows: list[Row] = []
    for cell in found["cells"]:
        if cell["impl"] == "kvcomp" and _is_usual(cell["case"]):
            rows.append((
                _where(cell["case"]),
                str(cell["case"]["k_bits"]),
                f"{cell['bytes'] / 1e6:.1f} MB",
                f"{cell['floor_us']:.1f}",
                f"{cell['median_us']:.1f}",
                f"{median(cell['dividing_samples_us']):.1f}",
                _rate(cell),
                goals.verdict(cell) or NOTHING,
                _error(cell),
            ))  # fmt: skip
    header = ("", "bits", "read", "µs at the read rate", "µs", "where the step divides", "GB/s (of the read rate)",
              "target (µs)", "error")  # fmt: skip
    return header, rows


def more_rows(found: Results) -> tuple[Row, list[Row]]:
    """Mixed pages, and other shapes, layouts and numbers of new tokens."""
    rows: list[Row] = []
    for cell in found["cells"]:
        if cell["impl"] != "kvcomp" or _is_usual(cell["case"]):
            continue
        uniform, said = cell.get("times_uniform"), goals.verdict(cell)
        rows.append((
            _case(cell["case"]),
            _bits(cell["case"]),
            f"{cell['median_us']:.1f}",
            _rate(cell),
            f"{cell['times_torch']:.2f}×" if "times_torch" in cell else NOTHING,
            NOTHING if uniform is None else f"{uniform:.3f} ({said})",
            _error(cell),
        ))  # fmt: skip
    header = ("", "K / V bits", "µs", "GB/s (of the read rate)", "faster than torch's best",
              "time of uniform pages of as many bytes", "error")  # fmt: skip
    return header, rows


def rival_rows(found: Results) -> tuple[Row, list[Row]]:
    """One row per form of torch's attention, one column per batch and length; then the ceilings of that run."""
    rivals = [cell for cell in found["cells"] if _is_rival(cell) and _is_usual(cell["case"])]
    absent = {(entry["impl"], _where(entry["case"])) for entry in found.get("absent", ())}
    places = list(dict.fromkeys(_where(cell["case"]) for cell in rivals))
    times = {(cell["impl"], _where(cell["case"])): f"{cell['median_us']:.1f}" for cell in rivals}
    rows: list[Row] = [
        (impl, *(times.get((impl, place), "not run" if (impl, place) in absent else NOTHING) for place in places))
        for impl in dict.fromkeys([cell["impl"] for cell in rivals] + [entry["impl"] for entry in found["absent"]])
    ]
    return ("µs, bf16", *places), rows


def ceiling_rows(found: Results) -> tuple[Row, list[Row]]:
    """What reading alone reaches in the last run, and what one call from Python costs."""
    ceilings = [cell for cell in found["cells"] if cell.get("role") == "ceiling"]
    last = max((cell["run"] for cell in ceilings), default=0)
    rows: list[Row] = [
        (f"{cell['impl']}, {cell['bytes'] / 1e9:.1f} GB", f"{cell['gb_per_s']:.0f} GB/s")
        for cell in ceilings
        if cell["run"] == last
    ]
    cost = found.get("call_cost", {})
    for name, label in (
        ("empty_launch_us", "launching a kernel that ends at once"),
        ("host_us", "a call of attend from Python, its launch included"),
        ("host_without_division_us", "the same, dividing by itself"),
        ("torch_add_us", "a call of torch.add, for comparison"),
        ("kernel_us", "attend's kernel over one page"),
    ):
        if name in cost:
            rows.append((label, f"{cost[name]:.2f} µs"))
        if name == "host_us" and "empty_launch_us" in cost:
            beyond = cost[name] - cost["empty_launch_us"]
            said = goals.verdict({"median_us": beyond, "target_us": cost["target_us"]})
            rows.append(("of which beyond a launch", f"{beyond:.2f} µs ({said})"))
    return ("", "measured"), rows


def append_rows(found: Results) -> tuple[Row, list[Row]]:
    """A layer's launch by what the step has to do, lists in step or staggered."""
    rows: list[Row] = [
        (
            f"{cell['case']['step']}, {cell['case']['lists']}",
            str(cell["case"]["k_bits"]),
            f"{cell['median_us']:.2f}",
            goals.verdict(cell) or NOTHING,
        )
        for cell in found["cells"]
    ]
    return ("append", "bits", "µs a layer", "target (µs)"), rows


def pack_rows(found: Results) -> tuple[Row, list[Row]]:
    """Bytes read and written a second, beside copying in that run."""
    rows: list[Row] = []
    for cell in found["cells"]:
        if cell.get("role") == "ceiling":
            rows.append((cell["impl"], *[NOTHING] * 3, f"{cell['gb_per_s']:.0f}", NOTHING))
            continue
        case = cell["case"]
        rate = f"{cell['gb_per_s']:.0f} ({100 * cell['fraction_of_copy']:.0f} %)"
        name = f"{_length(case['s'])} tokens, {case['dtype']}, {case['scale']}"
        rows.append((
            name, str(case["bits"]), f"{cell['median_us']:.1f}", f"{cell['bytes'] / 1e6:.1f} MB", rate,
            goals.verdict(cell) or NOTHING,
        ))  # fmt: skip
    return ("pack", "bits", "µs", "read and written", "GB/s (of copying)", "target (of copying)"), rows


def score_rows(found: Results) -> tuple[Row, list[Row]]:
    """The importance of a prompt's tokens: executed operations of both passes a second."""
    rows: list[Row] = [
        (
            f"{cell['case']['window']} queries, {_length(cell['case']['tokens'])} tokens",
            f"{cell['median_us']:.1f}",
            f"{cell['tflops_executed']:.0f}",
            goals.verdict(cell) or NOTHING,
        )
        for cell in found["cells"]
    ]
    return ("score", "µs", "TFLOP/s executed", "target (TFLOP/s)"), rows


def decode_rows(found: Results) -> tuple[Row, list[Row]]:
    """One row per cell of a results object of kind ``decode``, beside the best plain cache there and what is asked."""
    rows: list[Row] = []
    for cell in decode_goals.relate(found["cells"]):
        ttft, plain, ratio = cell.get("ttft_ratio"), cell.get("times_plain"), cell.get("kv_ratio")
        rows.append((
            _decode_name(cell),
            f"B{cell['case']['b']}/{_length(cell['case']['s'])}",
            str(cell["case"]["k_bits"]),
            f"{cell['ttft_ms']:.0f} ms" + ("" if ttft is None else f", {ttft:.3f}×{_asked(cell, 'target_ttft_ratio')}"),
            f"{cell['tpot_ms']:.2f} ms{_asked(cell, 'target_tpot_ms')}",
            NOTHING if plain is None else f"{plain:.2f}×{_asked(cell, 'target_times_plain')}",
            f"{cell['tokens_per_s']:.0f}",
            f"{cell['kv_bytes'] / 1e9:.2f} GB" + (f", 1/{ratio:.2f}{_asked(cell, 'target_kv_ratio')}" if ratio else ""),
            NOTHING if cell.get("peak_bytes") is None else f"{cell['peak_bytes'] / 1e9:.1f} GB",
        ))  # fmt: skip
    for name, reason in found.get("not_measured", {}).items():
        rows.append((name, *[NOTHING] * 7, "out of memory" if reason.startswith("out of memory") else "not run"))
    header = ("cache", "", "bits", "first token, over the fastest plain", "a token", "faster than the best plain",
              "tokens/s", "KV cache, of bf16", "peak memory")  # fmt: skip
    return header, rows


def _asked(cell: Results, target: str) -> str:
    said = goals.verdict(cell, only=target)
    return f" ({said})" if said else ""


def share_rows(found: Results) -> tuple[Row, list[Row]]:
    """Where a decode step's milliseconds go, of the cells that were profiled."""
    rows: list[Row] = []
    for cell in found["cells"]:
        shares = cell.get("shares")
        if not shares:
            continue
        kinds = shares["kernels_ms"]
        other = sum(taken for kind, taken in kinds.items() if kind not in _PARTS)
        case = cell["case"]
        where = f"{_decode_name(cell)}, B{case['b']}/{_length(case['s'])}, {case['k_bits']} bits"
        parts = [*(kinds.get(kind, 0.0) for kind in _PARTS), other]
        parts += [shares[name] for name in ("idle_ms", "step_ms", "around_ms")]
        rows.append((where, *(f"{taken:.2f}" if taken else NOTHING for taken in parts)))
    return ("ms of a step", *_PARTS, "other kernels", "no kernel", "all", "generate around it"), rows


def _decode_name(cell: Results) -> str:
    bits = cell["case"].get("w_bits", 16)
    return str(cell["impl"]) + ("" if bits == 16 else f", {bits}-bit weights")


def _by_width(
    found: Results, title: str, show: Callable[[Results], str], show_rival: Callable[[Results], str]
) -> tuple[Row, list[Row]]:
    """Rows of the usual shape, a column for torch's fastest and one for each number of bits of K and V."""
    usual = [cell for cell in found["cells"] if "k_bits" in cell["case"] and _is_usual(cell["case"])]
    ours = {
        (_where(cell["case"]), cell["case"]["k_bits"]): cell
        for cell in usual
        if cell["impl"] == "kvcomp" and cell["case"]["k_bits"] == cell["case"]["v_bits"]
    }
    rivals: dict[str, Results] = {}
    for cell in filter(_is_rival, usual):
        place = _where(cell["case"])
        if place not in rivals or cell["median_us"] < rivals[place]["median_us"]:
            rivals[place] = cell
    widths = list(dict.fromkeys(bits for _, bits in ours))
    places = list(dict.fromkeys([place for place, _ in ours] + list(rivals)))
    rows: list[Row] = [
        (
            place,
            show_rival(rivals[place]) if place in rivals else NOTHING,
            *(show(ours[place, bits]) if (place, bits) in ours else NOTHING for bits in widths),
        )
        for place in places
    ]
    return (title, "torch's best, bf16", *(f"{bits} bit" for bits in widths)), rows


def _is_rival(cell: Results) -> bool:
    return str(cell["impl"]).startswith("torch ") and cell.get("role") != "ceiling"


def _is_usual(case: Mapping[str, Any]) -> bool:
    """The shape of the main table: nothing but batch, length and equal bits of K and V varies."""
    return (
        all(case.get(name, usual) == usual for name, usual in _USUAL.items())
        and case.get("k_bits") != "mixed"
        and case.get("k_bits") == case.get("v_bits")
        and not set(case) - _KNOWN
    )


def _length(tokens: int) -> str:
    return _NAMES.get(tokens, str(tokens))


def _where(case: Mapping[str, Any]) -> str:
    return f"B{case['b']}/{_length(case['s'])}"


def _case(case: Mapping[str, Any]) -> str:
    """What differs from the usual shape, in words."""
    parts = [_where(case)]
    if (case["q_heads"], case["kv_heads"]) != (_USUAL["q_heads"], _USUAL["kv_heads"]):
        parts.append(f"{case['q_heads']} / {case['kv_heads']} heads")
    if case["d"] != _USUAL["d"]:
        parts.append(f"d {case['d']}")
    if case["q"] != _USUAL["q"]:
        parts.append(f"{case['q']} new tokens")
    words = {
        "tail_tokens": "{} of them in a 16-bit tail",
        "scales": "scales: {}",
        "beside": "the bytes of the {} lists",
        "mean_tokens": "",
    }
    for name in sorted(set(case) - _KNOWN):
        said = words.get(name, f"{name} {{}}").format(case[name])
        parts += [said] if said else []
    return ", ".join(parts)


def _bits(case: Mapping[str, Any]) -> str:
    return "mixed, ragged" if case["k_bits"] == "mixed" else f"{case['k_bits']} / {case['v_bits']}"


def _short(impl: str) -> str:
    """The backend of a rival's name."""
    return impl.removeprefix("torch sdpa ").removeprefix("torch ").split(",")[0]


def _rate(cell: Results) -> str:
    return f"{cell['gb_per_s']:.0f} ({100 * cell['fraction_of_peak']:.0f} %)"


def _error(cell: Results) -> str:
    return f"{cell['error']['value']:.1e}"


ROWS = {
    "attend_gpu": attend_rows,
    "attend_gpu_gain": gain_rows,
    "attend_gpu_rates": rate_rows,
    "attend_gpu_parts": part_rows,
    "attend_gpu_more": more_rows,
    "attend_gpu_rivals": rival_rows,
    "attend_gpu_ceilings": ceiling_rows,
    "append": append_rows,
    "pack": pack_rows,
    "score": score_rows,
    "decode": decode_rows,
    "decode_shares": share_rows,
}
