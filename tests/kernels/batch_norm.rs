//! Batch normalisation against its definition in double, on every device and in both kinds of launch shapes.

use approx::abs_diff_eq;

use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices, to_f64};
use polder::device::{Buffer, Device, Error, Scalar, Slice};
use polder::kernels::batch_norm::{
    Activation, Backward, BackwardTangents, BatchNormShape, Forward, ForwardTangents, Gradients, Mode, Normalized,
    ResidualGradient, RunningUpdate, Saved, Workspace, backward, backward_tangent, forward_eval, forward_from_moments,
    forward_tangent, forward_train,
};

const EPS: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;

/// Rows and channels: less and more than a run of 64 rows; widths that are whole vectors, parts of vectors, and
/// neither; many channels, for several tiles of columns; enough elements for several blocks.
const SHAPES: [(usize, usize); 9] =
    [(11, 1), (30, 3), (65, 17), (131, 16), (520, 64), (900, 12), (300, 33), (9, 260), (600, 32)];

/// The inputs of a forward and a backward.
#[derive(Clone)]
struct Problem {
    shape: BatchNormShape,
    x: Vec<f64>,
    gamma: Vec<f64>,
    beta: Vec<f64>,
    residual: Option<Vec<f64>>,
    relu: bool,
    running_mean: Vec<f64>,
    running_var: Vec<f64>,
    dy: Vec<f64>,
    /// The content of the buffer for the residual's gradient before.
    accumulated: Vec<f64>,
}

impl Problem {
    /// Numbers that `T` represents exactly, so that the reference has the same inputs as the kernel.
    fn new<T: Scalar>(random: &mut Random, rows: usize, channels: usize, residual: bool, relu: bool) -> Self {
        let mut vector = |n: usize| to_f64(&random.vector::<T>(n));
        let mut x = vector(rows * channels);
        let offsets = vector(channels);
        for (i, x) in x.iter_mut().enumerate() {
            let moved = T::from_f64(*x * (0.5 + (i % channels % 5) as f64) + 3.0 * offsets[i % channels]);
            *x = moved.into();
        }
        Self {
            shape: BatchNormShape { rows, channels },
            x,
            gamma: vector(channels),
            beta: vector(channels),
            residual: residual.then(|| vector(rows * channels)),
            relu,
            running_mean: vector(channels),
            running_var: vector(channels).iter().map(|v| v.abs() + 0.1).collect(),
            dy: vector(rows * channels),
            accumulated: vector(rows * channels),
        }
    }

    fn channel(&self, c: usize) -> impl Iterator<Item = f64> + '_ {
        self.x.iter().skip(c).step_by(self.shape.channels).copied()
    }

    /// Mean and biased variance of every channel, in two passes.
    fn moments(&self) -> (Vec<f64>, Vec<f64>) {
        let m = self.shape.rows as f64;
        let means: Vec<f64> = (0..self.shape.channels).map(|c| self.channel(c).sum::<f64>() / m).collect();
        let deviation = |c: usize| self.channel(c).map(|x| (x - means[c]).powi(2)).sum::<f64>() / m;
        let vars = (0..self.shape.channels).map(deviation).collect();
        (means, vars)
    }

    /// y for a mean and an inverse deviation per channel.
    fn normalize(&self, mean: &[f64], inv_std: &[f64]) -> Vec<f64> {
        let channels = self.shape.channels;
        let element = |i: usize| {
            let c = i % channels;
            let z = self.gamma[c] * (self.x[i] - mean[c]) * inv_std[c] + self.beta[c];
            let z = z + self.residual.as_ref().map_or(0.0, |residual| residual[i]);
            if self.relu { z.max(0.0) } else { z }
        };
        (0..self.x.len()).map(element).collect()
    }

    fn statistics(&self, mode: Mode) -> (Vec<f64>, Vec<f64>) {
        let (mean, var) = match mode {
            Mode::Train => self.moments(),
            Mode::Eval => (self.running_mean.clone(), self.running_var.clone()),
        };
        (mean, var.iter().map(|var| 1.0 / (var + EPS).sqrt()).collect())
    }

    /// dz with the mask of the kernel's outputs, so that elements near the relu's edge are masked as in the kernel.
    fn dz(&self, y: &[f64]) -> Vec<f64> {
        self.dy.iter().zip(y).map(|(&dy, &y)| if self.relu && y <= 0.0 { 0.0 } else { dy }).collect()
    }

    /// dx, dgamma and dbeta by the chain rule.
    fn gradients(&self, mode: Mode, y: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let BatchNormShape { rows, channels } = self.shape;
        let (mean, inv_std) = self.statistics(mode);
        let dz = self.dz(y);
        let (mut dgamma, mut dbeta) = (vec![0.0; channels], vec![0.0; channels]);
        for i in 0..dz.len() {
            dgamma[i % channels] += dz[i] * (self.x[i] - mean[i % channels]) * inv_std[i % channels];
            dbeta[i % channels] += dz[i];
        }
        let dx = (0..dz.len())
            .map(|i| {
                let c = i % channels;
                let xhat = (self.x[i] - mean[c]) * inv_std[c];
                let centred = match mode {
                    Mode::Train => dz[i] - dbeta[c] / rows as f64 - xhat * dgamma[c] / rows as f64,
                    Mode::Eval => dz[i],
                };
                self.gamma[c] * inv_std[c] * centred
            })
            .collect();
        (dx, dgamma, dbeta)
    }
}

fn upload<T: Scalar>(device: &Device, values: &[f64]) -> Buffer<T> {
    device.upload(&values.iter().map(|&value| T::from_f64(value)).collect::<Vec<_>>()).unwrap()
}

/// The outputs of a forward.
struct Outputs<T: Scalar> {
    y: Vec<T>,
    mean: Vec<T>,
    inv_std: Vec<T>,
    next_mean: Vec<T>,
    next_var: Vec<T>,
}

