"""What the layers of one cache share on a device: tables, lists, pools of pages; and a mirror of them on the host.

Appends are deterministic: the host counts them, and ``append_walk`` brings a layer's mirror up to date when somebody
looks at it. So pools are filled for many steps at once, and no step needs a word from the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from . import _C
from .layer_input import Array, staged, upload
from .ranks import PAGE_TOKENS, WATCHED, Ranks
from .store import PAGES, SPARE_ENTRIES, TAIL_PAGE, TAIL_TOKENS, TOKENS, Coding

_SPARE_MASS = 1024  # columns of the attention mass beyond an eighth of those needed
# Few of torch's operations take unsigned words: they are stored as signed ones, and shown to ours as what they are.
KINDS = {
    "uint64": torch.int64,
    "uint32": torch.int32,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
_UNSIGNED = {"table": torch.uint64, "pool_tail": torch.uint32, "pool_packed": torch.uint32}


class Rows(NamedTuple):
    """What append takes, of one layer (n,...) or of all (l,n,...): NumPy arrays (the mirror) or tensors."""

    table: Any
    lists: Any
    pool_tail: Any
    pool_packed: Any
    left: Any
    classes: Any


def filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device, value: int = 0) -> torch.Tensor:
    """A new tensor of one value; MemoryError where the device has no room."""
    try:
        return torch.full(tuple(shape), value, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise MemoryError(f"append: tables: expected room for {tuple(shape)} on {device}, got none") from None


def refill(target: torch.Tensor, array: Array) -> None:
    """The array into a tensor that stays where it is, in the stream's order."""
    target.copy_(staged(array, target.device), non_blocking=True)


