"""Tensors and scalars from Python: every way in, and every wrong one refused by name (csrc/python/args.c)."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kvcomp import _C
from reference import Array, Layout, Pages

LAYOUT = Layout(64, 64, 1, 1)
CPU, CUDA, ROCM = 1, 2, 10


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
CODES = {"f": 2, "i": 0, "u": 1, "b": 6, "c": 5}


class Producer:
    """An array as another library would hand it over; counts how often it was let go. Fields may be made wrong."""

    def __init__(
        self,
        array: Array,
        *,
        versioned: bool,
        strides: bool = True,
        read_only: bool = False,
        major: int = 1,
        takes_version: bool = True,
        **fields: int,
    ) -> None:
        self.array, self.versioned, self.deleted, self.calls = array, versioned, 0, []
        self.takes_version = takes_version
        self.struct = ManagedVersioned() if versioned else Managed()
        code = 4 if array.dtype == ml_dtypes.bfloat16 else CODES[array.dtype.kind]
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(stride // array.itemsize for stride in array.strides))
        tensor = self.struct.tensor
        tensor.data, tensor.device_type, tensor.ndim = array.ctypes.data, CPU, array.ndim
        tensor.code, tensor.bits, tensor.lanes, tensor.shape = code, array.itemsize * 8, 1, self.shape
        if strides:
            tensor.strides = self.strides
        for name, value in fields.items():
            setattr(tensor, name, value)
        self.callback = DELETER(self.delete)
        self.struct.deleter = ctypes.cast(self.callback, ctypes.c_void_p)
        if versioned:
            self.struct.major, self.struct.flags = major, read_only

    def delete(self, address: int) -> None:
        assert address == ctypes.addressof(self.struct)
        self.deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.struct.tensor.device_type, self.struct.tensor.device_id

    def __dlpack__(self, **options: Any) -> Any:
        self.calls.append(options)
        if "max_version" in options and not self.takes_version:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return new_capsule(ctypes.addressof(self.struct), name, None)


class Wrapped:
    """NumPy's own capsules, without being an ndarray."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


ROWS = np.random.default_rng(0).standard_normal((1, 1, 20, 64)).astype(np.float32)


def pages_for(n: int = 20) -> Pages:
    return Pages(LAYOUT, [(0, 4, 4, range(n))])


def pack(keys: Any, values: Any = None, pages: Pages | None = None) -> Pages:
    pages = pages_for() if pages is None else pages
    _C.pack(pages.arena, keys, keys if values is None else values, *pages.index, LAYOUT, 1, 0, 0, 0, 0)
    return pages


EXPECTED = pack(ROWS).arena


def assert_refused(keys: Any, sentence: str, error: type[Exception] = ValueError) -> None:
    """As keys, this is refused with this sentence, and nothing is written."""
    pages = pages_for()
    with pytest.raises(error, match=rf"^pack: keys: {sentence}$"):
        pack(keys, ROWS, pages)
    assert (pages.arena == 0xA5).all()


# ---- ways in


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("strides", [True, False])
@pytest.mark.parametrize("takes_version", [True, False])
def test_capsules(versioned: bool, strides: bool, takes_version: bool) -> None:
    producer = Producer(ROWS, versioned=versioned, strides=strides, takes_version=takes_version)
    assert np.array_equal(pack(producer, ROWS).arena, EXPECTED)
    assert producer.deleted == 1
    assert producer.calls == [{"max_version": (1, 0)}] + ([] if takes_version else [{}])


def test_an_offset_and_a_transposed_view() -> None:
    memory = np.zeros((1, 22, 1, 64), np.float32)
    memory[:, 2:] = ROWS.transpose(0, 2, 1, 3)
    for versioned in (True, False):
        offset = Producer(memory[:, :20], versioned=versioned, byte_offset=2 * 64 * 4)
        view = Wrapped(memory[:, 2:].transpose(0, 2, 1, 3))
        offset.shape[:] = (1, 1, 20, 64)
        offset.strides[:] = (1, 1, 64, 1)
        assert np.array_equal(pack(offset, ROWS).arena, EXPECTED) and np.array_equal(pack(view, ROWS).arena, EXPECTED)


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_types_through_capsules(kind: Any) -> None:
    rows = ROWS.astype(kind)
    expected = pack(rows).arena
    for versioned in (True, False):
        assert np.array_equal(pack(Producer(rows, versioned=versioned), rows).arena, expected)


