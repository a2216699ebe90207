//! The sharpness-aware methods on functions with closed forms: golden directions, convergence, and the rules for steps
//! that cannot be taken.

use std::sync::Arc;

use approx::{abs_diff_eq, assert_abs_diff_eq, relative_eq};

use crate::common;
use crate::common::methods::AnyMethod;
use polder::arena::Matrix;
use polder::device::{Buffer, Device, Error, Result, Scalar, SliceMut};
use polder::kernels::vector::Rate;
use polder::kernels::{random, vector};
use polder::objective::{Domain, Objective, Pass, Passes};
use polder::optim::{
    Along, Asam, Base, CrSam, Form, FriendlySam, Gam, Gnr, Group, Gsam, Hvp, LookSam, Msam, Norm, Optimizer, Oracle,
    Part, Perturbed, RSam, RandomSam, SaSam, Sam, Sampa, Sassha, Settings, Sharpness, SnapshotError, Telemetry, Wsam,
};

/// A loss and its gradient, computed on the host in double. Its products with the Hessian are central differences,
/// which for the functions here are exact up to rounding.
struct Function<F> {
    len: usize,
    f: F,
    commits: usize,
}

impl<T: Scalar, F: FnMut(&[f64]) -> (f64, Vec<f64>)> Objective<T> for Function<F> {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.len)
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, mut flag, .. } => {
                let w: Vec<f64> = common::to_f64(&weights.to_vec()?);
                let (value, slope) = (self.f)(&w);
                if !value.is_finite() || slope.iter().any(|g| !g.is_finite()) {
                    flag.write(&[1])?;
                }
                let slope: Vec<T> = slope.into_iter().map(T::from_f64).collect();
                gradient.write(&slope)?;
                loss.write(&[value])
            }
            Pass::HessianVector { weights, direction, mut product, mut flag } => {
                let [w, d] = [weights, direction].map(|vector| vector.to_vec().map(|values| common::to_f64(&values)));
                let mut finite = true;
                let mut f = |w: &[f64]| {
                    let (loss, slope) = (self.f)(w);
                    finite &= loss.is_finite();
                    (loss, slope)
                };
                let found = hessian_times(&mut f, &w?, &d?);
                if !finite || found.iter().any(|value| !value.is_finite()) {
                    flag.write(&[1])?;
                }
                product.write(&found.into_iter().map(T::from_f64).collect::<Vec<T>>())
            }
            Pass::Commit { skip } => {
                self.commits += usize::from(skip.to_vec()? == [0]);
                Ok(())
            }
            other => other.split(self),
        }
    }
}

/// The loss and its gradient at a point.
type LossAndGradient<'a> = dyn FnMut(&[f64]) -> (f64, Vec<f64>) + 'a;

/// A fourth-order central difference along the normalised direction. For polynomials of degree four or less it is exact
/// up to rounding.
fn hessian_times(f: &mut LossAndGradient<'_>, w: &[f64], d: &[f64]) -> Vec<f64> {
    let norm = d.iter().map(|d| d * d).sum::<f64>().sqrt();
    if norm == 0.0 {
        return vec![0.0; w.len()];
    }
    let h = 0.05;
    let mut at = |step: f64| f(&w.iter().zip(d).map(|(w, d)| w + step * h * d / norm).collect::<Vec<_>>()).1;
    let (a, b, c, e) = (at(1.0), at(-1.0), at(2.0), at(-2.0));
    (0..w.len()).map(|i| norm * (8.0 * (a[i] - b[i]) - (c[i] - e[i])) / (12.0 * h)).collect()
}

fn function<F: FnMut(&[f64]) -> (f64, Vec<f64>)>(len: usize, f: F) -> Function<F> {
    Function { len, f, commits: 0 }
}

/// ½(10x² + y²), plus (x⁴ + y⁴)/4 if `quartic`.
fn bowl(quartic: bool) -> impl FnMut(&[f64]) -> (f64, Vec<f64>) {
    let q = if quartic { 1.0 } else { 0.0 };
    move |w| {
        let (x, y) = (w[0], w[1]);
        let loss = 0.5 * (10.0 * x * x + y * y) + q * (x.powi(4) + y.powi(4)) / 4.0;
        (loss, vec![10.0 * x + q * x.powi(3), y + q * y.powi(3)])
    }
}

fn sgd<T: Scalar>(method: AnyMethod, len: usize) -> Settings<T> {
    Settings { decay_len: len, ..method.over(Base::sgd(0.0)) }
}

const CR_SAM: CrSam = CrSam {
    rho: 0.1,
    alpha: 0.1,
    beta: 0.01,
    form: Form::Log,
    a_min: 1e-8,
    b_min: 1e-8,
    direction: Along::Gradient,
    seed: 0,
    loss_error: 0.0,
};

fn cr_sam(form: Form) -> AnyMethod {
    CrSam { form, ..CR_SAM }.into()
}

const GAM: AnyMethod = AnyMethod::Gam(Gam { rho: 0.02, rho_norm: 0.2, beta0: 0.5, beta1: 0.6, gamma: 0.03 });

/// c = γ/(1 − γ) is 3.
const WSAM: Wsam = Wsam { rho: 0.1, gamma: 0.75, sharpness: Sharpness::Decoupled };

const SA_SAM: SaSam = SaSam { eta0: 0.02, delta: 0.02, theta0: 1.0, damping: 0.5, perturb: true };

const GNR: Gnr =
    Gnr { rho: 0.1, alpha: 0.1, hvp: Hvp::Exact, hvp_radius: 0.01, oracle: Oracle::Loss, oracle_rho: 0.05, every: 1 };

fn gnr(hvp: Hvp) -> AnyMethod {
    Gnr { hvp, ..GNR }.into()
}

/// Gradients and products of a method's most expensive step.
fn passes(method: AnyMethod) -> Passes {
    method.boxed::<f64>().passes()
}

/// The direction of one step from (1, 1): with a learning rate of one, what is subtracted.
fn direction<T: Scalar>(device: &Device, method: AnyMethod, quartic: bool) -> (Vec<f64>, Telemetry) {
    let mut objective = function(2, bowl(quartic));
    let mut weights: Buffer<T> = device.upload(&[T::from_f64(1.0); 2]).unwrap();
    let mut optimizer = Optimizer::new(device, 2, sgd(method, 2)).unwrap();
    optimizer.step(&mut objective, weights.view_mut(), 1.0).unwrap();
    let moved = common::to_f64(&weights.to_vec().unwrap());
    (moved.iter().map(|w| 1.0 - w).collect(), optimizer.telemetry().unwrap())
}

#[test]
fn golden_directions() {
    let sam = AnyMethod::sam(0.1);
    let golden = [
        ("SAM", sam, false, [10.99503719, 1.00995037]),
        ("CR-SAM released", cr_sam(Form::Released), false, [11.01493793, 1.01014938]),
        ("CR-SAM log", cr_sam(Form::Log), false, [11.00493818, 1.01004938]),
        ("quartic, CR-SAM released", cr_sam(Form::Released), true, [12.34043093, 2.07414310]),
        ("quartic, CR-SAM log", cr_sam(Form::Log), true, [12.36613425, 2.07466923]),
        // sign(g) is (1, 1): the gradient at (1.1, 1.1).
        ("SAM, p = inf", Sam { p_norm: Norm::Infinity, ..Sam::new(0.1) }.into(), false, [11.0, 1.1]),
        // Only x is perturbed, by 0.1: the gradient at (1.1, 1).
        (
            "SAM-ON",
            Sam { perturb: Perturbed::Normalisation, normalisation: Some((0, 1)), ..Sam::new(0.1) }.into(),
            false,
            [11.0, 1.0],
        ),
        ("plain", AnyMethod::PLAIN, true, [11.0, 2.0]),
        ("GAM", GAM, false, [10.99920221, 1.00139611]),
        // g + 3 (g₊ − g), with g₊ from SAM above. Without momentum both forms subtract it.
        ("WSAM", WSAM.into(), false, [12.98511157, 1.02985111]),
        ("WSAM, coupled", Wsam { sharpness: Sharpness::Coupled, ..WSAM }.into(), false, [12.98511157, 1.02985111]),
        // The gradient is (10, 1), and 0.1 of h_norm = (0.99588500, 0.00906259) is added.
        ("GNR, exact", gnr(Hvp::Exact), false, [10.099588500, 1.000906259]),
        ("GNR, differences", gnr(Hvp::Difference), false, [10.099588500, 1.000906259]),
    ];
    for (name, method, quartic, expected) in golden {
        for (device_name, device) in common::host_devices() {
            let (found, telemetry) = direction::<f64>(&device, method, quartic);
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    abs_diff_eq!(*found, expected, epsilon = 1e-8),
                    "{name} on {device_name}: {found} instead of {expected}"
                );
            }
            assert_eq!(telemetry.skipped, 0);
            assert!(telemetry.counters.iter().all(|(_, count)| *count == 0), "{name}: {:?}", telemetry.counters);
        }
        for (device_name, device) in common::devices() {
            let (found, _) = direction::<f32>(&device, method, quartic);
            for (found, expected) in found.iter().zip(expected) {
                // f32: gradients of size 12 are rounded to 5e-7, and the log form divides their difference by A = 0.13.
                assert!(
                    abs_diff_eq!(*found, expected, epsilon = 2e-5),
                    "{name}, f32 on {device_name}: {found} instead of {expected}"
                );
            }
        }
    }
    let (_, telemetry) = direction::<f64>(&Device::host(), cr_sam(Form::Log), true);
    let (a, b) = (telemetry.get("a").unwrap(), telemetry.get("b").unwrap());
    assert!(abs_diff_eq!(a, 0.12716690, epsilon = 5e-9) && abs_diff_eq!(b, 2.23798420, epsilon = 5e-9), "A {a}, B {b}");
    assert_abs_diff_eq!(telemetry.get("vhv").unwrap(), a / 0.01, epsilon = 1e-12);
    assert_abs_diff_eq!(telemetry.gradient_norm, 125f64.sqrt(), epsilon = 1e-12);
}

