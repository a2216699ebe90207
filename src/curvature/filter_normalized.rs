//! Random directions of loss landscapes, filter-normalised.

use crate::arena::Layout;
use crate::device::{Buffer, Result, Slice};
use crate::kernels::check_length;
use crate::kernels::random;

/// Random direction number `number` of `seed`, filter-normalised (Li, Xu, Taylor, Studer and Goldstein 2018, section
/// 4). Its numbers are normal and independent of the initial weights of the same seed. Each filter, the weights of one
/// output of a convolution or a linear layer, is scaled to the length of that filter in `weights`; biases and batch
/// norm get zeros. This makes networks comparable whose filters have different scales, for which batch norm
/// compensates. The lengths are computed on the host, in double. The result is as long as `weights` and lies on their
/// device.
///
/// # Errors
/// [`crate::device::Error::Length`] for weights of another length than the layout's; those of the device.
pub fn filter_normalized(layout: &Layout, weights: Slice<'_, f32>, seed: u64, number: usize) -> Result<Buffer<f32>> {
    check_length("curvature::filter_normalized", "weights", weights.len(), layout.len())?;
    let mut direction = weights.device().zeros(layout.len())?;
    let first = number * layout.len().next_multiple_of(4);
    random::normal(direction.view_mut(), random::key(seed, b"landscap"), first as u64)?;
    let (weights, normal) = (weights.to_vec()?, direction.to_vec()?);
    let mut scaled = vec![0.0f32; layout.len()];
    for tensor in layout.tensors() {
        let Some(outputs) = tensor.kind.outputs() else { continue };
        let range = tensor.range();
        let squares = |values: &[f32]| {
            let mut squares = vec![0.0f64; outputs];
            for (index, &value) in values[range.clone()].iter().enumerate() {
                squares[index % outputs] += f64::from(value).powi(2);
            }
            squares
        };
        let (wanted, drawn) = (squares(&weights), squares(&normal));
        for index in range.clone() {
            let filter = (index - range.start) % outputs;
            scaled[index] = (f64::from(normal[index]) * (wanted[filter] / drawn[filter]).sqrt()) as f32;
        }
    }
    direction.write(&scaled)?;
    Ok(direction)
}
