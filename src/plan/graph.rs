//! Tracing: a model calls these methods once, and what it calls becomes a list of operations with shapes known.

use super::error::PlanError;
use crate::arena::{Kind, Layout};
use crate::kernels::conv::ConvShape;
use crate::kernels::layers::{LinearShape, PoolShape, ShortcutShape};

/// The shape of an activation, stored NHWC; a matrix `[batch, features]` has height and width 1.
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

    /// Whether it holds nothing.
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

/// A tensor of the parameter arena, by its index in the layout.
pub(super) type Parameter = usize;

/// One operation: what it reads, what it writes, its parameters and its shape.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Convolution {
        x: Value,
        y: Value,
        weight: Parameter,
        shape: ConvShape,
    },
    /// `statistics` is the index of the running mean in the statistics' layout; the running variance follows it.
    BatchNorm {
        x: Value,
        y: Value,
        scale: Parameter,
        shift: Parameter,
        statistics: usize,
        residual: Option<Value>,
        relu: bool,
    },
    Relu {
        x: Value,
        y: Value,
    },
    Add {
        a: Value,
        b: Value,
        y: Value,
    },
    AveragePool {
        x: Value,
        y: Value,
        shape: PoolShape,
    },
    GlobalAveragePool {
        x: Value,
        y: Value,
    },
    Shortcut {
        x: Value,
        y: Value,
        shape: ShortcutShape,
    },
    Linear {
        x: Value,
        y: Value,
        weight: Parameter,
        bias: Parameter,
        shape: LinearShape,
    },
}

impl Op {
    /// The activation it makes.
    pub(super) fn output(&self) -> Value {
        match *self {
            Op::Convolution { y, .. }
            | Op::BatchNorm { y, .. }
            | Op::Relu { y, .. }
            | Op::Add { y, .. }
            | Op::AveragePool { y, .. }
            | Op::GlobalAveragePool { y, .. }
            | Op::Shortcut { y, .. }
            | Op::Linear { y, .. } => y,
        }
    }

    /// The activations it reads.
    pub(super) fn inputs(&self) -> [Option<Value>; 2] {
        match *self {
            Op::BatchNorm { x, residual, .. } => [Some(x), residual],
            Op::Add { a, b, .. } => [Some(a), Some(b)],
            Op::Convolution { x, .. }
            | Op::Relu { x, .. }
            | Op::AveragePool { x, .. }
            | Op::GlobalAveragePool { x, .. }
            | Op::Shortcut { x, .. }
            | Op::Linear { x, .. } => [Some(x), None],
        }
    }

    /// The parameters it uses.
    pub(super) fn parameters(&self) -> [Option<Parameter>; 2] {
        match *self {
            Op::Convolution { weight, .. } => [Some(weight), None],
            Op::BatchNorm { scale, shift, .. } => [Some(scale), Some(shift)],
            Op::Linear { weight, bias, .. } => [Some(weight), Some(bias)],
            Op::Relu { .. }
            | Op::Add { .. }
            | Op::AveragePool { .. }
            | Op::GlobalAveragePool { .. }
            | Op::Shortcut { .. } => [None, None],
        }
    }

    /// The activations that its backward reads again: they must live until then.
    pub(super) fn saved(&self) -> [Option<Value>; 2] {
        match *self {
            Op::Convolution { x, .. } | Op::Linear { x, .. } => [Some(x), None],
            // The mask of a ReLU after a residual sum is read off the output; without a residual it is computed again.
            Op::BatchNorm { x, y, residual, relu, .. } => [Some(x), (relu && residual.is_some()).then_some(y)],
            Op::Relu { y, .. } => [Some(y), None],
            Op::Add { .. } | Op::AveragePool { .. } | Op::GlobalAveragePool { .. } | Op::Shortcut { .. } => {
                [None, None]
            }
        }
    }
}

