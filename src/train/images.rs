//! The images of a run, an evaluation or a measurement: opened, normalised, on the device, and as an objective.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::TrainError;
use super::queue::{Part, Queue};
use super::settings::{NoiseKind, RunSettings};
use crate::data::{self, DataError, Dataset, Images, LoadOptions, Pictures, Pixels, Split, StatisticsSource};
use crate::device::{self, Buffer, Compute, Device, Error, HostOptions, Slice};
use crate::kernels::augment::{Augmentation, Augmenter, Jitter};
use crate::kernels::image::{self, Augment, BatchShape, Normalization, Position};
use crate::kernels::mixing::Mixer;
use crate::objective::{Answer, Objective, Pass, Wrapper};
use crate::plan::Plan;

/// Images and labels of a split, on the device: all of them, or where the pictures stay in files, slots for those that
/// are needed next.
pub(super) struct DeviceImages {
    pixels: Buffer<u8>,
    labels: Buffer<u32>,
    /// Images of the split.
    pub count: usize,
    streamed: Option<Streamed>,
}

/// Where the images in the slots come from.
struct Streamed {
    pictures: Arc<Pictures>,
    labels: Vec<u32>,
    /// Bytes of an image.
    image: usize,
}

impl DeviceImages {
    /// All images.
    pub fn all(device: &Device, images: &Images) -> Result<Self, TrainError> {
        let pixels = images.bytes_of(0..images.len())?;
        let (pixels, labels) = (device.upload(&pixels)?, device.upload(&images.labels)?);
        Ok(Self { pixels, labels, count: images.len(), streamed: None })
    }

    /// All images, or so many slots if the pictures stay in files.
    pub fn new(device: &Device, images: &Images, slots: usize) -> Result<Self, TrainError> {
        let Pixels::Files(pictures) = &images.pixels else { return Self::all(device, images) };
        let image = images.shape.bytes();
        let streamed = Streamed { pictures: Arc::new(pictures.clone()), labels: images.labels.clone(), image };
        let (pixels, labels) = (device.zeros(slots * image)?, device.zeros(slots)?);
        Ok(Self { pixels, labels, count: images.len(), streamed: Some(streamed) })
    }

    /// Whether the images are decoded as they are needed, so that their places have to be filled.
    pub fn is_streamed(&self) -> bool {
        self.streamed.is_some()
    }

    /// Where on the device the images of an order are: the images themselves, or the slots of their places.
    pub fn places(&self, order: &[u32]) -> Vec<u32> {
        match self.streamed {
            Some(_) => (0..order.len()).map(|place| (place % self.labels.len()) as u32).collect(),
            None => order.to_vec(),
        }
    }

    /// Decodes these parts of an order, on a GPU so many of them ahead of their use. On the CPU the threads would take
    /// cores from the kernels, whose own threads then wait for one another. None where all images are on the device.
    pub fn queue(&self, parts: impl Iterator<Item = Vec<u32>> + Send + 'static, ahead: usize) -> Option<Queue> {
        let Streamed { pictures, image, .. } = self.streamed.as_ref()?;
        let (pictures, threads) = (pictures.clone(), thread::available_parallelism().map_or(1, usize::from));
        let ahead = if self.pixels.device().is_host() { 0 } else { ahead };
        Some(Queue::new(parts, *image, ahead, threads, move |sample| pictures.decode(sample as usize)))
    }

    /// Puts the images of a part that begins at this place of the order in their slots. The number of slots is a
    /// multiple of the part's.
    pub fn put(&mut self, place: usize, part: &Part) -> Result<(), TrainError> {
        let Some(Streamed { labels, image, .. }) = &self.streamed else { return Ok(()) };
        let first = place % self.labels.len();
        let end = first + part.samples.len();
        let labels: Vec<u32> = part.samples.iter().map(|&sample| labels[sample as usize]).collect();
        self.pixels.slice_mut(first * image..end * image)?.write(&part.pixels)?;
        Ok(self.labels.slice_mut(first..end)?.write(&labels)?)
    }

