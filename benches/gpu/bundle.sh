#!/usr/bin/env bash
# Gathers in one folder what a machine with a GPU and no Rust needs to test and measure polder: run.sh, and one archive
# with the programs, tests and benchmarks (the GPU's kernels inside) and their data. All programs contain the same
# kernels, so an archive with a long compression window is a tenth of their size. It needs nvcc (NVCC, CUDA_HOME,
# CUDA_PATH or PATH) and Python.
#
#   benches/gpu/bundle.sh OUT        then, on the other machine:  OUT/run.sh RESULTS
set -euo pipefail

limit_mib=40
# Tests that use paths of this machine. What they cover does not depend on the device.
left_out="cli"

[ $# -eq 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
if [ -n "$(ls -A "$out")" ] && [ ! -e "$out/run.sh" ]; then
    echo "$out: not empty, and not a bundle" >&2
    exit 2
fi
rm -rf "${out:?}"/*
cp benches/gpu/run.sh "$out/"
chmod +x "$out/run.sh"
payload=$(mktemp -d)
trap 'rm -rf "$payload"' EXIT
mkdir -p "$payload"/{bin,tests,benches,peers}

# Builds, and prints "folder name path" for every executable that cargo reports.
executables() {
    cargo "$@" --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") != "compiler-artifact" or not message["executable"]:
        continue
    kind, tested = message["target"]["kind"][0], message["profile"]["test"]
    name, path = message["target"]["name"], message["executable"]
    if kind == "bench":
        print("benches", name, path)
    elif kind == "bin" and not tested:
        print("bin", name, path)
    elif kind == "test":
        print("tests", name, path)
    elif kind == "lib" and tested:
        print("tests", "lib", path)
'
}

export POLDER_REQUIRE_CUDA=1
tests=$(executables test --release --no-run)
peers=$(executables build --release -p polder-peers)
benches=$(executables bench --benches --no-run)
while read -r folder name path; do
    case " $left_out " in *" $name "*) continue ;; esac
    strip -o "$payload/$folder/$name" "$path"
done < <(echo "$tests"; echo "$peers"; grep '^benches ' <<<"$benches")
cp -r tests/fixtures "$payload/tests/"
cp benches/gpu/summary.py "$payload/"
find benches/peers -name '*.py' -exec cp {} "$payload/peers/" \;

(cd "$payload" && find . -type f -printf '%k KiB  %P\n' | sort -rn | head -n 30)
python3 - "$payload" "$out/payload.tar.xz" <<'EOF'
import lzma, sys, tarfile
window = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 192 << 20}]
with lzma.open(sys.argv[2], "w", filters=window) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
    archive.add(sys.argv[1], ".")
EOF
kib=$(du -sk --apparent-size "$out" | cut -f1)
echo "$out: $((kib / 1024)) MiB"
if [ "$kib" -gt $((limit_mib * 1024)) ]; then
    echo "$out: larger than $limit_mib MiB" >&2
    exit 1
fi