/// A network being traced for one batch shape. Methods take activations and names, check shapes, and return activations.
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
    parameters: Vec<(String, Kind)>,
    statistics: Vec<(String, Kind)>,
}

impl Graph {
    /// A network whose input is one batch of that shape.
    pub fn new(input: Shape) -> Self {
        Self { shapes: vec![input], ops: Vec::new(), parameters: Vec::new(), statistics: Vec::new() }
    }

    /// The input.
    pub fn input(&self) -> Value {
        Value(0)
    }

    /// The shape of an activation.
    pub fn shape(&self, value: Value) -> Shape {
        self.shapes[value.0]
    }

    /// Where each parameter lies in the arenas of weights and gradients.
    pub fn parameters(&self) -> Layout {
        Layout::new(self.parameters.clone())
    }

    /// Where each running statistic lies in the arena of statistics.
    pub fn statistics(&self) -> Layout {
        Layout::new(self.statistics.clone())
    }

    fn value(&mut self, shape: Shape) -> Value {
        self.shapes.push(shape);
        Value(self.shapes.len() - 1)
    }

    fn parameter(&mut self, name: String, kind: Kind) -> Result<Parameter, PlanError> {
        if self.parameters.iter().any(|(taken, _)| *taken == name) {
            return Err(PlanError::DuplicateParameter { name });
        }
        self.parameters.push((name, kind));
        Ok(self.parameters.len() - 1)
    }

