//! The interface between an optimizer and the function that it minimises.
//!
//! An [`Objective`] answers one call, [`Objective::pass`]. A [`Pass`] says what is wanted: a gradient, two gradients, a
//! product with the Hessian, the end of a step. An objective answers the passes that it can do well and hands every
//! other one to [`Pass::split`], which takes it apart into simpler ones. A [`Wrapper`] changes some passes of another
//! objective; every other pass reaches that objective as it is.
//!
//! A network's [`Plan`](crate::plan::Plan) is an objective; so is any function of a flat vector that a user brings:
//!
//! ```
//! use polder::device::Result;
//! use polder::objective::{Domain, Objective, Pass};
//!
//! /// ½‖w − 3‖², computed on the host.
//! struct Bowl;
//!
//! impl Objective<f64> for Bowl {
//!     fn domain(&self) -> Domain<'_> {
//!         Domain::of_len(4)
//!     }
//!
//!     fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
//!         match pass {
//!             Pass::Gradient { weights, mut gradient, mut loss, .. } => {
//!                 let slope: Vec<f64> = weights.to_vec()?.iter().map(|w| w - 3.0).collect();
//!                 loss.write(&[slope.iter().map(|d| 0.5 * d * d).sum()])?;
//!                 gradient.write(&slope)
//!             }
//!             other => other.split(self),
//!         }
//!     }
//! }
//! ```

mod accumulator;
mod differences;

pub use accumulator::{Accumulated, Accumulator};
pub use differences::Differences;

use std::any::Any;
use std::ops::Range;

use crate::device::{Buffer, Error, Result, Scalar, Slice, SliceMut};
use crate::kernels::vector::{self, Reduction};

/// What a pass does with batch norm's running statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunningStats {
    /// Compute the updated statistics and hold them until [`Pass::Commit`]. The passes at the unperturbed weights do
    /// this. When a step has several of them, on groups or parts of its mini-batch, each continues from the one before.
    Update,
    /// Leave them alone. Every pass at perturbed weights does this.
    Keep,
}

/// Displaced weights, `from ± ρ along/(norm + 1e-12)`, as [`vector::perturb`] computes them.
#[derive(Clone, Copy)]
pub struct Displacement<'a, T: Scalar> {
    /// The weights that are displaced.
    pub from: Slice<'a, T>,
    /// The direction.
    pub along: Slice<'a, T>,
    /// Its norm: one element.
    pub norm: Slice<'a, f64>,
    /// ρ.
    pub rho: f64,
}

/// The tensors of a gradient that stay where the objective has computed them, for [`Pass::ScatteredGradient`].
pub struct Scattered<T: Scalar> {
    /// Each tensor's place in the vector, in order and apart, and its elements.
    pub tensors: Vec<(Range<usize>, Buffer<T>)>,
    /// What owns their memory, if it is not these buffers. Dropped with them.
    pub owner: Option<Box<dyn Any + Send>>,
}

impl<T: Scalar> Default for Scattered<T> {
    fn default() -> Self {
        Self { tensors: Vec::new(), owner: None }
    }
}

impl<T: Scalar> Scattered<T> {
    /// Copies the tensors to their places in the vector, and forgets them.
    ///
    /// Traffic: 8 B per element.
    ///
    /// # Errors
    /// [`Error::Range`] for a place outside of the vector, [`Error::Length`] for one of another length than its tensor.
    pub fn gather(&mut self, mut vector: SliceMut<'_, T>) -> Result<()> {
        for (place, tensor) in std::mem::take(self).tensors {
            vector.slice_mut(place)?.copy_from(tensor.view())?;
        }
        Ok(())
    }
}

/// The vector that an objective is a function of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Domain<'a> {
    /// Number of elements, padding included.
    pub len: usize,
    /// Number of groups that the mini-batch can be taken in, for m-sharpness.
    pub groups: usize,
    /// Elements that belong to no weight, such as the gaps between aligned tensors. Curvature along a random direction
    /// sets the direction to zero there.
    pub padding: &'a [Range<usize>],
}

