//! Measures of curvature on functions whose Hessians are known.

use approx::{abs_diff_eq, assert_abs_diff_eq, assert_relative_eq, relative_eq};

use crate::common::{self, Grouped, Random, devices};
use nalgebra::DMatrix;
use polder::arena::{Initial, Layout, TensorKind};
use polder::curvature::{Curvature, Estimate, Passes, Rise, filter_normalized};
use polder::device::{Device, Result, Scalar, Slice};
use polder::nn::initial_weights;
use polder::objective::{Accumulator, Differences, Domain, Objective, ObjectiveExt, Pass, RunningStats, Wrapped};
use polder::plan::{Graph, Plan, PlanOptions, Shape};

/// ½ wᵀHw, H symmetric.
struct Quadratic {
    len: usize,
    hessian: Vec<f64>,
}

impl Quadratic {
    fn times(&self, vector: Slice<'_, f64>) -> Result<Vec<f64>> {
        let vector = vector.to_vec()?;
        let row = |row: &[f64]| row.iter().zip(&vector).map(|(h, v)| h * v).sum();
        Ok(self.hessian.chunks(self.len).map(row).collect())
    }
}

impl Objective<f64> for Quadratic {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.len)
    }

    fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, running_stats, mut gradient, mut loss, mut flag } => {
                assert_eq!(running_stats, RunningStats::Keep, "a measurement changes nothing");
                let slope = self.times(weights)?;
                let value: f64 = 0.5 * slope.iter().zip(weights.to_vec()?).map(|(g, w)| g * w).sum::<f64>();
                if !value.is_finite() {
                    flag.write(&[1])?;
                }
                loss.write(&[value])?;
                gradient.write(&slope)
            }
            Pass::HessianVector { direction, mut product, .. } => product.write(&self.times(direction)?),
            other => other.split(self),
        }
    }
}

#[test]
fn random_signs_find_the_trace_of_a_diagonal_exactly() {
    let device = Device::host();
    let mut objective = Quadratic { len: 3, hessian: vec![1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0] };
    let weights = device.upload(&[1.0, -1.0, 2.0]).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let found = curvature.trace(5, 1, |_| ()).unwrap();
    assert_eq!((found.value, found.standard_error, found.probes), (6.0, Some(0.0), 5));
    let halves = Estimate { standard_error: Some(1.5), ..found }.over(-2.0);
    assert_eq!((halves.value, halves.standard_error, halves.probes), (-3.0, Some(0.75), 5));
    assert_eq!(curvature.trace(1, 1, |_| ()).unwrap().standard_error, None);
    // The gradient is (1, −2, 6).
    assert_abs_diff_eq!(curvature.gradient_norm().unwrap(), 41f64.sqrt(), epsilon = 1e-15);
    let error = curvature.trace(0, 1, |_| ()).err().unwrap();
    assert!(error.to_string().contains("0 probes"), "{error}");
}

#[test]
fn the_trace_lies_within_its_error_and_the_error_is_the_right_one() {
    let device = Device::host();
    let len = 23;
    let mut objective = symmetric(&mut Random(3), len);
    let hessian = &objective.hessian;
    let trace: f64 = (0..len).map(|i| hessian[i * len + i]).sum();
    let squares: f64 = hessian.iter().map(|h| h * h).sum::<f64>();
    let diagonal: f64 = (0..len).map(|i| hessian[i * len + i].powi(2)).sum();
    let probes = 2000;
    let expected_error = (2.0 * (squares - diagonal) / probes as f64).sqrt();
    let weights = device.zeros(len).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let mut told = Vec::new();
    let found = curvature.trace(probes, 7, |probe| told.push(probe)).unwrap();
    assert_eq!(told, (1..=probes).collect::<Vec<_>>());
    let error = found.standard_error.unwrap();
    // The estimate of a deviation from 2,000 samples is itself good to about 2 %.
    assert!(abs_diff_eq!(error / expected_error, 1.0, epsilon = 0.1), "{error} instead of {expected_error}");
    assert!(abs_diff_eq!(found.value, trace, epsilon = 4.0 * error), "{} ± {error} instead of {trace}", found.value);
    // Other seeds draw other probes, the same seed the same.
    assert_ne!(curvature.trace(8, 8, |_| ()).unwrap(), curvature.trace(8, 7, |_| ()).unwrap());
    assert_eq!(curvature.trace(8, 7, |_| ()).unwrap(), curvature.trace(8, 7, |_| ()).unwrap());
}

fn symmetric(random: &mut Random, len: usize) -> Quadratic {
    let mut hessian = vec![0.0; len * len];
    for i in 0..len {
        for j in 0..=i {
            let value = random.normal();
            (hessian[i * len + j], hessian[j * len + i]) = (value, value);
        }
    }
    Quadratic { len, hessian }
}

