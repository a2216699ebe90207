//! Noise, independent in every value.

use super::draws::Draws;
use super::{bytes, picture};

pub fn gaussian(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let scale = [0.04, 0.06, 0.08, 0.09, 0.10][severity];
    bytes(&picture(image).into_iter().map(|value| value + scale * draws.normal()).collect::<Vec<f64>>())
}

/// The number of photons of a value is Poisson distributed.
pub fn shot(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let photons = [500.0, 250.0, 100.0, 75.0, 50.0][severity];
    let mut values = Vec::with_capacity(image.len());
    for value in picture(image) {
        values.push(poisson(value * photons, draws) / photons);
    }
    bytes(&values)
}

/// Salt and pepper: a share of the values becomes 0 or 1.
pub fn impulse(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let share = [0.01, 0.02, 0.03, 0.05, 0.07][severity];
    let hit = |&value: &u8| {
        let (changed, is_salt) = (draws.uniform() < share, draws.uniform() < 0.5);
        match (changed, is_salt) {
            (false, _) => value,
            (true, true) => 255,
            (true, false) => 0,
        }
    };
    image.iter().map(hit).collect()
}

pub fn speckle(image: &[u8], severity: usize, draws: &mut Draws) -> Vec<u8> {
    let scale = [0.06, 0.1, 0.12, 0.16, 0.2][severity];
    bytes(&picture(image).into_iter().map(|value| value + value * scale * draws.normal()).collect::<Vec<f64>>())
}

/// A Poisson number of this mean, which is at most 500: the sum of the probabilities is inverted.
fn poisson(mean: f64, draws: &mut Draws) -> f64 {
    let target = draws.uniform();
    let (mut probability, mut count) = ((-mean).exp(), 0.0);
    let mut sum = probability;
    // Beyond ten deviations nothing is left but rounding errors.
    let most = mean + 10.0 * mean.sqrt() + 10.0;
    while sum <= target && count < most {
        count += 1.0;
        probability *= mean / count;
        sum += probability;
    }
    count
}
