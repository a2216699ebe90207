//! With storage in 16 bits, kernels compute in single precision and round once. Every kernel of a network's small
//! layers gives the rounded results of its f32 form for the same numbers, bit for bit. (`tests/kernels/conv.rs` has the
//! convolutions.)

use crate::common::{Random, devices};
use half::{bf16, f16};
use polder::device::{Buffer, Compute, Device, Result};
use polder::kernels::batch_norm::{
    self, Activation, Backward, BackwardTangents, BatchNormShape, Forward, ForwardTangents, Gradients, Mode,
    Normalized, ResidualGradient, RunningUpdate, Saved, Workspace,
};
use polder::kernels::image::{self, Augment, BatchShape, Normalization, Position};
use polder::kernels::layers::{self, LinearShape, PoolShape, ShortcutShape};

/// Results, by the type in which they are stored.
#[derive(Default)]
struct Results {
    stored: Vec<(&'static str, Vec<f64>)>,
    wide: Vec<(&'static str, Vec<f64>)>,
}

/// Runs kernels for activations stored as `S`, whose inputs are rounded to `R`.
struct Runner<'a, S, R> {
    device: &'a Device,
    random: Random,
    results: Results,
    types: std::marker::PhantomData<(S, R)>,
}

/// A batch norm after its forward, and what its backward and the tangents take besides.
struct BatchNormLayer<S: Compute> {
    shape: BatchNormShape,
    x: Buffer<S>,
    dy: Buffer<S>,
    mask: Buffer<S>,
    x_tangent: Buffer<S>,
    dy_tangent: Buffer<S>,
    gamma: Buffer<f32>,
    beta: Buffer<f32>,
    gamma_tangent: Buffer<f32>,
    beta_tangent: Buffer<f32>,
    mean: Buffer<f32>,
    inv_std: Buffer<f32>,
    workspace: Workspace,
}

impl<S: Compute<Master = f32>, R: Compute> Runner<'_, S, R> {
    fn numbers(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| R::from_f64(self.random.normal()).to_f64()).collect()
    }

    /// An activation.
    fn stored(&mut self, n: usize) -> Buffer<S> {
        let values: Vec<S> = self.numbers(n).into_iter().map(S::from_f64).collect();
        self.device.upload(&values).unwrap()
    }

    /// A parameter or a statistic, which is positive.
    fn wide(&mut self, n: usize) -> Buffer<f32> {
        let values: Vec<f32> = (0..n).map(|_| 0.5 + self.random.uniform() as f32).collect();
        self.device.upload(&values).unwrap()
    }

    fn keep(&mut self, name: &'static str, buffer: &Buffer<S>) {
        let values = buffer.to_vec().unwrap().into_iter().map(Compute::to_f64).collect();
        self.results.stored.push((name, values));
    }

    fn keep_wide(&mut self, name: &'static str, buffer: &Buffer<f32>) {
        let values = buffer.to_vec().unwrap().into_iter().map(f64::from).collect();
        self.results.wide.push((name, values));
    }

    fn element_wise(&mut self) -> Result<()> {
        for n in [1, 7, 8, 1003, 4096] {
            let (a, b) = (self.stored(n), self.stored(n));
            let mut out = self.device.poisoned::<S>(n)?;
            layers::relu(a.view(), out.view_mut())?;
            self.keep("relu", &out);
            layers::add(a.view(), b.view(), out.view_mut())?;
            self.keep("add", &out);
            layers::relu_backward(a.view(), b.view(), out.view_mut(), false)?;
            self.keep("relu_backward", &out);
            let mut sum = self.stored(n);
            layers::relu_backward(a.view(), b.view(), sum.view_mut(), true)?;
            self.keep("relu_backward added", &sum);
            let mut sum = self.stored(n);
            layers::add_to(a.view(), sum.view_mut())?;
            self.keep("add_to", &sum);
        }
        Ok(())
    }

    fn pooling(&mut self) -> Result<()> {
        for channels in [3, 8, 16, 20] {
            let pool = PoolShape { batch: 2, height: 7, width: 6, channels, kernel: 3, stride: 2, padding: 0 };
            let (x, dy) = (self.stored(pool.input_len()), self.stored(pool.output_len()));
            let (mut y, mut dx) = (self.device.poisoned::<S>(pool.output_len())?, self.stored(pool.input_len()));
            layers::average_pool(&pool, x.view(), y.view_mut())?;
            layers::average_pool_backward(&pool, dy.view(), dx.view_mut(), true)?;
            self.keep("average_pool", &y);
            self.keep("average_pool_backward", &dx);

            let (mut y, dy) = (self.device.poisoned::<S>(2 * channels)?, self.stored(2 * channels));
            layers::global_average_pool(2, 42, channels, x.view(), y.view_mut())?;
            layers::global_average_pool_backward(2, 42, channels, dy.view(), dx.view_mut(), false)?;
            self.keep("global_average_pool", &y);
            self.keep("global_average_pool_backward", &dx);

            let mut dx = self.stored(pool.input_len());
            let shape = ShortcutShape {
                batch: 2,
                height: 7,
                width: 6,
                in_channels: channels,
                out_channels: 2 * channels,
                before: channels / 2,
                stride: 2,
            };
            let dy = self.stored(shape.output_len());
            let mut y = self.device.poisoned::<S>(shape.output_len())?;
            layers::shortcut(&shape, x.view(), y.view_mut())?;
            layers::shortcut_backward(&shape, dy.view(), dx.view_mut(), true)?;
            self.keep("shortcut", &y);
            self.keep("shortcut_backward", &dx);
        }
        Ok(())
    }

    fn linear(&mut self) -> Result<()> {
        let shape = LinearShape { batch: 35, inputs: 18, outputs: 33 };
        let (x, weight, bias) = (self.stored(35 * 18), self.wide(18 * 33), self.wide(33));
        let (dy, mut y) = (self.wide(35 * 33), self.wide(35 * 33));
        let (mut dx, mut dweight, mut dbias) = (self.stored(35 * 18), self.wide(18 * 33), self.wide(33));
        layers::linear(&shape, x.view(), weight.view(), Some(bias.view()), y.view_mut(), true)?;
        layers::linear_input_gradient(&shape, dy.view(), weight.view(), dx.view_mut(), true)?;
        let dbias_out = Some(dbias.view_mut());
        layers::linear_weight_gradient(&shape, x.view(), dy.view(), dweight.view_mut(), dbias_out, false)?;
        self.keep("linear_input_gradient", &dx);
        self.keep_wide("linear", &y);
        self.keep_wide("linear_weight_gradient", &dweight);
        self.keep_wide("linear_bias_gradient", &dbias);
        Ok(())
    }

    fn images(&mut self) -> Result<()> {
        let shape = BatchShape { batch: 5, height: 6, width: 7, channels: 3 };
        let pixels: Vec<u8> = (0..3 * 126).map(|_| self.random.below(256) as u8).collect();
        let (pixels, labels) = (self.device.upload(&pixels)?, self.device.upload(&[1u32, 0, 2])?);
        let order = self.device.upload(&[2u32, 0, 1, 1, 2])?;
        let normalization = Normalization { mean: [0.5, 0.4, 0.3, 0.0], std: [0.2, 0.25, 0.3, 1.0] };
        let augment = Some(Augment { pad: 2, flip: true, cutout: 3, erasing: 0.5, seed: 3, counter: 11 });
        let mut out = self.device.poisoned::<S>(5 * 126)?;
        let mut out_labels = self.device.zeros(5)?;
        let (views, into) = ((pixels.view(), labels.view()), (out.view_mut(), out_labels.view_mut()));
        let start = Position::default();
        image::batch(&shape, views.0, views.1, order.view(), start, &normalization, augment, into.0, into.1)?;
        self.keep("image::batch", &out);
        Ok(())
    }

    fn batch_norm(&mut self) -> Result<()> {
        for (rows, channels) in [(2, 1), (130, 3), (67, 16), (300, 20), (150, 64)] {
            let mut layer = self.batch_norm_forward(BatchNormShape { rows, channels })?;
            // Each kind of mask, with no residual's gradient, one that is written and one that is added.
            for case in 0..4 {
                self.batch_norm_backward(&mut layer, case)?;
            }
        }
        Ok(())
    }

    fn batch_norm_forward(&mut self, shape: BatchNormShape) -> Result<BatchNormLayer<S>> {
        let (device, n, channels) = (self.device, shape.rows * shape.channels, shape.channels);
        let (x, residual) = (self.stored(n), self.stored(n));
        let [gamma, beta, running_mean, running_var] = std::array::from_fn(|_| self.wide(channels));
        let (mut mean, mut inv_std) = (device.poisoned::<f32>(channels)?, device.poisoned::<f32>(channels)?);
        let (mut next_mean, mut next_var) = (device.poisoned::<f32>(channels)?, device.poisoned::<f32>(channels)?);
        let mut y = device.poisoned::<S>(n)?;
        let mut workspace = Workspace::new(device, [shape])?;
        let input = Forward {
            x: x.view(),
            gamma: gamma.view(),
            beta: beta.view(),
            eps: 1e-5,
            residual: Some(residual.view()),
            relu: true,
        };
        let running = RunningUpdate {
            momentum: 0.1,
            mean: running_mean.view(),
            var: running_var.view(),
            next_mean: next_mean.view_mut(),
            next_var: next_var.view_mut(),
        };
        let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
        batch_norm::forward_train(shape, input, y.view_mut(), saved, Some(running), &mut workspace)?;
        self.keep("forward_train", &y);
        for (name, buffer) in
            [("mean", &mean), ("inv_std", &inv_std), ("next_mean", &next_mean), ("next_var", &next_var)]
        {
            self.keep_wide(name, buffer);
        }
        let plain = Forward { residual: None, ..input };
        let mut y = device.poisoned::<S>(n)?;
        let mut kept = (device.poisoned::<f32>(channels)?, device.poisoned::<f32>(channels)?);
        let saved = Saved { mean: kept.0.view_mut(), inv_std: kept.1.view_mut() };
        batch_norm::forward_eval(shape, plain, running_mean.view(), running_var.view(), y.view_mut(), saved)?;
        self.keep("forward_eval", &y);
        let [dy, mask, x_tangent, dy_tangent] = std::array::from_fn(|_| self.stored(n));
        let [gamma_tangent, beta_tangent] = std::array::from_fn(|_| self.wide(channels));
        Ok(BatchNormLayer {
            shape,
            x,
            dy,
            mask,
            x_tangent,
            dy_tangent,
            gamma,
            beta,
            gamma_tangent,
            beta_tangent,
            mean,
            inv_std,
            workspace,
        })
    }

    fn batch_norm_backward(&mut self, layer: &mut BatchNormLayer<S>, case: usize) -> Result<()> {
        let (device, shape) = (self.device, layer.shape);
        let (n, channels) = (shape.rows * shape.channels, shape.channels);
        let activation = match case {
            0 => Activation::Identity,
            1 => Activation::ReluRecomputed { beta: layer.beta.view() },
            _ => Activation::Relu { y: layer.mask.view() },
        };
        let input = Backward {
            x: layer.x.view(),
            dy: layer.dy.view(),
            gamma: layer.gamma.view(),
            mean: layer.mean.view(),
            inv_std: layer.inv_std.view(),
            activation,
        };
        let mode = if case == 3 { Mode::Eval } else { Mode::Train };
        let mut dx = device.poisoned::<S>(n)?;
        let (mut dgamma, mut dbeta) = (device.poisoned::<f32>(channels)?, device.poisoned::<f32>(channels)?);
        let mut gradient = self.stored(n);
        let accumulate = case != 2;
        let residual = (case != 1).then(|| ResidualGradient { gradient: gradient.view_mut(), accumulate });
        let gradients = Gradients { dx: dx.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
        batch_norm::backward(shape, mode, input, gradients, residual, &mut layer.workspace)?;
        self.keep("dx", &dx);
        self.keep("residual", &gradient);
        self.keep_wide("dgamma", &dgamma);
        self.keep_wide("dbeta", &dbeta);

        let Backward { x, gamma, mean, inv_std, .. } = input;
        let normalized = Normalized { x, gamma, mean, inv_std, activation };
        let tangents = ForwardTangents {
            x: layer.x_tangent.view(),
            gamma: layer.gamma_tangent.view(),
            beta: layer.beta_tangent.view(),
            residual: (case != 1).then(|| layer.dy_tangent.view()),
        };
        let mut y_tangent = device.poisoned::<S>(n)?;
        let mut moved = (device.poisoned::<f32>(channels)?, device.poisoned::<f32>(channels)?);
        let saved = Saved { mean: moved.0.view_mut(), inv_std: moved.1.view_mut() };
        let sums = &mut layer.workspace;
        batch_norm::forward_tangent(shape, mode, normalized, tangents, y_tangent.view_mut(), saved, sums)?;
        self.keep("y tangent", &y_tangent);
        self.keep_wide("mean tangent", &moved.0);
        self.keep_wide("inv_std tangent", &moved.1);

        let tangents = BackwardTangents {
            x: layer.x_tangent.view(),
            dy: layer.dy_tangent.view(),
            gamma: layer.gamma_tangent.view(),
            mean: moved.0.view(),
            inv_std: moved.1.view(),
            dgamma: dgamma.view(),
            dbeta: dbeta.view(),
        };
        let mut dx = device.poisoned::<S>(n)?;
        let mut parameters = (device.poisoned::<f32>(channels)?, device.poisoned::<f32>(channels)?);
        let gradients =
            Gradients { dx: dx.view_mut(), dgamma: parameters.0.view_mut(), dbeta: parameters.1.view_mut() };
        batch_norm::backward_tangent(shape, mode, input, tangents, gradients, None, &mut layer.workspace)?;
        self.keep("dx tangent", &dx);
        self.keep_wide("dgamma tangent", &parameters.0);
        self.keep_wide("dbeta tangent", &parameters.1);
        Ok(())
    }
}

