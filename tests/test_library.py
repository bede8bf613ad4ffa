"""Operations on tensors as torch.library knows them: what _C makes, inside compiled code, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kvcomp import _C
from kvcomp.store import BFLOAT16, Layout

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="kvcomp.hf needs transformers")
from kvcomp.hf import library  # noqa: E402

TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pages(layout: Layout) -> tuple[Any, ...]:
    """Two lists of one full 4-bit page each, in an arena: arguments of pack."""
    size = _C.page_bytes(layout, 4, 4)
    memory = torch.zeros(2 * size + 128, dtype=torch.uint8)
    arena = memory[-memory.data_ptr() % 128 :][: 2 * size]
    room = _C.page_tokens(4, 4)
    entries = np.arange(2, dtype=np.uint64) * np.uint64(size // 128) | np.uint64(4 << 32 | 4 << 40 | room << 48)
    ints = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    tokens = torch.arange(room, dtype=torch.int32)
    rows = normal(1, 2, room, 64), normal(1, 2, room, 65)[..., :64].contiguous()
    return arena, *rows, torch.from_numpy(entries), *ints, tokens, layout, 1, 0, 0, 0, 0


def arguments() -> dict[str, tuple[Any, ...]]:
    """What each is called with; tensors that it writes to come as they are."""
    b, hq, h, w, s, d = 1, 4, 2, 8, 100, 64
    scratch = torch.zeros(_C.score_workspace(b, hq, w, s, d), dtype=torch.uint8)
    table = torch.zeros(2, 1, dtype=torch.uint64)
    table.view(torch.int64)[:] = 4 << 32 | 4 << 40 | 50 << 48
    lists = torch.tensor([[1, 1, 0, 50]] * 2, dtype=torch.int32)
    chosen = torch.zeros(2, s, dtype=torch.uint8), normal(2, s).abs(), torch.tensor([10, 20], dtype=torch.int32)
    return {
        "score": (
            torch.zeros(b, h, s), normal(b, hq, w, d), normal(b, h, s, d), None, scratch, 0.125, 0.0, 0, 0, 1,
        ),
        "norms": (torch.zeros(b, h, s), normal(b, h, s, d), None, 0),
        "select": (*chosen, None, torch.zeros(_C.select_workspace(2, s), dtype=torch.uint8), 2, 4),
        "accumulate": (torch.ones(2, 1), normal(2, 50).abs(), table, lists, 0.5, 0.25),
        "pack": pages(Layout(64, 64, 1, BFLOAT16)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["score", "norms", "select", "accumulate", "pack"])
def test_operations_are_those_of_the_core(name: str) -> None:
    first, second = arguments()[name], arguments()[name]
    getattr(_C, name)(*first)
    before = arguments()[name][0]
    op = getattr(torch.ops.kvcomp, name)
    op(*second)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], before)
    torch.library.opcheck(getattr(library, name), arguments()[name], test_utils=TESTS)
    third = arguments()[name]

    def step(*given: Any) -> None:
        op(*given)

    torch.compile(step, fullgraph=True, backend="aot_eager")(*third)
    assert torch.equal(first[0], third[0])


def test_divide_refuses_as_the_core_does() -> None:
    """It is for CUDA alone; its fake implementation is for any device."""
    table, lists = torch.zeros(1, 2, 1, dtype=torch.uint64), torch.zeros(1, 2, 4, dtype=torch.int32)
    given = torch.zeros(1, 64, dtype=torch.int32), table, lists, Layout(64, 64, 1, BFLOAT16)
    with pytest.raises(Exception) as core:
        _C.divide(*given)
    with pytest.raises(type(core.value)) as ours:
        torch.ops.kvcomp.divide(*given)
    assert str(core.value) == str(ours.value) and str(core.value).startswith("divide: ")
    with torch._subclasses.FakeTensorMode() as mode:
        torch.ops.kvcomp.divide(*(mode.from_tensor(part) for part in given[:3]), given[3])
