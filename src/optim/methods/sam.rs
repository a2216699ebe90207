//! SAM: the gradient at `w + ε`, ε the ascent of length ρ (Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware
//! Minimization for Efficiently Improving Generalization", ICLR 2021, algorithm 1). With a perturbation of the
//! normalisation alone it is SAM-ON (Müller, Vlaar, Rolnick, Hein, "Normalization Layers Are All That Sharpness-Aware
//! Minimization Needs", NeurIPS 2023).

use crate::device::{Error, Result, Scalar};
use crate::kernels::{sharpness, vector};
use crate::objective::Passes;
use crate::optim::step::work::{G0, G1, P, Q};
use crate::optim::{Context, Direction, Entry, Method, Needs, Numbers, Row, Step, Vector};
use crate::settings::SettingError;
use crate::{settings, words};

words! {
    /// Norm of the ball in which SAM ascends.
    pub enum Norm {
        /// `ε = ρ g/‖g‖`
        Two = "2",
        /// `ε = ρ sign(g)`
        Infinity = "inf",
    }
}

words! {
    /// The parameters that SAM perturbs.
    pub enum Perturbed {
        /// All of them
        All = "all",
        /// Those of normalisation: SAM-ON
        Normalisation = "norm",
    }
}

settings! {
    /// SAM: follows `g(w + ε)`.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub struct Sam {
        /// Radius of the perturbation
        rho: f64 = 0.05, as "RHO", in not_negative;
        /// Norm of SAM's ball
        p_norm: Norm = Norm::Two, as "P";
        /// Steps of SAM's ascent, each projected onto the ball
        ascent_steps: usize = 1, as "K", in at_least(1);
        /// Length of each of several ascent steps
        ascent_length: Option<f64> = None, else "rho", as "LENGTH", in positive;
        /// Include SAM's second-order term: one product with the Hessian
        second_order: bool = false;
        /// Which parameters SAM perturbs: all, or those of normalisation alone (SAM-ON)
        perturb: Perturbed = Perturbed::All;
    }
    code {
        /// The first element of the parameters of normalisation, and the one behind their last.
        normalisation: Option<(usize, usize)> = None;
    }
}

/// SAM by name.
pub const ENTRY: Entry = Entry::of::<Sam>("sam", "Sharpness-aware minimisation");

impl Sam {
    /// SAM in its usual form: p = 2, one ascent step, radius `rho`.
    pub fn new(rho: f64) -> Self {
        Self { rho, ..Self::default() }
    }
}

impl<T: Scalar> Method<T> for Sam {
    fn prepare(&mut self, context: &Context<'_>) {
        let place = context.layout.normalisation();
        self.normalisation = Some((place.start, place.end));
    }

    fn check_combination(&self) -> std::result::Result<(), SettingError> {
        let several = self.ascent_steps > 1;
        if self.ascent_length.is_some() && !several {
            return Err(SettingError::Contradiction { name: "ascent-length", reason: "needs several `ascent-steps`" });
        }
        if several && self.p_norm != Norm::Two {
            return Err(SettingError::Contradiction { name: "ascent-steps", reason: "more than one needs `p-norm` 2" });
        }
        if self.second_order && (several || self.p_norm != Norm::Two) {
            return Err(SettingError::Contradiction {
                name: "second-order",
                reason: "needs `p-norm` 2 and one ascent step",
            });
        }
        if self.perturb == Perturbed::Normalisation {
            let contradiction = |reason| Err(SettingError::Contradiction { name: "perturb", reason });
            if several || self.p_norm != Norm::Two || self.second_order {
                return contradiction("`norm` needs `p-norm` 2, one ascent step and no `second-order`");
            }
            if self.normalisation.is_some_and(|(start, end)| start == end) {
                return contradiction("`norm`, but the network has no normalisation");
            }
        }
        Ok(())
    }

    fn passes(&self) -> Passes {
        Passes { gradients: 1 + self.ascent_steps as u64, products: u64::from(self.second_order) }
    }

