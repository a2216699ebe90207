//! A data set of your own: images in memory, which the loop trains on and tests on.
//!
//! `cargo run --release --example own_data`

use polder::data::{DataError, Dataset, ImageShape, Images};
use polder::train::{DataSettings, LoopSettings, RunSettings, TrainError, Training};

/// Grey images of 12×12 pixels with a bar: class 0 lying, class 1 standing, class 2 diagonal.
fn bars(count: usize, seed: u64) -> Result<Images, DataError> {
    let shape = ImageShape { height: 12, width: 12, channels: 1 };
    let mut random = seed;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % bound
    };
    let labels: Vec<u32> = (0..count).map(|index| (index % 3) as u32).collect();
    let mut pixels = Vec::new();
    for &label in &labels {
        let place = below(12);
        for row in 0..12 {
            for column in 0..12 {
                let on = match label {
                    0 => row == place,
                    1 => column == place,
                    _ => (row + column) % 12 == place,
                };
                pixels.push((if on { 180 } else { 40 } + below(40)) as u8);
            }
        }
    }
    Images::new(pixels, labels, shape, 3)
}

fn main() -> Result<(), TrainError> {
    let data = Dataset::new("bars", bars(384, 1)?, bars(96, 2)?)?;
    println!("{}: mean {:?}, standard deviation {:?}", data.name, data.mean, data.std);
    let settings = RunSettings {
        data: DataSettings { batch_size: 32, ..DataSettings::default() },
        run: LoopSettings { epochs: 4, device: "cpu".into(), ..LoopSettings::default() },
        ..RunSettings::default()
    };
    // The network and the method are the default settings: a ResNet-8 and SAM.
    let summary = Training::new(settings).dataset(data).run()?;
    let test = summary.test.expect("a run that ended");
    println!("{} of {} test images wrong", test.errors, test.samples);
    assert!(test.accuracy > 0.8, "bars are easy");
    // Labels that are no classes and pixels that are missing are refused.
    let shape = ImageShape { height: 12, width: 12, channels: 1 };
    assert!(matches!(Images::new(vec![0; 144], vec![3], shape, 3), Err(DataError::Class { label: 3, .. })));
    assert!(matches!(Images::new(vec![0; 143], vec![0], shape, 3), Err(DataError::PixelCount { found: 143, .. })));
    Ok(())
}
