#!/usr/bin/env bash
# Runs a bundle (bundle.sh) on the first GPU: everything that a first hour on a GPU should tell, in the order of its
# value. One call takes at most RUN_SECONDS (default 530). Call it again with the same RESULTS until it says that
# nothing is left: what has passed or failed is not run again, and training goes on where it was.
#
#   run.sh RESULTS [STAGE...]
#
#   tests           all tests, as the driver launches kernels, and without early launches
#   memory          the kernels' tests under compute-sanitizer's memcheck
#   benches         fusions, steps and kernels; vectors and batch norm as shares of a copy, convolutions in f16 of `mma`
#   peers           PyTorch's eager and captured forms, paired with ours
#   peers-compiled  its compiled forms, each in a process of its own
#   train           ResNet-18 on CIFAR-10 with SGD, SAM and CR-SAM, 200 epochs each; RUN_DATA is the folder of CIFAR-10
#   races           the kernels' tests under racecheck and synccheck
#
# At the end of each call it prints a table, and writes it and all measurements to RESULTS/DATE-DEVICE.json, from which
# docs/results.md is made. Full logs are in RESULTS. It needs Python, and for their stages compute-sanitizer and PyTorch.
# RUN_AGAIN=1 forgets what has failed, so that this call and the next ones run it again.
set -u

stages="tests memory benches peers peers-compiled train races"
deadline=$((SECONDS + ${RUN_SECONDS:-530}))
[ $# -ge 1 ] || { echo "usage: $0 RESULTS [STAGE...], of $stages" >&2; exit 2; }
for stage in "${@:2}"; do
    case " $stages " in *" $stage "*) ;; *) echo "$stage: unknown stage, expected one of: $stages" >&2; exit 2 ;; esac
done
data=${RUN_DATA:+$(realpath "$RUN_DATA")}
mkdir -p "$1/logs" "$1/peers" || exit 1
results=$(cd "$1" && pwd)
asked=" ${*:2} "
[ $# -gt 1 ] || asked=" $stages "
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
python3 - "$(dirname "$0")/payload.tar.xz" "$unpacked" <<'EOF' || exit 1
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2])
EOF
cd "$unpacked" || exit 1
rows=$results/rows.tsv # stage, name, status, seconds; of equal names the last counts
touch "$rows"
[ -z "${RUN_AGAIN-}" ] || sed -i -E '/\t(FAILED [0-9]+|timeout|missing)\t/d' "$rows"
left=0
first=1 # whether nothing has run in this call
child=
trap '[ -z "$child" ] || kill -INT $child; exit 130' INT TERM

# Only the GPU: the CPU's emulation of a GPU is tested on machines without one.
export POLDER_TEST_DEVICE=cuda:0 POLDER_TEST_ONLY=1
export POLDER_FIXTURES=$PWD/tests/fixtures
export CRITERION_HOME=$results/criterion TORCHINDUCTOR_CACHE_DIR=$results/inductor

status_of() { awk -F '\t' -v stage="$stage" -v name="$1" '$1 == stage && $2 == name { found = $3 } END { print found }' "$rows"; }
row() { printf '%s\t%s\t%s\t%s\n' "$stage" "$1" "$2" "$3" >>"$rows"; }

# run NAME SECONDS COMMAND...: runs a command of the present stage, unless that is done. It has so many seconds, or
# until the end of the call. If it could not have them all, it is left for the next call, which begins with it. With
# `on` for the seconds it goes on from call to call: a training run, which is stopped by one signal and saves its state.
run() {
    local name=$1 limit=$2 start=$SECONDS status alone=
    shift 2
    case $(status_of "$name") in ok | FAILED* | timeout) return ;; esac
    local rest=$((deadline - SECONDS - 10)) given=$limit
    [ "$limit" != on ] || given=$rest alone=--foreground
    [ "$rest" -ge "$given" ] || given=$rest
    if [ "$given" -lt 5 ]; then
        left=$((left + 1))
        return
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >>"$results/logs/$stage.log"
    timeout $alone -s INT -k 10 "$given" "$@" </dev/null >>"$results/logs/$stage.log" 2>&1 &
    child=$!
    wait $child
    status=$?
    child=
    if [ $status -eq 0 ]; then
        status=ok
    elif [ $((SECONDS - start)) -lt "$given" ]; then
        status="FAILED $status"
    elif [ "$limit" = on ] || { [ "$given" -lt "$limit" ] && [ $first -eq 0 ]; }; then
        left=$((left + 1))
        status=unfinished
    else
        status="timeout"
    fi
    first=0
    row "$name" "$status" $((SECONDS - start))
    printf '%-14s %-48s %-10s %5s s\n' "$stage" "$name" "$status" $((SECONDS - start))
}

# needs NAME COMMAND...: whether the present stage has something that the command looks for. A row tells if it has not.
needs() {
    local name=$1 before
    shift
    before=$(status_of "$name")
    if "$@" >>"$results/logs/$stage.log" 2>&1; then
        if [ -n "$before" ]; then
            grep -v -F "$(printf '%s\t%s\t' "$stage" "$name")" "$rows" >"$rows.new"
            mv "$rows.new" "$rows"
        fi
        return 0
    fi
    [ "$before" = missing ] || row "$name" missing 0
    return 1
}

