#!/usr/bin/env bash
# Runs tests on a GPU without a GPU: builds the stand-in driver (README.md) for the kernels that cargo builds, then runs
# the tests that depend on it most, or one test program (`polder` is the library's) with its arguments, or trains for a
# step and counts the accesses of its kernels to memory. Needs nvcc, cuobjdump in the same folder, g++ and Python.
#
#   run.sh [PROGRAM [ARGUMENT...]]
#   run.sh --count [TRAINING OPTION...]
#   run.sh --faults
set -euo pipefail
cd "$(dirname "$0")/../.."
NVCC=${NVCC:-$(command -v nvcc)} || { echo "nvcc was not found (NVCC, PATH)" >&2; exit 1; }
export NVCC POLDER_REQUIRE_CUDA=1
to=$PWD/target/driver
rm -rf "$to"
mkdir -p "$to"

# A line for each test program, with its name and path, and one for the folder of the fatbins that all of them contain.
cargo test --release --no-run --message-format json-render-diagnostics >"$to/cargo.json"
built=$(python3 - "$to/cargo.json" <<'END'
import json, sys

messages = [json.loads(line) for line in open(sys.argv[1])]
programs = [each for each in messages if each["reason"] == "compiler-artifact" and each["executable"]]
tests = [each for each in programs if each["profile"]["test"]]
for test in tests:
    print(test["target"]["name"], test["executable"])
for each in programs:
    if each["target"]["name"] == "polder" and not each["profile"]["test"]:
        print("program", each["executable"])
for each in messages:
    if each["reason"] == "build-script-executed" and each["package_id"] == tests[0]["package_id"]:
        print("fatbins", each["out_dir"])
END
)
path_of() { awk -v name="$1" '$1 == name { print $2; found = 1 } END { exit !found }' <<<"$built"; }
tests/driver/build.sh "$to" "$(path_of fatbins)"
export LD_LIBRARY_PATH=$to${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} DRIVER_IMAGES=$to
export POLDER_TEST_DEVICE=cuda:0 POLDER_TEST_ONLY=1
"$(path_of cuda)" --nocapture the_description 2>&1 | grep "interpreted PTX"

run() {
    local program
    program=$(path_of "$1") || { echo "no test program $1" >&2; exit 1; }
    printf '\n%s\n' "$*"
    shift
    local filter
    for filter in "$@"; do
        [[ $filter = -* ]] && continue
        "$program" --list "$filter" | grep ': test$' >/dev/null || { echo "no test is called $filter" >&2; exit 1; }
    done
    "$program" "$@"
}

# faulty KERNELS EDIT PROGRAM FILTER MESSAGE: with this edit of the PTX the program must end with the message. Otherwise
# the tests would prove nothing.
faulty() {
    local kernels=$1 edit=$2 message=$5
    set -- "$3" "$4"
    sed -i.right "$edit" "$to/$kernels.ptx"
    if cmp -s "$to/$kernels.ptx" "$to/$kernels.ptx.right"; then
        echo "$kernels.ptx: nothing is like $edit" >&2
        exit 1
    fi
    # In a subshell, because a fault ends the process.
    if (run "$@") >"$to/faulty.log" 2>&1 || ! grep -q "$message" "$to/faulty.log"; then
        echo "$kernels.ptx with $edit: '$message' was expected, not" >&2
        tail -n 20 "$to/faulty.log" >&2
        exit 1
    fi
    mv "$to/$kernels.ptx.right" "$to/$kernels.ptx"
    echo "$kernels.ptx with $edit: $message"
}

# A data set of random images: five of four for training, and one of four for testing.
make_images() {
    [ -d "$to/images" ] || python3 - "$to/images" <<'END'
import pathlib, random, sys

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
random.seed(0)
for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
    images = [bytes([random.randrange(10)]) + random.randbytes(3072) for _ in range(4)]
    (folder / f"{name}.bin").write_bytes(b"".join(images))
END
}

