//! Cross-entropy of a softmax over class logits, with label smoothing (Szegedy et al. 2016, in PyTorch's form).

use super::{Check, pick};
use crate::device::arguments::{CrossEntropyArgs, CrossEntropyTangentArgs, MeanLossArgs};
use crate::device::constants::BLOCK_THREADS;
use crate::device::{Device, Error, Launch, Result, Scalar, Slice, SliceMut, id};

/// The shape of the logits, `[batch, classes]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossShape {
    /// Samples.
    pub batch: usize,
    /// Logits per sample.
    pub classes: usize,
}

impl LossShape {
    /// The number of logits.
    fn elements(&self, operation: &'static str) -> Result<usize> {
        let Self { batch, classes } = *self;
        let elements = batch.checked_mul(classes).filter(|&elements| elements > 0 && elements <= u32::MAX as usize);
        let message = || format!("{batch} samples of {classes} classes are empty or too many");
        elements.ok_or_else(|| Error::Argument { operation, message: message() })
    }

    /// A warp per sample on the GPU.
    fn launch(&self, device: &Device) -> Launch {
        device.elementwise(if device.is_simt() { self.batch * 32 } else { self.batch * self.classes * 16 }, 1)
    }
}

/// What the logits are compared with.
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    /// The class of each sample: `[batch]`.
    pub labels: Slice<'a, u32>,
    /// For samples that are mixtures of two: the other class of each, `[batch]`, and the share of the first one, one
    /// element.
    pub mixed: Option<(Slice<'a, u32>, Slice<'a, f64>)>,
    /// Label smoothing, from 0 to 1.
    pub smoothing: f64,
}

/// The cross-entropy and its gradient, with `p = softmax(logits)` and `t = (1 − smoothing) · onehot(label) + smoothing
/// / classes`, where for a mixture `share · onehot(label) + (1 − share) · onehot(other)` takes the place of
/// `onehot(label)`:
///
/// - `sample_losses`, `[batch]`, receives the loss `−Σ t log p` of each sample;
/// - `loss`, one element, receives their mean, summed in double, because sharpness is a small difference of such means;
/// - `dlogits`, if given, receives the gradient of the mean, `(p − t) / batch`, times the first element of `scale` if
///   that is given (see [`super::precision`]);
/// - `correct`, one element, is increased by the number of samples whose largest logit (the first of equals) is at the
///   label;
/// - `flag`, one element, if given, is set to 1 if the mean is not finite.
///
/// A logit that is not finite, or a label outside of the classes, makes the loss of its sample not finite. Traffic:
/// reads the logits and labels, writes `dlogits` and the losses.
///
/// # Errors
/// [`Error::Argument`] for an empty shape or a smoothing outside [0, 1]; [`Error::Length`] and [`Error::OtherDevice`].
pub fn cross_entropy<T: Scalar>(
    shape: &LossShape,
    logits: Slice<'_, T>,
    targets: Targets<'_>,
    dlogits: Option<SliceMut<'_, T>>,
    scale: Option<Slice<'_, f64>>,
    mut sample_losses: SliceMut<'_, T>,
    mut loss: SliceMut<'_, f64>,
    mut correct: SliceMut<'_, u32>,
    flag: Option<SliceMut<'_, u32>>,
) -> Result<()> {
    const NAME: &str = "loss::cross_entropy";
    let LossShape { batch, classes } = *shape;
    let elements = shape.elements(NAME)?;
    let Targets { labels, mixed, smoothing } = targets;
    if !(0.0..=1.0).contains(&smoothing) {
        let message = format!("a label smoothing of {smoothing} is not between 0 and 1");
        return Err(Error::Argument { operation: NAME, message });
    }
    let device = logits.device();
    let check = Check { operation: NAME, device };
    check.argument("logits", logits, elements)?;
    check.argument("labels", labels, batch)?;
    check.argument("sample_losses", sample_losses.view(), batch)?;
    check.argument("loss", loss.view(), 1)?;
    check.argument("correct", correct.view(), 1)?;
    if let Some((others, share)) = mixed {
        check.argument("others", others, batch)?;
        check.argument("share", share, 1)?;
    }
    let mut args = CrossEntropyArgs {
        logits: logits.address(),
        labels: labels.address(),
        others: mixed.map_or(0, |(others, _)| others.address()),
        share: mixed.map_or(0, |(_, share)| share.address()),
        dlogits: 0,
        losses: sample_losses.address(),
        correct: correct.address(),
        scale: scale_address(NAME, device, scale)?,
        batch: batch as u32,
        classes: classes as u32,
        inverse_batch: 1.0 / batch as f64,
        smoothing,
        smoothing_share: smoothing / classes as f64,
    };
    if let Some(mut dlogits) = dlogits {
        check.argument("dlogits", dlogits.view(), elements)?;
        args.dlogits = dlogits.address();
    }
    let mut mean = MeanLossArgs { losses: args.losses, loss: loss.address(), flag: 0, batch: batch as u64 };
    if let Some(mut flag) = flag {
        check.argument("flag", flag.view(), 1)?;
        mean.flag = flag.address();
    }
    let block = if device.is_simt() { BLOCK_THREADS as u32 } else { 1 };
    // SAFETY: every length is checked above.
    unsafe {
        device.launch(pick::<T, _>(id::CROSS_ENTROPY_F32, id::CROSS_ENTROPY_F64), shape.launch(device), &args)?;
        device.launch(pick::<T, _>(id::MEAN_LOSS_F32, id::MEAN_LOSS_F64), Launch::new(1, block), &mean)
    }
}

