"""kvcomp capture: what is captured is what the model attends to, whole or in chunks, and kvcomp run reads it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from experiment_support import save_model as save_small  # noqa: E402
from experiment_support import write_config  # noqa: E402
from kvcomp import results  # noqa: E402
from kvcomp.cli import main  # noqa: E402
from kvcomp.experiment import capture, capture_cache  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog; " * 20
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
NAMES = ("attention", "window", "query_moment", "value_moment")


def tiny(dtype: Any = None, seed: int = 0, **changes: Any) -> Any:
    """A random Llama with two query heads per KV head, whose attention is not nearly uniform."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "head_dim": HEAD_DIM,
             "num_attention_heads": QUERY_HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": 300,
             "max_position_embeddings": 2048, "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**sizes, **changes})
    return transformers.LlamaForCausalLM(config).to(dtype or torch.float32).eval()


def tokens_of(count: int, seed: int = 0) -> Any:
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed))


def expected(model: Any, tokens: Any, width: int) -> dict[str, Any]:
    """The same statistics from whole attention matrices, in float64 with the eager attention."""
    exact = type(model)(model.config).double()
    exact.load_state_dict(model.double().state_dict())
    exact.set_attn_implementation("eager")
    asked: list[Any] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: asked.append(out))
        for layer in exact.model.layers
    ]
    with torch.no_grad():
        out = exact.eval()(tokens[None], output_attentions=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    s = len(tokens)
    group = QUERY_HEADS // KV_HEADS
    cos, sin = exact.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(s)[None])
    half = HEAD_DIM // 2
    found: dict[str, list[Any]] = {name: [] for name in (*NAMES, "keys", "values")}
    for layer, matrix, projected in zip(out.past_key_values.layers, out.attentions, asked, strict=True):
        # Rows see column t from row t on.
        columns = matrix[0].sum(1) / torch.arange(s, 0, -1)
        found["attention"].append(columns.view(KV_HEADS, group, s).mean(1))
        found["window"].append(matrix[0, :, -width:].mean(1).view(KV_HEADS, group, s).mean(1))
        rows = projected.view(s, QUERY_HEADS, HEAD_DIM).transpose(0, 1)
        turned = rows * cos + torch.cat([-rows[..., half:], rows[..., :half]], -1) * sin
        turned = turned.reshape(KV_HEADS, group * s, HEAD_DIM)
        found["query_moment"].append(turned.mT @ turned / (group * s))
        found["value_moment"].append(layer.values[0].mT @ layer.values[0] / s)
        found["keys"].append(layer.keys)
        found["values"].append(layer.values)
    return {name: torch.stack(parts) for name, parts in found.items()}


def near(found: Any, wanted: Any, relative: float = 2e-4) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).abs().max()) <= relative * float(wanted.abs().max())


# ---- what is captured


@pytest.mark.parametrize("chunk", [None, 1, 100, 350, 700, 5000])
def test_against_whole_attention_matrices(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_cache, "BLOCK", 96)
    count = 40 if chunk == 1 else 700
    model, tokens = tiny(), tokens_of(count)
    found = capture.capture(model, tokens, chunk=chunk, window=24)
    wanted = expected(model, tokens, 24)
    assert found.keys.shape == (LAYERS, 1, KV_HEADS, count, HEAD_DIM) and found.query_heads == QUERY_HEADS
    for name, exact in wanted.items():
        near(getattr(found, name), exact)
    # Column means, not sums: the first token's share is no larger for being seen by all.
    assert float(found.attention[0, 0, -1]) > 1e-6


def test_chunks_give_what_the_whole_gives() -> None:
    model, tokens = tiny(), tokens_of(600)
    whole = capture.capture(model, tokens)
    for chunk in (7, 599):
        parts = capture.capture(model, tokens, chunk=chunk)
        for name in (*NAMES, "keys", "values"):
            near(getattr(parts, name), getattr(whole, name), 1e-4)


