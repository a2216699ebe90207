//! An objective of your own: a least-squares fit whose loss, gradient and Hessian are computed on the host. Every
//! method of polder steps over it, and each must bring the loss down.
//!
//! `cargo run --release --example objective`

use polder::Device;
use polder::device::Result;
use polder::objective::{Domain, Objective, ObjectiveExt, Pass, RunningStats};
use polder::optim::{Base, METHODS, Optimizer, Settings};

const SAMPLES: usize = 32;
const WEIGHTS: usize = 5;

/// `‖X w − y‖² / 2n` for n samples.
struct LeastSquares {
    inputs: [[f32; WEIGHTS]; SAMPLES],
    targets: [f32; SAMPLES],
}

impl LeastSquares {
    /// Targets that the weights 1, 2, 3, … explain, plus a part that no weights explain.
    fn new() -> Self {
        let inputs: [[f32; WEIGHTS]; SAMPLES] =
            std::array::from_fn(|n| std::array::from_fn(|k| (1.0 + n as f32 * (0.7 + 1.3 * k as f32)).sin()));
        let explained = |row: &[f32; WEIGHTS]| row.iter().enumerate().map(|(k, x)| (k + 1) as f32 * x).sum::<f32>();
        let targets = std::array::from_fn(|n| explained(&inputs[n]) + 0.1 * (n as f32 * 9.1).cos());
        Self { inputs, targets }
    }

    /// `Xᵀ r / n`.
    fn pulled_back(&self, residuals: &[f32]) -> Vec<f32> {
        let column = |k: usize| self.inputs.iter().zip(residuals).map(|(row, r)| row[k] * r).sum::<f32>();
        (0..WEIGHTS).map(|k| column(k) / SAMPLES as f32).collect()
    }

    /// `X v`.
    fn predictions(&self, vector: &[f32]) -> Vec<f32> {
        self.inputs.iter().map(|row| row.iter().zip(vector).map(|(x, v)| x * v).sum()).collect()
    }
}

impl Objective<f32> for LeastSquares {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(WEIGHTS)
    }

    fn pass(&mut self, pass: Pass<'_, f32>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, .. } => {
                let predictions = self.predictions(&weights.to_vec()?);
                let residuals: Vec<f32> = predictions.iter().zip(&self.targets).map(|(p, y)| p - y).collect();
                let squares: f64 = residuals.iter().map(|&r| f64::from(r) * f64::from(r)).sum();
                loss.write(&[squares / (2 * SAMPLES) as f64])?;
                gradient.write(&self.pulled_back(&residuals))
            }
            // Only methods with exact products ask for this one.
            Pass::HessianVector { direction, mut product, .. } => {
                product.write(&self.pulled_back(&self.predictions(&direction.to_vec()?)))
            }
            // Pairs of gradients, gradients at perturbed weights and so on are made of the two above.
            other => other.split(self),
        }
    }
}

fn main() -> Result<()> {
    let device = Device::host();
    let mut objective = LeastSquares::new();
    let loss_at = |objective: &mut LeastSquares, weights: &[f32]| -> Result<f64> {
        let weights = device.upload(weights)?;
        let (mut gradient, mut loss, mut flag) = (device.zeros(WEIGHTS)?, device.zeros(1)?, device.zeros::<u32>(1)?);
        let (g, l) = (gradient.view_mut(), loss.view_mut());
        objective.gradient(weights.view(), RunningStats::Keep, g, l, flag.view_mut())?;
        Ok(loss.to_vec()?[0])
    };
    let start = [0.0f32; WEIGHTS];
    let before = loss_at(&mut objective, &start)?;
    println!("loss at the start: {before:.4}");
    // Muon is for weights with matrices among them.
    for method in METHODS.iter().filter(|method| method.base != Some("muon")) {
        let made = (method.new)();
        let momentum = if made.has_momentum() { 0.0 } else { 0.9 };
        let base = method.base.and_then(Base::from_name).unwrap_or(Base::sgd(momentum));
        let mut optimizer = Optimizer::new(&device, WEIGHTS, Settings::boxed(made, base))?;
        let mut weights = device.upload(&start)?;
        for _ in 0..500 {
            optimizer.step(&mut objective, weights.view_mut(), 0.02)?;
        }
        let weights = weights.to_vec()?;
        let after = loss_at(&mut objective, &weights)?;
        println!("{:12} loss {after:.4}, weights {weights:.2?}: {}", method.name, method.summary);
        assert!(after < 0.01 * before, "{} does not bring the loss down: {after} from {before}", method.name);
    }
    Ok(())
}
