//! The backward pass, and the last stage of the gradient.

use super::graph::Place;
use super::memory_plan::MemoryPlan;
use super::ops::{Op, Operation, WeightGradient};
use super::pass::{BackwardPass, Frozen, LastStage, Operands, ParameterGradients, Weights};
use super::second_pass::PassBuffers;
use super::{Plan, check_backward};
use crate::device::{Compute, Device, Result, Scalar, Slice, SliceMut};
use crate::kernels::gradient::{GradientStages, Stage, Unfinished};
use crate::kernels::vector::Reduction;
use crate::kernels::{check_length, precision, vector};
use crate::objective::RunningStats;

/// The last stages of all parameters' gradients on a GPU, for two passes at the same time too. (These ask for no norm.)
/// The CPU goes over the whole gradient once more instead.
pub(super) struct LastStages {
    stages: GradientStages,
    /// By operation: the number of its own stage, if it has one.
    numbers: Vec<usize>,
}

impl LastStages {
    /// The stages of the operations that have their own, and at the end one for all other gradients.
    pub fn new(device: &Device, ops: &[Op], memory: &MemoryPlan, places: &[Place]) -> Result<Self> {
        let (mut stages, mut numbers, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for (index, op) in ops.iter().enumerate() {
            numbers.push(stages.len());
            let scratch = memory.range(memory.backward_scratch[index]);
            let trained = op.parameters().into_iter().flatten().map(|parameter| &places[parameter]);
            for place in trained.filter(|place| !place.frozen).map(|place| place.range.clone()) {
                match memory.weight_gradients[index] {
                    WeightGradient::Finished(squares) => stages.push(Stage::Convolution(squares)),
                    WeightGradient::Summed => {
                        stages.push(Stage::Launch(vec![Unfinished { parts: Some(0..scratch.len()), place }]));
                    }
                    WeightGradient::Parts => rest.push(Unfinished { parts: Some(scratch.clone()), place }),
                    WeightGradient::Complete => rest.push(Unfinished { parts: None, place }),
                }
            }
        }
        stages.push(Stage::Launch(rest));
        Ok(Self { stages: GradientStages::new(device, &stages)?, numbers })
    }
}

/// Where a pass leaves the gradient of the parameters.
pub(super) struct Target<'a, T: Scalar> {
    pub gradient: SliceMut<'a, T>,
    /// Set to 1 where an element is not finite.
    pub flag: SliceMut<'a, u32>,
    /// Whether the pass computes the norm of the gradient.
    pub norm: bool,
}

impl<S: Compute> Plan<S> {
    /// Forward, loss and backward, and the last stage of the gradient with its norm if `norm` asks for it. The weights
    /// must have been [rounded](Self::round).
    pub(super) fn gradient_pass(
        &mut self,
        weights: Slice<'_, S::Master>,
        statistics: RunningStats,
        mut gradient: SliceMut<'_, S::Master>,
        loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
        norm: Option<(&mut Reduction, SliceMut<'_, f64>)>,
    ) -> Result<()> {
        const OPERATION: &str = "Plan::gradient";
        check_backward(OPERATION, self.options)?;
        check_length(OPERATION, "weights", weights.len(), self.parameters.len())?;
        check_length(OPERATION, "gradient", gradient.len(), self.parameters.len())?;
        self.forward(weights, statistics)?;
        let reported = statistics == RunningStats::Update;
        if reported && self.reported == 0 {
            self.correct.clear()?;
        }
        self.loss(self.counted, true, reported, loss, Some(flag.reborrow()))?;
        self.reported += usize::from(reported);
        for index in (0..self.ops.len()).rev() {
            let (gradient, flag) = (gradient.reborrow(), flag.reborrow());
            self.backward(index, weights, Some(Target { gradient, flag, norm: norm.is_some() }))?;
        }
        let scale = self.loss_scale.as_ref().map(|state| state.view());
        match (&mut self.last_stages, norm) {
            (Some(LastStages { stages, .. }), norm) => {
                stages.end(self.buffers.arena.view(), gradient, scale, flag, norm.map(|(_, norm)| norm))
            }
            (None, Some((reduction, norm))) => vector::finish_gradient(gradient, scale, flag, reduction, norm),
            (None, None) => finish(gradient, scale, flag),
        }
    }

    /// The backward of one operation, after a forward at `weights`. With a `target` it leaves the gradients of the
    /// parameters there; without, none.
    pub(super) fn backward(
        &mut self,
        index: usize,
        weights: Slice<'_, S::Master>,
        target: Option<Target<'_, S::Master>>,
    ) -> Result<()> {
        let op = &self.ops[index];
        if !self.memory.is_differentiated(op.output()) {
            return Ok(());
        }
        let PassBuffers { arena, rounded, workspace } = &mut self.buffers;
        let gradients = target.map(|Target { gradient, flag, norm }| {
            let last_stage = self.last_stages.as_mut().map(|LastStages { stages, numbers }| LastStage {
                stages,
                number: numbers[index],
                scale: self.loss_scale.as_ref().map(|state| state.view()),
                flag,
                norm,
            });
            ParameterGradients::new(&self.places, gradient, last_stage)
        });
        op.backward(BackwardPass {
            values: Operands::new(&self.memory, index, arena),
            weights: Weights::new(&self.places, weights, rounded, Frozen::new(&self.statistics, &self.frozen)?)?,
            mode: self.options.batch_norm,
            factors: &self.factors,
            gradients,
            workspace,
        })
    }
}

/// Removes the scale, if there is one, from a result, and checks that it is finite.
pub(super) fn finish<T: Scalar>(
    mut result: SliceMut<'_, T>,
    scale: Option<Slice<'_, f64>>,
    flag: SliceMut<'_, u32>,
) -> Result<()> {
    match scale {
        Some(state) => {
            let len = result.len();
            precision::unscale(result.reborrow().cast(len)?, state, flag)
        }
        None => vector::check_finite(result.view(), flag),
    }
}