/// Runs a forward. `running`: whether training updates the running statistics.
fn run_forward<T: Scalar>(device: &Device, problem: &Problem, mode: Mode, running: bool) -> Outputs<T> {
    let shape = problem.shape;
    let (x, gamma, beta) = (upload(device, &problem.x), upload(device, &problem.gamma), upload(device, &problem.beta));
    let residual = problem.residual.as_ref().map(|residual| upload::<T>(device, residual));
    let old_mean = upload::<T>(device, &problem.running_mean);
    let old_var = upload::<T>(device, &problem.running_var);
    let mut y = device.poisoned::<T>(shape.rows * shape.channels).unwrap();
    let per_channel = || device.poisoned::<T>(shape.channels).unwrap();
    let (mut mean, mut inv_std, mut next_mean, mut next_var) =
        (per_channel(), per_channel(), per_channel(), per_channel());
    let mut workspace = Workspace::new(device, [shape]).unwrap();
    let input = Forward {
        x: x.view(),
        gamma: gamma.view(),
        beta: beta.view(),
        eps: EPS,
        residual: residual.as_ref().map(|residual| residual.view()),
        relu: problem.relu,
    };
    let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
    match mode {
        Mode::Train => {
            let running = running.then(|| RunningUpdate {
                momentum: MOMENTUM,
                mean: old_mean.view(),
                var: old_var.view(),
                next_mean: next_mean.view_mut(),
                next_var: next_var.view_mut(),
            });
            forward_train(shape, input, y.view_mut(), saved, running, &mut workspace).unwrap();
        }
        Mode::Eval => forward_eval(shape, input, old_mean.view(), old_var.view(), y.view_mut(), saved).unwrap(),
    }
    assert_eq!(bits(&old_mean.to_vec().unwrap()), bits(&upload::<T>(device, &problem.running_mean).to_vec().unwrap()));
    Outputs {
        y: y.to_vec().unwrap(),
        mean: mean.to_vec().unwrap(),
        inv_std: inv_std.to_vec().unwrap(),
        next_mean: next_mean.to_vec().unwrap(),
        next_var: next_var.to_vec().unwrap(),
    }
}

/// Where the mask comes from, and what happens to the residual's gradient.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Variant {
    /// The mask is read from the output. There is no residual.
    Output,
    /// The mask is computed again.
    Recompute,
    /// The residual's gradient is written.
    Write,
    /// The residual's gradient is added to.
    Accumulate,
}

struct Grads<T: Scalar> {
    dx: Vec<T>,
    dgamma: Vec<T>,
    dbeta: Vec<T>,
    residual: Vec<T>,
}

fn run_backward<T: Scalar>(
    device: &Device,
    problem: &Problem,
    mode: Mode,
    forward: &Outputs<T>,
    variant: Variant,
) -> Grads<T> {
    let shape = problem.shape;
    let len = shape.rows * shape.channels;
    let (x, gamma, beta) = (upload(device, &problem.x), upload(device, &problem.gamma), upload(device, &problem.beta));
    let dy = upload::<T>(device, &problem.dy);
    let (y, mean, inv_std) = (
        device.upload(&forward.y).unwrap(),
        device.upload(&forward.mean).unwrap(),
        device.upload(&forward.inv_std).unwrap(),
    );
    let activation = match (problem.relu, variant) {
        (false, _) => Activation::Identity,
        (true, Variant::Recompute) => Activation::ReluRecomputed { beta: beta.view() },
        (true, _) => Activation::Relu { y: y.view() },
    };
    let mut dx = device.poisoned::<T>(len).unwrap();
    let mut dgamma = device.poisoned::<T>(shape.channels).unwrap();
    let mut dbeta = device.poisoned::<T>(shape.channels).unwrap();
    let accumulate = variant == Variant::Accumulate;
    let mut residual_buffer =
        if accumulate { upload::<T>(device, &problem.accumulated) } else { device.poisoned::<T>(len).unwrap() };
    let other = BatchNormShape { rows: 40, channels: 3 };
    let mut workspace = Workspace::new(device, [other, shape]).unwrap();
    let input = Backward {
        x: x.view(),
        dy: dy.view(),
        gamma: gamma.view(),
        mean: mean.view(),
        inv_std: inv_std.view(),
        activation,
    };
    // A first call, which must leave the workspace ready for the next.
    let mut unused = [len, shape.channels, shape.channels].map(|len| device.poisoned::<T>(len).unwrap());
    let [dx_, dgamma_, dbeta_] = unused.each_mut().map(|buffer| buffer.view_mut());
    backward(shape, mode, input, Gradients { dx: dx_, dgamma: dgamma_, dbeta: dbeta_ }, None, &mut workspace).unwrap();
    let gradients = Gradients { dx: dx.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
    let residual = matches!(variant, Variant::Write | Variant::Accumulate)
        .then(|| ResidualGradient { gradient: residual_buffer.view_mut(), accumulate });
    backward(shape, mode, input, gradients, residual, &mut workspace).unwrap();
    Grads {
        dx: dx.to_vec().unwrap(),
        dgamma: dgamma.to_vec().unwrap(),
        dbeta: dbeta.to_vec().unwrap(),
        residual: residual_buffer.to_vec().unwrap(),
    }
}

/// The tolerances of a precision, for forward values and for gradients.
fn tolerances<T: Scalar>() -> (f64, f64) {
    if T::NAME == "f32" { (1e-6, 3e-6) } else { (1e-14, 3e-14) }
}

fn matches_the_definition<T: Scalar>(devices: Vec<(String, Device)>) {
    let (forward_tolerance, backward_tolerance) = tolerances::<T>();
    for (index, (rows, channels)) in SHAPES.into_iter().enumerate() {
        let mut random = Random(index as u64);
        for (has_residual, relu) in [(false, false), (false, true), (true, false), (true, true)] {
            let problem = Problem::new::<T>(&mut random, rows, channels, has_residual, relu);
            for mode in [Mode::Train, Mode::Eval] {
                let (mean, inv_std) = problem.statistics(mode);
                let y = problem.normalize(&mean, &inv_std);
                for (name, device) in &devices {
                    let what = format!("{name}, {rows} x {channels}, residual {has_residual}, relu {relu}, {mode:?}");
                    let found = run_forward::<T>(device, &problem, mode, true);
                    assert_close(&format!("{what}: mean"), &found.mean, &mean, forward_tolerance);
                    assert_close(&format!("{what}: inv_std"), &found.inv_std, &inv_std, forward_tolerance);
                    assert_close(&format!("{what}: y"), &found.y, &y, forward_tolerance);
                    let (dx, dgamma, dbeta) = problem.gradients(mode, &to_f64(&found.y));
                    let dz = problem.dz(&to_f64(&found.y));
                    let mut variants = vec![Variant::Output];
                    if has_residual {
                        variants.extend([Variant::Write, Variant::Accumulate]);
                    } else if relu {
                        variants.push(Variant::Recompute);
                    }
                    for variant in variants {
                        let what = format!("{what}, {variant:?}");
                        let grads = run_backward(device, &problem, mode, &found, variant);
                        assert_close(&format!("{what}: dx"), &grads.dx, &dx, backward_tolerance);
                        assert_close(&format!("{what}: dgamma"), &grads.dgamma, &dgamma, backward_tolerance);
                        assert_close(&format!("{what}: dbeta"), &grads.dbeta, &dbeta, backward_tolerance);
                        let residual: Vec<f64> = match variant {
                            Variant::Write => dz.clone(),
                            Variant::Accumulate => dz.iter().zip(&problem.accumulated).map(|(a, b)| a + b).collect(),
                            _ => continue,
                        };
                        assert_close(&format!("{what}: residual"), &grads.residual, &residual, forward_tolerance);
                    }
                }
            }
        }
    }
}

#[test]
fn single_precision_matches_the_definition() {
    matches_the_definition::<f32>(devices());
}

#[test]
fn double_precision_matches_the_definition() {
    matches_the_definition::<f64>(host_devices());
}

/// All numbers in a problem's results.
fn all_bits<T: Scalar>(device: &Device, problem: &Problem, mode: Mode, variant: Variant) -> Vec<u64> {
    let forward = run_forward::<T>(device, problem, mode, true);
    let grads = run_backward(device, problem, mode, &forward, variant);
    let along = Direction::new::<T>(&mut Random(6), problem);
    let tangents = run_tangents(device, problem, &along, mode, &forward, variant);
    let vectors = [&forward.y, &forward.mean, &forward.inv_std, &grads.dx, &grads.dgamma, &grads.dbeta];
    let moved = [&tangents.mean, &tangents.inv_std, &tangents.y, &tangents.dx, &tangents.dgamma, &tangents.dbeta];
    vectors.into_iter().chain(moved).flat_map(|vector| bits(vector)).collect()
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    for (rows, channels) in [(2050, 17), (3000, 64), (5000, 3), (9, 260)] {
        let problem = Problem::new::<f32>(&mut Random(5), rows, channels, false, true);
        for variant in [Variant::Output, Variant::Recompute] {
            on_devices(&host_devices(), false, |_, device| {
                vec![all_bits::<f32>(device, &problem, Mode::Train, variant)]
            });
        }
    }
}

/// A hash of the bits of all results. Whole vectors of channels, of every instruction set, and parts of vectors.
fn digest<T: Scalar>(device: &Device) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    for (rows, channels) in [(1200, 16), (700, 32), (601, 64), (300, 128), (211, 125), (140, 191)] {
        for (variant, residual) in [(Variant::Recompute, false), (Variant::Output, false), (Variant::Accumulate, true)]
        {
            let problem = Problem::new::<T>(&mut Random(8), rows, channels, residual, true);
            let all = all_bits::<T>(device, &problem, Mode::Train, variant);
            digest = all
                .iter()
                .fold(digest, |digest, bits| (digest ^ bits).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29));
        }
    }
    digest
}

