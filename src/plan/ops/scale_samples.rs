//! Branches that are dropped or shaken at random, sample by sample: stochastic depth and ShakeDrop.

use super::Operation;
use crate::device::{self, Compute, Slice};
use crate::kernels::scale_samples::{FactorLaw, scale_samples};
use crate::plan::PlanError;
use crate::plan::graph::{Graph, Parameter, Value};
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands};

/// `y[n] = f[n]·x[n]` for each sample n, with factors that [`Plan::draw`](crate::plan::Plan::draw) draws. In a gradient
/// the backward has factors of its own: those of ShakeDrop differ from the forward's.
#[derive(Debug, Clone)]
pub(in crate::plan) struct ScaleSamples {
    x: Value,
    y: Value,
    /// Its number among the operations with factors.
    number: usize,
}

impl Graph {
    /// Stochastic depth (Huang et al. 2016) of each sample, also called DropPath: with probability `rate` all of a
    /// sample becomes zero, and otherwise it is multiplied by 1/(1 − rate). Without a draw (see
    /// [`Plan::draw`](crate::plan::Plan::draw)), as in evaluation, x stays as it is.
    ///
    /// # Errors
    /// [`PlanError::Shape`] for a rate below 0, or of 1 or more.
    pub fn drop_path(&mut self, x: Value, rate: f64) -> Result<Value, PlanError> {
        if !(0.0..1.0).contains(&rate) {
            let reason = format!("the rate is {rate}, expected a number from 0 to below 1");
            return Err(PlanError::Shape { operation: "drop_path".into(), reason });
        }
        Ok(if rate == 0.0 { x } else { self.scale_samples(x, FactorLaw::drop_path(rate)) })
    }

    /// ShakeDrop (Yamada et al. 2018): with probability `keep` x stays as it is, for the whole batch. Otherwise each
    /// sample is multiplied by its own α, uniform in [−1, 1], and its gradient by its own β, uniform in [0, 1]. Without
    /// a draw (see [`Plan::draw`](crate::plan::Plan::draw)), as in evaluation, both factors are `keep`.
    ///
    /// So the gradient is not the derivative of the loss. A product with the Hessian is: of the loss as the forward
    /// computes it, with α in the backward too. It is linear and symmetric.
    ///
    /// # Errors
    /// [`PlanError::Shape`] for a probability of 0 or less, or above 1.
    pub fn shake_drop(&mut self, x: Value, keep: f64) -> Result<Value, PlanError> {
        if !(keep > 0.0 && keep <= 1.0) {
            let reason = format!("the probability is {keep}, expected a number above 0 and at most 1");
            return Err(PlanError::Shape { operation: "shake_drop".into(), reason });
        }
        Ok(if keep == 1.0 { x } else { self.scale_samples(x, FactorLaw::shake_drop(keep)) })
    }

    fn scale_samples(&mut self, x: Value, law: FactorLaw) -> Value {
        let (y, number) = (self.value(self.shape(x)), self.factors.len());
        self.factors.push(law);
        self.push(ScaleSamples { x, y, number });
        y
    }
}

impl ScaleSamples {
    /// `dx = f·dy`, of gradients or of their tangents.
    fn backward_with<S: Compute>(&self, factors: Slice<'_, S::Master>, at: &mut Operands<'_, S>) -> device::Result<()> {
        let Some((dx, accumulate)) = at.input_gradient(0, self.x)? else { return Ok(()) };
        scale_samples(factors, at.gradient(self.y)?, dx, accumulate)
    }
}

impl Operation for ScaleSamples {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [None, None]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [None, None]
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let factors = pass.factors.forward(self.number)?;
        scale_samples(factors, pass.values.read(self.x)?, pass.values.write(self.y)?, false)
    }

    /// A product with the Hessian takes the forward's factors, so that it is one of the function that the forward
    /// computes.
    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let factors = match pass.gradients {
            Some(_) => pass.factors.backward(self.number)?,
            None => pass.factors.forward(self.number)?,
        };
        self.backward_with(factors, &mut pass.values)
    }

    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let factors = pass.factors.forward(self.number)?;
        scale_samples(factors, pass.tangents.read(self.x)?, pass.tangents.write(self.y)?, false)
    }

    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        self.backward_with(pass.factors.forward(self.number)?, &mut pass.tangents)
    }
}
