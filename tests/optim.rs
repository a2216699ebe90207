//! The sharpness-aware methods on functions with closed forms: golden directions, convergence, and the rules for steps that
//! cannot be taken.

mod common;

use polder::device::{Buffer, Device, Result, Scalar, Slice, SliceMut};
use polder::objective::{Objective, Statistics};
use polder::optim::{Base, CrSamTerms, Form, Method, Norm, Optimizer, Settings};

/// A loss and its gradient, written down on the host in double.
struct Function<F> {
    len: usize,
    f: F,
    commits: usize,
}

impl<T: Scalar, F: FnMut(&[f64]) -> (f64, Vec<f64>)> Objective<T> for Function<F> {
    fn len(&self) -> usize {
        self.len
    }

    fn gradient(
        &mut self,
        weights: Slice<'_, T>,
        _: Statistics,
        mut gradient: SliceMut<'_, T>,
        mut loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        let w: Vec<f64> = common::to_f64(&weights.to_vec()?);
        let (value, slope) = (self.f)(&w);
        if !value.is_finite() || slope.iter().any(|g| !g.is_finite()) {
            flag.write(&[1])?;
        }
        let slope: Vec<T> = slope.into_iter().map(T::from_f64).collect();
        gradient.write(&slope)?;
        loss.write(&[value])
    }

    fn commit(&mut self, skip: Slice<'_, u32>) -> Result<()> {
        self.commits += usize::from(skip.to_vec()? == [0]);
        Ok(())
    }
}

fn function<F: FnMut(&[f64]) -> (f64, Vec<f64>)>(len: usize, f: F) -> Function<F> {
    Function { len, f, commits: 0 }
}

/// ½(10x² + y²), and (x⁴ + y⁴)/4 more if asked for.
fn bowl(quartic: bool) -> impl FnMut(&[f64]) -> (f64, Vec<f64>) {
    let q = if quartic { 1.0 } else { 0.0 };
    move |w| {
        let (x, y) = (w[0], w[1]);
        let loss = 0.5 * (10.0 * x * x + y * y) + q * (x.powi(4) + y.powi(4)) / 4.0;
        (loss, vec![10.0 * x + q * x.powi(3), y + q * y.powi(3)])
    }
}

fn sgd(method: Method, len: usize) -> Settings {
    let base = Base::Sgd { momentum: 0.0, nesterov: false };
    Settings { method, base, weight_decay: 0.0, decay_len: len }
}

fn cr_sam(form: Form) -> Method {
    Method::CrSam { rho: 0.1, terms: CrSamTerms { form, alpha: 0.1, beta: 0.01, a_min: 1e-8, b_min: 1e-8 } }
}

/// The direction of one step from (1, 1): with a learning rate of one, what is subtracted.
fn direction<T: Scalar>(device: &Device, method: Method, quartic: bool) -> (Vec<f64>, polder::optim::Telemetry) {
    let mut objective = function(2, bowl(quartic));
    let mut weights: Buffer<T> = device.upload(&[T::from_f64(1.0); 2]).unwrap();
    let mut optimizer = Optimizer::new(device, 2, sgd(method, 2)).unwrap();
    optimizer.step(&mut objective, &mut weights, 1.0).unwrap();
    let moved = common::to_f64(&weights.to_vec().unwrap());
    (moved.iter().map(|w| 1.0 - w).collect(), optimizer.telemetry().unwrap())
}

#[test]
fn golden_directions() {
    let sam = Method::Sam { rho: 0.1, norm: Norm::Two };
    let golden = [
        ("SAM", sam, false, [10.99503719, 1.00995037]),
        ("CR-SAM released", cr_sam(Form::Released), false, [11.01493793, 1.01014938]),
        ("CR-SAM log", cr_sam(Form::Log), false, [11.00493818, 1.01004938]),
        ("quartic, CR-SAM released", cr_sam(Form::Released), true, [12.34043093, 2.07414310]),
        ("quartic, CR-SAM log", cr_sam(Form::Log), true, [12.36613425, 2.07466923]),
        // sign(g) is (1, 1): the gradient at (1.1, 1.1).
        ("SAM, p = inf", Method::Sam { rho: 0.1, norm: Norm::Infinity }, false, [11.0, 1.1]),
        ("plain", Method::Plain, true, [11.0, 2.0]),
    ];
    for (name, method, quartic, expected) in golden {
        for (device_name, device) in common::host_devices() {
            let (found, telemetry) = direction::<f64>(&device, method, quartic);
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-8, "{name} on {device_name}: {found} instead of {expected}");
            }
            assert_eq!((telemetry.skipped, telemetry.dropped_alpha, telemetry.dropped_beta), (0, 0, 0));
        }
        for (device_name, device) in common::devices() {
            let (found, _) = direction::<f32>(&device, method, quartic);
            for (found, expected) in found.iter().zip(expected) {
                // f32: gradients of size 12 are rounded to 5e-7, and the log form divides their difference by A = 0.13.
                assert!((found - expected).abs() < 2e-5, "{name}, f32 on {device_name}: {found} instead of {expected}");
            }
        }
    }
    let (_, telemetry) = direction::<f64>(&Device::host(), cr_sam(Form::Log), true);
    let (a, b) = (telemetry.a.unwrap(), telemetry.b.unwrap());
    assert!((a - 0.12716690).abs() < 5e-9 && (b - 2.23798420).abs() < 5e-9, "A {a}, B {b}");
    assert!((telemetry.vhv.unwrap() - a / 0.01).abs() < 1e-12);
    assert!((telemetry.gradient_norm - 125f64.sqrt()).abs() < 1e-12);
}