/// A process chooses its instruction set when it first uses the device, so the test starts itself again for each older
/// one.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    let device = Device::host();
    let used = device.description();
    let digests = format!("digests {:016x} {:016x}", digest::<f32>(&device), digest::<f64>(&device));
    println!("\n{used}\n{digests}");
    if std::env::var_os("POLDER_ISA").is_some() {
        return;
    }
    let sanitized = std::env::var_os("POLDER_SANITIZE").is_some();
    let older = ["avx2", "baseline"].into_iter().skip_while(|name| !used.contains("avx512") && *name == "avx2");
    for older in older.filter(|name| !sanitized || *name == "avx2") {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["every_instruction_set_gives_the_same_bits", "--nocapture"]).env("POLDER_ISA", older);
        let output = child.env_remove("POLDER_TEST_DEVICE").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(&format!("{older} kernels")), "{text}");
        assert!(text.lines().any(|found| found == digests), "{used}: {digests}, and on {text}");
    }
}

/// The recomputed mask has the bits of the forward's, with values that lie on the relu's edge up to rounding.
#[test]
fn recomputed_mask_is_the_forwards() {
    let (rows, channels) = (4096, 16);
    let mut problem = Problem::new::<f32>(&mut Random(11), rows, channels, false, true);
    // Shifts that bring the values of the first row within a few roundings of the edge, and rows that repeat the first.
    let (mean, inv_std) = problem.statistics(Mode::Eval);
    for c in 0..channels {
        problem.beta[c] = f64::from((-(problem.x[c] - mean[c]) * inv_std[c] * problem.gamma[c]) as f32);
    }
    for row in (1..rows).step_by(3) {
        for c in 0..channels {
            let nudged = f32::from_bits((problem.x[c] as f32).to_bits().wrapping_add((row % 7) as u32).wrapping_sub(3));
            problem.x[row * channels + c] = nudged.into();
        }
    }
    for (name, device) in devices() {
        let forward = run_forward::<f32>(&device, &problem, Mode::Eval, false);
        let read = run_backward(&device, &problem, Mode::Eval, &forward, Variant::Output);
        let recomputed = run_backward(&device, &problem, Mode::Eval, &forward, Variant::Recompute);
        let edge = forward.y.iter().filter(|y| **y > 0.0 && **y < 1e-5).count();
        assert!(edge > 100, "{name}: {edge} outputs just above the edge");
        assert_eq!(bits(&read.dx), bits(&recomputed.dx), "{name}: dx");
        assert_eq!(bits(&read.dgamma), bits(&recomputed.dgamma), "{name}: dgamma");
        assert_eq!(bits(&read.dbeta), bits(&recomputed.dbeta), "{name}: dbeta");
    }
}