#[test]
fn msam_takes_the_gradient_ahead_of_the_momentum() {
    // The weights rest at (1, 1). The first step has no momentum; after it the momentum lies along g = (10, 1), and the
    // second step is taken at (1, 1) − 0.1 g/‖g‖, whose gradient is g less 0.1 (100, 1)/√101.
    let step_back = 0.1 / 101f64.sqrt();
    let second = [10.0 - 100.0 * step_back, 1.0 - step_back];
    let of_bases = [(Base::sgd(0.9), 0.9, 1.0), (Base::AdamW { beta1: 0.8, beta2: 0.999, eps: 1e-8 }, 0.8, 0.2)];
    for (base, kept, added) in of_bases {
        let device = Device::host();
        let mut weights = device.upload(&[1.0f64; 2]).unwrap();
        let mut optimizer = Optimizer::new(&device, 2, Settings::new(Msam { rho: 0.1 }, base)).unwrap();
        optimizer.observe(true);
        for expected in [[10.0, 1.0], second] {
            let before = optimizer.state().momentum.to_vec().unwrap();
            optimizer.step(&mut function(2, bowl(false)), weights.view_mut(), 0.0).unwrap();
            let after = optimizer.state().momentum.to_vec().unwrap();
            let found: Vec<f64> = after.iter().zip(&before).map(|(m, old)| (m - kept * old) / added).collect();
            common::assert_close(&format!("{base:?}"), &found, &expected, 1e-12);
        }
        // The perturbation is the intended one, although it goes against the vector that it follows.
        assert_abs_diff_eq!(optimizer.telemetry().unwrap().cosine_perturbation.unwrap(), 1.0, epsilon = 1e-12);
    }
}

/// A recorded step finds its learning rate on the device.
#[test]
fn a_rate_on_the_device_moves_the_weights_beside_the_base_too() {
    let device = Device::host();
    let start: Vec<f32> = common::Random(6).vector(9);
    let (rate, groups) = (device.upload(&[0.02]).unwrap(), [0..4, 4..9]);
    let after = [false, true].map(|on_device| {
        let mut weights = device.upload(&start).unwrap();
        let mut optimizer = Optimizer::new(&device, 9, Settings::new(WSAM, Base::ADAMW)).unwrap();
        let lr = || if on_device { Rate::Device(rate.view()) } else { Rate::Fixed(0.02) };
        for _ in 0..3 {
            let group = |place| Group { place, base: Base::ADAMW, weight_decay: 0.1, lr: lr() };
            let groups = groups.clone().map(group);
            optimizer.step_groups(&mut function(9, coupled()), weights.view_mut(), &groups).unwrap();
            optimizer.step(&mut function(9, coupled()), weights.view_mut(), lr()).unwrap();
        }
        common::bits(&weights.to_vec().unwrap())
    });
    assert_eq!(after[0], after[1]);
    assert_ne!(after[0], common::bits(&start));
}

/// Every method and mode. Random directions have a seed, ASAM scales two of three weights.
fn family() -> Vec<AnyMethod> {
    let sam = Sam::new(0.05);
    vec![
        AnyMethod::PLAIN,
        sam.into(),
        Sam { p_norm: Norm::Infinity, ..sam }.into(),
        Asam { rho: 0.1, eta: 0.01, scaled_len: 2 }.into(),
        RandomSam { rho: 0.05, seed: 11 }.into(),
        Sam { ascent_steps: 3, ..sam }.into(),
        Sam { ascent_steps: 3, ascent_length: Some(0.02), ..sam }.into(),
        Sam { ascent_steps: 2, ascent_length: Some(0.3), ..sam }.into(),
        Sam { second_order: true, ..sam }.into(),
        Sam { perturb: Perturbed::Normalisation, normalisation: Some((1, 2)), ..sam }.into(),
        cr_sam(Form::Log),
        cr_sam(Form::Released),
        CrSam { form: Form::Released, direction: Along::Random, seed: 13, ..CR_SAM }.into(),
        GNR.into(),
        Gnr { hvp: Hvp::Difference, ..GNR }.into(),
        Gnr { oracle: Oracle::Sam, every: 2, ..GNR }.into(),
        Gnr { oracle: Oracle::Sam, hvp: Hvp::Difference, ..GNR }.into(),
        GAM,
        SA_SAM.into(),
        SaSam { perturb: false, ..SA_SAM }.into(),
        SaSam { damping: 1.0, ..SA_SAM }.into(),
        Gsam { rho: 0.05, alpha: 0.1 }.into(),
        LookSam { rho: 0.05, alpha: 0.7, every: 3 }.into(),
        RSam { rho: 0.05, sigma: 0.05, seed: 12 }.into(),
        FriendlySam { rho: 0.05, sigma: 0.9, lambda: 0.6 }.into(),
        Msam { rho: 0.05 }.into(),
        Wsam { rho: 0.05, ..WSAM }.into(),
        Wsam { rho: 0.05, sharpness: Sharpness::Coupled, ..WSAM }.into(),
        Sassha { rho: 0.05, every: 3, seed: 14 }.into(),
        Sampa { rho: 0.05, lambda: 0.3 }.into(),
    ]
}

// ---- The family once more, from the formulas, in double on the host ------------------------------------------------

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// a + s b
fn plus(a: &[f64], s: f64, b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + s * b).collect()
}

fn times(s: f64, a: &[f64]) -> Vec<f64> {
    a.iter().map(|a| s * a).collect()
}

/// A method's memory, the number of the step, and the base optimizer's momentum; empty before the first step. `beside`
/// is what the newest step subtracts beside the base optimizer, times the learning rate.
#[derive(Default)]
struct Past {
    step: u64,
    momentum: Vec<f64>,
    beside: Vec<f64>,
    previous: Vec<f64>,
    eta: f64,
    theta: f64,
    orthogonal: Vec<f64>,
    average: Vec<f64>,
    curvature: Vec<f64>,
    correction: f64,
    kept: Vec<f64>,
}

/// The learning rate of the steps that [`reference`] is compared with.
const RATE: f64 = 0.02;

impl Past {
    /// AdGD's step size η and its growth θ, from the last two points.
    fn adapt(
        &mut self,
        f: &mut LossAndGradient<'_>,
        w: &[f64],
        g: &[f64],
        (delta, eta0, theta0, damping): (f64, f64, f64, f64),
    ) {
        if self.previous.is_empty() {
            (self.eta, self.theta) = (eta0, theta0);
        } else {
            let (moved, before) = (plus(w, -1.0, &self.previous), f(&self.previous).1);
            let changed = plus(g, -1.0, &before);
            let grown = (1.0 + delta * self.theta).sqrt() * self.eta;
            let eta = (damping * norm(&moved) / norm(&changed)).min(grown);
            (self.theta, self.eta) = (eta / self.eta, eta);
        }
        self.previous = w.to_vec();
    }

    /// Sassha's direction, from the gradient and in some steps the curvature at the perturbed point.
    fn sassha(&mut self, f: &mut LossAndGradient<'_>, there: &[f64], every: u64, seed: u64) -> Vec<f64> {
        let (n, t) = (there.len(), self.step as i32 + 1);
        self.average.resize(n, 0.0);
        self.curvature.resize(n, 0.0);
        self.average = plus(&times(0.9, &self.average), 0.1, &f(there).1);
        if self.step.is_multiple_of(every) {
            let mut z = Device::host().zeros::<f64>(n).unwrap();
            random::rademacher(z.view_mut(), seed, self.step * 4 * n.div_ceil(4) as u64).unwrap();
            let z = z.to_vec().unwrap();
            let diagonal = hessian_times(f, there, &z);
            let magnitude: Vec<f64> = diagonal.iter().zip(&z).map(|(h, z)| (h * z).abs()).collect();
            self.curvature = plus(&times(0.999, &self.curvature), 0.001, &magnitude);
            self.correction = 1.0 - 0.999f64.powi(t);
        }
        let scale = 1.0 - 0.9f64.powi(t);
        let divisor = |curvature: f64| (curvature / self.correction).sqrt() + 1e-4;
        self.average.iter().zip(&self.curvature).map(|(m, d)| m / scale / divisor(*d)).collect()
    }
}

/// The displacement after some steps of length ρ along the gradient, each projected onto the ball of radius ρ.
fn projected_ascent(f: &mut LossAndGradient<'_>, w: &[f64], rho: f64, (steps, length): (usize, f64)) -> Vec<f64> {
    let mut displacement = vec![0.0; w.len()];
    for _ in 0..steps {
        let there = f(&plus(w, 1.0, &displacement)).1;
        displacement = plus(&displacement, length / norm(&there), &there);
        if norm(&displacement) > rho {
            displacement = times(rho / norm(&displacement), &displacement);
        }
    }
    displacement
}

fn gam_direction(gam: Gam, f: &mut LossAndGradient<'_>, w: &[f64], g: &[f64]) -> Vec<f64> {
    let Gam { rho, rho_norm, beta0, beta1, gamma } = gam;
    let g1 = f(&plus(w, rho / norm(g), g)).1;
    let d = plus(&g1, -1.0, g);
    let there = plus(w, rho_norm / norm(&d), &d);
    let g2 = f(&there).1;
    let g3 = f(&plus(&there, rho / norm(&g2), &g2)).1;
    let sum = plus(&times(beta1, &g1), 1.0 - beta1, &g3);
    let m = plus(g, (1.0 - beta0).abs(), &g2);
    let orthogonal = plus(&m, -dot(&m, &sum) / dot(&sum, &sum), &sum);
    plus(&sum, -gamma, &orthogonal)
}

