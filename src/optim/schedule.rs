//! Learning-rate schedules.

use crate::words;

words! {
    /// Decay of the learning rate after the warm-up.
    pub enum Decay {
        /// The peak throughout
        Constant = "constant",
        /// `½(1 + cos(π t))`, from the peak to zero (Loshchilov & Hutter 2017, without restarts)
        Cosine = "cosine",
        /// Multiplied by a factor at each milestone (He et al. 2016)
        Step = "step",
    }
}

/// Learning-rate schedule: a linear warm-up to the peak, then the decay.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// The peak learning rate.
    pub peak: f64,
    /// Decay after the warm-up.
    pub decay: Decay,
    /// Steps of linear warm-up. The last of them has the peak's rate.
    pub warmup: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Where [`Decay::Step`] changes the rate: numbers of steps done.
    pub milestones: Vec<u64>,
    /// What it multiplies the rate by at each of them.
    pub factor: f64,
    /// The end of the run, if it has a rate of its own.
    pub ending: Option<Ending>,
}

/// A constant rate from some step on, for averages of weights (PyTorch's `SWALR`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ending {
    /// The steps before it.
    pub start: u64,
    /// The rate.
    pub rate: f64,
    /// In how many steps the rate goes there from the one at the start, along half a cosine.
    pub anneal: u64,
}

impl Default for Schedule {
    /// A constant rate of 0.1; no milestones, with a factor of 0.1.
    fn default() -> Self {
        Self {
            peak: 0.1,
            decay: Decay::Constant,
            warmup: 0,
            steps: 0,
            milestones: Vec::new(),
            factor: 0.1,
            ending: None,
        }
    }
}

impl Schedule {
    /// The learning rate of step number `step`, counted from 0.
    ///
    /// ```
    /// use polder::optim::{Decay, Schedule};
    /// let schedule = Schedule { peak: 0.1, decay: Decay::Cosine, warmup: 2, steps: 12, ..Schedule::default() };
    /// assert_eq!(schedule.rate(0), 0.05);
    /// assert_eq!(schedule.rate(1), 0.1);
    /// assert_eq!(schedule.rate(2), 0.1);
    /// assert!((schedule.rate(7) - 0.05).abs() < 1e-12);
    /// ```
    pub fn rate(&self, step: u64) -> f64 {
        match self.ending {
            Some(Ending { start, rate, anneal }) if step >= start => {
                let progress = (step + 1 - start) as f64 / anneal.max(1) as f64;
                let share = 0.5 * (1.0 - (std::f64::consts::PI * progress.min(1.0)).cos());
                share * rate + (1.0 - share) * self.rate_before_the_ending(start)
            }
            _ => self.rate_before_the_ending(step),
        }
    }

    fn rate_before_the_ending(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Cosine => {
                let progress = (step - self.warmup) as f64 / self.steps.saturating_sub(self.warmup).max(1) as f64;
                self.peak * 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())
            }
            Decay::Step => {
                let passed = self.milestones.iter().filter(|milestone| **milestone <= step).count();
                (0..passed).fold(self.peak, |rate, _| rate * self.factor)
            }
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
        /// `ρ/√t` in step t, counted from 1, for which GNR's theorem 2.3 proves convergence
        InverseRoot = "inverse-sqrt",
    }
}

impl RhoSchedule {
    /// The factor in step number `step`, counted from 0.
    pub fn factor(self, step: u64, schedule: &Schedule) -> f64 {
        match self {
            RhoSchedule::Constant => 1.0,
            RhoSchedule::Linear => (step + 1) as f64 / schedule.steps.max(1) as f64,
            RhoSchedule::LearningRate => schedule.rate(step) / schedule.peak,
            RhoSchedule::InverseRoot => 1.0 / ((step + 1) as f64).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_falls_at_milestones_after_the_warm_up() {
        let rates = |schedule: Schedule| -> Vec<f64> { (0..schedule.steps).map(|step| schedule.rate(step)).collect() };
        let schedule =
            Schedule { peak: 1.0, decay: Decay::Step, steps: 8, milestones: vec![4, 6], ..Schedule::default() };
        assert_eq!(rates(schedule.clone()), [1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1 * 0.1, 0.1 * 0.1]);
        let schedule = Schedule { warmup: 2, steps: 7, milestones: vec![6, 3], factor: 0.5, ..schedule };
        assert_eq!(rates(schedule), [0.5, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]);
    }

    /// PyTorch 2.11's `SWALR(optimizer, swa_lr=0.05, anneal_epochs=4)` from a rate of 0.2: 0.178033, 0.125, 0.071967.
    #[test]
    fn the_rate_of_the_ending_is_reached_along_a_cosine() {
        let ending = Some(Ending { start: 3, rate: 0.05, anneal: 4 });
        let schedule = Schedule { peak: 0.2, steps: 9, ending, ..Schedule::default() };
        let expected = [0.2, 0.2, 0.2, 0.178033, 0.125, 0.071967, 0.05, 0.05, 0.05];
        assert!((0..9).all(|step| (schedule.rate(step) - expected[step as usize]).abs() < 1e-6));
        // From the rate that the schedule has there.
        let schedule = Schedule { decay: Decay::Cosine, steps: 6, ..schedule };
        assert!((schedule.rate(4) - 0.5 * (0.1 + 0.05)).abs() < 1e-12 && schedule.rate(8) == 0.05);
        let at_once = Schedule { ending: Some(Ending { start: 3, rate: 0.05, anneal: 0 }), ..schedule };
        assert_eq!(at_once.rate(3), 0.05);
    }

    #[test]
    fn the_radius_falls_as_the_inverse_root_of_the_step() {
        let factors = [0, 3, 99].map(|step| RhoSchedule::InverseRoot.factor(step, &Schedule::default()));
        assert_eq!(factors, [1.0, 0.5, 0.1]);
    }

    #[test]
    fn a_run_without_steps_or_longer_than_planned_has_finite_rates() {
        for decay in [Decay::Constant, Decay::Cosine, Decay::Step] {
            let schedule = Schedule { peak: 1.0, decay, ..Schedule::default() };
            assert!((0..3).all(|step| schedule.rate(step).is_finite()));
        }
        let cosine = Schedule { peak: 1.0, decay: Decay::Cosine, steps: 4, ..Schedule::default() };
        assert!(cosine.rate(9).abs() < 1e-12);
    }
}