    fn needs(&self) -> Needs {
        Needs::vectors(if self.ascent_steps > 1 || self.second_order { 4 } else { 3 })
    }

    fn direction(&self, step: &mut Step<'_, T>) -> Result<Direction> {
        step.gradient_at_weights()?;
        if self.perturb == Perturbed::Normalisation {
            self.perturb_normalisation(step)?;
            step.gradient(P, 1, G1)?;
        } else if self.p_norm == Norm::Infinity {
            let rho = self.rho * step.rho_factor;
            let mut x = step.vectors.open()?;
            vector::perturb_linf(x.read(Vector::Weights)?, x.read(G0)?, rho, x.write(P)?, None)?;
            step.gradient(P, 1, G1)?;
        } else if self.ascent_steps == 1 {
            step.gradient_displaced(Vector::Weights, G0, 0, self.rho, 1, G1)?;
        } else {
            self.ascend(step)?;
            step.gradient(P, 1, G1)?;
        }
        if !self.second_order {
            return Ok(Direction::along(G1));
        }
        // The term that SAM drops: (dε/dw)ᵀ g_adv = (ρ/‖g‖) H d with d = g_adv − v vᵀg_adv. d takes the place of the
        // perturbed point.
        step.orthogonal(P)?;
        step.hessian_vector(Vector::Weights, P, Q)?;
        step.over_norm(self.rho * step.rho_factor, 0)?;
        Ok(Direction::combined([G1, Q]))
    }
}

impl Sam {
    /// P is w, but for the normalisation, which is ρ further along its own part of the gradient.
    fn perturb_normalisation<T: Scalar>(&self, step: &mut Step<'_, T>) -> Result<()> {
        let Some((start, end)) = self.normalisation else {
            let message = "`perturb` is norm, but the method was not told where the normalisation lies".into();
            return Err(Error::Argument { operation: "Sam::direction", message });
        };
        let (rho, norms) = (self.rho * step.rho_factor, &mut step.numbers.norms);
        let mut x = step.vectors.open()?;
        let (weights, mut point) = (x.read(Vector::Weights)?, x.write(P)?);
        // A layout ends with padding, which the vector of another framework need not have.
        let end = end.min(weights.len());
        let (part, gradient) = (weights.slice(start..end)?, x.read(G0)?.slice(start..end)?);
        vector::l2_norm(gradient, step.reduction, norms.slice_mut(1..2)?)?;
        point.copy_from(weights)?;
        vector::perturb(part, gradient, norms.slice(1..2)?, rho, point.slice_mut(start..end)?, None)
    }

    /// K steps of projected ascent, all of one length, from `w` onto the ball of radius ρ around it. The perturbed
    /// point is in P.
    fn ascend<T: Scalar>(&self, step: &mut Step<'_, T>) -> Result<()> {
        let rho = self.rho * step.rho_factor;
        let length = self.ascent_length.map_or(rho, |length| length * step.rho_factor);
        for ascent in 0..self.ascent_steps {
            let first = ascent == 0;
            if !first {
                step.gradient(P, 1, G1)?;
                step.dot_products(&[Q, G1], Row::FIRST, Row::SECOND)?;
            }
            let Numbers { norms, dot_products, inner, .. } = &mut *step.numbers;
            let dot_products = (!first).then(|| dot_products.view());
            sharpness::ascent_coefficients(norms.slice(0..1)?, dot_products, rho, length, inner.slice_mut(0..2)?)?;
            let mut x = step.vectors.open()?;
            let (weights, gradient) = (x.read(Vector::Weights)?, x.read(if first { G0 } else { G1 })?);
            let (displacement, out) = (x.write(Q)?, x.write(P)?);
            let ends = (first, ascent + 1 == self.ascent_steps);
            sharpness::ascend(weights, gradient, displacement, inner.slice(0..2)?, out, ends)?;
        }
        Ok(())
    }
}
