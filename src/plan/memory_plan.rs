//! The memory plan: where every activation, gradient and piece of scratch lies in a plan's arena, and during which
//! steps it lives.
//!
//! Time is counted in steps: the forward of operation i is step i, the loss of n operations is step n, and the backward
//! of operation i is step 2n − i. An arena consists of elements of the master type. Activations and their gradients are
//! stored as `S`, in as many elements as they fill. The logits, kept values and scratch are of the master type itself.

use std::ops::Range;

use super::PlanOptions;
use super::error::PlanError;
use super::graph::{Place, Shape, Value};
use super::memory::{self, Slot};
use super::ops::convolution_batch_norm::{self, SumsFor};
use super::ops::{ExtraMemory, Op, Operation, Site, WeightGradient};
use crate::device::{Compute, Device, Element};

/// The slot of everything that lies in the arena.
pub(super) struct MemoryPlan {
    slots: Vec<Slot>,
    /// By activation.
    values: Vec<usize>,
    /// By activation: its elements.
    elements: Vec<usize>,
    /// By activation; none where no gradient is needed.
    gradients: Vec<Option<usize>>,
    /// By activation: the moments of its tiles, where a convolution leaves them to batch norm.
    tile_moments: Vec<Option<usize>>,
    /// By activation: whether it depends on a parameter that is not frozen. The tangent of any other is zero.
    trained: Vec<bool>,
    /// By operation: what its forward keeps for the backward.
    pub kept: Vec<[Option<usize>; 2]>,
    /// By operation.
    pub forward_scratch: Vec<Option<usize>>,
    /// By operation.
    pub backward_scratch: Vec<Option<usize>>,
    /// By operation: how its backward leaves its weight gradient.
    pub weight_gradients: Vec<WeightGradient>,
    /// By operation and input: whether its backward adds to a gradient that another operation has begun.
    pub accumulate: Vec<[bool; 2]>,
    /// By operation: of a convolution, the batch norm for which it leaves sums.
    pub sums_for: Vec<Option<SumsFor>>,
    /// By operation: of a batch norm, the convolution that leaves its sums.
    pub summed_by: Vec<Option<usize>>,
    sample_losses: usize,
    len: usize,
}

/// Elements of the master type of `S` that `len` elements of `E` fill.
pub(super) fn master_len<S: Compute, E: Element>(len: usize) -> usize {
    (len * size_of::<E>()).div_ceil(size_of::<S::Master>())
}

/// The steps of a pass over so many operations.
#[derive(Clone, Copy)]
struct Steps(usize);

impl Steps {
    fn loss(self) -> usize {
        self.0
    }

    fn end(self) -> usize {
        2 * self.0
    }

    fn backward(self, operation: usize) -> usize {
        self.end() - operation
    }
}

/// By activation: whether it depends on a parameter that is not frozen.
fn trained(ops: &[Op], values: usize, places: &[Place]) -> Vec<bool> {
    let mut trained = vec![false; values];
    for op in ops {
        let own = op.parameters().iter().flatten().any(|&parameter| !places[parameter].frozen);
        trained[op.output().0] = own || op.inputs().iter().flatten().any(|input| trained[input.0]);
    }
    trained
}

/// Which gradients a backward pass computes, and in which order.
struct Differentiation {
    /// By activation: the step that writes its gradient first; none where it needs none.
    first_write: Vec<Option<usize>>,
    /// As [`MemoryPlan::accumulate`].
    accumulate: Vec<[bool; 2]>,
}

impl Differentiation {
    /// Walks from the loss back to the parameters.
    fn new(ops: &[Op], trained: &[bool], logits: Value, places: &[Place]) -> Result<Self, PlanError> {
        let steps = Steps(ops.len());
        let mut first_write = vec![None; trained.len()];
        let mut accumulate = vec![[false; 2]; ops.len()];
        let mut reached: Vec<bool> = places.iter().map(|place| place.frozen).collect();
        first_write[logits.0] = Some(steps.loss());
        for (index, op) in ops.iter().enumerate().rev() {
            if first_write[op.output().0].is_none() || !trained[op.output().0] {
                continue;
            }
            op.parameters().iter().flatten().for_each(|&parameter| reached[parameter] = true);
            for (position, input) in op.inputs().iter().enumerate().filter_map(|(p, v)| Some((p, (*v)?))) {
                if trained[input.0] || (position == 0 && op.always_writes_input_gradient()) {
                    accumulate[index][position] = first_write[input.0].is_some();
                    first_write[input.0].get_or_insert(steps.backward(index));
                }
            }
        }
        if let Some(missing) = reached.iter().position(|&reached| !reached) {
            return Err(PlanError::NoGradient { parameter: places[missing].name.clone() });
        }
        Ok(Self { first_write, accumulate })
    }
}

