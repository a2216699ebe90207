#!/usr/bin/env bash
# Type-checks the half for CUDA, in one build with candle's. candle compiles its own kernels for it, which takes longer
# than everything else here, so a stand-in for nvcc leaves them empty: nothing is linked or run. Needs nvcc, whose
# version candle asks for.
#
#   NVCC=/path/to/nvcc interop/candle/check_cuda.sh
set -euo pipefail
cd "$(dirname "$0")/.."
real=${NVCC:-$(command -v nvcc)}
stand_in=$PWD/target/no-kernels/bin
mkdir -p "$stand_in"
cat >"$stand_in/nvcc" <<SCRIPT
#!/usr/bin/env bash
case " \$* " in *" --version "* | *" -V "* | *" --list-gpu-code "* | *" --dryrun "*) exec "$real" "\$@" ;; esac
previous="" folder=""
for argument in "\$@"; do
    [ "\$previous" = -o ] && : >"\$argument"
    [ "\$previous" = --output-directory ] && folder=\$argument
    previous=\$argument
done
[ -n "\$folder" ] || exit 0
for argument in "\$@"; do
    case "\$argument" in *.cu) : >"\$folder/\$(basename "\${argument%.cu}").ptx" ;; esac
done
SCRIPT
chmod +x "$stand_in/nvcc"
# polder's own kernels are left empty as well.
PATH=$stand_in:$PATH CUDA_COMPUTE_CAP=80 \
    env -u NVCC -u POLDER_REQUIRE_CUDA cargo check --release --target-dir target/cuda -p polder-candle --features cuda
