//! The sharpness-aware family: what each method is, with its hyper-parameters.

pub use crate::kernels::sharpness::{GamTerms, Scaling};
pub use crate::kernels::vector::{CrSam as CrSamTerms, CrSamForm as Form};

/// How SAM's perturbation ε is made from the gradient g at `w`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Perturbation {
    /// p = 2: `ε = ρ g/‖g‖`.
    L2,
    /// p = ∞: `ε = ρ sign(g)`.
    Linf,
    /// ASAM (Kwon et al. 2021): `ε = ρ T² g/‖T g‖`, `T = |w| + η`, and `T = 1` for biases and normalisation.
    Adaptive(Scaling),
    /// `ε = ρ z/‖z‖`, z standard normal: the control experiment. Needs no gradient at `w`, so a step is one pass.
    Random {
        /// Seed of z.
        seed: u64,
    },
}

/// Sharpness-aware minimisation (Foret et al. 2021, algorithm 1): the gradient at `w + ε`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sam {
    /// The ball's radius, by default 0.05 (ASAM 0.5).
    pub rho: f64,
    /// How ε is made.
    pub perturbation: Perturbation,
    /// K steps of projected gradient ascent onto the ball, each of length ρ; 1 is SAM. More need [`Perturbation::L2`].
    pub ascent_steps: usize,
    /// Adds the term that SAM drops, `(dε/dw)ᵀ g_adv = (ρ/‖g‖) H (g_adv − v vᵀg_adv)`: one exact Hessian-vector product. Needs
    /// [`Perturbation::L2`] and one step.
    pub second_order: bool,
}

/// How a method takes the product of the Hessian with a direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Product {
    /// [`crate::objective::Objective::hessian_vector`].
    Exact,
    /// The central difference of two gradients, the direction normalised first.
    Difference {
        /// The distance of either point, by default 0.01.
        radius: f64,
    },
}

/// Gradient-norm regularisation ("Gradient Norm Regularizer Seeks Flat Minima", algorithm 1): with `f = H ĝ` and
/// `w_adv = w + ρ f/‖f‖` the direction is `h + α ρ H(w_adv) ĝ(w_adv)`, h the gradient of the loss or SAM's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gnr {
    /// Radius of the ascent of ‖∇L‖, and weight of the regularizer's gradient, by default 0.1.
    pub rho: f64,
    /// α, by default 0.1.
    pub alpha: f64,
    /// How the two products are taken.
    pub product: Product,
    /// Regularize one in so many steps, by default each.
    pub every: u64,
    /// The radius of SAM whose gradient is h; none for that of the loss.
    pub oracle_rho: Option<f64>,
}

/// Where the gradients of a step are taken and how they are combined.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The gradient at `w`.
    Plain,
    /// SAM and its kin: the gradient at `w + ε`.
    Sam(Sam),
    /// Curvature-regularised SAM (Wu, Luo, Wunsch 2024, eq. 7): gradients at `w`, `w + ρv` and `w − ρv` with
    /// `A = L+ + L− − 2L0` and `B = L+ − L−`; [`Form::Released`] leaves the divisions out, as the authors' code does. A term
    /// whose `A` or `B` is at most its threshold is dropped for the step and counted.
    CrSam {
        /// The radius, by default 0.1.
        rho: f64,
        /// Its coefficients, form and thresholds.
        terms: CrSamTerms,
    },
    /// Gradient-norm regularisation.
    Gnr(Gnr),
    /// GAM, the later code of GNR's authors (Zhang et al. 2023): `g1` at `w + r′ĝ0`, `g2` at `w2 = w + r d/‖d‖` with `d = g1 − g0`,
    /// `g3` at `w2 + r′ĝ2`; with `G = β1 g1 + β3 g3` and `m = g0 + |β2| g2` the direction is `G − γ (m − proj_G m)`.
    Gam {
        /// r′, by default 0.02.
        rho: f64,
        /// r, by default 0.2.
        rho_norm: f64,
        /// β0, β1 and γ.
        terms: GamTerms,
    },
    /// SA-SAM (Naganuma et al. 2024, algorithm 1): step size `η = min(‖w − w_prev‖/(2‖g(w) − g(w_prev)‖), sqrt(1 + δθ) η_prev)`,
    /// both gradients on this mini-batch, radius `ρ = sqrt(η)`, and the gradient at `w + ρv`. The learning rate that a step is
    /// given is not used.
    SaSam(StepSize),
    /// SA-SGD: SA-SAM's step size without a perturbation.
    SaSgd(StepSize),
    /// GSAM (Zhuang et al. 2022): `g+ − α g⊥`, g⊥ the part of g(w) that is orthogonal to g+.
    Gsam {
        /// The radius, by default 0.05.
        rho: f64,
        /// α, by default 0.1.
        alpha: f64,
    },
    /// LookSAM (Liu et al. 2022): SAM in one of `every` steps, which keeps g_v, the part of g+ orthogonal to g(w); in the others
    /// `g + α (‖g‖/‖g_v‖) g_v`.
    LookSam {
        /// The radius, by default 0.05.
        rho: f64,
        /// α, by default 0.7.
        alpha: f64,
        /// k, by default 5.
        every: u64,
    },
    /// R-SAM (Liu et al. 2022, random smoothing): the ascent follows the gradient at `w + σ z/‖z‖`, z standard normal, and the
    /// step the gradient at `w + ρ g/‖g‖`.
    RSam {
        /// The radius, by default 0.05.
        rho: f64,
        /// σ, the length of the random displacement, by default 0.05.
        sigma: f64,
        /// Seed of z.
        seed: u64,
    },
}

