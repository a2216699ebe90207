//! The mini-batch of the step before, and gradients on it and on the current one.

use super::graph::Value;
use super::second_pass::SecondPass;
use super::{Plan, check_backward};
use crate::device::{Buffer, Compute, Device, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::{check_length, vector};
use crate::objective::RunningStats;

/// A mini-batch: images, labels, and what mixing adds to them.
pub(super) struct KeptBatch<T: Scalar> {
    images: Buffer<T>,
    labels: Buffer<u32>,
    others: Buffer<u32>,
    share: Buffer<f64>,
    /// Room for the current images while a pass takes the kept ones.
    current: Buffer<T>,
}

impl<T: Scalar> KeptBatch<T> {
    fn new(device: &Device, images: usize, batch: usize) -> Result<Self> {
        Ok(Self {
            images: device.zeros(images)?,
            labels: device.zeros(batch)?,
            others: device.zeros(batch)?,
            share: device.zeros(1)?,
            current: device.zeros(images)?,
        })
    }
}

/// The same words in a type that kernels copy.
fn words<'a, E: crate::device::Element>(slice: Slice<'a, E>) -> Result<Slice<'a, f32>> {
    slice.cast(slice.len() * size_of::<E>() / 4)
}

impl<S: Compute> Plan<S> {
    fn new_kept_batch(&self) -> Result<KeptBatch<S::Master>> {
        KeptBatch::new(&self.device, self.memory.value(Value(0)).len(), self.shapes[0].batch)
    }

    /// Keeps the mini-batch for the next step, unless `skip` is set and there is an earlier one. What stochastic depth
    /// and ShakeDrop have drawn for it is not kept, so networks with them are refused.
    pub(super) fn keep_batch(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        if !self.factors.is_empty() {
            let message = "the mini-batch of the step before has no factors of stochastic depth or ShakeDrop".into();
            return Err(Error::Argument { operation: "Plan::keep_batch", message });
        }
        let first = self.kept_batch.is_none();
        if first {
            self.kept_batch = Some(self.new_kept_batch()?);
            if self.device.is_simt() {
                // The next step may be recorded, and then it allocates nothing.
                self.prepare_second_pass()?;
            }
        }
        let Self { kept_batch: Some(kept), memory, buffers, labels, others, share, .. } = self else { return Ok(()) };
        let images = buffers.arena.slice(memory.value(Value(0)))?;
        if first {
            kept.images.view_mut().copy_from(images)?;
            kept.labels.view_mut().copy_from(labels.view())?;
            kept.others.view_mut().copy_from(others.view())?;
            return kept.share.view_mut().copy_from(share.view());
        }
        vector::commit(skip, images, kept.images.view_mut())?;
        for (from, to) in [(&*labels, &mut kept.labels), (&*others, &mut kept.others)] {
            let len = from.len();
            vector::commit::<f32>(skip, words(from.view())?, to.view_mut().cast(len)?)?;
        }
        vector::commit::<f32>(skip, words(share.view())?, kept.share.view_mut().cast(2)?)
    }

