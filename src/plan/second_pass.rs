//! Two gradients that run at the same time on a GPU.

use super::graph::Value;
use super::memory_plan::MemoryPlan;
use super::ops::{Op, convolution_batch_norm};
use super::{Plan, check_backward};
use crate::device::{Buffer, Compute, Device, Error, Result, Slice, SliceMut};
use crate::kernels::batch_norm::Workspace;
use crate::kernels::check_length;
use crate::objective::RunningStats;

/// What a pass writes besides its results and counters. Two passes at the same time need one each.
pub(super) struct PassBuffers<S: Compute> {
    /// Activations, their gradients and scratch.
    pub arena: Buffer<S::Master>,
    /// The first of the weights, as convolutions read them; empty where the storage type is no narrower than the master
    /// type.
    pub rounded: Buffer<S>,
    /// For batch norm's sums over rows.
    pub workspace: Workspace,
}

impl<S: Compute> PassBuffers<S> {
    pub fn new(device: &Device, ops: &[Op], memory: &MemoryPlan, rounded: usize) -> Result<Self> {
        Ok(Self {
            rounded: device.zeros(rounded)?,
            arena: device.poisoned(memory.len())?,
            workspace: convolution_batch_norm::workspace::<S>(device, ops, &memory.sums_for)?,
        })
    }
}

/// The buffers of the second of two passes at the same time.
pub(super) enum SecondPass<S: Compute> {
    /// No pair has been asked for yet.
    NotMade,
    Ready(Box<PassBuffers<S>>),
    /// The device has too little memory for them.
    NoRoom,
}

impl<S: Compute> Plan<S> {
    /// Makes the buffers of a second pass at the first call. Returns whether there are such buffers. Twice as much
    /// memory must be free, because later allocations may be indispensable. While a graph is recorded nothing can be
    /// allocated.
    pub(super) fn prepare_second_pass(&mut self) -> Result<bool> {
        if matches!(self.second_pass, SecondPass::NotMade) {
            if self.device.is_recording() {
                return Ok(false);
            }
            if !self.device.has_free(2 * self.arena_bytes())? {
                self.second_pass = SecondPass::NoRoom;
                return Ok(false);
            }
            self.second_pass = match PassBuffers::new(&self.device, &self.ops, &self.memory, self.buffers.rounded.len())
            {
                Ok(buffers) => SecondPass::Ready(Box::new(buffers)),
                Err(Error::OutOfMemory { .. }) => SecondPass::NoRoom,
                Err(error) => return Err(error),
            };
        }
        Ok(matches!(self.second_pass, SecondPass::Ready(_)))
    }

    pub(super) fn swap_buffers(&mut self) {
        if let SecondPass::Ready(buffers) = &mut self.second_pass {
            std::mem::swap(&mut self.buffers, buffers);
        }
    }

    /// Two gradients. `at_once`: at the same time, with the buffers of a [second pass](Self::prepare_second_pass).
    /// `rounded`: the weights have been rounded for both.
    pub(super) fn gradient_passes(
        &mut self,
        weights: [Slice<'_, S::Master>; 2],
        (at_once, rounded): (bool, bool),
        mut gradients: [SliceMut<'_, S::Master>; 2],
        mut losses: [SliceMut<'_, f64>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        const OPERATION: &str = "Plan::gradient_pair";
        check_backward(OPERATION, self.options)?;
        let len = self.parameters.len();
        weights.iter().try_for_each(|w| check_length(OPERATION, "weights", w.len(), len))?;
        gradients.iter().try_for_each(|g| check_length(OPERATION, "gradient", g.len(), len))?;
        let device = self.device.clone();
        let mut pass = |index: usize| {
            let (gradient, loss) = (gradients[index].reborrow(), losses[index].reborrow());
            let run = |plan: &mut Self| {
                if !rounded {
                    plan.round(weights[index])?;
                }
                plan.gradient_pass(weights[index], RunningStats::Keep, gradient, loss, flag.reborrow(), None)
            };
            if index == 0 || !at_once {
                return run(self);
            }
            if let SecondPass::Ready(buffers) = &mut self.second_pass {
                let batch = self.memory.value(Value(0));
                buffers.arena.slice_mut(batch.clone())?.copy_from(self.buffers.arena.slice(batch)?)?;
            }
            self.swap_buffers();
            let done = run(self);
            self.swap_buffers();
            done
        };
        if at_once { device.both(pass) } else { pass(0).and_then(|()| pass(1)) }
    }
}
