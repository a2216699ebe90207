//! SAM trains a model of burn, by copies on the host.
//!
//! `cd interop && cargo run --release -p polder-burn`
//!
//! burn does not hand out the memory of its tensors, so their numbers are copied: the weights to the model before every
//! pass, the gradients from it after every pass. polder's optimizer works on its own vector on the CPU. The model is
//! any `Module`; `Weights` and `Gradients` visit its parameters.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::tanh;
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use polder::device::{Buffer, Result};
use polder::kernels::vector;
use polder::objective::{Domain, Objective, Pass};
use polder::optim::{Base, Optimizer, Sam, Settings};

/// A network with one hidden layer.
#[derive(Module, Debug)]
struct Mlp {
    first: Linear,
    last: Linear,
}

impl Mlp {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.last.forward(tanh(self.first.forward(x)))
    }
}

/// The numbers of a tensor.
fn numbers<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

/// Reads the parameters of a module one after the other.
#[derive(Default)]
struct Weights(Vec<f32>);

impl ModuleVisitor for Weights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.extend(numbers(&param.val()));
    }
}

/// Reads their gradients in the same order. A parameter without one has the gradient 0.
struct Slopes<'a> {
    gradients: &'a Gradients,
    flat: Vec<f32>,
}

impl ModuleVisitor for Slopes<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let param = param.val();
        match param.grad(self.gradients) {
            Some(gradient) => self.flat.extend(numbers(&gradient)),
            None => self.flat.resize(self.flat.len() + param.shape().num_elements(), 0.0),
        }
    }
}

/// Writes the parameters in the same order.
struct Assign<'a>(&'a [f32]);

impl ModuleMapper for Assign<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|old| {
            let (own, rest) = self.0.split_at(old.shape().num_elements());
            self.0 = rest;
            Tensor::from_data(TensorData::new(own.to_vec(), old.shape()), &old.device()).require_grad()
        })
    }
}

/// The mean squared error of a model on a mini-batch.
struct Fit {
    model: Mlp,
    len: usize,
    x: Tensor<2>,
    y: Tensor<2>,
}

impl Objective<f32> for Fit {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.len)
    }

    fn pass(&mut self, pass: Pass<'_, f32>) -> Result<()> {
        let Pass::Gradient { weights, mut gradient, mut loss, mut flag, .. } = pass else { return pass.split(self) };
        self.model = self.model.clone().map(&mut Assign(&weights.to_vec()?));
        let error = (self.model.forward(self.x.clone()) - self.y.clone()).powi_scalar(2).mean();
        let mut slopes = Slopes { gradients: &error.backward(), flat: Vec::with_capacity(self.len) };
        self.model.visit(&mut slopes);
        gradient.write(&slopes.flat)?;
        loss.write(&[f64::from(error.into_scalar::<f32>())])?;
        vector::check_finite(loss.view(), flag.reborrow())?;
        vector::check_finite(gradient.view(), flag)
    }
}

fn main() -> Result<()> {
    let burn_device = Device::flex().autodiff();
    burn_device.seed(1);
    let points: Vec<f32> = (0..64).map(|k| k as f32 / 32.0 - 1.0).collect();
    let values: Vec<f32> = points.iter().map(|x| (3.0 * x).sin()).collect();
    let column = |values: Vec<f32>| Tensor::<2>::from_data(TensorData::new(values, [64, 1]), &burn_device);
    let model =
        Mlp { first: LinearConfig::new(1, 32).init(&burn_device), last: LinearConfig::new(32, 1).init(&burn_device) };
    let mut start = Weights::default();
    model.visit(&mut start);
    let len = start.0.len();

    let device = polder::Device::host();
    let mut weights: Buffer<f32> = device.upload(&start.0)?;
    let mut fit = Fit { model, len, x: column(points), y: column(values) };
    let mut optimizer = Optimizer::new(&device, len, Settings::new(Sam::new(0.02), Base::ADAMW))?;
    let mut losses = Vec::new();
    for step in 0..=300 {
        optimizer.step(&mut fit, weights.view_mut(), 0.01)?;
        if step % 100 == 0 {
            losses.push(optimizer.telemetry()?.loss);
            println!("step {step}: loss {:.5}", losses[losses.len() - 1]);
        }
    }
    // The last pass left the model at the perturbed weights.
    fit.model = fit.model.map(&mut Assign(&weights.view().to_vec()?));
    let error = f64::from((fit.model.forward(fit.x) - fit.y).powi_scalar(2).mean().into_scalar::<f32>());
    println!("the trained model: {error:.5}");
    assert!(error < 0.1 * losses[0], "the loss fell from {} to {error} only", losses[0]);
    Ok(())
}
