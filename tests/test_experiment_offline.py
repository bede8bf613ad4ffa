"""Compressing stored caches: both file forms, what is reported, what is refused, simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from experiment_support import write_config  # noqa: E402
from kvcomp import results  # noqa: E402
from kvcomp.cli import main  # noqa: E402
from kvcomp.experiment import offline, stored  # noqa: E402

L, B, H, T, D = 3, 1, 2, 320, 64
WHOLE = 2 * 2 * L * B * H * T * D


def tensors(seed: int = 0, dtype: Any = None) -> dict[str, Any]:
    """A cache [L,T,H,D] and attention [L,H,T] that a few tokens have most of."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, L, T, H, D, generator=generator).to(dtype or torch.bfloat16)
    attention = torch.rand(L, H, T, generator=generator) ** 8
    return {"keys": keys.contiguous(), "values": values.contiguous(), "attention": attention}


def save(path: Path, held: dict[str, Any], model_name: str | None = None) -> Path:
    if path.suffix == ".pt":
        torch.save({**held, **({"model_name": model_name} if model_name else {})}, path)
    else:
        contiguous = {name: tensor.contiguous() for name, tensor in held.items()}
        safetensors.save_file(contiguous, path, {"model_name": model_name} if model_name else None)
    return path


def run(tmp_path: Path, *arguments: object, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report of a run that succeeds."""
    path = write_config(tmp_path / "config.yaml", **(config or {}))
    report = tmp_path / "report.json"
    assert main(["run", str(path), "--report-path", str(report), *map(str, arguments)]) == 0
    return results.read(report, kind="quality")


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object, **config: Any) -> str:
    """The sentence of a run that fails with exit code 2 and writes nothing."""
    path = write_config(tmp_path / "config.yaml", **config)
    before = sorted(tmp_path.iterdir())
    code = main(["run", str(path), "--report-path", str(tmp_path / "report.json"), *map(str, arguments)])
    said = capsys.readouterr().err.splitlines()
    assert code == 2 and len(said) == 1, said
    assert sorted(tmp_path.iterdir()) == before
    return said[0]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_both_shapes_in_both_forms_give_the_same(tmp_path: Path, suffix: str) -> None:
    held = tensors()
    flat = save(tmp_path / f"flat{suffix}", held)
    batched = {name: held[name].permute(0, 2, 1, 3)[:, None] for name in ("keys", "values")}
    stats = save(tmp_path / f"stats{suffix}", {"attention": held["attention"]})
    one = run(tmp_path, "--cache-path", flat)
    other = run(tmp_path, "--cache-path", save(tmp_path / f"batched{suffix}", batched), "--attention-stats", stats)
    assert one["cells"] == other["cells"]


def test_what_is_reported(tmp_path: Path) -> None:
    found = run(tmp_path, "--cache-path", save(tmp_path / "cache.pt", tensors()))
    (cell,) = found["cells"]
    assert found["origin"] == "measured" and cell["impl"] == "kvcomp"
    assert cell["bf16_bytes"] == WHOLE and cell["nbytes"] <= WHOLE / 4 and found["compression_ratio"] >= 4
    assert sum(cell["ledger"].values()) == cell["nbytes"]
    assert np.isclose(found["memory_reduction"], 1 - cell["nbytes"] / WHOLE)
    assert np.isclose(found["original_mb"], WHOLE / 2**20)
    assert np.isclose(found["compressed_mb"], cell["nbytes"] / 2**20)
    assert np.isclose(cell["bits_per_element"], 8 * cell["nbytes"] / (2 * L * H * T * D * cell["kept_fraction"]))
    for name in ("throughput_gain", "ttft_delta_ms", "tpot_delta_ms"):
        assert found[name] is None
    assert found["limits"]["max_accuracy_drop"] == {"limit": 0.02, "measured": None, "met": None}
    # Importance says which tokens to keep: they have more of the attention than their share.
    assert 1 > cell["attention_coverage"] > cell["selected_fraction"] > 0.1
    assert 0 < cell["attention_output_error"] < 1
    assert cell["key_mse"] > 0.02 and 0.9 < cell["key_cosine_selected"] < 1
    keys = found["keys"]
    assert keys["budget.target_compression_ratio"] == {"configured": 4.0, "effective": found["compression_ratio"]}
    assert keys["selector.window_size"] == {"configured": 32, "effective": 10}
    assert len(keys["selector.layer_budgets"]["effective"]) == L


def test_errors_are_those_of_the_stored_rows(tmp_path: Path) -> None:
    """16-bit storage of everything but what the budget drops: kept tokens are exact, the others are zeros."""
    held = tensors()
    config = {"quantization": {"enabled": False}, "budget": {"target_compression_ratio": 2.0}}
    found = run(tmp_path, "--cache-path", save(tmp_path / "cache.pt", held), config=config)
    (cell,) = found["cells"]
    kept = cell["selected_fraction"]
    assert 0.4 < kept <= 0.5
    assert np.isclose(cell["value_mse"], (1 - kept) * float(held["values"].float().square().mean()), rtol=0.05)
    assert cell["value_cosine_selected"] > 0.9999


def test_attention_of_a_layer_counts_for_all_its_heads(tmp_path: Path) -> None:
    held = tensors()
    held["attention"] = held["attention"][:, 0]
    cell = run(tmp_path, "--cache-path", save(tmp_path / "cache.pt", held))["cells"][0]
    assert cell["attention_coverage"] > cell["selected_fraction"]


def test_key_norms_where_the_file_has_no_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = tensors()
    bare = save(tmp_path / "bare.pt", {name: held[name] for name in ("keys", "values")})
    assert "--attention-stats: expected the attention that each token got, got none" in refused(
        tmp_path, capsys, "--cache-path", bare
    )
    norms = {"selector": {"importance": "key_norm"}}
    cell = run(tmp_path, "--cache-path", bare, config=norms)["cells"][0]
    assert cell["attention_coverage"] is None and cell["attention_output_error"] is None
    (tmp_path / "report.json").unlink()
    said = refused(tmp_path, capsys, "--cache-path", save(tmp_path / "cache.pt", held), **norms)
    assert "selector.importance: expected attention" in said
    keys = torch.tensor([[[[0.0, 4.0], [0.3, 0.4]]]])
    assert offline.key_norm_importance(keys).tolist() == [[[0.25, 2.0]]]


def test_simulated_is_stamped_and_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = stored.simulated

    def counted(**sizes: Any) -> stored.StoredCache:
        cache = plain(**{**sizes, "heads": 2, "head_dim": 64})

        def layer(index: int) -> Any:
            made.append(index)
            return cache.layer(index)

        return stored.StoredCache(cache.layers, 1, 2, cache.tokens, 64, layer, cache.attention)

    monkeypatch.setattr(offline, "simulated", counted)
    metrics = {"layers": 2.0, "baseline_tps": 10.0, "compressed_tps": 25.0, "baseline_tpot_ms": 5.0,
               "compressed_tpot_ms": 3.0}  # fmt: skip
    config = {"metrics": metrics, "max_sequence_length": 2048}
    found = run(tmp_path, "--simulate", "--seed", 3, config=config)
    assert found["origin"] == "simulated"
    case = found["cells"][0]["case"]
    assert (case["layers"], case["s"], case["seed"]) == (2, 512, 3)
    assert (found["throughput_gain"], found["tpot_delta_ms"], found["ttft_delta_ms"]) == (2.5, -2.0, None)
    # One layer after the other, and no more often than compression and its check need.
    assert set(made) == {0, 1} and len(made) <= 10
    again = run(tmp_path, "--simulate", "--seed", 3, config=config)
    assert again["cells"] == found["cells"]


def test_a_simulated_layer_is_always_the_same() -> None:
    cache = stored.simulated(layers=2, tokens=8, heads=2, head_dim=64, seed=1)
    assert cache.attention is not None
    first, second, other = cache.layer(0), cache.layer(0), cache.layer(1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    assert first[0].shape == (1, 2, 8, 64) and first[0].dtype == torch.float16
    assert torch.equal(cache.attention(1), cache.attention(1))


def test_the_uncompressed_cache_offline(tmp_path: Path) -> None:
    config = {
        "selector": {"strategy": "pyramid", "global_retain_ratio": 1.0, "window_size": None, "min_tokens": None},
        "quantization": {"enabled": False},
        "budget": {"target_compression_ratio": 1.0},
    }
    found = run(tmp_path, "--cache-path", save(tmp_path / "cache.pt", tensors()), config=config)
    assert found["compression_ratio"] == 1.0 and found["cells"][0]["impl"] == "transformers DynamicCache"


def change(held: dict[str, Any], name: str, tensor: Any) -> dict[str, Any]:
    return {**held, name: tensor}


def poison(tensor: Any, value: float) -> Any:
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


@pytest.mark.parametrize(
    ("held", "sentence"),
    [
        (lambda h: change(h, "keys", h["keys"][0]), "--cache-path: keys: expected shape [L,T,H,D] or [L,B,H,T,D]"),
        (lambda h: change(h, "values", h["values"][:, 1:]), "--cache-path: values: expected the shape of keys"),
        (lambda h: change(h, "keys", h["keys"].double()), "--cache-path: keys: expected float32, float16, bfloat16"),
        (lambda h: change(h, "keys", h["keys"].int()), "--cache-path: keys: expected float32, float16, bfloat16"),
        (lambda h: change(h, "keys", poison(h["keys"], float("nan"))), "keys: expected finite numbers, got NaN or Inf"),
        (lambda h: change(h, "values", poison(h["values"], float("inf"))), "values: expected finite numbers"),
        (lambda h: change(h, "attention", poison(h["attention"], -1.0)), "attention: expected numbers >= 0"),
        (lambda h: change(h, "attention", h["attention"][:, :, 1:]), "attention: expected shape [L,T] = [3, 320]"),
        (lambda h: change(h, "attention", h["attention"].int()), "attention: expected float32"),
        (lambda h: {"keys": h["keys"]}, "expected tensors keys and values, got keys"),
        (lambda h: {k: t[..., :72] if k != "attention" else t for k, t in h.items()} | {"keys": h["keys"][..., :40],
                    "values": h["values"][..., :40]}, "head_dim"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bad_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], held: Any, sentence: str, suffix: str) -> None:
    said = refused(tmp_path, capsys, "--cache-path", save(tmp_path / f"cache{suffix}", held(tensors())))
    assert sentence in said


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_foreign_and_truncated_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    whole = save(tmp_path / f"whole{suffix}", tensors()).read_bytes()
    path = tmp_path / f"cache{suffix}"
    for content in (whole[: len(whole) // 2], b"", b"hello", whole[:-1] if suffix == ".safetensors" else whole[:100]):
        path.write_bytes(content)
        said = refused(tmp_path, capsys, "--cache-path", path)
        assert "expected tensors by name, got a foreign or truncated file" in said


def test_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle

    class Bad:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "cache.pt"
    path.write_bytes(pickle.dumps({"keys": Bad()}))
    refused(tmp_path, capsys, "--cache-path", path)
    assert not (tmp_path / "ran").exists()


def test_paths_and_models_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = save(tmp_path / "cache.safetensors", tensors(), "other")
    assert "expected a cache of small, the experiment's model_name, got one of other" in refused(
        tmp_path, capsys, "--cache-path", cache
    )
    assert "which is not there" in refused(tmp_path, capsys, "--cache-path", tmp_path / "nowhere.pt")
    assert "expected --cache-path beside it" in refused(tmp_path, capsys, "--attention-stats", cache)
    assert "--simulate: expected no --cache-path" in refused(tmp_path, capsys, "--simulate", "--cache-path", cache)
    named = tmp_path / "cache.npz"
    named.write_bytes(b"")
    assert "expected a file named *.pt or *.safetensors" in refused(tmp_path, capsys, "--cache-path", named)
    mine = save(tmp_path / "mine.pt", tensors(), "small")
    assert "metrics.layers: expected measured figures only" in refused(
        tmp_path, capsys, "--cache-path", mine, metrics={"layers": 3.0}
    )
    tight = {"budget": {"target_compression_ratio": 30.0}, "selector": {"window_size": 512}}
    assert "or less), got" in refused(tmp_path, capsys, "--cache-path", mine, **tight)


def test_the_report_is_json_without_nan(tmp_path: Path) -> None:
    run(tmp_path, "--cache-path", save(tmp_path / "cache.pt", tensors()))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
