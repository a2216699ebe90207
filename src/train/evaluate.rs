//! Loss and accuracy of a network over a split.

use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::TrainError;
use super::images::DeviceImages;
use crate::data::{ImageShape, Images};
use crate::device::{Buffer, Device, Slice};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{self, BatchShape, Normalization, Position};
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
pub struct Evaluator {
    plan: Plan<f32>,
    images: DeviceImages,
    /// Of all images.
    labels: Vec<u32>,
    normalization: Normalization,
    /// Where the images are, in the order of the files.
    places: Buffer<u32>,
    loss: Buffer<f64>,
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
        let plan = Plan::new(device, graph, logits, PlanOptions { batch_norm, ..PlanOptions::evaluation() })
            .map_err(TrainError::plan(name))?;
        let (images, places) = on_device(device, images, batch)?;
        Ok(Self { plan, images, labels, normalization, places, loss: device.zeros(1)? })
    }

    /// Evaluates these weights and running statistics, which have the lengths of the plan's layouts
    /// ([`Plan::parameters`], [`Plan::statistics_layout`]). `logits` receives the logits of each batch (samples ×
    /// classes, row by row); the last batch may have fewer samples.
    ///
    /// # Errors
    /// Slices of another length or device; failures of the device; pictures that cannot be decoded; those of `logits`.
    pub fn evaluate(
        &mut self,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        mut logits: impl FnMut(Slice<'_, f32>) -> Result<(), TrainError>,
    ) -> Result<Evaluation, TrainError> {
        self.plan.set_statistics(statistics)?;
        let Shape { batch, height, width, channels } = self.plan.input_shape();
        let shape = BatchShape { batch, height, width, channels };
        let samples = self.images.count;
        let (mut total, mut correct, mut among_five) = (0.0, 0, 0);
        let classes = self.plan.classes();
        let parts = (0..samples).step_by(batch).map(move |first| part(first, batch, samples));
        let (mut queue, go_on) = (self.images.queue(parts, AHEAD), AtomicBool::new(false));
        for first in (0..samples).step_by(batch) {
            let counted = batch.min(samples - first);
            if let Some(queue) = &mut queue
                && let Some(part) = queue.next(&go_on)?
            {
                self.images.put(first, part)?;
            }
            let order = self.places.slice(first..first + batch)?;
            let (out, labels) = self.plan.batch_mut()?;
            let (pixels, truth) = self.images.views();
            let start = Position::default();
            image::batch(&shape, pixels, truth, order, start, &self.normalization, None, out, labels)?;
            self.plan.evaluate(weights, counted, self.loss.view_mut())?;
            let (mut loss, mut hits) = ([0.0], [0]);
            self.loss.read(&mut loss)?;
            self.plan.correct()?.read(&mut hits)?;
            total += loss[0] * counted as f64;
            correct += hits[0] as usize;
            let found = self.plan.logits()?.slice(0..counted * classes)?;
            if classes > 10 {
                let rows = found.to_vec()?;
                let hit = |(row, &label): (&[f32], &u32)| usize::from(is_among(row, label as usize, 5));
                among_five += rows.chunks(classes).zip(&self.labels[first..]).map(hit).sum::<usize>();
            }
            logits(found)?;
        }
        let accuracy = correct as f64 / samples as f64;
        let top5_accuracy = (classes > 10).then(|| among_five as f64 / samples as f64);
        Ok(Evaluation { samples, errors: samples - correct, accuracy, top5_accuracy, loss: total / samples as f64 })
    }

    /// Takes other images for the next evaluation, as many and of the same shape.
    ///
    /// # Errors
    /// Images of another number or shape; failures of the device.
    pub fn replace_images(&mut self, name: &str, images: &Images) -> Result<(), TrainError> {
        let Shape { height, width, channels, .. } = self.plan.input_shape();
        let shape = ImageShape { height, width, channels };
        if images.shape != shape || images.len() != self.images.count || images.classes != self.plan.classes() {
            let reason = format!(
                "{} images of {} in {name}, expected {} of {shape}, and as many classes as before",
                images.len(),
                images.shape,
                self.images.count
            );
            return Err(TrainError::setting("data", reason));
        }
        let device = self.places.device().clone();
        (self.images, self.places) = on_device(&device, images, self.plan.input_shape().batch)?;
        self.labels.clone_from(&images.labels);
        Ok(())
    }

    /// The plan.
    pub fn plan(&self) -> &Plan<f32> {
        &self.plan
    }
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
    use super::is_among;

    #[test]
    fn the_first_of_equal_logits_is_larger() {
        let logits = [0.5, 2.0, 0.5, -1.0, 0.5, f32::NAN];
        let ranks = |class: usize| (1..=6).position(|most| is_among(&logits, class, most));
        assert_eq!([0, 1, 2, 3, 4, 5, 6].map(ranks), [Some(1), Some(0), Some(2), Some(4), Some(3), None, None]);
    }
}
