//! Curvature of a model's loss over images.

use super::TrainError;
use super::images::{Batch, DeviceImages};
use crate::curvature::Curvature;
use crate::data::{ImageShape, Images};
use crate::device::{Buffer, Device, Slice};
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::{BatchShape, Normalization};
use crate::nn::Model;
use crate::objective::{Accumulated, Accumulator};
use crate::plan::{Plan, PlanOptions, Shape};

/// A model and the images over which its mean loss is looked at, in equal parts.
pub struct CurvatureMeter {
    plan: Plan<f32>,
    images: DeviceImages,
    shape: BatchShape,
    normalization: Normalization,
    /// 0, 1, 2, …: all of the images.
    order: Buffer<u32>,
    accumulator: Accumulator<f32>,
}

impl CurvatureMeter {
    /// Plans the model for parts of `batch_size` of these images, which errors call `name`. With [`Mode::Train`] each part is
    /// normalised by itself.
    ///
    /// # Errors
    /// [`TrainError::Option`] where the parts do not make up the images, a model that does not fit them, or the device's memory.
    pub fn new(
        device: &Device,
        model: Model,
        (name, images): (&str, &Images),
        normalization: Normalization,
        batch_size: usize,
        batch_norm: Mode,
    ) -> Result<Self, TrainError> {
        if !images.len().is_multiple_of(batch_size) {
            let reason = format!("{batch_size}, expected a divisor of the {} images", images.len());
            return Err(TrainError::option("--batch-size", reason));
        }
        let ImageShape { height, width, channels } = images.shape;
        let shape = Shape { batch: batch_size, height, width, channels };
        let (graph, logits) = model.trace(shape, images.classes).map_err(TrainError::plan(name))?;
        let options = PlanOptions { batch_norm, ..PlanOptions::training() };
        let plan = Plan::new(device, graph, logits, options).map_err(TrainError::plan(name))?;
        let order: Vec<u32> = (0..images.len() as u32).collect();
        Ok(Self {
            accumulator: Accumulator::new(device, plan.parameters().len(), images.len() / batch_size)?,
            plan,
            images: DeviceImages::new(device, images)?,
            shape: BatchShape { batch: batch_size, height, width, channels },
            normalization,
            order: device.upload(&order)?,
        })
    }

    /// The plan that it runs.
    pub fn plan(&self) -> &Plan<f32> {
        &self.plan
    }

    /// What `measure` finds at these weights and running statistics.
    ///
    /// # Errors
    /// Those of the measurement.
    pub fn at<R>(
        &mut self,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        measure: impl FnOnce(&mut Curvature<'_, f32, Accumulated<'_, f32, Batch<'_, f32>>>) -> crate::device::Result<R>,
    ) -> Result<R, TrainError> {
        self.plan.set_statistics(statistics)?;
        let (pixels, labels) = self.images.views();
        let mut images = Batch {
            plan: &mut self.plan,
            shape: self.shape,
            pixels,
            labels,
            order: self.order.view(),
            samples: self.order.len(),
            clock: None,
            normalization: &self.normalization,
            augment: None,
        };
        let mut all = self.accumulator.over(&mut images);
        Ok(measure(&mut Curvature::new(&mut all, weights)?)?)
    }

    /// What `measure` finds for the loss of each part by itself.
    ///
    /// # Errors
    /// Those of the measurement.
    pub fn at_each_part<R>(
        &mut self,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        mut measure: impl FnMut(&mut Curvature<'_, f32, Batch<'_, f32>>) -> crate::device::Result<R>,
    ) -> Result<Vec<R>, TrainError> {
        self.plan.set_statistics(statistics)?;
        let (pixels, labels) = self.images.views();
        let part = self.shape.batch;
        let found = (0..self.order.len() / part).map(|number| {
            let mut images = Batch {
                plan: &mut self.plan,
                shape: self.shape,
                pixels,
                labels,
                order: self.order.slice(number * part..(number + 1) * part)?,
                samples: part,
                clock: None,
                normalization: &self.normalization,
                augment: None,
            };
            Ok(measure(&mut Curvature::new(&mut images, weights)?)?)
        });
        found.collect()
    }
}
