//! The kernels that measure peak rates do the work that they report.

use polder::device::{Device, Error};
use polder::kernels::peak::{self, Unit};

use crate::common::devices;

#[test]
fn the_multiply_adds_are_those_of_whole_vectors_and_tiles() {
    let device = Device::host();
    let (blocks, rounds) = (3, 5);
    let each = |unit| peak::multiply_adds(&device, unit, blocks, rounds).unwrap() as f64 / (3 * 5) as f64;
    // Twelve vectors of 8 or 16 floats.
    assert!([12.0 * 8.0, 12.0 * 16.0].contains(&each(Unit::Vector)));
    // Four products of tiles.
    assert_eq!(each(Unit::Matrix), 4.0 * 16.0 * 16.0 * 32.0);
}

#[test]
fn a_gpu_multiplies_tiles_in_four_warps() {
    for (name, device) in devices() {
        if name.starts_with("cpu") {
            continue;
        }
        let done = peak::multiply_adds(&device, Unit::Matrix, 3, 5).unwrap();
        assert_eq!(done, 3 * 5 * 4 * 8 * 16 * 16 * 8, "{name}");
        let refused = peak::multiply_adds(&device, Unit::Vector, 3, 5);
        assert!(matches!(refused, Err(Error::Argument { .. })), "{name}");
    }
}
