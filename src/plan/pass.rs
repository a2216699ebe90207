//! What an operation works with during a pass: its activations and gradients, the weights, and where to leave the
//! gradients of its parameters.

use std::ops::Range;

use super::graph::{Parameter, Place, Value};
use super::memory_plan::MemoryPlan;
use super::ops::WeightGradient;
use super::ops::convolution_batch_norm::SumsFor;
use crate::arena::Layout;
use crate::device::{Buffer, Compute, Disjoint, Result, Scalar, Slice, SliceMut};
use crate::kernels::batch_norm::{Mode, Workspace};
use crate::kernels::gradient::{Finish, GradientStages};
use crate::kernels::scale_samples::SampleFactors;

/// The forward of one operation.
pub(super) struct ForwardPass<'a, S: Compute> {
    pub values: Operands<'a, S>,
    pub weights: Weights<'a, S>,
    /// Whether batch norm uses the statistics of the batch or the running ones.
    pub mode: Mode,
    pub statistics: StatisticsBuffers<'a, S::Master>,
    /// Of the operations that multiply samples by factors.
    pub factors: &'a SampleFactors<S::Master>,
    /// For batch norm's sums over rows.
    pub workspace: &'a mut Workspace,
}

/// The backward of one operation.
pub(super) struct BackwardPass<'a, S: Compute> {
    pub values: Operands<'a, S>,
    /// Those of the forward.
    pub weights: Weights<'a, S>,
    pub mode: Mode,
    /// None in a product with the Hessian, which needs only the tangents of the parameters' gradients.
    pub gradients: Option<ParameterGradients<'a, S::Master>>,
    pub factors: &'a SampleFactors<S::Master>,
    pub workspace: &'a mut Workspace,
}

/// The tangent of one operation's forward.
pub(super) struct ForwardTangentPass<'a, S: Compute> {
    pub values: Operands<'a, S>,
    /// The tangents of all values, at the same places of another arena.
    pub tangents: Operands<'a, S>,
    pub weights: Weights<'a, S>,
    /// The tangent of the weights.
    pub direction: Weights<'a, S>,
    pub mode: Mode,
    pub factors: &'a SampleFactors<S::Master>,
    pub workspace: &'a mut Workspace,
}

/// The tangent of one operation's backward.
pub(super) struct BackwardTangentPass<'a, S: Compute> {
    pub values: Operands<'a, S>,
    pub tangents: Operands<'a, S>,
    pub weights: Weights<'a, S>,
    pub direction: Weights<'a, S>,
    pub mode: Mode,
    /// Where the tangents of the parameters' gradients go: the product with the Hessian.
    pub product: ParameterGradients<'a, S::Master>,
    pub factors: &'a SampleFactors<S::Master>,
    pub workspace: &'a mut Workspace,
}

/// The weights, or a direction in their space.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a, S: Compute> {
    places: &'a [Place],
    all: Slice<'a, S::Master>,
    stored: Slice<'a, S>,
    frozen: Frozen<'a, S>,
}

/// The frozen parameters, in the arena of the statistics; of a direction, zeros.
#[derive(Clone, Copy)]
pub(super) struct Frozen<'a, S: Compute> {
    all: Slice<'a, S::Master>,
    stored: Slice<'a, S>,
}

impl<'a, S: Compute> Frozen<'a, S> {
    /// `rounded` holds the first of them as the storage type, where that is narrower than the master type.
    pub fn new(all: &'a Buffer<S::Master>, rounded: &'a Buffer<S>) -> Result<Self> {
        Ok(Self { all: all.view(), stored: stored(all.view(), rounded)? })
    }
}

fn stored<'a, S: Compute>(all: Slice<'a, S::Master>, rounded: &'a Buffer<S>) -> Result<Slice<'a, S>> {
    if S::NARROW { Ok(rounded.view()) } else { all.cast(all.len()) }
}

impl<'a, S: Compute> Weights<'a, S> {
    /// `rounded` holds the first of the weights as the storage type, where that is narrower than the master type.
    pub fn new(
        places: &'a [Place],
        all: Slice<'a, S::Master>,
        rounded: &'a Buffer<S>,
        frozen: Frozen<'a, S>,
    ) -> Result<Self> {
        Ok(Self { places, all, stored: stored(all, rounded)?, frozen })
    }