/// By activation: the steps that write it and that read it last, gradients of it aside.
fn lifetimes(ops: &[Op], trained: &[bool], logits: Value, backward: bool) -> (Vec<usize>, Vec<usize>) {
    let (steps, values) = (Steps(ops.len()), trained.len());
    let (mut made, mut last_use) = (vec![0; values], vec![0; values]);
    for (index, op) in ops.iter().enumerate() {
        made[op.output().0] = index;
        last_use[op.output().0] = index;
        op.inputs().iter().flatten().for_each(|input| last_use[input.0] = index);
    }
    if backward {
        for (index, op) in ops.iter().enumerate().filter(|(_, op)| trained[op.output().0]) {
            for value in op.saved().iter().flatten() {
                last_use[value.0] = last_use[value.0].max(steps.backward(index));
            }
        }
    }
    // The batch and the logits stay for all passes and for the caller.
    (last_use[0], last_use[logits.0]) = (steps.end(), steps.end());
    (made, last_use)
}

/// Slots as they are asked for.
#[derive(Default)]
struct Slots(Vec<Slot>);

impl Slots {
    fn add(&mut self, len: usize, first: usize, last: usize) -> usize {
        self.0.push(Slot::new(len, first, last));
        self.0.len() - 1
    }

    /// None for no elements.
    fn add_some(&mut self, len: usize, first: usize, last: usize) -> Option<usize> {
        (len > 0).then(|| self.add(len, first, last))
    }
}

impl MemoryPlan {
    /// Plans the memory of all passes over `ops`.
    ///
    /// # Errors
    /// [`PlanError::NoGradient`] where the loss does not depend on some parameter.
    pub fn new<S: Compute>(
        device: &Device,
        ops: &[Op],
        shapes: &[Shape],
        logits: Value,
        places: &[Place],
        options: PlanOptions,
    ) -> Result<Self, PlanError> {
        let (steps, count, backward) = (Steps(ops.len()), shapes.len(), options.backward);
        let mut slots = Slots::default();
        let trained = trained(ops, count, places);
        let Differentiation { first_write, accumulate } = Differentiation::new(ops, &trained, logits, places)?;
        let (made, last_use) = lifetimes(ops, &trained, logits, backward);

        let elements: Vec<usize> = shapes.iter().map(|shape| shape.len()).collect();
        let len = |value: usize| {
            if value == logits.0 { elements[value] } else { master_len::<S, S>(elements[value]) }
        };
        let values = (0..count).map(|value| slots.add(len(value), made[value], last_use[value])).collect();
        let gradient = |value: usize| {
            let first = first_write[value].filter(|_| backward)?;
            Some(slots.add(len(value), first, steps.backward(made[value])))
        };
        let gradients = (0..count).map(gradient).collect();

        let mut tile_moments = vec![None; count];
        let left = convolution_batch_norm::tile_moments::<S>(device, ops, options.batch_norm);
        for (index, moments) in left.into_iter().enumerate() {
            tile_moments[ops[index].output().0] = moments.map(|left| slots.add(left.len, index, left.last));
        }
        let mut sums_for = vec![None; ops.len()];
        if backward {
            let differentiated = |value: Value| first_write[value.0].is_some() && trained[value.0];
            sums_for = convolution_batch_norm::sums_for::<S>(device, ops, logits, differentiated);
        }
        let mut summed_by = vec![None; ops.len()];
        for (index, sums) in sums_for.iter().enumerate() {
            sums.iter().for_each(|sums| summed_by[sums.index] = Some(index));
        }

        let (mut kept, mut weight_gradients) = (Vec::new(), Vec::new());
        let (mut forward_scratch, mut backward_scratch) = (Vec::new(), Vec::new());
        for (index, op) in ops.iter().enumerate() {
            let site = Site { device, places, backward, accumulate: accumulate[index] };
            let memory: ExtraMemory = op.memory::<S>(&site);
            let differentiated = backward && trained[op.output().0];
            let last = if differentiated { steps.backward(index) } else { index };
            kept.push(memory.kept.map(|len| slots.add_some(len, index, last)));
            forward_scratch.push(slots.add_some(memory.forward, index, index));
            let first = summed_by[index].map_or(last, |convolution| steps.backward(convolution));
            let until = if memory.weight_gradient == WeightGradient::Parts { steps.end() } else { last };
            let len = if differentiated { memory.backward } else { 0 };
            backward_scratch.push(slots.add_some(len, first, until));
            weight_gradients.push(memory.weight_gradient);
        }
        let sample_losses = slots.add(shapes[0].batch, steps.loss(), steps.loss());
        let Slots(mut slots) = slots;
        let len = memory::place(&mut slots);
        Ok(Self {
            slots,
            values,
            elements,
            gradients,
            tile_moments,
            trained,
            kept,
            forward_scratch,
            backward_scratch,
            weight_gradients,
            accumulate,
            sums_for,
            summed_by,
            sample_losses,
            len,
        })
    }

