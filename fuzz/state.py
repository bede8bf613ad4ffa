"""A small, valid state of everything that operations of ``kvcomp._C`` take, by name; and which take what.

Two lists of pages (one sequence, two heads): packed pages of several classes, then 16-bit tails; the second one's tail
is long enough to be packed by the next append.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from kvcomp import _C
from kvcomp.store import PAGE

Array = np.ndarray[Any, Any]
State = dict[str, Any]

UNIT = 128
LAYOUTS = ((64, 64, 1, 1, 0), (64, 16, 0, 2, 1), (80, 80, 1, 2, 0), (128, 32, 1, 1, 1), (256, 256, 0, 1, 0))
_HEADS, _NEW, _TOKENS, _CAPACITY = 2, 3, 40, 12
_LISTS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((4, 4, 64), (2, 3, 33), (16, 16, 16), (16, 16, 5)),
    ((3, 8, 64), (16, 2, 1), *[(16, 16, 16)] * 4, (16, 16, 3)),
)
_CLASSES = ((4, 4), (2, 16), (16, 16))
_POOL = 6

# Every operation's arguments, in order, as names of the state; those that it writes.
OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attend": (
        (
            *("out", "mass", "queries", "arena", "table", "lists", "new_tokens", "attend_workspace", "layout"),
            *("rotation", "logit_scale", "softcap", "threads"),
        ),
        ("out", "mass"),
    ),
    "append": (
        (
            *("arena", "table", "lists", "pool_tail", "pool_packed", "left", "keys", "values", "valid", "classes"),
            *("aged", "layout", "window", "rotation", "scale", "stochastic", "layer", "seed"),
        ),
        ("arena", "table", "lists", "pool_tail", "pool_packed", "left"),
    ),
    "pack": (
        (
            *("arena", "prompt_keys", "prompt_values", "pages", "page_lists", "start", "tokens", "layout", "rotation"),
            *("scale", "stochastic", "layer", "seed"),
        ),
        ("arena",),
    ),
    "unpack": (
        (
            *("prompt_keys", "prompt_values", "arena", "pages", "page_lists", "start", "tokens", "layout"),
            "rotation",
        ),
        ("prompt_keys", "prompt_values"),
    ),
    "accumulate": (("worth", "mass", "table", "lists", "keep_factor", "gain"), ("worth",)),
    "shrink": (
        (
            *("page_k_bits", "page_v_bits", "page_lists", "weight", "distortion_k", "distortion_v", "drop", "allowed"),
            *("shrink_workspace", "layout", "entry_bytes", "wanted"),
        ),
        ("page_k_bits", "page_v_bits"),
    ),
    "plan": (
        (
            *("k_bits", "v_bits", "importance", "kept", "fixed", "distortion_k", "distortion_v", "drop", "allowed"),
            *("least_tokens", "guard", "groups", "plan_workspace", "layout", "budget", "entry_bytes", "list_bytes"),
            "fixed_class",
        ),
        ("k_bits", "v_bits"),
    ),
    "score": (
        (
            *("scores", "queries", "prompt_keys", "first", "score_workspace", "logit_scale", "softcap", "reduce"),
            *("pool_kind", "pool"),
        ),
        ("scores",),
    ),
    "norms": (("scores", "prompt_keys", "first", "centered"), ("scores",)),
    "select": (
        ("kept", "importance", "keep", "firsts", "select_workspace", "sinks", "window"),
        ("kept",),
    ),
    "ada": (
        ("kept", "importance", "keep_all", "firsts", "ada_workspace", "heads", "floor", "sinks", "window"),
        ("kept",),
    ),
    "share": (("shares", "share_weight", "share_floor", "share_ceiling", "total"), ("shares",)),
    "pyramid": (("pyramid_weight", "beta"), ("pyramid_weight",)),
    "rotate": (("out", "queries", "matrix", "transpose"), ("out",)),
    "append_need": (("tail_tokens", "q", "window", "stochastic"), ()),
    "attend_workspace": (("q", "q", "q", "q", "q"), ()),
    "score_workspace": (("q", "q", "q", "q", "q"), ()),
    "select_workspace": (("q", "q"), ()),
    "ada_workspace": (("q", "q"), ()),
    "plan_workspace": (("q", "q"), ()),
    "shrink_workspace": (("q", "q"), ()),
    "page_bytes": (("layout", "one_k_bits", "one_v_bits"), ()),
    "page_tokens": (("one_k_bits", "one_v_bits"), ()),
    "scale_bytes": (("layout", "one_k_bits", "one_v_bits"), ()),
    "set_threads": (("threads",), ()),
}


def _workspace(nbytes: int) -> Array:
    return np.zeros(-(-nbytes // 64) * 64, np.uint8)  # whole cache lines, so that beside an edge it is aligned


def made(layout: tuple[int, int, int, int, int], rotation: int) -> State:
    """The state; arrays in it are nobody else's."""
    d, n = layout[0], len(_LISTS)
    random = np.random.default_rng(d + rotation)
    entries = [np.zeros(len(pages), PAGE) for pages in _LISTS]
    unit = 0

    def place(k_bits: int, v_bits: int) -> int:
        nonlocal unit
        unit += (size := _C.page_bytes(layout, k_bits, v_bits) // UNIT)
        return unit - size

    for pages, row in zip(_LISTS, entries, strict=True):
        for entry, (k, v, tokens) in zip(row, pages, strict=True):
            entry["k_bits"], entry["v_bits"], entry["tokens"], entry["unit"] = k, v, tokens, place(k, v)
    pool_tail = np.zeros(_POOL + 8, np.uint32)
    pool_tail[:_POOL] = [place(16, 16) for _ in range(_POOL)]
    pool_packed = np.array([[place(k, v)] for k, v in _CLASSES], np.uint32)
    table = np.zeros((n, _CAPACITY), np.uint64)
    lists = np.zeros((n, 4), np.int32)
    for i, row in enumerate(entries):
        table[i, : len(row)] = row.view(np.uint64)
        tail = (row["k_bits"] == 16) & (row["v_bits"] == 16)
        lists[i] = len(row), int(tail.argmax()), int(row["tokens"][tail].sum()), int(row["tokens"].sum())
    every = np.concatenate(entries)
    m, most = len(every), int(lists[:, 3].max())
    tokens = [np.arange(int(count)) % _TOKENS for count in every["tokens"]]
    f32 = np.float32

    def rows(count: int) -> Array:
        return random.standard_normal((1, _HEADS, count, d)).astype(f32)

    state: State = {
        "arena": np.zeros(unit * UNIT, np.uint8),
        **{"table": table, "lists": lists, "pool_tail": pool_tail, "pool_packed": pool_packed},
        "left": np.array([_POOL, *[1] * len(_CLASSES)], np.int32),
        **{"keys": rows(_NEW), "values": rows(_NEW), "queries": rows(_NEW), "out": np.zeros((1, _HEADS, _NEW, d), f32)},
        **{"prompt_keys": rows(_TOKENS), "prompt_values": rows(_TOKENS)},
        **{"valid": np.array([_NEW], np.int32), "new_tokens": np.array([_NEW], np.int32)},
        **{"classes": np.array(_CLASSES, np.uint8), "aged": np.arange(n, dtype=np.uint8)},
        **{"mass": np.zeros((n, most + 3), f32), "worth": np.ones((n, _CAPACITY), f32)},
        **{"pages": every.view(np.uint64), "page_lists": np.repeat(np.arange(n), [len(row) for row in entries])},
        "start": np.cumsum([0, *(len(part) for part in tokens)])[:-1].astype(np.int32),
        "tokens": np.concatenate(tokens).astype(np.int32),
        **{"page_k_bits": every["k_bits"].copy(), "page_v_bits": every["v_bits"].copy()},
        "weight": random.random(m, f32),
        "distortion_k": np.tile(np.array([1, 0.3, 0.1, 0.01, 0], f32), (n, 1)),
        "distortion_v": np.tile(np.array([2, 0.6, 0.2, 0.02, 0], f32), (n, 1)),
        **{"drop": np.full(n, 5, f32), "allowed": np.ones((5, 5), np.uint8)},
        **{"k_bits": np.zeros((n, _TOKENS), np.uint8), "v_bits": np.zeros((n, _TOKENS), np.uint8)},
        "importance": random.random((n, _TOKENS), f32),
        **{"kept": np.ones((n, _TOKENS), np.uint8), "fixed": np.zeros((n, _TOKENS), np.uint8)},
        **{"least_tokens": np.full(n, 2, np.int32), "guard": np.full(n, 8, np.int32)},
        **{"groups": np.zeros(n, np.int32), "scores": np.zeros((1, _HEADS, _TOKENS), f32)},
        **{"first": np.array([2], np.int32), "firsts": np.full(n, 2, np.int32)},
        **{"keep": np.full(n, 20, np.int32), "keep_all": np.full(1, 30, np.int32), "floor": np.full(1, 4, np.int32)},
        **{"shares": np.zeros(3, np.int64), "share_weight": np.ones(3), "share_floor": np.ones(3, np.int64)},
        **{"share_ceiling": np.full(3, 9, np.int64), "pyramid_weight": np.zeros(3)},
        "matrix": np.tile(np.eye(d, dtype=f32), (_HEADS, 1, 1)),
        "attend_workspace": _workspace(_C.attend_workspace(n, _CAPACITY, 1, _NEW, d)),
        "plan_workspace": _workspace(_C.plan_workspace(n, _TOKENS)),
        "shrink_workspace": _workspace(_C.shrink_workspace(n, m)),
        "score_workspace": _workspace(_C.score_workspace(1, _HEADS, _NEW, _TOKENS, d)),
        "select_workspace": _workspace(_C.select_workspace(n, _TOKENS) + 1),
        "ada_workspace": _workspace(_C.ada_workspace(n, _TOKENS)),
        **{"layout": layout, "rotation": rotation, "logit_scale": 0.125, "softcap": 0.0, "threads": 1, "window": 0},
        **{"scale": 0, "stochastic": 0, "layer": 0, "seed": 0, "keep_factor": 0.5, "gain": 1.0, "entry_bytes": 8},
        **{"wanted": 5000, "budget": -1, "list_bytes": 16, "fixed_class": 0, "reduce": 0, "pool_kind": 0, "pool": 5},
        **{"centered": 0, "sinks": 2, "heads": 2, "total": 12, "beta": 2.0, "transpose": 0, "tail_tokens": 70, "q": 3},
        **{"one_k_bits": 4, "one_v_bits": 2},
    }
    state["page_lists"] = state["page_lists"].astype(np.int32)
    call("pack", state)
    return state


def call(operation: str, state: State) -> Any:
    return getattr(_C, operation)(*(state[name] for name in OPERATIONS[operation][0]))
