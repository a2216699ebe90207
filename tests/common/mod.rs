//! What the kernel tests share: the devices to run on, seeded numbers, and comparisons that say where two vectors
//! differ.
#![allow(dead_code)]

#[cfg(feature = "train")]
pub mod fixtures;
pub mod methods;

use polder::arena::TensorKind;
use polder::device::{BlockOrder, Buffer, Compute, Device, HostOptions, Result, Scalar};
use polder::objective::{Answer, Objective, Pass, Wrapper};
use polder::plan::Plan;

/// Every way to run a kernel here: the CPU's launch shapes on one and on two threads, the GPU's launch shapes on the
/// CPU in three orders of blocks, and the GPU that `POLDER_TEST_DEVICE` names. `POLDER_TEST_ONLY` keeps only the first
/// and the last, which saves time on a machine with a GPU. Under sanitizers there is one device for each kind of launch
/// shape: the others run the same code, and builds without sanitizers compare their bits.
pub fn devices() -> Vec<(String, Device)> {
    let host = |threads, order, emulate_gpu| Device::host_with(HostOptions { threads, order, emulate_gpu });
    let mut devices = vec![
        ("cpu, 1 thread".to_string(), host(1, BlockOrder::Forwards, false)),
        ("cpu, 2 threads".to_string(), host(2, BlockOrder::Forwards, false)),
        ("gpu shapes, forwards".to_string(), host(2, BlockOrder::Forwards, true)),
        ("gpu shapes, backwards".to_string(), host(1, BlockOrder::Backwards, true)),
        ("gpu shapes, random".to_string(), host(1, BlockOrder::Random(7), true)),
    ];
    if std::env::var_os("POLDER_SANITIZE").is_some() {
        devices.retain(|(name, _)| name == "cpu, 2 threads" || name == "gpu shapes, forwards");
    }
    if let Ok(name) = std::env::var("POLDER_TEST_DEVICE") {
        if std::env::var_os("POLDER_TEST_ONLY").is_some() {
            devices.truncate(1);
        }
        devices.push((name.clone(), Device::from_name(&name).unwrap()));
    }
    devices
}

/// Whether `POLDER_TEST_ONLY` leaves [`devices`] too few to compare orders of blocks. Prints that the test is skipped
/// then.
pub fn schedules_left_out() -> bool {
    let left_out = ["POLDER_TEST_DEVICE", "POLDER_TEST_ONLY"].iter().all(|name| std::env::var_os(name).is_some());
    if left_out {
        println!("skipped: POLDER_TEST_ONLY leaves out the other orders of blocks");
    }
    left_out
}

/// Those of [`devices`] that have double precision.
pub fn host_devices() -> Vec<(String, Device)> {
    devices().into_iter().filter(|(_, device)| device.is_host()).collect()
}

/// Runs `kernel` on the devices and asserts that its bits do not depend on the order of blocks or the number of
/// threads. If `elementwise`, the bits are the same on all of the host's devices, otherwise within the CPU's and within
/// the GPU's launch shapes.
pub fn on_devices(
    devices: &[(String, Device)],
    elementwise: bool,
    mut kernel: impl FnMut(&str, &Device) -> Vec<Vec<u64>>,
) {
    let mut found: Vec<(bool, Vec<Vec<u64>>)> = Vec::new();
    for (name, device) in devices {
        let result = kernel(name, device);
        if !device.is_host() {
            continue;
        }
        let shapes = elementwise || name.starts_with("cpu");
        match found.iter().find(|(other, _)| *other == shapes) {
            Some((_, expected)) => assert!(*expected == result, "{name}: other bits than the schedules before it"),
            None => found.push((shapes, result)),
        }
    }
}

/// A small seeded generator (SplitMix64), independent of the library's own.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Roughly normal (the sum of twelve uniforms): enough for inputs.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    /// `n` normal numbers, rounded to `T`.
    pub fn vector<T: Compute>(&mut self, n: usize) -> Vec<T> {
        (0..n).map(|_| T::from_f64(self.normal())).collect()
    }
}

pub fn to_f64<T: Compute>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&value| value.to_f64()).collect()
}

