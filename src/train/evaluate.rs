//! Loss and accuracy of a network over a split.

use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::TrainError;
use super::images::DeviceImages;
use crate::arena::Layout;
use crate::data::{ImageShape, Images};
use crate::device::{self, Bf16x6, Buffer, Compute, Device, Error, Event, Slice};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{self, BatchShape, Normalization, Position};
use crate::kernels::{clock, metrics};
use crate::plan::{Network, Plan, PlanOptions, Shape};

/// Batches of pictures that are decoded while a GPU evaluates one: one more than the next, so that pictures that take
/// longer delay nothing.
pub(super) const AHEAD: usize = 2;

/// The result of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Number of images.
    pub samples: usize,
    /// Number of wrongly classified images.
    pub errors: usize,
    /// Fraction of correctly classified images.
    pub accuracy: f64,
    /// Fraction of images whose class is among the five with the largest logits; none with ten classes or fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5_accuracy: Option<f64>,
    /// Mean cross-entropy.
    pub loss: f64,
}

/// A network ready to be evaluated on one split, which stays on the device, or in the files of pictures, which are
/// decoded batch by batch.
///
/// On the CPU it computes in f32. On a GPU convolutions multiply floats as sums of three bf16 numbers on the tensor
/// cores ([`Bf16x6`]), which is as accurate; batches are replays of one recorded batch, and their results are summed on
/// the device, so that nothing waits for a batch.
pub struct Evaluator {
    planned: Planned,
    images: DeviceImages,
    /// Of all images.
    labels: Vec<u32>,
    normalization: Normalization,
    /// Where the images are, in the order of the files.
    places: Buffer<u32>,
    sums: Sums,
}

/// The network's plan, in the precision that the device evaluates in.
enum Planned {
    F32(Plan<f32>),
    TensorCores(Plan<Bf16x6>),
}

/// Evaluates an expression for the plan in either precision.
macro_rules! with_plan {
    ($planned:expr, $plan:ident => $result:expr) => {
        match $planned {
            Planned::F32($plan) => $result,
            Planned::TensorCores($plan) => $result,
        }
    };
}

/// What batches leave on the device.
struct Sums {
    /// Batches done, twice.
    clock: Buffer<u64>,
    /// The mean loss of the newest batch.
    loss: Buffer<f64>,
    /// Loss times samples, correct predictions, samples.
    totals: Buffer<f64>,
    /// Zero: no batch is left out.
    skip: Buffer<u32>,
    /// What the clock would set from the rates of an epoch.
    rates: [Buffer<f64>; 2],
}

impl Sums {
    fn new(device: &Device) -> Result<Self, TrainError> {
        Ok(Self {
            clock: device.zeros(clock::LEN)?,
            loss: device.zeros(1)?,
            totals: device.zeros(3)?,
            skip: device.zeros(1)?,
            rates: [device.zeros(1)?, device.zeros(1)?],
        })
    }

    fn clear(&mut self) -> device::Result<()> {
        self.clock.clear()?;
        self.totals.clear()
    }
}

/// The images of a split, for the kernel that assembles batches.
#[derive(Clone, Copy)]
struct Source<'a> {
    pixels: Slice<'a, u8>,
    labels: Slice<'a, u32>,
    places: Slice<'a, u32>,
    normalization: &'a Normalization,
}

/// Evaluates the next batch, of which the first `counted` samples count, and adds what it found to the sums.
fn next_batch<S: Compute<Master = f32>>(
    plan: &mut Plan<S>,
    weights: Slice<'_, f32>,
    source: Source<'_>,
    counted: usize,
    sums: &mut Sums,
) -> device::Result<()> {
    let Shape { batch, height, width, channels } = plan.input_shape();
    let shape = BatchShape { batch, height, width, channels };
    let Source { pixels, labels: truth, places, normalization } = source;
    let (out, labels) = plan.batch_mut()?;
    let position = Position { first: 0, clock: Some((sums.clock.view(), batch)) };
    image::batch(&shape, pixels, truth, places, position, normalization, None, out, labels)?;
    plan.evaluate(weights, counted, sums.loss.view_mut())?;
    metrics::record(sums.loss.view(), plan.correct()?, sums.skip.view(), counted, sums.totals.view_mut())?;
    let [rates, rate] = &mut sums.rates;
    clock::advance(sums.clock.view_mut(), rates.view(), rate.view_mut())
}