/// The direction and, if the method has its own, the step size.
fn reference(method: AnyMethod, f: &mut LossAndGradient<'_>, w: &[f64], past: &mut Past) -> (Vec<f64>, Option<f64>) {
    let (l0, g) = f(w);
    past.beside = vec![0.0; w.len()];
    let v = times(1.0 / norm(&g), &g);
    // The numbers of this step's block of the stream.
    let drawn = |seed: u64| -> Vec<f64> {
        let mut z = Device::host().zeros::<f64>(w.len()).unwrap();
        random::normal(z.view_mut(), seed, past.step * 4 * w.len().div_ceil(4) as u64).unwrap();
        let z = z.to_vec().unwrap();
        times(1.0 / norm(&z), &z)
    };
    let direction = match method {
        AnyMethod::Plain(_) => g,
        AnyMethod::Sam(Sam { rho, p_norm: Norm::Infinity, .. }) => {
            f(&plus(w, rho, &g.iter().map(|g| g.signum()).collect::<Vec<_>>())).1
        }
        AnyMethod::Asam(Asam { rho, eta, scaled_len }) => {
            let t: Vec<f64> = (0..w.len()).map(|i| if i < scaled_len { w[i].abs() + eta } else { 1.0 }).collect();
            let tg: Vec<f64> = t.iter().zip(&g).map(|(t, g)| t * g).collect();
            let ttg: Vec<f64> = t.iter().zip(&tg).map(|(t, g)| t * g).collect();
            f(&plus(w, rho / norm(&tg), &ttg)).1
        }
        AnyMethod::RandomSam(RandomSam { rho, seed }) => f(&plus(w, rho, &drawn(seed))).1,
        AnyMethod::Sam(Sam { rho, perturb: Perturbed::Normalisation, normalisation, .. }) => {
            let (start, end) = normalisation.unwrap();
            let part: Vec<f64> =
                g.iter().enumerate().map(|(i, g)| if (start..end).contains(&i) { *g } else { 0.0 }).collect();
            f(&plus(w, rho / norm(&part), &part)).1
        }
        AnyMethod::Sam(Sam { rho, second_order: true, .. }) => {
            let adversarial = f(&plus(w, rho, &v)).1;
            let tangent = plus(&adversarial, -dot(&v, &adversarial), &v);
            plus(&adversarial, rho / norm(&g), &hessian_times(f, w, &tangent))
        }
        AnyMethod::Sam(Sam { rho, ascent_steps, ascent_length, .. }) => {
            let displacement = projected_ascent(f, w, rho, (ascent_steps, ascent_length.unwrap_or(rho)));
            f(&plus(w, 1.0, &displacement)).1
        }
        AnyMethod::CrSam(CrSam { rho, alpha, beta, form, direction, seed, .. }) => {
            let v = if direction == Along::Random { drawn(seed) } else { v };
            let ((l1, g1), (l2, g2)) = (f(&plus(w, rho, &v)), f(&plus(w, -rho, &v)));
            let (a, b) = if form == Form::Log { (l1 + l2 - 2.0 * l0, l1 - l2) } else { (1.0, 1.0) };
            let curved = plus(&plus(&g1, 1.0, &g2), -2.0, &g);
            plus(&plus(&g1, alpha / a, &curved), beta / b, &plus(&g1, -1.0, &g2))
        }
        AnyMethod::Gnr(Gnr { rho, alpha, every, oracle, oracle_rho, .. }) => {
            let oracle = if oracle == Oracle::Sam { f(&plus(w, oracle_rho, &v)).1 } else { g.clone() };
            if past.step.is_multiple_of(every) {
                let change = hessian_times(f, w, &v);
                let there = plus(w, rho / norm(&change), &change);
                let gradient = f(&there).1;
                plus(&oracle, alpha * rho / norm(&gradient), &hessian_times(f, &there, &gradient))
            } else {
                oracle
            }
        }
        AnyMethod::Gam(gam) => gam_direction(gam, f, w, &g),
        AnyMethod::SaSam(SaSam { delta, eta0, theta0, damping, perturb }) => {
            past.adapt(f, w, &g, (delta, eta0, theta0, damping));
            if perturb { f(&plus(w, past.eta.sqrt(), &v)).1 } else { g }
        }
        AnyMethod::Gsam(Gsam { rho, alpha }) => {
            let there = f(&plus(w, rho, &v)).1;
            let orthogonal = plus(&g, -dot(&g, &there) / dot(&there, &there), &there);
            plus(&there, -alpha, &orthogonal)
        }
        AnyMethod::LookSam(LookSam { rho, alpha, every }) => {
            if past.step.is_multiple_of(every) {
                let there = f(&plus(w, rho, &v)).1;
                past.orthogonal = plus(&there, -dot(&there, &v), &v);
                there
            } else {
                plus(&g, alpha * norm(&g) / norm(&past.orthogonal), &past.orthogonal)
            }
        }
        AnyMethod::FriendlySam(FriendlySam { rho, sigma, lambda }) => {
            let first = past.average.is_empty();
            let d = if first { g.clone() } else { plus(&g, -sigma, &past.average) };
            past.average = if first { g } else { plus(&times(lambda, &past.average), 1.0 - lambda, &g) };
            f(&plus(w, rho / norm(&d), &d)).1
        }
        AnyMethod::Wsam(Wsam { rho, gamma, sharpness }) => {
            let term = times(gamma / (1.0 - gamma), &plus(&f(&plus(w, rho, &v)).1, -1.0, &g));
            if sharpness == Sharpness::Coupled {
                plus(&g, 1.0, &term)
            } else {
                past.beside = term;
                g
            }
        }
        AnyMethod::Msam(Msam { rho }) => {
            let moved = norm(&past.momentum) > 0.0;
            if moved { f(&plus(w, -rho / norm(&past.momentum), &past.momentum)).1 } else { g }
        }
        AnyMethod::Sassha(Sassha { rho, every, seed }) => {
            let there = plus(w, rho, &v);
            past.sassha(f, &there, every, seed)
        }
        AnyMethod::Sampa(Sampa { rho, lambda }) => {
            let kept = std::mem::take(&mut past.kept);
            if kept.is_empty() {
                past.kept.clone_from(&g);
                g
            } else {
                let there = f(&plus(w, rho / norm(&kept), &kept)).1;
                past.kept = f(&plus(w, -RATE, &kept)).1;
                plus(&times(1.0 - lambda, &there), lambda, &past.kept)
            }
        }
        AnyMethod::RSam(RSam { rho, sigma, seed }) => {
            let there = f(&plus(w, sigma, &drawn(seed))).1;
            f(&plus(w, rho / norm(&there), &there)).1
        }
    };
    past.step += 1;
    let own = matches!(method, AnyMethod::SaSam(_)).then_some(past.eta);
    (direction, own)
}

/// A quartic in nine dimensions whose Hessian is not diagonal.
fn coupled() -> impl FnMut(&[f64]) -> (f64, Vec<f64>) {
    let mut random = common::Random(5);
    let factor: Vec<Vec<f64>> = (0..9).map(|_| random.vector(9)).collect();
    move |w| {
        let rows: Vec<f64> = factor.iter().map(|row| dot(row, w)).collect();
        let quartic = w.iter().map(|w| w.powi(4)).sum::<f64>() / 4.0;
        let slope = (0..9).map(|j| (0..9).map(|i| factor[i][j] * rows[i]).sum::<f64>() + w[j].powi(3)).collect();
        (dot(&rows, &rows) / 2.0 + quartic, slope)
    }
}

#[test]
fn every_method_follows_its_formula_for_several_steps() {
    let start: Vec<f64> = common::Random(6).vector(9);
    for method in family() {
        for clip in [None, Some(0.7)] {
            let (lr, momentum, decay, mut past) = (RATE, 0.9, 0.01, Past::default());
            let (mut w64, mut m64, mut f) = (start.clone(), vec![0.0; 9], coupled());
            for _ in 0..5 {
                let (mut g, own) = reference(method, &mut f, &w64, &mut past);
                if let Some(largest) = clip {
                    g = times((largest / (norm(&g) + 1e-6)).min(1.0), &g);
                }
                m64 = plus(&times(momentum, &m64), 1.0, &plus(&g, decay, &w64));
                past.momentum.clone_from(&m64);
                w64 = plus(&plus(&w64, -own.unwrap_or(lr), &m64), -lr, &past.beside);
            }
            for (name, device) in common::host_devices() {
                let mut weights = device.upload(&start).unwrap();
                let settings = Settings { weight_decay: decay, clip, ..method.over(Base::sgd(momentum)) };
                let mut optimizer = Optimizer::new(&device, 9, settings).unwrap();
                let mut objective = function(9, coupled());
                for _ in 0..5 {
                    optimizer.step(&mut objective, weights.view_mut(), lr).unwrap();
                }
                // GNR's own differences of gradients have a radius of 0.01; the reference's are of fourth order.
                let approximate = matches!(method, AnyMethod::Gnr(Gnr { hvp: Hvp::Difference, .. }));
                let what = format!("{method:?}, clip {clip:?} on {name}");
                let tolerance = if approximate { 1e-5 } else { 1e-9 };
                common::assert_close(&what, &weights.to_vec().unwrap(), &w64, tolerance);
                assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
            }
        }
    }
}

