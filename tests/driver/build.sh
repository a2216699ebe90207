#!/usr/bin/env bash
# Builds the stand-in driver (README.md), and the PTX that it interprets from the fatbins in a folder. Needs NVCC, with
# cuobjdump in the same folder, and g++.
#
#   build.sh TO FATBINS
set -euo pipefail
to=$1 fatbins=$2
tools=$(dirname "$NVCC")
# Contraction is off, because PTX has explicit instructions with one rounding. Its integers wrap.
flags=(-std=c++20 -O3 -mavx2 -mfma -mf16c -ffp-contract=off -fwrapv -fno-strict-aliasing -fPIC -Wall -Wextra -Werror)
for source in "$(dirname "$0")"/*.cpp; do
    g++ "${flags[@]}" -I "$tools/../include" -c "$source" -o "$to/$(basename "$source" .cpp).o" &
    building+=($!)
done
for fatbin in "$fatbins"/*.fatbin; do
    cp "$fatbin" "$to"
    "$tools/cuobjdump" -ptx "$fatbin" >"$to/$(basename "$fatbin" .fatbin).ptx"
done
for one in "${building[@]}"; do wait "$one"; done
g++ -shared -o "$to/libcuda.so.1" "$to"/*.o -pthread
# cudarc looks for this name first, so no real driver is found instead.
ln -sf libcuda.so.1 "$to/libcuda.so"
