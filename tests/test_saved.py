"""Saved caches: what comes back is what was saved; what is no sound file of this model's is refused in one sentence."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
numpy_files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

import kvcomp  # noqa: E402
from kvcomp import _C, plain, saved, tensorfile  # noqa: E402
from kvcomp.policy import Policy  # noqa: E402
from test_hf_generate import padded  # noqa: E402
from test_hf_models import build, config, decode, tokens  # noqa: E402

Arrays = dict[str, np.ndarray[Any, Any]]
PROMPT, SEEN, END = 200, 330, 410  # compressed; fed before the file is written; fed after it was read


@pytest.fixture(scope="module")
def model() -> Any:
    return build("qwen3")


def filled(model: Any, policy: Policy, batch: int = 1) -> Any:
    """A cache in the middle of decoding."""
    cache = kvcomp.Cache(model.config, policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kvcomp.BudgetWarning)
        decode(model, cache, tokens(batch, SEEN), PROMPT, step=13)
    return cache


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a cache with page classes of several kinds."""
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    filled(model, kvcomp.Policy(target_ratio=3, sinks=4, seed=5), batch=2).save(path)
    return path


def read(path: Path) -> tuple[Arrays, dict[str, str]]:
    return tensorfile.read(path, saved.SCHEMA)


def written(path: Path, arrays: Arrays, strings: dict[str, str]) -> Path:
    """A file with a checksum that is right."""
    tensorfile.write(path, {name: tensorfile.Tensor.of(array) for name, array in arrays.items()}, strings)
    return path