    /// A parameter in the master type.
    pub fn get(&self, parameter: Parameter) -> Result<Slice<'a, S::Master>> {
        let place = &self.places[parameter];
        if place.frozen { self.frozen.all } else { self.all }.slice(place.range.clone())
    }

    /// The weight of a convolution in the storage type.
    pub fn stored(&self, parameter: Parameter) -> Result<Slice<'a, S>> {
        let place = &self.places[parameter];
        if place.frozen { self.frozen.stored } else { self.stored }.slice(place.range.clone())
    }

    /// Whether a parameter is frozen, so that it has no gradient and a direction does not move it.
    pub fn is_frozen(&self, parameter: Parameter) -> bool {
        self.places[parameter].frozen
    }
}

/// Where batch norm's running statistics lie during a forward pass.
pub(super) struct StatisticsBuffers<'a, T: Scalar> {
    pub layout: &'a Layout,
    /// As the newest finished step left them.
    pub committed: &'a Buffer<T>,
    /// As the newest pass that updates them left them.
    pub current: &'a Buffer<T>,
    /// Where this pass writes them; none where it does not update them.
    pub next: Option<&'a mut Buffer<T>>,
    /// How much of each statistic this pass replaces.
    pub share: f64,
}

impl<T: Scalar> StatisticsBuffers<'_, T> {
    /// Where these tensors lie in each of the buffers.
    pub fn places<const N: usize>(&self, tensors: [usize; N]) -> [Range<usize>; N] {
        tensors.map(|tensor| self.layout.tensors()[tensor].range())
    }
}

/// Where a pass leaves the gradients of the parameters.
pub(super) struct ParameterGradients<'a, T: Scalar> {
    places: &'a [Place],
    vector: SliceMut<'a, T>,
    /// The operation's own last stage, on a GPU.
    pub last_stage: Option<LastStage<'a>>,
}

impl<'a, T: Scalar> ParameterGradients<'a, T> {
    pub fn new(places: &'a [Place], vector: SliceMut<'a, T>, last_stage: Option<LastStage<'a>>) -> Self {
        Self { places, vector, last_stage }
    }

    /// Of one parameter; none for a frozen one.
    pub fn get(&mut self, parameter: Parameter) -> Result<Option<SliceMut<'_, T>>> {
        let place = &self.places[parameter];
        (!place.frozen).then(|| self.vector.slice_mut(place.range.clone())).transpose()
    }

    /// Of two parameters; none for a frozen one.
    pub fn pair(&mut self, first: Parameter, second: Parameter) -> Result<[Option<SliceMut<'_, T>>; 2]> {
        let mut vector = self.vector.disjoint();
        let mut take = |parameter: Parameter| {
            let place = &self.places[parameter];
            (!place.frozen).then(|| vector.write(place.range.clone())).transpose()
        };
        Ok([take(first)?, take(second)?])
    }
}

/// The last stage of an operation's weight gradient: it removes the loss scale, checks for infinities and NaN, and sums
/// squares.
pub(super) struct LastStage<'a> {
    pub stages: &'a mut GradientStages,
    /// The number of the operation's own stage.
    pub number: usize,
    /// The state of the loss scale, if there is one.
    pub scale: Option<Slice<'a, f64>>,
    /// Set to 1 where an element is not finite.
    pub flag: SliceMut<'a, u32>,
    /// Whether the pass asks for the norm of the gradient.
    pub norm: bool,
}

impl<'a> LastStage<'a> {
    /// For a kernel that takes the stage itself.
    pub fn finish(self) -> Result<Finish<'a>> {
        self.stages.finish(self.number, self.scale, self.flag, self.norm)
    }

    /// Adds up the parts of the operation's weight gradient and finishes the sum.
    pub fn add_up<T: Scalar>(self, parts: Slice<'_, T>, gradients: &mut ParameterGradients<'_, T>) -> Result<()> {
        let out = gradients.vector.reborrow();
        self.stages.launch(self.number, parts, out, self.scale, self.flag, self.norm)
    }
}

/// The parts of an arena that one operation borrows. Parts that are written must not overlap any other.
pub(super) struct Operands<'a, S: Compute> {
    plan: &'a MemoryPlan,
    operation: usize,
    arena: Disjoint<'a, S::Master>,
}

impl<'a, S: Compute> Operands<'a, S> {
    pub fn new(plan: &'a MemoryPlan, operation: usize, arena: &'a mut Buffer<S::Master>) -> Self {
        Self { plan, operation, arena: arena.disjoint() }
    }

    /// The operation's index.
    pub fn index(&self) -> usize {
        self.operation
    }

