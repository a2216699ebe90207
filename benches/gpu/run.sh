#!/usr/bin/env bash
# Runs a bundle (bundle.sh) on the first GPU: the tests, compute-sanitizer over the kernels' tests, the comparison with PyTorch, and the
# benchmarks, or the stages that are named. Where the machine is lent for minutes, a call for each stage or two has time for all of it.
# Full logs go to RESULTS, a table of all runs comes last (and to RESULTS/table.txt).
# Needs Python; PyTorch and compute-sanitizer where they are to be run: their absence is a failure.
#
#   run.sh RESULTS [tests] [sanitizers] [peers] [benches]
#
# RUN_SECONDS (default 530) is how long it may take; what no time is left for counts as failed.
set -u

stages="tests sanitizers peers benches"
[ $# -ge 1 ] || { echo "usage: $0 RESULTS [STAGE...], of $stages" >&2; exit 2; }
for stage in "${@:2}"; do
    case " $stages " in *" $stage "*) ;; *) echo "$stage is none of $stages" >&2; exit 2 ;; esac
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

# Without the CPU's ways to play a GPU, which are tested where there is none.
export POLDER_TEST_DEVICE=cuda:0 POLDER_TEST_ONLY=1
export POLDER_FIXTURES=$PWD/tests/fixtures
CRITERION_HOME=$(mktemp -d)
export CRITERION_HOME

# "program module" for each module of tests: a process each, for an error on a GPU is the end of all that its process does there.
# What has no modules is named alone.
modules() {
    local path name
    for path in tests/*; do
        [ -f "$path" ] || continue
        name=${path##*/}
        case $name in
            kernels | networks)
                # Where it cannot even list them, it runs as a whole, and its failure counts.
                "$path" --list </dev/null | sed -n 's/^\([a-z_]*\)::.*: test$/\1/p' | sort -u | sed "s/^/$name /" | grep . ||
                    echo "$name"
                ;;
            *) echo "$name" ;;
        esac
    done
}

row() { printf '%-32s %-10s %5s s\n' "$1" "$2" "$3" >>"$table"; }

# run LOG NAME SECONDS COMMAND...: runs it under the smaller of its own limit and what is left, and notes how it ended.
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

# sanitize TOOL SECONDS: the kernels' tests under one tool, sharing the seconds. Calls of the driver that fail are left to the
# tests: some provoke them.
sanitize() {
    local tool=$1 until=$((SECONDS + $2)) program module
    # Whole networks launch the same kernels and take long.
    while read -r program module; do
        case $program in kernels | device | cuda) ;; *) continue ;; esac
        run "$tool" "$tool $program $module" $((until - SECONDS)) \
            "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 "tests/$program" ${module:+"$module::"}
    done < <(modules)
}

: >"$table"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader >>"$table" 2>&1 ||
    echo "nvidia-smi: no answer" >>"$table"
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

# peer SCRIPT SECONDS ARGUMENT...: one of our sides against PyTorch's.
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
    # A short turn of each; the defaults are for an afternoon, with every model and method, all ways and the other precisions.
    peer pytorch 120 --precision f16 --methods sam --models resnet20 resnet18 --rounds 3 --seconds 0.3 --ways eager graph reduce-overhead
    peer vector 80 --rounds 5 --seconds 0.1
    # Layer by layer against cuDNN, in results and in time.
    peer conv 90 --precision f16 --rounds 5 --seconds 0.02
    peer pytorch 80 --methods sam cr-sam --models resnet20 resnet18 --rounds 3 --seconds 0.3 --ways eager graph
fi

if wants benches; then
    for name in fusion conv vector batch_norm step curvature; do
        run benches "bench $name" 90 "benches/$name" --bench
    done
    # What it gains to launch kernels before the ones before them are done.
    POLDER_EARLY_LAUNCH=0 run benches "bench fusion, in order" 90 benches/fusion --bench "launch in a graph|passes"
fi

rm -rf "$CRITERION_HOME" "$unpacked"
grep -h "^test result\|^ERROR SUMMARY\|^========= ERROR SUMMARY\|time: " "$results"/*.log | sort | uniq -c | sort -rn | head -n 20
printf '\n'
cat "$table"
echo "$failures failed, $SECONDS s, logs in $results"
[ "$failures" -eq 0 ]
