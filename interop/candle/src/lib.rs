//! The sharpness-aware optimizers of polder for models of candle.
//!
//! [`Optimizer`] trains a list of variables. A step takes a closure that computes the loss, because a sharpness-aware
//! step needs gradients at several points: the optimizer moves the variables to each point, calls the closure, and has
//! candle's `backward` compute the gradients.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{Module, VarBuilder, VarMap};
//! use polder::optim::{Base, Sam, Settings};
//! use polder_candle::{Optimizer, trainable};
//!
//! let variables = VarMap::new();
//! let model = candle_nn::linear(3, 1, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
//! let (x, y) = (Tensor::ones((4, 3), DType::F32, &Device::Cpu)?, Tensor::ones((4, 1), DType::F32, &Device::Cpu)?);
//!
//! let settings = Settings::new(Sam::new(0.01), Base::sgd(0.0));
//! let mut optimizer = Optimizer::<f32>::new(trainable(&variables)?, settings, 0.05)?;
//! for _ in 0..50 {
//!     let loss = optimizer.step(|| candle_nn::loss::mse(&model.forward(&x)?, &y))?;
//!     println!("{loss}");
//! }
//! assert!(optimizer.inner().telemetry()?.loss < 1e-3);
//! # Ok::<(), polder_candle::Error>(())
//! ```
//!
//! # Memory
//!
//! candle keeps each variable and each gradient in memory of its own, and polder's kernels take one long vector. So a
//! step copies the weights from the variables, copies every further point and the new weights to them, and copies each
//! gradient once. All copies stay on the device. With the feature `cuda` the kernels run on the stream of candle's
//! device, so nothing waits.

mod error;
mod loss;
mod optimizer;
mod tensor;

pub use error::{Error, Result};
pub use optimizer::{Optimizer, settings, trainable};
pub use tensor::Weight;
