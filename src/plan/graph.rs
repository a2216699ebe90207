//! Tracing: a model calls the methods of a [`Graph`] once, which makes a list of operations with known shapes. The
//! method of each operation is in its file in `ops/`.

use std::ops::Range;

use super::error::PlanError;
use super::ops::{Op, Operation};
use crate::arena::{Initial, Layout, TensorKind};
use crate::kernels::scale_samples::FactorLaw;

/// The shape of an activation, stored NHWC. A matrix `[batch, features]` has height and width 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Samples.
    pub batch: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Columns of pixels.
    pub width: usize,
    /// Channels.
    pub channels: usize,
}

impl Shape {
    /// Number of elements.
    pub fn len(self) -> usize {
        self.batch * self.height * self.width * self.channels
    }

    /// Whether it has no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Samples times pixels: the rows of a batch norm.
    pub(crate) fn rows(self) -> usize {
        self.batch * self.height * self.width
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}x{}x{}", self.batch, self.height, self.width, self.channels)
    }
}

/// An activation of the traced network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Value(pub(super) usize);

/// A parameter, by its index in the graph's list.
pub(super) type Parameter = usize;

/// Where a parameter lies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    pub name: String,
    /// In the arena of weights; a frozen one in that of the statistics.
    pub range: Range<usize>,
    pub frozen: bool,
}

/// What an operation of a traced network reads and writes in a forward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationSummary {
    /// What it is, such as `Convolution` or `BatchNorm`.
    pub name: &'static str,
    /// The activations that it reads. A batch norm's second one is the residual.
    pub inputs: Vec<Value>,
    /// The activation that it writes.
    pub output: Value,
    /// Elements of its parameters.
    pub parameters: usize,
    /// Multiplications with an addition each, of the operations that consist of them.
    pub multiply_adds: u64,
}

/// A network that is traced for one batch shape. Methods take activations and names, check shapes, and return
/// activations.
///
/// ```
/// # fn main() -> Result<(), polder::plan::PlanError> {
/// use polder::plan::{Graph, Shape};
/// let mut graph = Graph::new(Shape { batch: 8, height: 5, width: 6, channels: 3 });
/// let x = graph.input();
/// let x = graph.convolution(x, "conv.weight", 16, 3, 1, 1)?;
/// let x = graph.batch_norm(x, "bn", None, true)?;
/// let x = graph.global_average_pool(x)?;
/// let logits = graph.linear(x, "fc", 10)?;
/// assert_eq!(graph.shape(logits), Shape { batch: 8, height: 1, width: 1, channels: 10 });
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Graph {
    pub(super) shapes: Vec<Shape>,
    pub(super) ops: Vec<Op>,
    /// By operation that multiplies samples by factors.
    pub(super) factors: Vec<FactorLaw>,
    parameters: Vec<(String, TensorKind, Initial)>,
    /// By parameter.
    frozen: Vec<bool>,
    statistics: Vec<(String, TensorKind, Initial)>,
}

impl Graph {
    /// A network whose input is one batch of that shape.
    pub fn new(input: Shape) -> Self {
        Self {
            shapes: vec![input],
            ops: Vec::new(),
            factors: Vec::new(),
            parameters: Vec::new(),
            frozen: Vec::new(),
            statistics: Vec::new(),
        }
    }

    /// The input.
    pub fn input(&self) -> Value {
        Value(0)
    }

    /// The shape of an activation.
    pub fn shape(&self, value: Value) -> Shape {
        self.shapes[value.0]
    }

    /// Whether it has branches with [stochastic depth](Self::drop_path) or [ShakeDrop](Self::shake_drop), whose factors
    /// are drawn for each mini-batch.
    pub fn has_random_factors(&self) -> bool {
        !self.factors.is_empty()
    }

    /// Where each parameter that is not frozen lies in the arenas of weights and gradients.
    pub fn parameters(&self) -> Layout {
        Layout::new(self.parameters_where(false).cloned().collect())
    }

