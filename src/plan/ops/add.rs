//! The sum of two activations.

use super::{LinearMap, pass_to_terms};
use crate::device::{self, Compute};
use crate::kernels::layers;
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Value};
use crate::plan::pass::Operands;

/// `y = a + b`.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Add {
    a: Value,
    b: Value,
    y: Value,
}

impl Graph {
    /// a + b.
    ///
    /// # Errors
    /// [`PlanError::Shape`] for two different shapes.
    pub fn add(&mut self, a: Value, b: Value) -> Result<Value, PlanError> {
        self.same_shape("add", a, b)?;
        let y = self.value(self.shape(a));
        self.push(Add { a, b, y });
        Ok(y)
    }
}

impl LinearMap for Add {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.a), Some(self.b)]
    }

    fn apply<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        layers::add(at.read(self.a)?, at.read(self.b)?, at.write(self.y)?)
    }

    /// `da = dy` and `db = dy`.
    fn transpose<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        let dy = at.gradient(self.y)?;
        pass_to_terms(at, dy, self.a, Some(self.b))
    }
}
