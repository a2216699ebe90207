#!/usr/bin/env bash
# Checks polder beside other Rust frameworks: formatting, lints and documentation of the crates here, candle's tests and
# example, the example with burn, and where nvcc is found (NVCC or PATH) candle's half for CUDA and cust's tests on the
# stand-in driver. Prints the time of each.
#
#   interop/run.sh
set -euo pipefail
cd "$(dirname "$0")"
# cust only looks for this folder to be built; cust/tests/run.sh has a driver in it.
export CUDA_LIBRARY_PATH=$PWD/target/no-driver CARGO_PROFILE_RELEASE_DEBUG=false
mkdir -p "$CUDA_LIBRARY_PATH/lib64"
NVCC=${NVCC:-$(command -v nvcc || true)}
# The same variables everywhere, so that polder is built once.
[ -z "$NVCC" ] || export NVCC POLDER_REQUIRE_CUDA=1

timed() {
    local started=$SECONDS
    printf '\n=== %s\n' "$*"
    "$@"
    printf -- '--- %s: %d s\n' "$*" $((SECONDS - started))
}

timed cargo fmt --all --check
timed cargo test --release -p polder-candle
timed cargo run --release -p polder-candle --example mlp
timed cargo run --release -p polder-burn
if [ -n "$NVCC" ]; then
    timed candle/check_cuda.sh
    timed cust/tests/run.sh
else
    echo "nvcc is not there: the check of candle's CUDA half and the tests with cust are skipped"
fi
timed cargo clippy --release --workspace --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" timed cargo doc --release --workspace --no-deps
