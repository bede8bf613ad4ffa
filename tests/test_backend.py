"""The CUDA library's absence in all its forms: nothing fails but what asks for CUDA, and that says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvcomp import _C
from kvcomp.env import environment, environment_rows

EXTENSION = Path(_C.__file__)
LIBRARY = EXTENSION.with_name("libkvcomp_cuda.so")
SOURCES = Path(__file__).parents[1] / "csrc"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

# Loads the copy of the extension in the current folder as kvcomp._C.
PRELUDE = f"""
import importlib.util, json, os
spec = importlib.util.spec_from_file_location("kvcomp._C", os.path.abspath({EXTENSION.name!r}))
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
"""

# A library with a table of our own making.
TABLE = """
#include "kvcomp/backend.h"
static int device_count(const char **why) { *why = COUNT ? 0 : "cuda: devices: none today"; return COUNT; }
static int runtime_version(void) { return 13000; }
static int driver_version(void) { return 13010; }
static const char *device_name(int device, int *capability) {
    *capability = 80 + 10 * device;
    return device ? "B" : "A";
}
const kvc_backend *kvc_cuda_backend(void) {
    static const kvc_backend table = {KVC_BACKEND_API + API, KVC_FORMAT_VERSION + FORMAT, "80,90a", device_count,
                                      runtime_version, driver_version, device_name};
    return &table;
}
"""

# An object that says it is a CUDA tensor (DLPack, legacy capsule). Its address is never read.
PRETENDER = """
import ctypes
class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int * 2), ("ndim", ctypes.c_int),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
                ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]
capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
class Pretender:
    def __init__(self, code, bits, *shape):
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor = Tensor(Pretender.address, (2, 0), len(shape), code, bits, 1, self.shape)
        Pretender.address += 1 << 20
    address = 1 << 20
    def __dlpack_device__(self):
        return 2, 0
    def __dlpack__(self, **_):
        return capsule(ctypes.addressof(self.tensor), b"dltensor", None)
rows = [Pretender(2, 32, 1, 1, 4, 64) for _ in range(2)]
index = [Pretender(1, 64, 1), Pretender(0, 32, 1), Pretender(0, 32, 1), Pretender(0, 32, 4)]
try:
    _C.pack(Pretender(1, 8, 1 << 16), *rows, *index, (64, 64, 1, 1, 0), 0, 0, 0, 0, 0)
