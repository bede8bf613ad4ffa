"""``kvcomp capture``: the KV cache of a prompt, and statistics of its attention, in files that ``kvcomp run`` reads.

``cache.safetensors``      keys, values [L,B,H,T,D] (B = 1) in the model's dtype
``attention.safetensors``  attention, window [L,H,T]; query_moment, value_moment [L,H,D,D]: see capture_cache.Captured
``capture.json``           what was captured, and digests of the files (schema kvcomp.capture/1)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .. import results
from ..hf.support import count_layers, decoder_config
from .capture_cache import CaptureCache, Captured
from .workload import no_bars

SCHEMA = "kvcomp.capture/1"
CACHE, ATTENTION, MANIFEST = "cache.safetensors", "attention.safetensors", "capture.json"
FILES = (CACHE, ATTENTION, MANIFEST)
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Prompt:
    """A prompt and the model that is to read it."""

    model: Any
    model_name: str
    tokens: torch.Tensor  # (T,) int64
    text: bytes


def read_text(source: Path) -> bytes:
    """The bytes of a prompt, from a file or ("-") from standard input: UTF-8 and not empty, else ValueError."""
    if source == Path("-"):
        content, name = sys.stdin.buffer.read(), "standard input"
    elif source.is_file():
        content, name = source.read_bytes(), str(source)
    else:
        raise ValueError(f"capture: --prompt-file: expected a file of UTF-8 text, got {source}, which is none")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise ValueError(
            f"capture: --prompt-file: expected UTF-8 text, got another byte at {reason.start} of {name}"
        ) from None
    if not content:
        raise ValueError(f"capture: --prompt-file: expected text, got none in {name}")
    return content


def check_out(out: Path, *, force: bool) -> None:
    """ValueError where a capture cannot be written to the folder ``out``, or, unless forced, would replace one."""
    results.check_writable(out / MANIFEST, "capture: --out")
    there = [name for name in FILES if (out / name).exists()]
    if there and not force:
        raise ValueError(f"capture: --out: expected a folder without {there[0]} (--force replaces it), got {out}")


def load(
    path: Path, text: bytes, *, max_tokens: int | None = None, dtype: str = "auto", model_name: str | None = None
) -> Prompt:
    """A model folder and its tokenizer's reading of ``text``, of which the first ``max_tokens`` tokens are taken.

    ValueError or NotImplementedError with one sentence; the weights are read last.
    """
    wanted = "capture: --model: expected a folder with a transformers model"
    if not (path / "config.json").is_file():
        raise ValueError(f"{wanted}, got {path}")
    with _loading(f"{wanted} that can be read, got {path}"):
        config = AutoConfig.from_pretrained(path)
    decoder = _supported(config)
    with _loading(f"{wanted} and its tokenizer, got {path}"):
        # verbose: the tokenizer's own remark on long prompts, which are refused below.
        read = AutoTokenizer.from_pretrained(path)(text.decode("utf-8"), verbose=False)["input_ids"]
    tokens = torch.tensor(read[:max_tokens], dtype=torch.int64)
    if not len(tokens):
        raise ValueError("capture: --prompt-file: expected a prompt of one token or more, got none")
    most = getattr(decoder, "max_position_embeddings", None)
    if most is not None and len(tokens) > most:
        raise ValueError(
            f"capture: --prompt-file: expected at most {most} tokens, the model's positions, got {len(tokens)} "
            f"(--max-tokens {most} takes the first of them)"
        )
    if int(tokens.max()) >= decoder.vocab_size:
        raise ValueError(
            f"capture: --model: expected a tokenizer of at most {decoder.vocab_size} tokens, the model's vocabulary, "
            f"got token {int(tokens.max())}"
        )
    with _loading(f"{wanted} that can be read, got {path}"):
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"{wanted} with all weights, got {path} without {min(found['missing_keys'])}")
    name = model_name or Path(str(config._name_or_path)).absolute().name
    return Prompt(model.eval(), name, tokens, text)


@contextlib.contextmanager
def _loading(expected: str) -> Any:
    """transformers, tokenizers and safetensors raise many kinds for a damaged folder: all become one sentence."""
    try:
        with no_bars():
            yield
    except Exception as reason:
        raise ValueError(f"{expected} ({' '.join(str(reason).split())[:200]})") from None


def _supported(config: Any) -> Any:
    """The decoder's configuration; NotImplementedError for what kvcomp cannot hold."""
    try:
        decoder = decoder_config(config)
        count_layers(decoder)
    except NotImplementedError as reason:
        raise NotImplementedError(_of_model(reason)) from None
    return decoder


