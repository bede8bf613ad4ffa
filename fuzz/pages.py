"""Page headers: tables, states, lists, layouts and numbers made wrong, through every operation that takes them.

What an operation refuses it must leave as it was (architecture.md's "bad input leaves everything as it was"); memory
before and behind every array cannot be touched (memory.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import state as states
from kvcomp import _C
from kvcomp.store import PAGE
from memory import Slots
from reader import Finding, Reader, refusing
from state import Array, State

_VALID = {(layout, rotation): states.made(layout, rotation) for layout in states.LAYOUTS for rotation in (0, 1)}
_LAYOUTS = (*_VALID,) + (*_VALID,)[:4] * 3  # the small ones more often
_SLOTS = Slots(40)
_OPERATIONS = ("attend", "append", "unpack", "accumulate", "shrink", "plan", "pack", "attend", "append")
# Arrays that say where and what pages are, the ones to be changed most.
_HEADERS = ("table", "lists", "left", "pages", "pool_tail", "pool_packed", "classes", "aged", "start", "page_lists")
_SIZES = (128, 256, 128, 256, 4096, 1152, 100, 1 << 20)


def target(data: bytes) -> None:
    reader = Reader(data)
    if reader.below(4) == 3:
        _use_arena(reader)
        return
    state = dict(_VALID[reader.pick(_LAYOUTS)])
    operations = [reader.pick(_OPERATIONS) for _ in range(1 + reader.below(3))]
    at_end, object_arena = reader.flag(), reader.below(8) == 7
    names = list(dict.fromkeys(name for operation in operations for name in states.OPERATIONS[operation][0]))
    for name in names:
        if isinstance(state[name], np.ndarray):
            state[name] = _SLOTS.put(state[name], at_end=at_end)
    headers = [name for name in names if name in _HEADERS]
    for _ in range(reader.below(8)):
        _change(reader, state, reader.pick(headers if headers and reader.flag() else names))
    if object_arena and isinstance(state["arena"], np.ndarray):
        state["arena"] = _as_object(state["arena"])
    for operation in operations:
        _run(operation, state)


def _as_object(memory: Array) -> Any:
    """An Arena with these bytes, as many as fill whole units, whatever shape they were given."""
    arena, count = _C.Arena(1 << 20), memory.nbytes // states.UNIT
    units = arena.alloc(states.UNIT, count)
    whole = np.ascontiguousarray(memory).reshape(-1)[: count * states.UNIT]
    arena.write(states.UNIT, units, whole.reshape(count, states.UNIT))
    return arena


def _run(operation: str, state: State) -> None:
    outputs = [state[name] for name in states.OPERATIONS[operation][1] if isinstance(state[name], np.ndarray)]
    before = [output.tobytes() for output in outputs]
    done = False
    with refusing(ValueError, TypeError, NotImplementedError, MemoryError, sentence=f"{operation}: "):
        states.call(operation, state)
        done = True
    if not done and any(was != output.tobytes() for was, output in zip(before, outputs, strict=True)):
        raise Finding(f"{operation} refused its arguments, and changed some")


def _change(reader: Reader, state: State, name: str) -> None:
    """One argument made another one, of the right kind as a rule."""
    value = state[name]
    if name == "layout":
        fields = list(value)
        fields[reader.below(5)] = reader.whole() if reader.flag() else reader.pick((0, 1, 2, 16, 64, 80, 128, 256))
        state[name] = tuple(fields)
    elif isinstance(value, int):
        state[name] = reader.whole()
    elif isinstance(value, float):
        state[name] = reader.real()
    elif isinstance(value, np.ndarray):
        kind = reader.below(10)
        if kind < 7 and value.size and value.flags.writeable:
            _set(reader, value, name)
        elif kind == 7 and value.ndim and value.shape[0]:
            axis = reader.below(value.ndim)
            short = [slice(None)] * value.ndim
            short[axis] = reader.pick(
                (slice(1, None), slice(None, -1), slice(None, None, -1), slice(0, 0), slice(0, 1))
            )
            state[name] = value[tuple(short)]
        elif kind == 8:
            state[name] = reader.pick((value.reshape(-1), value[None], value.view(), value.T))
        elif kind == 9:
            state[name] = None


def _set(reader: Reader, value: Array, name: str) -> None:
    """An element, or a field of one."""
    place = np.unravel_index(reader.below(value.size), value.shape)
    if value.dtype == np.uint64 and name in ("table", "pages"):
        entry = np.array(value[place]).reshape(1).view(PAGE)
        field = reader.pick(("unit", "k_bits", "v_bits", "tokens", "flags"))
        entry[field] = reader.whole() % 2**32 % (1 << 8 * PAGE[field].itemsize)
        value[place] = entry.view(np.uint64)[0]
    elif value.dtype.kind == "f":
        with np.errstate(over="ignore"):
            value[place] = reader.real()
    else:
        bits, whole = 8 * value.itemsize, reader.whole()
        if reader.flag():  # near what it was
            whole = int(value[place]) + whole % 5 - 2
        whole %= 1 << bits
        value[place] = whole - (1 << bits if value.dtype.kind == "i" and whole >> (bits - 1) else 0)


# ---- arenas


def _use_arena(reader: Reader) -> None:
    arena = _C.Arena(1 << reader.pick((12, 16, 20, 20)))
    live: dict[int, list[int]] = {}
    for _ in range(min(12, 1 + reader.left // 3)):
        size, kind = reader.pick(_SIZES), reader.below(6)
        mine = live.setdefault(size, [])
        if kind == 0 or not mine:
            count = reader.pick((1, 2, 3, 17, 0, 1 << 16, -1, 2**31 - 1 if size > 4096 else 40))
            with refusing(ValueError, MemoryError, sentence="arena: "):
                mine += arena.alloc(size, count).tolist()
        else:
            _use_pages(reader, arena, size, mine, kind)
        if not 0 <= arena.used == sum(size * len(units) for size, units in live.items()) <= arena.nbytes:
            raise Finding(f"{arena.used} bytes used of {arena.nbytes}: {live}")


def _use_pages(reader: Reader, arena: Any, size: int, mine: list[int], kind: int) -> None:
    units = np.array(mine[: 1 + reader.below(len(mine))] if reader.flag() else mine, np.uint32)
    for _ in range(reader.below(3)):
        units[reader.below(units.size)] = reader.whole() % 2**32
    given = _SLOTS.put(units, at_end=reader.flag())
    if reader.below(16) == 15:
        given = reader.pick((given[None], given[::-1], given.view(np.int32), given[:0]))
    space = np.zeros((given.size, size if size * given.size <= 1 << 19 else 0), np.uint8)
    space = _SLOTS.put(space, at_end=reader.flag())
    with refusing(ValueError, TypeError, MemoryError, sentence="arena: "):
        if kind == 1:
            arena.read(size, given, space)
        elif kind == 2:
            arena.write(size, given, space)
        elif kind == 3:
            arena.copy(size, given, given[::-1].copy())
        elif kind == 4:
            given = given.copy()
            arena.compact(size, given)
            mine[:] = given.tolist()
        else:
            arena.free(size, given)
            gone = set(given.tolist())
            mine[:] = [unit for unit in mine if unit not in gone]
