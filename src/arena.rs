//! One contiguous vector per role: the place of each named tensor of a model in it, and its order in files.
//!
//! Weights, gradients, momenta and perturbed copies of a model all share one [`Layout`], so that an optimizer is a few
//! kernels over one long vector. Tensors begin at multiples of [`ALIGNMENT`] elements. The padding between them is zero
//! in weights, gradients and all that an optimizer computes from both, because every vector kernel maps zeros to zeros.
//! Only random perturbations fill it, and no operation reads it there.

use std::ops::Range;

/// Every tensor begins at a multiple of so many elements: 256 bytes of f32, which suits a GPU's wide loads.
pub const ALIGNMENT: usize = 64;

/// What a tensor is, which fixes how it is stored and whether weight decay acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorKind {
    /// A convolution's weight: `[kh][kw][in][out]` here, `[out][in][kh][kw]` in files.
    Convolution {
        /// Height and width of the kernel.
        kernel: usize,
        /// Input channels.
        inputs: usize,
        /// Output channels.
        outputs: usize,
    },
    /// A linear layer's weight: `[in][out]` here, `[out][in]` in files.
    Linear {
        /// Input features.
        inputs: usize,
        /// Output features.
        outputs: usize,
    },
    /// The weight of a linear layer over every token or pixel, which convolutions compute: `[in][out]` here,
    /// `[out][in]` in files.
    Projection {
        /// Input channels.
        inputs: usize,
        /// Output channels.
        outputs: usize,
    },
    /// A bias of this many features.
    Bias(usize),
    /// Numbers that are added to tokens: `[1, tokens, channels]` in files.
    Tokens {
        /// Tokens.
        tokens: usize,
        /// Numbers of a token.
        channels: usize,
    },
    /// The scale γ of batch norm or layer norm.
    Scale(usize),
    /// The shift β of batch norm or layer norm.
    Shift(usize),
    /// Batch norm's running mean, a statistic.
    RunningMean(usize),
    /// Batch norm's running variance, a statistic.
    RunningVar(usize),
}

impl TensorKind {
    /// Number of elements.
    pub fn len(self) -> usize {
        match self {
            TensorKind::Convolution { kernel, inputs, outputs } => kernel * kernel * inputs * outputs,
            TensorKind::Linear { inputs, outputs } | TensorKind::Projection { inputs, outputs } => inputs * outputs,
            TensorKind::Tokens { tokens, channels } => tokens * channels,
            TensorKind::Bias(n)
            | TensorKind::Scale(n)
            | TensorKind::Shift(n)
            | TensorKind::RunningMean(n)
            | TensorKind::RunningVar(n) => n,
        }
    }

    /// Whether it has no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Whether weight decay acts on it even where biases and normalisation are exempt.
    pub fn is_weight(self) -> bool {
        self.part() == 0
    }

    /// Whether it is a running statistic and no parameter.
    #[cfg(feature = "train")]
    pub(crate) fn is_statistic(self) -> bool {
        matches!(self, TensorKind::RunningMean(_) | TensorKind::RunningVar(_))
    }

    /// Its place in the order of an arena: 0 for weights, 1 for the parameters of normalisation, 2 for all others.
    fn part(self) -> usize {
        match self {
            TensorKind::Convolution { .. } | TensorKind::Linear { .. } | TensorKind::Projection { .. } => 0,
            TensorKind::Scale(_) | TensorKind::Shift(_) => 1,
            TensorKind::Bias(_)
            | TensorKind::Tokens { .. }
            | TensorKind::RunningMean(_)
            | TensorKind::RunningVar(_) => 2,
        }
    }

    /// Output channels of a convolution or features of a linear layer, the last dimension of the stored weight. Other
    /// tensors have none.
    pub(crate) fn outputs(self) -> Option<usize> {
        match self {
            TensorKind::Convolution { outputs, .. }
            | TensorKind::Linear { outputs, .. }
            | TensorKind::Projection { outputs, .. } => Some(outputs),
            _ => None,
        }
    }

    /// The shape in files, as torchvision has it.
    pub fn file_shape(self) -> Vec<usize> {
        match self {
            TensorKind::Convolution { kernel, inputs, outputs } => vec![outputs, inputs, kernel, kernel],
            TensorKind::Linear { inputs, outputs } | TensorKind::Projection { inputs, outputs } => {
                vec![outputs, inputs]
            }
            TensorKind::Tokens { tokens, channels } => vec![1, tokens, channels],
            other => vec![other.len()],
        }
    }

