//! Assembles a training batch with operations on whole images of bytes: resized crops, AutoAugment, RandAugment and
//! colour jitter: `kernels/augment.cu`.
//!
//! The order is that of torchvision's references: a crop, a flip, the policy, the jitter, normalisation, and last
//! Cutout and erasing. What an operation moves into the image is black. Each has the bits of Pillow's for the same
//! parameters.

use super::Check;
use super::image::{self, Augment, BatchShape, Normalization, Position};
use crate::device::arguments::{AugmentArgs, PolicyStep};
use crate::device::constants::{
    AUGMENT_TABLE_BYTES, AUGMENT_TAP_BYTES, BLOCK_THREADS, PIXEL_AFFINE, PIXEL_AUTO_CONTRAST, PIXEL_BRIGHTNESS,
    PIXEL_COLOR, PIXEL_CONTRAST, PIXEL_EQUALIZE, PIXEL_IDENTITY, PIXEL_INVERT, PIXEL_POSTERIZE, PIXEL_SHARPNESS,
    PIXEL_SOLARIZE,
};
use crate::device::{Buffer, Compute, Device, Error, Launch, Result, Slice, SliceMut, id};

/// An operation on an image of bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    /// Nothing.
    Identity,
    /// Moves each row to the left by this share of its distance from the upper edge.
    ShearX(f64),
    /// Moves each column up by this share of its distance from the left edge.
    ShearY(f64),
    /// Moves the image to the right by so many pixels, cut off to a whole number.
    TranslateX(f64),
    /// Moves the image down.
    TranslateY(f64),
    /// Turns the image by so many degrees, anticlockwise.
    Rotate(f64),
    /// A blend with black; 1 is the image itself.
    Brightness(f64),
    /// A blend with the grey image.
    Color(f64),
    /// A blend with the mean grey value.
    Contrast(f64),
    /// A blend with the smoothed image.
    Sharpness(f64),
    /// Keeps so many bits of each value.
    Posterize(u32),
    /// Inverts values from this on.
    Solarize(f64),
    /// Stretches each channel to the full range.
    AutoContrast,
    /// Flattens the histogram of each channel.
    Equalize,
    /// 255 minus each value.
    Invert,
}

/// A step of a policy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// What it does to an image.
    pub operation: Operation,
    /// What it does to half of the images instead, if anything.
    pub otherwise: Option<Operation>,
    /// The share of the images to which it is applied.
    pub probability: f64,
}

/// Operations of which each image draws some.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Steps that follow each other. All sequences have the same length.
    pub sequences: Vec<Vec<Step>>,
    /// How many sequences an image draws, one after another. Each is as likely as the others.
    pub draws: usize,
}

/// The kinds of operations that a policy takes at a magnitude.
#[derive(Clone, Copy)]
enum Kind {
    Identity,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    Rotate,
    Brightness,
    Color,
    Contrast,
    Sharpness,
    Posterize,
    Solarize,
    AutoContrast,
    Equalize,
    Invert,
}

/// AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019, table 7): operation, probability in tenths, magnitude of ten.
#[rustfmt::skip]
const CIFAR10: [[(Kind, u32, usize); 2]; 25] = {
    use Kind::*;
    [
        [(Invert, 1, 0), (Contrast, 2, 6)],
        [(Rotate, 7, 2), (TranslateX, 3, 9)],
        [(Sharpness, 8, 1), (Sharpness, 9, 3)],
        [(ShearY, 5, 8), (TranslateY, 7, 9)],
        [(AutoContrast, 5, 0), (Equalize, 9, 0)],
        [(ShearY, 2, 7), (Posterize, 3, 7)],
        [(Color, 4, 3), (Brightness, 6, 7)],
        [(Sharpness, 3, 9), (Brightness, 7, 9)],
        [(Equalize, 6, 0), (Equalize, 5, 0)],
        [(Contrast, 6, 7), (Sharpness, 6, 5)],
        [(Color, 7, 7), (TranslateX, 5, 8)],
        [(Equalize, 3, 0), (AutoContrast, 4, 0)],
        [(TranslateY, 4, 3), (Sharpness, 2, 6)],
        [(Brightness, 9, 6), (Color, 2, 8)],
        [(Solarize, 5, 2), (Invert, 0, 0)],
        [(Equalize, 2, 0), (AutoContrast, 6, 0)],
        [(Equalize, 2, 0), (Equalize, 6, 0)],
        [(Color, 9, 9), (Equalize, 6, 0)],
        [(AutoContrast, 8, 0), (Solarize, 2, 8)],
        [(Brightness, 1, 3), (Color, 7, 0)],
        [(Solarize, 4, 5), (AutoContrast, 9, 0)],
        [(TranslateY, 9, 9), (TranslateY, 7, 9)],
        [(AutoContrast, 9, 0), (Solarize, 8, 3)],
        [(Equalize, 8, 0), (Invert, 1, 0)],
        [(TranslateY, 7, 9), (AutoContrast, 9, 0)],
    ]
};

