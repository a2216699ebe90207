//! Constants that kernels and Rust share. `build.rs` writes them from `kernels/include/constants.cuh` and
//! `kernels/host/launch.hpp`, and the C++ compilers check their values.

include!(concat!(env!("OUT_DIR"), "/constants.rs"));