#[test]
fn least_squares_has_its_analytic_products() {
    // ‖Xw − y‖²/2n: the Hessian is XᵀX/n everywhere, so GNR adds αρ H ĝ(w_adv) with w_adv = w + ρ Hĝ/‖Hĝ‖.
    let (n, len) = (9, 4);
    let mut random = common::Random(53);
    let (x, y): (Vec<f64>, Vec<f64>) = (random.vector(n * len), random.vector(n));
    let start: Vec<f64> = random.vector(len);
    let gradient = |w: &[f64]| -> (f64, Vec<f64>) {
        let residuals: Vec<f64> = (0..n).map(|i| dot(&x[i * len..][..len], w) - y[i]).collect();
        let slope = |k: usize| (0..n).map(|i| residuals[i] * x[i * len + k]).sum::<f64>() / n as f64;
        (dot(&residuals, &residuals) / (2.0 * n as f64), (0..len).map(slope).collect())
    };
    let hessian = |d: &[f64]| -> Vec<f64> {
        let images: Vec<f64> = (0..n).map(|i| dot(&x[i * len..][..len], d)).collect();
        (0..len).map(|k| (0..n).map(|i| images[i] * x[i * len + k]).sum::<f64>() / n as f64).collect()
    };
    let g = gradient(&start).1;
    let f = hessian(&g);
    let g_adv = gradient(&plus(&start, 0.1 / norm(&f), &f)).1;
    let expected = plus(&g, 0.1 * 0.1 / norm(&g_adv), &hessian(&g_adv));
    let device = Device::host();
    for (hvp, tolerance) in [(Hvp::Exact, 1e-12), (Hvp::Difference, 1e-10)] {
        let mut weights = device.upload(&start).unwrap();
        let mut optimizer = Optimizer::<f64>::new(&device, len, sgd(gnr(hvp), len)).unwrap();
        optimizer.step(&mut function(len, gradient), weights.view_mut(), 1.0).unwrap();
        let step = plus(&start, -1.0, &weights.to_vec().unwrap());
        common::assert_close(&format!("{hvp:?}"), &step, &expected, tolerance);
    }
}

#[test]
fn groups_take_perturbations_of_their_own_and_one_group_changes_no_bit() {
    let half = |scale: f64| {
        let mut f = coupled();
        move |w: &[f64]| {
            let (loss, slope) = f(&times(scale, w));
            (loss, times(scale, &slope))
        }
    };
    struct Grouped<F> {
        parts: Vec<F>,
        group: usize,
    }
    impl<F: FnMut(&[f64]) -> (f64, Vec<f64>)> Objective<f64> for Grouped<F> {
        fn domain(&self) -> Domain<'_> {
            Domain { groups: self.parts.len(), ..Domain::of_len(9) }
        }
        fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
            match pass {
                Pass::Gradient { weights, mut gradient, mut loss, .. } => {
                    let (value, slope) = (self.parts[self.group])(&weights.to_vec()?);
                    loss.write(&[value])?;
                    gradient.write(&slope)
                }
                Pass::Select { group } => {
                    self.group = group;
                    Ok(())
                }
                other => other.split(self),
            }
        }
    }
    let start: Vec<f64> = common::Random(6).vector(9);
    let base = Base::Sgd { momentum: 0.0, nesterov: false };
    let gsam = Gsam { rho: 0.05, alpha: 0.1 }.into();
    let random = RandomSam { rho: 0.05, seed: 4 }.into();
    let r_sam = RSam { rho: 0.05, sigma: 0.2, seed: 4 }.into();
    for method in [AnyMethod::sam(0.05), cr_sam(Form::Log), GAM, gsam, random, r_sam, WSAM.into()] {
        let device = Device::host();
        let step = |objective: &mut dyn FnMut(&mut Optimizer<f64>, &mut Buffer<f64>)| {
            let mut weights = device.upload(&start).unwrap();
            let mut optimizer = Optimizer::new(&device, 9, method.over(base)).unwrap();
            objective(&mut optimizer, &mut weights);
            weights.to_vec().unwrap()
        };
        let found = step(&mut |optimizer, weights| {
            let mut objective = Grouped { parts: vec![half(1.0), half(0.5), half(-0.8)], group: 0 };
            optimizer.step(&mut objective, weights.view_mut(), 0.1).unwrap();
        });
        // The first step's groups draw the numbers that the first three steps would draw without groups.
        let mean = [(0, 1.0), (1, 0.5), (2, -0.8)].map(|(step, scale)| {
            let mut past = Past { step, ..Past::default() };
            let (followed, _) = reference(method, &mut half(scale), &start, &mut past);
            plus(&followed, 1.0, &past.beside)
        });
        let mean = times(1.0 / 3.0, &plus(&plus(&mean[0], 1.0, &mean[1]), 1.0, &mean[2]));
        common::assert_close(&format!("{method:?}"), &found, &plus(&start, -0.1, &mean), 1e-12);

        let one = step(&mut |optimizer, weights| {
            let mut objective = Grouped { parts: vec![half(0.5)], group: 0 };
            optimizer.step(&mut objective, weights.view_mut(), 0.1).unwrap();
        });
        let plain = step(&mut |optimizer, weights| {
            optimizer.step(&mut function(9, half(0.5)), weights.view_mut(), 0.1).unwrap();
        });
        assert_eq!(common::bits(&one), common::bits(&plain), "{method:?}");
    }
    let device = Device::host();
    let settings = Settings::new(LookSam { rho: 0.05, alpha: 0.7, every: 2 }, base);
    let mut optimizer = Optimizer::new(&device, 9, settings).unwrap();
    let mut weights = device.upload(&start).unwrap();
    let mut objective = Grouped { parts: vec![half(1.0), half(0.5)], group: 0 };
    assert!(optimizer.step(&mut objective, weights.view_mut(), 0.1).unwrap_err().to_string().contains("with memory"));
}

#[test]
fn a_step_whose_update_is_zero_leaves_every_bit() {
    for method in family() {
        let device = Device::host();
        let start: Vec<f32> = common::Random(8).vector(9);
        let mut weights = device.upload(&start).unwrap();
        // SA-SAM computes its own step size. It begins so small that no weight moves, and grows by 1 % a step.
        let method = match method {
            AnyMethod::SaSam(method) => SaSam { eta0: 1e-300, ..method }.into(),
            other => other,
        };
        let base = Base::Sgd { momentum: 0.9, nesterov: true };
        let mut optimizer = Optimizer::new(&device, 9, method.over(base)).unwrap();
        let mut objective = function(9, coupled());
        for _ in 0..50 {
            optimizer.step(&mut objective, weights.view_mut(), 0.0).unwrap();
        }
        assert_eq!(common::bits(&weights.to_vec().unwrap()), common::bits(&start), "{method:?}");
        assert_eq!(optimizer.telemetry().unwrap().skipped, 0, "{method:?}");
    }
}

/// Weights in memory of another library, at addresses that no pack of numbers is aligned to.
#[test]
fn borrowed_weights_get_the_bits_of_owned_ones() {
    let start: Vec<f64> = common::Random(9).vector(9);
    for method in family() {
        let device = Device::host();
        let mut owned = device.upload(&start).unwrap();
        let mut foreign = [&[7.0][..], &start, &[7.0]].concat();
        let [mut of_owned, mut of_foreign] = [(); 2].map(|()| Optimizer::new(&device, 9, sgd(method, 9)).unwrap());
        for _ in 0..4 {
            of_owned.step(&mut function(9, coupled()), owned.view_mut(), 0.01).unwrap();
            let address = (&raw mut foreign[1]).expose_provenance() as u64;
            // SAFETY: nine live numbers of this test, which nobody else uses during the step.
            let borrowed = unsafe { SliceMut::from_raw(&device, address, 9) }.unwrap();
            of_foreign.step(&mut function(9, coupled()), borrowed, 0.01).unwrap();
        }
        assert_eq!(common::bits(&foreign[1..10]), common::bits(&owned.to_vec().unwrap()), "{method:?}");
        assert_eq!([foreign[0], foreign[10]], [7.0; 2], "{method:?}");
        assert_ne!(foreign[1..10], start, "{method:?}");
    }
}

/// Everything long in memory of another library.
#[test]
fn foreign_memory_gets_the_bits_of_own_memory() {
    let start: Vec<f64> = common::Random(9).vector(9);
    for (method, base) in family().into_iter().flat_map(|method| [(method, Base::sgd(0.9)), (method, Base::ADAMW)]) {
        let device = Device::host();
        let (mut parts, mut memory) = (Vec::new(), Vec::new());
        let mut foreign = Optimizer::with_memory(&device, 9, method.over(base), |part, len| {
            let mut block = vec![0.0; len].into_boxed_slice();
            let address = block.as_mut_ptr().expose_provenance() as u64;
            parts.push((part, len));
            memory.push(block);
            // SAFETY: so many numbers of this test, which live as long as the optimizer.
            if len == 0 { device.zeros(0) } else { unsafe { Buffer::from_raw(&device, address, len) } }
        })
        .unwrap();
        assert_eq!(parts.iter().map(|(part, _)| *part).collect::<Vec<_>>(), Part::ALL);
        let mut own = Optimizer::new(&device, 9, method.over(base)).unwrap();
        let mut after = [&mut own, &mut foreign].map(|optimizer| {
            let mut weights = device.upload(&start).unwrap();
            for _ in 0..4 {
                optimizer.step(&mut function(9, coupled()), weights.view_mut(), 0.01).unwrap();
            }
            weights.to_vec().unwrap()
        });
        assert_eq!(common::bits(&after[0]), common::bits(&after[1]), "{method:?}");
        after[0].copy_from_slice(&memory[0]);
        assert_eq!(after[0], own.state().momentum.to_vec().unwrap(), "{method:?}: the memory was not used");
    }
    let device = Device::host();
    let short = Optimizer::<f64>::with_memory(&device, 9, sgd(AnyMethod::sam(0.1), 9), |_, _| device.zeros(8));
    assert!(matches!(short.err(), Some(Error::Length { argument: "momentum", found: 8, expected: 9, .. })));
}

