"""A prompt's K and V -> packed layers under one byte budget, all layers together or one after the other, with a report
of what was decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _C
from .choose import candidates_of, layer_priorities, layer_shares
from .devices import arena_on, kind_of_layer, refuse_hold
from .hold import compact, least_held
from .layer_input import Array, LayerInput, cuda_of, first_tokens, memory_of, upload
from .measure import at_random, check_peaks, distortion_begun, importance_begun, peaks_on_gpu, recency
from .packed import Packed, Report, ratio_text
from .pages import GRANULE_BYTES, PageRows, WholePages, bytes_held, write_pages
from .policy import Policy
from .ranks import WORTH_BYTES, Ranks, ladder, list_bytes, page_worth, spread
from .rotation import Rotation
from .spend import LIST_BYTES, Account, Over, Ready, Spent, classes_of, fixed_bits, spend
from .store import BFLOAT16, FLOAT16, PAGE, ROTATIONS, SCALE_DTYPES, SCALES, Coding, Layout, PackedLayer, rotated


def _half(tensor: Any) -> int:
    return BFLOAT16 if "bfloat16" in str(tensor.dtype) else FLOAT16


class Compressor:
    """Takes a prompt's layers in order and packs them, where their keys are: on the host, or on a GPU, where ``finish``
    refuses NaN and Inf at the latest.

    With ``Policy.prefill="joint"`` and a byte budget nothing is packed before ``finish``: K and V of all layers are
    kept until then (``keeps``). With "layerwise", and with fixed bits, each layer is packed when it is added, in its
    share of the bytes, and nothing of it is kept.

    least_if_over: keep the smallest plan (``report.over_budget``) where the budget is below it, instead of raising
        ``BudgetError``.
    positions: keep which token every place holds (``Packed.positions``).
    """

    def __init__(self, policy: Policy, layers: int, *, least_if_over: bool = False, positions: bool = False) -> None:
        if layers < 1:
            raise ValueError("compress: layers: expected at least one, got none")
        if policy.layer_weights is not None and len(policy.layer_weights) != layers:
            raise ValueError(
                f"compress: layer_weights: expected one for each of {layers} layers, got {len(policy.layer_weights)}"
            )
        self.policy, self.layers = policy, layers
        self._least_if_over, self._want_positions = least_if_over, positions
        self._begun: Callable[[], Ready] | None = None  # a layer that is being measured
        self._ready: list[Ready] = []  # measured, and not packed yet
        self._shapes: list[tuple[int, int, int, int]] = []
        self._packed: list[PackedLayer] = []
        self._positions: list[Array] = []
        self._page_bytes: list[int] = []
        self._tokens: list[dict[tuple[int, int], int]] = []  # of each layer, by class
        self._whole: WholePages | None = None  # where every token is kept at fixed bits
        self._peaks: list[tuple[str, Any]] = []  # largest magnitudes of rows on a GPU: finite if they are
        self._least: int | None = 0
        self._over = False
        self._need = 0.0  # bytes of the first layer's smallest plan, a head, with prefill="layerwise"

    @property
    def keeps(self) -> bool:
        """Whether layers are held as they are until ``finish``."""
        return self.policy.prefill == "joint" and self.policy.fixed_class is None

    # ---- layers come in

    def add(self, layer: LayerInput) -> None:
        """The next layer of the prompt."""
        index = len(self._shapes)
        if index == self.layers:
            raise ValueError(f"compress: layers: expected {self.layers}, got more")
        self._check(layer, index)
        if index == 0:
            self._begin(layer)
        self._shapes.append(layer.shape)
        with memory_of("compress", self._device):
            self._take(layer, index)

    def _take(self, layer: LayerInput, index: int) -> None:
        """Measures the layer that was just added, and packs it where nothing is kept."""
        if self._device is not None:
            self._peaks += [(f"{name}: layer {index}", part) for name, part in peaks_on_gpu(layer, self._first)]
        if self._whole is not None:
            self._pack_whole(self._whole, layer, index)
            return
        begun = self._measuring(layer, index)
        self._catch_up()
        self._begun = begun
        if self._device is not None and self.keeps:
            return  # while the host measures one layer, the GPU is at the next one
        self._catch_up()
        if not self.keeps:
            self._pack(-1 if self.policy.fixed_class is not None else self._share())

    def finish(self) -> Packed:
        """All layers have been added."""
        if len(self._shapes) != self.layers:
            raise ValueError(f"compress: layers: expected {self.layers}, got {len(self._shapes)}")
        with memory_of("compress", self._device):
            return self._finish()

    def _finish(self) -> Packed:
        self._catch_up()
        check_peaks(self._peaks)
        if self._ready:
            self._pack(self._budget(self._bf16_bytes()))
        elif self.layers > 1 and (self._whole is None or self._whole.odd):
            if self._whole is not None:
                self._whole.supply.close()
            compact(self._arena, self._packed)  # one slab a size for all layers, as after a joint plan
        budget = self._budget(self._bf16_bytes())
        self._over = self._over and self._held() > budget
        hold = None
        if self.policy.decode == "hold":
            hold = self._held_bytes(budget)
        report = self._report(budget)
        positions = self._positions if self._want_positions else None
        return Packed(self._arena, self._packed, report, self.policy, positions, hold)

    def _check(self, layer: LayerInput, index: int) -> None:
        keys, values = (tuple(getattr(part, "shape", ())) for part in (layer.keys, layer.values))
        if len(keys) != 4 or keys != values or 0 in keys[1:2]:
            raise ValueError(
                f"compress: layers[{index}]: expected keys and values of one shape (b, h, s, d), "
                f"got {keys} and {values}"
            )
        device = cuda_of(layer.keys)
        wanted = self._device if index else device
        if device != wanted or cuda_of(layer.values) != wanted:
            found = " and ".join(str(cuda_of(part) or "cpu") for part in (layer.keys, layer.values))
            raise ValueError(f"compress: layers[{index}]: expected keys and values on {wanted or 'cpu'}, got {found}")
        shape = self._shapes[0] if index else layer.shape
        if layer.shape[0] != shape[0] or layer.shape[2:] != shape[2:]:
            raise ValueError(f"compress: layers[{index}]: expected shape {shape}, got {layer.shape}")
        first = first_tokens(layer)
        if index and not np.array_equal(first, self._first):
            raise ValueError(
                f"compress: layers[{index}]: expected first {self._first.tolist()} as in layers[0], "
                f"got {first.tolist()}"
            )
        if layer.importance is not None and tuple(layer.importance.shape) != layer.shape[:3]:
            raise ValueError(
                f"compress: importance: expected {layer.shape[:3]} in layer {index}, "
                f"got {tuple(layer.importance.shape)}"
            )
        rotation = self.policy.rotation
        if isinstance(rotation, Rotation) and not rotation.fits(self.layers, layer.shape[1], layer.shape[3]):
            raise ValueError(
                f"compress: rotation: expected matrices of {self.layers} layers, {layer.shape[1]} heads and "
                f"{layer.shape[3]} channels, got {rotation!r}"
            )

    def _begin(self, layer: LayerInput) -> None:
        policy = self.policy
        self._first, self._device = first_tokens(layer), cuda_of(layer.keys)
        if self._device is not None and policy.decode == "hold":
            refuse_hold("compress", self._device)
        head_dim = layer.shape[3]
        group = head_dim if policy.group is None else policy.group
        layout = Layout(head_dim, group, int(policy.zero_point), _half(layer.keys), SCALE_DTYPES[policy.scale_dtype])
        _C.page_bytes(layout, 16, 16)  # refuses head dimensions and groups by name
        given = isinstance(policy.rotation, Rotation)
        rotation = 0 if given or policy.fixed_class == (16, 16) else ROTATIONS[str(policy.rotation)]
        self._coding = Coding(layout, rotation, SCALES[policy.scale], int(policy.stochastic), policy.seed)
        self._account = Account(layout, granule=self._granule)
        if policy.fixed_class is None:
            hold = policy.decode == "hold"
            entry, each = PAGE.itemsize + WORTH_BYTES * hold, LIST_BYTES + list_bytes(hold)
            self._account = Account(layout, entry, each, self._granule)
        self._arena = arena_on(self._device)
        if policy.fixed_class is not None and policy.select is None:
            self._whole = WholePages(self._arena, self._coding, self.layers)

    def _turns(self, index: int) -> tuple[Array, Array] | None:
        """The layer's own matrices, where the policy brings some and anything is quantized."""
        rotation = self.policy.rotation
        if not isinstance(rotation, Rotation) or self.policy.fixed_class == (16, 16):
            return None
        return rotation.keys[index], rotation.values[index]

    def _measuring(self, layer: LayerInput, index: int) -> Callable[[], Ready]:
        """The layer, measured: what a GPU has to do for it is queued now, and the call waits for that."""
        policy, pair, select = self.policy, self.policy.fixed_class, self.policy.select
        importance = tables = None
        if pair is None or (select is not None and select.keep is not None):
            importance = importance_begun(layer, policy, index)
        rows = self._rotated(layer, index)  # of the queries only norms are used from here on, which that keeps
        if pair is None:
            tables = distortion_begun(rows, self._coding, policy.calibration_tokens, index)
        if rows.queries is not None:
            rows = LayerInput(rows.keys, rows.values, None, None, rows.first, rows.scale, rows.softcap)

        def measured() -> Ready:
            b, h, s, _ = rows.shape
            position = np.arange(s)
            fixed = np.zeros((b * h, s), np.uint8)
            begin = np.repeat(self._first, h)[:, None]
            fixed[(position >= begin) & (position < begin + policy.sinks)] = 1
            fixed[position >= np.maximum(begin, s - policy.kept_window)] = 2
            worth = np.zeros((b, h, s), np.float32) if importance is None else importance()
            kept = candidates_of(worth, self._first, policy, index, self.layers)
            fixed[kept == 0] = 0
            if policy.allocate == "random":
                worth = at_random(rows.shape, policy.seed, index)
            elif policy.allocate == "position":
                worth = recency(rows.shape)
            priority = float(layer_priorities(select, self.layers)[index])
            errors = None if tables is None else tables()
            return Ready(rows, index, worth, self._first, kept, fixed, errors, priority, self.layers)

        return measured

    def _catch_up(self) -> None:
        """The layer before is measured, on the host: what that needs of a GPU is there, or is on its way."""
        measured, self._begun = self._begun, None
        if measured is not None:
            self._ready.append(measured())

    def _rotated(self, layer: LayerInput, index: int) -> LayerInput:
        """The layer times the policy's own matrices, if it has some."""
        turns = self._turns(index)
        if turns is None:
            return layer
        keys: Any
        values: Any
        if self._device is None:
            keys, values = (rotated(rows, turn) for rows, turn in zip((layer.keys, layer.values), turns, strict=True))
        else:
            from .store_cuda import turned

            keys, values = (
                turned(rows, upload(turn, self._device))
                for rows, turn in zip((layer.keys, layer.values), turns, strict=True)
            )
        return LayerInput(keys, values, layer.queries, None, layer.first, layer.scale, layer.softcap)

    # ---- bytes

    def _budget(self, bf16_bytes: int) -> int:
        return -1 if self.policy.fixed_class is not None else self.policy.budget(bf16_bytes)

    def _real_tokens(self) -> int:
        return int((self._shapes[0][2] - self._first).sum())

    def _bf16_bytes(self) -> int:
        """Of the uncompressed cache. Layers that are still to come have as many heads as the last one."""
        heads = sum(shape[1] for shape in self._shapes) + (self.layers - len(self._shapes)) * self._shapes[-1][1]
        return self._real_tokens() * heads * self._shapes[0][3] * 2 * 2

    def _share(self) -> int:
        """Bytes for the layer that was just added: its part of what the layers before it have left; but no less than
        its smallest plan, and nothing of what those of later layers take, if they are like the first layer's."""
        shape, index, select = self._shapes[-1], len(self._shapes) - 1, self.policy.select
        if index == 0:
            smallest = spend(self._ready, self.policy, self._account, 0, least_if_over=True)
            self._need = self._account.held(smallest.plans) / shape[1]
        if self.policy.layer_weights is not None:
            weights = np.asarray(self.policy.layer_weights, np.float64)
        elif select is not None and select.keep is not None:
            weights = layer_shares(select, self.layers, max(shape[2], 1), 1) * layer_priorities(select, self.layers)
        else:
            weights = np.ones(self.layers)
        left = self._budget(self._bf16_bytes()) - self._taken()
        share = max(left * weights[index] / weights[index:].sum(), self._need * shape[1])
        return max(0, int(min(share, left - self._need_later())))

    def _need_later(self) -> int:
        """Bytes of the smallest plans of layers that are still to come."""
        return math.ceil(self._need * self._shapes[-1][1]) * (self.layers - len(self._shapes))

    def _held(self) -> int:
        return int(self._arena.nbytes) + sum(layer.table_bytes for layer in self._packed)

    @property
    def _granule(self) -> int:
        """What all slabs of a plan are rounded up to: on a GPU, of a plan for all layers, to what they share."""
        return 1 if self._device is None or not self.keeps else GRANULE_BYTES

    def _taken(self) -> int:
        """Of the budget, by layers that are packed one by one. On a GPU these share granules: one, at most, is not full
        when all are packed."""
        return self._held() if self._device is None else sum(self._page_bytes) + GRANULE_BYTES

    def _held_bytes(self, budget: int) -> int:
        """What is held while decoding: the budget, if the 16-bit tails alone can live in it."""
        least = least_held(self._packed)
        if budget >= least:
            return max(budget, self._held()) if self._over else budget
        if not self._least_if_over:
            raise self._budget_error(least, budget)
        self._over = True
        return max(least, self._held())

    def _budget_error(self, least: int, budget: int) -> _C.BudgetError:
        error = _C.BudgetError(
            f"plan: budget: expected at least {least} bytes (a ratio of {ratio_text(self._bf16_bytes() / least)} or "
            f"less), got {budget} bytes"
        )
        error.least_bytes = least
        return error

    # ---- packing

    def _pack(self, budget: int) -> None:
        """Packs what is ready in ``budget`` bytes."""
        ready, self._ready = self._ready, []
        policy, pair = self.policy, self.policy.fixed_class
        if pair is not None:
            spent = fixed_bits(ready, pair)
            self._least = None
        else:
            try:
                spent = spend(ready, policy, self._account, budget, least_if_over=self._least_if_over)
            except Over as over:
                least = self._held() + over.held + self._need_later()
                raise self._budget_error(least, self._budget(self._bf16_bytes())) from None
            self._least = None if spent.least is None or self._least is None else self._least + spent.least
            self._over = self._over or spent.over
        tables = write_pages(self._arena, [one.layer for one in ready], spent.plans, self._coding, ready[0].index)
        common = pair or _common_class(spent, policy)
        for place, (one, rows, table) in enumerate(zip(ready, spent.plans, tables, strict=True)):
            aged = np.empty((len(rows.states), 2), np.uint8)
            aged[:] = common
            ranks = None
            if pair is None:
                ranks = _ranks(one, spent, place, table.shape[1], hold=policy.decode == "hold")
                classes = (ranks.kind[:, :, 0] > 0).sum(1)
                some = classes > 0  # until attention has been observed: the least class
                aged[some] = ranks.kind[some, classes[some] - 1]
            self._keep(one.layer.shape[1], one.index, rows, table, aged, ranks)

    def _pack_whole(self, whole: WholePages, layer: LayerInput, index: int) -> None:
        """Packs a layer that keeps every token at the policy's bits."""
        policy, pair = self.policy, self.policy.fixed_class
        assert pair is not None
        layer = self._rotated(layer, index)
        rows, table = whole.write(layer, self._first, pair, policy.sinks, policy.kept_window, index)
        aged = np.empty((len(table), 2), np.uint8)
        aged[:] = pair
        self._least = None
        self._keep(layer.shape[1], index, rows, table, aged, None)

    def _keep(self, heads: int, index: int, rows: PageRows, table: Array, aged: Array, ranks: Ranks | None) -> None:
        """The packed layer, and what is to be said of it."""
        layer = kind_of_layer(self._arena)(
            self._arena, self._coding, table, rows.states.copy(), heads=heads, layer=index, aged=aged,
            window=self.policy.kept_window, ranks=ranks, rotation=self._turns(index), decay=self.policy.decay,
        )  # fmt: skip
        self._packed.append(layer)
        if self._want_positions:
            self._positions.append(rows.positions())
        account = self._account
        self._page_bytes.append(bytes_held([rows], account.layout, account.entry_bytes, account.list_bytes))
        self._tokens.append(rows.tokens_by_class)

    def _report(self, budget: int) -> Report:
        histogram: dict[tuple[int, int], int] = {}
        per_layer = []
        for layer, tokens in zip(self._packed, self._tokens, strict=True):
            for key, count in tokens.items():
                histogram[key] = histogram.get(key, 0) + count
            whole = self._real_tokens() * layer.heads
            per_layer.append(float(layer.tokens.sum()) / whole if whole else 0.0)
        stored = sum(histogram.values())
        whole = self._real_tokens() * sum(layer.heads for layer in self._packed)
        held, policy = self._held(), self.policy
        return Report(
            prompt_tokens=self._real_tokens(),
            bf16_bytes=self._bf16_bytes(),
            budget_bytes=None if budget < 0 else budget,
            planned_bytes=held,
            least_bytes=self._least,
            kept_fraction=stored / whole if whole else 0.0,
            kept_per_layer=per_layer,
            bytes_per_layer=self._page_bytes,
            bits_per_element=sum((k + v) / 2 * n for (k, v), n in histogram.items()) / stored if stored else 0.0,
            tokens_per_class={f"{k}/{v}": n for (k, v), n in sorted(histogram.items())},
            high_precision_fraction=histogram.get((16, 16), 0) / stored if stored else 0.0,
            over_budget=self._over,
            configured={
                "sinks": policy.sinks,
                "window": policy.window,
                "guard": policy.guard,
                "keep": getattr(policy.select, "keep", None),
                "target_ratio": policy.target_ratio,
            },
            effective={
                "window": policy.kept_window,
                "ratio": self._bf16_bytes() / held if held else None,
            },
        )


