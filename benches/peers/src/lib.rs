//! Shared by our sides of the comparisons with PyTorch. Each side is a program under `src/bin`, which the Python script
//! of the same name without `_peer` starts (`pytorch.py` starts `step_peer`).

pub mod protocol;
pub mod tensors;

use clap::ValueEnum;

/// How activations are stored: an option of the programs.
#[derive(Clone, Copy, ValueEnum)]
pub enum Precision {
    F32,
    Tf32,
    Bf16x3,
    Bf16x6,
    F16,
    Bf16,
}