# Prints "program module" for each module of tests. Each runs in a process of its own, because after an error on a GPU
# its process cannot use that GPU any more. A program without modules is printed alone.
modules() {
    local path name
    for path in tests/*; do
        [ -f "$path" ] || continue
        name=${path##*/}
        case $name in
            kernels | networks)
                # If it cannot list its tests, it runs as a whole, and its failure counts.
                "$path" --list </dev/null | sed -n 's/^\([a-z_]*\)::.*: test$/\1/p' |
                    sort -u | sed "s/^/$name /" | grep . ||
                    echo "$name"
                ;;
            *) echo "$name" ;;
        esac
    done
}

tests() {
    local program module
    while read -r program module; do
        run "$program${module:+ $module}" 90 "tests/$program" ${module:+"$module::"}
    done < <(modules)
    # Where recorded steps and the order of launches matter.
    for module in "device" "cuda" "networks plan" "networks training" "kernels vector" "kernels batch_norm"; do
        read -r program module <<<"$module"
        run "$program${module:+ $module}, in order" 90 env POLDER_EARLY_LAUNCH=0 "tests/$program" ${module:+"$module::"}
    done
}

# Errors that the driver returns are not reported, because some tests provoke them. Whole networks launch the same
# kernels, and take long: they are left out.
sanitize() {
    local sanitizer tool program module
    for sanitizer in "$(command -v compute-sanitizer)" /usr/local/cuda*/bin/compute-sanitizer; do
        [ -x "$sanitizer" ] && break
    done
    needs compute-sanitizer test -x "$sanitizer" || return
    for tool in "$@"; do
        while read -r program module; do
            case $program in kernels | device | cuda) ;; *) continue ;; esac
            run "$tool $program${module:+ $module}" 120 "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 \
                "tests/$program" ${module:+"$module::"}
        done < <(modules)
    done
}

memory() { sanitize memcheck; }
races() { sanitize racecheck synccheck; }

benches() {
    local name
    for name in fusion vector conv batch_norm step curvature; do
        run "$name" 150 "benches/$name" --bench
    done
    # Without programmatic dependent launch, to see what it gains.
    run "fusion, in order" 90 env POLDER_EARLY_LAUNCH=0 CRITERION_HOME="$results/criterion-in-order" benches/fusion --bench "launch in a graph|passes"
}

# pytorch NAME SECONDS ARGUMENT...: short turns of the paired comparison.
pytorch() {
    local name=$1 limit=$2
    shift 2
    run "$name" "$limit" python3 peers/pytorch.py --device cuda:0 --binary bin/step_peer --rounds 5 --seconds 0.3 \
        --json "$results/peers/${name//[^a-zA-Z0-9]/-}.json" "$@"
}

peers() {
    needs torch python3 -c 'import torch, safetensors' || return
    local model precision
    for model in resnet20 resnet18; do
        for precision in f16 f32; do
            pytorch "$model, $precision, eager and captured" 180 --precision $precision --models $model --methods sam \
                --ways eager graph
        done
    done
    run vector 90 python3 peers/vector.py --device cuda:0 --binary bin/vector_peer --rounds 5 --seconds 0.1 \
        --json "$results/peers/vector.json"
    # Layer by layer against cuDNN: results and time.
    run conv 120 python3 peers/conv.py --device cuda:0 --binary bin/conv_peer --precision f16 --rounds 5 --seconds 0.02 \
        --json "$results/peers/conv.json"
    pytorch "CR-SAM, f16, eager and captured" 240 --precision f16 --models resnet20 resnet18 --methods cr-sam \
        --ways eager graph
}

# Each compiled form has a process and a budget of its own: the first one compiles for minutes, and one that fails
# leaves the others alone. All use one cache of compiled code.
peers-compiled() {
    needs torch python3 -c 'import torch, safetensors' || return
    local model way
    for model in resnet18 resnet20; do
        for way in reduce-overhead max-autotune-graph max-autotune; do
            pytorch "$model, f16, $way" 500 --precision f16 --models $model --methods sam --ways $way \
                --forms 'foreach SAM, fused SGD, channels_last'
        done
    done
}

train() {
    needs "CIFAR-10 (RUN_DATA)" test -d "$data" || return
    local method recipe=cr-sam/cifar10/resnet18/sam out
    for method in sgd sam cr-sam; do
        [ $method != cr-sam ] || recipe=cr-sam/cifar10/resnet18/cr-sam
        out=$results/train/$method
        if [ -e "$out/checkpoint" ]; then
            run $method on bin/polder train --resume "$out"
        else
            rm -rf "$out"
            run $method on bin/polder train --device cuda:0 --data "$data" --recipe $recipe --optimizer $method \
                --precision f16 --out "$out"
        fi
    done
}

{
    query=name,driver_version,memory.total,clocks.max.sm,power.limit
    line=$(timeout 20 nvidia-smi --query-gpu=$query --format=csv,noheader) && echo "$line"
    timeout 60 bin/polder devices
} >"$results/machine.txt" 2>>"$results/logs/machine.log"
for stage in $stages; do
    case $asked in *" $stage "*) $stage ;; esac
done

failed=0
python3 summary.py "$results" || failed=1
[ $left -eq 0 ] && echo "nothing is left" || echo "$left or more are left: call it again with the same folder"
exit $failed
