//! Weights that another library owns: a plain vector here, which stands for a tensor of any framework. SAM trains them
//! in place and the trace of the Hessian is measured there, without a copy. The objective works on raw pointers too, as
//! foreign code would.
//!
//! `cargo run --release --example borrowed_memory`
//!
//! On a GPU, `Device::adopt` takes the stream of that library, and the addresses are those of device memory.

use std::ptr;

use polder::Device;
use polder::curvature::Curvature;
use polder::device::{Result, Slice, SliceMut};
use polder::objective::{Domain, Objective, Pass};
use polder::optim::{Base, Optimizer, Sam, Settings};

const WEIGHTS: usize = 1000;

/// `½ Σ k (w_k − 1)² / n` for k from 1 to n: its Hessian is diagonal, with the entries k/n.
struct Valley;

fn slope(k: usize, w: f32) -> f32 {
    (k + 1) as f32 / WEIGHTS as f32 * (w - 1.0)
}

/// Foreign code: it knows pointers and lengths, and nothing of polder.
///
/// # Safety
/// Both pointers are valid for `n` floats, the second one to write.
unsafe fn foreign_gradient(weights: *const f32, gradient: *mut f32, n: usize) -> f64 {
    let mut loss = 0.0;
    for k in 0..n {
        // SAFETY: k is less than n.
        unsafe {
            let w = *weights.add(k);
            *gradient.add(k) = slope(k, w);
            loss += 0.5 * f64::from(slope(k, w)) * f64::from(w - 1.0);
        }
    }
    loss
}

impl Objective<f32> for Valley {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(WEIGHTS)
    }

    fn pass(&mut self, pass: Pass<'_, f32>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, .. } => {
                let from = ptr::with_exposed_provenance(weights.address() as usize);
                let to = ptr::with_exposed_provenance_mut(gradient.address() as usize);
                // SAFETY: two slices of this length on the CPU, the second borrowed to write.
                loss.write(&[unsafe { foreign_gradient(from, to, WEIGHTS) }])
            }
            Pass::HessianVector { direction, mut product, .. } => {
                let direction = direction.to_vec()?;
                product.write(&direction.iter().enumerate().map(|(k, d)| slope(k, d + 1.0)).collect::<Vec<f32>>())
            }
            other => other.split(self),
        }
    }
}

fn main() -> Result<()> {
    let device = Device::host();
    let mut weights = vec![0.0f32; WEIGHTS];
    let address = weights.as_mut_ptr().expose_provenance() as u64;
    let mut optimizer = Optimizer::new(&device, WEIGHTS, Settings::new(Sam::new(0.05), Base::sgd(0.9)))?;
    for _ in 0..300 {
        // SAFETY: the vector is alive, as long, and used by nobody else during the step.
        let borrowed = unsafe { SliceMut::from_raw(&device, address, WEIGHTS) }?;
        optimizer.step(&mut Valley, borrowed, 0.5)?;
    }
    println!("loss after 300 steps: {:.2e}", optimizer.telemetry()?.loss);
    println!("the vector itself: {:.3?}, …", &weights[WEIGHTS - 3..]);
    assert!(weights[WEIGHTS / 10..].iter().all(|w| (w - 1.0).abs() < 0.05));

    // SAFETY: as above, and only read.
    let borrowed = unsafe { Slice::from_raw(&device, address, WEIGHTS) }?;
    let trace = Curvature::new(&mut Valley, borrowed)?.trace(2, 1, |_| ())?;
    let expected = (WEIGHTS + 1) as f64 / 2.0;
    println!("trace of the Hessian: {:.3}, exactly {expected}", trace.value);
    assert!((trace.value - expected).abs() < 1e-3 * expected);
    Ok(())
}
