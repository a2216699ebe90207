//! The operations of a network, one file each.
//!
//! The file of an operation holds its struct, the [`Graph`](super::Graph) method that traces it, its parameters and
//! their initial distribution, the memory it needs, its forward and backward, and the tangents of both. To add an
//! operation, write such a file, declare it below as a module, and name its struct in `operations!`.
//! `docs/extending.md` shows an example.
//!
//! Two operations share work on a GPU's tensor cores: see [`convolution_batch_norm`].

mod add;
mod attention;
mod average_pool;
pub(super) mod batch_norm;
mod bias;
mod convolution;
pub(super) mod convolution_batch_norm;
mod embed_tokens;
mod global_average_pool;
mod layer_norm;
mod linear;
mod max_pool;
mod relu;
mod scale_samples;
mod shortcut;

use super::graph::{Parameter, Place, Value};
use super::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass, Operands};
use super::{PlanError, PlanOptions};
use crate::device::{self, Compute, Device, Slice, SliceMut};
use crate::kernels::layers;

/// What the plan asks of an operation. Every method without a default must be written, so an operation without a
/// backward or without a tangent does not compile.
pub(super) trait Operation {
    /// The activation that it writes.
    fn output(&self) -> Value;

    /// The activations that it reads.
    fn inputs(&self) -> [Option<Value>; 2];

    /// Its parameters.
    fn parameters(&self) -> [Option<Parameter>; 2];

    /// The activations that its backward or a tangent of it reads again. The plan keeps them until the backward.
    fn saved(&self) -> [Option<Value>; 2];

    /// `y = f(x)`.
    fn forward<S: Compute>(&self, pass: ForwardPass<'_, S>) -> device::Result<()>;

    /// From the gradient of the output to the gradients of the inputs, and to those of the parameters where the pass
    /// asks for them.
    fn backward<S: Compute>(&self, pass: BackwardPass<'_, S>) -> device::Result<()>;

    /// The derivative of the forward along a direction in the space of all weights. It runs after the whole forward.
    fn forward_tangent<S: Compute>(&self, pass: ForwardTangentPass<'_, S>) -> device::Result<()>;

    /// The derivative of the backward along the direction. It runs right after the operation's own backward.
    fn backward_tangent<S: Compute>(&self, pass: BackwardTangentPass<'_, S>) -> device::Result<()>;

    /// The memory it needs besides its activations and their gradients. Most operations need none.
    fn memory<S: Compute>(&self, site: &Site<'_>) -> ExtraMemory {
        let _ = site;
        ExtraMemory::default()
    }

    /// Runs once when a plan is made: checks that depend on the plan's options, and measurements on the device.
    fn prepare<S: Compute>(&self, device: &Device, places: &[Place], options: PlanOptions) -> Result<(), PlanError> {
        let _ = (device, places, options);
        Ok(())
    }

    /// Multiplications with an addition each in the forward pass, of the operations that consist of them.
    fn multiply_adds(&self) -> u64 {
        0
    }

    /// Whether the output is stored in the master type instead of the storage type. Only the linear layer does this,
    /// because its output is the logits.
    fn has_wide_output(&self) -> bool {
        false
    }

    /// Whether the backward writes the gradient of its first input even where no parameter lies before it.
    fn always_writes_input_gradient(&self) -> bool {
        false
    }
}

/// An operation without parameters that is a linear map `y = A x` of its inputs. Its backward is the transpose, and
/// both are their own tangents, so nothing is saved.
pub(super) trait LinearMap {
    /// The activation that it writes.
    fn output(&self) -> Value;

    /// The activations that it reads.
    fn inputs(&self) -> [Option<Value>; 2];

    /// `y = A x`, of activations or of their tangents.
    fn apply<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()>;

    /// `dx = Aᵀ dy`, of gradients or of their tangents.
    fn transpose<S: Compute>(&self, at: &mut Operands<'_, S>) -> device::Result<()>;
}

impl<M: LinearMap> Operation for M {
    fn output(&self) -> Value {
        LinearMap::output(self)
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        LinearMap::inputs(self)
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [None, None]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [None, None]
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        self.apply(&mut pass.values)
    }

    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        self.transpose(&mut pass.values)
    }

    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        self.apply(&mut pass.tangents)
    }

    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        self.transpose(&mut pass.tangents)
    }
}

/// What [`Operation::memory`] may depend on.
pub(super) struct Site<'a> {
    pub device: &'a Device,
    pub places: &'a [Place],
    /// Whether the plan computes gradients.
    pub backward: bool,
    /// By input: whether the backward adds to a gradient that another operation has begun.
    pub accumulate: [bool; 2],
}

/// The memory of an operation besides its activations and their gradients, in elements of the master type.
#[derive(Default)]
pub(super) struct ExtraMemory {
    /// Written by the forward and read by the backward and the tangents.
    pub kept: [usize; 2],
    /// Scratch of the forward.
    pub forward: usize,
    /// Scratch of the backward.
    pub backward: usize,
    /// How the backward leaves the gradients of the parameters.
    pub weight_gradient: WeightGradient,
}

/// The gradient of a sum goes to its terms, which are the operation's inputs: it is written, or added where another
/// operation has begun the gradient.
fn pass_to_terms<'a, S: Compute>(
    at: &mut Operands<'a, S>,
    dy: Slice<'a, S>,
    first: Value,
    second: Option<Value>,
) -> device::Result<()> {
    let mut place = at.input_gradient(0, first)?;
    match &mut place {
        Some((gradient, true)) => layers::add_to(dy, gradient.reborrow())?,
        Some((gradient, false)) => gradient.copy_from(dy)?,
        None => {}
    }
    let Some(second) = second else { return Ok(()) };
    if second == first {
        // The gradient of x + x takes dy twice.
        return place.map_or(Ok(()), |(gradient, _)| layers::add_to(dy, gradient));
    }
    match at.input_gradient(1, second)? {
        Some((gradient, true)) => layers::add_to(dy, gradient),
        Some((mut gradient, false)) => gradient.copy_from(dy),
        None => Ok(()),
    }
}