/// All eigenvalues by a dense method, the largest first.
fn eigenvalues(len: usize, hessian: &[f64]) -> Vec<f64> {
    let dense = DMatrix::from_row_slice(len, len, hessian);
    let mut values: Vec<f64> = dense.symmetric_eigenvalues().iter().copied().collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

#[test]
fn lanczos_finds_the_eigenvalues_and_vectors_of_known_matrices() {
    let device = Device::host();
    let mut objective = Quadratic { len: 3, hessian: vec![1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0] };
    let weights = device.zeros(3).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let pairs = curvature.top_eigenvalues(3, (3, 1e-12), 1, |_| ()).unwrap();
    for (pair, expected) in pairs.iter().zip([3.0, 2.0, 1.0]) {
        assert!(
            abs_diff_eq!(pair.value, expected, epsilon = 1e-12) && pair.residual < 1e-12,
            "{} for {expected}",
            pair.value
        );
        let vector = pair.vector.to_vec().unwrap();
        for (index, component) in vector.iter().enumerate() {
            let there = if index == expected as usize - 1 { 1.0 } else { 0.0 };
            assert!(abs_diff_eq!(component.abs(), there, epsilon = 1e-12), "{vector:?}");
        }
    }
    assert_eq!(pairs.len(), 3);
    for (count, most) in [(0, 3), (4, 3)] {
        assert!(curvature.top_eigenvalues(count, (most, 0.0), 1, |_| ()).is_err());
    }

    let mut random = Random(13);
    let mut objective = symmetric(&mut random, 57);
    let expected = eigenvalues(57, &objective.hessian);
    let weights = device.zeros(57).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let mut steps = 0;
    let pairs = curvature.top_eigenvalues(4, (57, 1e-9), 2, |step| steps = step).unwrap();
    assert!(steps < 57, "ended by the tolerance, not by the size");
    for (pair, expected) in pairs.iter().zip(&expected) {
        assert!(
            abs_diff_eq!(pair.value, expected, epsilon = 1e-8) && pair.residual < 1e-7,
            "{} for {expected}",
            pair.value
        );
    }
    // Too few steps show in the residuals, which bound the error.
    let rough = curvature.top_eigenvalues(2, (6, 0.0), 2, |_| ()).unwrap();
    for pair in &rough {
        let nearest = expected.iter().map(|value| (value - pair.value).abs()).fold(f64::INFINITY, f64::min);
        assert!(pair.residual > 1e-3 && nearest <= pair.residual, "{} ± {}", pair.value, pair.residual);
    }
}

#[test]
fn a_hessian_of_few_different_eigenvalues_ends_the_steps() {
    let device = Device::host();
    let len = 12;
    let mut hessian = vec![0.0; len * len];
    (0..len).for_each(|i| hessian[i * len + i] = if i < 5 { 7.0 } else { -2.0 });
    let mut objective = Quadratic { len, hessian };
    let weights = device.zeros(len).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let pairs = curvature.top_eigenvalues(5, (12, 1e-9), 3, |_| ()).unwrap();
    let values: Vec<f64> = pairs.iter().map(|pair| (pair.value * 1e9).round() / 1e9).collect();
    assert_eq!(values, [7.0, -2.0]);
    let mut flat = Quadratic { len, hessian: vec![0.0; len * len] };
    let pairs = Curvature::new(&mut flat, weights.view()).unwrap().top_eigenvalues(2, (12, 1e-9), 3, |_| ()).unwrap();
    assert_eq!(pairs.iter().map(|pair| (pair.value, pair.residual)).collect::<Vec<_>>(), [(0.0, 0.0)]);
}

#[test]
fn the_density_has_the_moments_of_its_probes_and_the_shape_of_a_wishart_matrix() {
    let device = Device::host();
    let mut random = Random(19);
    // XᵀX/m: by Marchenko and Pastur's law its eigenvalues fill (1 ± sqrt(n/m))².
    let (n, m) = (90, 180);
    let x: Vec<f64> = random.vector(n * m);
    let mut hessian = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..n {
            hessian[i * n + j] = (0..m).map(|k| x[k * n + i] * x[k * n + j]).sum::<f64>() / m as f64;
        }
    }
    let expected = eigenvalues(n, &hessian);
    let mut objective = Quadratic { len: n, hessian };
    let weights = device.zeros(n).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let (probes, steps) = (12, 40);
    let density = curvature.spectral_density(probes, steps, 5, |_| ()).unwrap();
    assert_eq!(density.nodes.len(), probes * steps);
    let moment = |power: i32| -> f64 {
        density.nodes.iter().zip(&density.weights).map(|(node, weight)| weight * node.powi(power)).sum()
    };
    assert_abs_diff_eq!(moment(0), 1.0, epsilon = 1e-12);
    // The same probes' vᵀHv.
    let trace = curvature.trace(probes, 5, |_| ()).unwrap();
    assert_abs_diff_eq!(moment(1), trace.value / n as f64, epsilon = 1e-12);
    let squares = expected.iter().map(|value| value * value).sum::<f64>() / n as f64;
    assert!(abs_diff_eq!(moment(2) / squares, 1.0, epsilon = 0.1), "{} and {squares}", moment(2));
    let edge = (n as f64 / m as f64).sqrt();
    let inside = |value: f64| value > (1.0 - edge).powi(2) * 0.7 && value < (1.0 + edge).powi(2) * 1.1;
    assert!(density.nodes.iter().all(|&node| inside(node)));
    // What lies below each tenth of the eigenvalues is about that tenth of the density.
    for tenth in 1..10 {
        let limit = expected[n - 1 - n * tenth / 10];
        let below: f64 =
            density.nodes.iter().zip(&density.weights).filter(|(node, _)| **node < limit).map(|(_, w)| w).sum();
        assert!(abs_diff_eq!(below, tenth as f64 / 10.0, epsilon = 0.06), "{below} below the tenth number {tenth}");
    }
    // Smoothed, it still holds one in all.
    let area: f64 = (-100..500).map(|i| density.at(f64::from(i) * 0.01, 0.05) * 0.01).sum();
    assert!(abs_diff_eq!(area, 1.0, epsilon = 1e-6), "{area}");
    assert!(
        curvature.spectral_density(0, 3, 5, |_| ()).is_err() && curvature.spectral_density(3, 0, 5, |_| ()).is_err()
    );
}

