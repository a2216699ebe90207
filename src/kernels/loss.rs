//! Cross-entropy of a softmax over class logits, with label smoothing (Szegedy et al. 2016, as PyTorch has it).

use super::{check_device, check_length, pick};
use crate::device::{Error, Launch, Result, Scalar, Slice, SliceMut, id};

/// The shape of the logits, `[batch, classes]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossShape {
    /// Samples.
    pub batch: usize,
    /// Logits per sample.
    pub classes: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CrossEntropyArgs {
    logits: u64,
    labels: u64,
    dlogits: u64,
    losses: u64,
    correct: u64,
    batch: u32,
    classes: u32,
    smoothing: f64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MeanLossArgs {
    losses: u64,
    loss: u64,
    batch: u64,
}

/// With `p = softmax(logits)` and `t = (1 − smoothing) · onehot(label) + smoothing / classes`: every sample's loss `−Σ t log p`
/// in `sample_losses`, `[batch]`; in `loss`, one element, their mean, summed in double, because sharpness is a small difference
/// of such means; in `dlogits`, where asked for, the mean's gradient `(p − t) / batch`; and in `correct`, one element, how many
/// samples have their largest logit (the first of equals) at the label.
///
/// A logit that is not finite makes its sample's loss not finite, and so does a label that no class has. Traffic: reads the
/// logits and labels, writes `dlogits` and the losses.
///
/// # Errors
/// [`Error::Argument`] for an empty shape or a smoothing outside [0, 1]; [`Error::Length`] and [`Error::OtherDevice`].
pub fn cross_entropy<T: Scalar>(
    shape: &LossShape,
    logits: Slice<'_, T>,
    labels: Slice<'_, u32>,
    smoothing: f64,
    dlogits: Option<SliceMut<'_, T>>,
    mut sample_losses: SliceMut<'_, T>,
    mut loss: SliceMut<'_, f64>,
    mut correct: SliceMut<'_, u32>,
) -> Result<()> {
    const NAME: &str = "loss::cross_entropy";
    let LossShape { batch, classes } = *shape;
    let refused = |message: String| Err(Error::Argument { operation: NAME, message });
    let elements = batch.checked_mul(classes).filter(|&elements| elements > 0 && elements <= u32::MAX as usize);
    let Some(elements) = elements else {
        return refused(format!("{batch} samples of {classes} classes are empty or too many"));
    };
    if !(0.0..=1.0).contains(&smoothing) {
        return refused(format!("a label smoothing of {smoothing} is not between 0 and 1"));
    }
    let device = logits.device();
    let check = |name, other, found, expected| {
        check_device(NAME, name, device, other)?;
        check_length(NAME, name, found, expected)
    };
    check("logits", logits.device(), logits.len(), elements)?;
    check("labels", labels.device(), labels.len(), batch)?;
    check("sample_losses", sample_losses.device(), sample_losses.len(), batch)?;
    check("loss", loss.device(), loss.len(), 1)?;
    check("correct", correct.device(), correct.len(), 1)?;
    let mut args = CrossEntropyArgs {
        logits: logits.address(),
        labels: labels.address(),
        dlogits: 0,
        losses: sample_losses.address(),
        correct: correct.address(),
        batch: batch as u32,
        classes: classes as u32,
        smoothing,
    };
    if let Some(mut dlogits) = dlogits {
        check("dlogits", dlogits.device(), dlogits.len(), elements)?;
        args.dlogits = dlogits.address();
    }
    let mean = MeanLossArgs { losses: args.losses, loss: loss.address(), batch: batch as u64 };
    // A warp per sample on the GPU.
    let launch = device.elementwise(if device.is_simt() { batch * 32 } else { elements * 16 }, 1);
    let block = if device.is_simt() { 256 } else { 1 };
    correct.clear()?;
    // SAFETY: the twins of the kernels' structs; every length was checked above.
    unsafe {
        device.launch(pick::<T>(id::CROSS_ENTROPY_F32, id::CROSS_ENTROPY_F64), launch, &args)?;
        device.launch(pick::<T>(id::MEAN_LOSS_F32, id::MEAN_LOSS_F64), Launch::new(1, block), &mean)
    }
}
