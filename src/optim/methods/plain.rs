//! The base optimizers alone, SGD, AdamW and Muon: the gradient at `w`.

use crate::device::{Result, Scalar};
use crate::objective::Passes;
use crate::optim::step::work::G0;
use crate::optim::{Direction, Entry, Method, Needs, Step};
use crate::settings;

settings! {
    /// No sharpness-aware method: the base optimizer follows the gradient at `w`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Plain {}
}

/// SGD by name.
pub const SGD: Entry = Entry::of::<Plain>("sgd", "Stochastic gradient descent with momentum").alone("sgd");

/// AdamW by name.
pub const ADAMW: Entry = Entry::of::<Plain>("adamw", "AdamW").alone("adamw");

/// Muon by name.
pub const MUON: Entry = Entry::of::<Plain>("muon", "Muon for matrices, AdamW for the rest").alone("muon");

impl<T: Scalar> Method<T> for Plain {
    fn passes(&self) -> Passes {
        Passes { gradients: 1, products: 0 }
    }

    fn needs(&self) -> Needs {
        Needs::vectors(1)
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        Ok(Direction::along(G0))
    }
}