def packed_while(tails: Array, added: Array, window: int, packs: Array) -> Array:
    """Pages that lists pack while ``added`` tokens are appended to tails of so many (append.h)."""
    return np.where(packs & (added > 0), np.maximum((tails + added - 1 - window) // PAGE_TOKENS, 0), 0)


def _needs(tails: Array, added: Array, window: int, packs: Array) -> tuple[Array, Array]:
    """Most pages that lists take for ``added`` tokens each: 16-bit ones, packed ones; arrays of one shape."""
    most = int(added.max(initial=0)) + 1  # one number for each state: rows would take ten times as long to sort
    states = (tails.astype(np.int64) * most + added) * 2 + packs
    kinds, back = np.unique(states, return_inverse=True)
    found = [_C.append_need(kind // 2 // most, kind // 2 % most, window, bool(kind % 2)) for kind in kinds.tolist()]
    needs = np.array(found, np.int64).reshape(-1, 2)[back.reshape(-1)]
    return needs[:, 0].reshape(tails.shape), needs[:, 1].reshape(tails.shape)


@dataclass
class Held:
    """What changes of one layer: what it shares with its group, so that groups need not know layers.

    Attributes:
        table, lists, aged: PackedLayer's, while they are not on the device; aged stays the host's.
        records: [q, counts] of appends that the mirror does not have yet.
        appends: how many there were; turn: the last pass that the layer took part in.
    """

    table: Array = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    lists: Array = field(default_factory=lambda: np.zeros((0, 4), np.int32))
    aged: Array = field(default_factory=lambda: np.zeros((0, 2), np.uint8))
    ranks: Ranks | None = None
    records: list[list[Any]] = field(default_factory=list)
    appends: int = 0
    turn: int = 0

    def note(self, q: int, counts: Array | None) -> None:
        """An append has run: of q rows, of which counts (b,) are real."""
        last = self.records[-1] if self.records else None
        if last is not None and counts is None and last[1] is None:
            last[0] += q
        else:
            self.records.append([q, counts])
        self.appends += 1


class Group:
    """The layers of one head count, of one arena, coding and window.

    Attributes, while ``active`` (else the layers' own arrays are all there is):
        mirror: Rows of arrays (l,n,...), as far as each layer's records have been walked; there: the tensors.
        undecided: (l,n) bool, lists whose plan left more than one class to what leaves their tails.
        recent: (l,n,2) float32 tensor, Ranks.recent; None where nothing is undecided.
    """

    def __init__(
        self, layers: list[Held], device: torch.device, arena: _C.Arena, coding: Coding, *, window: int, heads: int
    ) -> None:
        self.layers, self.device = layers, device
        self.arena, self.coding, self.window, self.heads = arena, coding, window, heads
        self.active = False
        self.moves = 0  # how often tensors moved
        self.grown = 0  # and of these, since activation, how often because more room was needed
        self.mass: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.divisions: torch.Tensor | None = None
        self.workspaces: dict[tuple[int, int, bool], torch.Tensor] = {}
        self.room = [0] * len(layers)  # of a layer that appends alone: tokens that there is room for
        self.columns = torch.arange(PAGE_TOKENS, device=device)

    @property
    def lists_each(self) -> int:
        """Lists of a layer."""
        return int(self.mirror.lists.shape[1]) if self.active else len(self.layers[0].lists)

    @property
    def batches(self) -> set[int]:
        """Numbers of sequences of the layers."""
        if self.active:
            return {self.lists_each // self.heads}
        return {len(layer.lists) // self.heads for layer in self.layers}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything held on the device."""
        if not self.active:
            return []
        others = (self.mass, self.recent, self.divisions)
        return [*self.there, *self.workspaces.values(), *(other for other in others if other is not None)]

    # ---- on and off the device

    def activate(self) -> None:
        """Onto the device, with as much room as the lists have taken."""
        if not self.active:
            self.make_room(range(len(self.layers)), 0)

    def settle(self) -> None:
        """Off the device: the layers hold their own arrays again, and every page that is in no table is free."""
        if not self.active:
            return
        self.catch_up(range(len(self.layers)))
        self.read_recent()
        mirror = self.mirror
        self._free(mirror.pool_tail, mirror.left[:, :, 0], np.full_like(mirror.classes, 16))
        self._free(mirror.pool_packed, mirror.left[:, :, 1], mirror.classes)
        self.active = False
        self.moves += 1
        for layer, rows in zip(self.layers, self.by_layer, strict=True):
            width = int(rows.lists[:, PAGES].max(initial=0))
            layer.table, layer.lists, layer.aged = rows.table[:, :width].copy(), rows.lists.copy(), rows.classes.copy()
        del self.mirror, self.by_layer, self.there, self.unsigned, self.there_by_layer
        self.mass = self.recent = self.divisions = None
        self.workspaces, self.room = {}, [0] * len(self.layers)

    def _free(self, stacks: Array, left: Array, classes: Array) -> None:
        held = np.arange(stacks.shape[2]) < left[:, :, None]
        kinds = np.broadcast_to(classes[:, :, None], (*stacks.shape, 2))[held]
        units = stacks[held]
        for k, v in np.unique(kinds, axis=0):
            members = (kinds == (k, v)).all(1)
            self.arena.free(_C.page_bytes(self.coding.layout, int(k), int(v)), np.ascontiguousarray(units[members]))

    def catch_up(self, places: Iterable[int]) -> None:
        """The mirror of these layers has all their appends."""
        for place in places:
            records, rows = self.layers[place].records, self.by_layer[place]
            for q, counts in records:
                _C.append_walk(*rows[:5], counts, rows.classes, self.window, q)
            records.clear()

    # ---- room

    def make_room(self, places: Sequence[int], tokens: int | Array, *, decided: bool = False) -> None:
        """Tables and pools of these layers for ``tokens`` more tokens a list (or an array (n,), for each of them), with
        packed pages for undecided lists only where their classes are ``decided``. MemoryError: nothing has changed."""
        if self.active:
            self.catch_up(places)
            mirror, undecided = self.mirror, self.undecided
        else:
            mirror, undecided = self._gathered()
        at = list(places)
        lists, left, classes = mirror.lists[at], mirror.left[at], mirror.classes[at]
        added = np.broadcast_to(np.asarray(tokens), lists.shape[:2])
        tails, flushes = _needs(lists[:, :, TAIL_TOKENS], added, self.window, (classes != 16).any(2))
        packed = flushes if decided else np.where(undecided[at], 0, flushes)
        want = [np.maximum(need - left[:, :, column], 0) for column, need in enumerate((tails, packed))]
        tail_pages = lists[:, :, PAGES] - lists[:, :, TAIL_PAGE]
        needed = (
            int((lists[:, :, PAGES] + tails + flushes).max(initial=0)),
            int((tail_pages + left[:, :, 0] + want[0]).max(initial=0)),
            int((left[:, :, 1] + want[1]).max(initial=0)),
        )
        there = tuple(part.shape[2] for part in (mirror.table, mirror.pool_tail, mirror.pool_packed))
        larger = None
        if not self.active or any(more > had for more, had in zip(needed, there, strict=True)):
            if self.active:
                self.catch_up(range(len(self.layers)))
            larger = self._larger(mirror, needed)
        recent = self.recent
        if larger is not None and recent is None and undecided.any():
            recent = upload(self._recents(), self.device)
        if recent is not None:
            self._make_mass(int((lists[:, :, TOKENS] + added).max(initial=0)))
        units = self._allocated(want, classes)  # the last thing that there may be no room for
        if larger is not None:
            self._move(*larger, undecided, recent)
        for column, stack in enumerate((self.mirror.pool_tail, self.mirror.pool_packed)):
            _push(stack, self.mirror.left[:, :, column], np.array(at), want[column], units[column])
        if larger is not None:
            for target, array in zip(self.there, self.mirror, strict=True):
                refill(target, array)
        elif decided or any(wanted.any() for wanted in want):
            for target, array in list(zip(self.there, self.mirror, strict=True))[2:]:
                if len(at) == len(self.layers):
                    refill(target, array)
                else:
                    for place in at:
                        refill(target[place], array[place])

    def _gathered(self) -> tuple[Rows, Array]:
        """The layers' own arrays, stacked, without pools; and which lists are undecided."""
        layers = self.layers
        lists = np.stack([layer.lists for layer in layers])
        n = lists.shape[1]
        tables = np.zeros((len(layers), n, int(lists[:, :, PAGES].max(initial=0))), np.uint64)
        undecided = np.zeros((len(layers), n), bool)
        for table, some, layer in zip(tables, undecided, layers, strict=True):
            width = min(layer.table.shape[1], table.shape[1])
            table[:, :width] = layer.table[:, :width]
            some[:] = layer.ranks is not None and layer.ranks.kind[:, 1, 0] > 0
        none, left = np.zeros((len(layers), n, 0), np.uint32), np.zeros((len(layers), n, 2), np.int32)
        return Rows(tables, lists, none, none, left, np.stack([layer.aged for layer in layers])), undecided

    def _larger(self, mirror: Rows, needed: tuple[int, int, int]) -> tuple[Rows, Rows]:
        """Mirror and tensors with the room needed, and with spare room that doubles from one time to the next."""
        spare = SPARE_ENTRIES << min(self.grown, 20) if self.active else SPARE_ENTRIES
        arrays = list(mirror)
        for place, more, beyond in zip((0, 2, 3), needed, (spare, spare, 1), strict=True):
            old = arrays[place]
            arrays[place] = np.zeros((*old.shape[:2], max(more + beyond, old.shape[2])), old.dtype)
            arrays[place][:, :, : old.shape[2]] = old
        tensors = [filled(array.shape, KINDS[array.dtype.name], self.device) for array in arrays]
        return Rows(*arrays), Rows(*tensors)

    def _move(self, mirror: Rows, there: Rows, undecided: Array, recent: torch.Tensor | None) -> None:
        """Onto new tensors; what the first of them hold is uploaded by the caller."""
        self.grown = self.grown + 1 if self.active else 0
        self.active, self.undecided = True, undecided
        self.moves += 1
        self.mirror, self.there = mirror, there
        self.by_layer = [Rows(*parts) for parts in zip(*mirror, strict=True)]
        words = {name: getattr(there, name).view(kind) for name, kind in _UNSIGNED.items()}
        self.unsigned = unsigned = there._replace(**words)
        self.there_by_layer = [Rows(*parts) for parts in zip(*(part.unbind(0) for part in unsigned), strict=True)]
        self.workspaces, self.divisions = {}, None
        for layer, rows in zip(self.layers, self.by_layer, strict=True):
            layer.aged = rows.classes
        self.recent = recent

    def _allocated(self, want: list[Array], classes: Array) -> list[Array]:
        """Units of new pages, list after list: of 16-bit pages, of the lists' classes. All of them or MemoryError."""
        layout = self.coding.layout
        done: list[tuple[int, Array]] = []
        found = [np.zeros(int(part.sum()), np.uint32) for part in want]
        kinds = classes[:, :, 0].astype(np.int64) * 32 + classes[:, :, 1]
        owners = np.repeat(kinds.reshape(-1), want[1].reshape(-1))
        parts = [(found[0], np.ones(len(found[0]), bool), (16, 16))]
        parts += [(found[1], owners == kind, divmod(int(kind), 32)) for kind in np.flatnonzero(np.bincount(owners))]
        try:
            for units, members, pair in parts:
                if members.any():
                    size = _C.page_bytes(layout, *pair)
                    units[members] = self._units(size, int(members.sum()))
                    done.append((size, units[members]))
        except MemoryError:
            for size, units in done:
                self.arena.free(size, units)
            raise
        return found

    def _units(self, size: int, count: int) -> Array:
        """New pages; what torch keeps of a device's memory for later is asked for before there are none."""
        try:
            return self.arena.alloc(size, count)
        except MemoryError:
            if self.device.type != "cuda":
                raise
            torch.cuda.empty_cache()
            return self.arena.alloc(size, count)

    # ---- aging

    def _recents(self) -> Array:
        none = np.zeros((self.lists_each, 2), np.float32)
        return np.stack([none if layer.ranks is None else layer.ranks.recent for layer in self.layers])

    def read_recent(self) -> None:
        """What attention gave, from the device to the layers' ranks: waits for the device."""
        if self.recent is not None:
            for layer, rows in zip(self.layers, self.recent.cpu().numpy(), strict=True):
                if layer.ranks is not None:
                    layer.ranks.recent[:] = rows

    def age(self, places: Sequence[int], added: Array) -> None:
        """Before lists pack pages while ``added`` (n,) tokens come: undecided ones take their classes."""
        self.catch_up(places)
        at = list(places)
        lists, classes, left = self.mirror.lists[at], self.mirror.classes[at], self.mirror.left[at]
        flushes = packed_while(lists[:, :, TAIL_TOKENS], added, self.window, (classes != 16).any(2))
        # A list that holds pages of its class already, for a pass that was begun and not run, keeps it.
        rows = (flushes > 0) & self.undecided[at] & (left[:, :, 1] == 0)
        if self.recent is None or not rows.any():
            return
        self.read_recent()
        for place, some, packing in zip(at, rows, flushes > 0, strict=True):
            ranks = self.layers[place].ranks
            if ranks is not None:
                ranks.age(self.layers[place].aged, some)
                ranks.recent[packing] = 0
        refill(self.recent, self._recents())
        self.make_room(places, added, decided=True)

    def due(self, places: Sequence[int], q: int, added: Array) -> bool:
        """Whether attention is to be observed after ``added`` (n,) tokens, of a pass of q, have come (Ranks.due)."""
        at = list(places)
        tails = self.mirror.lists[at][:, :, TAIL_TOKENS]
        flushes = packed_while(tails, added, self.window, (self.mirror.classes[at] != 16).any(2))
        after = tails + added - PAGE_TOKENS * flushes
        return bool(((after + q > self.window + PAGE_TOKENS - WATCHED) & self.undecided[at]).any())

    def foreseen(self, q: int, steps: int) -> tuple[list[bool], list[bool]]:
        """Of ``steps`` passes of q tokens: whether attention is observed in them, and whether undecided lists pack."""
        if not self.undecided.any():
            return [False] * steps, [False] * steps
        tails = np.unique(self.mirror.lists[:, :, TAIL_TOKENS][self.undecided])
        packs, added = np.ones(len(tails), bool), np.full(len(tails), q)
        due, packing = [], []
        for _ in range(steps):
            flushes = packed_while(tails, added, self.window, packs)
            tails = tails + q - PAGE_TOKENS * flushes
            due.append(bool((tails + q > self.window + PAGE_TOKENS - WATCHED).any()))
            packing.append(bool(flushes.any()))
        return due, packing

    def observe(self, place: int, mass: torch.Tensor, q: int, counts: torch.Tensor | None, ratio: int) -> None:
        """Ranks.observe on the device: mass (n,m) of q queries, or counts (b,), of ``ratio`` heads each."""
        assert self.recent is not None
        lists, recent = self.there.lists[place].long(), self.recent[place]
        end = lists[:, TOKENS, None]
        columns = end - lists[:, TAIL_TOKENS, None] + self.columns
        gathered = mass.gather(1, columns.clamp_max(mass.shape[1] - 1)) * (columns < end)
        recent[:, 0] += gathered.sum(1) / ratio
        recent[:, 1] += q if counts is None else counts.repeat_interleave(self.heads, output_size=len(lists))

    # ---- what attend needs

    def divide(self) -> None:
        """The work of all layers' attention anew, as the tables are when the stream gets there. CUDA only."""
        n = self.lists_each
        if self.device.type != "cuda" or n == 0:
            return
        if self.divisions is None:
            words = _C.divide_words(n, self.device.index)
            self.divisions = filled((len(self.layers), words), torch.int32, self.device)
            self.division_rows = self.divisions.unbind(0)
        _C.divide(self.divisions, self.unsigned.table, self.there.lists, self.coding.layout)

    def _make_mass(self, tokens: int) -> None:
        """Columns of the attention mass for lists of so many tokens."""
        if self.mass is None or self.mass.shape[1] < tokens:
            n = self.lists_each
            self.mass = filled((n, tokens + tokens // 8 + _SPARE_MASS), torch.float32, self.device)
            self.workspaces = {}
            self.moves += 1

    def workspace(self, q: int, ratio: int, mass: torch.Tensor | None) -> torch.Tensor:
        """For q queries of ``ratio`` heads for each KV head; one for each kind of call, made before its first."""
        q = 1 << max(q - 1, 0).bit_length()  # few kinds: of chunks' ends, too
        key = (q, ratio, mass is not None)
        found = self.workspaces.get(key)
        if found is None:
            entries, head_dim, n = self.mirror.table.shape[2], self.coding.layout.head_dim, self.lists_each
            if self.device.type == "cuda":
                nbytes = _C.attend_workspace_cuda(n, entries, ratio, q, head_dim, 0 if mass is None else mass.shape[1])
            else:
                nbytes = _C.attend_workspace(n, entries, ratio, q, head_dim)
            found = filled((max(nbytes, 1),), torch.uint8, self.device, 0xFF)
            self.workspaces[key] = found
        return found

    # ---- bytes

    def table_bytes(self, place: int) -> int:
        """On the device, for one layer; what all share counts for the first one."""
        own = sum(int(part[place].nbytes) for part in self.there)
        own += sum(int(part[place].nbytes) for part in (self.recent, self.divisions) if part is not None)
        shared = [*self.workspaces.values(), *([] if self.mass is None else [self.mass])]
        return own + (sum(int(part.nbytes) for part in shared) if place == 0 else 0)


def _push(stacks: Array, left: Array, at: Array, wanted: Array, units: Array) -> None:
    """Units, list after list as ``wanted`` (len(at), n) says, onto the stacks (l,n,p) of layers ``at``."""
    n = wanted.shape[1]
    counts = wanted.reshape(-1)
    owner = np.repeat(np.arange(counts.size), counts)
    above = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    layer, row = at[owner // max(n, 1)], owner % max(n, 1)
    stacks[layer, row, left[layer, row] + above] = units
    left[at] += wanted.astype(left.dtype)