    /// Pixels and labels.
    pub fn views(&self) -> (Slice<'_, u8>, Slice<'_, u32>) {
        (self.pixels.view(), self.labels.view())
    }
}

/// The device of this name: `cpu`, `cuda:N`, or `auto`, which is the first GPU, or the CPU if there is none.
/// `threads` is the number of threads of the CPU; 0 takes one per core. A GPU ignores it.
///
/// # Errors
/// An unknown name, or a device that is not available.
pub fn open_device(name: &str, threads: usize) -> Result<Device, TrainError> {
    let host = HostOptions { threads, ..HostOptions::default() };
    match name {
        "cpu" => Ok(Device::host_with(host)),
        "auto" => Ok(Device::auto(host)?),
        name => Ok(Device::from_name(name)?),
    }
}

/// The data set at the path that the settings name, before any reduction. The options are for the pictures of a folder;
/// `watch` receives how many of a split are decoded, and of how many, and stops the work by returning false.
///
/// # Errors
/// Those of the files; an empty path; [`Error::Stopped`].
pub fn open_data(
    path: &str,
    options: &LoadOptions,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Dataset, TrainError> {
    not_empty(path)?;
    data::load_with(Path::new(path), options, watch).map_err(of_reading)
}

/// One split of that data set.
///
/// # Errors
/// As [`open_data`].
pub fn open_split(
    path: &str,
    split: Split,
    options: &LoadOptions,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<data::SplitImages, TrainError> {
    not_empty(path)?;
    data::load_split_with(Path::new(path), split, options, watch).map_err(of_reading)
}

/// Blames the setting where a size of images is missing, or of no use.
fn of_reading(error: DataError) -> TrainError {
    match error {
        DataError::NotResized { .. } | DataError::PictureSizes { .. } => {
            TrainError::setting("image-size", error.to_string())
        }
        DataError::Stopped => TrainError::Device(Error::Stopped),
        error => error.into(),
    }
}

/// The training images of a data set as a run uses them, and those that it holds out, if any: of the first `train-size`
/// images the share `validation` is held out, and the others get the label noise.
///
/// # Errors
/// Settings that do not fit the images.
pub fn training_images(
    images: Images,
    (name, statistics): (&str, StatisticsSource),
    settings: &RunSettings,
) -> Result<(Images, Option<Images>), TrainError> {
    let (data, seed) = (&settings.data, settings.run.seed);
    let of = |setting: &'static str| move |error: DataError| TrainError::setting(setting, error.to_string());
    let images = match data.train_size {
        Some(n) => images.take(n).map_err(of("train-size"))?,
        None => images,
    };
    let (mut train, held) = match data.validation {
        Some(fraction) if fraction > 0.0 => {
            let [train, held] = images.hold_out(fraction, seed).map_err(of("validation"))?;
            (train, Some(held))
        }
        _ => (images, None),
    };
    if let Some(fraction) = data.label_noise {
        // A folder may have the name of a data set by chance; the published values are known for the set itself.
        let name = if statistics == StatisticsSource::Published { name } else { "" };
        train = match data.label_noise_kind {
            NoiseKind::Symmetric => train.with_label_noise(fraction, seed)?,
            NoiseKind::Asymmetric => train.with_asymmetric_noise(fraction, seed, name)?,
        };
    }
    Ok((train, held))
}

fn not_empty(path: &str) -> Result<(), TrainError> {
    match path {
        "" => Err(TrainError::setting("data", "empty, expected a folder or synthetic")),
        _ => Ok(()),
    }
}

/// The given normalisation, or else the data set's. Means and standard deviations are those of pixel/255, one for each
/// channel.
///
/// # Errors
/// Not one value for each channel, or a deviation that is not positive.
pub fn normalization(
    mean: Option<&[f32]>,
    std: Option<&[f32]>,
    data: (&[f32], &[f32]),
    channels: usize,
) -> Result<Normalization, TrainError> {
    let mut normalization = Normalization { mean: [0.0; 4], std: [1.0; 4] };
    for (option, values, into) in [
        ("mean", mean.unwrap_or(data.0), &mut normalization.mean),
        ("std", std.unwrap_or(data.1), &mut normalization.std),
    ] {
        if values.len() != channels || channels > into.len() {
            let reason = format!("{} numbers, expected {channels}, one for each channel", values.len());
            return Err(TrainError::setting(option, reason));
        }
        if values.iter().any(|value| !value.is_finite() || (option == "std" && *value <= 0.0)) {
            let kind = if option == "std" { "finite numbers above 0" } else { "finite numbers" };
            let found: Vec<String> = values.iter().map(f32::to_string).collect();
            return Err(TrainError::setting(option, format!("{}, expected {kind}", found.join(","))));
        }
        into[..channels].copy_from_slice(values);
    }
    Ok(normalization)
}

/// How a batch is assembled.
pub(super) enum Assembly {
    /// In one pass over the values, with what is possible there.
    Pass(Option<Augment>),
    /// With operations on whole images.
    Whole(Box<Augmenter>),
}

impl Assembly {
    /// For batches of this shape.
    ///
    /// # Errors
    /// Images that the operations cannot be applied to; too little memory.
    pub fn new(device: &Device, shape: BatchShape, wanted: Option<Augmentation>) -> Result<Self, TrainError> {
        match wanted {
            Some(Augmentation { resized_crop: None, policy: None, jitter, basic }) if jitter == Jitter::default() => {
                Ok(Self::Pass(Some(basic)))
            }
            Some(_) if !matches!(shape.channels, 1 | 3) => {
                let found = format!("images of {} channels, expected one or three with", shape.channels);
                let options = "random-resized-crop, auto-augment, rand-augment or color-jitter";
                Err(TrainError::setting("data", format!("{found} {options}")))
            }
            Some(wanted) => Ok(Self::Whole(Box::new(Augmenter::new(device, shape, wanted)?))),
            None => Ok(Self::Pass(None)),
        }
    }
}

/// Images of a split as an objective: the plan, filled with one part of them at a time.
pub(super) struct Batch<'a, S: Compute> {
    pub plan: &'a mut Plan<S>,
    /// The shape of one part.
    pub shape: BatchShape,
    pub pixels: Slice<'a, u8>,
    pub labels: Slice<'a, u32>,
    /// Indices of samples.
    pub order: Slice<'a, u32>,
    /// How many of them belong to the batch: the first ones, or those that the clock points at. If they do not fill a
    /// last part, `order` has others to fill it up, which do not count.
    pub samples: usize,
    /// Ends the work with an error when it is set.
    pub stop: Option<&'a AtomicBool>,
    pub clock: Option<Slice<'a, u64>>,
    pub normalization: &'a Normalization,
    pub assembly: &'a mut Assembly,
    pub mixer: Option<&'a Mixer>,
    /// The stream of the network's own random numbers; none for a network in evaluation.
    pub draws: Option<u64>,
}

impl<S: Compute<Master = f32>> Wrapper<f32> for Batch<'_, S> {
    fn inner(&self) -> &dyn Objective<f32> {
        self.plan
    }

    fn inner_mut(&mut self) -> &mut dyn Objective<f32> {
        self.plan
    }

    fn groups(&self) -> usize {
        self.samples.div_ceil(self.shape.batch)
    }

    fn answer<'p>(&mut self, pass: Pass<'p, f32>) -> device::Result<Answer<'p, f32>> {
        if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Err(Error::Stopped);
        }
        let Pass::Select { group } = pass else { return Ok(Answer::Forward(pass)) };
        self.plan.count_samples((self.samples - group * self.shape.batch).min(self.shape.batch))?;
        let clock = self.clock.map(|clock| (clock, self.samples));
        let position = Position { first: group * self.shape.batch, clock };
        if let Some(seed) = self.draws {
            self.plan.draw(seed, position)?;
        }
        let (shape, pixels, truth, order) = (&self.shape, self.pixels, self.labels, self.order);
        let (normalization, assembly) = (self.normalization, &mut *self.assembly);
        let mut assemble = |images, labels| match assembly {
            Assembly::Pass(augment) => {
                image::batch(shape, pixels, truth, order, position, normalization, *augment, images, labels)
            }
            Assembly::Whole(augmenter) => augmenter.run(pixels, truth, order, position, normalization, images, labels),
        };
        if let Some(mixer) = self.mixer {
            let (mut images, mut labels, mut mixed) = self.plan.mixed_batch_mut()?;
            assemble(images.reborrow(), labels.reborrow())?;
            mixer.run(shape, position, images, labels.view(), &mut mixed)?;
        } else {
            let (images, labels) = self.plan.batch_mut()?;
            assemble(images, labels)?;
        }
        Ok(Answer::Done)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::device::{Device, HostOptions};
    use crate::nn::{CifarResNet, Shortcut};
    use crate::objective::{Accumulator, ObjectiveExt, Wrapped};
    use crate::optim::{Base, CrSam, Form, Optimizer, Settings};
    use crate::plan::{PlanOptions, Shape};

    /// A plan's fast paths reach the optimizer through the objectives between them: CR-SAM's first gradient comes with
    /// its norm, no gradient takes a second pass, and the other gradients come as a pair, for which the batch is
    /// copied. In 16 bits their weights are rounded as they are displaced.
    #[test]
    fn a_step_of_training_has_all_that_the_plan_offers() {
        let list = operations::<f32>();
        let count = |name: &str| list.iter().filter(|operation| *operation == name).count();
        let passes_over_gradients = |list: &[String]| {
            let over =
                |name: &&String| ["finish", "squares", "check", "unscale"].iter().any(|pass| name.starts_with(pass));
            list.iter().filter(over).count()
        };
        assert_eq!((count("gradient_pieces_f32"), passes_over_gradients(&list)), (3, 0), "{list:?}");
        assert_eq!((count("copy"), count("perturb_f32_f32")), (1, 1), "{list:?}");
        let list = operations::<bf16>();
        let count = |name: &str| list.iter().filter(|operation| *operation == name).count();
        assert_eq!((count("gradient_pieces_f32"), passes_over_gradients(&list)), (3, 0), "{list:?}");
        assert_eq!(
            (count("convert_f32_bf16"), count("perturb_f32_bf16"), count("perturb_f32_f32")),
            (1, 1, 1),
            "{list:?}"
        );
    }

    /// The operations that a step of CR-SAM launches.
    fn operations<S: Compute<Master = f32>>() -> Vec<String> {
        let device = Device::host_with(HostOptions { emulate_gpu: true, ..HostOptions::default() });
        let images = Shape { batch: 2, height: 8, width: 8, channels: 3 };
        let (graph, logits) = CifarResNet { blocks: 1, shortcut: Shortcut::A }.trace(images, 5).unwrap();
        let mut plan = Plan::<S>::new(&device, graph, logits, PlanOptions::training()).unwrap();
        let pixels: Vec<u8> = (0..2 * 8 * 8 * 3).map(|i| (i * 37 % 251) as u8).collect();
        let pixels = device.upload(&pixels).unwrap();
        let (labels, order) = (device.upload(&[1u32, 3]).unwrap(), device.upload(&[0u32, 1]).unwrap());
        let mut weights = device.upload(&vec![0.1f32; plan.len()]).unwrap();
        let method = CrSam { form: Form::Released, ..CrSam::default() };
        let settings = Settings::new(method, Base::sgd(0.9));
        let mut optimizer = Optimizer::new(&device, plan.len(), settings).unwrap();
        let mut accumulator = Accumulator::new(&device, plan.len(), 1).unwrap();
        let normalization = Normalization { mean: [0.5; 4], std: [0.25; 4] };
        let mut batch = Wrapped(Batch {
            plan: &mut plan,
            shape: BatchShape { batch: 2, height: 8, width: 8, channels: 3 },
            pixels: pixels.view(),
            labels: labels.view(),
            order: order.view(),
            samples: 2,
            stop: None,
            clock: None,
            normalization: &normalization,
            assembly: &mut Assembly::Pass(None),
            mixer: None,
            draws: None,
        });
        let mut step = || optimizer.step(&mut accumulator.over(&mut batch), weights.view_mut(), 0.1);
        step().unwrap();
        device.capture(step).unwrap().list().unwrap()
    }
}
