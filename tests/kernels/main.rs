//! The tests of the kernels, with a module for each group. One program links once and compiles the generic code once.

#[path = "../common/mod.rs"]
mod common;

mod batch_norm;
mod conv;
mod gather;
mod gradient;
mod image;
mod layers;
mod loss;
mod max_pool;
mod metrics;
mod mixing;
mod random;
mod scale_samples;
mod sharpness;
mod storage;
mod vector;