def refused(path: Path, model: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        kvcomp.Cache.load(path, model.config)
    sentence = str(caught.value)
    assert sentence.startswith(f"load: {path}: ") and "\n" not in sentence and len(sentence) < len(str(path)) + 300


# ---- what comes back


POLICIES = {
    "4 bits": {"bits": 4},
    "16 bits": {"bits": 16},
    "apart": {"k_bits": 8, "v_bits": 3},
    "planned": {"target_ratio": 4},
    "symmetric": {"bits": 2, "zero_point": False, "rotation": "none"},
    "stochastic": {"bits": 4, "stochastic": True, "group": 32, "seed": 77, "scale": "minmax"},
    "e5m3": {"target_ratio": 5, "scale_dtype": "e5m3"},
    "evicting": {"bits": 4, "select": kvcomp.SnapKV(keep=0.5), "sinks": 4, "window": 20},
    "held": {"target_ratio": 3, "decode": "hold"},
    "rotated": {"target_ratio": 4, "rotation": kvcomp.Rotation.random(2, 2, 64)},
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_loaded_cache_goes_on_as_the_saved_one(model: Any, tmp_path: Path, name: str) -> None:
    """Logits are equal to the last bit, through pages that age; bytes are no more, and all are accounted for."""
    path = tmp_path / "cache.safetensors"
    cache = filled(model, kvcomp.Policy(**POLICIES[name]))
    cache.save(path)
    loaded = kvcomp.Cache.load(path, model.config)
    state, other = cache._state, loaded._state
    assert other.policy == state.policy and other.packed.policy == state.policy
    assert (loaded.report, loaded.ratio, loaded.get_seq_length()) == (cache.report, cache.ratio, SEEN)
    assert other.packed.hold_bytes == state.packed.hold_bytes
    assert 0 < loaded.nbytes <= cache.nbytes and sum(loaded.ledger().values()) == loaded.nbytes
    same = ("codes", "scales", "positions", "window")
    assert [loaded.ledger()[part] for part in same] == [cache.ledger()[part] for part in same]
    for ours, theirs in zip(other.packed.layers, state.packed.layers, strict=True):
        assert all(np.array_equal(*rows) for rows in zip(ours.unpack(), theirs.unpack(), strict=True))
        assert (ours.coding, ours.window, ours.decay) == (theirs.coding, theirs.window, theirs.decay)
    ids = tokens(1, END)
    logits = []
    for each in (cache, loaded):
        with torch.no_grad():
            logits.append(torch.cat([model(ids[:, i : i + 1], past_key_values=each).logits for i in range(SEEN, END)]))
    assert torch.equal(*logits)


def test_a_second_generation_is_saved_as_the_first(model: Any, tmp_path: Path) -> None:
    """What was loaded and saved again loads as well, with the same arrays; so does what had no slack to lose."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    filled(model, kvcomp.Policy(target_ratio=4)).save(str(paths[0]))
    kvcomp.Cache.load(str(paths[0]), model.config).save(paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("bits", [4, 16])
def test_left_padding_and_generate(model: Any, tmp_path: Path, bits: int) -> None:
    batch = padded([90, 17, 133])
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = kvcomp.Cache(model.config, kvcomp.Policy(bits=bits))
    first = model.generate(**batch, past_key_values=cache, max_new_tokens=5, **settings)
    cache.save(tmp_path / "cache.safetensors")
    fresh = build("qwen3")  # its configuration has never seen a packed cache
    loaded = kvcomp.Cache.load(tmp_path / "cache.safetensors", fresh.config)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    on, again = (
        owner.generate(first, attention_mask=mask, past_key_values=each, max_new_tokens=50, **settings)
        for owner, each in ((model, cache), (fresh, loaded))
    )
    assert torch.equal(on, again) and torch.equal(on[:, : first.shape[1]], first)
    wrong = torch.ones(3, again.shape[1], dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match="the padding that the cache was filled with"):
        fresh(again[:, -1:], attention_mask=wrong, past_key_values=loaded)


def test_after_the_batch_was_reordered(model: Any, tmp_path: Path) -> None:
    """Pages copied for beams, table rows out of order, slabs with holes."""
    cache = filled(model, kvcomp.Policy(target_ratio=3), batch=3)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvcomp.Cache.load(tmp_path / "cache.safetensors", model.config)
    assert loaded.nbytes <= cache.nbytes and sum(loaded.ledger().values()) == loaded.nbytes
    ids = tokens(2, 80, seed=9)
    with torch.no_grad():
        assert torch.equal(*(model(ids, past_key_values=each).logits for each in (cache, loaded)))
        assert torch.equal(*(model(ids[:, :1], past_key_values=each).logits for each in (cache, loaded)))


def test_a_loaded_cache_empties_and_starts_again(model: Any, file: Path) -> None:
    loaded = kvcomp.Cache.load(file, model.config)
    loaded.reset()
    assert loaded.nbytes == 0
    cache = kvcomp.Cache(model.config, loaded._state.policy)
    assert torch.equal(*(decode(model, each, tokens(2, SEEN), PROMPT, step=13) for each in (cache, loaded)))


def test_bfloat16(tmp_path: Path) -> None:
    half = build("llama", torch.bfloat16)
    cache = filled(half, kvcomp.Policy(bits=4))
    cache.save(tmp_path / "cache.safetensors")
    loaded = kvcomp.Cache.load(tmp_path / "cache.safetensors", half.config)
    with torch.no_grad():
        assert torch.equal(*(half(tokens(1, 60, seed=3), past_key_values=each).logits for each in (cache, loaded)))


def test_the_file_is_a_safetensors_file(file: Path) -> None:
    """As the format's own library reads it."""
    arrays, strings = read(file)
    theirs = numpy_files.load_file(file)
    assert theirs.keys() == arrays.keys()
    assert all(np.array_equal(theirs[name], array) for name, array in arrays.items())
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    assert re.fullmatch("[0-9a-f]{64}", metadata.pop("checksum")) and metadata == strings
    facts = json.loads(strings["model"])
    assert (strings["schema"], strings["format"]) == ("kvcomp.cache/1", str(kvcomp.FORMAT_VERSION))
    assert (facts["model_type"], facts["head_dim"], facts["vocab_size"]) == ("qwen3", 64, 211)


def test_a_file_holds_no_slack(model: Any, tmp_path: Path) -> None:
    cache = filled(model, kvcomp.Policy(bits=4), batch=2)
    cache.save(tmp_path / "cache.safetensors")
    assert (tmp_path / "cache.safetensors").stat().st_size <= cache.nbytes + 16384


# ---- saving


def test_what_cannot_be_saved(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    cache = kvcomp.Cache(model.config, kvcomp.Policy(bits=4))
    with pytest.raises(RuntimeError, match=r"^save: cache: expected one that holds a prompt, got an unused one$"):
        cache.save(path)
    sentence = r"^save: cache: expected one between two forward passes, got one in the middle of a pass$"
    caught = []

    def interrupt(*_: Any) -> None:
        with pytest.raises(RuntimeError, match=sentence):
            cache.save(path)
        caught.append(True)

    for ids in (tokens(1, 40), tokens(1, 1)):
        with torch.no_grad():
            hook = model.model.layers[1].register_forward_pre_hook(interrupt)
            model(ids, past_key_values=cache)
            hook.remove()
    assert len(caught) == 2 and list(tmp_path.iterdir()) == []
    cache.save(path)
    with pytest.raises(OSError):
        cache.save(tmp_path)  # a folder
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reason", [OSError("no space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    path = tmp_path / "cache.safetensors"
    cache = filled(model, kvcomp.Policy(bits=4))
    cache.save(path)
    before = path.read_bytes()
    plain_rows, calls = saved._rows, []

    def rows(*arguments: Any) -> Any:
        calls.append(True)
        if len(calls) == 3:  # the second layer's pages
            raise reason
        return plain_rows(*arguments)

    monkeypatch.setattr(saved, "_rows", rows)
    with pytest.raises(type(reason)):
        cache.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    cache.save(path)
    assert path.read_bytes() == before


def test_values_that_cannot_come_back_are_refused(tmp_path: Path, model: Any) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(kvcomp.SnapKV):
        more: int = 1

    path = tmp_path / "cache.safetensors"
    cache = filled(model, kvcomp.Policy(bits=4, select=Mine(keep=0.5)))
    with pytest.raises(ValueError, match=r"^save: policy\.select: expected .*, got .*Mine"):
        cache.save(path)
    cache = filled(model, kvcomp.Policy(target_ratio=3, importance_temperature=float("inf")))
    with pytest.raises(ValueError, match=r"^save: policy\.importance_temperature: expected finite numbers"):
        cache.save(path)
    assert not path.exists()


# ---- damage


def test_truncated_files(model: Any, file: Path, tmp_path: Path) -> None:
    whole, path = file.read_bytes(), tmp_path / "cache.safetensors"
    for length in (*range(0, len(whole), 997), 7, 8, 9, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, model, "truncated|foreign|damaged")
    path.write_bytes(whole + b"\0")
    refused(path, model, "damaged")


def test_a_changed_bit_anywhere_is_found(model: Any, file: Path, tmp_path: Path) -> None:
    whole, path = file.read_bytes(), tmp_path / "cache.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    for place in (*range(8), *range(8, header, 23), header - 1, *rng.integers(header, len(whole), 60)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        refused(path, model, "expected")


def test_the_checksum_covers_all_bytes(model: Any, file: Path, tmp_path: Path) -> None:
    """Changes that leave a well-formed file: of JSON's white space, of a string, of a page."""
    whole, path = file.read_bytes(), tmp_path / "cache.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    version = f'"kvcomp":"{kvcomp.__version__}'.encode()
    changes = [whole.replace(version, version[:-1] + b"x"), whole[:-1] + bytes([whole[-1] ^ 1])]
    if whole[header - 1] == ord(" "):
        changes.append(whole[: header - 1] + b"\t" + whole[header:])
    for changed in changes:
        assert changed != whole
        path.write_bytes(changed)
        refused(path, model, "expected the checksum written in it, got another one")


def test_foreign_files(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    numpy_files.save_file({"keys": np.zeros((2, 3), np.float32)}, path)
    refused(path, model, r"expected a file of schema kvcomp\.cache/1, got a foreign one$")
    numpy_files.save_file({"keys": np.zeros(3, np.float32)}, path, {"schema": "kvcomp.cache/2"})
    refused(path, model, r"expected a file of schema kvcomp\.cache/1, got 'kvcomp\.cache/2'$")
    numpy_files.save_file({"keys": np.zeros(3, np.float32)}, path, {"schema": saved.SCHEMA})
    refused(path, model, "the checksum first")
    for content in (b"", b"PK\3\4" + b"\0" * 100, b"hello", b"\0" * 8, b"\0" * 64):
        path.write_bytes(content)
        refused(path, model, "foreign|truncated|damaged")
    refused(tmp_path, model, "expected a file, got something else")
    with pytest.raises(FileNotFoundError):
        kvcomp.Cache.load(tmp_path / "none", model.config)


def raw(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
META = {"checksum": "0" * 64, "schema": saved.SCHEMA}
HOSTILE = {
    "length beyond the file": raw("{}", length=1 << 40),
    "length of 64 bits": raw("{}", length=2**64 - 1),
    "length below zero": raw("{}", length=2**63),
    "deep": raw("[" * 100_000 + "]" * 100_000),
    "deep strings": raw('{"a":' * 50_000 + "1" + "}" * 50_000),
    "not UTF-8": raw(b'{"\xff":1}'),
    "not an object": raw("[1]"),
    "NaN": raw('{"__metadata__":NaN}'),
    "infinite": raw('{"__metadata__":1e999}'),
    "long number": raw('{"a":' + "9" * 100_000 + "}"),
    "a name twice": raw('{"__metadata__":{"schema":"kvcomp.cache/1","schema":"kvcomp.cache/1"}}'),
    "an array twice": raw('{"a":' + json.dumps(ENTRY) + ',"a":' + json.dumps(ENTRY) + "}", b"1234"),
    "numbers as strings": raw({"__metadata__": META | {"format": 1}}),
    **{
        f"entry {change}": raw(
            json.dumps({"__metadata__": META, "a": {**ENTRY, **change}}, separators=(",", ":")), b"1234"
        )
        for change in (
            {"dtype": "F8_E4M3"},
            {"dtype": ["U8"]},
            {"shape": [2**62]},
            {"shape": [2**31, 2**31, 4]},
            {"shape": [0, 2**70]},
            {"shape": [-4]},
            {"shape": [-2, -2]},
            {"shape": [4.0]},
            {"shape": [True, 4]},
            {"shape": "4"},
            {"shape": [1] * 60 + [4]},
            {"data_offsets": [0, 2**62]},
            {"data_offsets": [0]},
            {"data_offsets": [-4, 0]},
            {"data_offsets": [4, 0]},
            {"data_offsets": [1, 4], "shape": [3]},
            {"more": 1},
        )
    },
    "overlap": raw({"__metadata__": META, "a": ENTRY, "b": ENTRY}, b"1234"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(model: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(HOSTILE[name])
    refused(path, model, "expected")


# ---- another model, another format


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"vocab_size": 300}, "a model with vocab_size 300, as this one, got 211"),
        ({"num_attention_heads": 8}, "num_attention_heads 8, as this one, got 4"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1, as this one, got 2"),
        ({"head_dim": 128}, "head_dim 128, as this one, got 64"),
        ({"layers": 3}, "num_hidden_layers 3, as this one, got 2"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_parameters \{.*500000.*got \{.*10000",
        ),
        ({"family": "llama"}, "model_type 'llama', as this one, got 'qwen3'"),
    ],
)
def test_another_model(file: Path, changes: dict[str, Any], match: str) -> None:
    other = config(changes.pop("family", "qwen3"), **changes)
    with pytest.raises(ValueError, match=match):
        kvcomp.Cache.load(file, other)
    assert other._attn_implementation == "sdpa", "a configuration was changed for a cache that was refused"


def test_the_same_model_before_it_was_built(file: Path) -> None:
    assert kvcomp.Cache.load(file, config("qwen3")).nbytes > 0


STRINGS: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "format": (lambda s: s.update(format="1"), f"expected pages of format {kvcomp.FORMAT_VERSION}, got '1'"),
    "fingerprint": (lambda s: s.update(fingerprint="0" * 64), "expected the fingerprint"),
    "model": (lambda s: s.update(model=s["model"].replace("qwen3", "qwen2")), "expected the fingerprint"),
    "unknown": (lambda s: s.update(more=""), "expected the strings"),
    "missing": (lambda s: s.pop("report"), "expected the strings"),
    "policy not JSON": (lambda s: s.update(policy="{"), "Expecting"),
    "policy deep": (lambda s: s.update(policy="[" * 50_000), "too deep"),
    "cache NaN": (lambda s: s.update(cache=re.sub('"decay":[0-9.]+', '"decay":NaN', s["cache"])), "not finite"),
    "a name twice": (lambda s: s.update(policy=s["policy"].replace('"class"', '"class":1,"class"', 1)), "twice"),
    "class": (lambda s: s.update(policy=s["policy"].replace('"Policy"', '"Popen"')), "policy: expected Policy"),
    "field": (lambda s: s.update(policy=s["policy"].replace('"sinks"', '"sink"')), "the fields of Policy"),
    "value": (lambda s: s.update(policy=s["policy"].replace('"sinks":4', '"sinks":-4')), "sinks: expected 0 or more"),
    "kind": (
        lambda s: s.update(policy=s["policy"].replace('"sinks":4', '"sinks":"4"')),
        r"policy\.sinks: expected int",
    ),
    "budgets": (lambda s: s.update(policy=s["policy"].replace('"bits":null', '"bits":4')), "exactly one of"),
    "array": (
        lambda s: s.update(policy=s["policy"].replace('"layer_weights":null', '"layer_weights":{"array":"x"}')),
        "layer_weights: expected",
    ),
    "head_dim": (lambda s: s.update(cache=s["cache"].replace('"head_dim":64', '"head_dim":128')), "head_dim|layout"),
    "layout": (lambda s: s.update(cache=s["cache"].replace('"group":64', '"group":48')), "a page layout"),
    "layout wide": (lambda s: s.update(cache=s["cache"].replace('"group":64', f'"group":{2**70}')), "a page layout"),
    "heads": (lambda s: s.update(cache=s["cache"].replace('"heads":2', '"heads":1')), "2 KV heads in layer 0, got 1"),
    "window": (lambda s: s.update(cache=re.sub('"window":[0-9]+', '"window":-1', s["cache"])), "a window and a decay"),
    "seed": (lambda s: s.update(cache=s["cache"].replace('"seed":5', f'"seed":{2**64}')), r"coding\.seed in"),
    "positions": (lambda s: s.update(cache=s["cache"].replace(f":{SEEN}", f":{SEEN + 1}")), "positions in sequence 0"),
    "many positions": (lambda s: s.update(cache=s["cache"].replace(f":{SEEN}", f":{2**40}")), r"positions in 0\.\."),
    "held": (
        lambda s: s.update(cache=s["cache"].replace('"hold_bytes":null', '"hold_bytes":1')),
        "what pages are worth",
    ),
    "rotation": (lambda s: s.update(cache=s["cache"].replace('"rotation":1', '"rotation":7')), r"coding\.rotation in"),
    "report": (lambda s: s.update(report=re.sub('"bf16_bytes":[0-9]+', '"bf16_bytes":"0"', s["report"])), "bf16_bytes"),
}


@pytest.mark.parametrize("name", STRINGS)
def test_strings_that_are_wrong_under_a_right_checksum(model: Any, file: Path, tmp_path: Path, name: str) -> None:
    arrays, strings = read(file)
    change, match = STRINGS[name]
    before = dict(strings)
    change(strings)
    assert strings != before, "nothing was changed"
    refused(written(tmp_path / "cache.safetensors", arrays, strings), model, match)


# ---- arrays that do not fit together


def entries(arrays: Arrays, layer: int = 0) -> np.ndarray[Any, Any]:
    return arrays[f"layers.{layer}.table"].view(saved.PAGE)


def edit(name: str, place: Any, value: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name][place] = value

    return change


def edit_entry(field: str, place: Any, value: Any, layer: int = 0) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        entries(arrays, layer)[field][place] = value

    return change


def replaced(name: str, make: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = np.ascontiguousarray(make(arrays[name]))

    return change


def swap_pages(arrays: Arrays) -> None:
    table = entries(arrays)
    table["unit"][0, :2] = table["unit"][0, :2][::-1].copy()


LISTS, TABLE, KIND = "layers.1.lists", "layers.0.table", "cache.layers.0.ranks.kind"
ARRAYS: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "missing": (lambda a: a.pop("layers.1.aged"), r"an array layers\.1\.aged, got none"),
    "besides": (lambda a: a.update(more=np.zeros(3, np.uint8)), "got 'more' besides"),
    "a layer more": (lambda a: a.update({"layers.2.aged": a["layers.1.aged"]}), r"'layers\.2\.aged' besides"),
    "type": (replaced(LISTS, lambda x: x.astype(np.int64)), r"layers\.1\.lists \(4, 4\) int32, got \(4, 4\) int64"),
    "signs": (replaced(TABLE, lambda x: x.view(np.int64)), "layers.0.table .* uint64"),
    "rows": (replaced(LISTS, lambda x: x[:3]), r"\(4, 4\) int32, got \(3, 4\)"),
    "column": (replaced(TABLE, lambda x: np.pad(x, ((0, 0), (0, 1)))), "as many columns as"),
    "dimensions": (replaced(TABLE, lambda x: x[None]), r"table \(4, \*\)"),
    "pages short": (replaced("layers.0.pages", lambda x: x[:-128]), r"layers\.0\.pages \("),
    "pages long": (replaced("layers.0.pages", lambda x: np.append(x, x[:128])), r"layers\.0\.pages \("),
    "pages of none": (replaced("layers.0.pages", lambda x: x[:0]), r"layers\.0\.pages \("),
    "unit": (edit_entry("unit", (0, 0), 1), "pages one after the other"),
    "unit far away": (edit_entry("unit", (1, 1), 2**32 - 1), "pages one after the other"),
    "swapped": (swap_pages, "pages one after the other"),
    "no tokens": (edit_entry("tokens", (0, 0), 0), "1 token a page"),
    "tokens beyond": (edit_entry("tokens", (0, 0), 65), "1 token a page"),
    "tokens fewer": (edit_entry("tokens", (0, 0), 3), "the tokens of all pages|full"),
    "bits": (edit_entry("k_bits", (0, 0), 5), "bits in"),
    "no bits": (edit_entry("v_bits", (0, 0), 0), "bits in"),
    "flags": (edit_entry("flags", (0, 0), 1), "no flags"),
    "tail of few bits": (lambda a: entries(a)["k_bits"].__setitem__((0, a["layers.0.lists"][0, 0] - 1), 8), "tails"),
    "pages negative": (edit(LISTS, (0, 0), -1), "0 or more"),
    "pages beyond": (edit(LISTS, (0, 0), 2**31 - 1), "as many columns as"),
    "tail page": (edit(LISTS, (0, 1), 2**20), "the tail inside the list"),
    "tail tokens": (edit(LISTS, (0, 2), 0), "the tail's tokens"),
    "tokens": (edit(LISTS, (0, 3), 1), "the tokens of all pages"),
    "aged": (edit("layers.0.aged", (0, 0), 7), "aged: bits in"),
    "aged none": (edit("layers.0.aged", (0, slice(None)), 0), "aged: bits in"),
    "no sequences": (
        lambda a: a.update({n: a[n][:0] for n in ("padding.counts", "padding.runs")}), "runs of padding"
    ),
    "more sequences": (replaced("padding.counts", lambda x: np.append(x, x[:1])), "runs of padding"),
    "odd runs": (edit("padding.counts", slice(None), [1, 3]), "runs of padding"),
    "many runs": (edit("padding.counts", 0, 2**31 - 2), "runs of padding"),
    "negative run": (edit("padding.runs", slice(0, 2), [-1, SEEN + 1]), "runs of padding"),
    "sum of runs": (edit("padding.runs", 1, 1), "positions in sequence 0, got 1"),
    "fewer real tokens": (edit("padding.runs", slice(0, 2), [SEEN - 3, 3]), "no more tokens than the sequence has"),
    "kind": (edit(KIND, (0, 0, 0), 5), "ranks: bits in"),
    "half a kind": (edit(KIND, (0, 0, 0), 0), "ranks: bits in"),
    "kinds apart": (edit(KIND, (0, 0), 0), "kinds one after the other"),
    "level": (edit("cache.layers.0.ranks.level", (0, 3), 1), "level 0 for the last kind"),
    "level NaN": (edit("cache.layers.1.ranks.level", (0, 0), np.nan), "level: 0 or more"),
    "recent": (edit("cache.layers.1.ranks.recent", (0, 0), np.inf), "recent: finite"),
    "ranks' shape": (replaced("cache.layers.1.ranks.recent", lambda x: x[:2]), r"recent of shape \(4, 2\)"),
    "ranks' type": (replaced("cache.layers.1.ranks.recent", lambda x: x.astype(np.float64)), "recent of its type"),
    "worth": (replaced("cache.layers.1.ranks.worth", lambda x: np.zeros((4, 3), np.float32)), "worth of shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_wrong_under_a_right_checksum(model: Any, file: Path, tmp_path: Path, name: str) -> None:
    arrays, strings = read(file)
    ARRAYS[name][0](arrays)
    refused(written(tmp_path / "cache.safetensors", arrays, strings), model, ARRAYS[name][1])


def test_random_changes_under_a_right_checksum(model: Any, file: Path, tmp_path: Path) -> None:
    """Tables, states and ranks with random bytes: refused, or a cache that can be used."""
    rng, path = np.random.default_rng(1), tmp_path / "cache.safetensors"
    original, strings = read(file)
    names = [name for name, array in original.items() if array.size and not name.endswith(".pages")]
    loaded = 0
    for _ in range(150):
        arrays = {name: array.copy() for name, array in original.items()}
        flat = arrays[names[rng.integers(len(names))]].reshape(-1).view(np.uint8)
        flat[rng.integers(len(flat))] = rng.integers(256)
        try:
            cache = kvcomp.Cache.load(written(path, arrays, strings), model.config)
        except ValueError:
            continue
        loaded += 1
        with torch.no_grad():
            assert torch.isfinite(model(tokens(2, 90), past_key_values=cache).logits).all()
    assert loaded < 75


def test_refusing_takes_no_memory(model: Any, tmp_path: Path) -> None:
    """A sparse file of 1 TB is refused by its header."""
    path = tmp_path / "cache.safetensors"
    path.write_bytes(raw({"__metadata__": META, "a": ENTRY}, b"1234"))
    try:
        with path.open("r+b") as opened:
            opened.truncate(1 << 40)
    except OSError:
        pytest.skip("no sparse files here")
    refused(path, model, "damaged")


# ---- pieces


def test_plain_values_come_back() -> None:
    policy = kvcomp.Policy(
        target_ratio=np.float32(8),
        classes=[(4, 4), (8, 4)],
        sinks=np.int64(3),
        prefill="layerwise",
        layer_weights=np.array([1.0, 2.5]),
        select=kvcomp.Hybrid(layer_ratios=(kvcomp.LayerRatio(layer_index=1, retain_ratio=0.1),), model_layers=4),
    )
    arrays: Arrays = {}
    text = json.dumps(plain.encode(policy, "policy", arrays))
    back = plain.decode(json.loads(text), Policy, "policy", arrays)
    assert list(arrays) == ["policy.layer_weights"] and back.layer_weights is arrays["policy.layer_weights"]
    assert dataclasses.replace(back, layer_weights=None) == dataclasses.replace(policy, layer_weights=None)
    assert back.classes == [(4, 4), (8, 4)] and type(back.sinks) is int


def test_arrays_are_stored_once() -> None:
    rotation = kvcomp.Rotation.random(1, 1, 64)
    arrays: Arrays = {}
    encoded = [plain.encode(value, where, arrays) for value, where in ((rotation, "r"), (rotation.keys[0], "k"))]
    assert encoded[1] == {"array": "r.keys.0"} and len(arrays) == 2
    assert plain.decode(encoded[0], kvcomp.Rotation, "r", arrays) == rotation


def test_raw_pages() -> None:
    arena = _C.Arena(1 << 24)
    pages, rng = arena.alloc(384, 5), np.random.default_rng(0)
    given = rng.integers(0, 256, (3, 384), np.uint8)
    arena.write(384, pages[[4, 0, 2]].copy(), given)
    back = np.empty((5, 384), np.uint8)
    arena.read(384, pages, back)
    assert np.array_equal(back[[4, 0, 2]], given) and not back[[1, 3]].any()
    for move in (arena.read, arena.write):
        with pytest.raises(ValueError, match=r"^arena: units: expected live pages of 384 bytes, got unit 999$"):
            move(384, np.array([999], np.uint32), back[:1])
        with pytest.raises(ValueError, match=r"^arena: units: expected live pages of 256 bytes, got unit \d+$"):
            move(256, pages, np.empty((5, 256), np.uint8))
        with pytest.raises(ValueError, match=r"^arena: bytes: expected shape \(2, 384\), got \(5, 384\)$"):
            move(384, pages[:2].copy(), back)
        with pytest.raises(TypeError, match=r"^arena: bytes: expected uint8, got int32$"):
            move(384, pages, np.zeros((5, 384), np.int32))
        with pytest.raises(TypeError, match=r"^arena: expected 3 positional arguments, got 2$"):
            move(384, pages)
    with pytest.raises(ValueError, match=r"^arena: bytes: expected a writable tensor, got a read-only one$"):
        frozen = np.empty((5, 384), np.uint8)
        frozen.setflags(write=False)
        arena.read(384, pages, frozen)
    arena.free(384, pages)
    with pytest.raises(ValueError, match="live pages"):
        arena.read(384, pages, back)
