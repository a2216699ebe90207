#!/usr/bin/env bash
# Installs the library with cargo-c to a folder of its own, and builds and runs a program against what pkg-config says,
# with the shared library and with the static one. It needs cargo-c (`cargo install cargo-c`, which takes minutes) and
# pkg-config.
#
#   bindings/c/tests/install.sh
set -euo pipefail
cd "$(dirname "$0")/../../.."
to=$PWD/target/c/installed
rm -rf "$to"
mkdir -p "$to"
# cargo-c contains a cargo of another version. In one folder, each would build again what the other has built.
export CARGO_TARGET_DIR=$PWD/target/cargo-c
failed() { echo "$1" >&2; exit 1; }
cargo cinstall --version >/dev/null 2>&1 || failed "cargo-c was not found: cargo install cargo-c"

# A linker prefers the shared library, so the static one is installed to another folder too.
cargo cinstall --release -p polder-capi --prefix "$to/both" --libdir "$to/both/lib"
cargo cinstall --release -p polder-capi --library-type staticlib --prefix "$to/static" --libdir "$to/static/lib"
cmp bindings/c/include/polder.h "$to/both/include/polder.h"

shared=$to/both/lib/libpolder.so
version=$(sed -n 's/^version = "\(.*\)"/\1/p' bindings/c/Cargo.toml)
soname=$(readelf -d "$shared" | sed -n 's/.*(SONAME).*\[\(.*\)\]/\1/p')
# Before 1.0 every minor version may change the interface.
[ "$soname" = "libpolder.so.$(cut -d. -f1,2 <<<"$version")" ] || failed "the soname is $soname"
[ -e "$to/both/lib/$soname" ] || failed "there is no $soname"
other=$(nm -D --defined-only "$shared" | awk '$3 !~ /^polder_/ { print $3 }')
[ -z "$other" ] || failed "symbols that are exported beside polder_*: $other"

build() { # the folder, options of pkg-config
    local at=$to/$1 flags
    shift
    export PKG_CONFIG_PATH=$at/lib/pkgconfig
    [ "$(pkg-config --modversion polder)" = "$version" ] || failed "the version in polder.pc is not $version"
    read -ra flags <<<"$(pkg-config "$@" --cflags --libs polder)"
    cc -std=c99 bindings/c/examples/quadratic.c "${flags[@]}" -lm -o "$at/quadratic"
}
build both
LD_LIBRARY_PATH=$to/both/lib "$to/both/quadratic" >"$to/shared.txt"
readelf -d "$to/both/quadratic" | grep -q "NEEDED.*$soname" || failed "the program does not load $soname"
build static --static
env -u LD_LIBRARY_PATH "$to/static/quadratic" >"$to/static.txt"
! readelf -d "$to/static/quadratic" | grep -q libpolder || failed "the program loads libpolder"
cmp "$to/shared.txt" "$to/static.txt"
echo "$soname, polder.pc and both libraries: passed"