#[test]
fn the_curvature_along_the_gradient() {
    let device = Device::host();
    let mut objective = symmetric(&mut Random(17), 7);
    let start: Vec<f64> = Random(18).vector(7);
    let weights = device.upload(&start).unwrap();
    let g = objective.times(weights.view()).unwrap();
    let gradient = device.upload(&g).unwrap();
    let hg = objective.times(gradient.view()).unwrap();
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let expected = dot(&g, &hg) / dot(&g, &g);
    let found = Curvature::new(&mut objective, weights.view()).unwrap().along_gradient().unwrap();
    assert_relative_eq!(found, expected, epsilon = 0.0, max_relative = 1e-13);
    let weights = device.zeros(7).unwrap();
    let error = Curvature::new(&mut objective, weights.view()).unwrap().along_gradient().unwrap_err();
    assert!(error.to_string().contains("gradient is zero"), "{error}");
}

#[test]
fn softmax_regression_over_parts_has_its_analytic_trace() {
    // Tr H = mean of Σ_c p_c (1 − p_c) · (‖x‖² + 1).
    let (samples, features, classes, batch) = (12, 5, 3, 4);
    let device = Device::host();
    let mut graph = Graph::new(Shape { batch, height: 1, width: 1, channels: features });
    let x = graph.global_average_pool(graph.input()).unwrap();
    let logits = graph.linear(x, "fc", classes).unwrap();
    let mut plan = Plan::new(&device, graph, logits, PlanOptions::training()).unwrap();
    let mut random = Random(5);
    let weights = common::weights(&plan, &mut random);
    let images: Vec<f64> = random.vector(samples * features);
    let labels: Vec<u32> = (0..samples).map(|_| random.below(classes) as u32).collect();
    let find = |name: &str| plan.parameters().find(name).unwrap().range();
    let (w, b) = (find("fc.weight"), find("fc.bias"));
    let trace: f64 = images
        .chunks(features)
        .map(|x| {
            // The weights lie with the classes side by side.
            let column = |c: usize| weights[w.clone()].iter().skip(c).step_by(classes);
            let logit = |c: usize| column(c).zip(x).map(|(w, x)| w * x).sum::<f64>() + weights[b.clone()][c];
            let z: Vec<f64> = (0..classes).map(|c| logit(c).exp()).collect();
            let sum: f64 = z.iter().sum();
            let square: f64 = x.iter().map(|x| x * x).sum::<f64>() + 1.0;
            z.iter().map(|z| z / sum * (1.0 - z / sum)).sum::<f64>() * square
        })
        .sum::<f64>()
        / samples as f64;
    let show = |plan: &mut Plan<f64>, group: usize| {
        let (mut shown, mut truth) = plan.batch_mut()?;
        shown.write(&images[group * batch * features..][..batch * features])?;
        truth.write(&labels[group * batch..][..batch])
    };
    let mut parts = Wrapped(Grouped { plan: &mut plan, groups: samples / batch, show });
    let weights = device.upload(&weights).unwrap();
    let error = Curvature::new(&mut parts, weights.view()).err().unwrap();
    assert!(error.to_string().contains("3 groups, expected one"), "{error}");
    let mut accumulator = Accumulator::new(&device, weights.len(), samples / batch).unwrap();
    let mut all = accumulator.over(&mut parts);
    assert_eq!(all.domain().padding.iter().map(|gap| gap.len()).sum::<usize>(), 128 - 18);
    let found = Curvature::new(&mut all, weights.view()).unwrap().trace(20_000, 11, |_| ()).unwrap();
    let error = found.standard_error.unwrap();
    assert!(
        error < 0.005 * trace && abs_diff_eq!(found.value, trace, epsilon = 4.0 * error),
        "{found:?} instead of {trace}"
    );

    // The vector is padded from 18 weights to 128. Its spectrum is that of the weights alone: the mean of its density
    // is the trace by their number, and its largest eigenvalue that of the matrix that products with each weight's unit
    // vector make.
    let mut curvature = Curvature::new(&mut all, weights.view()).unwrap();
    let density = curvature.spectral_density(300, 3, 13, |_| ()).unwrap();
    let mean: f64 = density.nodes.iter().zip(&density.weights).map(|(node, weight)| node * weight).sum();
    assert!(abs_diff_eq!(mean / (trace / (classes * (features + 1)) as f64), 1.0, epsilon = 0.1), "{mean} and {trace}");
    let top = curvature.top_eigenvalues(2, (18, 1e-10), 3, |_| ()).unwrap();
    let ranges = [w, b];
    let places: Vec<usize> = ranges.iter().cloned().flatten().collect();
    let mut dense = Vec::new();
    for &place in &places {
        let mut unit = vec![0.0; weights.len()];
        unit[place] = 1.0;
        let (unit, mut product) = (device.upload(&unit).unwrap(), device.zeros(weights.len()).unwrap());
        let mut flag = device.zeros(1).unwrap();
        all.hessian_vector(weights.view(), unit.view(), product.view_mut(), flag.view_mut()).unwrap();
        let product = product.to_vec().unwrap();
        dense.extend(places.iter().map(|&row| product[row]));
    }
    for (pair, expected) in top.iter().zip(eigenvalues(places.len(), &dense)) {
        assert!(abs_diff_eq!(pair.value, expected, epsilon = 1e-9), "{} instead of {expected}", pair.value);
    }
}