# Trains on random images for one step and for two, and prints the accesses to memory of the second step. All other work
# (the measurement of tiles, the evaluation of test images) is the same in both.
count() {
    make_images
    local program steps
    program=$(path_of program)
    for steps in 1 2; do
        DRIVER_COUNT=$to/count-$steps "$program" train --device cuda --data "$to/images" --batch-size 4 \
            --steps $steps "$@"
    done
    python3 tests/driver/count.py "$to/count-2" "$to/count-1" "${limits[@]}"
}
limits=()

# told FOLDER STATUS MESSAGE SETTING=VALUE: with this setting of the driver, an epoch of five steps, all but the first
# recorded, ends with this status and says this. The variable `device` names a device other than `cuda`.
told() {
    local out=$1 wanted=$2 message=$3 status=0
    shift 3
    env "$@" "$(path_of program)" train --device "${device:-cuda}" --data "$to/images" --model resnet8 --batch-size 4 \
        --epochs 1 --optimizer sam --out "$to/$out" >"$to/$out.log" 2>&1 || status=$?
    if [ $status -ne "$wanted" ] || ! grep -q "$message" "$to/$out.log"; then
        echo "$*: status $wanted and '$message' were expected, not $status and" >&2
        tail -n 20 "$to/$out.log" >&2
        exit 1
    fi
    echo "$*: $message"
}

# What a driver may do, and what training makes of it.
faults() {
    make_images
    told usual 0 "132 multiprocessors" DRIVER_MOST_GRAPHS=2
    told ahead 134 "1 graphs wait already" DRIVER_MOST_GRAPHS=1
    told early 0 "kernels are not launched early" DRIVER_FAULT=no-early-graph
    told eager 0 "steps cannot be recorded" DRIVER_FAULT=no-graph
    told lost 1 "a kernel that ran earlier on the GPU failed" DRIVER_FAILING_LAUNCH=300
    local count
    for count in 16 108 114; do
        told $count 0 "$count multiprocessors" DRIVER_MULTIPROCESSORS=$count
    done
    device=auto told old 2 "it is for CUDA 12.9, 13.0 is needed" DRIVER_VERSION=12090
    device=auto told taken 2 "no device cuda:0" DRIVER_FAULT=exclusive
    device=auto told binary 2 "cannot be loaded" DRIVER_FAULT=no-binary
    device=auto told absent 0 "no GPU: the CUDA driver finds no GPU" DRIVER_FAULT=no-gpu
    local out
    for out in early eager 16 108 114; do
        cmp "$to/usual/model.safetensors" "$to/$out/model.safetensors"
    done
}

if [ "${1-}" = --count ]; then
    count "${@:2}"
elif [ "${1-}" = --faults ]; then
    faults
elif [ $# -gt 0 ]; then
    run "$@"
else
    faulty layers 's/^bar\.sync/\/\/ &/' kernels layers::linear "a race"
    faulty conv_tensor 's/wait_group 2;/wait_group 3;/' polder no_tile_changes_a_bit "a race"
    faulty conv_tensor 's/m8n8\.x4\.trans/m8n8.x4/' polder equals_the_definition_in_half " instead of "
    faulty vector 's/^\(st\.global\.f32 \[%rd[0-9]*\)\]/\1+4096]/' kernels vector::sgd "which is outside of every allocation"
    run cuda
    run device
    run kernels
    run polder kernels:: train::run:: train::evaluate:: device::cuda
    run networks plan:: precision::weights_are_rounded families::tiny_members methods::sampa
    # Other orders of blocks, warps and streams.
    DRIVER_SEED=1 run kernels batch_norm:: vector::norm
    printf '\nfaults of a driver\n'
    faults
    # Convolutions on tensor cores have almost no bank conflicts, and except for the first layer access little more than
    # the minimum.
    printf '\naccesses to memory in a step\n'
    limits=(--limits conv_tensor 1.3 1.01)
    count --model resnet8 --precision f16
fi
