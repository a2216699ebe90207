//! What lies where in a plan's arenas: the steps during which every activation, gradient and piece of scratch lives, and the parts
//! that one operation borrows.
//!
//! An arena consists of elements of the master type. Activations and their gradients are stored as `S`, in as many of these as
//! they fill; the logits, batch norm's moments and scratch are of the master type itself.

use std::ops::Range;

use super::PlanOptions;
use super::error::PlanError;
use super::graph::{Op, Shape, Value};
use super::memory::{self, Slot};
use crate::arena::{ALIGNMENT, Layout};
use crate::device::{self, Buffer, Compute, Device, Disjoint, Slice, SliceMut};
use crate::kernels::batch_norm::{Activation, Mode, Saved};

/// The slot of everything that lies in the arena.
pub(super) struct Places {
    pub slots: Vec<Slot>,
    /// By activation.
    pub values: Vec<usize>,
    /// By activation: its elements.
    elements: Vec<usize>,
    /// By activation; none where no gradient is needed.
    pub gradients: Vec<Option<usize>>,
    /// By operation: batch norm's mean and inverse deviation.
    pub moments: Vec<Option<(usize, usize)>>,
    /// By activation: the moments of its tiles, where a convolution leaves them to batch norm.
    tile_moments: Vec<Option<usize>>,
    /// By operation: scratch of its forward and of its backward. For batch norm see [`BatchNormScratch`].
    pub scratch: Vec<(Option<usize>, Option<usize>)>,
    /// By operation: of a convolution, the batch norm that made its input and whose dz, dgamma and dbeta its backward leaves.
    pub sums_for: Vec<Option<usize>>,
    /// By operation: how a convolution's backward leaves its weight gradient.
    pub weight_gradients: Vec<WeightGradient>,
    /// By activation: whether it depends on a parameter. The tangent of any other is zero.
    pub trained: Vec<bool>,
    /// By operation and input: whether its backward adds to a gradient that another operation has begun.
    pub accumulate: Vec<[bool; 2]>,
    pub sample_losses: usize,
    pub len: usize,
}

/// How a convolution's backward leaves its weight gradient, for [`crate::kernels::gradient`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WeightGradient {
    /// As a whole, to be finished at the end of the pass.
    Whole,
    /// In parts, to be added up then.
    Parts,
    /// Finished by a stage of its own: large parts are added up at once, while a GPU's cache still holds them.
    Summed,
    /// Finished by a stage of its own, which is the convolution.
    Finished,
}

/// Bytes of a weight gradient's parts that are kept until the end of the pass.
const LARGEST_KEPT_PARTS: usize = 4 << 20;

/// Elements of the master type that `len` elements of `S` fill.
fn stored<S: Compute>(len: usize) -> usize {
    (len * size_of::<S>()).div_ceil(size_of::<S::Master>())
}