#[test]
fn single_precision_finds_the_same_on_every_device() {
    fn measures<T: Scalar>(device: &Device) -> Vec<f64> {
        let shape = Shape { batch: 16, height: 1, width: 1, channels: 6 };
        let mut graph = Graph::new(shape);
        let x = graph.global_average_pool(graph.input()).unwrap();
        let logits = graph.linear(x, "fc", 4).unwrap();
        let mut plan = Plan::<T>::new(device, graph, logits, PlanOptions::training()).unwrap();
        let mut random = Random(61);
        let weights: Vec<T> = common::weights(&plan, &mut random).into_iter().map(T::from_f64).collect();
        let (mut images, mut labels) = plan.batch_mut().unwrap();
        let pixels: Vec<T> = random.vector::<f32>(images.len()).iter().map(|&x| T::from_f64(f64::from(x))).collect();
        images.write(&pixels).unwrap();
        labels.write(&(0..16).map(|_| random.below(4) as u32).collect::<Vec<_>>()).unwrap();
        let weights = device.upload(&weights).unwrap();
        let mut curvature = Curvature::new(&mut plan, weights.view()).unwrap();
        let top = curvature.top_eigenvalues(3, (28, 1e-7), 9, |_| ()).unwrap();
        let density = curvature.spectral_density(4, 6, 9, |_| ()).unwrap();
        let mean = density.nodes.iter().zip(&density.weights).map(|(node, weight)| node * weight).sum();
        let trace = curvature.trace(20, 9, |_| ()).unwrap();
        let mut found =
            vec![curvature.gradient_norm().unwrap(), curvature.along_gradient().unwrap(), trace.value, mean];
        found.extend(top.iter().map(|pair| pair.value));
        found
    }
    let expected = measures::<f64>(&Device::host());
    for (name, device) in devices() {
        common::assert_close(&name, &measures::<f32>(&device), &expected, 2e-6);
    }
}

#[test]
fn what_is_not_finite_is_an_error() {
    let device = Device::host();
    let mut objective = Quadratic { len: 1, hessian: vec![f64::NAN] };
    let weights = device.upload(&[1.0]).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    for error in [curvature.gradient_norm().err(), curvature.trace(2, 0, |_| ()).err()] {
        assert!(error.unwrap().to_string().contains("not finite"));
    }
    let mut objective = Quadratic { len: 2, hessian: vec![1.0; 4] };
    assert!(Curvature::new(&mut objective, weights.view()).is_err());
}

/// A function of one weight: value, slope and curvature.
struct Line(fn(f64) -> [f64; 3]);

impl Objective<f64> for Line {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(1)
    }

    fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, .. } => {
                let [value, slope, _] = self.0(weights.to_vec()?[0]);
                loss.write(&[value])?;
                gradient.write(&[slope])
            }
            Pass::HessianVector { weights, direction, mut product, .. } => {
                product.write(&[self.0(weights.to_vec()?[0])[2] * direction.to_vec()?[0]])
            }
            other => other.split(self),
        }
    }
}

/// cos(kπθ + π).
fn wave<const K: usize>(theta: f64) -> [f64; 3] {
    let k = K as f64 * std::f64::consts::PI;
    let (sine, cosine) = (k * theta + std::f64::consts::PI).sin_cos();
    [cosine, -k * sine, -k * k * cosine]
}

/// Section 2.3 of the GNR paper: at θ = 0 with ρ = 1, the sharpness of SAM is 2 for one wave and for three, and GNR's
/// value tells them apart: π and 3π.
#[test]
fn waves_have_the_same_sharpness_and_another_steepness() {
    use std::f64::consts::PI;
    let device = Device::host();
    let weights = device.zeros(1).unwrap();
    for (objective, steepest) in [(Line(wave::<1>), PI), (Line(wave::<3>), 3.0 * PI)] {
        let mut objective = objective;
        let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
        let rise = curvature.rise(1.0, 400, 1).unwrap();
        // The last steps are 4/400² and less long, and the top is flat.
        assert!(abs_diff_eq!(rise.largest, 2.0, epsilon = 1e-6), "{rise:?}");
        assert_eq!(
            (rise.one_step, rise.approximation_ratio()),
            (0.0, Some(0.0)),
            "a gradient that vanishes has no step"
        );
        let found = curvature.steepest(1.0, 400, 1).unwrap();
        assert_abs_diff_eq!(found, steepest, epsilon = 1e-6);
    }
    // Eight waves from the start, at a bottom, to the end, at another: eight tops between, and seven bottoms.
    let mut objective = Line(wave::<16>);
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let found = curvature.extrema(3, (160, 1.0 / 160.0), 1, |_| ()).unwrap();
    assert_eq!((found.minima, found.maxima), (vec![7; 3], vec![8; 3]));
    for rho in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = curvature.rise(rho, 3, 1).err().unwrap();
        assert!(error.to_string().contains("radius"), "{error}");
    }
    assert!(curvature.extrema(0, (10, 0.01), 1, |_| ()).is_err());
}

#[test]
fn one_step_finds_all_of_a_linear_rise() {
    let device = Device::host();
    let weights = device.upload(&[0.3]).unwrap();
    let mut objective = Line(|theta| [5.0 - 2.0 * theta, -2.0, 0.0]);
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let rise = curvature.rise(0.25, 20, 1).unwrap();
    assert!(abs_diff_eq!(rise.one_step, 0.5, epsilon = 1e-15) && rise.approximation_ratio() == Some(1.0), "{rise:?}");
    assert_eq!(curvature.steepest(0.25, 20, 1).unwrap(), 0.5);
    let flat = Rise { one_step: 0.0, largest: 0.0 };
    assert_eq!(flat.approximation_ratio(), None);
}

