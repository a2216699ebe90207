//! The structs that kernels take, and those that the host's runtime shares with `host.rs`. `build.rs` writes them from
//! the C++ sources, and both compilers check their layout. An address is a `u64`, 0 for what is absent.
#![allow(dead_code)]

/// A kernel's argument struct.
pub trait Arguments: Copy {
    /// The struct's name in the C++ sources.
    const NAME: &'static str;
}

include!(concat!(env!("OUT_DIR"), "/arguments.rs"));
