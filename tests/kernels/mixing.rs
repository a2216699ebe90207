//! mixup and CutMix against their definitions, with the draws computed independently.

use approx::assert_abs_diff_eq;

use super::image::philox;
use crate::common::{Random, bits, devices, on_devices, to_f64};
use half::f16;
use polder::device::{Compute, Device, Error};
use polder::kernels::image::{BatchShape, Position};
use polder::kernels::mixing::{MixedLabels, Mixer, Mixing};

const SEED: u64 = 0x1234_5678_9abc_def0;

struct Mixed<S> {
    images: Vec<S>,
    others: Vec<u32>,
    share: f64,
}

fn run<S: Compute>(mixer: &Mixer, device: &Device, shape: &BatchShape, first: usize, images: &[S]) -> Mixed<S> {
    let labels: Vec<u32> = (10..10 + shape.batch as u32).collect();
    let (mut images, labels) = (device.upload(images).unwrap(), device.upload(&labels).unwrap());
    let (mut others, mut share) = (device.poisoned(shape.batch).unwrap(), device.poisoned(1).unwrap());
    let mut mixed = MixedLabels { others: others.view_mut(), share: share.view_mut() };
    let position = Position { first, clock: None };
    mixer.run(shape, position, images.view_mut(), labels.view(), &mut mixed).unwrap();
    Mixed { images: images.to_vec().unwrap(), others: others.to_vec().unwrap(), share: share.to_vec().unwrap()[0] }
}

/// The rows or columns of CutMix's box.
fn side(word: u32, extent: usize, share: f32) -> std::ops::Range<usize> {
    let center = ((u64::from(word) * extent as u64) >> 32) as usize;
    let half = (extent as f32 * share) as usize / 2;
    center.saturating_sub(half)..(center + half).min(extent)
}

/// With α = 1 the weight is uniform: the first word of the block, up to the rounding of the quantiles.
#[test]
fn batches_are_mixed_as_defined() {
    for (batch, height, width, channels) in [(8, 5, 6, 3), (7, 4, 4, 1), (1, 3, 3, 2), (6, 32, 32, 3), (5, 40, 40, 4)] {
        let shape = BatchShape { batch, height, width, channels };
        let values = height * width * channels;
        let images: Vec<f32> = Random(batch as u64).vector(batch * values);
        for (mixup, cutmix) in [(true, false), (false, true), (true, true)] {
            let one = |wanted: bool| wanted.then_some(1.0);
            let mixing = Mixing { mixup: one(mixup), cutmix: one(cutmix), seed: SEED, counter: (1 << 32) - 3 };
            for first in 0..3 {
                let words = philox(mixing.counter + first as u64, SEED);
                let boxed = cutmix && (!mixup || words[3] & 1 == 1);
                let own = f64::from(words[0]) / 2f64.powi(32);
                let root = (1.0 - own as f32).sqrt();
                let (rows, columns) = (side(words[1], height, root), side(words[2], width, root));
                let inside =
                    |e: usize| rows.contains(&(e / (width * channels))) && columns.contains(&(e / channels % width));
                on_devices(&devices(), true, |name, device| {
                    let what = format!("{name}, {shape:?}, mixup {mixup}, CutMix {cutmix}, batch {first}");
                    let found = run(&Mixer::new(device, mixing).unwrap(), device, &shape, first, &images);
                    let others: Vec<u32> = (10..10 + batch as u32).rev().collect();
                    assert_eq!(found.others, others, "{what}");
                    let share =
                        if boxed { 1.0 - (rows.len() * columns.len()) as f64 / (height * width) as f64 } else { own };
                    assert_abs_diff_eq!(found.share, share, epsilon = if boxed { 1e-15 } else { 1e-6 });
                    let own = found.share as f32;
                    for (n, image) in found.images.chunks(values).enumerate() {
                        let pair = [n, batch - 1 - n].map(|n| &images[n * values..(n + 1) * values]);
                        for (e, value) in image.iter().enumerate() {
                            let expected = match boxed {
                                true => pair[usize::from(inside(e))][e],
                                false if 2 * n + 1 == batch => pair[0][e],
                                false => own * pair[0][e] + (1.0 - own) * pair[1][e],
                            };
                            assert_eq!(value.to_bits(), expected.to_bits(), "{what}, image {n}, value {e}");
                        }
                    }
                    vec![bits(&found.images), vec![found.share.to_bits()]]
                });
            }
        }
    }
}