    /// Where element `index` of the file's order lies in the stored order.
    fn stored_index(self, index: usize) -> usize {
        match self {
            TensorKind::Convolution { kernel, inputs, outputs } => {
                let (taps, tap) = (kernel * kernel, index % (kernel * kernel));
                let (input, output) = (index / taps % inputs, index / taps / inputs);
                (tap * inputs + input) * outputs + output
            }
            TensorKind::Linear { inputs, outputs } | TensorKind::Projection { inputs, outputs } => {
                index % inputs * outputs + index / inputs
            }
            _ => index,
        }
    }

    /// A tensor in the file's order from the stored one.
    pub fn to_file<T: Copy>(self, stored: &[T]) -> Vec<T> {
        (0..stored.len()).map(|index| stored[self.stored_index(index)]).collect()
    }

    /// A tensor in the stored order from the file's. `file` must have [`TensorKind::len`] elements.
    pub fn from_file<T: Copy + Default>(self, file: &[T]) -> Vec<T> {
        let mut stored = vec![T::default(); file.len()];
        for (index, &value) in file.iter().enumerate() {
            stored[self.stored_index(index)] = value;
        }
        stored
    }
}

/// The distribution of a tensor's elements before training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Initial {
    /// Normal with mean 0 and variance `2/fan` (He et al. 2015, equations 10 and 14).
    HeNormal {
        /// Kernel height · kernel width · input channels, or the same with output channels.
        fan: usize,
    },
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// Uniform within `±1/√fan_in`, as PyTorch starts linear layers and their biases.
    Uniform {
        /// Inputs of one output.
        fan_in: usize,
    },
    /// Every element has this value.
    Constant(f32),
}

/// A named tensor and its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// The name in files, such as `layer1.0.conv1.weight`.
    pub name: String,
    /// What it is.
    pub kind: TensorKind,
    /// Its elements before training.
    pub initial: Initial,
    /// Its first element in the arena.
    pub offset: usize,
}

impl Tensor {
    /// Its elements in the arena.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.kind.len()
    }
}

/// A matrix in a vector of weights, stored row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    /// Its first element.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
}

impl Matrix {
    /// Its elements in the vector.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.columns
    }
}

/// The tensors of a model and their places.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Layout {
    tensors: Vec<Tensor>,
    len: usize,
    weights_len: usize,
    normalisation_end: usize,
    padding: Vec<Range<usize>>,
}

impl Layout {
    /// Places tensors: weights first, then normalisation, then biases and all others. So weight decay with exemptions
    /// acts on a prefix, and the parameters of normalisation lie in one piece. The tensors keep the order given, which
    /// is the one in files; only their offsets are sorted.
    pub fn new(named: Vec<(String, TensorKind, Initial)>) -> Self {
        let tensor = |(name, kind, initial)| Tensor { name, kind, initial, offset: 0 };
        let mut layout = Self { tensors: named.into_iter().map(tensor).collect(), ..Self::default() };
        let mut ends = [0; 3];
        for (part, end) in ends.iter_mut().enumerate() {
            for tensor in layout.tensors.iter_mut().filter(|tensor| tensor.kind.part() == part) {
                tensor.offset = layout.len;
                layout.len += tensor.kind.len().next_multiple_of(ALIGNMENT);
            }
            *end = layout.len;
        }
        [layout.weights_len, layout.normalisation_end, _] = ends;
        let mut tensors: Vec<Range<usize>> = layout.tensors.iter().map(Tensor::range).collect();
        tensors.sort_by_key(|range| range.start);
        let ends = tensors.iter().skip(1).map(|range| range.start).chain([layout.len]);
        layout.padding =
            tensors.iter().zip(ends).map(|(tensor, end)| tensor.end..end).filter(|gap| !gap.is_empty()).collect();
        layout
    }

    /// Elements of the arena, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The arena's prefix that holds convolution and linear weights.
    pub fn weights_len(&self) -> usize {
        self.weights_len
    }

    /// Where the parameters of normalisation lie, γ and β. Empty if there are none.
    pub fn normalisation(&self) -> Range<usize> {
        self.weights_len..self.normalisation_end
    }

