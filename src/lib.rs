//! Hand-written CUDA kernels and a minimal autodiff for sharpness-aware training, on the GPU and on the CPU.
//!
//! [`kernels`] work on [`device`] buffers, [`optim`] and [`curvature`] on any [`objective::Objective`]. [`plan`] and
//! [`nn`] make objectives of networks. [`data`], [`train`] and [`report`] are the training loop and its results.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod arena;
pub mod curvature;
#[cfg(feature = "train")]
pub mod data;
#[allow(unsafe_code)] // memory, launches and the driver
pub mod device;
#[allow(unsafe_code)] // every wrapper vouches for its kernel's arguments
pub mod kernels;
pub mod nn;
pub mod objective;
pub mod optim;
pub mod plan;
#[cfg(feature = "train")]
pub mod report;
pub mod settings;
#[cfg(feature = "train")]
pub mod train;

pub use device::{Buffer, Device};

/// The examples of the README, compiled and run with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