/// What is stored in 16 bits is rounded once.
#[test]
fn sixteen_bits_round_the_mixture() {
    let shape = BatchShape { batch: 4, height: 5, width: 5, channels: 3 };
    let images: Vec<f16> = Random(3).vector::<f32>(4 * 75).into_iter().map(f16::from_f32).collect();
    let wide: Vec<f32> = images.iter().map(|value| value.to_f32()).collect();
    let mixing = Mixing { mixup: Some(0.4), cutmix: None, seed: 5, counter: 0 };
    for (name, device) in devices() {
        let mixer = Mixer::new(&device, mixing).unwrap();
        let expected = run(&mixer, &device, &shape, 2, &wide);
        let found = run(&mixer, &device, &shape, 2, &images);
        let rounded: Vec<f16> = expected.images.into_iter().map(f16::from_f32).collect();
        assert_eq!((found.images, found.share), (rounded, expected.share), "{name}");
    }
}

/// The weights of many batches have the mean and the variance of the distribution, and both kinds occur.
#[test]
fn draws_follow_the_distribution() {
    let device = Device::host();
    let shape = BatchShape { batch: 2, height: 64, width: 64, channels: 1 };
    let images: Vec<f32> = [vec![0.0; 4096], vec![1.0; 4096]].concat();
    for alpha in [0.2, 1.0, 4.0] {
        let mixing = Mixing { mixup: Some(alpha), cutmix: Some(alpha), seed: 9, counter: 0 };
        let mixer = Mixer::new(&device, mixing).unwrap();
        let (mut blended, mut boxed) = (Vec::new(), 0);
        for first in 0..4000 {
            let found = run(&mixer, &device, &shape, first, &images);
            // A box exchanges zeros and ones.
            if to_f64(&found.images).iter().all(|value| [0.0, 1.0].contains(value)) {
                boxed += 1;
            } else {
                blended.push(found.share);
            }
        }
        // Weights that round to 0 or 1 count as boxes, which α = 0.2 has some of.
        assert!((1800..2400).contains(&boxed), "{boxed}");
        let mean = blended.iter().sum::<f64>() / blended.len() as f64;
        let variance = blended.iter().map(|share| (share - mean).powi(2)).sum::<f64>() / blended.len() as f64;
        assert_abs_diff_eq!(mean, 0.5, epsilon = 0.04);
        assert_abs_diff_eq!(variance, 1.0 / (4.0 * (2.0 * alpha + 1.0)), epsilon = 0.02);
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let device = Device::host();
    let none = Mixing { mixup: None, cutmix: None, seed: 0, counter: 0 };
    let wrong = |mixing| matches!(Mixer::new(&device, mixing), Err(Error::Argument { .. }));
    assert!(wrong(none));
    for alpha in [0.0, -1.0, 8.5, f64::NAN, f64::INFINITY] {
        assert!(wrong(Mixing { mixup: Some(alpha), ..none }) && wrong(Mixing { cutmix: Some(alpha), ..none }));
    }
    let mixer = Mixer::new(&device, Mixing { mixup: Some(1.0), ..none }).unwrap();
    let refused = |shape: BatchShape, lengths: [usize; 4]| {
        let (mut images, labels) = (device.zeros::<f32>(lengths[0]).unwrap(), device.zeros(lengths[1]).unwrap());
        let (mut others, mut share) = (device.zeros(lengths[2]).unwrap(), device.zeros(lengths[3]).unwrap());
        let mut mixed = MixedLabels { others: others.view_mut(), share: share.view_mut() };
        mixer.run(&shape, Position::default(), images.view_mut(), labels.view(), &mut mixed)
    };
    let shape = BatchShape { batch: 2, height: 2, width: 3, channels: 1 };
    assert_eq!(refused(shape, [12, 2, 2, 1]), Ok(()));
    for (lengths, argument) in
        [([11, 2, 2, 1], "images"), ([12, 1, 2, 1], "labels"), ([12, 2, 3, 1], "others"), ([12, 2, 2, 2], "share")]
    {
        let found = refused(shape, lengths);
        assert!(matches!(found, Err(Error::Length { argument: name, .. }) if name == argument), "{found:?}");
    }
    assert!(matches!(refused(BatchShape { height: 0, ..shape }, [0, 2, 2, 1]), Err(Error::Argument { .. })));
}
