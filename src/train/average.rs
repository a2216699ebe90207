//! A moving average of a run's weights and running statistics.

use super::TrainError;
use crate::device::{self, Buffer, Device, Slice};
use crate::kernels::vector;

/// The averages, on the device.
pub(super) struct Average {
    decay: f64,
    pub weights: Buffer<f32>,
    pub statistics: Buffer<f32>,
}

impl Average {
    /// It begins with what it averages.
    pub fn new(device: &Device, decay: f64, weights: &[f32], statistics: &[f32]) -> Result<Self, TrainError> {
        Ok(Self { decay, weights: device.upload(weights)?, statistics: device.upload(statistics)? })
    }

    /// Takes in the weights and statistics after a step, before the clock advances.
    pub fn take(
        &mut self,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        clock: Slice<'_, u64>,
    ) -> device::Result<()> {
        vector::moving_average(weights, self.decay, clock, self.weights.view_mut())?;
        vector::moving_average(statistics, self.decay, clock, self.statistics.view_mut())
    }

    /// Weights and statistics, one behind the other, for a checkpoint.
    pub fn to_vec(&self) -> Result<Vec<f32>, TrainError> {
        Ok([self.weights.to_vec()?, self.statistics.to_vec()?].concat())
    }

    /// Restores what [`Average::to_vec`] returned.
    pub fn restore(&mut self, saved: &[f32]) -> Result<(), TrainError> {
        let (weights, statistics) = saved.split_at(self.weights.len());
        self.weights.write(weights)?;
        Ok(self.statistics.write(statistics)?)
    }
}