/// A mean of 1000 with a deviation of 1, an outlier as the first value, and a constant channel.
#[test]
fn large_means_do_not_cancel() {
    let (rows, channels) = (5000, 4);
    let mut problem = Problem::new::<f32>(&mut Random(3), rows, channels, false, false);
    for row in 0..rows {
        let x = &mut problem.x[row * channels..][..channels];
        for (c, x) in x.iter_mut().enumerate() {
            let noise = (*x - problem.running_mean[c]) / 3.0;
            *x = f64::from((1000.0 + noise) as f32);
        }
        x[2] = if row == 0 { -1000.0 } else { x[2] };
        x[3] = 1000.25;
    }
    let (mean, var) = problem.moments();
    for (name, device) in devices() {
        let found = run_forward::<f32>(&device, &problem, Mode::Train, true);
        for c in 0..channels {
            // The mean has an error of half a unit in the last place of a float near 1000, and a little more.
            assert!(abs_diff_eq!(f64::from(found.mean[c]), mean[c], epsilon = 3.2e-5), "{name}: mean[{c}]");
            let expected = 1.0 / (var[c] + EPS).sqrt();
            let error = (f64::from(found.inv_std[c]) - expected).abs() / expected;
            // Sums of a run are relative to its first row. If that is an outlier, the cancellation costs as much as 64
            // rows outweigh it.
            let tolerance = if c == 2 { 64.0 * 1e-6 } else { 1e-6 };
            assert!(error < tolerance, "{name}: inv_std[{c}] is {} instead of {expected}", found.inv_std[c]);
        }
        assert_eq!(found.inv_std[3], (1.0 / EPS.sqrt()) as f32, "{name}: a constant has no variance");
        let constant = found.y.iter().skip(3).step_by(channels);
        assert!(constant.into_iter().all(|&y| f64::from(y) == problem.beta[3]), "{name}: a constant becomes beta");
    }
}

#[test]
fn running_statistics_follow_the_rule() {
    let problem = Problem::new::<f64>(&mut Random(8), 77, 5, false, false);
    let (mean, var) = problem.moments();
    let rule = |old: &[f64], new: Vec<f64>| -> Vec<f64> {
        old.iter().zip(new).map(|(old, new)| (1.0 - MOMENTUM) * old + MOMENTUM * new).collect()
    };
    let next_mean = rule(&problem.running_mean, mean);
    let next_var = rule(&problem.running_var, var.iter().map(|var| var * 77.0 / 76.0).collect());
    for (name, device) in host_devices() {
        let found = run_forward::<f64>(&device, &problem, Mode::Train, true);
        assert_close(&format!("{name}: next mean"), &found.next_mean, &next_mean, 4e-15);
        assert_close(&format!("{name}: next var"), &found.next_var, &next_var, 4e-15);
        let without = run_forward::<f64>(&device, &problem, Mode::Train, false);
        assert_eq!(bits(&without.y), bits(&found.y), "{name}: the output does not depend on them");
        assert!(without.next_mean.iter().chain(&without.next_var).all(|value| value.is_nan()), "{name}: left alone");
    }
}

/// Central differences of sum(y · dy) in double. No value is near the relu's edge.
#[test]
fn gradients_are_those_of_the_forward() {
    const STEP: f64 = 1e-5;
    for mode in [Mode::Train, Mode::Eval] {
        for residual in [false, true] {
            let mut problem = Problem::new::<f64>(&mut Random(21), 15, 6, residual, true);
            let (mean, inv_std) = problem.statistics(mode);
            let y = problem.normalize(&mean, &inv_std);
            let identity = Problem { relu: false, ..problem.clone() };
            let z = identity.normalize(&mean, &inv_std);
            assert!(z.iter().all(|z| z.abs() > 20.0 * STEP), "values near the edge make differences meaningless");
            assert!(y.contains(&0.0) && y.iter().any(|&y| y > 0.0));
            for (name, device) in host_devices() {
                let value = |problem: &Problem| -> f64 {
                    let y = run_forward::<f64>(&device, problem, mode, false).y;
                    y.iter().zip(&problem.dy).map(|(y, dy)| y * dy).sum()
                };
                let forward = run_forward::<f64>(&device, &problem, mode, false);
                let variant = if residual { Variant::Write } else { Variant::Recompute };
                let grads = run_backward(&device, &problem, mode, &forward, variant);
                type Field = fn(&mut Problem) -> &mut Vec<f64>;
                let mut checks: Vec<(&str, Field, &Vec<f64>)> = vec![
                    ("dx", |problem| &mut problem.x, &grads.dx),
                    ("dgamma", |problem| &mut problem.gamma, &grads.dgamma),
                    ("dbeta", |problem| &mut problem.beta, &grads.dbeta),
                ];
                if residual {
                    checks.push(("residual", |problem| problem.residual.as_mut().unwrap(), &grads.residual));
                }
                for (what, field, found) in checks {
                    let mut differences = Vec::new();
                    for i in 0..found.len() {
                        let original = field(&mut problem)[i];
                        field(&mut problem)[i] = original + STEP;
                        let above = value(&problem);
                        field(&mut problem)[i] = original - STEP;
                        let below = value(&problem);
                        field(&mut problem)[i] = original;
                        differences.push((above - below) / (2.0 * STEP));
                    }
                    assert_close(&format!("{name}, {mode:?}: {what}"), found, &differences, 1e-8);
                }
            }
        }
    }
}

// ---- Tangents -------------------------------------------------------------------------------------------------------

/// A direction: the tangents of the inputs of a problem.
#[derive(Clone)]
struct Direction {
    x: Vec<f64>,
    gamma: Vec<f64>,
    beta: Vec<f64>,
    residual: Option<Vec<f64>>,
    dy: Vec<f64>,
}

