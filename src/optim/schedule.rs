//! Learning-rate schedules.

use crate::words;

words! {
    /// Decay of the learning rate after the warm-up.
    pub enum Decay {
        /// The peak throughout
        Constant = "constant",
        /// `½(1 + cos(π t))`, from the peak to zero (Loshchilov & Hutter 2017, without restarts)
        Cosine = "cosine",
        /// Divided by ten after half and after three quarters of the steps (He et al. 2016)
        Step = "step",
    }
}

/// Learning-rate schedule: a linear warm-up to the peak, then the decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The peak learning rate.
    pub peak: f64,
    /// Decay after the warm-up.
    pub decay: Decay,
    /// Steps of linear warm-up. The last of them has the peak's rate.
    pub warmup: u64,
    /// Steps of the whole run.
    pub steps: u64,
}

impl Schedule {
    /// The learning rate of step number `step`, counted from 0.
    ///
    /// ```
    /// use polder::optim::{Decay, Schedule};
    /// let schedule = Schedule { peak: 0.1, decay: Decay::Cosine, warmup: 2, steps: 12 };
    /// assert_eq!(schedule.rate(0), 0.05);
    /// assert_eq!(schedule.rate(1), 0.1);
    /// assert_eq!(schedule.rate(2), 0.1);
    /// assert!((schedule.rate(7) - 0.05).abs() < 1e-12);
    /// ```
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let progress = (step - self.warmup) as f64 / self.steps.saturating_sub(self.warmup).max(1) as f64;
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Cosine => self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
            Decay::Step if progress < 0.5 => self.peak,
            Decay::Step if progress < 0.75 => self.peak * 0.1,
            Decay::Step => self.peak * 0.01,
        }
    }
}

words! {
    /// Schedule of a method's ρ, as a factor of its setting.
    pub enum RhoSchedule {
        /// The given radius throughout
        Constant = "constant",
        /// Rises linearly from 0 over the run
        Linear = "linear",
        /// In proportion to the learning rate, as in GSAM (Zhuang et al. 2022, algorithm 1, with ρ_min = lr_min = 0)
        LearningRate = "lr",
    }
}

impl RhoSchedule {
    /// The factor in step number `step`, counted from 0.
    pub fn factor(self, step: u64, schedule: &Schedule) -> f64 {
        match self {
            RhoSchedule::Constant => 1.0,
            RhoSchedule::Linear => (step + 1) as f64 / schedule.steps.max(1) as f64,
            RhoSchedule::LearningRate => schedule.rate(step) / schedule.peak,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_falls_by_ten_at_a_half_and_at_three_quarters() {
        let schedule = Schedule { peak: 1.0, decay: Decay::Step, warmup: 0, steps: 8 };
        let rates: Vec<f64> = (0..8).map(|step| schedule.rate(step)).collect();
        assert_eq!(rates, [1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]);
    }

    #[test]
    fn a_run_without_steps_or_longer_than_planned_has_finite_rates() {
        for decay in [Decay::Constant, Decay::Cosine, Decay::Step] {
            let schedule = Schedule { peak: 1.0, decay, warmup: 0, steps: 0 };
            assert!((0..3).all(|step| schedule.rate(step).is_finite()));
        }
        let cosine = Schedule { peak: 1.0, decay: Decay::Cosine, warmup: 0, steps: 4 };
        assert!(cosine.rate(9).abs() < 1e-12);
    }
}