impl Evaluator {
    /// Plans the network for batches of at most `batch_size` of these images, which errors call `name`. With
    /// [`Mode::Train`] each batch is normalised with its own statistics.
    ///
    /// # Errors
    /// A network that does not fit the images; too little memory on the device; with [`Mode::Train`]
    /// [`TrainError::Setting`] if the images do not divide into batches.
    pub fn new(
        device: &Device,
        network: Network<'_>,
        (name, images): (&str, &Images),
        normalization: Normalization,
        batch_size: usize,
        batch_norm: Mode,
    ) -> Result<Self, TrainError> {
        let batch = batch_size.min(images.len());
        if batch_norm == Mode::Train && !images.len().is_multiple_of(batch) {
            let reason = format!("{batch}, expected a divisor of the {} images", images.len());
            return Err(TrainError::setting("batch-size", reason));
        }
        let ImageShape { height, width, channels } = images.shape;
        let (shape, labels) = (Shape { batch, height, width, channels }, images.labels.clone());
        let (graph, logits) = network(shape, images.classes).map_err(TrainError::plan(name))?;
        let options = PlanOptions { batch_norm, ..PlanOptions::evaluation() };
        let planned = if device.is_host() {
            Plan::new(device, graph, logits, options).map(Planned::F32)
        } else {
            Plan::new(device, graph, logits, options).map(Planned::TensorCores)
        };
        let planned = planned.map_err(TrainError::plan(name))?;
        let (images, places) = on_device(device, images, batch)?;
        Ok(Self { planned, images, labels, normalization, places, sums: Sums::new(device)? })
    }