/// RandAugment's operations, as torchvision has them.
const RAND_AUGMENT: [Kind; 14] = [
    Kind::Identity,
    Kind::ShearX,
    Kind::ShearY,
    Kind::TranslateX,
    Kind::TranslateY,
    Kind::Rotate,
    Kind::Brightness,
    Kind::Color,
    Kind::Contrast,
    Kind::Sharpness,
    Kind::Posterize,
    Kind::Solarize,
    Kind::AutoContrast,
    Kind::Equalize,
];

/// Number `index` of `count` from `first` to `last` in equal steps, in single precision and from the nearer end, as
/// PyTorch computes it.
fn spaced(first: f32, last: f32, count: usize, index: usize) -> f64 {
    let step = (last - first) / (count - 1) as f32;
    let nearer = index < count / 2;
    f64::from(if nearer { first + step * index as f32 } else { last - step * (count - 1 - index) as f32 })
}

impl Kind {
    /// A step with this operation at a magnitude, number `index` of `count`, in images of this size.
    fn step(self, probability: f64, (index, count): (usize, usize), (height, width): (usize, usize)) -> Step {
        let up_to = |most: f64| spaced(0.0, most as f32, count, index);
        let signed = |operation: fn(f64) -> Operation, magnitude: f64| Step {
            operation: operation(magnitude),
            otherwise: Some(operation(-magnitude)),
            probability,
        };
        let blend = |operation: fn(f64) -> Operation| Step {
            operation: operation(1.0 + up_to(0.9)),
            otherwise: Some(operation(1.0 - up_to(0.9))),
            probability,
        };
        let fixed = |operation| Step { operation, otherwise: None, probability };
        let shift = |side: usize| up_to(150.0 / 331.0 * side as f64);
        match self {
            Self::Identity => fixed(Operation::Identity),
            Self::ShearX => signed(Operation::ShearX, up_to(0.3)),
            Self::ShearY => signed(Operation::ShearY, up_to(0.3)),
            Self::TranslateX => signed(Operation::TranslateX, shift(width)),
            Self::TranslateY => signed(Operation::TranslateY, shift(height)),
            Self::Rotate => signed(Operation::Rotate, up_to(30.0)),
            Self::Brightness => blend(Operation::Brightness),
            Self::Color => blend(Operation::Color),
            Self::Contrast => blend(Operation::Contrast),
            Self::Sharpness => blend(Operation::Sharpness),
            Self::Posterize => {
                let bits = 8.0 - (index as f64 / ((count - 1) as f64 / 4.0)).round_ties_even();
                fixed(Operation::Posterize(bits as u32))
            }
            Self::Solarize => fixed(Operation::Solarize(spaced(255.0, 0.0, count, index))),
            Self::AutoContrast => fixed(Operation::AutoContrast),
            Self::Equalize => fixed(Operation::Equalize),
            Self::Invert => fixed(Operation::Invert),
        }
    }
}

impl Policy {
    /// The most magnitudes of RandAugment.
    pub const MAGNITUDES: usize = 31;
    /// The most operations of RandAugment on one image.
    pub const MOST_DRAWS: usize = 16;

    /// AutoAugment's policy for CIFAR-10 (Cubuk, Zoph, Mané, Vasudevan and Le 2019): one of 25 pairs of operations,
    /// with torchvision's magnitudes for images of this height and width.
    pub fn auto_augment_cifar10(height: usize, width: usize) -> Self {
        let size = (height, width);
        let sequence = |pair: &[(Kind, u32, usize); 2]| {
            let step =
                |&(kind, tenths, index): &(Kind, u32, usize)| kind.step(f64::from(tenths) / 10.0, (index, 10), size);
            pair.iter().map(step).collect()
        };
        Self { sequences: CIFAR10.iter().map(sequence).collect(), draws: 1 }
    }

