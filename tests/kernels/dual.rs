//! References for layers with tangents: naive formulas over numbers that may carry a derivative. Run over `f64` they
//! give values, over [`Dual`] also the derivatives along a direction, so that the tangent kernels have a reference that
//! is not written by hand.

use std::ops::{Add, Div, Mul, Sub};

use crate::common::{Random, assert_close};
use polder::device::{Buffer, Compute, Device};

/// A number of a formula.
pub trait Number:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + From<f64>
{
    fn exp(self) -> Self;
    fn sqrt(self) -> Self;
    /// The distribution function of the standard normal distribution.
    fn below(self) -> Self;
    /// Its density.
    fn density(self) -> Self;
}

/// A value and its derivative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dual(pub f64, pub f64);

impl From<f64> for Dual {
    fn from(value: f64) -> Self {
        Self(value, 0.0)
    }
}

impl Add for Dual {
    type Output = Self;
    fn add(self, b: Self) -> Self {
        Self(self.0 + b.0, self.1 + b.1)
    }
}

impl Sub for Dual {
    type Output = Self;
    fn sub(self, b: Self) -> Self {
        Self(self.0 - b.0, self.1 - b.1)
    }
}

impl Mul for Dual {
    type Output = Self;
    fn mul(self, b: Self) -> Self {
        Self(self.0 * b.0, self.1 * b.0 + self.0 * b.1)
    }
}

impl Div for Dual {
    type Output = Self;
    fn div(self, b: Self) -> Self {
        Self(self.0 / b.0, (self.1 * b.0 - self.0 * b.1) / (b.0 * b.0))
    }
}

impl Number for f64 {
    fn exp(self) -> Self {
        f64::exp(self)
    }
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    /// `½ + φ(x) (x + x³/3 + x⁵/15 + …)` (Marsaglia 2004), which converges for all x of a test.
    fn below(self) -> Self {
        let (mut term, mut sum, mut n) = (self, self, 1.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 2.0;
            term *= self * self / n;
            sum += term;
        }
        0.5 + self.density() * sum
    }
    fn density(self) -> Self {
        f64::exp(-0.5 * self * self) / f64::sqrt(2.0 * std::f64::consts::PI)
    }
}

impl Number for Dual {
    fn exp(self) -> Self {
        Self(self.0.exp(), self.0.exp() * self.1)
    }
    fn sqrt(self) -> Self {
        Self(self.0.sqrt(), 0.5 / self.0.sqrt() * self.1)
    }
    fn below(self) -> Self {
        Self(self.0.below(), self.0.density() * self.1)
    }
    fn density(self) -> Self {
        Self(self.0.density(), -self.0 * self.0.density() * self.1)
    }
}

/// Random numbers as the type stores them, with random tangents of the same kind.
pub fn drawn<S: Compute>(random: &mut Random, n: usize) -> Vec<Dual> {
    (0..n).map(|_| Dual(S::from_f64(random.normal()).to_f64(), S::from_f64(random.normal()).to_f64())).collect()
}

/// Values and tangents on a device.
pub fn upload<S: Compute>(device: &Device, numbers: &[Dual]) -> [Buffer<S>; 2] {
    let part = |of: fn(&Dual) -> f64| -> Vec<S> { numbers.iter().map(|number| S::from_f64(of(number))).collect() };
    [device.upload(&part(|number| number.0)).unwrap(), device.upload(&part(|number| number.1)).unwrap()]
}

/// Compares what kernels have left with values and tangents of the reference.
pub fn compare<S: Compute>(what: &str, values: &Buffer<S>, tangents: &Buffer<S>, expected: &[Dual], tolerance: f64) {
    let read = |buffer: &Buffer<S>| buffer.to_vec().unwrap().into_iter().map(Compute::to_f64).collect::<Vec<f64>>();
    let values_expected: Vec<f64> = expected.iter().map(|number| number.0).collect();
    assert_close(&format!("{what}: value"), &read(values), &values_expected, tolerance);
    let tangents_expected: Vec<f64> = expected.iter().map(|number| number.1).collect();
    assert_close(&format!("{what}: tangent"), &read(tangents), &tangents_expected, tolerance);
}

/// The error that rounding to the type allows, relative to the largest number.
pub fn tolerance<S: Compute>() -> f64 {
    match S::NAME {
        "f64" => 1e-13,
        "f32" => 4e-6,
        "f16" => 4e-3,
        _ => 3e-2,
    }
}