    /// Evaluates these weights and running statistics, which have the lengths of the [layouts](Self::layouts).
    /// `logits` receives the logits of each batch (samples × classes, row by row); the last batch may have fewer
    /// samples. On a GPU a batch may still be computed when `logits` receives them, until it reads them.
    ///
    /// # Errors
    /// Slices of another length or device; failures of the device; pictures that cannot be decoded; those of `logits`.
    pub fn evaluate(
        &mut self,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        logits: impl FnMut(Slice<'_, f32>) -> Result<(), TrainError>,
    ) -> Result<Evaluation, TrainError> {
        let Self { planned, images, labels, normalization, places, sums } = self;
        with_plan!(planned, plan => {
            evaluate(plan, (weights, statistics), images, labels, (places.view(), &*normalization), sums, logits)
        })
    }

    /// Takes other images for the next evaluation, as many and of the same shape.
    ///
    /// # Errors
    /// Images of another number or shape; failures of the device.
    pub fn replace_images(&mut self, name: &str, images: &Images) -> Result<(), TrainError> {
        let (Shape { batch, height, width, channels }, classes) =
            with_plan!(&self.planned, plan => (plan.input_shape(), plan.classes()));
        let shape = ImageShape { height, width, channels };
        if images.shape != shape || images.len() != self.images.count || images.classes != classes {
            let reason = format!(
                "{} images of {} in {name}, expected {} of {shape}, and as many classes as before",
                images.len(),
                images.shape,
                self.images.count
            );
            return Err(TrainError::setting("data", reason));
        }
        let device = self.places.device().clone();
        (self.images, self.places) = on_device(&device, images, batch)?;
        self.labels.clone_from(&images.labels);
        Ok(())
    }

    /// Where each parameter lies, and where each running statistic.
    pub fn layouts(&self) -> [&Layout; 2] {
        with_plan!(&self.planned, plan => [plan.parameters(), plan.statistics_layout()])
    }
}

fn evaluate<S: Compute<Master = f32>>(
    plan: &mut Plan<S>,
    (weights, statistics): (Slice<'_, f32>, Slice<'_, f32>),
    images: &mut DeviceImages,
    labels: &[u32],
    (places, normalization): (Slice<'_, u32>, &Normalization),
    sums: &mut Sums,
    mut logits: impl FnMut(Slice<'_, f32>) -> Result<(), TrainError>,
) -> Result<Evaluation, TrainError> {
    plan.set_statistics(statistics)?;
    sums.clear()?;
    let device = weights.device().clone();
    let (batch, samples, classes) = (plan.input_shape().batch, images.count, plan.classes());
    let parts = (0..samples).step_by(batch).map(move |first| part(first, batch, samples));
    let (mut queue, go_on) = (images.queue(parts, AHEAD), AtomicBool::new(false));
    // The first batch allocates memory, so the second one is recorded. A driver may refuse that.
    let (mut recorded, mut records) = (None, !device.is_host());
    // The ends of the newest two batches. The host stays at most two ahead, so that it stops quickly.
    let mut ends: [Option<Event>; 2] = [None, None];
    let mut among_five = 0;
    for first in (0..samples).step_by(batch) {
        let counted = batch.min(samples - first);
        if let Some(queue) = &mut queue
            && let Some(part) = queue.next(&go_on)?
        {
            images.put(first, part)?;
        }
        let (pixels, truth) = images.views();
        let source = Source { pixels, labels: truth, places, normalization };
        if first > 0 && counted == batch && records && recorded.is_none() {
            match device.capture(|| next_batch(plan, weights, source, batch, sums)) {
                Ok(graph) => recorded = Some(graph),
                Err(Error::Cuda { .. }) => records = false,
                Err(other) => return Err(other.into()),
            }
        }
        if let Some(end) = &ends[0] {
            end.wait()?;
        }
        match &recorded {
            Some(graph) if counted == batch => graph.replay()?,
            _ => next_batch(plan, weights, source, counted, sums)?,
        }
        ends.rotate_left(1);
        ends[1] = Some(device.event()?);
        let found = plan.logits()?.slice(0..counted * classes)?;
        if classes > 10 {
            let rows = found.to_vec()?;
            let hit = |(row, &label): (&[f32], &u32)| usize::from(is_among(row, label as usize, 5));
            among_five += rows.chunks(classes).zip(&labels[first..]).map(hit).sum::<usize>();
        }
        logits(found)?;
    }
    let mut totals = [0.0; 3];
    sums.totals.read(&mut totals)?;
    let [loss, correct, _] = totals;
    let accuracy = correct / samples as f64;
    let top5_accuracy = (classes > 10).then(|| among_five as f64 / samples as f64);
    let errors = samples - correct as usize;
    Ok(Evaluation { samples, errors, accuracy, top5_accuracy, loss: loss / samples as f64 })
}

/// The images of a split and their places, for batches in the order of the files.
fn on_device(device: &Device, images: &Images, batch: usize) -> Result<(DeviceImages, Buffer<u32>), TrainError> {
    let samples = images.len();
    let order: Vec<u32> = (0..samples).step_by(batch).flat_map(|first| part(first, batch, samples)).collect();
    let images = DeviceImages::new(device, images, batch)?;
    let places = device.upload(&images.places(&order))?;
    Ok((images, places))
}

/// The samples of a batch. The last batch is filled up with the first samples, which are not counted.
fn part(first: usize, batch: usize, samples: usize) -> Vec<u32> {
    (first..first + batch).map(|sample| (sample % samples) as u32).collect()
}

/// Whether the logit of a class is among the largest so many. Of equal ones the first is larger; a NaN never is.
fn is_among(logits: &[f32], class: usize, most: usize) -> bool {
    let Some(&own) = logits.get(class).filter(|own| !own.is_nan()) else { return false };
    let larger = |&(index, logit): &(usize, f32)| logit > own || logit == own && index < class;
    logits.iter().copied().enumerate().filter(larger).count() < most
}

#[cfg(test)]
mod tests {
    use super::{Evaluator, is_among};
    use crate::data::{SyntheticSpec, synthetic};
    use crate::device::Device;
    use crate::kernels::batch_norm::Mode;
    use crate::nn::{Model, initial_weights};
    use crate::train::normalization;

    /// In batches of 2 that are replayed, and a last one of one image.
    #[test]
    fn a_gpu_finds_what_the_cpu_finds() {
        let name = std::env::var("POLDER_TEST_DEVICE").unwrap_or_default();
        if !name.starts_with("cuda") {
            return eprintln!("skipped: POLDER_TEST_DEVICE names no GPU");
        }
        let set = synthetic(&SyntheticSpec { train: 1, test: 7, side: 8, ..SyntheticSpec::default() }).unwrap();
        let network = |shape, classes| Model::from_name("resnet8", None).unwrap().trace(shape, classes);
        let normalization = normalization(None, None, (&set.mean, &set.std), 3).unwrap();
        let found = [Device::host(), Device::from_name(&name).unwrap()].map(|device| {
            let images = ("set", &set.test);
            let mut evaluator = Evaluator::new(&device, &network, images, normalization, 2, Mode::Eval).unwrap();
            let [weights, statistics] =
                evaluator.layouts().map(|layout| device.upload(&initial_weights(layout, 3).unwrap()).unwrap());
            // The second time its graph is recorded anew.
            [0, 1].map(|_| {
                let mut logits = Vec::new();
                let found = evaluator
                    .evaluate(weights.view(), statistics.view(), |batch| {
                        logits.extend(batch.to_vec()?);
                        Ok(())
                    })
                    .unwrap();
                (found, logits)
            })
        });
        let [[cpu, _], [gpu, again]] = &found;
        assert_eq!((gpu.0, &gpu.1), (again.0, &again.1));
        assert_eq!((gpu.0.samples, gpu.0.errors, gpu.1.len()), (7, cpu.0.errors, 70));
        assert!((gpu.0.loss - cpu.0.loss).abs() < 1e-5 * cpu.0.loss, "{} {}", gpu.0.loss, cpu.0.loss);
        let scale = cpu.1.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
        assert!(gpu.1.iter().zip(&cpu.1).all(|(gpu, cpu)| (gpu - cpu).abs() < 1e-5 * scale));
    }

    #[test]
    fn the_first_of_equal_logits_is_larger() {
        let logits = [0.5, 2.0, 0.5, -1.0, 0.5, f32::NAN];
        let ranks = |class: usize| (1..=6).position(|most| is_among(&logits, class, most));
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(ranks), [Some(1), Some(0), Some(2), Some(4), Some(3), None, None]);
    }
}