/// The step size of SA-SAM and SA-SGD (Malitsky & Mishchenko 2020).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSize {
    /// η_0, the first step's.
    pub eta0: f64,
    /// δ, by default 0.02.
    pub delta: f64,
    /// θ_0, by default 1; infinite in the algorithm's text.
    pub theta0: f64,
}

impl Method {
    /// Whether a step does the same as the one before, with the same numbers but for what lies on the device, so that one recorded
    /// step stands for all.
    pub fn repeats(self) -> bool {
        match self {
            Method::LookSam { every, .. } | Method::Gnr(Gnr { every, .. }) => every == 1,
            Method::Sam(Sam { perturbation, .. }) => !matches!(perturbation, Perturbation::Random { .. }),
            Method::RSam { .. } => false,
            Method::Plain | Method::CrSam { .. } | Method::Gam { .. } | Method::Gsam { .. } => true,
            Method::SaSam(_) | Method::SaSgd(_) => true,
        }
    }

    /// SAM as it is mostly used: p = 2, one step.
    pub fn sam(rho: f64) -> Self {
        Self::with_perturbation(rho, Perturbation::L2)
    }

    /// SAM with another perturbation.
    pub fn with_perturbation(rho: f64, perturbation: Perturbation) -> Self {
        Method::Sam(Sam { rho, perturbation, ascent_steps: 1, second_order: false })
    }

    /// Gradients per step, and exact Hessian-vector products; those of a step of full cost where not all steps are.
    pub fn passes(self) -> (usize, usize) {
        match self {
            Method::Plain => (1, 0),
            Method::Sam(Sam { perturbation: Perturbation::Random { .. }, .. }) => (1, 0),
            Method::Sam(Sam { ascent_steps, second_order, .. }) => (1 + ascent_steps, usize::from(second_order)),
            Method::CrSam { .. } => (3, 0),
            Method::Gnr(Gnr { product, oracle_rho, .. }) => {
                let oracle = usize::from(oracle_rho.is_some());
                if product == Product::Exact { (2 + oracle, 2) } else { (6 + oracle, 0) }
            }
            Method::Gam { .. } => (4, 0),
            Method::SaSam(_) => (3, 0),
            Method::SaSgd(_) => (2, 0),
            Method::Gsam { .. } | Method::LookSam { .. } | Method::RSam { .. } => (2, 0),
        }
    }

    /// Whether a step depends on more of the past than the base optimizer's does.
    pub fn has_memory(self) -> bool {
        matches!(self, Method::SaSam(_) | Method::SaSgd(_) | Method::LookSam { .. })
    }

    /// What is wrong with these settings, if anything.
    pub(super) fn check(self) -> Result<(), String> {
        match self {
            Method::Sam(Sam { ascent_steps: 0, .. }) => Err("no ascent step".into()),
            Method::Sam(Sam { perturbation, ascent_steps, second_order, .. })
                if perturbation != Perturbation::L2 && (ascent_steps > 1 || second_order) =>
            {
                Err("several ascent steps and the second-order term are for p = 2".into())
            }
            Method::Sam(Sam { ascent_steps, second_order: true, .. }) if ascent_steps > 1 => {
                Err("the second-order term is for one ascent step".into())
            }
            Method::Gnr(Gnr { every: 0, .. }) | Method::LookSam { every: 0, .. } => Err("every 0 steps".into()),
            _ => Ok(()),
        }
    }
}