/// The address of the loss scale; 0 if there is none.
fn scale_address(operation: &'static str, device: &Device, scale: Option<Slice<'_, f64>>) -> Result<u64> {
    let Some(scale) = scale else { return Ok(0) };
    Check { operation, device }.device("scale", scale.device())?;
    scale.slice(0..1).map(|scale| scale.address())
}

/// The tangent of [`cross_entropy`]'s gradient when the logits `z` move along `z'`: with `p = softmax(z)`, `dlogits' =
/// p (z' − Σ p z') / batch`, times the first element of `scale` if that is given. It does not depend on the labels and
/// the smoothing. All three are `[batch, classes]`. Traffic: reads the logits and their tangent, writes the result: 12
/// bytes per logit in f32.
///
/// # Errors
/// [`Error::Argument`] for an empty shape; [`Error::Length`] and [`Error::OtherDevice`].
pub fn cross_entropy_tangent<T: Scalar>(
    shape: &LossShape,
    logits: Slice<'_, T>,
    logits_tangent: Slice<'_, T>,
    mut dlogits_tangent: SliceMut<'_, T>,
    scale: Option<Slice<'_, f64>>,
) -> Result<()> {
    const NAME: &str = "loss::cross_entropy_tangent";
    let elements = shape.elements(NAME)?;
    let device = logits.device();
    let arguments =
        [("logits", logits), ("logits_tangent", logits_tangent), ("dlogits_tangent", dlogits_tangent.view())];
    for (name, argument) in arguments {
        Check { operation: NAME, device }.argument(name, argument, elements)?;
    }
    let args = CrossEntropyTangentArgs {
        logits: logits.address(),
        logits_tangent: logits_tangent.address(),
        dlogits_tangent: dlogits_tangent.address(),
        scale: scale_address(NAME, device, scale)?,
        batch: shape.batch as u32,
        classes: shape.classes as u32,
        inverse_batch: 1.0 / shape.batch as f64,
    };
    let kernel = pick::<T, _>(id::CROSS_ENTROPY_TANGENT_F32, id::CROSS_ENTROPY_TANGENT_F64);
    // SAFETY: every length is checked above.
    unsafe { device.launch(kernel, shape.launch(device), &args) }
}
