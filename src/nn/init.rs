//! Initial weights from a seed.

use crate::arena::{Kind, Layout};
use crate::device::{Device, Result};
use crate::kernels::random;

/// Weights as He et al. (2015) start them: convolutions normal with variance `2/(kh·kw·in)`, the linear layer's weight and
/// bias uniform within `±1/√in`, batch norm at γ = 1, β = 0. Element i of the arena depends on the seed and on i alone; the
/// bits are the same on every machine.
///
/// # Errors
/// Those of the CPU's memory, on which they are drawn.
pub fn initial_weights(layout: &Layout, seed: u64) -> Result<Vec<f32>> {
    let device = Device::host();
    let mut drawn = device.zeros::<f32>(layout.len())?;
    random::normal(drawn.view_mut(), seed, 0)?;
    let normal = drawn.to_vec()?;
    // A second stretch of the same stream, behind the first.
    random::uniform(drawn.view_mut(), seed, layout.len() as u64)?;
    let uniform = drawn.to_vec()?;
    let mut weights = vec![0.0; layout.len()];
    let mut fan_in = 1;
    for tensor in layout.tensors() {
        for index in tensor.range() {
            weights[index] = match tensor.kind {
                Kind::Convolution { kernel, inputs, .. } => {
                    normal[index] * (2.0 / (kernel * kernel * inputs) as f32).sqrt()
                }
                Kind::Linear { inputs, .. } => {
                    fan_in = inputs;
                    (2.0 * uniform[index] - 1.0) / (inputs as f32).sqrt()
                }
                // A bias follows its layer's weight.
                Kind::Bias(_) => (2.0 * uniform[index] - 1.0) / (fan_in as f32).sqrt(),
                Kind::Scale(_) | Kind::RunningVar(_) => 1.0,
                Kind::Shift(_) | Kind::RunningMean(_) => 0.0,
            };
        }
    }
    Ok(weights)
}