#[test]
fn a_parabola_converges_with_every_method_and_base() {
    let target = [1.0, -1.0, 1.0];
    let methods =
        [Method::Plain, Method::Sam { rho: 0.05, norm: Norm::Two }, Method::Sam { rho: 0.05, norm: Norm::Infinity }];
    // Near the minimum B vanishes with the gradient and the log form's 1/B grows: a higher threshold drops the term there.
    let terms = CrSamTerms { form: Form::Log, alpha: 0.1, beta: 0.01, a_min: 1e-8, b_min: 1e-2 };
    let methods = methods.into_iter().chain([Method::CrSam { rho: 0.1, terms }, cr_sam(Form::Released)]);
    for method in methods {
        for (base, lr, steps) in [
            (Base::Sgd { momentum: 0.9, nesterov: false }, 0.02, 400),
            (Base::Sgd { momentum: 0.9, nesterov: true }, 0.02, 400),
            (Base::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }, 0.05, 2000),
        ] {
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
                optimizer.step(&mut objective, &mut weights, rate).unwrap();
            }
            let found = weights.to_vec().unwrap();
            let error = found.iter().zip(target).map(|(w, t)| (w - t).abs()).fold(0.0, f64::max);
            assert!(error < 0.02, "{method:?} over {base:?}: {found:?}");
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
    optimizer.step(&mut saddle, &mut weights, 1.0).unwrap();
    let telemetry = optimizer.telemetry().unwrap();
    assert!(telemetry.a.unwrap() < 0.0);
    assert_eq!((telemetry.dropped_alpha, telemetry.dropped_beta), (1, 0));
    // Without the α-term: g+ + β (g+ − g−)/B.
    let v = [-0.8, 0.6];
    let gradient = |side: f64| [-2.0 * (2.0 + side * 0.1 * v[0]), 3.0];
    let loss = |side: f64| -(2.0 + side * 0.1 * v[0]).powi(2) + 3.0 * side * 0.1 * v[1];
    let b = loss(1.0) - loss(-1.0);
    let moved = weights.to_vec().unwrap();
    for (axis, start) in [2.0, 0.0].into_iter().enumerate() {
        let expected = gradient(1.0)[axis] + 0.01 * (gradient(1.0)[axis] - gradient(-1.0)[axis]) / b;
        assert!((start - moved[axis] - expected).abs() < 1e-9);
    }

    // A constant: no gradient, no curvature, no slope; nothing moves, and nothing is NaN.
    let mut flat = function(2, |_: &[f64]| (1.0, vec![0.0, 0.0]));
    for method in [Method::Plain, Method::Sam { rho: 0.1, norm: Norm::Two }, cr_sam(Form::Log)] {
        let mut weights = device.upload(&[0.3f64, -7.0]).unwrap();
        let mut optimizer = Optimizer::new(&device, 2, sgd(method, 2)).unwrap();
        optimizer.step(&mut flat, &mut weights, 1.0).unwrap();
        assert_eq!(weights.to_vec().unwrap(), [0.3, -7.0], "{method:?}");
        assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
    }
}

#[test]
fn a_step_with_a_bad_pass_changes_nothing_and_is_counted() {
    let methods = [(Method::Plain, 1), (Method::Sam { rho: 0.1, norm: Norm::Two }, 2), (cr_sam(Form::Log), 3)];
    for (method, passes) in methods {
        for base in [Base::Sgd { momentum: 0.9, nesterov: false }, Base::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }]
        {
            for (bad_pass, bad_value) in (0..passes).flat_map(|pass| [(pass, f64::NAN), (pass, f64::INFINITY)]) {
                for bad_loss in [true, false] {
                    let device = Device::host();
                    let (mut calls, mut quartic) = (0, bowl(true));
                    let mut objective = function(2, |w: &[f64]| {
                        let (mut loss, mut gradient) = quartic(w);
                        if calls == passes + bad_pass {
                            if bad_loss { loss = bad_value } else { gradient[1] = bad_value }
                        }
                        calls += 1;
                        (loss, gradient)
                    });
                    let settings = Settings { base, weight_decay: 0.01, ..sgd(method, 2) };
                    let mut weights = device.upload(&[1.0f32, -1.0]).unwrap();
                    let mut optimizer = Optimizer::new(&device, 2, settings).unwrap();
                    optimizer.step(&mut objective, &mut weights, 0.1).unwrap();
                    let momentum = optimizer.state().momentum.to_vec().unwrap();
                    let before = weights.to_vec().unwrap();
                    optimizer.step(&mut objective, &mut weights, 0.1).unwrap();
                    let what = format!("{method:?} over {base:?}, {bad_value} in pass {bad_pass}, loss {bad_loss}");
                    assert_eq!(common::bits(&weights.to_vec().unwrap()), common::bits(&before), "{what}");
                    assert_eq!(common::bits(&optimizer.state().momentum.to_vec().unwrap()), common::bits(&momentum));
                    assert_eq!(optimizer.telemetry().unwrap().skipped, 1, "{what}");
                    optimizer.step(&mut objective, &mut weights, 0.1).unwrap();
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
    let method = Method::Sam { rho: 0.5, norm: Norm::Two };
    for base in [Base::Sgd { momentum: 0.9, nesterov: false }, Base::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 }] {
        let settings = Settings { method, base, weight_decay: 0.1, decay_len: 2 };
        let mut weights = device.upload(&[1.0f64, 2.0, 3.0, 4.0]).unwrap();
        let mut optimizer = Optimizer::new(&device, 4, settings).unwrap();
        optimizer.step(&mut flat, &mut weights, 0.5).unwrap();
        common::assert_close("decayed", &weights.to_vec().unwrap(), &[0.95, 1.9, 3.0, 4.0], 1e-15);
    }
    assert!(Optimizer::<f64>::new(&device, 4, Settings { decay_len: 5, ..sgd(method, 4) }).is_err());
}
