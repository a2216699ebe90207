#!/usr/bin/env bash
# Builds the C and C++ programs with every compiler that is there (gcc, clang), strictly, and runs them alone, under
# AddressSanitizer and under valgrind. Also checks the exported symbols.
#
#   bindings/c/tests/run.sh [--built]    with --built the library is already there
set -euo pipefail
cd "$(dirname "$0")/../../.."
# With polder itself, so that both have its features and one build of the kernels.
[ "${1-}" = --built ] || cargo build --release -p polder -p polder-capi
library=$PWD/target/release
to=$PWD/target/c
mkdir -p "$to"
export LD_LIBRARY_PATH=$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

other=$(nm -D --defined-only "$library/libpolder_capi.so" | awk '$2 ~ /[TDBR]/ && $3 !~ /^polder_/ { print $3 }')
[ -z "$other" ] || { printf 'symbols that are exported beside polder_*:\n%s\n' "$other" >&2; exit 1; }

strict=(-Wall -Wextra -Werror -Wpedantic -O1 -g -I bindings/c/include)
here=bindings/c
build() {
    local compiler=$1 cxx=$2 suffix=$3
    shift 3
    for program in examples/quadratic tests/misuse tests/resume; do
        "$compiler" -std=c99 -D_POSIX_C_SOURCE=200809L "${strict[@]}" "$@" "$here/$program.c" -L "$library" \
            -lpolder_capi -lm -pthread -o "$to/$(basename "$program")$suffix"
    done
    "$cxx" -std=c++17 "${strict[@]}" "$@" "$here/examples/network.cpp" -L "$library" -lpolder_capi -o "$to/network$suffix"
}
run() {
    for program in quadratic network misuse resume; do
        "${@:2}" "$to/$program$1" >"$to/out.txt" || { cat "$to/out.txt"; echo "$program$1 failed" >&2; exit 1; }
    done
}

for pair in gcc:g++ clang:clang++; do
    compiler=${pair%%:*}
    command -v "$compiler" >/dev/null || { echo "$compiler is not there: skipped"; continue; }
    build "$compiler" "${pair##*:}" "-$compiler"
    run "-$compiler"
    echo "$compiler: passed"
done
cat "$to/out.txt"

# The library itself is not instrumented; its allocations and those of the programs are watched.
build gcc g++ -asan -fsanitize=address,undefined -fno-sanitize-recover=undefined
run -asan
echo "AddressSanitizer: passed"

# valgrind knows no AVX-512.
if command -v valgrind >/dev/null; then
    POLDER_ISA=avx2 run -gcc valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite
    echo "valgrind: passed"
else
    echo "valgrind is not there: skipped"
fi
