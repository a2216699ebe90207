//! The tests of kernels and their wrappers, one module for each: a program of its own for each would be linked, and would have the
//! generic code compiled, as often.

#[path = "../common/mod.rs"]
mod common;

mod batch_norm;
mod conv;
mod gradient;
mod image;
mod layers;
mod loss;
mod max_pool;
mod metrics;
mod random;
mod sharpness;
mod storage;
mod vector;
