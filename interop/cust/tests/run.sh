#!/usr/bin/env bash
# Runs the tests of polder-cust without a GPU: on the stand-in driver (tests/driver), which is also what cust is linked
# with. Needs nvcc (NVCC or PATH), cuobjdump in the same folder, g++ and Python.
#
#   interop/cust/tests/run.sh
set -euo pipefail
cd "$(dirname "$0")/../../.."
NVCC=${NVCC:-$(command -v nvcc)} || { echo "nvcc was not found (NVCC, PATH)" >&2; exit 1; }
export NVCC POLDER_REQUIRE_CUDA=1
to=$PWD/interop/target/driver
rm -rf "$to"
mkdir -p "$to/lib64"
# cust looks for the driver in the folder lib64 of this one.
export CUDA_LIBRARY_PATH=$to
cd interop
# A library is not linked, so polder's fatbins can be made before there is a driver.
cargo build --release -p polder-cust --message-format json-render-diagnostics >"$to/cargo.json"
fatbins=$(python3 - "$to/cargo.json" <<'END'
import json, sys

messages = [json.loads(line) for line in open(sys.argv[1])]
polder = [each["package_id"] for each in messages if each.get("target", {}).get("name") == "polder"]
print(*(each["out_dir"] for each in messages if each["reason"] == "build-script-executed" and each["package_id"] in polder))
END
)
../tests/driver/build.sh "$to/lib64" "$fatbins"
export LD_LIBRARY_PATH=$to/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} DRIVER_IMAGES=$to/lib64
cargo test --release -p polder-cust
