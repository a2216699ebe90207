//! The tests of what is made of kernels: plans, objectives, optimizers, curvature, and training as a whole; one module
//! for each, as those of kernels.

#[path = "../common/mod.rs"]
mod common;

mod curvature;
#[cfg(feature = "train")]
mod drop_path;
#[cfg(feature = "train")]
mod families;
mod frozen;
#[cfg(feature = "train")]
mod generated;
#[cfg(feature = "train")]
mod hessian;
#[cfg(feature = "train")]
mod max_pool;
#[cfg(feature = "train")]
mod methods;
mod optim;
mod plan;
mod precision;
mod steps;
#[cfg(feature = "train")]
mod training;
#[cfg(feature = "train")]
mod vgg;
#[cfg(feature = "train")]
mod vision_transformer;
