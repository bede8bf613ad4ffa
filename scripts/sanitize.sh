#!/usr/bin/env bash
# The tests of the C core under AddressSanitizer and UndefinedBehaviorSanitizer, in an environment that has the tests'
# packages. Builds into build/sanitize; the installed package is left alone. Arguments go to pytest; `build` does no more
# than that.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/sanitize
mkdir -p build
cmake -S . -B "$build" -DKVCOMP_SANITIZE=ON -DKVCOMP_WERROR=ON -DKVCOMP_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DPython_EXECUTABLE="$(command -v python)" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" -j "$(nproc)" >>"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
rm -rf "$build/package" && mkdir -p "$build/package"
cp -r python/kvcomp "$build/package/"
cp "$build/_C.abi3.so" "$build/package/kvcomp/"
[ "${1-}" != build ] || exit 0

# Leaks are not looked for: the interpreter's own would drown ours. Left out is what compares plans and scales with the
# best there are, which Python looks for, 20 times as long here: other tests take the same ways through the C core.
tests=(-k "not optimum and not as_good_as" tests/test_{append,arena,args,attend,bsr,decode_policy,format,fuzz,pack,parallel,plan,policy,prompt,rotate,score,select,shrink,store,w4}.py)
# libubsan brings in libstdc++, without which libasan meets exceptions of torch that it cannot pass on. tests/conftest.py
# imports KVCOMP_PACKAGE.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 KVCOMP_PACKAGE="$build/package" \
    python -m pytest -q -n auto --dist worksteal -p no:cacheprovider "${@:-${tests[@]}}"