/// Where an operation whose kernels do not add writes the gradient of x, its first input, and the gradient to which the
/// result must be added afterwards if another operation has begun that. The operation [always writes that
/// gradient](Operation::always_writes_input_gradient).
fn place_of_dx<'s, 'a: 's, S: Compute>(
    x: Value,
    values: &mut Operands<'a, S>,
    scratch: SliceMut<'s, S::Master>,
) -> device::Result<(SliceMut<'s, S>, Option<SliceMut<'s, S>>)> {
    let gradient = values.gradient_mut(x)?;
    if values.accumulates(0) { Ok((scratch.cast(gradient.len())?, Some(gradient))) } else { Ok((gradient, None)) }
}

/// How a backward leaves the gradients of its parameters, for [`crate::kernels::gradient`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum WeightGradient {
    /// Complete. The last launch of the pass finishes it: it removes the loss scale, checks for infinities and NaN, and
    /// sums squares.
    #[default]
    Complete,
    /// In parts, which stay in the backward's scratch. The last launch of the pass adds them up and finishes the sum.
    Parts,
    /// In large parts, which a launch of their own adds up and finishes at once, while they are still in the GPU's
    /// cache.
    Summed,
    /// Finished by the operation's own kernel, which leaves so many sums of squares.
    Finished(usize),
}

/// Makes the enum of all operations and forwards each method of [`Operation`] to the operation at hand.
macro_rules! operations {
    ($($module:ident :: $operation:ident),* $(,)?) => {
        /// One operation of a traced network.
        #[derive(Debug, Clone)]
        pub(super) enum Op {
            $($operation($module::$operation)),*
        }

        $(impl From<$module::$operation> for Op {
            fn from(operation: $module::$operation) -> Self {
                Self::$operation(operation)
            }
        })*

        impl Op {
            /// The name of its struct.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$operation(_) => stringify!($operation)),*
                }
            }
        }

        operations! { @forward [$($operation)*]
            fn output(&self) -> Value;
            fn inputs(&self) -> [Option<Value>; 2];
            fn parameters(&self) -> [Option<Parameter>; 2];
            fn saved(&self) -> [Option<Value>; 2];
            fn forward<S: Compute>(&self, pass: ForwardPass<'_, S>) -> device::Result<()>;
            fn backward<S: Compute>(&self, pass: BackwardPass<'_, S>) -> device::Result<()>;
            fn forward_tangent<S: Compute>(&self, pass: ForwardTangentPass<'_, S>) -> device::Result<()>;
            fn backward_tangent<S: Compute>(&self, pass: BackwardTangentPass<'_, S>) -> device::Result<()>;
            fn memory<S: Compute>(&self, site: &Site<'_>) -> ExtraMemory;
            fn prepare<S: Compute>(
                &self, device: &Device, places: &[Place], options: PlanOptions
            ) -> Result<(), PlanError>;
            fn multiply_adds(&self) -> u64;
            fn has_wide_output(&self) -> bool;
            fn always_writes_input_gradient(&self) -> bool;
        }
    };
    (@forward $operations:tt
        $(fn $method:ident $(<$type:ident: Compute>)? (&self $(, $argument:ident: $of:ty)*) -> $result:ty;)*
    ) => {
        impl Operation for Op {
            $(fn $method $(<$type: Compute>)? (&self $(, $argument: $of)*) -> $result {
                operations! {
                    @match self $operations operation => Operation::$method $(::<$type>)? (operation $(, $argument)*)
                }
            })*
        }
    };
    (@match $self:ident [$($operation:ident)*] $bound:ident => $call:expr) => {
        match $self {
            $(Op::$operation($bound) => $call),*
        }
    };
}

operations! {
    add::Add,
    attention::Attention,
    average_pool::AveragePool,
    batch_norm::BatchNorm,
    bias::Bias,
    convolution::Convolution,
    embed_tokens::EmbedTokens,
    global_average_pool::GlobalAveragePool,
    layer_norm::LayerNorm,
    linear::Linear,
    max_pool::MaxPool,
    relu::Relu,
    scale_samples::ScaleSamples,
    shortcut::Shortcut,
}