/// Leaves some tensors of each gradient in memory of its own, which are other ones in every second pass.
struct Leaving<F> {
    function: Function<F>,
    passes: usize,
    /// Passes that could leave tensors.
    asked: usize,
    /// Gradients that are still held.
    held: Arc<()>,
}

impl<T: Scalar, F: FnMut(&[f64]) -> (f64, Vec<f64>)> Objective<T> for Leaving<F> {
    fn domain(&self) -> Domain<'_> {
        Objective::<T>::domain(&self.function)
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> Result<()> {
        let Pass::ScatteredGradient { weights, running_stats, mut gradient, scattered, loss, flag, norm } = pass else {
            return if matches!(pass, Pass::GradientDisplaced { .. } | Pass::GradientPairDisplaced { .. }) {
                pass.split(self)
            } else {
                self.function.pass(pass)
            };
        };
        assert!(scattered.tensors.is_empty());
        let mut found = weights.device().zeros(weights.len())?;
        self.function.pass(Pass::Gradient { weights, running_stats, gradient: found.view_mut(), loss, flag })?;
        if let Some((reduction, norm)) = norm {
            vector::l2_norm(found.view(), reduction, norm)?;
        }
        gradient.copy_from(found.view())?;
        let places = [[0..2, 5..9], [1..6, 6..6]][self.passes % 2].clone();
        for place in places.into_iter().filter(|place| !place.is_empty()) {
            let tensor = weights.device().upload(&found.slice(place.clone())?.to_vec()?)?;
            // Who reads the vector as a whole finds this.
            gradient.slice_mut(place.clone())?.write(&vec![T::from_f64(f64::NAN); place.len()])?;
            scattered.tensors.push((place, tensor));
        }
        scattered.owner = Some(Box::new(self.held.clone()));
        self.passes += 1;
        self.asked += 1;
        Ok(())
    }
}

/// Whatever a method does with its gradients, it does not matter where their tensors lie.
#[test]
fn gradients_left_where_they_are_give_the_bits_of_gathered_ones() {
    let start: Vec<f64> = common::Random(9).vector(9);
    let device = Device::host();
    let group = |place, base, decay: f64| Group { place, base, weight_decay: decay, lr: 0.01.into() };
    for (method, base) in family().into_iter().flat_map(|method| [(method, Base::sgd(0.9)), (method, Base::ADAMW)]) {
        for (clip, observe) in [(None, false), (Some(0.5), false), (None, true)] {
            let settings = || Settings { clip, weight_decay: 0.01, decay_len: 7, ..method.over(base) };
            let mut optimizers = [(); 2].map(|()| Optimizer::new(&device, 9, settings()).unwrap());
            let mut weights = [(); 2].map(|()| device.upload(&start).unwrap());
            let mut leaving = Leaving { function: function(9, coupled()), passes: 0, asked: 0, held: Arc::new(()) };
            for step in 0..6 {
                let what = format!("{method:?}, {base:?}, clip {clip:?}, observed {observe}, step {step}");
                for (number, (optimizer, weights)) in optimizers.iter_mut().zip(&mut weights).enumerate() {
                    let mut plain = function(9, coupled());
                    leaving.asked = 0;
                    let objective: &mut dyn Objective<f64> = if number == 0 { &mut plain } else { &mut leaving };
                    optimizer.observe(observe);
                    if step % 2 == 0 {
                        optimizer.step(objective, weights.view_mut(), 0.01).unwrap();
                    } else {
                        let groups = [group(0..4, base, 0.1), group(4..9, base, 0.0)];
                        optimizer.step_groups(objective, weights.view_mut(), &groups).unwrap();
                    }
                }
                let [plain, left] = weights.each_ref().map(|weights| common::bits(&weights.to_vec().unwrap()));
                assert_eq!(plain, left, "{what}");
                let [plain, left] = optimizers.each_ref().map(|optimizer| optimizer.telemetry().unwrap());
                assert_eq!(plain, left, "{what}");
                assert_eq!(Arc::strong_count(&leaving.held), 1, "{what}: a gradient is still held");
                // These methods never need a gradient as a whole.
                let whole = clip.is_some() || observe;
                let pair = matches!(method, AnyMethod::CrSam(CrSam { direction: Along::Gradient, .. }));
                if pair || matches!(method, AnyMethod::Plain(_)) || method == AnyMethod::sam(0.05) {
                    let gradients = if whole { 0 } else { passes(method).gradients };
                    assert_eq!(leaving.asked as u64, gradients, "{what}");
                }
            }
        }
    }
}

#[test]
fn groups_have_their_own_updates() {
    let device = Device::host();
    let start: Vec<f64> = common::Random(5).vector(9);
    for base in [Base::sgd(0.9), Base::ADAMW] {
        let method = AnyMethod::sam(0.1);
        let group = |place, weight_decay, lr: f64| Group { place, base, weight_decay, lr: lr.into() };
        let mut grouped = device.upload(&start).unwrap();
        let mut optimizer = Optimizer::new(&device, 9, method.over(base)).unwrap();
        let groups = [group(0..4, 0.1, 0.02), group(5..9, 0.0, 0.05)];
        optimizer.step_groups(&mut function(9, coupled()), grouped.view_mut(), &groups).unwrap();
        let grouped = grouped.to_vec().unwrap();
        // Each part is that of a step in which all weights have its numbers.
        for Group { place, weight_decay, lr, .. } in groups {
            let mut whole = device.upload(&start).unwrap();
            let settings = Settings { weight_decay, ..method.over(base) };
            let mut optimizer = Optimizer::new(&device, 9, settings).unwrap();
            optimizer.step(&mut function(9, coupled()), whole.view_mut(), lr).unwrap();
            let whole = whole.to_vec().unwrap();
            assert_eq!(grouped[place.clone()], whole[place.clone()], "{base:?}, {place:?}");
            assert_ne!(grouped[place.clone()], start[place], "{base:?}");
        }
        assert_eq!(grouped[4], start[4], "{base:?}: a weight of no group moved");

        let mut weights = device.upload(&start).unwrap();
        let mut refused = |groups: &[Group<'_>]| {
            let error = optimizer.step_groups(&mut function(9, coupled()), weights.view_mut(), groups).unwrap_err();
            assert_eq!(weights.to_vec().unwrap(), start);
            error
        };
        assert!(matches!(refused(&[group(0..5, 0.0, 0.1), group(4..9, 0.0, 0.1)]), Error::Argument { .. }));
        assert!(matches!(refused(&[group(4..10, 0.0, 0.1)]), Error::Range { start: 4, end: 10, .. }));
        assert!(matches!(
            refused(&[group(0..4, 0.1, 0.1), group(5..10, 0.0, 0.1)]),
            Error::Range { start: 5, end: 10, .. }
        ));
        let other = Group { base: Base::External, ..group(0..9, 0.0, 0.1) };
        assert!(matches!(refused(&[other]), Error::Argument { .. }));
    }
}

/// What another optimizer is left to follow is what SGD subtracts.
#[test]
fn the_direction_alone_is_what_a_step_follows() {
    let device = Device::host();
    let start: Vec<f64> = common::Random(5).vector(9);
    for method in family() {
        let clipped = |base| Settings { clip: Some(0.5), ..method.over(base) };
        let mut weights = device.upload(&start).unwrap();
        let mut stepped = Optimizer::new(&device, 9, clipped(Base::sgd(0.0))).unwrap();
        let mut external = Optimizer::new(&device, 9, clipped(Base::External)).unwrap();
        let mut direction = device.poisoned(9).unwrap();
        let found = external.direction_into(&mut function(9, coupled()), weights.view(), direction.view_mut());
        if stepped.settings().method.needs_base() {
            assert!(matches!(found, Err(Error::Argument { .. })), "{method:?}");
            continue;
        }
        found.unwrap();
        stepped.step(&mut function(9, coupled()), weights.view_mut(), 1.0).unwrap();
        let expected: Vec<f64> = start.iter().zip(direction.to_vec().unwrap()).map(|(w, d)| w - d).collect();
        assert!(relative_eq!(&weights.to_vec().unwrap()[..], &expected[..], max_relative = 1e-14), "{method:?}");
        assert_eq!(external.telemetry().unwrap(), stepped.telemetry().unwrap(), "{method:?}");
        assert_eq!(external.state().momentum.len(), 0);
        let refused = external.step(&mut function(9, coupled()), weights.view_mut(), 1.0);
        assert!(matches!(refused, Err(Error::Range { .. } | Error::Argument { .. })), "{method:?}: {refused:?}");
    }
}

#[test]
fn new_numbers_of_a_method_hold_from_the_next_step_on() {
    let device = Device::host();
    let start: Vec<f64> = common::Random(7).vector(9);
    let gnr = |rho| AnyMethod::from(Gnr { hvp: Hvp::Difference, rho, alpha: 2.0, ..GNR });
    for [first, second] in [[AnyMethod::sam(0.1), AnyMethod::sam(0.3)], [gnr(0.1), gnr(0.3)]] {
        let mut weights = [&start, &start].map(|start| device.upload(start).unwrap());
        let mut changed = Optimizer::new(&device, 9, sgd(first, 9)).unwrap();
        let mut from_the_start = Optimizer::new(&device, 9, sgd(second, 9)).unwrap();
        changed.set_method(second.boxed()).unwrap();
        for (optimizer, weights) in [&mut changed, &mut from_the_start].into_iter().zip(&mut weights) {
            optimizer.step(&mut function(9, coupled()), weights.view_mut(), 0.01).unwrap();
        }
        assert_eq!(weights[0].to_vec().unwrap(), weights[1].to_vec().unwrap(), "{second:?}");
        for refused in [AnyMethod::sam(-1.0), GAM] {
            assert!(matches!(changed.set_method(refused.boxed()), Err(Error::Argument { .. })), "{refused:?}");
        }
    }
}

