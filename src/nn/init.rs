//! Initial weights from a seed.

use crate::arena::{Initial, Layout};
use crate::device::{Device, Result};
use crate::kernels::random;

/// Weights as a model starts: each tensor drawn from its own [`Initial`] distribution. Element i of the arena depends
/// on the seed and on i alone; the bits are the same on every machine.
///
/// # Errors
/// Those of the CPU's memory, on which they are drawn.
pub fn initial_weights(layout: &Layout, seed: u64) -> Result<Vec<f32>> {
    let device = Device::host();
    let mut drawn = device.zeros::<f32>(layout.len())?;
    random::normal(drawn.view_mut(), seed, 0)?;
    let normal = drawn.to_vec()?;
    // The uniform numbers come from the same stream, behind the normal ones.
    random::uniform(drawn.view_mut(), seed, layout.len() as u64)?;
    let uniform = drawn.to_vec()?;
    let mut weights = vec![0.0; layout.len()];
    for tensor in layout.tensors() {
        for index in tensor.range() {
            weights[index] = match tensor.initial {
                Initial::HeNormal { fan } => normal[index] * (2.0 / fan as f32).sqrt(),
                Initial::Normal { std } => normal[index] * std,
                Initial::Uniform { fan_in } => (2.0 * uniform[index] - 1.0) / (fan_in as f32).sqrt(),
                Initial::Constant(value) => value,
            };
        }
    }
    Ok(weights)
}