impl Places {
    pub fn new<S: Compute>(
        device: &Device,
        ops: &[Op],
        shapes: &[Shape],
        logits: Value,
        parameters: &Layout,
        options: PlanOptions,
    ) -> Result<Self, PlanError> {
        let (loss_step, end) = (ops.len(), 2 * ops.len());
        let backward_step = |op: usize| end - op;
        let mut slots = Vec::new();
        let mut slot = |len: usize, first: usize, last: usize| {
            slots.push(Slot::new(len, first, last));
            slots.len() - 1
        };

        // Which activations lead from a parameter to the loss, and so need a gradient.
        let mut trained = vec![false; shapes.len()];
        for op in ops {
            trained[op.output().0] = op.parameters().iter().any(Option::is_some)
                || op.inputs().iter().flatten().any(|input| trained[input.0]);
        }
        let mut first_use = vec![None; shapes.len()];
        let mut accumulate = vec![[false; 2]; ops.len()];
        let mut reached = vec![false; parameters.tensors().len()];
        first_use[logits.0] = Some(loss_step);
        for (index, op) in ops.iter().enumerate().rev() {
            if first_use[op.output().0].is_none() {
                continue;
            }
            op.parameters().iter().flatten().for_each(|&parameter| reached[parameter] = true);
            for (position, input) in op.inputs().iter().enumerate().filter_map(|(p, v)| Some((p, (*v)?))) {
                // Batch norm computes its input's gradient in any case.
                if trained[input.0] || (matches!(op, Op::BatchNorm { .. }) && position == 0) {
                    accumulate[index][position] = first_use[input.0].is_some();
                    first_use[input.0].get_or_insert(backward_step(index));
                }
            }
        }
        if let Some(missing) = reached.iter().position(|&reached| !reached) {
            return Err(PlanError::NoGradient { parameter: parameters.tensors()[missing].name.clone() });
        }

        // The batch and the logits stay for all passes and for the caller.
        let mut last_use: Vec<usize> = vec![0; shapes.len()];
        let mut made: Vec<usize> = vec![0; shapes.len()];
        for (index, op) in ops.iter().enumerate() {
            made[op.output().0] = index;
            last_use[op.output().0] = index;
            op.inputs().iter().flatten().for_each(|input| last_use[input.0] = index);
        }
        if options.backward {
            for (index, op) in ops.iter().enumerate() {
                for value in op.saved().iter().flatten() {
                    last_use[value.0] = last_use[value.0].max(backward_step(index));
                }
            }
        }
        (last_use[0], last_use[logits.0]) = (end, end);
        let elements: Vec<usize> = shapes.iter().map(|shape| shape.len()).collect();
        let lens: Vec<usize> = (0..shapes.len())
            .map(|value| if value == logits.0 { elements[value] } else { stored::<S>(elements[value]) })
            .collect();
        let values: Vec<usize> =
            (0..shapes.len()).map(|value| slot(lens[value], made[value], last_use[value])).collect();
        let gradients = (0..shapes.len())
            .map(|value| match first_use[value] {
                Some(first) if options.backward => Some(slot(lens[value], first, backward_step(made[value]))),
                _ => None,
            })
            .collect();
        let mut tile_moments = vec![None; shapes.len()];
        for (index, op) in ops.iter().enumerate() {
            let normalizes = |op: &Op| matches!(op, Op::BatchNorm { x, .. } if *x == ops[index].output());
            if let Op::Convolution { shape, y, .. } = op
                && options.batch_norm == Mode::Train
                && let Some(last) = ops.iter().rposition(normalizes)
                && let Some(len) = shape.moments_len::<S>(device)
            {
                tile_moments[y.0] = Some(slot(len, index, last));
            }
        }
        // The first operation to read an activation is the last to add to its gradient.
        let (mut sums_for, mut summed_by) = (vec![None; ops.len()], vec![None; ops.len()]);
        for (norm, op) in ops.iter().enumerate() {
            let reads = |reader: &Op| reader.inputs().contains(&Some(op.output()));
            if matches!(op, Op::BatchNorm { .. })
                && options.backward
                && op.output() != logits
                && let Some(first) = ops.iter().position(reads)
                && let Op::Convolution { shape, .. } = &ops[first]
                && first_use[ops[first].output().0].is_some()
                && shape.leaves_sums::<S>(device)
            {
                (sums_for[first], summed_by[norm]) = (Some(norm), Some(first));
            }
        }
        let mut moments = Vec::new();
        let mut scratch = Vec::new();
        let mut weight_gradients = vec![WeightGradient::Whole; ops.len()];
        for (index, op) in ops.iter().enumerate() {
            let last = if options.backward { backward_step(index) } else { index };
            moments.push(match op {
                Op::BatchNorm { x, .. } => {
                    let channels = shapes[x.0].channels;
                    Some((slot(channels, index, last), slot(channels, index, last)))
                }
                _ => None,
            });
            scratch.push(match op {
                Op::Convolution { shape, .. } => {
                    let len = shape.workspace_len::<S>(device);
                    let small = len * size_of::<S::Master>() <= LARGEST_KEPT_PARTS;
                    weight_gradients[index] = match shape.weight_gradient_splits::<S>(device) {
                        1 if shape.finished_squares::<S>(device).is_some() => WeightGradient::Finished,
                        1 => WeightGradient::Whole,
                        _ if small => WeightGradient::Parts,
                        _ => WeightGradient::Summed,
                    };
                    let until = if weight_gradients[index] == WeightGradient::Parts { end } else { last };
                    (Some(slot(len, index, index)), options.backward.then(|| slot(len, last, until)))
                }
                Op::BatchNorm { x, .. } if options.backward => {
                    let len = BatchNormScratch::new::<S>(shapes[x.0], accumulate[index][0]).len();
                    (None, Some(slot(len, summed_by[index].map_or(last, backward_step), last)))
                }
                _ => (None, None),
            });
        }
        let sample_losses = slot(shapes[0].batch, loss_step, loss_step);
        let len = memory::place(&mut slots);
        Ok(Self {
            slots,
            values,
            elements,
            gradients,
            moments,
            tile_moments,
            scratch,
            sums_for,
            weight_gradients,
            trained,
            accumulate,
            sample_losses,
            len,
        })
    }

    pub fn value(&self, value: Value) -> Range<usize> {
        self.slots[self.values[value.0]].range()
    }
}

/// What batch norm's backward needs beside its outputs: room for dgamma and dbeta where no parameter's gradient is asked for,
/// and for dx where another operation has begun the gradient of x, because its kernels do not add.
pub(super) struct BatchNormScratch {
    pub dgamma: Range<usize>,
    pub dbeta: Range<usize>,
    pub dx: Range<usize>,
}

impl BatchNormScratch {
    pub fn new<S: Compute>(shape: Shape, adds: bool) -> Self {
        let (channels, pitch) = (shape.channels, shape.channels.next_multiple_of(ALIGNMENT));
        let dx = 2 * pitch..2 * pitch + if adds { stored::<S>(shape.len()) } else { 0 };
        Self { dgamma: 0..channels, dbeta: pitch..pitch + channels, dx }
    }

