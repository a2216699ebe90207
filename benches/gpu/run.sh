#!/usr/bin/env bash
# Runs a bundle (bundle.sh) on the first GPU: the tests, compute-sanitizer over the kernels' tests, the comparison with
# PyTorch, and the benchmarks; or only the stages that are named. If the time on a machine is limited, run a stage or
# two per call. Full logs go to RESULTS. A table of all runs is printed last, and written to RESULTS/table.txt.
# It needs Python, and for their stages compute-sanitizer and PyTorch. A missing one counts as a failure.
#
#   run.sh RESULTS [tests] [sanitizers] [peers] [benches]
#
# RUN_SECONDS (default 530) limits the whole run. What there is no time for counts as failed.
set -u

stages="tests sanitizers peers benches"
[ $# -ge 1 ] || { echo "usage: $0 RESULTS [STAGE...], of $stages" >&2; exit 2; }
for stage in "${@:2}"; do
    case " $stages " in *" $stage "*) ;; *) echo "$stage: unknown stage, expected one of: $stages" >&2; exit 2 ;; esac
done
mkdir -p "$1"
results=$(cd "$1" && pwd)
asked=" ${*:2} "
[ $# -gt 1 ] || asked=" $stages "
wants() { case $asked in *" $1 "*) ;; *) return 1 ;; esac; }
unpacked=$(mktemp -d)
python3 - "$(dirname "$0")/payload.tar.xz" "$unpacked" <<'EOF' || exit 1
import sys, tarfile
with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2])
EOF
cd "$unpacked" || exit 1
table=$results/table.txt
deadline=$((SECONDS + ${RUN_SECONDS:-530}))
failures=0

# Only the GPU: the CPU's emulation of a GPU is tested on machines without one.
export POLDER_TEST_DEVICE=cuda:0 POLDER_TEST_ONLY=1
export POLDER_FIXTURES=$PWD/tests/fixtures
CRITERION_HOME=$(mktemp -d)
export CRITERION_HOME

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

row() { printf '%-32s %-10s %5s s\n' "$1" "$2" "$3" >>"$table"; }

# run LOG NAME SECONDS COMMAND...: runs a command for at most SECONDS and the time left, and adds a row to the table.
run() {
    local log=$results/$1.log name=$2 limit=$3 start=$SECONDS status
    shift 3
    [ $((deadline - SECONDS)) -lt "$limit" ] && limit=$((deadline - SECONDS))
    if [ "$limit" -lt 5 ]; then
        row "$name" "no time" 0
        failures=$((failures + 1))
        return
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    timeout -k 5 "$limit" "$@" </dev/null >>"$log" 2>&1
    status=$?
    case $status in
        0) status=ok ;;
        124 | 137) status="timeout" ;;
        *) status="FAILED $status" ;;
    esac
    [ "$status" = ok ] || failures=$((failures + 1))
    row "$name" "$status" $((SECONDS - start))
}

find_sanitizer() {
    command -v compute-sanitizer && return
    local path
    for path in /usr/local/cuda*/bin/compute-sanitizer; do
        [ -x "$path" ] && echo "$path" && return
    done
}

# sanitize TOOL SECONDS: runs the kernels' tests under one tool; all of them share the seconds. Errors that the driver
# returns are not reported, because some tests provoke them.
sanitize() {
    local tool=$1 until=$((SECONDS + $2)) program module
    # Whole networks launch the same kernels, and take long: they are left out.
    while read -r program module; do
        case $program in kernels | device | cuda) ;; *) continue ;; esac
        run "$tool" "$tool $program $module" $((until - SECONDS)) \
            "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 \
            "tests/$program" ${module:+"$module::"}
    done < <(modules)
}

: >"$table"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader \
    >>"$table" 2>&1 ||
    echo "nvidia-smi: failed" >>"$table"
bin/polder devices >>"$table" 2>&1

if wants tests; then
    while read -r program module; do
        run tests "test $program $module" 60 "tests/$program" ${module:+"$module::"}
    done < <(modules)
fi

sanitizer=$(find_sanitizer)
if wants sanitizers && [ -z "$sanitizer" ]; then
    failures=$((failures + 1))
    row "compute-sanitizer" "missing" 0
elif wants sanitizers; then
    sanitize memcheck 180
    sanitize racecheck 150
    sanitize synccheck 100
fi

# peer SCRIPT SECONDS ARGUMENT...: one of the comparisons with PyTorch.
peer() {
    local script=peers/$1.py limit=$2
    case $1 in pytorch) local binary=bin/step_peer ;; *) local binary=bin/$1_peer ;; esac
    shift 2
    run peers "$script $1 $2" "$limit" python3 "$script" --device cuda:0 --binary "$binary" "$@"
}

if wants peers && ! python3 -c 'import torch, safetensors' 2>>"$results/peers.log"; then
    row "peers" "no torch" 0
    failures=$((failures + 1))
elif wants peers; then
    # Short turns. The defaults take an afternoon: every model and method, all ways and the other precisions.
    peer pytorch 120 --precision f16 --methods sam --models resnet20 resnet18 --rounds 3 --seconds 0.3 \
        --ways eager graph reduce-overhead
    peer vector 80 --rounds 5 --seconds 0.1
    # Layer by layer against cuDNN: results and time.
    peer conv 90 --precision f16 --rounds 5 --seconds 0.02
    peer pytorch 80 --methods sam cr-sam --models resnet20 resnet18 --rounds 3 --seconds 0.3 \
        --ways eager graph
fi

if wants benches; then
    for name in fusion conv vector batch_norm step curvature; do
        run benches "bench $name" 90 "benches/$name" --bench
    done
    # Without programmatic dependent launch, to see what it gains.
    POLDER_EARLY_LAUNCH=0 run benches "bench fusion, in order" 90 benches/fusion --bench "launch in a graph|passes"
fi

rm -rf "$CRITERION_HOME" "$unpacked"
grep -h "^test result\|^ERROR SUMMARY\|^========= ERROR SUMMARY\|time: " "$results"/*.log |
    sort | uniq -c | sort -rn | head -n 20
printf '\n'
cat "$table"
echo "$failures failed, $SECONDS s, logs in $results"
[ "$failures" -eq 0 ]
