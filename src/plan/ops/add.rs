//! The sum of two activations.

use super::Operation;
use crate::device::{self, Compute};
use crate::kernels::layers;
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Value};
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands};

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

impl Add {
    fn sum<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        layers::add(at.read(self.a)?, at.read(self.b)?, at.write(self.y)?)
    }

    /// `da = dy` and `db = dy`.
    fn spread<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()> {
        let dy = at.gradient(self.y)?;
        let mut da = at.input_gradient(0, self.a)?;
        match &mut da {
            Some((da, true)) => layers::add_to(dy, da.reborrow())?,
            Some((da, false)) => da.copy_from(dy)?,
            None => {}
        }
        if self.a == self.b {
            // The gradient of x + x takes dy twice.
            return da.map_or(Ok(()), |(da, _)| layers::add_to(dy, da));
        }
        match at.input_gradient(1, self.b)? {
            Some((db, true)) => layers::add_to(dy, db),
            Some((mut db, false)) => db.copy_from(dy),
            None => Ok(()),
        }
    }
}

impl Operation for Add {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.a), Some(self.b)]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [None, None]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [None, None]
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        self.sum(&mut pass.values)
    }

    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        self.spread(&mut pass.values)
    }

    /// A linear map is its own tangent.
    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        self.sum(&mut pass.tangents)
    }

    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        self.spread(&mut pass.tangents)
    }
}