/// Fails unless every element differs from the reference by at most `tolerance` times the reference's largest
/// magnitude: sums of many terms are judged by their scale.
pub fn assert_close<T: Compute>(what: &str, found: &[T], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let scale = expected.iter().fold(0.0f64, |scale, value| scale.max(value.abs())).max(1e-30);
    for (index, (&value, &reference)) in found.iter().zip(expected).enumerate() {
        let value = value.to_f64();
        let error = (value - reference).abs() / scale;
        assert!(
            error <= tolerance,
            "{what}[{index}]: {value} instead of {reference} (error {error:.2e} of {scale:.3e})"
        );
    }
}

/// The bits of a vector, for comparisons that allow no difference at all.
pub fn bits<T: Compute>(values: &[T]) -> Vec<u64> {
    values.iter().map(|&value| value.to_f64().to_bits()).collect()
}

pub fn upload<T: Scalar>(device: &Device, values: &[f64]) -> Buffer<T> {
    let values: Vec<T> = values.iter().map(|&value| T::from_f64(value)).collect();
    device.upload(&values).unwrap()
}

/// ‖a − b‖/‖b‖.
pub fn relative_error(found: &[f64], reference: &[f64]) -> f64 {
    let difference: f64 = found.iter().zip(reference).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / reference.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

/// The CPU with two threads, and the device that `POLDER_TEST_DEVICE` names.
pub fn fast_devices() -> Vec<Device> {
    let mut devices = vec![Device::host_with(HostOptions { threads: 2, ..HostOptions::default() })];
    if let Ok(name) = std::env::var("POLDER_TEST_DEVICE") {
        devices.push(Device::from_name(&name).unwrap());
    }
    devices
}

/// Half a unit in the last place of a number in [1, 2).
pub fn roundoff<S: Compute>() -> f64 {
    match S::NAME {
        "bf16" => 2f64.powi(-8),
        "bf16x3" => 2f64.powi(-16),
        "bf16x6" => 2f64.powi(-21), // that of f32 sums, not of a factor
        _ => 2f64.powi(-11),
    }
}

/// Random weights of a sane size: He's for matrices, near one for scales.
pub fn weights<T: Compute>(plan: &Plan<T>, random: &mut Random) -> Vec<f64> {
    let mut weights = vec![0.0; plan.parameters().len()];
    for tensor in plan.parameters().tensors() {
        for weight in &mut weights[tensor.range()] {
            *weight = match tensor.kind {
                TensorKind::Convolution { kernel, inputs, .. } => {
                    random.normal() * (2.0 / (kernel * kernel * inputs) as f64).sqrt()
                }
                TensorKind::Linear { inputs, .. } | TensorKind::Projection { inputs, .. } => {
                    random.normal() / (inputs as f64).sqrt()
                }
                TensorKind::Scale(_) => 1.0 + 0.2 * random.normal(),
                _ => 0.2 * random.normal(),
            };
        }
    }
    weights
}

/// An objective of several groups: `show` makes one of them the plan's batch.
pub struct Grouped<'a, S: Compute, F> {
    pub plan: &'a mut Plan<S>,
    pub groups: usize,
    pub show: F,
}

impl<S: Compute, F: FnMut(&mut Plan<S>, usize) -> Result<()>> Wrapper<S::Master> for Grouped<'_, S, F> {
    fn inner(&self) -> &dyn Objective<S::Master> {
        self.plan
    }

    fn inner_mut(&mut self) -> &mut dyn Objective<S::Master> {
        self.plan
    }

    fn groups(&self) -> usize {
        self.groups
    }

    fn answer<'p>(&mut self, pass: Pass<'p, S::Master>) -> Result<Answer<'p, S::Master>> {
        let Pass::Select { group } = pass else { return Ok(Answer::Forward(pass)) };
        (self.show)(self.plan, group)?;
        Ok(Answer::Done)
    }
}

/// Five Newton–Schulz steps of a matrix over its norm, as Muon's authors write them.
pub fn newton_schulz(matrix: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let x = nalgebra::DMatrix::from_row_slice(rows, columns, matrix);
    let mut x = &x / x.norm().max(1e-7);
    for _ in 0..5 {
        let gram = &x * x.transpose();
        x = 3.4445 * &x + (-4.7750 * &gram + 2.0315 * &gram * &gram) * &x;
    }
    x.transpose().as_slice().to_vec()
}