impl Direction {
    fn new<T: Scalar>(random: &mut Random, problem: &Problem) -> Self {
        let BatchNormShape { rows, channels } = problem.shape;
        let mut vector = |n: usize| to_f64(&random.vector::<T>(n));
        Self {
            x: vector(rows * channels),
            gamma: vector(channels),
            beta: vector(channels),
            residual: problem.residual.as_ref().map(|_| vector(rows * channels)),
            dy: vector(rows * channels),
        }
    }
}

/// The tangents of all results of forward and backward.
struct Tangents<V> {
    mean: V,
    inv_std: V,
    y: V,
    dx: V,
    dgamma: V,
    dbeta: V,
    residual: V,
}

impl Problem {
    /// The tangents by the product rule, term by term: first of x̂, and from it those of the gradients' formulas. The
    /// mask is that of the kernel's outputs.
    fn tangents(&self, mode: Mode, y: &[f64], along: &Direction) -> Tangents<Vec<f64>> {
        let BatchNormShape { rows, channels } = self.shape;
        let m = rows as f64;
        let (mean, inv_std) = self.statistics(mode);
        let of_channel = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
            let mut sums = vec![0.0; channels];
            (0..rows * channels).for_each(|i| sums[i % channels] += f(i));
            sums
        };
        let (mut d_mean, mut d_inv_std) = (vec![0.0; channels], vec![0.0; channels]);
        if mode == Mode::Train {
            d_mean = of_channel(&|i| along.x[i] / m);
            // (var + eps)^(-1/2), with var' = 2 mean((x - mean) (x' - mean')).
            let d_var =
                of_channel(&|i| 2.0 * (self.x[i] - mean[i % channels]) * (along.x[i] - d_mean[i % channels]) / m);
            d_inv_std = (0..channels).map(|c| -0.5 * inv_std[c].powi(3) * d_var[c]).collect();
        }
        let hat: Vec<f64> =
            (0..self.x.len()).map(|i| (self.x[i] - mean[i % channels]) * inv_std[i % channels]).collect();
        let d_hat: Vec<f64> = (0..self.x.len())
            .map(|i| {
                let c = i % channels;
                (along.x[i] - d_mean[c]) * inv_std[c] + (self.x[i] - mean[c]) * d_inv_std[c]
            })
            .collect();
        let passed = |i: usize| if self.relu && y[i] <= 0.0 { 0.0 } else { 1.0 };
        let d_y = (0..self.x.len())
            .map(|i| {
                let c = i % channels;
                let residual = along.residual.as_ref().map_or(0.0, |residual| residual[i]);
                passed(i) * (along.gamma[c] * hat[i] + self.gamma[c] * d_hat[i] + along.beta[c] + residual)
            })
            .collect();
        let dz = |i: usize| passed(i) * self.dy[i];
        let d_dz = |i: usize| passed(i) * along.dy[i];
        let dgamma = of_channel(&|i| dz(i) * hat[i]);
        let dbeta = of_channel(&dz);
        let d_dgamma = of_channel(&|i| d_dz(i) * hat[i] + dz(i) * d_hat[i]);
        let d_dbeta = of_channel(&d_dz);
        let d_dx = (0..self.x.len())
            .map(|i| {
                let c = i % channels;
                let (mut centred, mut d_centred) = (dz(i), d_dz(i));
                if mode == Mode::Train {
                    centred -= dbeta[c] / m + hat[i] * dgamma[c] / m;
                    d_centred -= d_dbeta[c] / m + (d_hat[i] * dgamma[c] + hat[i] * d_dgamma[c]) / m;
                }
                (along.gamma[c] * inv_std[c] + self.gamma[c] * d_inv_std[c]) * centred
                    + self.gamma[c] * inv_std[c] * d_centred
            })
            .collect();
        let residual = (0..self.x.len()).map(d_dz).collect();
        Tangents { mean: d_mean, inv_std: d_inv_std, y: d_y, dx: d_dx, dgamma: d_dgamma, dbeta: d_dbeta, residual }
    }
}

fn run_tangents<T: Scalar>(
    device: &Device,
    problem: &Problem,
    along: &Direction,
    mode: Mode,
    forward: &Outputs<T>,
    variant: Variant,
) -> Tangents<Vec<T>> {
    let shape = problem.shape;
    let grads = run_backward(device, problem, mode, forward, variant);
    let values = [&problem.x, &problem.gamma, &problem.beta, &problem.dy].map(|values| upload::<T>(device, values));
    let [x, gamma, beta, dy] = &values;
    let saved = [&forward.y, &forward.mean, &forward.inv_std, &grads.dgamma, &grads.dbeta];
    let saved = saved.map(|values| device.upload(values).unwrap());
    let [y, mean, inv_std, dgamma, dbeta] = &saved;
    let moved = [&along.x, &along.gamma, &along.beta, &along.dy].map(|values| upload::<T>(device, values));
    let [x_tangent, gamma_tangent, beta_tangent, dy_tangent] = &moved;
    let residual = along.residual.as_ref().map(|residual| upload::<T>(device, residual));
    let activation = match (problem.relu, variant) {
        (false, _) => Activation::Identity,
        (true, Variant::Recompute) => Activation::ReluRecomputed { beta: beta.view() },
        (true, _) => Activation::Relu { y: y.view() },
    };
    let full = || device.poisoned::<T>(shape.rows * shape.channels).unwrap();
    let per_channel = || device.poisoned::<T>(shape.channels).unwrap();
    let (mut found_y, mut found_dx) = (full(), full());
    let [mut found_mean, mut found_inv_std, mut found_dgamma, mut found_dbeta] =
        [per_channel(), per_channel(), per_channel(), per_channel()];
    let mut workspace = Workspace::new(device, [shape]).unwrap();
    let (x, gamma, mean, inv_std) = (x.view(), gamma.view(), mean.view(), inv_std.view());
    forward_tangent(
        shape,
        mode,
        Normalized { x, gamma, mean, inv_std, activation },
        ForwardTangents {
            x: x_tangent.view(),
            gamma: gamma_tangent.view(),
            beta: beta_tangent.view(),
            residual: residual.as_ref().map(|residual| residual.view()),
        },
        found_y.view_mut(),
        Saved { mean: found_mean.view_mut(), inv_std: found_inv_std.view_mut() },
        &mut workspace,
    )
    .unwrap();
    let accumulate = variant == Variant::Accumulate;
    let mut found_residual = if accumulate { upload::<T>(device, &problem.accumulated) } else { full() };
    backward_tangent(
        shape,
        mode,
        Backward { x, dy: dy.view(), gamma, mean, inv_std, activation },
        BackwardTangents {
            x: x_tangent.view(),
            dy: dy_tangent.view(),
            gamma: gamma_tangent.view(),
            mean: found_mean.view(),
            inv_std: found_inv_std.view(),
            dgamma: dgamma.view(),
            dbeta: dbeta.view(),
        },
        Gradients { dx: found_dx.view_mut(), dgamma: found_dgamma.view_mut(), dbeta: found_dbeta.view_mut() },
        matches!(variant, Variant::Write | Variant::Accumulate)
            .then(|| ResidualGradient { gradient: found_residual.view_mut(), accumulate }),
        &mut workspace,
    )
    .unwrap();
    Tangents {
        mean: found_mean.to_vec().unwrap(),
        inv_std: found_inv_std.to_vec().unwrap(),
        y: found_y.to_vec().unwrap(),
        dx: found_dx.to_vec().unwrap(),
        dgamma: found_dgamma.to_vec().unwrap(),
        dbeta: found_dbeta.to_vec().unwrap(),
        residual: found_residual.to_vec().unwrap(),
    }
}

