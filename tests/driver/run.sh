#!/usr/bin/env bash
# Runs tests on a GPU that is none: builds the stand-in driver (README.md) for the kernels that cargo builds, then runs what has most to
# see there, or one test program (`polder` is the library's own) with its arguments; or trains for a step and counts what its kernels
# ask of memory. Needs nvcc, cuobjdump beside it, g++ and Python.
#
#   run.sh [PROGRAM [ARGUMENT...]]
#   run.sh --count [TRAINING OPTION...]
set -euo pipefail
cd "$(dirname "$0")/../.."
NVCC=${NVCC:-$(command -v nvcc)} || { echo "nvcc was not found (NVCC, PATH)" >&2; exit 1; }
export NVCC POLDER_REQUIRE_CUDA=1
tools=$(dirname "$NVCC")
to=$PWD/target/driver
rm -rf "$to"
mkdir -p "$to"

# A line for each test program, its name and its path, and one for the folder of the fatbins that all of them hold.
cargo test --release --no-run --message-format json-render-diagnostics >"$to/cargo.json"
built=$(python3 - "$to/cargo.json" <<'END'
import json, sys

messages = [json.loads(line) for line in open(sys.argv[1])]
tests = [each for each in messages if each["reason"] == "compiler-artifact" and each["executable"] and each["profile"]["test"]]
for test in tests:
    print(test["target"]["name"], test["executable"])
for each in messages:
    if each["reason"] == "compiler-artifact" and each["executable"] and each["target"]["name"] == "polder" and not each["profile"]["test"]:
        print("program", each["executable"])
    if each["reason"] == "build-script-executed" and each["package_id"] == tests[0]["package_id"]:
        print("fatbins", each["out_dir"])
END
)
path_of() { awk -v name="$1" '$1 == name { print $2; found = 1 } END { exit !found }' <<<"$built"; }
fatbins=$(path_of fatbins)

# Contraction is off, for PTX says itself where it multiplies and adds with one rounding, and its integers wrap.
flags=(-std=c++20 -O3 -mavx2 -mfma -mf16c -ffp-contract=off -fwrapv -fno-strict-aliasing -fPIC -Wall -Wextra -Werror)
for source in tests/driver/*.cpp; do
    g++ "${flags[@]}" -I "$tools/../include" -c "$source" -o "$to/$(basename "$source" .cpp).o" &
    building+=($!)
done
for fatbin in "$fatbins"/*.fatbin; do
    cp "$fatbin" "$to"
    "$tools/cuobjdump" -ptx "$fatbin" >"$to/$(basename "$fatbin" .fatbin).ptx"
done
for one in "${building[@]}"; do wait "$one"; done
g++ -shared -o "$to/libcuda.so.1" "$to"/*.o -pthread
# The name that is looked for first, so that no real driver is found before it.
ln -s libcuda.so.1 "$to/libcuda.so"
export LD_LIBRARY_PATH=$to${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} DRIVER_IMAGES=$to POLDER_TEST_DEVICE=cuda:0 POLDER_TEST_ONLY=1
"$(path_of cuda)" --nocapture the_description 2>&1 | grep "interpreted PTX"

run() {
    local program
    program=$(path_of "$1") || { echo "no test program $1" >&2; exit 1; }
    printf '\n%s\n' "$*"
    shift
    local filter
    for filter in "$@"; do
        [[ $filter = -* ]] || "$program" --list "$filter" | grep ': test$' >/dev/null || { echo "no test is called $filter" >&2; exit 1; }
    done
    "$program" "$@"
}

# faulty KERNELS EDIT PROGRAM FILTER MESSAGE: with so edited PTX the program must end with the message, or the tests prove nothing.
faulty() {
    local kernels=$1 edit=$2 message=$5
    set -- "$3" "$4"
    sed -i.right "$edit" "$to/$kernels.ptx"
    if cmp -s "$to/$kernels.ptx" "$to/$kernels.ptx.right"; then
        echo "$kernels.ptx: nothing is like $edit" >&2
        exit 1
    fi
    # In a process of its own, for a fault ends it.
    if (run "$@") >"$to/faulty.log" 2>&1 || ! grep -q "$message" "$to/faulty.log"; then
        echo "$kernels.ptx with $edit: '$message' was expected, not" >&2
        tail -n 20 "$to/faulty.log" >&2
        exit 1
    fi
    mv "$to/$kernels.ptx.right" "$to/$kernels.ptx"
    echo "$kernels.ptx with $edit: $message"
}

# Trains on images of rubbish for a step and for two, and tells what the second step asked of memory: the rest, tiles measured and test
# images evaluated, is the same in both.
count() {
    python3 - "$to/images" <<'END'
import pathlib, random, sys

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
random.seed(0)
for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
    (folder / f"{name}.bin").write_bytes(b"".join(bytes([random.randrange(10)]) + random.randbytes(3072) for _ in range(4)))
END
    local program steps
    program=$(path_of program)
    for steps in 1 2; do
        DRIVER_COUNT=$to/count-$steps "$program" train --device cuda --data "$to/images" --batch-size 4 --steps $steps "$@"
    done
    python3 tests/driver/count.py "$to/count-2" "$to/count-1" "${limits[@]}"
}
limits=()

if [ "${1-}" = --count ]; then
    count "${@:2}"
elif [ $# -gt 0 ]; then
    run "$@"
else
    faulty layers 's/^bar\.sync/\/\/ &/' kernels layers::linear "a race"
    faulty conv_tensor 's/wait_group 2;/wait_group 3;/' polder no_tile_changes_a_bit "a race"
    faulty conv_tensor 's/m8n8\.x4\.trans/m8n8.x4/' polder equals_the_definition_in_half " instead of "
    faulty vector 's/^\(st\.global\.f32 \[%rd[0-9]*\)\]/\1+4096]/' kernels vector::sgd "which is nobody's"
    run cuda
    run device
    run kernels
    run polder kernels:: train::run::
    run networks plan:: precision::weights_are_rounded
    # Other orders of blocks, warps and streams.
    DRIVER_SEED=1 run kernels batch_norm:: vector::norm
    # Convolutions on tensor cores meet hardly a bank conflict, and but for the first layer ask for hardly more than they need.
    printf '\nwhat a step asks of memory\n'
    limits=(--limits conv_tensor 1.3 1.01)
    count --model resnet8 --precision f16
fi
