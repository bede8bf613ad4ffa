"""Decoding from a packed cache never unpacks it: the memory that decode steps add to a process, measured by the kernel
(VmHWM), against the full-precision cache of the same prompt."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MEASURE = """
import ctypes, gc, json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
import kvcomp
from kvcomp.store import PackedLayer

PROMPT, STEPS = 16384, 4
kind = sys.argv[1]
if kind == "unpacking":
    attend = PackedLayer.attend
    def unpack_and_attend(layer, *args, **kwargs):
        keys, values = layer.unpack()
        return attend(layer, *args, **kwargs)
    PackedLayer.attend = unpack_and_attend

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
    "llama", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=PROMPT + 64)).eval()
cache = DynamicCache(config=model.config) if kind == "plain" else kvcomp.Cache(model.config, kvcomp.Policy(bits=4))
ids = torch.randint(3, 64, (1, PROMPT))
with torch.inference_mode():
    # Attention over the prompt is not what is measured, and slow: any cheap stand-in will do for it.
    functional = torch.nn.functional
    whole = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, **_: value.expand_as(query).contiguous()
    model(ids, past_key_values=cache, logits_to_keep=1)
    functional.scaled_dot_product_attention = whole
    model(ids[:, :1], past_key_values=cache)  # what is allocated once, at the first step
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # VmHWM := VmRSS
    before = kib("VmHWM")
    for _ in range(STEPS):
        model(ids[:, :1], past_key_values=cache)
    added = kib("VmHWM") - before
full = PROMPT * 2 * 2 * 64 * 2 * 4  # tokens, layers, heads, head_dim, K and V, bytes of float32
print(json.dumps({"added": 1024 * added, "full": full, "nbytes": getattr(cache, "nbytes", 0)}))
"""


def measure(kind: str) -> dict[str, int]:
    """Bytes that decode steps add to the process's memory, those of the full-precision cache, and of the packed one."""
    done = subprocess.run([sys.executable, "-c", MEASURE, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def resettable() -> bool:
    """Whether this kernel lets a process reset its own VmHWM."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not resettable(), reason="needs Linux's /proc/self/clear_refs")
def test_decode_unpacks_nothing() -> None:
    """16384 tokens, 32 MiB in 32 bits, 2 layers. Decode steps may add a sixteenth of one layer's share; unpacking one
    layer at a time, the control, adds nearly all of it."""
    packed, control = measure("packed"), measure("unpacking")
    layer = packed["full"] // 2
    assert 0 < packed["nbytes"] < packed["full"] / 6
    assert packed["added"] <= layer / 16, packed
    assert control["added"] >= 0.9 * layer, control