#[test]
fn half_the_radius_is_a_radius_of_half() {
    let device = Device::host();
    let start: Vec<f64> = common::Random(7).vector(9);
    let after = |method: AnyMethod, factor: f64| {
        let mut weights = device.upload(&start).unwrap();
        let mut optimizer = Optimizer::new(&device, 9, sgd(method, 9)).unwrap();
        optimizer.scale_rho(factor);
        for _ in 0..3 {
            optimizer.step(&mut function(9, coupled()), weights.view_mut(), 0.01).unwrap();
        }
        weights.to_vec().unwrap()
    };
    let gnr = |hvp, rho| AnyMethod::from(Gnr { hvp, rho, alpha: 2.0, ..GNR });
    let cases = [
        [AnyMethod::sam(0.1), AnyMethod::sam(0.05)],
        [CrSam { rho: 0.1, ..CrSam::default() }.into(), CrSam { rho: 0.05, ..CrSam::default() }.into()],
        [gnr(Hvp::Exact, 0.1), gnr(Hvp::Exact, 0.05)],
        [gnr(Hvp::Difference, 0.1), gnr(Hvp::Difference, 0.05)],
    ];
    for [method, of_half] in cases {
        let (found, expected) = (after(method, 0.5), after(of_half, 1.0));
        assert!(relative_eq!(&found[..], &expected[..], max_relative = 1e-11), "{method:?}: {found:?} {expected:?}");
        assert_ne!(found, after(method, 1.0), "{method:?}");
    }
}

#[test]
fn observed_steps_tell_the_cosines() {
    let device = Device::host();
    let start: Vec<f64> = common::Random(6).vector(9);
    let base = Base::Sgd { momentum: 0.0, nesterov: false };
    for method in [AnyMethod::sam(0.05), cr_sam(Form::Log), Gsam { rho: 0.05, alpha: 0.1 }.into()] {
        let mut weights = device.upload(&start).unwrap();
        let mut optimizer = Optimizer::new(&device, 9, method.over(base)).unwrap();
        optimizer.observe(true);
        optimizer.step(&mut function(9, coupled()), weights.view_mut(), 0.1).unwrap();
        let telemetry = optimizer.telemetry().unwrap();
        let g = coupled()(&start).1;
        let rho = if matches!(method, AnyMethod::CrSam(_)) { 0.1 } else { 0.05 };
        let (loss_there, there) = coupled()(&plus(&start, rho / norm(&g), &g));
        let rise = loss_there - coupled()(&start).0;
        assert!(rise > 0.0 && abs_diff_eq!(telemetry.sharpness.unwrap(), rise, epsilon = 1e-12), "{telemetry:?}");
        let expected = dot(&g, &there) / norm(&g) / norm(&there);
        assert!(
            abs_diff_eq!(telemetry.cosine_gradients.unwrap(), expected, epsilon = 1e-12),
            "{method:?}: {telemetry:?}"
        );
        assert!(
            abs_diff_eq!(telemetry.cosine_perturbation.unwrap(), 1.0, epsilon = 1e-12),
            "{method:?}: {telemetry:?}"
        );
    }
}

#[test]
fn a_parabola_converges_with_every_method_and_base() {
    let target = [1.0, -1.0, 1.0];
    // Near the minimum B vanishes with the gradient, and 1/B in the log form grows. A higher threshold drops the term
    // there.
    let raised = CrSam { b_min: 1e-2, ..CrSam::default() };
    let mut methods = family();
    // With the whole quotient, SA-SAM's cycle is wider than the bowl is curved.
    let whole_quotient = SaSam { damping: 1.0, ..SA_SAM }.into();
    methods.retain(|method| *method != cr_sam(Form::Log) && *method != whole_quotient);
    methods.push(raised.into());
    for method in methods {
        for (base, lr, steps) in [
            (Base::Sgd { momentum: 0.9, nesterov: false }, 0.02, 400),
            (Base::Sgd { momentum: 0.9, nesterov: true }, 0.02, 400),
            (Base::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }, 0.05, 2000),
        ] {
            // The step size of SA-SAM is that of gradient descent without momentum, Sassha has its own. SA-SAM's radius
            // does not fall: with η = 1/4, ρ = 1/2 it ends on a cycle at a distance of 1/6.
            let own_step = method.boxed::<f64>().has_momentum();
            // MSAM's gradient vanishes at a distance of ρ behind the minimum, wherever the momentum comes from.
            let tolerance = match method {
                AnyMethod::SaSam(SaSam { perturb: true, .. }) => 0.17,
                AnyMethod::Msam(Msam { rho }) => 1.1 * rho,
                _ => 0.02,
            };
            let base = if own_step { Base::Sgd { momentum: 0.0, nesterov: false } } else { base };
            let device = Device::host();
            let mut objective = function(3, |w: &[f64]| {
                let away: Vec<f64> = w.iter().zip(target).map(|(w, t)| w - t).collect();
                (away.iter().map(|d| d * d).sum(), away.iter().map(|d| 2.0 * d).collect())
            });
            let mut weights = device.upload(&[-1.0f64, 10.0, 1.0]).unwrap();
            let settings = Settings { base, ..sgd(method, 3) };
            let mut optimizer = Optimizer::new(&device, 3, settings).unwrap();
            for step in 0..steps {
                // The perturbation keeps its radius at the minimum: only a falling rate comes to rest there.
                let rate = lr * (1.0 - f64::from(step) / f64::from(steps));
                optimizer.step(&mut objective, weights.view_mut(), rate).unwrap();
            }
            let found = weights.to_vec().unwrap();
            let error = found.iter().zip(target).map(|(w, t)| (w - t).abs()).fold(0.0, f64::max);
            assert!(error < tolerance, "{method:?} over {base:?}: {found:?}");
        }
    }
}

#[test]
fn terms_of_vanishing_curvature_or_slope_are_dropped_and_counted() {
    // A saddle: along the gradient the curvature is negative, so A < 0 and the logarithm has no meaning.
    let mut saddle = function(2, |w: &[f64]| (-w[0] * w[0] + 3.0 * w[1], vec![-2.0 * w[0], 3.0]));
    let device = Device::host();
    let mut weights = device.upload(&[2.0f64, 0.0]).unwrap();
    let mut optimizer = Optimizer::new(&device, 2, sgd(cr_sam(Form::Log), 2)).unwrap();
    optimizer.step(&mut saddle, weights.view_mut(), 1.0).unwrap();
    let telemetry = optimizer.telemetry().unwrap();
    assert!(telemetry.get("a").unwrap() < 0.0);
    assert_eq!(telemetry.counters, [("dropped_alpha", 1), ("dropped_beta", 0)]);
    assert_eq!((telemetry.count("dropped_alpha"), telemetry.count("dropped")), (Some(1), None));
    assert_eq!(optimizer.state().counters.to_vec().unwrap(), [1, 0, 1, 0]);
    // Without the α-term: g+ + β (g+ − g−)/B.
    let v = [-0.8, 0.6];
    let gradient = |side: f64| [-2.0 * (2.0 + side * 0.1 * v[0]), 3.0];
    let loss = |side: f64| -(2.0 + side * 0.1 * v[0]).powi(2) + 3.0 * side * 0.1 * v[1];
    let b = loss(1.0) - loss(-1.0);
    let moved = weights.to_vec().unwrap();
    for (axis, start) in [2.0, 0.0].into_iter().enumerate() {
        let expected = gradient(1.0)[axis] + 0.01 * (gradient(1.0)[axis] - gradient(-1.0)[axis]) / b;
        assert_abs_diff_eq!(start - moved[axis], expected, epsilon = 1e-9);
    }

    // A constant: no gradient, no curvature, no slope; nothing moves, and nothing is NaN.
    let mut flat = function(2, |_: &[f64]| (1.0, vec![0.0, 0.0]));
    for method in family() {
        let mut weights = device.upload(&[0.3f64, -7.0]).unwrap();
        let mut optimizer = Optimizer::new(&device, 2, sgd(method, 2)).unwrap();
        optimizer.step(&mut flat, weights.view_mut(), 1.0).unwrap();
        assert_eq!(weights.to_vec().unwrap(), [0.3, -7.0], "{method:?}");
        assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
    }
}

/// Evaluations of the function in the first two steps.
fn passes_of(method: AnyMethod) -> [usize; 2] {
    let device = Device::host();
    let mut weights = device.upload(&[1.0f32, -1.0]).unwrap();
    let mut optimizer = Optimizer::new(&device, 2, sgd(method, 2)).unwrap();
    let passes = [0, 1].map(|_| {
        let (mut calls, mut quartic) = (0, bowl(true));
        let mut objective = function(2, |w: &[f64]| {
            calls += 1;
            quartic(w)
        });
        optimizer.step(&mut objective, weights.view_mut(), 0.1).unwrap();
        calls
    });
    let Passes { gradients, products } = self::passes(method);
    // SAMPa's first step has nothing to ascend along.
    let most = passes[0].max(passes[1]) as u64;
    assert_eq!(most, gradients + 4 * products, "{method:?}: a product here is four gradients");
    passes
}

