//! The curvature of your own function: Rosenbrock's function in double precision. The trace of its Hessian, the largest
//! eigenvalue and the norm of its gradient are compared with their closed forms.
//!
//! `cargo run --release --example curvature`

use polder::Device;
use polder::curvature::Curvature;
use polder::device::Result;
use polder::objective::{Domain, Objective, Pass};

/// `(1 − x)² + 100 (y − x²)²`.
struct Rosenbrock;

impl Rosenbrock {
    fn gradient([x, y]: [f64; 2]) -> [f64; 2] {
        [-2.0 * (1.0 - x) - 400.0 * x * (y - x * x), 200.0 * (y - x * x)]
    }

    /// The Hessian's entries: xx, xy and yy.
    fn hessian([x, y]: [f64; 2]) -> [f64; 3] {
        [2.0 - 400.0 * (y - 3.0 * x * x), -400.0 * x, 200.0]
    }
}

/// The two numbers of a vector.
fn point(weights: &[f64]) -> [f64; 2] {
    [weights[0], weights[1]]
}

impl Objective<f64> for Rosenbrock {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(2)
    }

    fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, .. } => {
                let [x, y] = point(&weights.to_vec()?);
                loss.write(&[(1.0 - x).powi(2) + 100.0 * (y - x * x).powi(2)])?;
                gradient.write(&Self::gradient([x, y]))
            }
            // Measurements of curvature need the product of the Hessian with a vector, never the Hessian itself.
            Pass::HessianVector { weights, direction, mut product, .. } => {
                let [xx, xy, yy] = Self::hessian(point(&weights.to_vec()?));
                let [dx, dy] = point(&direction.to_vec()?);
                product.write(&[xx * dx + xy * dy, xy * dx + yy * dy])
            }
            // Every other pass is made of these two.
            other => other.split(self),
        }
    }
}

fn main() -> Result<()> {
    let device = Device::host();
    for start in [[1.0, 1.0], [-1.2, 1.0], [0.0, 0.5]] {
        let weights = device.upload(&start)?;
        let mut objective = Rosenbrock;
        let mut curvature = Curvature::new(&mut objective, weights.view())?;

        // 400 random probes; the standard error comes with the estimate.
        let trace = curvature.trace(400, 1, |_| ())?;
        // Lanczos's method finds the eigenvalues of a 2 × 2 matrix in two steps.
        let largest = &curvature.top_eigenvalues(1, (2, 1e-9), 1, |_| ())?[0];
        let norm = curvature.gradient_norm()?;

        let [xx, xy, yy] = Rosenbrock::hessian(start);
        let expected_trace = xx + yy;
        let expected_eigenvalue = expected_trace / 2.0 + ((xx - yy) / 2.0).hypot(xy);
        let [gx, gy] = Rosenbrock::gradient(start);
        let error = trace.standard_error.unwrap_or(0.0);
        println!("at {start:?}:");
        println!("  trace {:.1} ± {error:.1} from {} probes, exactly {expected_trace:.1}", trace.value, trace.probes);
        println!("  largest eigenvalue {:.6}, exactly {expected_eigenvalue:.6}", largest.value);
        println!("  gradient norm {norm:.6}, exactly {:.6}", gx.hypot(gy));
        assert!((trace.value - expected_trace).abs() <= 4.0 * error + 1e-9);
        assert!((largest.value - expected_eigenvalue).abs() < 1e-9 * expected_eigenvalue);
        assert!((norm - gx.hypot(gy)).abs() < 1e-12 * norm.max(1.0));
    }
    Ok(())
}