    fn len(&self) -> usize {
        self.dx.end
    }
}

/// Batch norm's mean and inverse deviation.
type Pair<'a, T> = (Slice<'a, T>, Slice<'a, T>);

/// The parts of an arena that one operation uses.
pub(super) struct Parts<'p, 'a, S: Compute> {
    places: &'p Places,
    arena: Disjoint<'a, S::Master>,
}

impl<'p, 'a, S: Compute> Parts<'p, 'a, S> {
    pub fn new(places: &'p Places, arena: &'a mut Buffer<S::Master>) -> Self {
        Self { places, arena: arena.disjoint() }
    }

    pub fn read(&mut self, value: Value) -> device::Result<Slice<'a, S>> {
        self.arena.read(self.places.value(value))?.cast(self.places.elements[value.0])
    }

    pub fn write(&mut self, value: Value) -> device::Result<SliceMut<'a, S>> {
        self.arena.write(self.places.value(value))?.cast(self.places.elements[value.0])
    }

    /// What a linear layer makes, which is of the master type.
    pub fn read_wide(&mut self, value: Value) -> device::Result<Slice<'a, S::Master>> {
        self.arena.read(self.places.value(value))
    }

    /// As [`Parts::read_wide`].
    pub fn write_wide(&mut self, value: Value) -> device::Result<SliceMut<'a, S::Master>> {
        self.arena.write(self.places.value(value))
    }

    pub fn slot_mut(&mut self, slot: usize) -> device::Result<SliceMut<'a, S::Master>> {
        self.arena.write(self.places.slots[slot].range())
    }

    /// Scratch memory; empty where the operation needs none.
    pub fn scratch(&mut self, slot: Option<usize>) -> device::Result<SliceMut<'a, S::Master>> {
        self.arena.write(slot.map_or(0..0, |slot| self.places.slots[slot].range()))
    }

    /// The place of a gradient, and its elements; empty where none is needed.
    fn gradient_place(&self, value: Value) -> (Range<usize>, usize) {
        let place = |slot: usize| (self.places.slots[slot].range(), self.places.elements[value.0]);
        self.places.gradients[value.0].map_or((0..0, 0), place)
    }

    pub fn gradient(&mut self, value: Value) -> device::Result<Slice<'a, S>> {
        let (range, elements) = self.gradient_place(value);
        self.arena.read(range)?.cast(elements)
    }

    pub fn gradient_mut(&mut self, value: Value) -> device::Result<SliceMut<'a, S>> {
        let (range, elements) = self.gradient_place(value);
        self.arena.write(range)?.cast(elements)
    }

    /// As [`Parts::read_wide`].
    pub fn gradient_wide(&mut self, value: Value) -> device::Result<Slice<'a, S::Master>> {
        self.arena.read(self.gradient_place(value).0)
    }

    /// As [`Parts::read_wide`].
    pub fn gradient_wide_mut(&mut self, value: Value) -> device::Result<SliceMut<'a, S::Master>> {
        self.arena.write(self.gradient_place(value).0)
    }

    /// The gradient of an activation, or none where nothing before it is trained.
    pub fn gradient_if_needed(&mut self, value: Value) -> device::Result<Option<SliceMut<'a, S>>> {
        if self.places.gradients[value.0].is_none() {
            return Ok(None);
        }
        self.gradient_mut(value).map(Some)
    }

    pub fn moments(&mut self, op: usize) -> device::Result<Pair<'a, S::Master>> {
        let (mean, inv_std) = self.places.moments[op].unwrap_or_default();
        let [mean, inv_std] = [mean, inv_std].map(|slot| self.places.slots[slot].range());
        Ok((self.arena.read(mean)?, self.arena.read(inv_std)?))
    }

    pub fn moments_mut(&mut self, op: usize) -> device::Result<Saved<'a, S::Master>> {
        let (mean, inv_std) = self.places.moments[op].unwrap_or_default();
        Ok(Saved { mean: self.slot_mut(mean)?, inv_std: self.slot_mut(inv_std)? })
    }

    pub fn tile_moments(&mut self, value: Value) -> device::Result<Option<Slice<'a, S::Master>>> {
        let slot = self.places.tile_moments[value.0];
        slot.map(|slot| self.arena.read(self.places.slots[slot].range())).transpose()
    }

    pub fn tile_moments_mut(&mut self, value: Value) -> device::Result<Option<SliceMut<'a, S::Master>>> {
        self.places.tile_moments[value.0].map(|slot| self.slot_mut(slot)).transpose()
    }

    /// What followed a batch norm's normalisation, and where its mask comes from.
    pub fn activation(
        &mut self,
        relu: bool,
        residual: Option<Value>,
        y: Value,
        beta: Slice<'a, S::Master>,
    ) -> device::Result<Activation<'a, S>> {
        Ok(match (relu, residual) {
            (false, _) => Activation::Identity,
            (true, None) => Activation::ReluRecomputed { beta },
            (true, Some(_)) => Activation::Relu { y: self.read(y)? },
        })
    }
}
