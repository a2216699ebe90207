//! The tests of the kernels, with a module for each group. One program links once and compiles the generic code once.

#[path = "../common/mod.rs"]
mod common;

mod attention;
#[cfg(feature = "train")]
mod augment;
mod batch_norm;
mod bias;
mod conv;
mod dual;
mod gather;
mod gradient;
mod image;
mod layer_norm;
mod layers;
mod loss;
mod max_pool;
mod metrics;
mod mixing;
mod muon;
mod peak;
mod random;
mod sassha;
mod scale_samples;
mod sharpness;
mod storage;
mod vector;
