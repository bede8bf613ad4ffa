"""Results objects as tables for people: Rich on a terminal, Markdown in a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..results import MIB

Results = Mapping[str, Any]
Row = tuple[str, ...]
NOTHING = "-"


def print_experiment(found: Results, console: Console) -> None:
    """Measured bytes and quality of one experiment, each beside the uncompressed cache's."""
    stamp = "" if found["origin"] == "measured" else f", {found['origin'].upper()}"
    table = Table(title=f"{found['method']}{stamp}", title_justify="left")
    table.add_column("")
    offline = found["cells"][0]["case"]["task"] == "stored cache"
    for name in ("uncompressed", "compressed"):
        table.add_column(name, justify="right")
    for row in _offline_rows(found) if offline else _model_rows(found):
        table.add_row(*row)
    console.print(table)
    for line in [*_key_lines(found), *_limit_lines(found)]:
        console.print(line, highlight=False)


def _number(value: Any, form: str = ".3g", unit: str = "") -> str:
    return NOTHING if value is None else f"{value:{form}}{unit}"


def _byte_rows(found: Results, cell: Results) -> list[Row]:
    rows: list[Row] = [
        ("allocated", _number(found["original_mb"], ".2f", " MiB"), _number(found["compressed_mb"], ".2f", " MiB")),
        ("ratio (bf16 bytes / allocated)", "1", _number(found["compression_ratio"], ".2f")),
    ]
    for name, nbytes in cell.get("ledger", {}).items():
        if nbytes:
            rows.append((f"  {name.replace('_', ' ')}", NOTHING, _number(nbytes / MIB, ".3f", " MiB")))
    rows.append(("kept fraction", "1", _number(cell.get("kept_fraction"), ".3f")))
    rows.append(("bits per kept element", "16", _number(cell.get("bits_per_element"), ".2f")))
    return rows


def _error_rows(cell: Results) -> list[Row]:
    names = {
        "key_mse": "key mean squared error",
        "value_mse": "value mean squared error",
        "key_cosine": "key cosine",
        "value_cosine": "value cosine",
        "key_cosine_selected": "key cosine, kept tokens",
        "value_cosine_selected": "value cosine, kept tokens",
        "attention_coverage": "attention on kept tokens",
        "attention_output_error": "attention output error (relative)",
    }
    rows: list[Row] = [
        (label, "1" if "cosine" in name or "coverage" in name else "0", _number(cell[name], ".4f"))
        for name, label in names.items()
        if cell.get(name) is not None
    ]
    return rows


def _offline_rows(found: Results) -> list[Row]:
    cell = found["cells"][0]
    rows = _byte_rows(found, cell) + _error_rows(cell)
    for name, label in (("throughput_gain", "throughput gain"), ("ttft_delta_ms", "TTFT change, ms")):
        if found[name] is not None:
            rows.append((f"{label} (typed in)", NOTHING, _number(found[name], ".2f")))
    return rows


def _model_rows(found: Results) -> list[Row]:
    cells = {(c["case"]["method"], c["case"]["task"], c["case"]["mode"]): c for c in found["cells"]}
    base, packed = "bf16", found["method"]
    text = {method: cells[method, "held_out", "continuation"] for method in (base, packed)}

    def beside(label: str, name: str, form: str, unit: str = "") -> Row:
        return (label, *(_number(text[method][name], form, unit) for method in (base, packed)))

    rows = _byte_rows(found, text[packed])
    rows += [
        beside("perplexity, held-out text (decode path)", "perplexity", ".4f"),
        ("KL from bf16, nats per token", "0", _number(text[packed]["kl"], ".4f")),
        ("top-1 agreement with bf16", "1", _number(text[packed]["top1_agreement"], ".3f")),
    ]
    for method, task, mode in cells:
        if method == base and task != "held_out":
            label = f"accuracy, {task.replace('_', ' ')} ({mode})"
            rows.append((label, *(accuracy(cells[name, task, mode]) for name in (base, packed))))
    for mode in ("aware", "agnostic"):
        if found["accuracy"][base][mode]:
            pooled = (found["accuracy"][method][mode] for method in (base, packed))
            rows.append((f"accuracy, all ({mode})", *map(accuracy, pooled)))
    rows += _error_rows(text[packed])
    rows += [
        beside("prefill and compression", "ttft_ms", ".0f", " ms"),
        beside("per token", "tpot_ms", ".2f", " ms"),
    ]
    return rows


