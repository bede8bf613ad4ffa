"""kvcomp.bsr on CUDA: every way of a product, gradients, the layer, graphs, rivals, a small benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kvcomp import results

torch = pytest.importorskip("torch", reason="needs torch")
from kvcomp.bsr import BLOCKS, PATTERNS, BlockSparseLinear, BSRMatrix, matmul, multiply, random_bsr, way_of  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Sparse .*:UserWarning")]
HALVES = (torch.float16, torch.bfloat16)


def normal(*shape: int, dtype: Any = torch.float32, seed: int = 7) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(0, 1, generator=generator)


def close(got: Any, want: Any, k: int) -> None:
    half = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}[got.dtype]
    assert got.shape == want.shape
    assert float((got.double() - want.double()).abs().max()) <= 2 * half * float(want.abs().max()) + 2**-16 * k**0.5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(512, 768, 512), (500, 700, 333), (130, 1000, 1), (1000, 130, 77)])
def test_products(shape: tuple[int, int, int], block: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    m, k, n = shape
    a = random_bsr(m, k, block, 0.6, dtype=dtype, scale=1.0, device="cuda", seed=block)
    dense = a.to_dense().double()
    for transpose in (False, True):
        left = dense.T if transpose else dense
        b = normal(left.shape[1], n, dtype=dtype)
        want = left @ b.double()
        for way in (0, 1, 2, 4, 8):
            if way * block > 128:
                continue
            with monkeypatch.context() as patch:
                patch.setattr(multiply, "_way", lambda *_, way=way: way)
                for out_dtype in (torch.float32, torch.float16, torch.bfloat16):
                    got = matmul(a, b, transpose=transpose, out_dtype=out_dtype)
                    assert got.is_contiguous()
                    close(got, want, max(m, k))
                    out = normal(left.shape[0], n, dtype=out_dtype, seed=5)
                    expected = want - 0.5 * out.double()
                    close(matmul(a, b, transpose=transpose, out=out, beta=-0.5), expected, max(m, k))
                shifted = torch.empty(b.numel() + 1, dtype=dtype, device="cuda")[1:].view(b.shape).copy_(b)
                close(matmul(a, shifted, transpose=transpose), want, max(m, k))
                close(matmul(a, b.T.contiguous().T, transpose=transpose), want, max(m, k))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_and_the_choice(pattern: str) -> None:
    for block in BLOCKS:
        a = random_bsr(2048, 2048, block, 0.8, pattern=pattern, dtype=torch.bfloat16, device="cuda")
        b = normal(2048, 1024, dtype=torch.bfloat16)
        close(a @ b, a.to_dense().double() @ b.double(), 2048)
        assert way_of(a, 1024)


def test_other_dtypes_are_multiplied_dense() -> None:
    for dtype in (torch.float32, torch.float64):
        a = random_bsr(300, 200, 32, 0.5, dtype=dtype, device="cuda", scale=1.0)
        b = normal(200, 40, dtype=dtype).requires_grad_()
        values = a.values.clone().requires_grad_()
        got = a.with_values(values).matmul(b, method="sparse")
        assert torch.allclose(got.double(), a.to_dense().double() @ b.double(), atol=1e-3)
        got.sum().backward()
        assert values.grad is not None and b.grad is not None


def test_forms_stay_on_the_device() -> None:
    a = random_bsr(256, 384, 32, 0.6, device="cuda")
    host = random_bsr(256, 384, 32, 0.6)
    assert torch.equal(a.col_idx.cpu(), host.col_idx) and a.to("cuda") is a
    for tensor in (a.to_torch(), a.to_torch("csr"), a.to_dense(), a.to_dense().to_sparse_coo()):
        made = BSRMatrix.from_torch(tensor, 32)
        assert made.device.type == "cuda" and torch.equal(made.to_dense(), a.to_dense())
    assert BSRMatrix.from_torch(a.to_torch()).values.data_ptr() == a.values.data_ptr()
    assert torch.equal(a.T.to_dense(), a.to_dense().T) and a.to("cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="bsr_check: "):
        BSRMatrix(a.values, a.row_ptr, a.col_idx.flip(0), a.shape)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block", BLOCKS)
def test_gradients(block: int, dtype: Any) -> None:
    a = random_bsr(300, 420, block, 0.5, dtype=dtype, scale=1.0, device="cuda")
    other, grad = normal(420, 130, dtype=dtype), normal(300, 130, dtype=dtype, seed=9)
    dense, wide = a.to_dense().double().requires_grad_(), other.double().requires_grad_()
    (dense @ wide).backward(grad.double())
    stored = a.with_values(torch.ones_like(a.values)).to_dense().bool()
    for method in ("sparse", "dense"):
        values, b = a.values.clone().requires_grad_(), other.clone().requires_grad_()
        matmul(a.with_values(values), b, method=method).backward(grad)  # type: ignore[arg-type]
        close(a.with_values(values.grad).to_dense(), dense.grad * stored, 420)
        close(b.grad, wide.grad, 420)
        values, b = a.values.clone().requires_grad_(), other.clone().requires_grad_()
        matmul(a.with_values(values), b, method=method, out_dtype=torch.float32).backward(grad.float())  # type: ignore[arg-type]
        close(a.with_values(values.grad).to_dense(), dense.grad * stored, 420)
        close(b.grad, wide.grad, 420)


def test_linear() -> None:
    torch.manual_seed(0)
    layer = BlockSparseLinear(1024, 768, block_size=64, sparsity=0.75, device="cuda", dtype=torch.bfloat16)
    dense = layer.weight().to_dense().detach()
    for tokens in (1, 7, 640):
        x = normal(tokens, 1024, dtype=torch.bfloat16).requires_grad_()
        y = layer(x)
        close(y, x.double() @ dense.double().T + layer.bias.double(), 1024)
        y.float().square().mean().backward()
        assert x.grad is not None and layer.values.grad is not None
    moved = layer.cpu()(x.detach().cpu())
    assert torch.allclose(moved.float(), y.detach().cpu().float(), atol=0.05, rtol=0.05)


def test_in_a_graph() -> None:
    """Plans and copies are made before; a capture holds nothing that may change under it."""
    a = random_bsr(1024, 1024, 64, 0.7, device="cuda")
    b, out = normal(1024, 512, dtype=torch.float16), torch.empty(1024, 512, dtype=torch.float16, device="cuda")
    a.matmul(b, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.matmul(b, out=out)
    for seed in (1, 2):
        b.copy_(normal(1024, 512, dtype=torch.float16, seed=seed))
        graph.replay()
        close(out, a.to_dense().double() @ b.double(), 1024)


@pytest.mark.parametrize("way", [0, 1, 2])
def test_values_that_change_in_a_graph(way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay takes the values of then; products outside take none of the graph's memory."""
    monkeypatch.setattr(multiply, "_way", lambda *_: way)
    a = random_bsr(512, 512, 32, 0.7, device="cuda")
    b, out = normal(512, 128, dtype=torch.float16), torch.empty(512, 128, dtype=torch.float16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="bsr: CUDA graph: "), torch.cuda.graph(torch.cuda.CUDAGraph()):
        a.matmul(b, out=out)
    a.matmul(b, out=out)
    with torch.cuda.graph(graph):
        a.matmul(b, out=out)
    for factor in (1.0, 3.0):
        a.values.mul_(factor)
        a.forget()
        close(a @ b, a.to_dense().double() @ b.double(), 512)
        out.zero_()
        graph.replay()
        close(out, a.to_dense().double() @ b.double(), 512)


