"""KV caches that do not come from a model here: stored in files, or random ones made layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUFFIXES = (".pt", ".safetensors")


@dataclass(frozen=True)
class StoredCache:
    """K and V of all layers, read or made one layer at a time.

    Attributes:
        layers, batch, heads, tokens, head_dim: sizes; heads are KV heads.
        layer: index -> keys, values (b,h,s,d), finite. ValueError, naming the layer, for NaN or Inf.
        attention: index -> attention that each token got, (b,h,s) float32 >= 0; None where nothing is known about it.
        model_name: the model it was captured from, where the file says so.
    """

    layers: int
    batch: int
    heads: int
    tokens: int
    head_dim: int
    layer: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    attention: Callable[[int], torch.Tensor] | None = None
    model_name: str | None = None

    @property
    def bf16_bytes(self) -> int:
        return 2 * 2 * self.layers * self.batch * self.heads * self.tokens * self.head_dim

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return map(self.layer, range(self.layers))


def simulated(*, layers: int, tokens: int, heads: int, head_dim: int, seed: int) -> StoredCache:
    """K, V ~ N(0, 1) in fp16 and attention ~ U(0, 1); the same numbers whenever a layer is asked for."""

    def generator(index: int, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1_000_003 + 2 * index + part)

    def layer(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randn(2, 1, heads, tokens, head_dim, generator=generator(index, 0)).half()
        return rows[0], rows[1]

    def attention(index: int) -> torch.Tensor:
        return torch.rand(1, heads, tokens, generator=generator(index, 1))

    return StoredCache(layers, 1, heads, tokens, head_dim, layer, attention)


def load(cache_path: Path, attention_path: Path | None) -> StoredCache:
    """A cache from a file with tensors ``keys`` and ``values``, [L,T,H,D] or [L,B,H,T,D], and optionally ``attention``
    (there or in a file of its own), [L,T] or [L,H,T].

    Raises ValueError or TypeError, naming the file and the tensor, for anything else; OSError where there is no file.
    """
    tensors, model_name = _open(cache_path, "--cache-path")
    for name in ("keys", "values"):
        if name not in tensors:
            held = ", ".join(sorted(tensors)) or "none"
            raise ValueError(f"run: --cache-path: {cache_path}: expected tensors keys and values, got {held}")
        _check_dtype(tensors[name], f"--cache-path: {name}", _DTYPES)
    keys, values = tensors["keys"], tensors["values"]
    shape = tuple(keys.shape)
    if len(shape) not in (4, 5) or 0 in shape:
        raise ValueError(
            f"run: --cache-path: keys: expected shape [L,T,H,D] or [L,B,H,T,D] without zeros, got {list(shape)}"
        )
    if tuple(values.shape) != shape:
        raise ValueError(
            f"run: --cache-path: values: expected the shape of keys, {list(shape)}, got {list(values.shape)}"
        )
    if len(shape) == 4:
        layers, tokens, heads, head_dim = shape
        batch = 1
    else:
        layers, batch, heads, tokens, head_dim = shape

    def layer(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for name, tensor in (("keys", keys), ("values", values)):
            rows = tensor[index]
            rows = rows.permute(1, 0, 2)[None] if len(shape) == 4 else rows
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(f"run: --cache-path: {name}: expected finite numbers, got NaN or Inf in layer {index}")
            found.append(rows.contiguous())
        return found[0], found[1]

    source, where = tensors.get("attention"), f"--cache-path: {cache_path}"
    if attention_path is not None:
        stats, stats_model = _open(attention_path, "--attention-stats")
        where = f"--attention-stats: {attention_path}"
        if "attention" not in stats:
            held = ", ".join(sorted(stats)) or "none"
            raise ValueError(f"run: {where}: expected a tensor named attention, got {held}")
        if model_name and stats_model and stats_model != model_name:
            raise ValueError(
                f"run: {where}: expected attention of {model_name}, as the cache, got one of {stats_model}"
            )
        source = stats["attention"]
    attention = None
    if source is not None:
        attention = _attention(source, where, (layers, batch, heads, tokens))
    return StoredCache(layers, batch, heads, tokens, head_dim, layer, attention, model_name)


def _attention(source: Any, where: str, sizes: tuple[int, int, int, int]) -> Callable[[int], torch.Tensor]:
    layers, batch, heads, tokens = sizes
    shape = tuple(source.shape)
    if shape not in ((layers, tokens), (layers, heads, tokens)):
        raise ValueError(
            f"run: {where}: attention: expected shape [L,T] = {[layers, tokens]} or [L,H,T] = "
            f"{[layers, heads, tokens]}, as the cache has them, got {list(shape)}"
        )
    _check_dtype(source, f"{where}: attention", (*_DTYPES, torch.float64))

    def attention(index: int) -> torch.Tensor:
        rows = source[index].float()
        if not bool((torch.isfinite(rows) & (rows >= 0)).all()):
            raise ValueError(f"run: {where}: attention: expected numbers >= 0, got others in layer {index}")
        return torch.as_tensor(rows.expand(batch, heads, tokens).contiguous())

    return attention


def _check_dtype(tensor: Any, argument: str, expected: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in expected:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise TypeError(f"run: {argument}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}")


class _Slice:
    """A tensor of a safetensors file, read layer by layer."""

    def __init__(self, file: Any, name: str) -> None:
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = self._slice[:0].dtype

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.as_tensor(self._slice[index : index + 1][0])


def _open(path: Path, flag: str) -> tuple[dict[str, Any], str | None]:
    """Tensors by name, and ``model_name`` where the file states it."""
    if not path.is_file():
        raise FileNotFoundError(f"run: {flag}: expected a file, got {path}, which is not there")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"run: {flag}: expected a file named {' or '.join('*' + s for s in SUFFIXES)}, got {path}")
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pt(path)
    except Exception as reason:
        # torch and safetensors raise many kinds for a damaged file: pickle's, zip's, their own.
        said = " ".join(str(reason).split())[:200]
        raise ValueError(
            f"run: {flag}: {path}: expected tensors by name, got a foreign or truncated file ({said})"
        ) from None


def _open_safetensors(path: Path) -> tuple[dict[str, Any], str | None]:
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")
    return {name: _Slice(file, name) for name in file.keys()}, (file.metadata() or {}).get("model_name")  # noqa: SIM118


def _open_pt(path: Path) -> tuple[dict[str, Any], str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on foreign pickles; an error follows where it matters
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # torch's format before 1.6, which cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.Tensor):
        loaded = {"attention": loaded}
    if not isinstance(loaded, dict):
        raise ValueError(f"a {type(loaded).__name__}")
    name = loaded.get("model_name")
    return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}, name if isinstance(name, str) else None