    /// RandAugment (Cubuk, Zoph, Shlens and Le 2020): `draws` operations of torchvision's fourteen, each at magnitude
    /// `magnitude` of [`Policy::MAGNITUDES`], the first of which is 0.
    ///
    /// # Errors
    /// [`Error::Argument`] for a magnitude that does not exist.
    pub fn rand_augment(height: usize, width: usize, draws: usize, magnitude: usize) -> Result<Self> {
        if magnitude >= Self::MAGNITUDES {
            let message = format!("a magnitude of {magnitude}, expected at most {}", Self::MAGNITUDES - 1);
            return Err(Error::Argument { operation: "Policy::rand_augment", message });
        }
        let step = |kind: &Kind| vec![kind.step(1.0, (magnitude, Self::MAGNITUDES), (height, width))];
        Ok(Self { sequences: RAND_AUGMENT.iter().map(step).collect(), draws })
    }
}

/// Colour jitter: each factor is uniform between 1 − strength (but at least 0) and 1 + strength, the turn of the hue
/// between −strength and strength of the full circle. The four follow each other in an order that is drawn; one of
/// strength 0 is left out. An image of one channel has neither saturation nor hue.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Jitter {
    /// Of a blend with black; 0 or more.
    pub brightness: f64,
    /// Of a blend with the mean grey value; 0 or more.
    pub contrast: f64,
    /// Of a blend with the grey image; 0 or more.
    pub saturation: f64,
    /// At most one half.
    pub hue: f64,
}

/// What happens to the images of a batch, beyond gathering and normalising them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Augmentation {
    /// Flips, padded crops, and parts that are blanked, and the stream of all random numbers.
    pub basic: Augment,
    /// A part of the image is enlarged to its size, in place of the padded crop: its share of the area is uniform from
    /// this to 1, its ratio of width to height 3/4 to 4/3. Linear interpolation.
    pub resized_crop: Option<f64>,
    /// Operations that each image draws.
    pub policy: Option<Policy>,
    /// Colour jitter.
    pub jitter: Jitter,
}

/// Assembles augmented batches. It keeps the steps of the policy on the device, and memory for large images.
pub struct Augmenter {
    shape: BatchShape,
    augmentation: Augmentation,
    steps: Buffer<PolicyStep>,
    scratch: Option<Buffer<u8>>,
}

/// Bytes of shared memory that a block may have everywhere.
const SHARED_BYTES: usize = 48 * 1024;

impl Augmenter {
    const NAME: &'static str = "Augmenter::new";