    /// An activation.
    pub fn read(&mut self, value: Value) -> Result<Slice<'a, S>> {
        self.arena.read(self.plan.value(value))?.cast(self.plan.elements(value))
    }

    /// An activation, to write.
    pub fn write(&mut self, value: Value) -> Result<SliceMut<'a, S>> {
        self.arena.write(self.plan.value(value))?.cast(self.plan.elements(value))
    }

    /// The output of an operation [with wide output](super::ops::Operation::has_wide_output), to write.
    pub fn write_wide(&mut self, value: Value) -> Result<SliceMut<'a, S::Master>> {
        self.arena.write(self.plan.value(value))
    }

    /// The gradient of an activation.
    pub fn gradient(&mut self, value: Value) -> Result<Slice<'a, S>> {
        self.arena.read(self.plan.gradient(value))?.cast(self.plan.gradient_elements(value))
    }

    /// As [`Operands::gradient`], to write.
    pub fn gradient_mut(&mut self, value: Value) -> Result<SliceMut<'a, S>> {
        self.arena.write(self.plan.gradient(value))?.cast(self.plan.gradient_elements(value))
    }

    /// The gradient of a wide output.
    pub fn gradient_wide(&mut self, value: Value) -> Result<Slice<'a, S::Master>> {
        self.arena.read(self.plan.gradient(value))
    }

    /// Where the gradient of the operation's input number `input`, which is `value`, goes, and whether the operation
    /// must add to it. None where the input needs no gradient, because no trained parameter lies before it. Such an
    /// input can have a gradient all the same, of an operation that always writes one, in memory that is not free
    /// before.
    pub fn input_gradient(&mut self, input: usize, value: Value) -> Result<Option<(SliceMut<'a, S>, bool)>> {
        if !self.plan.is_differentiated(value) {
            return Ok(None);
        }
        Ok(Some((self.gradient_mut(value)?, self.accumulates(input))))
    }

    /// Whether the operation adds to the gradient of its input number `input`, because another operation has begun
    /// that.
    pub fn accumulates(&self, input: usize) -> bool {
        self.accumulates_of(self.operation, input)
    }

    /// As [`Operands::accumulates`], for another operation.
    pub fn accumulates_of(&self, operation: usize, input: usize) -> bool {
        self.plan.accumulate[operation][input]
    }

    /// Whether an activation depends on a parameter. The tangent of any other is zero.
    pub fn is_trained(&self, value: Value) -> bool {
        self.plan.is_trained(value)
    }

    /// Memory number `position` that the forward of an operation has kept.
    pub fn kept(&mut self, operation: usize, position: usize) -> Result<Slice<'a, S::Master>> {
        self.arena.read(self.plan.range(self.plan.kept[operation][position]))
    }

    /// The operation's own memory number `position`, which it keeps for its backward.
    pub fn kept_mut(&mut self, position: usize) -> Result<SliceMut<'a, S::Master>> {
        self.arena.write(self.plan.range(self.plan.kept[self.operation][position]))
    }

    /// Empty where the operation asked for none.
    pub fn forward_scratch(&mut self) -> Result<SliceMut<'a, S::Master>> {
        self.arena.write(self.plan.range(self.plan.forward_scratch[self.operation]))
    }

    /// Empty where the operation asked for none.
    pub fn backward_scratch(&mut self) -> Result<SliceMut<'a, S::Master>> {
        self.backward_scratch_of(self.operation)
    }

    /// As [`Operands::backward_scratch`], for another operation.
    pub fn backward_scratch_of(&mut self, operation: usize) -> Result<SliceMut<'a, S::Master>> {
        self.arena.write(self.plan.range(self.plan.backward_scratch[operation]))
    }

    /// How the operation's backward leaves the gradient of its weights.
    pub fn weight_gradient(&self) -> WeightGradient {
        self.plan.weight_gradients[self.operation]
    }

    /// The moments of an activation's tiles, if a convolution leaves them.
    pub fn tile_moments(&mut self, value: Value) -> Result<Option<Slice<'a, S::Master>>> {
        self.plan.tile_moments(value).map(|range| self.arena.read(range)).transpose()
    }

    /// As [`Operands::tile_moments`], to write.
    pub fn tile_moments_mut(&mut self, value: Value) -> Result<Option<SliceMut<'a, S::Master>>> {
        self.plan.tile_moments(value).map(|range| self.arena.write(range)).transpose()
    }

    /// The batch norm for which the operation, a convolution, leaves sums.
    pub fn sums_for(&self) -> Option<SumsFor> {
        self.plan.sums_for[self.operation]
    }

    /// Whether a convolution has left the sums of the operation, a batch norm.
    pub fn is_summed(&self) -> bool {
        self.plan.summed_by[self.operation].is_some()
    }
}
