//! What a method is: a trait, and what a method asks the optimizer for.

use std::fmt::Debug;

use super::step::{Direction, Step};
use crate::arena::Layout;
use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::settings::{Configurable, SettingError};

/// What a method needs beside the weights, the gradients that it asks for, and the base optimizer's state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Needs {
    /// Working vectors as long as the weights.
    pub vectors: usize,
    /// Vectors that it keeps from step to step. They begin as zeros, and checkpoints hold them. A method with memory
    /// cannot be taken in groups of the mini-batch.
    pub memory: usize,
    /// Numbers that it keeps from step to step, with the values that they begin with. Checkpoints hold them.
    pub scalars: Vec<f64>,
    /// Numbers of one step.
    pub numbers: usize,
    /// Rows of coefficients that are known before the first step; see [`Row::own`](super::Row::own).
    pub rows: Vec<[f64; 4]>,
}

impl Needs {
    /// So many working vectors, and nothing else.
    pub fn vectors(vectors: usize) -> Self {
        Self { vectors, ..Self::default() }
    }
}

/// What a training run knows and a method may need.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Where each tensor lies in the vector of weights.
    pub layout: &'a Layout,
    /// Seed of the run.
    pub seed: u64,
    /// The relative error of the mean loss of a mini-batch, from the rounding of activations and weights.
    pub loss_error: f64,
}

/// A sharpness-aware method: the points at which a step takes gradients, and the combination of them that the base
/// optimizer follows.
///
/// A method is a plain struct of its settings, declared with [`settings!`](crate::settings!). It writes a step with the
/// verbs of [`Step`]; `docs/extending.md` shows a whole one.
pub trait Method<T: Scalar>: Configurable + Debug + Send {
    /// Fails if the settings contradict each other. Their ranges are checked by [`Configurable::check`].
    ///
    /// # Errors
    /// [`SettingError::Contradiction`].
    fn check_combination(&self) -> std::result::Result<(), SettingError> {
        Ok(())
    }

    /// Takes what it needs from the run that it will train. Called once, before [`Method::needs`].
    fn prepare(&mut self, context: &Context<'_>) {
        let _ = context;
    }

    /// Gradients and exact products with the Hessian of one step. If not all steps cost the same, of the most expensive
    /// one.
    fn passes(&self) -> Passes;

    /// What the optimizer allocates for it.
    fn needs(&self) -> Needs;

    /// Whether every step launches the same work as the one before, with numbers that change on the device alone. Then
    /// one recorded step can be replayed for all of them.
    fn repeats(&self) -> bool {
        true
    }

    /// The index among its [own numbers](super::Numbers::own) of the step size, if the method computes it. The learning
    /// rate that a step is given is ignored then.
    fn own_rate(&self) -> Option<usize> {
        None
    }

    /// Whether the direction is an average of gradients, or follows a step size of its own, so that momentum of the
    /// base would be one too many. Then SGD's momentum is 0 by default.
    fn has_momentum(&self) -> bool {
        self.own_rate().is_some()
    }

    /// Whether a step needs one of this library's own base optimizers, because more of the base takes part in it than
    /// following the direction: the method computes the step size, reads the [momentum](super::Vector::Momentum), or
    /// moves the weights [beside](Direction::beside) the base. Then the direction has no meaning alone.
    fn needs_base(&self) -> bool {
        self.own_rate().is_some()
    }

    /// Whether a step takes a gradient on the [mini-batch of the step before](Step::gradient_across), which the
    /// objective keeps as a whole.
    fn keeps_batch(&self) -> bool {
        false
    }

    /// Names of the first of its [own numbers](super::Numbers::own), which telemetry and logs show under them.
    fn telemetry(&self) -> &'static [&'static str] {
        &[]
    }

    /// Names of the counters that it keeps on the device, in the order of [`Step::counters`]. They begin at 0,
    /// checkpoints hold them, and telemetry and logs show them under these names.
    fn counters(&self) -> &'static [&'static str] {
        &[]
    }

    /// Takes the gradients of one step and returns the direction. The first pass is usually
    /// [`Step::gradient_at_weights`]; its loss is the one that is reported.
    ///
    /// # Errors
    /// Those of the verbs.
    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction>;
}

/// An entry of the list of [`METHODS`](super::METHODS).
#[derive(Clone, Copy)]
pub struct Entry {
    /// The name, such as `cr-sam`.
    pub name: &'static str,
    /// What it is, in a few words.
    pub summary: &'static str,
    /// The base optimizer that the name stands for, if the method has no other.
    pub base: Option<&'static str>,
    /// The method with its default settings.
    pub new: fn() -> Box<dyn Method<f32>>,
    /// The same in double precision.
    pub new_f64: fn() -> Box<dyn Method<f64>>,
}

impl Entry {
    /// The entry of a method whose settings begin with their defaults.
    pub const fn of<M>(name: &'static str, summary: &'static str) -> Self
    where
        M: Method<f32> + Method<f64> + Default + 'static,
    {
        Self { name, summary, base: None, new: || Box::new(M::default()), new_f64: || Box::new(M::default()) }
    }

    /// The same for a method that is a base optimizer alone.
    #[must_use]
    pub const fn alone(self, base: &'static str) -> Self {
        Self { base: Some(base), ..self }
    }
}