def test_a_window_wider_than_the_prompt_is_the_prompt() -> None:
    model, tokens = tiny(), tokens_of(20)
    found = capture.capture(model, tokens, window=64, chunk=8)
    assert found.width == 20
    near(found.window, expected(model, tokens, 20)["window"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_their_dtype(dtype: Any) -> None:
    tokens = tokens_of(300)
    model = tiny(dtype)
    found = capture.capture(model, tokens)
    assert found.keys.dtype == found.values.dtype == dtype
    assert found.attention.dtype == found.query_moment.dtype == torch.float32
    # The first layer has the same queries and keys for both; eager attention rounds its logits to 16 bits.
    model.set_attn_implementation("eager")
    with torch.no_grad():
        matrix = model(tokens[None], output_attentions=True).attentions[0][0].double()
    columns = (matrix.sum(1) / torch.arange(300, 0, -1)).view(KV_HEADS, -1, 300).mean(1)
    near(found.attention[0], columns, 0.02)
    # Every row's attention adds up to 1, so that column sums add up to the number of rows.
    sums = (found.attention * torch.arange(300, 0, -1)).sum(-1)
    assert torch.allclose(sums, torch.full_like(sums, 300.0), rtol=1e-3)


def test_the_model_is_afterwards_as_it_was() -> None:
    model, tokens = tiny(), tokens_of(64)
    before, implementation = model(tokens[None]).logits, model.config._attn_implementation
    capture.capture(model, tokens)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(tokens[None]).logits, before)


@pytest.mark.parametrize("chunk", [None, 128])
def test_no_attention_matrix_is_built(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a tensor nor scratch memory grows with the square of the prompt."""
    count = 2000
    largest: list[int] = [0]

    class Watch(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            held = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
            largest[0] = max([largest[0], *(t.untyped_storage().nbytes() for t in held)])
            return out

    plain = capture_cache.workspace

    def scratch(nbytes: int) -> Any:
        largest[0] = max(largest[0], nbytes)
        return plain(nbytes)

    monkeypatch.setattr(capture_cache, "workspace", scratch)
    with Watch():
        capture.capture(tiny(), tokens_of(count), chunk=chunk)
    assert 0 < largest[0] < count * count  # one byte for every element of one head's matrix


def test_eager_models_with_softcap_are_followed() -> None:
    """A model whose logits are capped, by its own file's attention function."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 300,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
             "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0, "initializer_range": 0.5,
             "layer_types": ["full_attention"] * 2}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).eval()
    model.set_attn_implementation("eager")
    tokens = tokens_of(90)
    with torch.no_grad():
        matrices = model(tokens[None], output_attentions=True).attentions
    found = capture.capture(model, tokens, chunk=40)
    for index, matrix in enumerate(matrices):
        near(found.attention[index, 0], (matrix[0].sum(1) / torch.arange(90, 0, -1)).mean(0))


# ---- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, two query heads, one KV head of 64 channels, 1024 positions, fp32."""
    return save_small(tmp_path_factory.mktemp("models") / "tiny-random")


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT)
    return path


