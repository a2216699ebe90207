//! Loss and accuracy of a network over a split.

use serde::Serialize;

use super::TrainError;
use super::images::DeviceImages;
use crate::data::{ImageShape, Images};
use crate::device::{Buffer, Device, Slice};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{self, BatchShape, Normalization, Position};
use crate::plan::{Network, Plan, PlanOptions, Shape};

/// The result of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Number of images.
    pub samples: usize,
    /// Number of wrongly classified images.
    pub errors: usize,
    /// Fraction of correctly classified images.
    pub accuracy: f64,
    /// Mean cross-entropy.
    pub loss: f64,
}

/// A network ready to be evaluated on one split, which stays on the device.
pub struct Evaluator {
    plan: Plan<f32>,
    images: DeviceImages,
    normalization: Normalization,
    /// 0, 1, 2, …: samples in the order of the files.
    order: Buffer<u32>,
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
        let shape = Shape { batch, height, width, channels };
        let (graph, logits) = network(shape, images.classes).map_err(TrainError::plan(name))?;
        let plan = Plan::new(device, graph, logits, PlanOptions { batch_norm, ..PlanOptions::evaluation() })
            .map_err(TrainError::plan(name))?;
        // The last batch is filled up with the first samples, which are not counted.
        let count = images.len().next_multiple_of(batch);
        let order: Vec<u32> = (0..count).map(|sample| (sample % images.len()) as u32).collect();
        Ok(Self {
            plan,
            images: DeviceImages::new(device, images)?,
            normalization,
            order: device.upload(&order)?,
            loss: device.zeros(1)?,
        })
    }

    /// Evaluates these weights and running statistics, which have the lengths of the plan's layouts
    /// ([`Plan::parameters`], [`Plan::statistics_layout`]). `logits` receives the logits of each batch (samples ×
    /// classes, row by row); the last batch may have fewer samples.
    ///
    /// # Errors
    /// Slices of another length or device; failures of the device; those of `logits`.
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
        let (mut total, mut correct) = (0.0, 0);
        for first in (0..samples).step_by(batch) {
            let counted = batch.min(samples - first);
            let order = self.order.slice(first..first + batch)?;
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
            logits(self.plan.logits()?.slice(0..counted * self.plan.classes())?)?;
        }
        let accuracy = correct as f64 / samples as f64;
        Ok(Evaluation { samples, errors: samples - correct, accuracy, loss: total / samples as f64 })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan<f32> {
        &self.plan
    }
}