def test_exchange_table() -> None:
    """torch's tensors come in through its table of C functions: no capsule is made for them."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no DLPack exchange table")

    class Quiet(torch.Tensor):
        def __dlpack__(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("asked for a capsule")

    tensor = torch.from_numpy(ROWS.copy())
    assert np.array_equal(pack(tensor).arena, EXPECTED)
    assert np.array_equal(pack(tensor.as_subclass(Quiet)).arena, EXPECTED)
    assert np.array_equal(pack(torch.nn.Parameter(tensor)).arena, EXPECTED)
    count = sys.getrefcount(tensor)
    for _ in range(50):
        pack(tensor)
    assert sys.getrefcount(tensor) == count


def test_torch_tensors_without_memory() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert_refused(torch.empty(1, 1, 20, 64, device="meta"), "expected an exportable tensor, got a DLPack error: .*")
    assert_refused(torch.zeros(1, 1, 20, 64).to_sparse(), "expected an exportable tensor, got a DLPack error: .*")
    with FakeTensorMode():
        fake = torch.empty(1, 1, 20, 64)
    assert_refused(fake, "expected a tensor with memory, got a null address|expected an exportable tensor, got .*")
    assert_refused(
        torch.zeros(1, 1, 20, 64, dtype=torch.int8), "expected a plain float or integer type, got .*", TypeError
    )
    assert_refused(
        torch.zeros(1, 1, 20, 64, dtype=torch.float64), "expected float32, float16 or bfloat16, got float64", TypeError
    )


def test_many_types_of_tensors() -> None:
    """More types with a table, or without one, than are remembered."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for i in range(12):
        kind = type(f"Tensor{i}", (torch.Tensor,), {})
        assert np.array_equal(pack(torch.from_numpy(ROWS.copy()).as_subclass(kind)).arena, EXPECTED)
        wrapper = type(f"Wrapped{i}", (Wrapped,), {})
        assert np.array_equal(pack(wrapper(ROWS)).arena, EXPECTED)


def test_a_cuda_producer_is_asked_for_its_stream() -> None:
    producer = Producer(ROWS, versioned=True, device_type=CUDA, device_id=1)
    assert_refused(producer, r"expected the device of arena \(cpu:0\), got cuda:1")
    assert producer.calls == [{"stream": 1, "max_version": (1, 0)}] and producer.deleted == 1


def test_operations_without_cuda_refuse_cuda_tensors() -> None:
    producer = Producer(np.zeros(3, np.uint32), versioned=False, device_type=CUDA)
    with pytest.raises(ValueError, match=r"^arena: units: expected a CPU tensor, got one on cuda:0$"):
        _C.Arena(1 << 20).free(128, producer)
    assert producer.deleted == 1


# ---- wrong ones


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize(
    "fields, error, sentence",
    [
        ({"device_type": ROCM}, ValueError, "expected a CPU or CUDA tensor, got DLPack device type 10"),
        ({"ndim": 6}, ValueError, "expected at most 5 dimensions, got 6"),
        ({"ndim": -1}, ValueError, "expected at most 5 dimensions, got -1"),
        ({"ndim": 3}, ValueError, r"expected shape \(\*, \*, \*, 64\), got \(1, 1, 20\)"),
        ({"bits": 64}, TypeError, "expected float32, float16 or bfloat16, got float64"),
        ({"bits": 8}, TypeError, "expected a plain float or integer type, got DLPack type code 2 of 8 bits"),
        ({"code": 6}, TypeError, "expected a plain float or integer type, got DLPack type code 6 of 32 bits"),
        ({"lanes": 4}, TypeError, "expected a plain float or integer type, got DLPack type code 2 of 32 bits"),
        ({"data": 0}, ValueError, "expected a tensor with memory, got a null address"),
        ({"byte_offset": 2}, ValueError, "expected aligned elements, got address 0x[0-9a-f]+"),
    ],
)
def test_wrong_fields(versioned: bool, fields: dict[str, int], error: type[Exception], sentence: str) -> None:
    producer = Producer(ROWS, versioned=versioned, **fields)
    assert_refused(producer, sentence, error)
    assert producer.deleted == 1