    /// Elements of the arena.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The place of a slot; empty for none.
    pub fn range(&self, slot: Option<usize>) -> Range<usize> {
        slot.map_or(0..0, |slot| self.slots[slot].range())
    }

    /// The place of an activation.
    pub fn value(&self, value: Value) -> Range<usize> {
        self.slots[self.values[value.0]].range()
    }

    /// The elements of an activation.
    pub fn elements(&self, value: Value) -> usize {
        self.elements[value.0]
    }

    /// Whether the pass computes the gradient of an activation.
    pub fn has_gradient(&self, value: Value) -> bool {
        self.gradients[value.0].is_some()
    }

    /// Whether the backward of the operation that writes an activation runs. It does not where the loss does not depend
    /// on the activation, which then depends on no parameter, or planning would have failed; and where the activation
    /// depends on frozen parameters alone.
    pub fn is_differentiated(&self, value: Value) -> bool {
        self.has_gradient(value) && self.is_trained(value)
    }

    /// The place of a gradient; empty where none is needed.
    pub fn gradient(&self, value: Value) -> Range<usize> {
        self.range(self.gradients[value.0])
    }

    /// The elements of a gradient: none where none is needed.
    pub fn gradient_elements(&self, value: Value) -> usize {
        if self.has_gradient(value) { self.elements[value.0] } else { 0 }
    }

    /// Whether an activation depends on a parameter that is not frozen.
    pub fn is_trained(&self, value: Value) -> bool {
        self.trained[value.0]
    }

    /// The place of the moments of an activation's tiles.
    pub fn tile_moments(&self, value: Value) -> Option<Range<usize>> {
        self.tile_moments[value.0].map(|slot| self.slots[slot].range())
    }

    /// The place of the losses of the samples.
    pub fn sample_losses(&self) -> Range<usize> {
        self.slots[self.sample_losses].range()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{CifarResNet, Shortcut};

    #[test]
    fn activations_share_memory() {
        let images = Shape { batch: 16, height: 32, width: 32, channels: 3 };
        let (graph, logits) = CifarResNet { blocks: 3, shortcut: Shortcut::A }.trace(images, 10).unwrap();
        // Elements of the arena, and those that the same slots would take if none shared memory.
        let [training, evaluation] = [PlanOptions::training(), PlanOptions::evaluation()].map(|options| {
            let (ops, places) = (&graph.ops, graph.places());
            let plan = MemoryPlan::new::<f32>(&Device::host(), ops, &graph.shapes, logits, &places, options).unwrap();
            (plan.len(), plan.slots.iter().map(|slot| slot.len).sum::<usize>())
        });
        // The forward pass of a ResNet-20 makes 19 activations before batch norm and 19 after it; training must keep
        // them (less the nine sums that nothing reads again), evaluation needs three or so at a time.
        assert!(training.0 < training.1 * 7 / 10);
        assert!(evaluation.0 < evaluation.1 / 5);
        assert!(evaluation.0 < training.0 / 5);
    }
}