/// ½wᵀHw rises most along the top eigenvector, and its difference along the gradient is exact.
#[test]
fn a_quadratic_rises_as_its_largest_eigenvalue_says() {
    let device = Device::host();
    let mut objective = Quadratic { len: 3, hessian: vec![1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 30.0] };
    let weights = device.zeros(3).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let rise = curvature.rise(0.1, 200, 5).unwrap();
    // From below: what of the random start lies across the eigenvector fades with every step.
    let within = |found: f64, most: f64| found <= most * (1.0 + 1e-12) && found > 0.999 * most;
    assert!(within(rise.largest, 0.5 * 30.0 * 0.01), "{rise:?}");
    let steepest = curvature.steepest(0.1, 200, 5).unwrap();
    assert!(within(steepest, 0.1 * 30.0 * 0.1), "{steepest}");
    let error = curvature.along_gradient_by_difference(0.1).err().unwrap();
    assert!(error.to_string().contains("gradient is zero"), "{error}");
    let weights = device.upload(&[4.0, -1.0, 0.5]).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let (exact, difference) =
        (curvature.along_gradient().unwrap(), curvature.along_gradient_by_difference(0.1).unwrap());
    assert_relative_eq!(exact, difference.value, epsilon = 0.0, max_relative = 1e-11);
    // Of a radius that is too small the losses' rounding is all that is left, and the error says so.
    for rho in [1e-6, 1e-7, 1e-8] {
        let found = curvature.along_gradient_by_difference(rho).unwrap();
        assert!((found.value - exact).abs() < found.rounding_error, "{rho}: {found:?} instead of {exact}");
    }
    assert!(difference.rounding_error < 1e-9 * exact, "{difference:?}");
}

#[test]
fn traces_of_parts_add_up() {
    let device = Device::host();
    let len = 23;
    let mut objective = symmetric(&mut Random(3), len);
    let weights = device.zeros(len).unwrap();
    let of = |range: std::ops::Range<usize>, hessian: &[f64]| range.map(|i| hessian[i * len + i]).sum::<f64>();
    let parts = [0..5, 5..6, 6..23];
    let expected = parts.clone().map(|part| of(part, &objective.hessian));
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let found = curvature.traces(&parts, 500, 7, |_| ()).unwrap();
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            abs_diff_eq!(found.value, expected, epsilon = 4.0 * found.standard_error.unwrap()),
            "{found:?}, not {expected}"
        );
    }
    let whole = curvature.trace(500, 7, |_| ()).unwrap().value;
    assert_abs_diff_eq!(found.iter().map(|part| part.value).sum::<f64>(), whole, epsilon = 1e-10);
    assert!(curvature.traces(&[0..1, 20..24], 1, 7, |_| ()).is_err());
}

/// Of a matrix of low rank the trace is exact, with an error that says so; of one with few large eigenvalues it is
/// better than Hutchinson's at the same cost, and its error is the right one.
#[test]
fn hutch_plus_plus_takes_out_what_is_large() {
    let device = Device::host();
    let (len, rank) = (40, 4);
    let mut random = Random(21);
    let factors: Vec<f64> = random.vector(len * rank);
    let entry = |i: usize, j: usize| (0..rank).map(|k| factors[i * rank + k] * factors[j * rank + k]).sum::<f64>();
    let mut low = Quadratic { len, hessian: (0..len * len).map(|at| entry(at / len, at % len)).collect() };
    let trace = |hessian: &[f64]| (0..len).map(|i| hessian[i * len + i]).sum::<f64>();
    let expected = trace(&low.hessian);
    let weights = device.zeros(len).unwrap();
    let mut told = 0;
    let mut curvature = Curvature::new(&mut low, weights.view()).unwrap();
    let estimate = curvature.trace_hutch_plus_plus(18, 3, |done| told = done).unwrap();
    assert!(
        relative_eq!(estimate.value, expected, epsilon = 0.0, max_relative = 1e-12),
        "{estimate:?} instead of {expected}"
    );
    assert!(estimate.standard_error.unwrap() < 1e-12 * expected);
    // Six products for the space, of which four directions come; as many for these; six probes for the rest.
    assert_eq!((estimate.probes, told), (6, 6 + 4 + 6));
    assert!(curvature.trace_hutch_plus_plus(2, 3, |_| ()).is_err());

    let small = symmetric(&mut random, len);
    let hessian = low.hessian.iter().zip(&small.hessian).map(|(low, small)| low + 0.05 * small).collect();
    let mut mixed = Quadratic { len, hessian };
    let expected = trace(&mixed.hessian);
    let mut curvature = Curvature::new(&mut mixed, weights.view()).unwrap();
    let plain = curvature.trace(60, 5, |_| ()).unwrap();
    let better = curvature.trace_hutch_plus_plus(60, 5, |_| ()).unwrap();
    let error = better.standard_error.unwrap();
    assert!(error < 0.2 * plain.standard_error.unwrap(), "{better:?} and {plain:?}");
    assert!(abs_diff_eq!(better.value, expected, epsilon = 4.0 * error), "{better:?} instead of {expected}");
}