fn results<S: Compute<Master = f32>, R: Compute>(device: &Device) -> Results {
    let types = std::marker::PhantomData;
    let mut runner = Runner::<S, R> { device, random: Random(17), results: Results::default(), types };
    runner.element_wise().unwrap();
    runner.pooling().unwrap();
    runner.linear().unwrap();
    runner.images().unwrap();
    runner.batch_norm().unwrap();
    runner.results
}

fn check<S: Compute<Master = f32>>() {
    for (device_name, device) in devices() {
        let (found, expected) = (results::<S, S>(&device), results::<f32, S>(&device));
        assert_eq!(found.stored.len(), expected.stored.len());
        for ((name, found), (_, expected)) in found.stored.iter().zip(&expected.stored) {
            let rounded: Vec<u64> = expected.iter().map(|&value| S::from_f64(value).to_f64().to_bits()).collect();
            let found: Vec<u64> = found.iter().map(|value| value.to_bits()).collect();
            let differs = found.iter().zip(&rounded).position(|(found, rounded)| found != rounded);
            assert_eq!(differs, None, "{}, {device_name}: {name} of {}", S::NAME, found.len());
        }
        for ((name, found), (_, expected)) in found.wide.iter().zip(&expected.wide) {
            let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<u64>>();
            assert!(bits(found) == bits(expected), "{}, {device_name}: {name}", S::NAME);
        }
    }
}

#[test]
fn f16_is_single_precision_rounded_once() {
    check::<f16>();
}

#[test]
fn bf16_is_single_precision_rounded_once() {
    check::<bf16>();
}
