"""The methods that ``kvcomp policies`` compares: what a joint plan chooses, what its parts can do alone, and how rows
can be coded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..eval.quality import Method
from ..policy import Policy
from ..rotation import Rotation
from ..selectors import H2O, AdaKV, Full, Hybrid, KeyNorm, PyramidKV, Random, Selector, SnapKV, Streaming

GROUPS = ("bf16", "evict", "quantize", "joint", "allocator", "coding")
SINGLE = ("evict", "quantize")  # one thing at a time: tokens, or bits
AUTOMATIC, RECIPE = "plan", "SnapKV, 4 bits"
RATIOS = (2.0, 4.0, 6.0, 8.0, 12.0)
_CODED_BITS = (2, 3, 4)
_16_BITS = ((16, 16),)


@dataclass(frozen=True)
class Entry(Method):
    """A method in its place: ``target_ratio`` is 1 where the number of bits is given instead of a budget."""

    group: str = "bf16"
    label: str = "bf16"

    @property
    def budgeted(self) -> bool:
        return self.policy is None or self.policy.fixed_class is None

    @property
    def key(self) -> str:
        """What the method is, in words that are the same on every machine: matrices are not."""
        policy = self.policy
        if policy is not None and isinstance(policy.rotation, Rotation):
            policy = replace(policy, rotation="none")
        return f"{self.name}: {policy!r}"


BASELINE = Entry("bf16", 1.0)


def listed(ratios: Sequence[float], seed: int, rotations: Mapping[str, Rotation]) -> tuple[Entry, ...]:
    """Every method but the baseline, at every ratio.

    ``seed``: of random choices; ``rotations``: matrices by name, beside "none" and "hadamard".
    """
    found = []
    for ratio in ratios:
        for group, policies in _BUDGETED.items():
            for label, policy in policies(ratio, seed).items():
                found.append(Entry(f"{group} {label} {ratio:g}x", ratio, policy, group, label))
    plain: dict[str, dict[str, Any]] = {f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 8)}
    for label, options in (plain | {"4 bits, search": {"bits": 4, "scale": "search"}}).items():
        found.append(Entry(f"quantize {label}", 1.0, Policy(seed=seed, **options), "quantize", label))
    for bits in _CODED_BITS:
        for label, changes in coded(rotations).items():
            name = f"{label}, {bits} bits"
            found.append(Entry(f"coding {name}", 1.0, Policy(bits=bits, seed=seed, **changes), "coding", name))
    return tuple(found)


def chosen(entries: Sequence[Entry], patterns: Sequence[str]) -> tuple[Entry, ...]:
    """Those whose name one of the patterns (``*``, ``?``) matches. ValueError for a pattern that none matches."""
    for pattern in patterns:
        if not any(fnmatchcase(entry.name, pattern) for entry in entries):
            raise ValueError(
                f"--methods: expected patterns of names such as {entries[0].name!r} or {entries[-1].name!r}, "
                f"got {pattern!r}, which matches none"
            )
    return tuple(entry for entry in entries if any(fnmatchcase(entry.name, pattern) for pattern in patterns))


def coded(rotations: Mapping[str, Rotation]) -> dict[str, dict[str, Any]]:
    """Ways of coding rows: one thing changed at a time, and two together."""
    return {
        "default": {},
        "rotation none": {"rotation": "none"},
        **{f"rotation {name}": {"rotation": matrices} for name, matrices in rotations.items()},
        "symmetric": {"zero_point": False},
        "group 16": {"group": 16},
        "group 32": {"group": 32},
        "group 64": {"group": 64},
        "scale minmax": {"scale": "minmax"},
        "scale search": {"scale": "search"},
        "E5M3 scales": {"scale_dtype": "e5m3"},
        "stochastic": {"stochastic": True},
        "symmetric, E5M3 scales": {"zero_point": False, "scale_dtype": "e5m3"},
        "group 32, E5M3 scales": {"group": 32, "scale_dtype": "e5m3"},
    }


def _evicting(ratio: float, seed: int) -> dict[str, Policy]:
    """Tokens alone: as many as the budget holds at 16 bits, in the selector's order, the newest 32 among them."""

    def policy(select: Selector, sinks: int = 0) -> Policy:
        return Policy(
            target_ratio=ratio, allocate="uniform", classes=_16_BITS, select=select, rotation="none", seed=seed,
            sinks=sinks, window=32,
        )  # fmt: skip

    return {
        "Streaming": policy(Streaming(), 4),
        "SnapKV": policy(SnapKV()),
        "PyramidKV": policy(PyramidKV(keep=1.0)),
        "Hybrid": policy(Hybrid(keep=1.0), 4),
        "AdaKV": policy(AdaKV()),
        "H2O": policy(H2O()),
        "KeyNorm": policy(KeyNorm()),
        "Random": policy(Random()),
        "SnapKV, centered values": policy(SnapKV(values="centered")),
        "Full": policy(Full()),
        "SnapKV, pool 15": policy(SnapKV(pool=15)),
        # The automatic plan's importance and its choice among heads, without its bits.
        "plan": Policy(target_ratio=ratio, classes=_16_BITS, rotation="none", seed=seed),
    }


def _quantizing(ratio: float, seed: int) -> dict[str, Policy]:
    """Bits alone: nothing is dropped."""
    return {
        "bits per run": Policy(target_ratio=ratio, drop=False, seed=seed),
        "bits per head": Policy(target_ratio=ratio, granularity="head", seed=seed),
        "bits per layer": Policy(target_ratio=ratio, granularity="layer", seed=seed),
    }


def _joint(ratio: float, seed: int) -> dict[str, Policy]:
    """Tokens and bits of every head under one budget."""

    def policy(select: Selector | None, **options: Any) -> Policy:
        return Policy(target_ratio=ratio, select=select, seed=seed, **options)

    # Those that share tokens out need to know how many there are: few enough for 5 bits each.
    keep = min(1.0, 3 / ratio)
    return {
        AUTOMATIC: policy(None),
        "SnapKV": policy(SnapKV()),
        "H2O": policy(H2O()),
        "KeyNorm": policy(KeyNorm()),
        "AdaKV": policy(AdaKV(keep=keep)),
        "PyramidKV": policy(PyramidKV(keep=keep)),
        "Hybrid": policy(Hybrid(keep=keep)),
        "Streaming": policy(Streaming()),
        "SnapKV, centered values": policy(SnapKV(pool=15, values="centered")),
        # The published trade-off, arXiv 2412.12706: more tokens at fewer bits.
        RECIPE: policy(SnapKV(), allocate="uniform", classes=((4, 4),)),
    }


def _allocators(ratio: float, seed: int) -> dict[str, Policy]:
    """The automatic plan with one of its parts taken out, and with its bytes held while tokens are appended."""
    return {
        "random importance": Policy(target_ratio=ratio, allocate="random", seed=seed),
        "newer is important": Policy(target_ratio=ratio, allocate="position", seed=seed),
        "layer by layer": Policy(target_ratio=ratio, prefill="layerwise", seed=seed),
        "held": Policy(target_ratio=ratio, decode="hold", seed=seed),
    }


_BUDGETED: dict[str, Callable[[float, int], dict[str, Policy]]] = {
    "evict": _evicting,
    "quantize": _quantizing,
    "joint": _joint,
    "allocator": _allocators,
}