def _common_class(spent: Spent, policy: Policy) -> tuple[int, int]:
    """The class most packed tokens have, for lists that have none; where no token is packed, 4 bits or what is nearest
    of what the policy allows."""
    counts: dict[tuple[int, int], int] = {}
    for rows in spent.plans:
        for key, count in rows.tokens_by_class.items():
            if key != (16, 16):
                counts[key] = counts.get(key, 0) + count
    if counts:
        return max(counts, key=lambda key: counts[key])
    return min(classes_of(policy), key=lambda pair: (abs(sum(pair) - 8), pair), default=(16, 16))


def _ranks(one: Ready, spent: Spent, place: int, capacity: int, *, hold: bool) -> Ranks:
    """What a layer's lists remember of their plan."""
    rows, fixed = spent.plans[place], spent.fixed[place]
    n, s = fixed.shape
    importance = one.importance.reshape(n, s).astype(np.float64)
    importance = (importance / np.maximum(importance.sum(1, keepdims=True), 1e-30)).astype(np.float32)
    kind, level = ladder(importance, *spent.bits[place], fixed)
    recent = np.zeros((n, 2), np.float32)
    if not hold:
        nothing, table = np.zeros((n, 0), np.float32), np.zeros((0, 5), np.float32)
        return Ranks(kind, level, recent, nothing, table, table, np.zeros(0, np.float32))
    assert one.tables is not None
    worth = page_worth(importance, rows.pages, rows.lists, rows.start, rows.tokens, fixed)
    tables = [(part * one.priority).astype(np.float32) for part in one.tables]
    return Ranks(kind, level, recent, spread(worth, rows.states, capacity), *tables)


def compress_prompt(
    layers: Sequence[LayerInput], policy: Policy, *, least_if_over: bool = False, positions: bool = False
) -> Packed:
    """Packs all of a prompt's layers under ``policy`` (Compressor)."""
    compressor = Compressor(policy, len(layers), least_if_over=least_if_over, positions=positions)
    for layer in layers:
        compressor.add(layer)
    return compressor.finish()