    /// A convolution without bias: `[N,H,W,C]` to `[N,OH,OW,outputs]`, `OH = (H + 2 padding − kernel)/stride + 1`.
    ///
    /// # Errors
    /// A name already taken, or a shape that leaves no output.
    pub fn convolution(
        &mut self,
        x: Value,
        name: &str,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Value, PlanError> {
        let input = self.shape(x);
        let shape = ConvShape {
            batch: input.batch,
            height: input.height,
            width: input.width,
            in_channels: input.channels,
            out_channels: outputs,
            kernel,
            stride,
            padding,
        };
        shape.check().map_err(|e| PlanError::Shape { operation: name.into(), reason: e.to_string() })?;
        let weight = self.parameter(name.into(), Kind::Convolution { kernel, inputs: input.channels, outputs })?;
        let (height, width) = (shape.out_height(), shape.out_width());
        let y = self.value(Shape { height, width, channels: outputs, ..input });
        self.ops.push(Op::Convolution { x, y, weight, shape });
        Ok(y)
    }

    /// Batch norm over samples and pixels, then the sum with `residual` if there is one, then a ReLU if asked for: one pass.
    /// Makes `NAME.weight`, `NAME.bias`, `NAME.running_mean` and `NAME.running_var`.
    ///
    /// # Errors
    /// A name already taken, or a residual of another shape.
    pub fn batch_norm(
        &mut self,
        x: Value,
        name: &str,
        residual: Option<Value>,
        relu: bool,
    ) -> Result<Value, PlanError> {
        let shape = self.shape(x);
        if let Some(residual) = residual {
            self.same_shape(name, x, residual)?;
        }
        let scale = self.parameter(format!("{name}.weight"), Kind::Scale(shape.channels))?;
        let shift = self.parameter(format!("{name}.bias"), Kind::Shift(shape.channels))?;
        let statistics = self.statistics.len();
        self.statistics.push((format!("{name}.running_mean"), Kind::RunningMean(shape.channels)));
        self.statistics.push((format!("{name}.running_var"), Kind::RunningVar(shape.channels)));
        let y = self.value(shape);
        self.ops.push(Op::BatchNorm { x, y, scale, shift, statistics, residual, relu });
        Ok(y)
    }

    /// max(x, 0).
    pub fn relu(&mut self, x: Value) -> Value {
        let y = self.value(self.shape(x));
        self.ops.push(Op::Relu { x, y });
        y
    }

    /// a + b.
    ///
    /// # Errors
    /// Two shapes.
    pub fn add(&mut self, a: Value, b: Value) -> Result<Value, PlanError> {
        self.same_shape("add", a, b)?;
        let y = self.value(self.shape(a));
        self.ops.push(Op::Add { a, b, y });
        Ok(y)
    }

    fn same_shape(&self, operation: &str, a: Value, b: Value) -> Result<(), PlanError> {
        let (first, second) = (self.shape(a), self.shape(b));
        if first == second {
            return Ok(());
        }
        Err(PlanError::Shape { operation: operation.into(), reason: format!("{first} and {second} cannot be added") })
    }

    /// The mean of every `kernel`×`kernel` window, without padding.
    ///
    /// # Errors
    /// A window larger than the image, or of size or stride zero.
    pub fn average_pool(&mut self, x: Value, kernel: usize, stride: usize) -> Result<Value, PlanError> {
        let Shape { batch, height, width, channels } = self.shape(x);
        if kernel == 0 || stride == 0 || kernel > height.min(width) {
            let reason = format!("a window of {kernel} with stride {stride} does not fit images of {height}x{width}");
            return Err(PlanError::Shape { operation: "average_pool".into(), reason });
        }
        let shape = PoolShape { batch, height, width, channels, kernel, stride };
        let y = self.value(Shape { height: shape.out_height(), width: shape.out_width(), batch, channels });
        self.ops.push(Op::AveragePool { x, y, shape });
        Ok(y)
    }

    /// The mean over all pixels: `[N,H,W,C]` to `[N,1,1,C]`.
    ///
    /// # Errors
    /// None today; the signature is that of its neighbours.
    pub fn global_average_pool(&mut self, x: Value) -> Result<Value, PlanError> {
        let y = self.value(Shape { height: 1, width: 1, ..self.shape(x) });
        self.ops.push(Op::GlobalAveragePool { x, y });
        Ok(y)
    }

    /// The parameter-free shortcut of He et al. (option A): every `stride`-th pixel, new channels zero, the old ones in the
    /// middle.
    ///
    /// # Errors
    /// Fewer output than input channels, or a stride of zero.
    pub fn shortcut(&mut self, x: Value, channels: usize, stride: usize) -> Result<Value, PlanError> {
        let input = self.shape(x);
        if stride == 0 || channels < input.channels {
            let reason = format!("cannot go from {} to {channels} channels with stride {stride}", input.channels);
            return Err(PlanError::Shape { operation: "shortcut".into(), reason });
        }
        let shape = ShortcutShape {
            batch: input.batch,
            height: input.height,
            width: input.width,
            in_channels: input.channels,
            out_channels: channels,
            stride,
        };
        let y = self.value(Shape { height: shape.out_height(), width: shape.out_width(), channels, ..input });
        self.ops.push(Op::Shortcut { x, y, shape });
        Ok(y)
    }

    /// x·W + b over all features of a sample: `[N,H,W,C]` to `[N,1,1,outputs]`. Makes `NAME.weight` and `NAME.bias`.
    ///
    /// # Errors
    /// A name already taken, or an input with more than one pixel, whose order in the files would not be ours.
    pub fn linear(&mut self, x: Value, name: &str, outputs: usize) -> Result<Value, PlanError> {
        let input = self.shape(x);
        if input.height * input.width != 1 || outputs == 0 {
            let reason = format!("expected one pixel per sample and at least one output, found {input} and {outputs}");
            return Err(PlanError::Shape { operation: name.into(), reason });
        }
        let weight = self.parameter(format!("{name}.weight"), Kind::Linear { inputs: input.channels, outputs })?;
        let bias = self.parameter(format!("{name}.bias"), Kind::Bias(outputs))?;
        let shape = LinearShape { batch: input.batch, inputs: input.channels, outputs };
        let y = self.value(Shape { channels: outputs, ..input });
        self.ops.push(Op::Linear { x, y, weight, bias, shape });
        Ok(y)
    }
}
