//! Averages of a run's weights: a moving one over the steps, and the mean over the last epochs.

use super::TrainError;
use crate::device::{self, Buffer, Device, Slice};
use crate::kernels::vector;

/// Averaged weights, and the running statistics that belong to them, on the device.
pub(super) struct Averaged {
    pub weights: Buffer<f32>,
    pub statistics: Buffer<f32>,
}

impl Averaged {
    /// It begins with what it averages.
    pub fn new(device: &Device, weights: &[f32], statistics: &[f32]) -> Result<Self, TrainError> {
        Ok(Self { weights: device.upload(weights)?, statistics: device.upload(statistics)? })
    }

    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.weights.len() + self.statistics.len()
    }

    /// Weights and statistics, one behind the other, for a checkpoint.
    pub fn to_vec(&self) -> Result<Vec<f32>, TrainError> {
        Ok([self.weights.to_vec()?, self.statistics.to_vec()?].concat())
    }

    /// Restores what [`Averaged::to_vec`] returned.
    pub fn restore(&mut self, saved: &[f32]) -> Result<(), TrainError> {
        let (weights, statistics) = saved.split_at(self.weights.len());
        self.weights.write(weights)?;
        Ok(self.statistics.write(statistics)?)
    }
}

/// A moving average over the steps.
pub(super) struct MovingAverage {
    decay: f64,
    pub of: Averaged,
}

impl MovingAverage {
    pub fn new(decay: f64, of: Averaged) -> Self {
        Self { decay, of }
    }

    /// Takes in the weights and statistics after a step, before the clock advances.
    pub fn take(
        &mut self,
        weights: Slice<'_, f32>,
        statistics: Slice<'_, f32>,
        clock: Slice<'_, u64>,
    ) -> device::Result<()> {
        vector::moving_average(weights, self.decay, clock, self.of.weights.view_mut())?;
        vector::moving_average(statistics, self.decay, clock, self.of.statistics.view_mut())
    }
}

/// The mean of the weights after some epochs: stochastic weight averaging (Izmailov et al. 2018).
pub(super) struct EpochAverage {
    pub of: Averaged,
    /// Of how many epochs.
    pub count: u64,
    /// Whether the statistics are those of these weights. Otherwise they still have to be computed.
    pub complete: bool,
}

impl EpochAverage {
    pub fn new(of: Averaged) -> Self {
        Self { of, count: 0, complete: false }
    }

    /// Takes in the weights after an epoch. The host does it, as it reads them for the checkpoint anyway.
    pub fn take(&mut self, weights: &[f32]) -> Result<(), TrainError> {
        self.count += 1;
        self.complete = false;
        let share = 1.0 / self.count as f64;
        let mut mean = self.of.weights.to_vec()?;
        for (mean, &now) in mean.iter_mut().zip(weights) {
            *mean = (f64::from(*mean) + share * (f64::from(now) - f64::from(*mean))) as f32;
        }
        Ok(self.of.weights.write(&mean)?)
    }

    /// What a checkpoint holds beside the numbers.
    pub fn progress(&self) -> Vec<u64> {
        vec![self.count, self.complete.into()]
    }
}