fn tangents_match_the_definition<T: Scalar>(devices: Vec<(String, Device)>) {
    // These are differences of sums of up to 900 terms, and a deviation to the third power.
    let tolerance = if T::NAME == "f32" { 1e-5 } else { 1e-13 };
    for (index, (rows, channels)) in SHAPES.into_iter().enumerate() {
        let mut random = Random(100 + index as u64);
        for (has_residual, relu) in [(false, false), (false, true), (true, false), (true, true)] {
            let problem = Problem::new::<T>(&mut random, rows, channels, has_residual, relu);
            let along = Direction::new::<T>(&mut random, &problem);
            for mode in [Mode::Train, Mode::Eval] {
                for (name, device) in &devices {
                    let what = format!("{name}, {rows} x {channels}, residual {has_residual}, relu {relu}, {mode:?}");
                    let forward = run_forward::<T>(device, &problem, mode, true);
                    let expected = problem.tangents(mode, &to_f64(&forward.y), &along);
                    let mut variants = vec![Variant::Output];
                    if has_residual {
                        variants.extend([Variant::Write, Variant::Accumulate]);
                    } else if relu {
                        variants.push(Variant::Recompute);
                    }
                    for variant in variants {
                        let found = run_tangents(device, &problem, &along, mode, &forward, variant);
                        let mut pairs = vec![
                            ("mean'", &found.mean, expected.mean.clone()),
                            ("inv_std'", &found.inv_std, expected.inv_std.clone()),
                            ("y'", &found.y, expected.y.clone()),
                            ("dx'", &found.dx, expected.dx.clone()),
                            ("dgamma'", &found.dgamma, expected.dgamma.clone()),
                            ("dbeta'", &found.dbeta, expected.dbeta.clone()),
                        ];
                        match variant {
                            Variant::Write => pairs.push(("residual'", &found.residual, expected.residual.clone())),
                            Variant::Accumulate => {
                                let sum = expected.residual.iter().zip(&problem.accumulated).map(|(a, b)| a + b);
                                pairs.push(("residual' added", &found.residual, sum.collect()));
                            }
                            _ => assert!(
                                to_f64(&found.residual).iter().all(|value| value.is_nan()),
                                "{what}: left alone"
                            ),
                        }
                        for (which, found, expected) in pairs {
                            assert_close(&format!("{what}, {variant:?}: {which}"), found, &expected, tolerance);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn tangents_match_the_definition_in_single_precision() {
    tangents_match_the_definition::<f32>(devices());
}

#[test]
fn tangents_match_the_definition_in_double_precision() {
    tangents_match_the_definition::<f64>(host_devices());
}

/// Central differences of the kernels' forward and backward in double. All inputs move together.
#[test]
fn tangents_are_the_derivatives_of_forward_and_backward() {
    const STEP: f64 = 1e-5;
    for mode in [Mode::Train, Mode::Eval] {
        for residual in [false, true] {
            let mut random = Random(21);
            let problem = Problem::new::<f64>(&mut random, 15, 6, residual, true);
            let along = Direction::new::<f64>(&mut random, &problem);
            let variant = if residual { Variant::Write } else { Variant::Recompute };
            let moved = |step: f64| {
                let add = |from: &[f64], by: &[f64]| from.iter().zip(by).map(|(a, b)| a + step * b).collect();
                Problem {
                    x: add(&problem.x, &along.x),
                    gamma: add(&problem.gamma, &along.gamma),
                    beta: add(&problem.beta, &along.beta),
                    residual: problem.residual.as_ref().zip(along.residual.as_ref()).map(|(a, b)| add(a, b)),
                    dy: add(&problem.dy, &along.dy),
                    ..problem.clone()
                }
            };
            for (name, device) in host_devices() {
                let forward = run_forward::<f64>(&device, &problem, mode, false);
                let found = run_tangents(&device, &problem, &along, mode, &forward, variant);
                let both = [STEP, -STEP].map(|step| {
                    let problem = moved(step);
                    let forward = run_forward::<f64>(&device, &problem, mode, false);
                    let grads = run_backward(&device, &problem, mode, &forward, variant);
                    (forward, grads)
                });
                let [(above, above_grads), (below, below_grads)] = &both;
                let masks = |y: &[f64]| y.iter().map(|y| *y > 0.0).collect::<Vec<bool>>();
                assert_eq!(masks(&above.y), masks(&below.y), "a difference across the relu's edge is meaningless");
                let difference = |above: &[f64], below: &[f64]| -> Vec<f64> {
                    above.iter().zip(below).map(|(a, b)| (a - b) / (2.0 * STEP)).collect()
                };
                for (what, found, above, below) in [
                    ("mean'", &found.mean, &above.mean, &below.mean),
                    ("inv_std'", &found.inv_std, &above.inv_std, &below.inv_std),
                    ("y'", &found.y, &above.y, &below.y),
                    ("dx'", &found.dx, &above_grads.dx, &below_grads.dx),
                    ("dgamma'", &found.dgamma, &above_grads.dgamma, &below_grads.dgamma),
                    ("dbeta'", &found.dbeta, &above_grads.dbeta, &below_grads.dbeta),
                ] {
                    assert_close(&format!("{name}, {mode:?}: {what}"), found, &difference(above, below), 1e-8);
                }
                if residual {
                    let expected = difference(&above_grads.residual, &below_grads.residual);
                    assert_close(&format!("{name}, {mode:?}: residual'"), &found.residual, &expected, 1e-8);
                }
            }
        }
    }
}

#[test]
fn slices_at_odd_offsets_work() {
    let problem = Problem::new::<f32>(&mut Random(9), 200, 8, false, true);
    let (rows, channels) = (200, 8);
    for (name, device) in devices() {
        let expected = run_forward::<f32>(&device, &problem, Mode::Train, false);
        let shifted = |values: &[f64]| upload::<f32>(&device, &[&[0.0], values].concat());
        let (x, gamma, beta) = (shifted(&problem.x), shifted(&problem.gamma), shifted(&problem.beta));
        let mut y = device.poisoned::<f32>(rows * channels + 3).unwrap();
        let mut saved = device.poisoned::<f32>(2 * channels + 1).unwrap();
        let mut workspace = Workspace::new(&device, [problem.shape]).unwrap();
        let mut parts = saved.disjoint();
        let input = Forward {
            x: x.slice(1..x.len()).unwrap(),
            gamma: gamma.slice(1..1 + channels).unwrap(),
            beta: beta.slice(1..1 + channels).unwrap(),
            eps: EPS,
            residual: None,
            relu: true,
        };
        let saved = Saved {
            mean: parts.write(1..1 + channels).unwrap(),
            inv_std: parts.write(1 + channels..1 + 2 * channels).unwrap(),
        };
        let part = y.slice_mut(3..3 + rows * channels).unwrap();
        forward_train(problem.shape, input, part, saved, None, &mut workspace).unwrap();
        let y = y.to_vec().unwrap();
        assert!(y[..3].iter().all(|y| y.is_nan()), "{name}: outside the slice");
        assert_close(&name, &y[3..], &to_f64(&expected.y), 1e-6);
    }
}

#[test]
fn nan_passes_the_relu() {
    let mut problem = Problem::new::<f32>(&mut Random(2), 40, 8, false, true);
    problem.x[19] = f64::NAN;
    for (name, device) in devices() {
        let found = run_forward::<f32>(&device, &problem, Mode::Train, true);
        assert!(found.y.iter().skip(3).step_by(8).all(|y| y.is_nan()), "{name}: channel 3");
        assert!(found.y.iter().skip(4).step_by(8).all(|y| y.is_finite()), "{name}: channel 4");
        assert!(found.next_mean[3].is_nan() && found.next_var[3].is_nan(), "{name}: the pending statistics show it");
    }
}

/// The moments of a convolution's tiles replace a pass over x, also for a mean far from zero: three tiles and a short
/// one.
#[test]
fn moments_of_tiles_are_as_good_as_x() {
    let (rows, channels) = (3 * 128 + 17, 6);
    let mut problem = Problem::new::<f32>(&mut Random(15), rows, channels, true, true);
    problem.x.iter_mut().for_each(|x| *x = f64::from((*x + 50.0) as f32));
    let tiles = rows.div_ceil(128);
    let mut moments = vec![0.0; 2 * channels * tiles];
    for (c, tile) in (0..channels).flat_map(|c| (0..tiles).map(move |tile| (c, tile))) {
        let values: Vec<f64> = problem.channel(c).skip(tile * 128).take(128).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        moments[(c * tiles + tile) * 2] = mean;
        moments[(c * tiles + tile) * 2 + 1] = values.iter().map(|x| (x - mean).powi(2)).sum();
    }
    for (name, device) in devices() {
        let expected = run_forward::<f32>(&device, &problem, Mode::Train, true);
        let [x, gamma, beta, residual, old_mean, old_var, moments] = [
            &problem.x,
            &problem.gamma,
            &problem.beta,
            problem.residual.as_ref().unwrap(),
            &problem.running_mean,
            &problem.running_var,
            &moments,
        ]
        .map(|values| upload::<f32>(&device, values));
        let mut y = device.poisoned::<f32>(rows * channels).unwrap();
        let [mut mean, mut inv_std, mut next_mean, mut next_var] =
            std::array::from_fn(|_| device.poisoned::<f32>(channels).unwrap());
        let input = Forward {
            x: x.view(),
            gamma: gamma.view(),
            beta: beta.view(),
            eps: EPS,
            residual: Some(residual.view()),
            relu: true,
        };
        let mut shifted = device.poisoned::<f32>(moments.len() + 1).unwrap();
        shifted.slice_mut(1..moments.len() + 1).unwrap().copy_from(moments.view()).unwrap();
        let mut run = |moments: Slice<'_, f32>| {
            let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
            let running = RunningUpdate {
                momentum: MOMENTUM,
                mean: old_mean.view(),
                var: old_var.view(),
                next_mean: next_mean.view_mut(),
                next_var: next_var.view_mut(),
            };
            forward_from_moments(problem.shape, input, moments, y.view_mut(), saved, Some(running))
        };
        run(shifted.slice(1..shifted.len()).unwrap()).unwrap();
        let short = run(moments.slice(1..moments.len()).unwrap()).unwrap_err();
        assert!(matches!(short, Error::Length { argument: "moments", .. }), "{short:?}");
        // Both are within a few roundings of the exact result. A mean of 50 loses six bits of the deviations.
        for (what, found, expected, tolerance) in [
            ("mean", &mean, &expected.mean, 1e-6),
            ("inv_std", &inv_std, &expected.inv_std, 1e-5),
            ("next_mean", &next_mean, &expected.next_mean, 1e-6),
            ("next_var", &next_var, &expected.next_var, 2e-5),
            ("y", &y, &expected.y, 1e-4),
        ] {
            assert_close(&format!("{name}: {what}"), &found.to_vec().unwrap(), &to_f64(expected), tolerance);
        }
    }
}

fn sums_are_combined_in_groups<T: Scalar>(devices: &[(String, Device)]) {
    let (_, tolerance) = tolerances::<T>();
    for (rows, channels) in [(9100, 70), (9100, 64), (3001, 9)] {
        let problem = Problem::new::<T>(&mut Random(31), rows, channels, false, true);
        on_devices(devices, false, |name, device| {
            let outputs = run_forward::<T>(device, &problem, Mode::Train, false);
            let found = run_backward(device, &problem, Mode::Train, &outputs, Variant::Recompute);
            let (_, dgamma, dbeta) = problem.gradients(Mode::Train, &to_f64(&outputs.y));
            assert_close(&format!("{name}: dgamma"), &found.dgamma, &dgamma, tolerance);
            assert_close(&format!("{name}: dbeta"), &found.dbeta, &dbeta, tolerance);
            vec![bits(&found.dgamma), bits(&found.dbeta)]
        });
    }
}

/// Shapes with so many row blocks that the last one combines their sums in groups, on a CPU that emulates a GPU and on
/// a large GPU: with several columns of blocks, with one, and with one channel per thread.
#[test]
fn the_last_block_combines_the_sums_of_all() {
    sums_are_combined_in_groups::<f32>(&devices());
    sums_are_combined_in_groups::<f64>(&host_devices());
}

#[test]
fn wrong_arguments_are_refused() {
    let device = Device::host();
    let shape = BatchNormShape { rows: 6, channels: 4 };
    let full = device.zeros::<f32>(24).unwrap();
    let channels = device.zeros::<f32>(4).unwrap();
    let elsewhere = Device::host().zeros::<f32>(24).unwrap();
    let refusal = |shape: BatchNormShape, x: &Buffer<f32>, gamma: &Buffer<f32>, made_for: BatchNormShape| {
        let mut y = device.zeros::<f32>(24).unwrap();
        let (mut mean, mut inv_std) = (device.zeros::<f32>(4).unwrap(), device.zeros::<f32>(4).unwrap());
        let mut workspace = Workspace::new(&device, [made_for]).unwrap();
        let input =
            Forward { x: x.view(), gamma: gamma.view(), beta: channels.view(), eps: EPS, residual: None, relu: true };
        let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
        forward_train(shape, input, y.view_mut(), saved, None, &mut workspace)
    };
    assert_eq!(refusal(shape, &full, &channels, shape), Ok(()));
    let operation = "batch_norm::forward_train";
    assert_eq!(
        refusal(shape, &channels, &channels, shape),
        Err(Error::Length { operation, argument: "x", found: 4, expected: 24 })
    );
    assert_eq!(
        refusal(shape, &full, &full, shape),
        Err(Error::Length { operation, argument: "gamma", found: 24, expected: 4 })
    );
    assert_eq!(
        refusal(shape, &full, &channels, BatchNormShape { rows: 6, channels: 3 }),
        Err(Error::Length { operation, argument: "workspace", found: 6, expected: 8 })
    );
    // The other arguments are compared with the device of x.
    let message = refusal(shape, &elsewhere, &channels, shape).unwrap_err();
    assert_eq!(message, Error::OtherDevice { operation, argument: "gamma" });
    let one_row = BatchNormShape { rows: 1, channels: 4 };
    let single = device.zeros::<f32>(4).unwrap();
    let refused = refusal(one_row, &single, &channels, one_row);
    assert!(matches!(refused, Err(Error::Length { argument: "y", .. } | Error::Argument { .. })), "{refused:?}");
    assert!(matches!(
        refusal(BatchNormShape { rows: 6, channels: 0 }, &full, &channels, shape),
        Err(Error::Argument { .. })
    ));

    // With a residual, the mask must come from the output.
    let mut buffers: Vec<Buffer<f32>> = [24, 4, 4, 24].iter().map(|&len| device.zeros(len).unwrap()).collect();
    let [dx, dgamma, dbeta, residual] = &mut buffers[..] else { unreachable!() };
    let mut workspace = Workspace::new(&device, [shape]).unwrap();
    let input = Backward {
        x: full.view(),
        dy: full.view(),
        gamma: channels.view(),
        mean: channels.view(),
        inv_std: channels.view(),
        activation: Activation::ReluRecomputed { beta: channels.view() },
    };
    let gradients = Gradients { dx: dx.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
    let residual = ResidualGradient { gradient: residual.view_mut(), accumulate: false };
    let refused = backward(shape, Mode::Train, input, gradients, Some(residual), &mut workspace);
    assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    // The tangents check their additional arguments.
    let short = device.zeros::<f32>(3).unwrap();
    let (mut y, mut mean, mut inv_std) =
        (device.zeros(24).unwrap(), device.zeros(4).unwrap(), device.zeros(4).unwrap());
    let mut refusal = |activation, beta: &Buffer<f32>, residual: Option<&Buffer<f32>>| {
        let channels = channels.view();
        let input = Normalized { x: full.view(), gamma: channels, mean: channels, inv_std: channels, activation };
        let residual = residual.map(|residual| residual.view());
        let tangents = ForwardTangents { x: full.view(), gamma: channels, beta: beta.view(), residual };
        let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
        forward_tangent(shape, Mode::Train, input, tangents, y.view_mut(), saved, &mut workspace)
    };
    assert_eq!(refusal(Activation::Identity, &channels, Some(&full)), Ok(()));
    let operation = "batch_norm::forward_tangent";
    let refused = Err(Error::Length { operation, argument: "beta'", found: 3, expected: 4 });
    assert_eq!(refusal(Activation::Identity, &short, None), refused);
    let recomputed = Activation::ReluRecomputed { beta: channels.view() };
    assert!(matches!(refusal(recomputed, &channels, Some(&full)), Err(Error::Argument { .. })));
}