#[test]
fn power_iteration_finds_what_is_largest_in_magnitude() {
    let device = Device::host();
    // Apart enough to converge: 5, −4, 2.5, −1, and small ones, in random orthogonal directions.
    let (len, known) = (31, [5.0, -4.0, 2.5, -1.0]);
    let mut random = Random(17);
    let basis = DMatrix::<f64>::from_vec(len, len, random.vector(len * len)).qr().q();
    let value = |i: usize| known.get(i).copied().unwrap_or(0.3 * (i as f64).sin());
    let dense: DMatrix<f64> =
        &basis * DMatrix::from_diagonal(&nalgebra::DVector::from_fn(len, |i, _| value(i))) * basis.transpose();
    let mut objective = Quadratic { len, hessian: dense.iter().copied().collect() };
    let weights = device.zeros(len).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let mut told = Vec::new();
    let pairs = curvature.power_iteration(4, (2000, 1e-9), 3, |product| told.push(product)).unwrap();
    assert_eq!(pairs.len(), 4);
    for (index, (pair, expected)) in pairs.iter().zip(known).enumerate() {
        assert!(
            abs_diff_eq!(pair.value, expected, epsilon = 1e-8) && pair.residual < 1e-8 * 5.0,
            "{} for {expected}",
            pair.value
        );
        let along: f64 = pair.vector.to_vec().unwrap().iter().zip(basis.column(index).iter()).map(|(a, b)| a * b).sum();
        assert!(abs_diff_eq!(along.abs(), 1.0, epsilon = 1e-8), "the vector of {expected}: {along}");
    }
    assert!(told.windows(2).all(|pair| pair[0] < pair[1]) && told.len() < 1000, "ended by the tolerance: {told:?}");
    // One more product for each residual.
    assert_eq!(curvature.passes(), Passes { gradients: 0, products: told.len() as u64 + 4 });
    // Too few products show in the residual.
    let rough = curvature.power_iteration(1, (3, 1e-9), 3, |_| ()).unwrap();
    let nearest = known.iter().map(|value| (value - rough[0].value).abs()).fold(f64::INFINITY, f64::min);
    assert!(rough[0].residual > 1e-3 && nearest <= rough[0].residual, "{} ± {}", rough[0].value, rough[0].residual);
    // No Hessian, no eigenvalue; nothing asked for, an error.
    let mut flat = Quadratic { len, hessian: vec![0.0; len * len] };
    let mut curvature = Curvature::new(&mut flat, weights.view()).unwrap();
    assert_eq!(curvature.power_iteration(2, (10, 1e-9), 3, |_| ()).unwrap().len(), 0);
    for (count, most) in [(0, 3), (1, 0)] {
        assert!(curvature.power_iteration(count, (most, 0.0), 1, |_| ()).is_err());
    }
}

/// What the documentation says that each measure costs.
#[test]
fn passes_are_counted() {
    let device = Device::host();
    let len = 9;
    let mut objective = symmetric(&mut Random(29), len);
    let weights = device.upload(&Random(4).vector::<f64>(len)).unwrap();
    type Measure = fn(&mut Curvature<'_, f64>) -> Result<()>;
    let cases: [(&str, Measure, u64, u64, u64); 10] = [
        ("gradient norm", |c| c.gradient_norm().map(drop), 0, 1, 0),
        ("trace", |c| c.trace(7, 1, |_| ()).map(drop), 0, 0, 7),
        ("traces", |c| c.traces(&[0..3, 3..9], 7, 1, |_| ()).map(drop), 0, 0, 7),
        ("hutch++", |c| c.trace_hutch_plus_plus(9, 1, |_| ()).map(drop), 0, 0, 9),
        ("along the gradient", |c| c.along_gradient().map(drop), 0, 1, 1),
        ("by difference", |c| c.along_gradient_by_difference(0.1).map(drop), 2, 1, 0),
        ("rise", |c| c.rise(0.1, 5, 1).map(drop), 1, 5 + 2, 0),
        ("steepest", |c| c.steepest(0.1, 5, 1).map(drop), 0, 5 + 1, 5 + 1),
        ("extrema", |c| c.extrema(3, (4, 0.1), 1, |_| ()).map(drop), 1 + 3 * 4, 0, 0),
        ("density", |c| c.spectral_density(3, 4, 1, |_| ()).map(drop), 0, 0, 3 * 4),
    ];
    for (name, measure, losses, gradients, products) in cases {
        let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
        measure(&mut curvature).unwrap();
        assert_eq!(curvature.passes(), Passes { gradients, products }, "{name}");
        assert_eq!(curvature.losses(), losses, "{name}");
    }
}

/// Least squares: `L = ½ mean (xᵀw − y)²`, H = XᵀX/n. Logistic regression: `L = mean log(1 + exp(−y xᵀw))`,
/// H = Xᵀ diag(p (1 − p)) X/n. Products through the data, eigenvalues and trace against the dense matrix.
struct Regression {
    features: usize,
    data: Vec<f64>,
    targets: Vec<f64>,
    logistic: bool,
}

impl Regression {
    fn rows(&self) -> impl Iterator<Item = (&[f64], f64)> {
        self.data.chunks(self.features).zip(self.targets.iter().copied())
    }

    /// Loss, slope and curvature of a sample in its output.
    fn of_output(&self, output: f64, target: f64) -> [f64; 3] {
        if !self.logistic {
            return [0.5 * (output - target).powi(2), output - target, 1.0];
        }
        let p = 1.0 / (1.0 + (-target * output).exp());
        [-p.ln(), target * (p - 1.0), p * (1.0 - p)]
    }

    /// The mean over the samples of x times what `weigh` makes of the output and target.
    fn gather(&self, w: &[f64], weigh: impl Fn([f64; 3], &[f64]) -> f64) -> Vec<f64> {
        let mut sum = vec![0.0; self.features];
        for (x, target) in self.rows() {
            let weight = weigh(self.of_output(dot(x, w), target), x);
            sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += weight * x / self.targets.len() as f64);
        }
        sum
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Objective<f64> for Regression {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.features)
    }

    fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, .. } => {
                let w = weights.to_vec()?;
                let total: f64 = self.rows().map(|(x, target)| self.of_output(dot(x, &w), target)[0]).sum();
                loss.write(&[total / self.targets.len() as f64])?;
                gradient.write(&self.gather(&w, |[_, slope, _], _| slope))
            }
            Pass::HessianVector { weights, direction, mut product, .. } => {
                let (w, d) = (weights.to_vec()?, direction.to_vec()?);
                product.write(&self.gather(&w, |[_, _, bend], x| bend * dot(x, &d)))
            }
            other => other.split(self),
        }
    }
}

