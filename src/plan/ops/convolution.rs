//! The convolution, without bias.
//!
//! On tensor cores it does part of the work of the batch norm after it and of the batch norm before it:
//! [`convolution_batch_norm`](super::convolution_batch_norm) says what and when.

use super::convolution_batch_norm::input_gradient_with_sums;
use super::{ExtraMemory, Operation, Site, WeightGradient};
use crate::arena::{Initial, TensorKind};
use crate::device::{self, Compute, Device, Slice, SliceMut};
use crate::kernels::conv::{self, ConvShape};
use crate::plan::graph::{Graph, Parameter, Place, Shape, Value};
use crate::plan::pass::{BackwardPass, BackwardTangentPass, ForwardPass, ForwardTangentPass};
use crate::plan::{PlanError, PlanOptions};

/// `y = x ∗ w`, with `x` of shape `[N,H,W,C]` and `w` of `[kernel, kernel, C/groups, outputs]`. The weights are read as
/// the storage type.
#[derive(Debug, Clone)]
pub(in crate::plan) struct Convolution {
    pub(super) x: Value,
    pub(super) y: Value,
    pub(super) weight: Parameter,
    pub(super) shape: ConvShape,
}

/// Bytes of a weight gradient's parts that stay in memory until the end of the pass. Larger ones are added up at once.
const LARGEST_KEPT_PARTS: usize = 4 << 20;