def accuracy(cell: Results) -> str:
    """Mean, 95 % interval and number of questions."""
    low, high = cell["ci95"]
    return f"{cell['accuracy']:.2f} [{low:.2f}, {high:.2f}] n={cell['n']}"


def _key_lines(found: Results) -> list[str]:
    lines = []
    for key, values in found["keys"].items():
        asked, became = values["configured"], values["effective"]
        if isinstance(became, list):
            became = "per layer " + ", ".join(_number(value, ".2f") for value in became)
            asked = ", ".join(f"{entry['layer_index']}:{entry['retain_ratio']:g}" for entry in asked or []) or None
        elif isinstance(became, float):
            became = f"{became:.3g}"
        lines.append(f"{key}: configured {NOTHING if asked is None else asked}, effective {became}")
    return lines


def _limit_lines(found: Results) -> list[str]:
    words = {True: "met", False: "missed", None: "not measured"}
    lines = []
    for name, limit in found["limits"].items():
        got = "" if limit["measured"] is None else f" ({limit['measured']:.3f})"
        lines.append(f"budget.{name} {limit['limit']:g}: {words[limit['met']]}{got}")
    return lines


# ---- tables of several methods


def quality_rows(found: Results) -> tuple[Row, list[Row]]:
    """Header and rows: one row per method, from a results object of kind ``quality``."""
    methods = list(dict.fromkeys(cell["case"]["method"] for cell in found["cells"]))
    header = (
        "KV cache", "allocated", "ratio", "tokens kept", "accuracy, aware", "accuracy, agnostic", "perplexity", "KL",
        "top-1",
    )  # fmt: skip
    rows = []
    for method in methods:
        cells = [cell for cell in found["cells"] if cell["case"]["method"] == method]
        text = next(cell for cell in cells if cell["case"]["task"] == "held_out")
        rows.append((
            method,
            f"{text['nbytes'] / MIB:.2f} MiB",
            f"{text['ratio']:.2f}",
            f"{100 * text.get('kept_fraction', 1.0):.0f} %",
            *(_mode_accuracy(cells, mode) for mode in ("aware", "agnostic")),
            f"{text['perplexity']:.3f}",
            f"{text['kl']:.4f}",
            f"{100 * text['top1_agreement']:.1f} %",
        ))  # fmt: skip
    return header, rows


def _mode_accuracy(cells: Sequence[Results], mode: str) -> str:
    scores = [score for cell in cells if cell["case"]["mode"] == mode for score in cell["scores"]]
    return f"{100 * sum(scores) / len(scores):.1f} % of {len(scores)}" if scores else NOTHING


def task_rows(found: Results) -> tuple[Row, list[Row]]:
    """Header and rows: one row per task and mode, one column per method."""
    cells = [cell for cell in found["cells"] if cell["case"]["task"] != "held_out"]
    methods = list(dict.fromkeys(cell["case"]["method"] for cell in cells))
    by_task: dict[Row, dict[str, Results]] = {}
    for cell in cells:
        case = cell["case"]
        by_task.setdefault((case["task"].replace("_", " "), case["mode"]), {})[case["method"]] = cell
    rows = []
    for name, entry in by_task.items():
        n = next(iter(entry.values()))["n"]
        rows.append((*name, str(n), *(f"{100 * entry[method]['accuracy']:.1f} %" for method in methods)))
    return ("task", "mode", "questions", *methods), rows


def attend_rows(found: Results) -> tuple[Row, list[Row]]:
    """Header and rows: one row per cell of a results object of kind ``attend``."""
    rows: list[Row] = []
    for cell in found["cells"]:
        case = cell["case"]
        bits = NOTHING if "k_bits" not in case else str(case["k_bits"])
        rows.append((
            cell["impl"] + (" (read rate)" if cell.get("role") == "ceiling" else ""),
            bits,
            f"{cell['median_us'] / 1e3:.2f} ms",
            f"{cell['bytes'] / 1e6:.1f} MB",
            f"{cell['gb_per_s']:.1f} GB/s",
            _number(cell.get("times_torch"), ".2f", "×"),
            _error(cell),
        ))  # fmt: skip
    return ("attention", "bits", "median", "bytes", "rate", "against torch's fastest", "error"), rows


def _error(cell: Results) -> str:
    error = cell["error"]
    return NOTHING if error is None else f"{error['value']:.1e} (at most {error['bound']:.1e})"


ROWS = {"quality": quality_rows, "tasks": task_rows, "attend": attend_rows}


def print_rows(header: Row, rows: Sequence[Row], console: Console, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table, first column left, others right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