#[test]
fn regressions_have_their_analytic_hessians() {
    let device = Device::host();
    for logistic in [false, true] {
        let (samples, features) = (41, 7);
        let mut random = Random(31);
        let data: Vec<f64> = random.vector(samples * features);
        let targets = (0..samples).map(|_| if logistic { random.normal().signum() } else { random.normal() }).collect();
        let mut regression = Regression { features, data, targets, logistic };
        let w: Vec<f64> = random.vector(features);
        // The dense matrix, written down on its own.
        let x = DMatrix::from_row_slice(samples, features, &regression.data);
        let weigh = |row: usize| {
            let p = 1.0 / (1.0 + (-dot(&regression.data[row * features..][..features], &w)).exp());
            if logistic { p * (1.0 - p) / samples as f64 } else { 1.0 / samples as f64 }
        };
        let scales = DMatrix::from_diagonal(&nalgebra::DVector::from_fn(samples, |row, _| weigh(row)));
        let dense = x.transpose() * scales * &x;
        let trace = dense.trace();
        let expected = eigenvalues(features, dense.as_slice());
        let weights = device.upload(&w).unwrap();
        let mut curvature = Curvature::new(&mut regression, weights.view()).unwrap();
        let pairs = curvature.top_eigenvalues(features, (features, 1e-12), 1, |_| ()).unwrap();
        assert_eq!(pairs.len(), features);
        for (pair, expected) in pairs.iter().zip(&expected) {
            assert!(
                abs_diff_eq!(pair.value, expected, epsilon = 1e-10),
                "logistic {logistic}: {} for {expected}",
                pair.value
            );
        }
        let found = curvature.trace(3000, 3, |_| ()).unwrap();
        let error = found.standard_error.unwrap();
        assert!(
            error < 0.02 * trace && abs_diff_eq!(found.value, trace, epsilon = 4.0 * error),
            "{found:?} instead of {trace}"
        );
        // Of vectors of signs, twice as many as there are dimensions span the space; just as many may not.
        let whole = curvature.trace_hutch_plus_plus(3 * 2 * features, 3, |_| ()).unwrap();
        assert!(relative_eq!(whole.value, trace, epsilon = 0.0, max_relative = 1e-10), "{whole:?} instead of {trace}");
        // The gradient is that of the loss.
        let norm = curvature.gradient_norm().unwrap();
        let mut slope = Vec::new();
        for index in 0..features {
            let at = |step: f64| {
                let mut w = w.clone();
                w[index] += step;
                let loss = |(x, target): (&[f64], f64)| {
                    let output = dot(x, &w);
                    if logistic { (-target * output).exp().ln_1p() } else { 0.5 * (output - target).powi(2) }
                };
                regression.rows().map(loss).sum::<f64>() / samples as f64
            };
            slope.push((at(1e-6) - at(-1e-6)) / 2e-6);
        }
        assert!(abs_diff_eq!(norm, dot(&slope, &slope).sqrt(), epsilon = 1e-8), "{norm} and {slope:?}");
    }
}

/// The identity as a Hessian, which keeps what it is multiplied with.
struct Watching(Vec<Vec<f32>>, usize);

impl Objective<f32> for Watching {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.1)
    }

    fn pass(&mut self, pass: Pass<'_, f32>) -> Result<()> {
        match pass {
            Pass::Gradient { mut gradient, mut loss, .. } => {
                loss.clear()?;
                gradient.clear()
            }
            Pass::HessianVector { direction, mut product, .. } => {
                self.0.push(direction.to_vec()?);
                product.copy_from(direction)
            }
            other => other.split(self),
        }
    }
}

/// A run, its curvature and its landscape have the same seed, unless somebody says otherwise.
#[test]
fn random_directions_do_not_lead_to_the_initial_weights() {
    let (kind, initial) =
        (TensorKind::Convolution { kernel: 3, inputs: 20, outputs: 20 }, Initial::HeNormal { fan: 180 });
    let layout = Layout::new(vec![("conv.weight".into(), kind, initial)]);
    let weights = initial_weights(&layout, 0).unwrap();
    let uploaded = Device::host().upload(&weights).unwrap();
    let mut watching = Watching(Vec::new(), layout.len());
    let mut curvature = Curvature::new(&mut watching, uploaded.view()).unwrap();
    curvature.trace(2, 0, |_| ()).unwrap();
    curvature.top_eigenvalues(1, (1, 1e-3), 0, |_| ()).unwrap();
    curvature.power_iteration(1, (1, 1e-3), 0, |_| ()).unwrap();
    let mut directions = watching.0;
    assert!(directions.len() >= 4);
    directions.extend((0..2).map(|n| filter_normalized(&layout, uploaded.view(), 0, n).unwrap().to_vec().unwrap()));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    for (number, direction) in directions.iter().enumerate() {
        let cosine = dot(direction, &weights) / (dot(direction, direction) * dot(&weights, &weights)).sqrt();
        // Of 3,600 independent numbers: a standard deviation of 1/60.
        assert!(cosine.abs() < 4.0 / 60.0, "direction {number}: {cosine}");
    }
}

