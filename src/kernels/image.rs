//! Assembles a training batch on the device, from a data set of byte images there: gather, flip, crop, normalise, cut
//! out, erase. [`augment`](super::augment) has what changes images beyond that.

use super::{Check, check_length, clock};
use crate::device::arguments::BatchArgs;
use crate::device::constants::{BLOCK_THREADS, MAX_IMAGE_CHANNELS};
use crate::device::{Compute, Error, Launch, Result, Slice, SliceMut, id};

/// The shape of a batch, `[batch, height, width, channels]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    /// Images.
    pub batch: usize,
    /// Of an image.
    pub height: usize,
    /// Of an image.
    pub width: usize,
    /// One to four.
    pub channels: usize,
}

/// A byte v of an image becomes `(v / 255 − mean) / std`, with a mean and a standard deviation for each channel. Values
/// for channels that the image does not have are not read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalization {
    /// In units of the full range: 0 is black and 1 is white.
    pub mean: [f32; MAX_IMAGE_CHANNELS],
    /// In the same units; above 0.
    pub std: [f32; MAX_IMAGE_CHANNELS],
}

/// Random flips and crops, and parts that are blanked. Sample n of a batch at the beginning of the order uses the
/// Philox4x32-10 blocks with key `seed` and counter `counter + n`. A training loop that advances the counter by the
/// batch size never uses a block twice.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Augment {
    /// Black pixels added on every side before a window of the original size is cut out at an offset uniform in
    /// [0, 2 · pad]²; 0 for no crop.
    pub pad: usize,
    /// Whether half of the images are flipped from left to right (before the crop).
    pub flip: bool,
    /// Cutout (DeVries and Taylor 2017): a square of this side around a uniform pixel of the result becomes 0, the mean
    /// colour, where it lies in the image. 0 for none.
    pub cutout: usize,
    /// Random erasing (Zhong et al. 2020): the share of the images in which a rectangle becomes 0, the mean colour. Its
    /// area is 0.02 to 0.33 of the image, its ratio of height to width 0.3 to 3.3. An image in which no rectangle fits
    /// in ten tries stays as it is.
    pub erasing: f64,
    /// The stream of random numbers.
    pub seed: u64,
    /// The place in the stream of the batch's first sample.
    pub counter: u64,
}

/// The position of a batch in the order.
#[derive(Clone, Copy, Default)]
pub struct Position<'a> {
    /// The index of the first sample. It is added to the augmentation's counter too.
    pub first: usize,
    /// A clock (see [`super::clock`]), and the number of samples per tick. The clock's first number advances the
    /// position in the order, its second the augmentation. A position beyond the order counts as an index beyond the
    /// data set.
    pub clock: Option<(Slice<'a, u64>, usize)>,
}

/// Gathers the batch at `position` in `order` from a data set, `images` `[samples, height, width, channels]` and
/// `labels` `[samples]`. Image n of `out`, `[batch, height, width, channels]`, is sample `order[first + n]`, flipped,
/// padded with black (0 before normalisation), cropped and normalised. An index beyond the data set gives an image of
/// NaNs and the label `u32::MAX`, which is outside of the classes.
///
/// Traffic: reads a byte and writes an element per value.
///
/// # Errors
/// [`Error::Argument`] for channels outside 1..=4, an empty image, a standard deviation that is not above zero, a
/// padding or a square beyond 65,535 pixels, and such a square in an image of more; [`Error::Length`] and
/// [`Error::OtherDevice`].
pub fn batch<S: Compute>(
    shape: &BatchShape,
    images: Slice<'_, u8>,
    labels: Slice<'_, u32>,
    order: Slice<'_, u32>,
    position: Position<'_>,
    normalization: &Normalization,
    augment: Option<Augment>,
    out: SliceMut<'_, S>,
    out_labels: SliceMut<'_, u32>,
) -> Result<()> {
    const NAME: &str = "image::batch";
    let args = arguments(NAME, shape, images, labels, order, position, normalization, augment, out, out_labels)?;
    if shape.batch == 0 {
        return Ok(());
    }
    let (device, values) = (images.device(), shape.height * shape.width * shape.channels);
    let launch = if device.is_simt() {
        // A block per sample, and several for one sample where it is large.
        let parts = values.div_ceil(4 * 1024).min(64) as u32;
        Launch { grid: [shape.batch as u32, parts, 1], block: [BLOCK_THREADS as u32, 1, 1], shared: 0 }
    } else {
        device.elementwise(shape.batch * values, 1).with_shared(256 * shape.channels * size_of::<S>())
    };
    // SAFETY: every length is checked above, and the kernel reads only samples below `samples`.
    unsafe { device.launch(S::choose(id::IMAGE_BATCH), launch, &args) }
}

