//! SAM trains a small network of candle to tell the points of two spirals apart.
//!
//! `cd interop && cargo run --release -p polder-candle --example mlp`

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};
use polder::optim::{Base, Settings};
use polder_candle::{Optimizer, Result, settings, trainable};

const POINTS: usize = 100;

/// The points of two spirals, and which of them each point belongs to.
fn spirals() -> Result<(Tensor, Tensor)> {
    let mut points = Vec::new();
    for k in 0..POINTS {
        let radius = k as f32 / POINTS as f32;
        let (sine, cosine) = (7.0 * radius).sin_cos();
        points.extend([radius * cosine, radius * sine, -radius * cosine, -radius * sine]);
    }
    let labels: Vec<u32> = (0..2 * POINTS as u32).map(|k| k % 2).collect();
    Ok((Tensor::from_vec(points, (2 * POINTS, 2), &Device::Cpu)?, Tensor::new(labels, &Device::Cpu)?))
}

/// Initial weights, the same in every run: candle cannot seed its generator on the CPU.
fn start(vars: &[Var]) -> Result<()> {
    let mut state = 1u32;
    for var in vars {
        let bound = (var.dims()[var.rank() - 1] as f32).sqrt().recip();
        let values = (0..var.elem_count()).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bound * (state as f32 / (1u32 << 31) as f32 - 1.0)
        });
        var.set(&Tensor::from_iter(values, &Device::Cpu)?.reshape(var.shape())?)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let (points, labels) = spirals()?;
    let variables = VarMap::new();
    let builder = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let model = candle_nn::seq()
        .add(candle_nn::linear(2, 64, builder.pp("first"))?)
        .add(candle_nn::Activation::Relu)
        .add(candle_nn::linear(64, 64, builder.pp("second"))?)
        .add(candle_nn::Activation::Relu)
        .add(candle_nn::linear(64, 2, builder.pp("last"))?);

    let vars = trainable(&variables)?;
    start(&vars)?;
    let settings: Settings<f32> = settings("sam", "rho=0.02", Some(Base::ADAMW))?;
    let mut optimizer = Optimizer::new(vars, settings, 0.01)?;
    let mut losses = Vec::new();
    for step in 0..=300 {
        optimizer.step(|| candle_nn::loss::cross_entropy(&model.forward(&points)?, &labels))?;
        if step % 50 == 0 {
            let telemetry = optimizer.inner().telemetry()?;
            println!("step {step}: loss {:.4}, gradient {:.4}", telemetry.loss, telemetry.gradient_norm);
            losses.push(telemetry.loss);
        }
    }
    let right = model.forward(&points)?.argmax(1)?.eq(&labels)?.to_dtype(DType::F32)?.mean_all()?;
    let right = right.to_scalar::<f32>()?;
    println!("{:.1} % of the points are told apart", 100.0 * right);
    assert!(losses.last() < Some(&0.1) && right > 0.95);
    Ok(())
}