    /// The gradients at `weights[0]` on the current mini-batch and at `weights[1]` on the kept one; on a GPU at the
    /// same time if there is memory for a second pass.
    pub(super) fn gradient_across(
        &mut self,
        weights: [Slice<'_, S::Master>; 2],
        mut gradients: [SliceMut<'_, S::Master>; 2],
        mut losses: [SliceMut<'_, f64>; 2],
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        const OPERATION: &str = "Plan::gradient_across";
        check_backward(OPERATION, self.options)?;
        for (weights, gradient) in weights.iter().zip(&gradients) {
            check_length(OPERATION, "weights", weights.len(), self.parameters.len())?;
            check_length(OPERATION, "gradient", gradient.len(), self.parameters.len())?;
        }
        if self.kept_batch.is_none() {
            let message = "no mini-batch was kept in a step before".into();
            return Err(Error::Argument { operation: OPERATION, message });
        }
        let at_once = self.device.is_simt() && self.prepare_second_pass()?;
        let device = self.device.clone();
        let mut pass = |index: usize| {
            let (gradient, loss) = (gradients[index].reborrow(), losses[index].reborrow());
            let stats = if index == 0 { RunningStats::Update } else { RunningStats::Keep };
            let run = |plan: &mut Self| {
                plan.round(weights[index])?;
                plan.gradient_pass(weights[index], stats, gradient, loss, flag.reborrow(), None)
            };
            if index == 0 { run(self) } else { self.with_kept_batch(at_once, run) }
        };
        // One after the other, the current mini-batch comes last: its logits and images stay.
        if at_once { device.both(pass) } else { pass(1).and_then(|()| pass(0)) }
    }

    /// Runs a pass on the kept mini-batch: in the buffers of a second pass, or in its own.
    fn with_kept_batch(&mut self, second: bool, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let place = self.memory.value(Value(0));
        let Self { kept_batch: Some(kept), buffers, second_pass, .. } = self else { return Ok(()) };
        match second_pass {
            SecondPass::Ready(second_buffers) if second => {
                second_buffers.arena.slice_mut(place.clone())?.copy_from(kept.images.view())?;
            }
            _ => {
                kept.current.view_mut().copy_from(buffers.arena.slice(place.clone())?)?;
                buffers.arena.slice_mut(place.clone())?.copy_from(kept.images.view())?;
            }
        }
        self.exchange_labels();
        if second {
            self.swap_buffers();
        }
        let done = run(self);
        if second {
            self.swap_buffers();
        }
        self.exchange_labels();
        if let Some(kept) = self.kept_batch.as_ref().filter(|_| !second) {
            self.buffers.arena.slice_mut(place)?.copy_from(kept.current.view())?;
        }
        done
    }

    fn exchange_labels(&mut self) {
        let Some(kept) = &mut self.kept_batch else { return };
        std::mem::swap(&mut self.labels, &mut kept.labels);
        std::mem::swap(&mut self.others, &mut kept.others);
        std::mem::swap(&mut self.share, &mut kept.share);
    }

    /// The kept mini-batch as words, for a checkpoint: images, labels, other labels, share. Empty if none was kept.
    ///
    /// # Errors
    /// What failed on the device.
    pub fn kept_batch(&self) -> Result<Vec<u32>> {
        let Some(kept) = &self.kept_batch else { return Ok(Vec::new()) };
        let mut all: Vec<u32> = bytemuck::cast_slice(&kept.images.to_vec()?).to_vec();
        all.extend(kept.labels.to_vec()?);
        all.extend(kept.others.to_vec()?);
        all.extend(bytemuck::cast_slice::<f64, u32>(&kept.share.to_vec()?));
        Ok(all)
    }

    /// Number of words of a kept mini-batch.
    pub fn kept_batch_len(&self) -> usize {
        self.memory.value(Value(0)).len() * size_of::<S::Master>() / 4 + 2 * self.shapes[0].batch + 2
    }

    /// Takes over a kept mini-batch from such words; none if there are none.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of words; those of the device.
    pub fn restore_kept_batch(&mut self, words: &[u32]) -> Result<()> {
        if words.is_empty() {
            self.kept_batch = None;
            return Ok(());
        }
        check_length("Plan::restore_kept_batch", "words", words.len(), self.kept_batch_len())?;
        let mut kept = self.new_kept_batch()?;
        let batch = self.shapes[0].batch;
        let (images, rest) = words.split_at(words.len() - 2 * batch - 2);
        let mut numbers = vec![S::Master::default(); kept.images.len()];
        bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(images);
        kept.images.write(&numbers)?;
        kept.labels.write(&rest[..batch])?;
        kept.others.write(&rest[batch..2 * batch])?;
        kept.share.write(&[f64::from_bits(bytemuck::cast([rest[2 * batch], rest[2 * batch + 1]]))])?;
        self.kept_batch = Some(kept);
        Ok(())
    }
}
