//! A method of your own, written outside the library and trained by its loop: the penalty of the gradient's norm (Zhao,
//! Zhang, Hu 2022), which follows `α g₊ + (1 − α) g`, `g` the gradient at `w` and `g₊` SAM's.
//!
//! ```sh
//! cargo run --release --example own_method
//! ```

use polder::data::{SyntheticSpec, synthetic};
use polder::device::{Result, Scalar};
use polder::objective::Passes;
use polder::optim::work::{G0, G1};
use polder::optim::{Coefficients, Direction, Method, Needs, Row, Step, Vector};
use polder::train::{RunSettings, Training};

polder::settings! {
    /// SAM's gradient and the plain one, weighted.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct NormPenalty {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in positive;
        /// Weight of SAM's gradient: 0 is the base optimizer alone, 1 is SAM
        alpha: f64 = 0.8, as "ALPHA", in not_negative;
    }
}

impl<T: Scalar> Method<T> for NormPenalty {
    fn passes(&self) -> Passes {
        Passes { gradients: 2, products: 0 }
    }

    fn needs(&self) -> Needs {
        // Three working vectors, G0, P and G1, and one row of known coefficients.
        Needs { rows: vec![[self.alpha, 1.0 - self.alpha, 0.0, 0.0]], ..Needs::vectors(3) }
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        // The gradient at w goes to G0, its norm is number 0. The point w + ρ g/‖g‖ is in P, its gradient in G1, its
        // loss is number 1.
        step.gradient_at_weights()?;
        step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        Ok(Direction::new([G1, G0], Coefficients::Known(Row::own(0))))
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut settings = RunSettings::default();
    settings.run.epochs = 3;
    settings.data.batch_size = 32;
    let data = SyntheticSpec { train: 1024, test: 256, ..SyntheticSpec::default() };
    let summary = Training::new(settings)
        .dataset(synthetic(&data)?)
        .method("norm-penalty", Box::new(NormPenalty::default()))
        .run()?;
    let test = summary.test.ok_or("the run was interrupted")?;
    println!("norm penalty: test accuracy {:.1} %, test loss {:.3}", 100.0 * test.accuracy, test.loss);
    assert_eq!((summary.steps, summary.skipped), (96, 0));
    // Guessing one of ten classes has a loss of 2.303.
    assert!(test.loss < 2.28);
    Ok(())
}