impl Domain<'_> {
    /// A vector of `len` weights, one group, no padding.
    pub fn of_len(len: usize) -> Self {
        Self { len, groups: 1, padding: &[] }
    }
}

/// Passes through an objective, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Passes {
    /// Losses with their gradients.
    pub gradients: u64,
    /// Products with the Hessian, each of the cost of 8/3 gradients.
    pub products: u64,
}

/// What an optimizer or a measurement asks of an [`Objective`]. All vectors are as long as the weights and laid out
/// alike, and lie on the device of the weights.
///
/// The `flag` of a pass is one element. The objective sets it to 1 where the loss or any element of a result is not
/// finite, and otherwise leaves it as it is.
pub enum Pass<'a, T: Scalar> {
    /// Writes the mean loss at `weights` to `loss` (one element) and its gradient to `gradient`.
    Gradient {
        /// Where.
        weights: Slice<'a, T>,
        /// What happens to batch norm's running statistics.
        running_stats: RunningStats,
        /// Result.
        gradient: SliceMut<'a, T>,
        /// Result: one element.
        loss: SliceMut<'a, f64>,
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// Writes the mean loss at `weights` to `loss` (one element) and sets `flag` if it is not finite. The running
    /// statistics stay as they are. Splits into a gradient, which goes to `scratch`.
    Loss {
        /// Where.
        weights: Slice<'a, T>,
        /// Room for a gradient. Its contents are undefined afterwards.
        scratch: SliceMut<'a, T>,
        /// Result: one element.
        loss: SliceMut<'a, f64>,
        /// Set where the loss is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// Loss and gradient, and the gradient's L2 norm in `norm` (one element). Padding counts as zero. Splits into a
    /// gradient and one more pass over it.
    GradientAndNorm {
        /// Where.
        weights: Slice<'a, T>,
        /// What happens to batch norm's running statistics.
        running_stats: RunningStats,
        /// Result.
        gradient: SliceMut<'a, T>,
        /// Result: one element.
        loss: SliceMut<'a, f64>,
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
        /// Scratch memory of the norm.
        reduction: &'a mut Reduction,
        /// Result: one element.
        norm: SliceMut<'a, f64>,
    },
    /// A gradient, and its norm if one is asked for. Tensors of it may stay where the objective has computed them: it
    /// lists them in `scattered`, which comes empty, and `gradient` receives the others. They stay there until the
    /// caller drops the list. Splits into a gradient that lies in `gradient` as a whole.
    ScatteredGradient {
        /// Where.
        weights: Slice<'a, T>,
        /// What happens to batch norm's running statistics.
        running_stats: RunningStats,
        /// Result.
        gradient: SliceMut<'a, T>,
        /// Result.
        scattered: &'a mut Scattered<T>,
        /// Result: one element.
        loss: SliceMut<'a, f64>,
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
        /// Scratch memory of the norm, and the result: one element.
        norm: Option<(&'a mut Reduction, SliceMut<'a, f64>)>,
    },
    /// Loss and gradient at two points that do not depend on each other. The running statistics stay as they are.
    /// Splits into one after the other; an objective that can computes both at the same time.
    GradientPair {
        /// The points.
        weights: [Slice<'a, T>; 2],
        /// Results.
        gradients: [SliceMut<'a, T>; 2],
        /// Results: one element each.
        losses: [SliceMut<'a, f64>; 2],
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// Loss and gradient at one point, and at another one on the mini-batch that was [kept](Pass::KeepBatch) in the
    /// step before. The two do not depend on each other. The running statistics follow the first. Splits into one after
    /// the other, both on the same mini-batch, which is what they are for an objective without batches; an objective
    /// with batches of its own answers it.
    GradientAcross {
        /// The points: on the mini-batch of this step, and on that of the step before.
        weights: [Slice<'a, T>; 2],
        /// Results.
        gradients: [SliceMut<'a, T>; 2],
        /// Results: one element each.
        losses: [SliceMut<'a, f64>; 2],
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// The mini-batch of this step is the one before in the steps that follow, unless `skip` is set: then that stays
    /// the one of an earlier step. The first one is always kept. Splits into nothing.
    KeepBatch {
        /// One element: whether the step was skipped.
        skip: Slice<'a, u32>,
    },
    /// Loss and gradient at displaced weights, `from + ρ …`. The running statistics stay as they are. Splits into a
    /// kernel that writes the displaced weights to `point`, and a gradient there. An objective that rounds weights
    /// before it uses them can round them as they are displaced; then the contents of `point` are undefined.
    GradientDisplaced {
        /// The displaced weights.
        displacement: Displacement<'a, T>,
        /// Room for them.
        point: SliceMut<'a, T>,
        /// Result.
        gradient: SliceMut<'a, T>,
        /// Result: one element.
        loss: SliceMut<'a, f64>,
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// Losses and gradients at `from + ρ …` and `from − ρ …`, likewise.
    GradientPairDisplaced {
        /// The displaced weights.
        displacement: Displacement<'a, T>,
        /// Room for them.
        points: [SliceMut<'a, T>; 2],
        /// Results.
        gradients: [SliceMut<'a, T>; 2],
        /// Results: one element each.
        losses: [SliceMut<'a, f64>; 2],
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// Writes the exact product of the Hessian at `weights` with `direction` to `product`. The running statistics stay
    /// as they are. An objective without one answers with [`Error::Argument`], as [`Pass::split`] does.
    HessianVector {
        /// Where.
        weights: Slice<'a, T>,
        /// The direction.
        direction: Slice<'a, T>,
        /// Result.
        product: SliceMut<'a, T>,
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// Two such products at the same weights. Splits into two products, one after the other, with the same bits.
    HessianVectorPair {
        /// Where.
        weights: Slice<'a, T>,
        /// The directions.
        directions: [Slice<'a, T>; 2],
        /// Results.
        products: [SliceMut<'a, T>; 2],
        /// Set where something is not finite.
        flag: SliceMut<'a, u32>,
    },
    /// Writes the realised step from `from` to `to` to `out`. An objective that rounds weights before it uses them
    /// takes the difference of the rounded weights. Splits into the plain difference. For telemetry.
    RealizedStep {
        /// The first point.
        from: Slice<'a, T>,
        /// The second point.
        to: Slice<'a, T>,
        /// Result.
        out: SliceMut<'a, T>,
    },
    /// The passes that follow see this group of the mini-batch. Splits into nothing.
    Select {
        /// From 0 to [`Domain::groups`].
        group: usize,
    },
    /// Ends a step: makes the statistics of the passes with [`RunningStats::Update`] permanent, unless `skip` is set.
    /// Splits into nothing.
    Commit {
        /// One element: whether the step was skipped.
        skip: Slice<'a, u32>,
    },
    /// Ends a step that failed with an error: discards what its passes held for [`Pass::Commit`]. It does not fail.
    /// Splits into nothing.
    Abandon,
}

impl<T: Scalar> Pass<'_, T> {
    /// Takes a pass apart into simpler ones and has `objective` answer those. This serves an objective that does no
    /// better; the description of each variant says what it splits into.
    ///
    /// # Errors
    /// [`Error::Argument`] for a gradient and for a product with the Hessian, which do not split; those of the simpler
    /// passes.
    pub fn split(self, objective: &mut dyn Objective<T>) -> Result<()> {
        match self {
            Pass::Gradient { .. } => unsupported("gradient"),
            Pass::HessianVector { .. } => unsupported("exact product with its Hessian"),
            Pass::Loss { weights, scratch, loss, flag } => {
                objective.gradient(weights, RunningStats::Keep, scratch, loss, flag)
            }
            Pass::GradientAndNorm { weights, running_stats, mut gradient, loss, flag, reduction, norm } => {
                objective.gradient(weights, running_stats, gradient.reborrow(), loss, flag)?;
                vector::l2_norm(gradient.view(), reduction, norm)
            }
            Pass::ScatteredGradient { weights, running_stats, gradient, loss, flag, norm, .. } => match norm {
                None => objective.gradient(weights, running_stats, gradient, loss, flag),
                Some((reduction, norm)) => {
                    objective.gradient_and_norm(weights, running_stats, gradient, loss, flag, reduction, norm)
                }
            },
            Pass::GradientPair { weights, gradients, losses, mut flag } => {
                for ((weights, gradient), loss) in weights.into_iter().zip(gradients).zip(losses) {
                    objective.gradient(weights, RunningStats::Keep, gradient, loss, flag.reborrow())?;
                }
                Ok(())
            }
            Pass::GradientAcross { weights, gradients, losses, mut flag } => {
                let passes = weights.into_iter().zip(gradients).zip(losses);
                for (((weights, gradient), loss), stats) in passes.zip([RunningStats::Update, RunningStats::Keep]) {
                    objective.gradient(weights, stats, gradient, loss, flag.reborrow())?;
                }
                Ok(())
            }
            Pass::GradientDisplaced { displacement, mut point, gradient, loss, flag } => {
                let Displacement { from, along, norm, rho } = displacement;
                vector::perturb(from, along, norm, rho, point.reborrow(), None)?;
                objective.gradient(point.view(), RunningStats::Keep, gradient, loss, flag)
            }
            Pass::GradientPairDisplaced { displacement, points: [mut plus, mut minus], gradients, losses, flag } => {
                let Displacement { from, along, norm, rho } = displacement;
                vector::perturb(from, along, norm, rho, plus.reborrow(), Some(minus.reborrow()))?;
                objective.gradient_pair([plus.view(), minus.view()], gradients, losses, flag)
            }
            Pass::HessianVectorPair { weights, directions, products, mut flag } => {
                for (direction, product) in directions.into_iter().zip(products) {
                    objective.hessian_vector(weights, direction, product, flag.reborrow())?;
                }
                Ok(())
            }
            Pass::RealizedStep { from, to, out } => difference(from, to, out),
            Pass::KeepBatch { .. } | Pass::Select { .. } | Pass::Commit { .. } | Pass::Abandon => Ok(()),
        }
    }
}

fn unsupported(what: &str) -> Result<()> {
    Err(Error::Argument { operation: "Objective::pass", message: format!("this objective has no {what}") })
}

/// A loss over a flat vector of weights.
///
/// Every pass of one optimizer step sees the same mini-batch: the caller changes the batch between steps only. One pass
/// also sees that of the step before, [`Pass::GradientAcross`].
///
/// [`ObjectiveExt`] has a shorthand for each pass. An objective around another one implements [`Wrapper`] instead.
pub trait Objective<T: Scalar> {
    /// The vector that it is a function of.
    fn domain(&self) -> Domain<'_>;

    /// Answers a pass. What the objective does not do itself goes to [`Pass::split`].
    ///
    /// # Errors
    /// Those of the device; [`Error::Argument`] for a pass that the objective does not have.
    fn pass(&mut self, pass: Pass<'_, T>) -> Result<()>;
}

/// What a [`Wrapper`] does with a pass.
pub enum Answer<'a, T: Scalar> {
    /// It has answered the pass.
    Done,
    /// The wrapped objective answers the pass as it is.
    Forward(Pass<'a, T>),
    /// The pass is [split](Pass::split), and the wrapper sees the simpler ones.
    Split(Pass<'a, T>),
}

/// Changes some passes of another objective. [`Wrapped`] makes an objective of it.
///
/// A wrapper decides for every pass, so a fast path of the wrapped objective is lost only by an explicit
/// [`Answer::Split`].
pub trait Wrapper<T: Scalar> {
    /// The wrapped objective.
    fn inner(&self) -> &dyn Objective<T>;

    /// The wrapped objective, for the passes that are forwarded.
    fn inner_mut(&mut self) -> &mut dyn Objective<T>;

    /// Number of groups that the mini-batch can be taken in; see [`Domain::groups`].
    fn groups(&self) -> usize {
        self.inner().domain().groups
    }

    /// Answers a pass, or says what happens to it.
    ///
    /// # Errors
    /// Those of a pass that it answers.
    fn answer<'p>(&mut self, pass: Pass<'p, T>) -> Result<Answer<'p, T>>;
}

/// A [`Wrapper`] as an objective.
pub struct Wrapped<W>(pub W);

impl<T: Scalar, W: Wrapper<T>> Objective<T> for Wrapped<W> {
    fn domain(&self) -> Domain<'_> {
        Domain { groups: self.0.groups(), ..self.0.inner().domain() }
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> Result<()> {
        match self.0.answer(pass)? {
            Answer::Done => Ok(()),
            Answer::Forward(pass) => self.0.inner_mut().pass(pass),
            Answer::Split(pass) => pass.split(self),
        }
    }
}

/// A shorthand for each pass of an [`Objective`].
pub trait ObjectiveExt<T: Scalar>: Objective<T> {
    /// Number of elements of the vector.
    fn len(&self) -> usize {
        self.domain().len
    }

    /// Whether the vector has no element.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// [`Pass::Gradient`].
    ///
    /// # Errors
    /// Those of the objective.
    fn gradient(
        &mut self,
        weights: Slice<'_, T>,
        running_stats: RunningStats,
        gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.pass(Pass::Gradient { weights, running_stats, gradient, loss, flag })
    }

    /// [`Pass::Loss`].
    ///
    /// # Errors
    /// Those of the objective.
    fn loss(
        &mut self,
        weights: Slice<'_, T>,
        scratch: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.pass(Pass::Loss { weights, scratch, loss, flag })
    }

    /// [`Pass::GradientAndNorm`].
    ///
    /// # Errors
    /// Those of the objective.
    fn gradient_and_norm(
        &mut self,
        weights: Slice<'_, T>,
        running_stats: RunningStats,
        gradient: SliceMut<'_, T>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
        reduction: &mut Reduction,
        norm: SliceMut<'_, f64>,
    ) -> Result<()> {
        self.pass(Pass::GradientAndNorm { weights, running_stats, gradient, loss, flag, reduction, norm })
    }

    /// [`Pass::GradientPair`].
    ///
    /// # Errors
    /// Those of the objective.
    fn gradient_pair(
        &mut self,
        weights: [Slice<'_, T>; 2],
        gradients: [SliceMut<'_, T>; 2],
        losses: [SliceMut<'_, f64>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.pass(Pass::GradientPair { weights, gradients, losses, flag })
    }

    /// [`Pass::HessianVector`].
    ///
    /// # Errors
    /// Those of the objective.
    fn hessian_vector(
        &mut self,
        weights: Slice<'_, T>,
        direction: Slice<'_, T>,
        product: SliceMut<'_, T>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.pass(Pass::HessianVector { weights, direction, product, flag })
    }

    /// [`Pass::HessianVectorPair`].
    ///
    /// # Errors
    /// Those of the objective.
    fn hessian_vector_pair(
        &mut self,
        weights: Slice<'_, T>,
        directions: [Slice<'_, T>; 2],
        products: [SliceMut<'_, T>; 2],
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.pass(Pass::HessianVectorPair { weights, directions, products, flag })
    }

    /// [`Pass::Select`].
    ///
    /// # Errors
    /// Those of the objective.
    fn select(&mut self, group: usize) -> Result<()> {
        self.pass(Pass::Select { group })
    }

    /// [`Pass::Commit`].
    ///
    /// # Errors
    /// Those of the objective.
    fn commit(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        self.pass(Pass::Commit { skip })
    }
}

impl<T: Scalar, O: Objective<T> + ?Sized> ObjectiveExt<T> for O {}

/// `out = to − from`
pub(crate) fn difference<T: Scalar>(from: Slice<'_, T>, to: Slice<'_, T>, mut out: SliceMut<'_, T>) -> Result<()> {
    out.copy_from(to)?;
    vector::axpy(-1.0, from, out)
}