def test_another_major_version() -> None:
    producer = Producer(ROWS, versioned=True, major=2)
    assert_refused(producer, "expected DLPack 1.x, got another major version")
    assert producer.deleted == 1


class Odd:
    """__dlpack__ that returns or raises what it is given."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __dlpack_device__(self) -> Any:
        raise RuntimeError("no device today")

    def __dlpack__(self, **_: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_odd_producers() -> None:
    consumed = ROWS.__dlpack__()
    np.from_dlpack(type("Once", (Odd,), {"__dlpack_device__": lambda self: (CPU, 0)})(consumed))
    for result in (None, 7, consumed, new_capsule(ROWS.ctypes.data, b"other", None)):
        assert_refused(Odd(result), r"expected a DLPack capsule, got another object from __dlpack__\(\)")
    assert_refused(Odd(BufferError("it is gone")), "expected an exportable tensor, got a DLPack error: it is gone")
    assert_refused(
        Odd(TypeError("no such argument")), "expected an exportable tensor, got a DLPack error: no such argument"
    )


@pytest.mark.parametrize("thing", [3, 1.5, "text", b"bytes", [1.0], {}, object(), np.float32(3), memoryview(b"1234")])
def test_no_tensors(thing: Any) -> None:
    if isinstance(thing, np.generic):
        assert_refused(thing, "expected a NumPy array or a DLPack tensor, got float32", TypeError)
    else:
        assert_refused(thing, f"expected a NumPy array or a DLPack tensor, got {type(thing).__name__}", TypeError)


def test_numpy_arrays_that_cannot_be_read() -> None:
    assert_refused(ROWS.astype(">f4"), "expected aligned elements in native byte order")
    raw = np.zeros(ROWS.nbytes + 1, np.uint8)
    assert_refused(raw[1:].view(np.float32).reshape(ROWS.shape), "expected aligned elements in native byte order")
    assert_refused(np.zeros((1, 1, 1, 1, 1, 64), np.float32), "expected at most 5 dimensions, got 6")
    pairs = np.zeros((1, 1, 20, 64), np.dtype([("a", "<f4"), ("b", "u1")], align=False))
    assert_refused(
        pairs["a"], "expected (aligned elements in native byte order|strides that are multiples of the element size)"
    )
    for kind, name in (
        (bool, "bool"),
        (np.int8, "int8"),
        (np.longdouble, "float128|longdouble"),
        ("U3", "<U3"),
        ("M8[s]", r"datetime64\[s\]"),
    ):
        assert_refused(np.zeros(ROWS.shape, kind), f"expected a plain float or integer array, got ({name})", TypeError)


# ---- outputs


def unpack_into(keys: Any, values: Any) -> None:
    pages = pages_for()
    pack(ROWS, pages=pages)
    _C.unpack(keys, values, pages.arena, *pages.index, LAYOUT, 1)


@pytest.mark.parametrize("how", ["numpy", "numpy capsule", "capsule"])
def test_read_only_outputs(how: str) -> None:
    out, other = np.full_like(ROWS, 77), np.full_like(ROWS, 77)
    if how != "capsule":
        out.flags.writeable = False
    target = {"numpy": out, "numpy capsule": Wrapped(out), "capsule": Producer(out, versioned=True, read_only=True)}[
        how
    ]
    for pair, name in (((target, other), "keys"), ((other, target), "values")):
        with pytest.raises(ValueError, match=rf"^unpack: {name}: expected a writable tensor, got a read-only one$"):
            unpack_into(*pair)
    assert (out == 77).all() and (other == 77).all()
    pack(target)  # reading it is fine
    if isinstance(target, Producer):
        assert target.deleted == len(target.calls)


def test_writing_through_capsules() -> None:
    expected = np.empty_like(ROWS), np.empty_like(ROWS)
    unpack_into(*expected)
    for versioned in (True, False):
        out, other = np.zeros_like(ROWS), np.zeros_like(ROWS)
        unpack_into(Producer(out, versioned=versioned), Producer(other, versioned=versioned))
        assert np.array_equal(out, expected[0]) and np.array_equal(other, expected[1])


def test_overlapping_outputs() -> None:
    memory = np.full(3 * ROWS.size, 77, np.float32)

    def part(first: int) -> Array:
        return memory[first : first + ROWS.size].reshape(ROWS.shape)

    for first in (0, 1, 64, ROWS.size - 1):
        with pytest.raises(ValueError, match=r"^unpack: keys: expected memory of its own, got an overlap with values$"):
            unpack_into(part(first), part(0))
        with pytest.raises(ValueError, match=r"^unpack: keys: expected memory of its own, got an overlap with values$"):
            unpack_into(part(0)[:, :, ::-1], part(first))
    assert (memory == 77).all()
    unpack_into(part(0), part(ROWS.size))
    assert (memory[2 * ROWS.size :] == 77).all() and not (memory[: 2 * ROWS.size] == 77).any()


def test_an_output_over_an_input() -> None:
    pages = pages_for()
    rows = pages.arena[: pages.arena.size // 4 * 4].view(np.float32)[: 64 * 4].reshape(1, 1, 4, 64)
    with pytest.raises(ValueError, match=r"^pack: arena: expected memory of its own, got an overlap with keys$"):
        pack(rows, np.zeros_like(rows), pages)


def test_broadcast_outputs() -> None:
    row = np.full((1, 1, 1, 64), 77, np.float32)
    broadcast = np.lib.stride_tricks.as_strided(row, ROWS.shape, (0, 0, 0, 4))
    sentence = r"expected an output whose elements are distinct, got a broadcast one \(a stride of 0\)"
    with pytest.raises(ValueError, match=rf"^unpack: keys: {sentence}$"):
        unpack_into(broadcast, np.zeros_like(ROWS))
    assert (row == 77).all()
    pack(np.broadcast_to(ROWS[:, :, :1], ROWS.shape))


# ---- one device


FLOAT, LISTS = np.dtype(np.float32), np.zeros((1, 4), np.int32)
ROW, TABLE, LEFT = np.zeros((1, 1, 1, 64), FLOAT), np.zeros((1, 4), np.uint64), np.full((1, 2), 4, np.int32)
STACKS = {"pool_tail": np.zeros((1, 8), np.uint32), "pool_packed": np.zeros((1, 4), np.uint32), "left": LEFT}
INDEX = {name: np.zeros(1, np.int32) for name in ("lists", "start", "tokens")}
BYTES, ONE = np.zeros(4096, np.uint8), np.ones(1, np.int32)
OPERATIONS: dict[str, tuple[dict[str, Array], tuple[Any, ...]]] = {
    "pack": (
        {"arena": BYTES, "keys": ROW, "values": ROW, "pages": np.zeros(1, np.uint64), **INDEX},
        (LAYOUT, 0, 0, 0, 0, 0),
    ),
    "unpack": (
        {"keys": ROW, "values": ROW, "arena": BYTES, "pages": np.zeros(1, np.uint64), **INDEX},
        (LAYOUT, 0),
    ),
    "append": (
        {"arena": BYTES, "table": TABLE, "lists": LISTS, **STACKS, "keys": ROW, "values": ROW, "valid": ONE}
        | {"classes": np.full((1, 2), 16, np.uint8)},
        (LAYOUT, 128, 0, 0, 0, 0, 0),
    ),
    "append_walk": (
        {"table": TABLE, "lists": LISTS, **STACKS, "valid": ONE, "classes": np.full((1, 2), 16, np.uint8)},
        (128, 1),
    ),
    "attend": (
        {"out": ROW, "mass": np.zeros((1, 4), FLOAT), "queries": ROW, "arena": BYTES, "table": TABLE, "lists": LISTS}
        | {"new_tokens": ONE, "workspace": BYTES},
        (LAYOUT, 0, 1.0, 0.0, 0, None, 0),
    ),
    "divide": ({"divisions": np.zeros((1, 64), np.int32), "tables": TABLE[None], "lists": LISTS[None]}, (LAYOUT,)),
    "score": (
        {"importance": np.zeros((1, 1, 1), FLOAT), "queries": ROW, "keys": ROW, "first": ONE, "workspace": BYTES},
        (1.0, 0.0, 0, 0, 1),
    ),
    "norms": ({"out": np.zeros((1, 1, 1), FLOAT), "rows": ROW, "first": ONE}, (0,)),
    "accumulate": (
        {"worth": np.zeros((1, 4), FLOAT), "mass": np.zeros((1, 4), FLOAT), "table": TABLE, "lists": LISTS},
        (1.0, 1.0),
    ),
    "select": (
        {"kept": np.zeros((1, 4), np.uint8), "importance": np.zeros((1, 4), FLOAT), "keep": ONE, "first": ONE}
        | {"workspace": BYTES},
        (0, 1),
    ),
}


def of_cuda(array: Array) -> Producer:
    """Says that it is a CUDA tensor; nobody is to read it."""
    return Producer(array.copy(), versioned=False, device_type=CUDA)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_tensor_lies_on_one_device(name: str) -> None:
    """One tensor of CUDA among CPU tensors, and one of the CPU among CUDA tensors: both are named."""
    arrays, rest = OPERATIONS[name]
    first, other, *_ = arrays
    for wrong in arrays:
        given = [of_cuda(array) if key == wrong else array.copy() for key, array in arrays.items()]
        got = rf"{wrong}: expected the device of {first} \(cpu:0\), got cuda:0"
        if wrong == first:
            got = rf"{other}: expected the device of {first} \(cuda:0\), got cpu:0"
        if name == "append_walk":
            got = f"{wrong}: expected a CPU tensor, got one on cuda:0"
        with pytest.raises(ValueError, match=rf"^{name}: {got}$"):
            getattr(_C, name)(*given, *rest)
        if wrong == first or name == "append_walk":
            continue
        given = [array.copy() if key == wrong else of_cuda(array) for key, array in arrays.items()]
        with pytest.raises(
            ValueError, match=rf"^{name}: {wrong}: expected the device of {first} \(cuda:0\), got cpu:0$"
        ):
            getattr(_C, name)(*given, *rest)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_asks_for_cuda(name: str) -> None:
    if _C.cuda_info()["runtime"]:
        pytest.skip("needs a build without CUDA")
    arrays, rest = OPERATIONS[name]
    producers = [of_cuda(array) for array in arrays.values()]
    error, got = _C.CudaError, "expected CUDA to be usable: cuda: library: expected libkvcomp_cuda.so"
    if name == "append_walk":
        error, got = ValueError, "table: expected a CPU tensor, got one on cuda:0"
    with pytest.raises(error, match=f"^{name}: {got}"):
        getattr(_C, name)(*producers, *rest)
    assert all(producer.deleted for producer in producers)


def test_what_only_cuda_takes() -> None:
    arrays, rest = OPERATIONS["divide"]
    with pytest.raises(ValueError, match=r"^divide: divisions: expected a CUDA tensor, got one on the CPU$"):
        _C.divide(*[array.copy() for array in arrays.values()], *rest)
    arrays, rest = OPERATIONS["attend"]
    for division, early, got in (
        (np.zeros(8, np.int32), 0, r"division: expected none on the CPU, got shape \(8,\)"),
        (None, 1, "early: expected 0, or 1 on CUDA, got 1"),
        (None, 2, r"early: expected an integer in 0\.\.1, got 2"),
    ):
        with pytest.raises(ValueError, match=rf"^attend: {got}$"):
            _C.attend(*[array.copy() for array in arrays.values()], *rest[:-2], division, early)


# ---- scalars and counts


NO_COUNT = ("set_threads", "threads", "cuda_info", "simd")


def test_numbers() -> None:
    assert _C.page_tokens(np.int64(4), True + 1) == 64
    for wrong in (4.0, "4", None, np.float32(4)):
        with pytest.raises(TypeError, match=rf"^page_tokens: k_bits: expected an integer, got {type(wrong).__name__}$"):
            _C.page_tokens(wrong, 4)  # type: ignore[arg-type]
    for wrong in (-1, 10**30, -(10**30)):
        with pytest.raises(ValueError, match=rf"^page_tokens: k_bits: expected an integer in 2\.\.16, got {wrong}$"):
            _C.page_tokens(wrong, 4)


@pytest.mark.parametrize("name", [name for name in sorted(vars(_C)) if name[0].islower() and name not in NO_COUNT])
def test_number_of_arguments(name: str) -> None:
    for arguments in ((), (None,) * 30):
        with pytest.raises(TypeError, match=rf"^{name}: expected \d+ positional arguments, got {len(arguments)}$"):
            getattr(_C, name)(*arguments)


def test_sizes_of_cuda_workspaces() -> None:
    """Numbers are looked at before CUDA is asked for."""
    with pytest.raises(ValueError, match=r"^attend_workspace_cuda: head_dim: expected an integer in 1\.\.256, got 0$"):
        _C.attend_workspace_cuda(1, 1, 1, 1, 0, 0)
    with pytest.raises(ValueError, match=r"^divide_words: device: expected an integer in 0\.\.2147483647, got -1$"):
        _C.divide_words(1, -1)
    if not _C.cuda_info()["runtime"]:
        for function, arguments in ((_C.attend_workspace_cuda, (1, 1, 1, 1, 64, 0)), (_C.divide_words, (1, 0))):
            with pytest.raises(
                _C.CudaError, match=rf"^{function.__name__}: expected CUDA to be usable: cuda: library: "
            ):
                function(*arguments)
    elif not _C.cuda_info()["available"]:
        with pytest.raises(_C.CudaError, match=r"^divide_words: device: expected a CUDA device's number, got 0$"):
            _C.divide_words(1, 0)


def test_threads_are_checked() -> None:
    before = _C.threads()
    for wrong, error in ((0, ValueError), (65, ValueError), (1.5, TypeError), ("2", TypeError)):
        with pytest.raises(error, match=r"^set_threads: threads: expected an integer"):
            _C.set_threads(wrong)  # type: ignore[arg-type]
    assert _C.threads() == before


# ---- nothing is kept


def test_references_are_given_back() -> None:
    """After calls that work and calls that fail in every stage, no argument is held."""
    pages, keys, values, bad = pages_for(), ROWS.copy(), ROWS.copy(), np.zeros((1, 1))
    index = pages.index
    watched = [keys, values, bad, pages.arena, *index]
    counts = [sys.getrefcount(x) for x in watched]
    for _ in range(20):
        _C.pack(pages.arena, keys, values, *index, LAYOUT, 1, 0, 0, 0, 0)
        for arguments in (
            (pages.arena, keys, bad, *index, LAYOUT, 1, 0, 0, 0, 0),
            (pages.arena, keys, values, *index, LAYOUT, 5, 0, 0, 0, 0),
            (pages.arena, keys, None, *index, LAYOUT, 1, 0, 0, 0, 0),
            (keys, keys, values, *index, LAYOUT, 1, 0, 0, 0, 0),
            (pages.arena, keys, values, *index, (1, 2), 1, 0, 0, 0, 0),
        ):
            with pytest.raises((TypeError, ValueError)):
                _C.pack(*arguments)
    del arguments
    assert [sys.getrefcount(x) for x in watched] == counts


def test_capsules_outlive_nothing() -> None:
    producer = Producer(ROWS, versioned=True)
    gone = weakref.ref(producer)
    pack(producer, ROWS)
    with pytest.raises(TypeError):
        pack(producer, ROWS.astype(np.float64))
    assert producer.deleted == 2
    del producer
    gc.collect()
    assert gone() is None