def arguments(model: Path, prompt: Path, out: Path, *more: object) -> list[str]:
    return ["capture", "--model", str(model), "--prompt-file", str(prompt), "--out", str(out), *map(str, more)]


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]) -> str:
    """The one sentence of a command that exits with 2 and changes no file."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(said) == 1 and said[0].startswith("kvcomp: "), said
    return said[0]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["capture", "--help"])
    assert stopped.value.code == 0 and "--prompt-file" in capsys.readouterr().out


def test_files_and_manifest(model: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "captured"
    command = arguments(model, prompt, out, "--chunk", 300)
    assert main(command) == 0
    assert "cache.safetensors" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(capture.FILES)
    assert sorted(path.name for path in out.parent.iterdir()) == ["captured"]
    said = json.loads((out / "capture.json").read_text())
    count = said["prompt"]["tokens"]
    assert said["schema"] == "kvcomp.capture/1" and said["command"] == " ".join(["kvcomp", *command])
    assert said["model"] == {"name": "tiny-random", "type": "llama", "layers": 2, "query_heads": 2, "kv_heads": 1,
                             "head_dim": 64, "dtype": "float32"}  # fmt: skip
    assert said["prompt"]["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert said["prompt"]["bytes"] == len(TEXT) and len(TEXT) <= count <= len(TEXT) + 1
    assert (said["chunk"], said["window"]) == (300, 32)
    assert said["versions"]["transformers"] and said["machine"]["cpu"]
    for name, file in said["files"].items():
        path = out / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
        assert path.stat().st_size == file["bytes"] and path.stat().st_mode == prompt.stat().st_mode
        with safetensors.safe_open(path, framework="pt") as held:
            assert held.metadata() == {"model_name": "tiny-random"}
            shapes = {key: held.get_slice(key).get_shape() for key in held.keys()}  # noqa: SIM118
        assert shapes == {key: tensor["shape"] for key, tensor in file["tensors"].items()}
    assert said["files"]["cache.safetensors"]["tensors"]["keys"]["shape"] == [2, 1, 1, count, 64]
    assert said["files"]["attention.safetensors"]["tensors"]["attention"]["shape"] == [2, 1, count]


def test_kvcomp_run_reads_it(model: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report, config = tmp_path / "captured", tmp_path / "report.json", write_config(tmp_path / "config.yaml")
    assert main(arguments(model, prompt, out, "--model-name", "small", "--dtype", "bfloat16")) == 0
    files = ["--cache-path", str(out / "cache.safetensors"), "--attention-stats", str(out / "attention.safetensors")]
    assert main(["run", str(config), *files, "--report-path", str(report)]) == 0
    (cell,) = results.read(report, kind="quality")["cells"]
    assert cell["ratio"] >= 4 and cell["case"]["s"] >= len(TEXT)
    # The tokens that are kept have more of the attention than their share.
    assert cell["attention_coverage"] > cell["selected_fraction"]
    # A name that is not the experiment's is refused.
    assert main(arguments(model, prompt, out, "--force")) == 0
    assert "expected a cache of small, the experiment's model_name, got one of tiny-random" in refused(
        capsys, tmp_path, ["run", str(config), *files]
    )


def test_standard_input_first_tokens_and_no_cache(
    model: Path, prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, piped = tmp_path / "plain", tmp_path / "piped"
    assert main(arguments(model, prompt, plain, "--max-tokens", 200)) == 0
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    assert main(arguments(model, Path("-"), piped, "--max-tokens", 200, "--no-cache")) == 0
    assert sorted(path.name for path in piped.iterdir()) == ["attention.safetensors", "capture.json"]
    one, other = (json.loads((folder / "capture.json").read_text()) for folder in (plain, piped))
    assert (
        one["prompt"]["tokens"] == 200
        and one["files"]["attention.safetensors"] == other["files"]["attention.safetensors"]
    )


def test_an_earlier_capture_is_replaced_only_by_force(
    model: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "captured"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(arguments(model, prompt, out)) == 0
    capsys.readouterr()
    assert "--out: expected a folder without cache.safetensors (--force replaces it)" in refused(
        capsys, tmp_path, arguments(model, prompt, out)
    )
    before = (out / "attention.safetensors").read_bytes()
    assert main(arguments(model, prompt, out, "--force", "--no-cache", "--max-tokens", 100)) == 0
    # Nothing of the earlier one is left beside the new, and nothing else is touched.
    assert sorted(path.name for path in out.iterdir()) == ["attention.safetensors", "capture.json", "notes.txt"]
    assert (out / "attention.safetensors").read_bytes() != before


# ---- bad input


def test_bad_input(model: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "captured"

    def said(model: Path, prompt: Path, *more: object, out: Path = out) -> str:
        return refused(capsys, tmp_path, arguments(model, prompt, out, *more))

    nothing = "--model: expected a folder with a transformers model"
    assert nothing in said(tmp_path / "nowhere", prompt)
    assert nothing in said(prompt, prompt)
    assert "--prompt-file: expected a file of UTF-8 text" in said(model, tmp_path / "nowhere.txt")
    assert "--prompt-file: expected a file of UTF-8 text" in said(model, tmp_path)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"caf\xe9 au lait")
    assert "--prompt-file: expected UTF-8 text, got another byte at 3" in said(model, bad)
    bad.write_bytes(b"")
    assert "--prompt-file: expected text, got none" in said(model, bad)
    bad.write_text(TEXT * 2)
    assert "--prompt-file: expected at most 1024 tokens, the model's positions, got" in said(model, bad)
    assert "--max-tokens 1024 takes the first" in said(model, bad)
    for flag in ("--chunk", "--window", "--max-tokens"):
        assert f"{flag}: expected 1 or more, got 0" in said(model, prompt, flag, 0)
    assert "--model-name: expected a name" in said(model, prompt, "--model-name", "")
    assert "--out: expected the name of a file that can be written" in said(model, prompt, out=prompt)
    assert "--out: expected the name of a file that can be written" in said(model, prompt, out=prompt / "deep")


def copy(model: Path, folder: Path, **changes: Any) -> Path:
    """A model folder with another configuration; None takes a key out."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_models_that_are_refused(model: Path, prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "captured"

    def said(folder: Path) -> str:
        return refused(capsys, tmp_path, arguments(folder, prompt, out))

    sliding = copy(model, tmp_path / "sliding", model_type="mistral", architectures=["MistralForCausalLM"],
                   sliding_window=64)  # fmt: skip
    assert "capture: --model: expected full_attention in every layer, got sliding_attention" in said(sliding)
    narrow = copy(model, tmp_path / "narrow", head_dim=32)
    assert "capture: --model: expected head_dim in (64, 80, 96, 128, 256), got 32" in said(narrow)
    assert "capture: --model: expected a folder with a transformers model" in said(
        copy(model, tmp_path / "unknown", model_type="nonesuch")
    )
    deeper = copy(model, tmp_path / "deeper", num_hidden_layers=3)
    assert "with all weights, got" in said(deeper)
    small = copy(model, tmp_path / "vocabulary", vocab_size=40)
    assert "expected a tokenizer of at most 40 tokens, the model's vocabulary" in said(small)
    bare = copy(model, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "and its tokenizer" in said(bare)
    damaged = copy(model, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "expected a folder with a transformers model that can be read" in said(damaged)


def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    model, tokens = tiny(), tokens_of(16)

    def own(index: int, hidden_states: Any, *, past_key_values: Any, **more: Any) -> tuple[Any, None]:
        past_key_values.update(*torch.zeros(2, 1, KV_HEADS, 16, HEAD_DIM), index)
        return hidden_states, None

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.forward = functools.partial(own, index)
    with pytest.raises(NotImplementedError, match=r"^capture: --model: layer 0: its attention did not run"):
        capture.capture(model, tokens)
    # The same of the last layer, and it stays possible to capture with another model.
    model = tiny(num_hidden_layers=1)
    model.model.layers[0].self_attn.forward = functools.partial(own, 0)
    with pytest.raises(NotImplementedError, match=r"^capture: --model: expected attention by transformers'"):
        capture.capture(model, tokens)
    capture.capture(tiny(), tokens)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="score: queries: expected finite values"):
        capture.capture(model, tokens_of(16))


def test_failing_to_write_leaves_nothing(
    model: Path, prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "captured"
    plain = capture.save_file

    def full(tensors: Any, path: Path, **more: Any) -> None:
        if "attention" in tensors:
            raise capture.SafetensorError("I/O error: No space left on device")
        plain(tensors, path, **more)

    monkeypatch.setattr(capture, "save_file", full)
    assert "expected room for attention.safetensors" in refused(capsys, tmp_path, arguments(model, prompt, out))


# ---- interrupting


def test_interrupted_leaves_nothing(model: Path, tmp_path: Path) -> None:
    prompt, out = tmp_path / "prompt.txt", tmp_path / "captured"
    prompt.write_text(TEXT)
    # Layers of the second pass wait for the signal, so that it always comes in the middle.
    script = (
        "import sys, time; from kvcomp.cli import main; from kvcomp.experiment import capture_cache as c; "
        "plain = c.CaptureLayer.first\n"
        "def first(self, *a):\n"
        "    plain(self, *a)\n"
        "    if self.scored > 50: print('here', flush=True); time.sleep(60)\n"
        "c.CaptureLayer.first = first\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", script, *arguments(model, prompt, out, "--chunk", 50)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert running.stdout is not None and running.stdout.readline() == "here\n"
        time.sleep(0.1)
        os.kill(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130 and said == "kvcomp: interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompt.txt"]