    /// Elements without the padding: the number of parameters.
    pub fn parameters(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.kind.len()).sum()
    }

    /// The tensors in the order of files.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The last linear layer's weight: the classifier.
    pub fn classifier(&self) -> Option<&Tensor> {
        self.tensors.iter().rev().find(|tensor| matches!(tensor.kind, TensorKind::Linear { .. }))
    }

    /// The matrices between the activations: the weights of convolutions, with a column for each output channel, and of
    /// linear layers, but for the [classifier](Layout::classifier). In the order of their places.
    pub fn hidden_matrices(&self) -> Vec<Matrix> {
        let classifier = self.classifier().map(|tensor| tensor.offset);
        let hidden = self.tensors.iter().filter(|tensor| Some(tensor.offset) != classifier);
        let matrix = |tensor: &Tensor| {
            let columns = tensor.kind.outputs()?;
            Some(Matrix { offset: tensor.offset, rows: tensor.kind.len() / columns, columns })
        };
        let mut matrices: Vec<Matrix> = hidden.filter_map(matrix).collect();
        matrices.sort_by_key(|matrix| matrix.offset);
        matrices
    }

    /// The gaps between the tensors, and behind the last.
    pub fn padding(&self) -> &[Range<usize>] {
        &self.padding
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_come_first_and_every_tensor_is_aligned() {
        let initial = Initial::Constant(0.0);
        let layout = Layout::new(vec![
            ("conv.weight".into(), TensorKind::Convolution { kernel: 3, inputs: 3, outputs: 5 }, initial),
            ("bn.weight".into(), TensorKind::Scale(5), initial),
            ("fc.weight".into(), TensorKind::Linear { inputs: 5, outputs: 7 }, initial),
        ]);
        let offsets: Vec<usize> = layout.tensors().iter().map(|tensor| tensor.offset).collect();
        assert_eq!(offsets, [0, 256, 192]);
        assert_eq!((layout.len(), layout.weights_len(), layout.parameters()), (320, 256, 135 + 5 + 35));
        assert_eq!(layout.padding(), [135..192, 227..256, 261..320]);
    }

    #[test]
    fn hidden_matrices_are_all_weights_but_the_last_linear_layer() {
        let initial = Initial::Constant(0.0);
        let layout = Layout::new(vec![
            ("conv.weight".into(), TensorKind::Convolution { kernel: 3, inputs: 3, outputs: 5 }, initial),
            ("conv.bias".into(), TensorKind::Bias(5), initial),
            ("fc1.weight".into(), TensorKind::Linear { inputs: 5, outputs: 7 }, initial),
            ("fc2.weight".into(), TensorKind::Linear { inputs: 7, outputs: 2 }, initial),
        ]);
        let matrices = [(0, 27, 5), (192, 5, 7)].map(|(offset, rows, columns)| Matrix { offset, rows, columns });
        assert_eq!(layout.hidden_matrices(), matrices);
        assert_eq!(layout.hidden_matrices()[0].range(), 0..135);
        assert_eq!(Layout::default().hidden_matrices(), []);
    }

    #[test]
    fn normalisation_lies_in_one_piece_between_weights_and_biases() {
        let initial = Initial::Constant(0.0);
        let layout = Layout::new(vec![
            ("fc1.weight".into(), TensorKind::Linear { inputs: 5, outputs: 7 }, initial),
            ("fc1.bias".into(), TensorKind::Bias(7), initial),
            ("bn.weight".into(), TensorKind::Scale(7), initial),
            ("bn.bias".into(), TensorKind::Shift(7), initial),
        ]);
        let offsets: Vec<usize> = layout.tensors().iter().map(|tensor| tensor.offset).collect();
        assert_eq!(offsets, [0, 192, 64, 128]);
        assert_eq!((layout.weights_len(), layout.normalisation(), layout.len()), (64, 64..192, 256));
        let without = Layout::new(vec![("running_mean".into(), TensorKind::RunningMean(7), initial)]);
        assert!(without.normalisation().is_empty());
    }

    #[test]
    fn a_file_order_becomes_the_stored_order_and_back() {
        let kind = TensorKind::Convolution { kernel: 2, inputs: 3, outputs: 5 };
        let file: Vec<usize> = (0..kind.len()).collect();
        let stored = kind.from_file(&file);
        // Element [o][i][h][w] of the file is element [h][w][i][o] here.
        let (o, i, h, w) = (4, 1, 0, 1);
        assert_eq!(stored[((h * 2 + w) * 3 + i) * 5 + o], file[((o * 3 + i) * 2 + h) * 2 + w]);
        assert_eq!(kind.to_file(&stored), file);
        let kind = TensorKind::Linear { inputs: 3, outputs: 2 };
        assert_eq!(kind.from_file(&[1, 2, 3, 4, 5, 6]), [1, 4, 2, 5, 3, 6]);
        assert_eq!(kind.to_file(&[1, 4, 2, 5, 3, 6]), [1, 2, 3, 4, 5, 6]);
    }
}
