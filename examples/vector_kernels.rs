//! The vector kernels alone, without a network: the algebra of one SAM step on your own vectors. It computes the norm
//! of a gradient, perturbs the weights along it to both sides, and updates them by SGD. Every result is compared with
//! the same step in double precision.
//!
//! `cargo run --release --example vector_kernels`

use polder::Device;
use polder::device::Result;
use polder::kernels::vector::{self, Combination, Rate, Reduction, SgdStep};

const N: usize = 100_000;
const RHO: f64 = 0.05;
const LEARNING_RATE: f64 = 0.1;
const MOMENTUM: f64 = 0.9;

fn main() -> Result<()> {
    // The first GPU if polder was built with nvcc and there is one, else the CPU.
    let device = Device::from_name("auto")?;
    let weights: Vec<f32> = (0..N).map(|i| (i as f32 * 0.37).sin()).collect();
    let gradient: Vec<f32> = (0..N).map(|i| (i as f32 * 0.11).cos()).collect();

    // Buffers live on the device. `view` lends one for reading, `view_mut` for writing.
    let mut w = device.upload(&weights)?;
    let g = device.upload(&gradient)?;
    let mut plus = device.zeros::<f32>(N)?;
    let mut minus = device.zeros::<f32>(N)?;
    let mut momentum = device.zeros::<f32>(N)?;
    let mut norm = device.zeros::<f64>(1)?;
    // A step whose flag is set changes nothing.
    let skip = device.zeros::<u32>(1)?;
    let mut reduction = Reduction::new(&device)?;

    // ‖g‖ stays on the device: the next kernel reads it there.
    vector::l2_norm(g.view(), &mut reduction, norm.view_mut())?;
    // w + ρ g/‖g‖ and w − ρ g/‖g‖ in one pass. `w` does not change.
    vector::perturb(w.view(), g.view(), norm.view(), RHO, plus.view_mut(), Some(minus.view_mut()))?;
    // A combination of up to four vectors with coefficients on the device; here the gradient itself.
    let one = device.upload(&[1.0f64, 0.0, 0.0, 0.0])?;
    let combination = Combination { vectors: [Some(g.view()), None, None, None], coefficients: one.view() };
    let step = SgdStep {
        lr: Rate::Fixed(LEARNING_RATE),
        momentum: MOMENTUM,
        nesterov: false,
        weight_decay: 0.0,
        decay_len: N,
    };
    vector::sgd(w.view_mut(), momentum.view_mut(), combination, step, skip.view())?;

    // Reading back waits for the device.
    let found_norm = norm.to_vec()?[0];
    let expected_norm = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
    assert!((found_norm / expected_norm - 1.0).abs() < 1e-12, "{found_norm} instead of {expected_norm}");
    let (plus, minus, w) = (plus.to_vec()?, minus.to_vec()?, w.to_vec()?);
    for i in 0..N {
        let (start, slope) = (f64::from(weights[i]), f64::from(gradient[i]));
        let displacement = RHO * slope / expected_norm;
        let expected =
            [(plus[i], start + displacement), (minus[i], start - displacement), (w[i], start - LEARNING_RATE * slope)];
        for (found, expected) in expected {
            assert!((f64::from(found) - expected).abs() < 2e-7, "element {i}: {found} instead of {expected}");
        }
    }
    println!("{}: {N} weights, gradient norm {found_norm:.4}, one step of SGD: all as expected", device.name());
    Ok(())
}