    /// Prepares batches of this shape: allocates memory for images that do not fit into a GPU's shared memory.
    ///
    /// # Errors
    /// [`Error::Argument`] for images of two or four channels, of sides beyond 32,767 pixels or of more than 2^24
    /// pixels, for values out of their range, and for sequences of different lengths; those of the allocation.
    pub fn new(device: &Device, shape: BatchShape, augmentation: Augmentation) -> Result<Self> {
        let refused = |message: String| Err(Error::Argument { operation: Self::NAME, message });
        let BatchShape { batch, height, width, channels } = shape;
        let side = 1..=usize::from(i16::MAX as u16);
        let fits = side.contains(&height) && side.contains(&width) && height * width <= 1 << 24;
        if !fits || !matches!(channels, 1 | 3) {
            return refused(format!(
                "{shape:?}: expected one or three channels, sides of at most 32767 and at most 2^24 pixels"
            ));
        }
        if let Some(share) = augmentation.resized_crop.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            return refused(format!("a crop of {share} of the area, expected a number above 0, at most 1"));
        }
        let Jitter { brightness, contrast, saturation, hue } = augmentation.jitter;
        let strengths = [brightness, contrast, saturation];
        if !(strengths.iter().all(|strength| (0.0..f64::MAX).contains(strength)) && (0.0..=0.5).contains(&hue)) {
            return refused(format!("{:?}: expected numbers of at least 0, a hue of at most 0.5", augmentation.jitter));
        }
        let policy = augmentation.policy.as_ref();
        let length = policy.and_then(|policy| policy.sequences.first()).map_or(0, Vec::len);
        if policy.is_some_and(|policy| {
            length == 0
                || policy.sequences.iter().any(|sequence| sequence.len() != length)
                || policy.draws.saturating_mul(length) > 1 << 16
        }) {
            return refused("a policy, expected sequences of one length above 0".into());
        }
        let mut steps = Vec::new();
        for step in policy.map(|policy| &policy.sequences).into_iter().flatten().flatten() {
            if !step.is_possible() {
                return refused(format!(
                    "{step:?}: expected a probability of 0 to 1, numbers of at most 32767, and one kind of operation"
                ));
            }
            steps.push(step.on_device(height, width));
        }
        let bytes = 2 * height * width * channels;
        let in_shared = table_bytes(&shape) + bytes <= SHARED_BYTES || !device.is_simt();
        let scratch = (!in_shared).then(|| device.zeros(batch * bytes)).transpose()?;
        Ok(Self { shape, augmentation, steps: device.upload(&steps)?, scratch })
    }

    /// As [`image::batch`], with all that is wanted in between. The draws depend on the seed and on the counter plus
    /// `position.first`, which a clock advances.
    ///
    /// Traffic: reads a byte and writes an element per value; what happens in between stays in shared memory, or in the
    /// CPU's first-level cache, unless the images are large.
    ///
    /// # Errors
    /// Those of [`image::batch`].
    pub fn run<S: Compute>(
        &mut self,
        images: Slice<'_, u8>,
        labels: Slice<'_, u32>,
        order: Slice<'_, u32>,
        position: Position<'_>,
        normalization: &Normalization,
        out: SliceMut<'_, S>,
        out_labels: SliceMut<'_, u32>,
    ) -> Result<()> {
        const NAME: &str = "Augmenter::run";
        let Self { shape, augmentation, steps, scratch } = self;
        let Augmentation { basic, resized_crop, policy, jitter } = augmentation;
        let basic = Some(*basic);
        let batch =
            image::arguments(NAME, shape, images, labels, order, position, normalization, basic, out, out_labels)?;
        if shape.batch == 0 {
            return Ok(());
        }
        let device = images.device();
        Check { operation: NAME, device }.device("steps", steps.device())?;
        let (whole_height, whole_width) = whole_crop(shape.height, shape.width);
        let args = AugmentArgs {
            batch,
            steps: steps.view().address(),
            scratch: scratch.as_mut().map_or(0, |scratch| scratch.view_mut().address()),
            draws: policy.as_ref().map_or(0, |policy| policy.draws) as u32,
            sequences: policy.as_ref().map_or(0, |policy| policy.sequences.len()) as u32,
            length: policy.as_ref().map_or(0, |policy| policy.sequences[0].len()) as u32,
            least_share: resized_crop.unwrap_or(0.0) as f32,
            whole_height: whole_height as u32,
            whole_width: whole_width as u32,
            brightness: jitter.brightness as f32,
            contrast: jitter.contrast as f32,
            saturation: jitter.saturation as f32,
            hue: jitter.hue as f32,
        };
        let values = shape.height * shape.width * shape.channels;
        let tables = table_bytes(shape);
        let launch = if device.is_simt() {
            let images = if scratch.is_some() { 0 } else { 2 * values };
            Launch::new(shape.batch as u32, BLOCK_THREADS as u32).with_shared(tables + images)
        } else {
            // With what every byte becomes, at an aligned place.
            let normal = 256 * shape.channels * size_of::<S>() + 8;
            device.elementwise(shape.batch * values, 1).with_shared(tables + 2 * values + normal)
        };
        let kernel = if scratch.is_some() { id::AUGMENT_LARGE_BATCH } else { id::AUGMENT_BATCH };
        // SAFETY: lengths are checked above; the scratch has two images for each of the batch; every index of a step
        // is below their number.
        unsafe { device.launch(S::choose(kernel), launch, &args) }
    }
}

/// Bytes of shared memory beside the images.
fn table_bytes(shape: &BatchShape) -> usize {
    AUGMENT_TABLE_BYTES * shape.channels + AUGMENT_TAP_BYTES * (shape.height + shape.width)
}

/// Height and width of a resized crop where no box fits: as much of the image as has a ratio of 3/4 to 4/3.
fn whole_crop(height: usize, width: usize) -> (usize, usize) {
    match (3 * width).cmp(&(4 * height)) {
        _ if 4 * width < 3 * height => (((width as f64 / 0.75).round_ties_even()) as usize, width),
        std::cmp::Ordering::Greater => (height, ((height as f64 * (4.0 / 3.0)).round_ties_even()) as usize),
        _ => (height, width),
    }
}