    /// Where each running statistic and each frozen parameter lies in the arena of statistics.
    pub fn statistics(&self) -> Layout {
        Layout::new(self.statistics.iter().chain(self.parameters_where(true)).cloned().collect())
    }

    fn parameters_where(&self, frozen: bool) -> impl Iterator<Item = &(String, TensorKind, Initial)> {
        self.parameters.iter().zip(&self.frozen).filter(move |(_, is)| **is == frozen).map(|(parameter, _)| parameter)
    }

    /// Freezes those of the parameters that are there so far which `choose` names. They are no weights any more: they
    /// lie behind the running statistics and never change, and a backward pass ends where only they lie before it.
    /// [`Plan::set_statistics`](super::Plan::set_statistics) gives them their values.
    pub fn freeze(&mut self, choose: impl Fn(&str) -> bool) {
        for ((name, ..), frozen) in self.parameters.iter().zip(&mut self.frozen) {
            *frozen |= choose(name);
        }
    }

    /// The place of each parameter.
    pub(super) fn places(&self) -> Vec<Place> {
        let (weights, others) = (self.parameters(), self.statistics());
        let mut weights = weights.tensors().iter();
        let mut others = others.tensors()[self.statistics.len()..].iter();
        let place = |&frozen: &bool| {
            let tensor = if frozen { others.next() } else { weights.next() }?;
            Some(Place { name: tensor.name.clone(), range: tensor.range(), frozen })
        };
        self.frozen.iter().filter_map(place).collect()
    }

    /// Changes how the parameters that are there so far start. `choose` names a tensor's distribution, or none to leave
    /// it as its operation has it.
    pub fn initialize(&mut self, choose: impl Fn(&str, TensorKind) -> Option<Initial>) {
        for (name, kind, initial) in &mut self.parameters {
            *initial = choose(name, *kind).unwrap_or(*initial);
        }
    }

    /// What each operation reads and writes in a forward pass, in order.
    pub fn operations(&self) -> Vec<OperationSummary> {
        let summary = |op: &Op| OperationSummary {
            name: op.name(),
            inputs: op.inputs().into_iter().flatten().collect(),
            output: op.output(),
            parameters: op.parameters().into_iter().flatten().map(|index| self.parameters[index].1.len()).sum(),
            multiply_adds: op.multiply_adds(),
        };
        self.ops.iter().map(summary).collect()
    }

    /// Multiplications with an addition each in the convolutions and linear layers of one forward pass over the batch.
    pub fn multiply_adds(&self) -> u64 {
        self.ops.iter().map(Operation::multiply_adds).sum()
    }

    /// A new activation, for the output of an operation.
    pub(super) fn value(&mut self, shape: Shape) -> Value {
        self.shapes.push(shape);
        Value(self.shapes.len() - 1)
    }

    /// A new parameter.
    pub(super) fn parameter(
        &mut self,
        name: String,
        kind: TensorKind,
        initial: Initial,
    ) -> Result<Parameter, PlanError> {
        if self.parameters.iter().any(|(taken, ..)| *taken == name) {
            return Err(PlanError::DuplicateParameter { name });
        }
        self.parameters.push((name, kind, initial));
        self.frozen.push(false);
        Ok(self.parameters.len() - 1)
    }

    /// A new running statistic; its index in their layout.
    pub(super) fn statistic(&mut self, name: String, kind: TensorKind, initial: Initial) -> usize {
        self.statistics.push((name, kind, initial));
        self.statistics.len() - 1
    }

    /// The next operation.
    pub(super) fn push(&mut self, operation: impl Into<Op>) {
        self.ops.push(operation.into());
    }

    /// Fails unless both activations have one shape.
    pub(super) fn same_shape(&self, operation: &str, a: Value, b: Value) -> Result<(), PlanError> {
        let (first, second) = (self.shape(a), self.shape(b));
        if first == second {
            return Ok(());
        }
        Err(PlanError::Shape { operation: operation.into(), reason: format!("{first} and {second} cannot be added") })
    }
}
