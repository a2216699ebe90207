//! Measures of curvature on functions whose Hessians are known.

mod common;

use common::Random;
use polder::curvature::Curvature;
use polder::device::{Device, Result, Slice, SliceMut};
use polder::objective::{Accumulator, Objective, Statistics};
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
    fn len(&self) -> usize {
        self.len
    }

    fn gradient(
        &mut self,
        weights: Slice<'_, f64>,
        statistics: Statistics,
        mut gradient: SliceMut<'_, f64>,
        mut loss: SliceMut<'_, f64>,
        mut flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        assert_eq!(statistics, Statistics::Keep, "a measurement changes nothing");
        let slope = self.times(weights)?;
        let value: f64 = 0.5 * slope.iter().zip(weights.to_vec()?).map(|(g, w)| g * w).sum::<f64>();
        if !value.is_finite() {
            flag.write(&[1])?;
        }
        loss.write(&[value])?;
        gradient.write(&slope)
    }

    fn hessian_vector(
        &mut self,
        _: Slice<'_, f64>,
        direction: Slice<'_, f64>,
        mut product: SliceMut<'_, f64>,
        _: SliceMut<'_, u32>,
    ) -> Result<()> {
        product.write(&self.times(direction)?)
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
    assert_eq!(curvature.trace(1, 1, |_| ()).unwrap().standard_error, None);
    // The gradient is (1, −2, 6).
    assert!((curvature.gradient_norm().unwrap() - 41f64.sqrt()).abs() < 1e-15);
    let error = curvature.trace(0, 1, |_| ()).err().unwrap();
    assert!(error.to_string().contains("no probe"), "{error}");
}

#[test]
fn the_trace_lies_within_its_error_and_the_error_is_the_right_one() {
    let device = Device::host();
    let mut random = Random(3);
    let len = 23;
    let mut hessian = vec![0.0; len * len];
    for i in 0..len {
        for j in 0..=i {
            let value = random.normal();
            (hessian[i * len + j], hessian[j * len + i]) = (value, value);
        }
    }
    let trace: f64 = (0..len).map(|i| hessian[i * len + i]).sum();
    let squares: f64 = hessian.iter().map(|h| h * h).sum::<f64>();
    let diagonal: f64 = (0..len).map(|i| hessian[i * len + i].powi(2)).sum();
    let probes = 2000;
    let expected_error = (2.0 * (squares - diagonal) / probes as f64).sqrt();
    let mut objective = Quadratic { len, hessian };
    let weights = device.zeros(len).unwrap();
    let mut curvature = Curvature::new(&mut objective, weights.view()).unwrap();
    let mut told = Vec::new();
    let found = curvature.trace(probes, 7, |probe| told.push(probe)).unwrap();
    assert_eq!(told, (1..=probes).collect::<Vec<_>>());
    let error = found.standard_error.unwrap();
    // The estimate of a deviation from 2,000 samples is itself good to about 2 %.
    assert!((error / expected_error - 1.0).abs() < 0.1, "{error} instead of {expected_error}");
    assert!((found.value - trace).abs() < 4.0 * error, "{} ± {error} instead of {trace}", found.value);
    // Other seeds draw other probes, the same seed the same.
    assert_ne!(curvature.trace(8, 8, |_| ()).unwrap(), curvature.trace(8, 7, |_| ()).unwrap());
    assert_eq!(curvature.trace(8, 7, |_| ()).unwrap(), curvature.trace(8, 7, |_| ()).unwrap());
}

/// A plan that shows its images a part at a time.
struct Parts {
    plan: Plan<f64>,
    images: Vec<f64>,
    labels: Vec<u32>,
}

impl Objective<f64> for Parts {
    fn len(&self) -> usize {
        self.plan.len()
    }

    fn gradient(
        &mut self,
        weights: Slice<'_, f64>,
        statistics: Statistics,
        gradient: SliceMut<'_, f64>,
        loss: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.plan.gradient(weights, statistics, gradient, loss, flag)
    }

    fn hessian_vector(
        &mut self,
        weights: Slice<'_, f64>,
        direction: Slice<'_, f64>,
        product: SliceMut<'_, f64>,
        flag: SliceMut<'_, u32>,
    ) -> Result<()> {
        self.plan.hessian_vector(weights, direction, product, flag)
    }

    fn groups(&self) -> usize {
        self.labels.len() / self.plan.input_shape().batch
    }

    fn select(&mut self, group: usize) -> Result<()> {
        let Shape { batch, channels, .. } = self.plan.input_shape();
        let (mut images, mut labels) = self.plan.batch_mut()?;
        images.write(&self.images[group * batch * channels..][..batch * channels])?;
        labels.write(&self.labels[group * batch..][..batch])
    }
}

#[test]
fn softmax_regression_over_parts_has_its_analytic_trace() {
    // Tr H = mean of Σ_c p_c (1 − p_c) · (‖x‖² + 1).
    let (samples, features, classes, batch) = (12, 5, 3, 4);
    let device = Device::host();
    let mut graph = Graph::new(Shape { batch, height: 1, width: 1, channels: features });
    let x = graph.global_average_pool(graph.input()).unwrap();
    let logits = graph.linear(x, "fc", classes).unwrap();
    let plan = Plan::new(&device, graph, logits, PlanOptions::training()).unwrap();
    let mut random = Random(5);
    let weights = common::weights(&plan, &mut random);
    let images: Vec<f64> = random.vector(samples * features);
    let labels = (0..samples).map(|_| random.below(classes) as u32).collect();
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
    let mut parts = Parts { plan, images, labels };
    let weights = device.upload(&weights).unwrap();
    let error = Curvature::new(&mut parts, weights.view()).err().unwrap();
    assert!(error.to_string().contains("3 groups, expected one"), "{error}");
    let mut accumulator = Accumulator::new(&device, weights.len(), samples / batch).unwrap();
    let mut all = accumulator.over(&mut parts);
    let found = Curvature::new(&mut all, weights.view()).unwrap().trace(20_000, 11, |_| ()).unwrap();
    let error = found.standard_error.unwrap();
    assert!(error < 0.005 * trace && (found.value - trace).abs() < 4.0 * error, "{found:?} instead of {trace}");
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