def _of_model(reason: Exception) -> str:
    """A sentence of kvcomp.hf, where the cache's configuration is the model's."""
    return re.sub("^Cache:( config:)?", "capture: --model:", str(reason))


@torch.inference_mode()
def capture(
    model: Any,
    tokens: torch.Tensor,
    *,
    chunk: int | None = None,
    window: int = 32,
    advance: Callable[[str], None] = lambda _: None,
) -> Captured:
    """Reads tokens (T,) in passes of ``chunk`` (None: one pass); the model's attention is afterwards what it was.

    ``advance`` is told of every layer that a pass has gone through. NotImplementedError for models that kvcomp cannot
    hold, MemoryError where a pass needs too much.
    """
    config = decoder_config(model.config)
    before = config._attn_implementation
    cache = None
    try:
        cache = CaptureCache(model.config, len(tokens), window, advance)
        for ids in torch.split(tokens, chunk or len(tokens)):
            model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    except (RuntimeError, NotImplementedError) as reason:
        if str(reason).startswith("Cache: "):  # kvcomp.hf, of a model whose attention it cannot follow
            raise NotImplementedError(_of_model(reason)) from None
        if "can't allocate memory" in str(reason):
            raise MemoryError("capture: --chunk: expected passes that fit in memory, got one that does not") from None
        raise
    finally:
        if cache is not None:
            cache.release()
        config._attn_implementation = before
    cache.check_complete()
    return cache.captured


def run(
    prompt: Prompt,
    out: Path,
    *,
    command: str,
    chunk: int | None = None,
    window: int = 32,
    with_cache: bool = True,
    force: bool = False,
    track: Callable[[int, int], AbstractContextManager[Callable[[str], None]]],
) -> dict[str, Any]:
    """Captures a prompt into the folder ``out`` -> what ``capture.json`` says. Until all is done, nothing is there."""
    check_out(out, force=force)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    passes = -(-len(prompt.tokens) // (chunk or len(prompt.tokens)))
    layers = count_layers(decoder_config(prompt.model.config))
    with track(passes * layers, 0) as advance:
        captured = capture(prompt.model, prompt.tokens, chunk=chunk, window=window, advance=advance)
    statistics = ("attention", "window", "query_moment", "value_moment")
    parts = {ATTENTION: {name: getattr(captured, name) for name in statistics}}
    if with_cache:
        parts = {CACHE: {"keys": captured.keys, "values": captured.values}} | parts
    manifest = {
        "schema": SCHEMA,
        "command": command,
        "started": started,
        "machine": results.machine(),
        "versions": results.versions(),
        "model": {
            "name": prompt.model_name,
            "type": prompt.model.config.model_type,
            "layers": captured.layers,
            "query_heads": captured.query_heads,
            "kv_heads": captured.keys.shape[2],
            "head_dim": captured.keys.shape[4],
            "dtype": _name(captured.keys.dtype),
        },
        "prompt": {
            "bytes": len(prompt.text),
            "sha256": hashlib.sha256(prompt.text).hexdigest(),
            "tokens": captured.tokens,
        },
        "chunk": chunk,
        "window": captured.width,
    }
    _write(out, manifest, parts)
    return manifest


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(out: Path, manifest: dict[str, Any], parts: dict[str, dict[str, torch.Tensor]]) -> None:
    """Writes the files of a capture beside their place, then moves them there, in the place of any that were.

    Adds their digests to ``manifest``. Failing, or interrupted while writing, it leaves ``out`` as it was.
    """
    beside = out if out.is_dir() else out.parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".capture.") as folder:
        staged = Path(folder) / "files"
        staged.mkdir()
        manifest["files"] = {}
        for file, tensors in parts.items():
            try:
                # One entry of metadata: several are written in no fixed order, and the digest would change.
                save = functools.partial(save_file, tensors, metadata={"model_name": manifest["model"]["name"]})
                results.replace(staged / file, save)  # with the permissions of other files
            except SafetensorError as reason:
                raise OSError(f"capture: --out: expected room for {file}, got: {reason}") from None
            with (staged / file).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            manifest["files"][file] = {
                "bytes": (staged / file).stat().st_size,
                "sha256": digest,
                "tensors": {name: {"dtype": _name(t.dtype), "shape": list(t.shape)} for name, t in tensors.items()},
            }
        results.write(staged / MANIFEST, manifest)
        if beside is not out:
            staged.rename(out)
            return
        # The manifest goes first and comes last: where one lies, it is that of the files beside it.
        for file in reversed(FILES):
            (out / file).unlink(missing_ok=True)
        for file in (*parts, MANIFEST):
            (staged / file).rename(out / file)