impl Graph {
    /// A convolution without bias: `[N,H,W,C]` to `[N,OH,OW,outputs]`, `OH = (H + 2 padding − kernel)/stride + 1`. The
    /// weights start normal with variance `2/(kernel² C)` (He et al. 2015).
    ///
    /// # Errors
    /// [`PlanError::DuplicateParameter`] for a name already taken, [`PlanError::Shape`] for a shape that leaves no
    /// output.
    pub fn convolution(
        &mut self,
        x: Value,
        name: &str,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Value, PlanError> {
        self.grouped_convolution(x, name, outputs, 1, kernel, stride, padding)
    }

    /// A convolution without bias whose channels form `groups`: channels of the output read only the channels of the
    /// input in their group. The weights start normal with variance `2 groups/(kernel² C)`.
    ///
    /// # Errors
    /// As [`Graph::convolution`]; [`PlanError::Shape`] for groups that do not divide both numbers of channels.
    pub fn grouped_convolution(
        &mut self,
        x: Value,
        name: &str,
        outputs: usize,
        groups: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Value, PlanError> {
        let inputs = self.shape(x).channels.checked_div(groups).unwrap_or_default();
        let kind = TensorKind::Convolution { kernel, inputs, outputs };
        let initial = Initial::HeNormal { fan: kernel * kernel * inputs };
        self.convolved(x, name, kind, initial, [groups, kernel, stride, padding])
    }

    /// A linear layer over every pixel or token, without bias: `[N,H,W,C]` to `[N,H,W,outputs]`. Its weight is named
    /// `name` and has the shape `[outputs, C]` in files. It starts uniform within `±1/√C`.
    ///
    /// # Errors
    /// As [`convolution`](Self::convolution).
    pub fn projection(&mut self, x: Value, name: &str, outputs: usize) -> Result<Value, PlanError> {
        let inputs = self.shape(x).channels;
        let kind = TensorKind::Projection { inputs, outputs };
        self.convolved(x, name, kind, Initial::Uniform { fan_in: inputs }, [1, 1, 1, 0])
    }

    /// A convolution with a weight of this kind.
    fn convolved(
        &mut self,
        x: Value,
        name: &str,
        kind: TensorKind,
        initial: Initial,
        [groups, kernel, stride, padding]: [usize; 4],
    ) -> Result<Value, PlanError> {
        let input = self.shape(x);
        let outputs = kind.outputs().unwrap_or_default();
        let shape = ConvShape {
            batch: input.batch,
            height: input.height,
            width: input.width,
            in_channels: input.channels,
            out_channels: outputs,
            kernel,
            stride,
            padding,
            groups,
        };
        shape.check().map_err(|e| PlanError::Shape { operation: name.into(), reason: e.to_string() })?;
        let weight = self.parameter(name.into(), kind, initial)?;
        let (height, width) = (shape.out_height(), shape.out_width());
        let y = self.value(Shape { height, width, channels: outputs, ..input });
        self.push(Convolution { x, y, weight, shape });
        Ok(y)
    }
}

impl Convolution {
    fn weight_gradient_form<S: Compute>(&self, device: &Device, parts_len: usize) -> WeightGradient {
        match (self.shape.weight_gradient_splits::<S>(device), self.shape.finished_squares::<S>(device)) {
            (1, Some(squares)) => WeightGradient::Finished(squares),
            (1, None) => WeightGradient::Complete,
            _ if parts_len * size_of::<S::Master>() <= LARGEST_KEPT_PARTS => WeightGradient::Parts,
            _ => WeightGradient::Summed,
        }
    }

    /// The gradient of the weights. Where a GPU takes the last stage of that gradient in here, so does this function.
    fn weight_gradient<S: Compute>(
        &self,
        pass: &mut BackwardPass<'_, S>,
        dy: Slice<'_, S>,
        mut scratch: SliceMut<'_, S::Master>,
    ) -> device::Result<()> {
        let Some(gradients) = &mut pass.gradients else { return Ok(()) };
        let last_stage = gradients.last_stage.take();
        let Some(dw) = gradients.get(self.weight)? else { return Ok(()) };
        let x = pass.values.read(self.x)?;
        match (pass.values.weight_gradient(), last_stage) {
            (WeightGradient::Finished(_), Some(last_stage)) => {
                conv::finished_weight_gradient(&self.shape, x, dy, dw, last_stage.finish()?)
            }
            (WeightGradient::Summed, Some(last_stage)) => {
                conv::partial_weight_gradients(&self.shape, x, dy, scratch.reborrow())?;
                last_stage.add_up(scratch.view(), gradients)
            }
            (WeightGradient::Parts, Some(_)) => conv::partial_weight_gradients(&self.shape, x, dy, scratch),
            _ => conv::weight_gradient(&self.shape, x, dy, dw, false, scratch),
        }
    }
}

impl Operation for Convolution {
    fn output(&self) -> Value {
        self.y
    }

    fn inputs(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn parameters(&self) -> [Option<Parameter>; 2] {
        [Some(self.weight), None]
    }

    fn saved(&self) -> [Option<Value>; 2] {
        [Some(self.x), None]
    }

    fn memory<S: Compute>(&self, site: &Site<'_>) -> ExtraMemory {
        let len = self.shape.workspace_len::<S>(site.device);
        let weight_gradient = self.weight_gradient_form::<S>(site.device, len);
        let forward = self.shape.products_workspace_len::<S>(site.device);
        ExtraMemory { forward, backward: len, weight_gradient, ..ExtraMemory::default() }
    }

    /// Measures which tiles suit the shape on a GPU's tensor cores.
    fn prepare<S: Compute>(&self, device: &Device, _: &[Place], options: PlanOptions) -> Result<(), PlanError> {
        Ok(self.shape.measure_tiles::<S>(options.backward, device)?)
    }

    fn multiply_adds(&self) -> u64 {
        self.shape.macs()
    }

    fn forward<S: Compute>(&self, mut pass: ForwardPass<'_, S>) -> device::Result<()> {
        let (x, weight) = (pass.values.read(self.x)?, pass.weights.stored(self.weight)?);
        let moments = pass.values.tile_moments_mut(self.y)?;
        let y = pass.values.write(self.y)?;
        match moments {
            Some(moments) => conv::forward_with_moments(&self.shape, x, weight, y, moments),
            None => conv::forward(&self.shape, x, weight, y, false, pass.values.forward_scratch()?),
        }
    }

    fn backward<S: Compute>(&self, mut pass: BackwardPass<'_, S>) -> device::Result<()> {
        let dy = pass.values.gradient(self.y)?;
        let mut scratch = pass.values.backward_scratch()?;
        self.weight_gradient(&mut pass, dy, scratch.reborrow())?;
        let Some((dx, accumulate)) = pass.values.input_gradient(0, self.x)? else { return Ok(()) };
        if let Some(normalized) = pass.values.sums_for() {
            return input_gradient_with_sums(self, normalized, pass, dy, dx, accumulate);
        }
        // Parts of the weight gradient stay in the scratch. Where there are parts, this convolution needs no scratch.
        let parts = pass.values.weight_gradient() == WeightGradient::Parts;
        let scratch = scratch.slice_mut(0..if parts { 0 } else { scratch.len() })?;
        conv::input_gradient(&self.shape, dy, pass.weights.stored(self.weight)?, dx, accumulate, scratch)
    }

    /// A convolution is bilinear. With a dot for a tangent: `ẏ = ẋ ∗ w + x ∗ ẇ`. Where no parameter lies before x, `ẋ =
    /// 0`, and where the weights are frozen `ẇ = 0`. (Of an operation whose output does not move at all there is no
    /// tangent.)
    fn forward_tangent<S: Compute>(&self, mut pass: ForwardTangentPass<'_, S>) -> device::Result<()> {
        let (weight, weight_tangent) = (pass.weights.stored(self.weight)?, pass.direction.stored(self.weight)?);
        let mut scratch = pass.tangents.forward_scratch()?;
        let mut y = pass.tangents.write(self.y)?;
        let moves = pass.values.is_trained(self.x);
        if moves {
            let x = pass.tangents.read(self.x)?;
            conv::forward(&self.shape, x, weight, y.reborrow(), false, scratch.reborrow())?;
        }
        if pass.weights.is_frozen(self.weight) {
            return Ok(());
        }
        conv::forward(&self.shape, pass.values.read(self.x)?, weight_tangent, y, moves, scratch)
    }

    /// With a dot for a tangent, `dẇ` is the weight gradient of `(x, dẏ)` plus that of `(ẋ, dy)`, and `dẋ` the input
    /// gradient of `(dẏ, w)` plus that of `(dy, ẇ)`.
    fn backward_tangent<S: Compute>(&self, mut pass: BackwardTangentPass<'_, S>) -> device::Result<()> {
        let (dy, dy_tangent) = (pass.values.gradient(self.y)?, pass.tangents.gradient(self.y)?);
        let mut scratch = pass.tangents.backward_scratch()?;
        if let Some(mut dw) = pass.product.get(self.weight)? {
            let x = pass.values.read(self.x)?;
            conv::weight_gradient(&self.shape, x, dy_tangent, dw.reborrow(), false, scratch.reborrow())?;
            if pass.values.is_trained(self.x) {
                let x_tangent = pass.tangents.read(self.x)?;
                conv::weight_gradient(&self.shape, x_tangent, dy, dw, true, scratch.reborrow())?;
            }
        }
        let Some((mut dx, accumulate)) = pass.tangents.input_gradient(0, self.x)? else { return Ok(()) };
        let (weight, weight_tangent) = (pass.weights.stored(self.weight)?, pass.direction.stored(self.weight)?);
        let first = dx.reborrow();
        conv::input_gradient(&self.shape, dy_tangent, weight, first, accumulate, scratch.reborrow())?;
        if pass.weights.is_frozen(self.weight) {
            return Ok(());
        }
        conv::input_gradient(&self.shape, dy, weight_tangent, dx, true, scratch)
    }
}