@pytest.mark.parametrize("way", [0, 1, 2])
def test_other_streams_wait_for_what_is_kept(way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiply, "_way", lambda *_: way)
    a = random_bsr(4096, 4096, 32, 0.8, device="cuda")
    b, streams = normal(4096, 64, dtype=torch.float16), [torch.cuda.Stream() for _ in range(2)]
    want = a.to_dense().double() @ b.double()
    a @ b  # makes what belongs to the blocks, and waits for it
    a.forget()
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            if stream is streams[0]:
                torch.cuda._sleep(100_000_000)
            found.append(a @ b)
    a.forget()
    torch.empty(4096, 4096, dtype=torch.float16, device="cuda").fill_(float("nan"))
    torch.cuda.synchronize()
    for got in found:
        close(got, want, 4096)


@pytest.mark.parametrize("form", ["bsr", "blocked-ell", "csr"])
def test_cusparse(form: str) -> None:
    from kvcomp.bench import bsr_cusparse

    a = random_bsr(512, 768, 32, 0.7, device="cuda", pattern="power_law")
    # fp32: with fp16 its CSR product rounds more than once (measured: two units in the last place).
    b, out = normal(768, 256, dtype=torch.float16), torch.empty(512, 256, dtype=torch.float32, device="cuda")
    try:
        product = bsr_cusparse.Product(form, a, b, out)
        product.run()
    except (OSError, bsr_cusparse.CusparseError) as reason:
        pytest.skip(str(reason))
    torch.cuda.synchronize()
    close(out, a.to_dense().double() @ b.double(), 768)


def test_a_small_benchmark() -> None:
    from kvcomp.bench import bsr, bsr_settings

    settings = bsr_settings.Settings(sizes=[1024], sparsity=[0.8], iterations=5, device="cuda")
    found = bsr.bench(settings, command="kvcomp bench bsr")
    assert not results.failures(found)
    assert len([cell for cell in found["cells"] if cell["impl"] == "kvcomp"]) == len(BLOCKS)


def test_the_script_writes_its_file(tmp_path: Path) -> None:
    from kvcomp.cli import main

    output = tmp_path / "bsr.json"
    flags = ["--sizes", "512", "--sparsity", "0.9", "--block-sizes", "64", "--iterations", "5", "--output", str(output)]
    assert main(["bench", "bsr", "--device", "cuda", *flags]) == 0
    assert results.read(output, kind="bsr")["settings"]["dtype"] == "bfloat16"