impl Operation {
    /// Its number, if it has one.
    fn number(self) -> f64 {
        match self {
            Self::ShearX(number)
            | Self::ShearY(number)
            | Self::TranslateX(number)
            | Self::TranslateY(number)
            | Self::Rotate(number)
            | Self::Brightness(number)
            | Self::Color(number)
            | Self::Contrast(number)
            | Self::Sharpness(number)
            | Self::Solarize(number) => number,
            _ => 0.0,
        }
    }
}

impl Step {
    /// Whether its numbers can be used, and both operations are of one kind.
    fn is_possible(&self) -> bool {
        let other = self.otherwise.unwrap_or(self.operation);
        let is_small = |operation: Operation| operation.number().abs() <= f64::from(i16::MAX);
        (0.0..=1.0).contains(&self.probability)
            && code(other) == code(self.operation)
            && is_small(self.operation)
            && is_small(other)
    }

    /// As the kernel reads it.
    fn on_device(&self, height: usize, width: usize) -> PolicyStep {
        let both = [self.operation, self.otherwise.unwrap_or(self.operation)];
        let maps = both.map(|operation| affine(operation, height, width).unwrap_or_default());
        let mut matrix = [0; 12];
        matrix[..6].copy_from_slice(&maps[0]);
        matrix[6..].copy_from_slice(&maps[1]);
        PolicyStep {
            operation: code(self.operation),
            chance: (self.probability * f64::from(1 << 24)).round() as u32,
            is_signed: self.otherwise.is_some().into(),
            factor: both.map(|operation| operation.number() as f32),
            number: both.map(|operation| match operation {
                Operation::Posterize(bits) => 256 - (1 << (8 - bits.min(8))),
                Operation::Solarize(threshold) => threshold.ceil() as i32,
                _ => 0,
            }),
            matrix,
        }
    }
}

fn code(operation: Operation) -> u32 {
    match operation {
        Operation::Identity => PIXEL_IDENTITY,
        Operation::ShearX(_)
        | Operation::ShearY(_)
        | Operation::TranslateX(_)
        | Operation::TranslateY(_)
        | Operation::Rotate(_) => PIXEL_AFFINE,
        Operation::Brightness(_) => PIXEL_BRIGHTNESS,
        Operation::Color(_) => PIXEL_COLOR,
        Operation::Contrast(_) => PIXEL_CONTRAST,
        Operation::Sharpness(_) => PIXEL_SHARPNESS,
        Operation::Posterize(_) => PIXEL_POSTERIZE,
        Operation::Solarize(_) => PIXEL_SOLARIZE,
        Operation::AutoContrast => PIXEL_AUTO_CONTRAST,
        Operation::Equalize => PIXEL_EQUALIZE,
        Operation::Invert => PIXEL_INVERT,
    }
}

/// Where a pixel of the result is taken from, as Pillow computes it: a row for the column and one for the row, in units
/// of 2^−16, at the pixels' centres.
fn affine(operation: Operation, height: usize, width: usize) -> Option<[i32; 6]> {
    let [a, b, c, d, e, f] = match operation {
        Operation::ShearX(shear) => [1.0, shear, 0.0, 0.0, 1.0, 0.0],
        Operation::ShearY(shear) => [1.0, 0.0, 0.0, shear, 1.0, 0.0],
        Operation::TranslateX(shift) => [1.0, 0.0, -shift.trunc(), 0.0, 1.0, 0.0],
        Operation::TranslateY(shift) => [1.0, 0.0, 0.0, 0.0, 1.0, -shift.trunc()],
        Operation::Rotate(degrees) => {
            let angle = -degrees.to_radians();
            let digits = |x: f64| (x * 1e15).round() / 1e15;
            let (cos, sin) = (digits(angle.cos()), digits(angle.sin()));
            let (x, y) = (width as f64 / 2.0, height as f64 / 2.0);
            [cos, sin, -cos * x - sin * y + x, -sin, cos, sin * x - cos * y + y]
        }
        _ => return None,
    };
    let fixed = |x: f64| (x * 65536.0 + 0.5).floor() as i32;
    Some([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5].map(fixed))
}