/// Checks a batch, and makes the argument of the kernels that assemble it.
pub(super) fn arguments<S: Compute>(
    operation: &'static str,
    shape: &BatchShape,
    images: Slice<'_, u8>,
    labels: Slice<'_, u32>,
    order: Slice<'_, u32>,
    position: Position<'_>,
    normalization: &Normalization,
    augment: Option<Augment>,
    mut out: SliceMut<'_, S>,
    mut out_labels: SliceMut<'_, u32>,
) -> Result<BatchArgs> {
    let refused = |message: String| Err(Error::Argument { operation, message });
    let BatchShape { batch, height, width, channels } = *shape;
    let values = [height, width, channels].iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    let values =
        values.filter(|&values| values > 0 && values <= 1 << 30 && (1..=MAX_IMAGE_CHANNELS).contains(&channels));
    let Some(values) = values.filter(|_| batch <= i32::MAX as usize) else {
        return refused(format!("{shape:?}: expected images of at least one pixel with one to four channels"));
    };
    if !normalization.std[..channels].iter().all(|&std| std > 0.0) {
        return refused(format!("standard deviations {:?} are not all above zero", &normalization.std[..channels]));
    }
    let drawn = augment.unwrap_or_default();
    let Augment { pad, cutout, erasing, .. } = drawn;
    if !(0.0..=1.0).contains(&erasing) {
        return refused(format!("a share of {erasing} of the images to erase from, expected 0 to 1"));
    }
    if pad > usize::from(u16::MAX) || cutout > usize::from(u16::MAX) {
        return refused(format!("a padding of {pad} or a square of {cutout} is too large"));
    }
    if cutout > 0 && height.max(width) > 1 << 16 {
        return refused(format!("{shape:?}: expected sides of at most 65536 pixels with a square that is cut out"));
    }
    let device = images.device();
    let check = Check { operation, device };
    let samples = images.len() / values;
    check.argument("images", images, samples * values)?;
    check.argument("labels", labels, samples)?;
    check.device("order", order.device())?;
    if let Some((clock, _)) = position.clock {
        check.argument("clock", clock, clock::LEN)?;
    } else if order.len() < position.first + batch {
        check_length(operation, "order", order.len(), position.first + batch)?;
    }
    let Some(out_len) = batch.checked_mul(values) else {
        return refused(format!("{shape:?} is too large"));
    };
    check.argument("out", out.view(), out_len)?;
    check.argument("out_labels", out_labels.view(), batch)?;
    Ok(BatchArgs {
        images: images.address(),
        labels: labels.address(),
        order: order.address(),
        clock: position.clock.map_or(0, |(clock, _)| clock.address()),
        out: out.address(),
        out_labels: out_labels.address(),
        samples: samples as u64,
        seed: drawn.seed,
        counter: drawn.counter,
        order_len: order.len() as u64,
        first: position.first as u64,
        stride: position.clock.map_or(0, |(_, stride)| stride as u64),
        batch: batch as u32,
        height: height as u32,
        width: width as u32,
        channels: channels as u32,
        pad: pad as u32,
        flip: drawn.flip.into(),
        augment: augment.is_some().into(),
        cutout: cutout as u32,
        erasing: (erasing * f64::from(1 << 24)).round() as u32,
        mean: normalization.mean,
        std: normalization.std,
    })
}
