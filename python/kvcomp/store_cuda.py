"""Packed layers on a GPU, and how a pass over a compressed cache runs without the host.

For whoever runs passes (kvcomp.hf):

    stacked = packed.stacked         # Stacked; None for a cache on the CPU
    stacked.begin_step(q, valid)     # once per pass, before any layer: all host work (pools, tables, division of work);
                                     #   valid: (b,) integers on the host, as PackedLayer.append takes them, or None
    layer.append_attend(queries, keys, values, scale=..., softcap=..., out=None)    # then each layer once: the launches
                                     #   of append and attend, no synchronization; valid is begin_step's

With CUDA graphs, for q <= CHUNK:

    stacked.begin_step(q, valid)
    key = stacked.step_key()         # (generation, q, whether valid was given, observing): what a graph depends on
    if key in graphs:
        graphs[key].replay()
        stacked.replayed()           # all layers have run
    else:
        ...                          # every layer's append_attend, eagerly: allocates what the first call needs
        with stacked.capture(), torch.cuda.graph(graph):
            ...                      # the same calls again, recorded and not run: graphs[key] of later passes

``generation`` changes when tensors moved (tables or pools became larger, sequences were selected), in begin_step or
between passes: older graphs are of no use then. An ``observing`` pass collects attention mass, in the steps before a
list packs its next page where its plan left more than one class to choose from. A pass that was begun and not run
counts for nothing.
Without begin_step each call of a layer's append or append_attend is a pass of its own, as on the CPU.

On the device: tables and lists as append.h has them, every list's stacks of free pages, classes of what leaves the
tails, attend's division and workspace, which kvcomp.stacked looks after. ``table``, ``lists`` and what comes from them
(tokens, entries, ledgers) are the host's mirror, brought up to date when asked for.

The same code runs on CPU tensors, for tests: append and attend are then the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from . import _C
from .layer_input import Array, memory_of, real_counts, upload
from .pages import copied
from .ranks import Ranks
from .stacked import Group, Held, Rows, filled, refill
from .store import CHUNK, PackedLayer

AHEAD = 64  # tokens a list that pools are filled for at once
DIVIDE_EVERY = 16  # tokens after which the work is divided anew


def turned(rows: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """rows (b, heads, q, d) times each KV head's matrix (h, d, d), as float32; into ``out`` (contiguous), if given."""
    b, heads, q, d = rows.shape
    shape = (b, len(matrices), heads // len(matrices) * q, d)
    return torch.matmul(rows.float().reshape(shape), matrices, out=None if out is None else out.view(shape)).view(
        b, heads, q, d
    )


class CudaLayer(PackedLayer):
    """PackedLayer whose pages are on a device. Rows and queries are tensors there; counts are on the host.

    Before a Stacked takes it in, it is what its own arrays say, and nothing can be appended or attended.
    """

    stacked: Stacked | None = None
    group: Group | None = None
    place = 0  # in the group

    def __init__(self, *args: Any, **options: Any) -> None:
        self.held = Held()
        super().__init__(*args, **options)
        self._attended: set[tuple[Any, ...]] = set()  # kinds of calls that attend has accepted
        self._matrices: tuple[torch.Tensor, ...] | None = None

    # ---- the mirror

    @property
    def _on_device(self) -> Group | None:
        return self.group if self.group is not None and self.group.active else None

    def _mirror(self, group: Group) -> Rows:
        group.catch_up([self.place])
        return group.by_layer[self.place]

    @property
    def table(self) -> Array:
        group = self._on_device
        table: Array = self.held.table if group is None else self._mirror(group).table
        return table

    @table.setter
    def table(self, value: Array) -> None:
        self._settle()
        self.held.table = value

    @property
    def lists(self) -> Array:
        group = self._on_device
        lists: Array = self.held.lists if group is None else self._mirror(group).lists
        return lists

    @lists.setter
    def lists(self, value: Array) -> None:
        self._settle()
        self.held.lists = value

    @property
    def aged(self) -> Array:
        return self.held.aged

    @aged.setter
    def aged(self, value: Array) -> None:
        self._settle()
        self.held.aged = value

    @property
    def ranks(self) -> Ranks | None:
        return self.held.ranks

    @ranks.setter
    def ranks(self, value: Ranks | None) -> None:
        self._settle()
        self.held.ranks = value

    @property
    def appends(self) -> int:
        return self.held.appends

    @appends.setter
    def appends(self, value: int) -> None:
        self.held.appends = value

    def _settle(self) -> None:
        """Off the device: what changes lists other than by appending changes the layer's own arrays."""
        group = self._on_device
        if group is not None:
            group.settle()

    @property
    def batch(self) -> int:
        group = self._on_device
        lists = self.held.lists if group is None else group.by_layer[self.place].lists
        return len(lists) // self.heads

    # ---- passes

    def append(
        self,
        keys: Any,
        values: Any,
        valid: Array | None = None,
        make_room: Callable[[int], None] | None = None,
    ) -> None:
        """PackedLayer.append; rows are not looked at, so NaN and Inf are stored. ``make_room`` is not called: nothing
        holds a byte budget on a device."""
        _, q = self._group_and_new("append", "keys", keys, most=1)
        self._pass(None, keys, values, q, real_counts("append", "valid", valid, self.batch, q), 1.0, 0.0, None)

    def append_attend(
        self,
        queries: Any,
        keys: Any,
        values: Any,
        *,
        scale: float,
        softcap: float = 0.0,
        valid: Array | None = None,
        make_room: Callable[[int], None] | None = None,
        out: Any = None,
    ) -> Any:
        """PackedLayer.append_attend. In a pass of begin_step ``valid`` is what was given there."""
        ratio, q = self._group_and_new("append", "queries", queries)
        if q != self._group_and_new("append", "keys", keys, most=1)[1]:
            raise ValueError(f"append: queries: expected those of {keys.shape[2]} new tokens, got {q}")
        counts = real_counts("append", "valid", valid, self.batch, q)
        kind = (queries.dtype, queries.device, ratio, scale, softcap)
        if kind not in self._attended:  # what would be refused after the append is refused before it
            self.attend(queries[:, :, :0], scale=scale, softcap=softcap)
            self._attended.add(kind)
        with memory_of("append", queries.device):
            out = queries.new_empty(queries.shape) if out is None else out
        if q <= CHUNK:
            self._pass(queries, keys, values, q, counts, scale, softcap, out)
            return out
        if counts is None and self.stacked is not None:
            counts = self.stacked.counts_of(self)
        for start in range(0, q, CHUNK):
            part = slice(start, min(start + CHUNK, q))
            width = part.stop - start
            some = None if counts is None else np.clip(counts - (q - part.stop), 0, width).astype(np.int32)
            self._pass(
                queries[:, :, part], keys[:, :, part], values[:, :, part], width, some, scale, softcap, out[:, :, part]
            )
        return out

    def _pass(
        self,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        q: int,
        counts: Array | None,
        scale: float,
        softcap: float,
        out: torch.Tensor | None,
    ) -> None:
        with memory_of("append", keys.device):
            stacked, group, coding = self._shared()
            real = stacked.enter(self, q, counts)
            if self.rotation is not None:  # before append: attend may read its queries while append runs
                k_turn, v_turn, _ = self._turns()
                keys, values = turned(keys, k_turn), turned(values, v_turn)
                queries = None if queries is None else turned(queries, k_turn)
            rows = group.there_by_layer[self.place]
            mass = group.mass if stacked.observing and group.recent is not None and queries is not None else None
            space = None if queries is None else group.workspace(q, queries.shape[1] // self.heads, mass)
            # All memory is there before anything is appended.
            target = back = out
            if self.rotation is not None and queries is not None:
                target, back = (torch.empty(queries.shape, device=queries.device) for _ in range(2))
            _C.append(
                self.arena, *rows[:5], keys, values, real, rows.classes, coding.layout, self.window, coding.rotation,
                coding.scale, coding.stochastic, self.layer, coding.seed,
            )  # fmt: skip
            stacked.took(self)
            if queries is None or out is None or target is None or back is None:
                return
            division = None if group.divisions is None else group.division_rows[self.place]
            _C.attend(
                target, mass, queries, self.arena, rows.table, rows.lists, real, space, coding.layout, coding.rotation,
                scale, softcap, 0, division, int(division is not None),
            )  # fmt: skip
            if target is not out:
                out.copy_(turned(target, self._turns()[2], back))
            if mass is not None:
                group.observe(self.place, mass, q, real, queries.shape[1] // self.heads)

    def _shared(self) -> tuple[Stacked, Group, Any]:
        if self.stacked is None or self.group is None:
            raise RuntimeError("append: layer: expected one of a finished cache, got one that no Stacked has taken in")
        return self.stacked, self.group, self.coding

    def _turns(self) -> tuple[torch.Tensor, ...]:
        """The matrices of keys and values on the device, and the one that turns outputs back."""
        if self._matrices is None:
            assert self.rotation is not None and self._value_back is not None
            parts = (*self.rotation, self._value_back)
            self._matrices = tuple(upload(part, self._shared()[1].device) for part in parts)
        return self._matrices

    def _attend(
        self,
        out: Any,
        queries: Any,
        group: int,
        q: int,
        counts: Array | None,
        scale: float,
        softcap: float,
        mass: Any,
    ) -> None:
        """Of PackedLayer.attend: over what is there, with a workspace and a division of its own."""
        stacked, shared, coding = self._shared()
        stacked.order()
        shared.activate()
        rows = shared.there_by_layer[self.place]
        real = None if counts is None else upload(counts, shared.device)
        _C.attend(
            out, mass, queries, self.arena, rows.table, rows.lists, real, shared.workspace(q, group, mass),
            coding.layout, coding.rotation, scale, softcap, 0, None, 0,
        )  # fmt: skip

    def attend(
        self,
        queries: Any,
        *,
        scale: float,
        softcap: float = 0.0,
        new_tokens: Array | None = None,
        out: Any = None,
        mass: Any = None,
    ) -> Any:
        """PackedLayer.attend."""
        with memory_of("attend", getattr(queries, "device", None)):
            if self.rotation is None:
                return super().attend(queries, scale=scale, softcap=softcap, new_tokens=new_tokens, out=out, mass=mass)
            return self._attend_rotated(queries, scale, softcap, new_tokens, out, mass)

    def _attend_rotated(
        self, queries: Any, scale: float, softcap: float, new_tokens: Array | None, out: Any, mass: Any
    ) -> Any:
        group, q = self._group_and_new("attend", "queries", queries)
        counts = real_counts("attend", "new_tokens", new_tokens, self.batch, q)
        k_turn, _, v_back = self._turns()
        rows = turned(queries, k_turn)
        mixed = torch.empty_like(rows)
        self._attend(mixed, rows, group, q, counts, scale, softcap, mass)
        out = queries.new_empty(queries.shape) if out is None else out
        return out.copy_(turned(mixed, v_back))

    # ---- whole lists

    def unpack(self) -> tuple[Array, Array]:
        """PackedLayer.unpack, of a copy on the host."""
        arena = _C.Arena()
        (table,) = copied([self], arena)
        return PackedLayer(
            arena, self.coding, table, self.lists, heads=self.heads, layer=self.layer, aged=self.aged,
            window=self.window, rotation=self.rotation,
        ).unpack()  # fmt: skip

    def select(self, sequences: Array) -> None:
        self._settle()
        super().select(sequences)

    def release(self) -> None:
        self._settle()
        super().release()

    @property
    def table_bytes(self) -> int:
        """Of the tensors, or, off the device, of the layer's own arrays; and what its plan left to decoding."""
        group = self._on_device
        if group is None:
            return super().table_bytes
        return group.table_bytes(self.place) + (0 if self.ranks is None else self.ranks.nbytes)


class Stacked:
    """All layers of one cache on one device, and the passes over them.

    Attributes:
        observing: the pass at hand collects attention mass.
    """

    def __init__(self, layers: Sequence[CudaLayer], device: torch.device) -> None:
        self.device = device
        self.held = [layer.held for layer in layers]
        self.groups: list[Group] = []
        for heads in sorted({layer.heads for layer in layers}):
            alike = [layer for layer in layers if layer.heads == heads]
            first = alike[0]
            group = Group(
                [layer.held for layer in alike], device, first.arena, first.coding, window=first.window, heads=heads
            )
            self.groups.append(group)
            for place, layer in enumerate(alike):
                layer.stacked, layer.group, layer.place = self, group, place
        self.observing = False
        self._recording = False  # calls are captured, not run
        self._stream: Any = None
        self._valid: torch.Tensor | None = None  # (b,) where counts are for the device
        # The pass at hand: its number, its tokens, the real ones, layers that have run, whether it is of the schedule.
        self._pass, self._q, self._ran, self._scheduled = 0, 0, 0, False
        self._counts: Array | None = None
        self._noted: tuple[int, Array | None] = 0, None  # what the layer that is about to append appends
        # The schedule, passes of _each tokens that there is room for: is attention observed, do undecided lists pack?
        self._each, self._at, self._made = 0, 0, -1
        self._due: list[bool] = []
        self._packing: list[bool] = []
        self._since = 0  # tokens since the work was divided
        self.order()

    # ---- graphs

    @property
    def generation(self) -> int:
        """Changes when tensors moved."""
        return sum(group.moves for group in self.groups)

    @property
    def batches(self) -> set[int]:
        """Numbers of sequences of the layers: one, but while sequences are being selected."""
        return set().union(*(group.batches for group in self.groups))

    def step_key(self) -> tuple[int, int, bool, bool]:
        """What a captured graph of the pass at hand depends on."""
        return self.generation, self._q, self._counts is not None, self.observing

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Calls of the layers' append_attend are recorded inside, and not run."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def replayed(self) -> None:
        """A captured graph has run the pass at hand for all layers."""
        for held in self.held:
            held.turn = self._pass
            held.note(self._q, self._counts)
        self._ran = len(self.held)

    # ---- passes

    def begins_quietly(self, q: int) -> bool:
        """Whether begin_step(q) gives nothing out, so that a pass may be begun before it is known to be wanted."""
        at = self._at - (self._scheduled and self._ran == 0)
        same = q == self._each and self.generation == self._made and self._ran in (0, len(self.held))
        return same and at < len(self._due) and not self._packing[at]

    def begin_step(self, q: int, valid: Array | None = None) -> None:
        """Host work of one pass of q new tokens over all layers."""
        first = self.groups[0]
        lists = first.mirror.lists[0] if first.active else first.layers[0].lists
        counts = real_counts("append", "valid", valid, len(lists) // first.heads, q)
        if self._scheduled and self._ran == 0:
            self._at -= 1  # begun and not run
        elif self._ran not in (0, len(self.held)):
            self._due = []  # layers are no longer alike
        self._pass, self._q, self._counts, self._ran = self._pass + 1, q, counts, 0
        self._scheduled = False
        self.order()
        if q > CHUNK:  # each layer runs it in parts
            self._due = []
            for group in self.groups:
                group.make_room(range(len(group.layers)), q)
                group.room = [q] * len(group.layers)
            return
        if counts is not None:
            self._begin_counted(q, counts)
        else:
            if q != self._each or self._at >= len(self._due) or self.generation != self._made:
                self._schedule(q)
            self._scheduled = True
            self.observing = self._due[self._at]
            if self._packing[self._at]:
                for group in self.groups:
                    group.age(range(len(group.layers)), np.full(group.lists_each, q))
                self._made = self.generation
            self._at += 1
        self._divide(q)

    def _schedule(self, q: int) -> None:
        """Room for the passes to come, if they are like this one, and what will happen in them."""
        steps = max(1, AHEAD // max(q, 1))
        for group in self.groups:
            group.make_room(range(len(group.layers)), steps * q)
            group.room = [0] * len(group.layers)
        each = [group.foreseen(q, steps) for group in self.groups]
        self._due = [any(some) for some in zip(*(due for due, _ in each), strict=True)]
        self._packing = [any(some) for some in zip(*(packing for _, packing in each), strict=True)]
        self._each, self._at, self._made = q, 0, self.generation

    def _begin_counted(self, q: int, counts: Array) -> None:
        self._due = []
        self._give(counts)
        self.observing = False
        for group in self.groups:
            every, added = range(len(group.layers)), np.repeat(counts, group.heads)
            group.make_room(every, q)
            group.room = [0] * len(group.layers)
            self.observing |= group.due(every, q, added)
            group.age(every, added)

    def counts_of(self, layer: CudaLayer) -> Array | None:
        """Of the pass at hand, if the layer has not run it yet."""
        return self._counts if layer.held.turn != self._pass else None

    def enter(self, layer: CudaLayer, q: int, counts: Array | None) -> torch.Tensor | None:
        """A layer is about to append q rows: in the pass at hand, or, where that has been run or is one of parts, in a
        pass of its own. Returns how many rows of every sequence are real, where not all are."""
        if not self._recording and (layer.held.turn == self._pass or self._q > CHUNK):
            self._begin_alone(layer, q, counts)
            return None if counts is None else self._valid
        if q != self._q:
            raise ValueError(f"append: keys: expected {self._q} new tokens, as the pass was begun with, got {q}")
        self._noted = q, self._counts
        return None if self._counts is None else self._valid

    def _begin_alone(self, layer: CudaLayer, q: int, counts: Array | None) -> None:
        """A pass of one layer, or a part of it."""
        group, at = layer.group, [layer.place]
        assert group is not None
        self._due, self._scheduled, self.observing = [], False, False
        self.order()
        if not group.active or group.room[layer.place] < q:
            group.make_room(at if group.active else range(len(group.layers)), max(q, AHEAD))
            group.room[layer.place] = max(q, AHEAD)
        group.room[layer.place] -= q
        if group.undecided[layer.place].any():
            added = np.full(group.lists_each, q) if counts is None else np.repeat(counts, group.heads)
            group.catch_up(at)
            self.observing = group.due(at, q, added)
            group.age(at, added)
        if counts is not None:
            self._give(counts)
        self._divide(q)
        self._noted = q, counts

    def took(self, layer: CudaLayer) -> None:
        """What ``enter`` announced has been appended."""
        if not self._recording:
            layer.held.note(*self._noted)
            self._ran += layer.held.turn != self._pass
            layer.held.turn = self._pass

    def _give(self, counts: Array) -> None:
        if self._valid is None or len(self._valid) != len(counts):
            self._valid = filled(counts.shape, torch.int32, self.device)
        refill(self._valid, counts)

    def _divide(self, q: int) -> None:
        self._since += q
        if self._since >= DIVIDE_EVERY or any(group.divisions is None for group in self.groups):
            self._since = 0
            for group in self.groups:
                group.divide()

    def read(self) -> None:
        """The layers' own attributes are what the device holds: all appends, and what attention gave."""
        self.order()
        for group in self.groups:
            if group.active:
                group.catch_up(range(len(group.layers)))
                group.read_recent()

    def order(self) -> None:
        """What comes on the current stream runs behind what came on another one before."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and stream != self._stream:
            stream.wait_event(self._stream.record_event())
            for group in self.groups:
                for tensor in group.tensors:
                    tensor.record_stream(stream)
        self._stream = stream