/// A skipped step does not change a method's memory.
#[test]
fn a_skipped_step_leaves_no_trace_in_what_a_method_remembers() {
    for method in family().into_iter().filter(|method| method.boxed::<f64>().needs().memory > 0) {
        let device = Device::host();
        let mut weights = device.upload(&common::Random(6).vector::<f64>(9)).unwrap();
        let base = Base::Sgd { momentum: 0.0, nesterov: false };
        let mut optimizer = Optimizer::new(&device, 9, method.over(base)).unwrap();
        for step in 0..8 {
            let (mut calls, mut f) = (0u64, coupled());
            let mut objective = function(9, |w: &[f64]| {
                let (loss, mut slope) = f(w);
                calls += 1;
                // The newest pass of the fourth step, in which LookSAM renews what it keeps.
                if step == 3 && calls == passes(method).gradients {
                    slope[4] = f64::NAN;
                }
                (loss, slope)
            });
            let (memory, scalars) =
                (optimizer.state().memory.to_vec().unwrap(), optimizer.state().scalars.to_vec().unwrap());
            optimizer.step(&mut objective, weights.view_mut(), 0.01).unwrap();
            if step == 3 {
                assert_eq!(
                    common::bits(&optimizer.state().memory.to_vec().unwrap()),
                    common::bits(&memory),
                    "{method:?}"
                );
                common::assert_close("scalars", &optimizer.state().scalars.to_vec().unwrap(), &scalars, 1e-15);
            }
        }
        assert_eq!(optimizer.telemetry().unwrap().skipped, 1, "{method:?}");
        assert!(weights.to_vec().unwrap().iter().all(|w| w.is_finite()));
    }
}

#[test]
fn a_step_with_a_bad_pass_changes_nothing_and_is_counted() {
    for method in family() {
        // The gradients that differences for products with the Hessian take count as passes, too.
        let [first, second] = passes_of(method);
        for base in [Base::sgd(0.9), Base::ADAMW, Base::MUON] {
            for (bad_pass, bad_value) in (0..second).flat_map(|pass| [(pass, f64::NAN), (pass, f64::INFINITY)]) {
                for bad_loss in [true, false] {
                    let device = Device::host();
                    let (mut calls, mut quartic) = (0, bowl(true));
                    let mut objective = function(2, |w: &[f64]| {
                        let (mut loss, mut gradient) = quartic(w);
                        if calls == first + bad_pass {
                            if bad_loss { loss = bad_value } else { gradient[1] = bad_value }
                        }
                        calls += 1;
                        (loss, gradient)
                    });
                    let settings = Settings { base, weight_decay: 0.01, ..sgd(method, 2) };
                    let mut weights = device.upload(&[1.0f32, -1.0]).unwrap();
                    let mut optimizer = Optimizer::new(&device, 2, settings).unwrap();
                    optimizer.step(&mut objective, weights.view_mut(), 0.1).unwrap();
                    let momentum = optimizer.state().momentum.to_vec().unwrap();
                    let before = weights.to_vec().unwrap();
                    optimizer.step(&mut objective, weights.view_mut(), 0.1).unwrap();
                    let what = format!("{method:?} over {base:?}, {bad_value} in pass {bad_pass}, loss {bad_loss}");
                    assert_eq!(common::bits(&weights.to_vec().unwrap()), common::bits(&before), "{what}");
                    assert_eq!(common::bits(&optimizer.state().momentum.to_vec().unwrap()), common::bits(&momentum));
                    let Telemetry { skipped, counters, .. } = optimizer.telemetry().unwrap();
                    assert_eq!(skipped, 1, "{what}");
                    assert!(counters.iter().all(|(_, count)| *count == 0), "{what}: {counters:?}");
                    optimizer.step(&mut objective, weights.view_mut(), 0.1).unwrap();
                    assert_ne!(weights.to_vec().unwrap(), before, "{what}: training goes on");
                    assert_eq!(optimizer.state().counters.to_vec().unwrap()[..2], [2, 1], "{what}");
                    assert_eq!(objective.commits, 2, "{what}");
                }
            }
        }
    }
}

#[test]
fn weight_decay_acts_on_the_prefix_only_and_does_not_bend_the_perturbation() {
    // The gradient is zero, so only decay moves the weights; SAM's ascent must not follow it.
    let device = Device::host();
    let mut flat = function(4, |w: &[f64]| {
        assert_eq!(w, [1.0, 2.0, 3.0, 4.0]);
        (1.0, vec![0.0; 4])
    });
    let method = AnyMethod::sam(0.5);
    for base in [Base::Sgd { momentum: 0.9, nesterov: false }, Base::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }] {
        let settings = Settings { weight_decay: 0.1, decay_len: 2, ..method.over(base) };
        let mut weights = device.upload(&[1.0f64, 2.0, 3.0, 4.0]).unwrap();
        let mut optimizer = Optimizer::new(&device, 4, settings).unwrap();
        optimizer.step(&mut flat, weights.view_mut(), 0.5).unwrap();
        common::assert_close("decayed", &weights.to_vec().unwrap(), &[0.95, 1.9, 3.0, 4.0], 1e-15);
    }
    let contradiction = Sam { p_norm: Norm::Infinity, ascent_steps: 2, ..Sam::new(0.1) };
    assert!(Optimizer::<f64>::new(&device, 4, sgd(contradiction.into(), 4)).is_err());
    let unknown = Sam { perturb: Perturbed::Normalisation, ..Sam::new(0.1) };
    for contradiction in [
        Sam { normalisation: Some((2, 2)), ..unknown },
        Sam { ascent_steps: 2, ..unknown },
        Sam { p_norm: Norm::Infinity, ..unknown },
        Sam { second_order: true, ..unknown },
    ] {
        let error =
            Optimizer::<f64>::new(&device, 4, sgd(contradiction.into(), 4)).err().map(|error| error.to_string());
        assert!(error.as_ref().is_some_and(|error| error.contains("perturb")), "{contradiction:?}: {error:?}");
    }
    let mut weights = device.upload(&[1.0f64, 2.0, 3.0, 4.0]).unwrap();
    let error = Optimizer::new(&device, 4, sgd(unknown.into(), 4)).unwrap().step(&mut flat, weights.view_mut(), 0.5);
    assert!(matches!(error, Err(Error::Argument { .. })), "{error:?}");
    let out_of_range = Sam::new(-0.1);
    assert!(Optimizer::<f64>::new(&device, 4, sgd(out_of_range.into(), 4)).is_err());
}

/// An objective whose passes launch nothing, so that only the method's own launches are counted.
struct Silent;

impl Objective<f32> for Silent {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(1000)
    }

    fn pass(&mut self, pass: Pass<'_, f32>) -> Result<()> {
        match pass {
            Pass::Gradient { .. } | Pass::HessianVector { .. } => Ok(()),
            other => other.split(self),
        }
    }
}

/// Launches of one step, as `docs/methods.md` lists them: kernels over vectors, second stages of reductions, formulas
/// of a few numbers, the clearing of the flag and the counting of the step.
#[test]
fn a_step_launches_no_more_than_its_table_says() {
    let launches =
        [5, 6, 6, 8, 8, 15, 15, 11, 11, 9, 8, 8, 11, 11, 12, 12, 13, 15, 12, 11, 12, 9, 12, 9, 11, 8, 7, 6, 8, 6];
    assert_eq!(launches.len(), family().len());
    let device = Device::host();
    for (method, expected) in family().into_iter().zip(launches) {
        let base = Base::Sgd { momentum: 0.9, nesterov: false };
        let mut optimizer = Optimizer::new(&device, 1000, method.over(base)).unwrap();
        let mut weights = device.zeros::<f32>(1000).unwrap();
        let graph = device.capture(|| optimizer.step(&mut Silent, weights.view_mut(), 0.1)).unwrap();
        assert_eq!(graph.operations(), expected, "{method:?}");
    }
}

/// An optimizer for nine weights, six of which are a matrix.
fn nine<T: Scalar>(device: &Device, method: AnyMethod, base: Base) -> Optimizer<T> {
    let matrices = vec![Matrix { offset: 1, rows: 2, columns: 3 }];
    Optimizer::new(device, 9, Settings { weight_decay: 0.01, matrices, ..method.over(base) }).unwrap()
}

fn resumes<T: Scalar>(device: &Device, method: AnyMethod, base: Base) {
    let start: Vec<T> = common::Random(6).vector(9);
    let mut weights = device.upload(&start).unwrap();
    let (mut whole, mut objective) = (nine::<T>(device, method, base), function(9, coupled()));
    let mut run = |optimizer: &mut Optimizer<T>, weights: &mut Buffer<T>| {
        (0..5).for_each(|_| optimizer.step(&mut objective, weights.view_mut(), 0.02).unwrap());
    };
    whole.scale_rho(0.7);
    run(&mut whole, &mut weights);
    let (snapshot, saved) = (whole.snapshot("it").unwrap(), weights.to_vec().unwrap());
    assert_eq!(snapshot.len(), whole.snapshot_len("it"));
    run(&mut whole, &mut weights);

    let mut resumed = nine::<T>(device, method, base);
    resumed.restore("it", &snapshot).unwrap();
    let mut again = device.upload(&saved).unwrap();
    run(&mut resumed, &mut again);
    assert_eq!(common::bits(&again.to_vec().unwrap()), common::bits(&weights.to_vec().unwrap()), "{method:?} {base:?}");
    assert_eq!(resumed.snapshot("it"), whole.snapshot("it"), "{method:?} {base:?}");
}

#[test]
fn a_restored_snapshot_continues_with_the_same_bits() {
    let device = Device::host();
    for method in family() {
        for base in [Base::Sgd { momentum: 0.9, nesterov: true }, Base::ADAMW, Base::MUON] {
            resumes::<f32>(&device, method, base);
            resumes::<f64>(&device, method, base);
        }
    }
}

