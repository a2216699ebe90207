//! The kernels that measure the CPU's peak rates do the work that they report.

use polder::device::Device;
use polder::kernels::peak::{self, Unit};

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