#[test]
fn a_filter_normalised_direction_has_the_lengths_of_the_filters() {
    let initial = Initial::Constant(0.0);
    let layout = Layout::new(vec![
        ("conv.weight".into(), TensorKind::Convolution { kernel: 3, inputs: 2, outputs: 5 }, initial),
        ("bn.weight".into(), TensorKind::Scale(5), initial),
        ("fc.weight".into(), TensorKind::Linear { inputs: 5, outputs: 3 }, initial),
        ("fc.bias".into(), TensorKind::Bias(3), initial),
    ]);
    for (name, device) in devices() {
        let mut random = Random(37);
        let mut weights = vec![0.0f32; layout.len()];
        for tensor in layout.tensors() {
            weights[tensor.range()].fill_with(|| random.normal() as f32);
        }
        // A filter of zeros has no length to give.
        let conv = layout.find("conv.weight").unwrap().range();
        weights[conv].iter_mut().skip(4).step_by(5).for_each(|w| *w = 0.0);
        let uploaded = device.upload(&weights).unwrap();
        let direction =
            |seed, number| filter_normalized(&layout, uploaded.view(), seed, number).unwrap().to_vec().unwrap();
        let found = direction(3, 0);
        for tensor in layout.tensors() {
            let (found, weights) = (&found[tensor.range()], &weights[tensor.range()]);
            // As files have them: one output after the other.
            let (found, weights) = (tensor.kind.to_file(found), tensor.kind.to_file(weights));
            if !tensor.kind.is_weight() {
                assert!(found.iter().all(|&value| value == 0.0), "{name}: {}", tensor.name);
                continue;
            }
            let size = found.len() / tensor.kind.file_shape()[0];
            for (filter, (found, weights)) in found.chunks(size).zip(weights.chunks(size)).enumerate() {
                let length = |values: &[f32]| values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                let (found_length, expected) = (length(found), length(weights));
                let close = relative_eq!(found_length, expected, epsilon = 0.0, max_relative = 1e-6);
                assert!(close, "{name}: {} {filter}: {found_length}, not {expected}", tensor.name);
                assert!(expected == 0.0 || found.iter().any(|v| v.is_sign_negative()), "{name}: {found:?}");
            }
        }
        for gap in layout.padding() {
            assert!(found[gap.clone()].iter().all(|&value| value == 0.0), "{name}");
        }
        assert_eq!(found, direction(3, 0), "{name}");
        assert!(found != direction(3, 1) && found != direction(4, 0), "{name}");
        assert!(filter_normalized(&layout, uploaded.slice(1..layout.len()).unwrap(), 3, 0).is_err());
    }
}

/// Σ a w²/2 + w⁴/4 without products: the Hessian is the diagonal of a + 3w².
struct Quartic(Vec<f64>);

impl<T: Scalar> Objective<T> for Quartic {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(self.0.len())
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> Result<()> {
        match pass {
            Pass::Gradient { weights, mut gradient, mut loss, .. } => {
                let w = common::to_f64(&weights.to_vec()?);
                let terms = || w.iter().zip(&self.0);
                loss.write(&[terms().map(|(w, a)| a * w * w / 2.0 + w.powi(4) / 4.0).sum()])?;
                gradient.write(&terms().map(|(w, a)| T::from_f64(a * w + w.powi(3))).collect::<Vec<T>>())
            }
            other => other.split(self),
        }
    }
}

/// The products of two directions with the Hessian, and whether something was not finite.
fn differences<T: Scalar>(device: &Device, at: &[f64], along: [&[f64]; 2], step: f64) -> ([Vec<f64>; 2], bool) {
    let n = at.len();
    let mut objective = Quartic((0..n).map(|k| 1.0 + k as f64).collect());
    let mut objective = Wrapped(Differences::<T>::new(device, &mut objective, step).unwrap());
    let (weights, along) = (common::upload(device, at), along.map(|direction| common::upload(device, direction)));
    let [mut first, mut second] = [(); 2].map(|()| device.zeros::<T>(n).unwrap());
    let mut flag = device.zeros(1).unwrap();
    let directions = along.each_ref().map(|direction| direction.view());
    let products = [first.view_mut(), second.view_mut()];
    objective.hessian_vector_pair(weights.view(), directions, products, flag.view_mut()).unwrap();
    ([first, second].map(|product| common::to_f64(&product.to_vec().unwrap())), flag.to_vec().unwrap() != [0])
}

#[test]
fn differences_of_gradients_have_the_error_that_they_state() {
    let mut random = Random(61);
    let [w, d]: [Vec<f64>; 2] = [(); 2].map(|()| random.vector(37));
    let zero = vec![0.0; 37];
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let exact: Vec<f64> = (0..37).map(|k| (1.0 + k as f64 + 3.0 * w[k] * w[k]) * d[k]).collect();
    // The gradient's third derivative is 6 for each weight.
    let off = |s: f64| -> Vec<f64> { (0..37).map(|k| exact[k] + s * s * d[k].powi(3) / norm(&d).powi(2)).collect() };
    for (_, device) in common::host_devices() {
        for (step, tolerance) in [(0.1, 1e-12), (1e-3, 1e-9)] {
            let ([found, none], flag) = differences::<f64>(&device, &w, [&d, &zero], step);
            common::assert_close(&format!("step {step}"), &found, &off(step), tolerance);
            assert!(none == zero && !flag);
        }
    }
    for (name, device) in devices() {
        let step = 5e-3 * norm(&w);
        let ([found, none], flag) = differences::<f32>(&device, &w, [&d, &zero], step);
        assert!(common::relative_error(&found, &off(step)) < 2e-4, "{name}");
        assert!(none == zero && !flag);
        let steep = vec![1e14; 37];
        assert!(differences::<f32>(&device, &steep, [&d, &zero], 1.0).1, "{name}: a gradient of 1e42");
    }
}

#[test]
fn differences_measure_curvature_and_refuse_a_step_of_nothing() {
    let device = Device::host();
    let weights = device.upload(&[0.5, -1.0, 0.25]).unwrap();
    let mut quartic = Quartic(vec![1.0, 2.0, 3.0]);
    let mut objective = Wrapped(Differences::new(&device, &mut quartic, 1e-4).unwrap());
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    assert_relative_eq!(curvature.trace(3, 1, |_| ()).unwrap().value, 9.9375, max_relative = 1e-7);
    let largest = &curvature.top_eigenvalues(1, (3, 1e-9), 1, |_| ()).unwrap()[0];
    assert_relative_eq!(largest.value, 5.0, max_relative = 1e-7);
    for step in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let refused = Differences::<f64>::new(&device, &mut quartic, step).err().unwrap().to_string();
        assert!(refused.contains("expected a finite number above 0"), "{refused}");
    }
}