#[test]
fn snapshots_that_do_not_fit_are_refused_and_change_nothing() {
    let device = Device::host();
    let (sgd, method) = (Base::sgd(0.9), AnyMethod::from(SA_SAM));
    let mut weights = device.upload(&common::Random(6).vector::<f64>(9)).unwrap();
    let (mut optimizer, mut objective) = (nine::<f64>(&device, method, sgd), function(9, coupled()));
    let other = optimizer.snapshot("sa-sam").unwrap();
    optimizer.step(&mut objective, weights.view_mut(), 0.02).unwrap();
    let before = optimizer.snapshot("sa-sam").unwrap();
    assert_ne!(other, before);

    for len in 0..other.len() {
        let error = optimizer.restore("sa-sam", &other[..len]).unwrap_err();
        let expected =
            if len < 8 { SnapshotError::Foreign } else { SnapshotError::Length { found: len, expected: other.len() } };
        assert_eq!(error, expected);
        let mut changed = other.clone();
        changed[len] ^= 0x10;
        assert_ne!(optimizer.restore("sa-sam", &changed), Ok(()), "byte {len}");
    }
    let longer = [&*other, &[0]].concat();
    let mut later = other.clone();
    later[8..16].copy_from_slice(&7u64.to_ne_bytes());
    for (bytes, message) in [
        (longer, format!("{} bytes", other.len() + 1)),
        (later, "version 7, expected 1".into()),
        (
            nine::<f64>(&device, AnyMethod::sam(0.1), sgd).snapshot("sam").unwrap(),
            "the method sam, the optimizer has sa".into(),
        ),
        (nine::<f64>(&device, method, Base::ADAMW).snapshot("sa-sam").unwrap(), "the base adamw".into()),
        (nine::<f32>(&device, method, sgd).snapshot("sa-sam").unwrap(), "the type f32".into()),
        (
            Optimizer::<f64>::new(&device, 10, method.over(sgd)).unwrap().snapshot("sa-sam").unwrap(),
            "the number of weights 10, the optimizer has 9".into(),
        ),
        // Another method under the same name.
        (nine::<f64>(&device, AnyMethod::PLAIN, sgd).snapshot("sa-sam").unwrap(), "bytes, expected".into()),
    ] {
        let error = optimizer.restore("sa-sam", &bytes).unwrap_err().to_string();
        assert!(error.contains(&message) && !error.contains('\n'), "{error:?}: {message:?}");
    }
    assert_eq!(optimizer.snapshot("sa-sam").unwrap(), before);
    optimizer.restore("sa-sam", &other).unwrap();
    assert_eq!(optimizer.snapshot("sa-sam").unwrap(), other);
}

/// Muon moves the matrix, AdamW the weights around it: with and without groups, and as the two would alone.
#[test]
fn muon_moves_matrices_and_adamw_the_rest() {
    let device = Device::host();
    let start: Vec<f64> = common::Random(6).vector(9);
    let (decay, lr) = (0.01, 0.02);
    let mut whole = device.upload(&start).unwrap();
    let mut of_whole = nine::<f64>(&device, AnyMethod::PLAIN, Base::MUON);
    let mut parted = device.upload(&start).unwrap();
    let mut of_parts = nine::<f64>(&device, AnyMethod::PLAIN, Base::MUON);
    let group = |place| Group { place, base: Base::MUON, weight_decay: decay, lr: lr.into() };
    let mut adamw = device.upload(&start).unwrap();
    let mut of_adamw = nine::<f64>(&device, AnyMethod::PLAIN, Base::ADAMW);
    of_whole.step(&mut function(9, coupled()), whole.view_mut(), lr).unwrap();
    of_parts.step_groups(&mut function(9, coupled()), parted.view_mut(), &[group(0..1), group(1..9)]).unwrap();
    of_adamw.step(&mut function(9, coupled()), adamw.view_mut(), lr).unwrap();
    let [found, parted, adamw] = [whole, parted, adamw].map(|weights| weights.to_vec().unwrap());
    assert_eq!(common::bits(&found), common::bits(&parted));
    for rest in [0..1, 7..9] {
        assert_eq!(common::bits(&found[rest.clone()]), common::bits(&adamw[rest]));
    }
    // After the first step the momentum is along the gradient. A matrix of two rows has a singular value decomposition
    // in closed form; here the five steps are taken as they are written.
    let g = &coupled()(&start).1[1..7];
    let orthogonal = common::newton_schulz(g, 2, 3);
    let expected: Vec<f64> =
        (0..6).map(|i| (1.0 - lr * decay) * start[1 + i] - lr * 0.2 * 3f64.sqrt() * orthogonal[i]).collect();
    common::assert_close("the matrix", &found[1..7], &expected, 1e-12);

    let cut = of_parts.step_groups(
        &mut function(9, coupled()),
        device.upload(&start).unwrap().view_mut(),
        &[group(0..4), group(4..9)],
    );
    assert!(matches!(&cut, Err(Error::Argument { message, .. }) if message.contains("cuts the matrix")), "{cut:?}");
}

#[test]
fn muon_without_matrices_or_with_impossible_ones_is_refused() {
    let device = Device::host();
    let matrix = |offset, rows, columns| Matrix { offset, rows, columns };
    let refused = |matrices: &[Matrix]| {
        let settings = Settings { matrices: matrices.to_vec(), ..AnyMethod::PLAIN.over(Base::MUON) };
        Optimizer::<f32>::new(&device, 9, settings).err().map(|error| error.to_string()).unwrap()
    };
    assert!(refused(&[]).contains("matrices among the weights"));
    assert!(refused(&[matrix(0, 0, 3)]).contains("0 x 3"));
    assert!(refused(&[matrix(4, 1, 2), matrix(5, 1, 2)]).contains("behind the one before"));
    for outside in [matrix(4, 2, 3), matrix(0, usize::MAX, 2), matrix(usize::MAX, 1, 1)] {
        assert!(refused(&[outside]).contains("does not lie in 9 weights"), "{outside:?}");
    }
}

/// The first gradient of a SAMPa step belongs to this step's batch, the other one to the batch of the last step that
/// was not skipped.
#[test]
fn sampa_perturbs_on_the_batch_before() {
    /// A bowl around another point in each step, which keeps the point of the step before.
    struct Batches {
        center: f64,
        kept: f64,
        bad: bool,
    }
    impl Objective<f64> for Batches {
        fn domain(&self) -> Domain<'_> {
            Domain::of_len(2)
        }
        fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
            match pass {
                Pass::Gradient { weights, mut gradient, mut loss, mut flag, .. } => {
                    let slope: Vec<f64> = weights.to_vec()?.iter().map(|w| w - self.center).collect();
                    loss.write(&[dot(&slope, &slope) / 2.0])?;
                    flag.write(&[u32::from(self.bad)])?;
                    gradient.write(&slope)
                }
                Pass::GradientAcross { weights, gradients: [g, h], losses: [l, m], mut flag } => {
                    let running_stats = polder::objective::RunningStats::Keep;
                    let [at, before] = weights;
                    let now = self.center;
                    self.center = self.kept;
                    self.pass(Pass::Gradient {
                        weights: before,
                        running_stats,
                        gradient: h,
                        loss: m,
                        flag: flag.reborrow(),
                    })?;
                    self.center = now;
                    self.pass(Pass::Gradient { weights: at, running_stats, gradient: g, loss: l, flag })
                }
                Pass::KeepBatch { skip } => {
                    if skip.to_vec()? == [0] {
                        self.kept = self.center;
                    }
                    Ok(())
                }
                other => other.split(self),
            }
        }
    }
    let device = Device::host();
    let method = AnyMethod::from(Sampa { rho: 0.1, lambda: 0.2 });
    let mut optimizer = Optimizer::new(&device, 2, method.over(Base::sgd(0.0))).unwrap();
    let mut weights = device.upload(&[1.0, -2.0]).unwrap();
    let mut objective = Batches { center: 0.5, kept: f64::NAN, bad: false };
    let from = |center: f64, w: &[f64]| -> Vec<f64> { w.iter().map(|w| w - center).collect() };
    let (mut w, mut kept, mut before) = (vec![1.0, -2.0], Vec::new(), f64::NAN);
    for (step, center) in [0.5, -0.3, 7.0, 0.8, 0.1].into_iter().enumerate() {
        (objective.center, objective.bad) = (center, step == 2);
        optimizer.step(&mut objective, weights.view_mut(), RATE).unwrap();
        if step == 0 {
            kept = from(center, &w);
            w = plus(&w, -RATE, &kept);
        } else if step != 2 {
            let there = from(before, &plus(&w, 0.1 / norm(&kept), &kept));
            kept = from(center, &plus(&w, -RATE, &kept));
            w = plus(&w, -RATE, &plus(&times(0.8, &there), 0.2, &kept));
        }
        if step != 2 {
            before = center;
        }
        common::assert_close(&format!("step {step}"), &weights.to_vec().unwrap(), &w, 1e-12);
    }
    assert_eq!(optimizer.telemetry().unwrap().skipped, 1);
    // With rates of their own, groups of weights have no common point ahead.
    let group = |place, lr: f64| Group { place, base: Base::sgd(0.0), weight_decay: 0.0, lr: lr.into() };
    optimizer.step_groups(&mut objective, weights.view_mut(), &[group(0..1, 0.1), group(1..2, 0.1)]).unwrap();
    let refused = optimizer.step_groups(&mut objective, weights.view_mut(), &[group(0..1, 0.1), group(1..2, 0.2)]);
    assert!(matches!(&refused, Err(Error::Argument { message, .. }) if message.contains("one learning rate")));
}
