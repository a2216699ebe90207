//! What our sides of the comparisons with PyTorch share. Each side is a program under `src/bin`; the Python script of the same
//! comparison starts it and talks to it.

pub mod protocol;
pub mod tensors;

use clap::ValueEnum;

/// How activations are stored: an option of the programs.
#[derive(Clone, Copy, ValueEnum)]
pub enum Precision {
    F32,
    Tf32,
    F16,
    Bf16,
}