except _C.CudaError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def beside(tmp_path: Path) -> Callable[[str], Any]:
    """Runs code in a process of its own on a copy of the extension, beside what the test puts into tmp_path; what the
    code printed, as JSON."""
    shutil.copy(EXTENSION, tmp_path)

    def run(code: str = "print(json.dumps(_C.cuda_info()))") -> Any:
        result = subprocess.run([sys.executable, "-c", PRELUDE + code], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def compile_library(folder: Path, source: str, *defines: str) -> None:
    (folder / "library.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-I", str(SOURCES), *[f"-D{define}" for define in defines]]
    subprocess.run([*command, str(folder / "library.c"), "-o", str(folder / LIBRARY.name)], check=True)


def test_not_built(beside: Callable[..., Any]) -> None:
    assert beside() == {
        "available": False,
        "why": "cuda: library: expected libkvcomp_cuda.so beside the extension module, "
        "got a build without CUDA (no nvcc was found, or KVCOMP_CUDA=OFF)",
        "architectures": None,
        "runtime": 0,
        "driver": 0,
        "devices": [],
    }


def test_not_loadable(beside: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / LIBRARY.name).write_bytes(b"\x7fELF, and then nothing")
    found = beside()
    assert not found["available"]
    assert found["why"].startswith("cuda: library: expected a loadable libkvcomp_cuda.so, got: ")
    assert str(tmp_path / LIBRARY.name) in found["why"]


@needs_compiler
def test_another_library(beside: Callable[..., Any], tmp_path: Path) -> None:
    compile_library(tmp_path, "int kvc_something_else;")
    why = beside()["why"]
    assert why == f"cuda: library: expected {tmp_path / LIBRARY.name} to export kvc_cuda_backend, got another library"


@needs_compiler
@pytest.mark.parametrize("api, layout", [(1, 0), (0, 1), (1, 1)])
def test_another_version(beside: Callable[..., Any], tmp_path: Path, api: int, layout: int) -> None:
    compile_library(tmp_path, TABLE, "COUNT=1", f"API={api}", f"FORMAT={layout}")
    found = beside()
    assert not found["available"] and found["architectures"] is None
    version = _C.FORMAT_VERSION
    assert f"expected interface 4 and page format {version} in " in found["why"]
    assert found["why"].endswith(f"got {4 + api} and {version + layout}: build kvcomp again")


@needs_compiler
@pytest.mark.parametrize("count", [0, 2])
def test_the_table_is_asked(beside: Callable[..., Any], tmp_path: Path, count: int) -> None:
    compile_library(tmp_path, TABLE, f"COUNT={count}", "API=0", "FORMAT=0")
    assert beside() == {
        "available": count > 0,
        "why": None if count else "cuda: devices: none today",
        "architectures": "80,90a",
        "runtime": 13000,
        "driver": 13010,
        "devices": [["A", 80], ["B", 90]][:count],
    }


@needs_compiler
def test_the_first_answer_stays(beside: Callable[..., Any], tmp_path: Path) -> None:
    compile_library(tmp_path, TABLE, "COUNT=1", "API=0", "FORMAT=0")
    code = "first = _C.cuda_info(); os.remove('libkvcomp_cuda.so'); print(json.dumps([first, _C.cuda_info()]))"
    first, second = beside(code)
    assert first["available"] and first == second


def test_threads_agree(beside: Callable[..., Any]) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(16) as pool:
    print(json.dumps([f.result() for f in [pool.submit(_C.cuda_info) for _ in range(64)]]))"""
    answers = beside(code)
    assert len(answers) == 64 and all(answer == answers[0] and answer["why"] for answer in answers)


def test_a_cuda_tensor_without_the_library(beside: Callable[..., Any]) -> None:
    assert beside(PRETENDER).startswith("pack: expected CUDA to be usable: cuda: library: expected libkvcomp_cuda.so")


@needs_library
def test_a_cuda_tensor_without_a_driver(beside: Callable[..., Any], tmp_path: Path) -> None:
    if _C.cuda_info()["driver"]:
        pytest.skip("needs a machine without an NVIDIA driver")
    shutil.copy(LIBRARY, tmp_path)
    assert beside(PRETENDER).startswith("pack: CUDA: expected a launch, got cudaError")


@needs_library
def test_no_driver_or_no_device() -> None:
    code = "import json; from kvcomp import _C; print(json.dumps(_C.cuda_info()))"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=hidden, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert not found["available"] and found["devices"] == []
    assert found["architectures"] and found["runtime"] >= 12000
    if found["driver"]:
        assert found["why"] == "cuda: devices: expected at least one NVIDIA GPU, got none (CUDA_VISIBLE_DEVICES is set)"
    else:
        assert found["why"] == "cuda: driver: expected an NVIDIA driver, got none"


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_one_symbol_is_exported() -> None:
    listing = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["kvc_cuda_backend"]


def test_import_touches_no_cuda() -> None:
    code = "import kvcomp, kvcomp._C; print(open('/proc/self/maps').read())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "_C.abi3.so" in result.stdout
    assert "libkvcomp_cuda" not in result.stdout and "libcuda" not in result.stdout


def test_environment() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["kvcomp"] == _C.VERSION and found["cpu"]["threads"] == _C.threads()
    assert (found["backend"] == "cpu") == (found["cuda"]["why"] is not None)
    assert found["cuda"]["built"] == LIBRARY.exists()
    rows = dict(environment_rows(found))
    assert rows["backend"] == found["backend"]
    assert rows.get("no CUDA because") == found["cuda"]["why"]


def test_environment_rows_of_a_gpu() -> None:
    found = environment()
    found["cuda"] = {
        "built": True,
        "architectures": ["80", "90a"],
        "runtime": "13.0",
        "driver": "12.4",
        "devices": [{"name": "NVIDIA H200", "compute_capability": "9.0"}],
        "why": None,
    }
    rows = dict(environment_rows({**found, "backend": "cuda"}))
    assert rows["cuda library"] == "for 80, 90a with CUDA 13.0"
    assert rows["cuda driver"] == "for CUDA 12.4"
    assert rows["cuda:0"] == "NVIDIA H200, compute capability 9.0"
    assert "no CUDA because" not in rows


@pytest.mark.parametrize("rich", [True, False])
def test_environment_without_the_extras(rich: bool) -> None:
    missing = ["torch", "transformers"] + ([] if rich else ["rich"])
    code = f"""
import sys
for name in {missing}:
    sys.modules[name] = None
from kvcomp.env import print_environment
print_environment()"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "backend" in result.stdout and _C.VERSION in result.stdout
