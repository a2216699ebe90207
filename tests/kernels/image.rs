//! Batches of augmented images against an explicit gather with the same random numbers, which this file computes
//! independently.

use std::ops::Range;

use crate::common::{self, Random, bits, devices, host_devices};
use polder::device::{Buffer, Device, Error, Result, Scalar};
use polder::kernels::augment::{Augmentation, Augmenter};
use polder::kernels::clock;
use polder::kernels::image::{Augment, BatchShape, Normalization, Position, batch};

const NORMALIZATION: Normalization =
    Normalization { mean: [0.4914, 0.4822, 0.4465, 0.1], std: [0.247, 0.2435, 0.2616, 0.5] };

/// Philox4x32-10 as its authors define it (Salmon et al. 2011), by the counter's low half and the key.
pub fn philox(counter: u64, key: u64) -> [u32; 4] {
    philox_with([counter as u32, (counter >> 32) as u32, 0, 0], key)
}

/// The same for a counter of 128 bits.
pub fn philox_with(counter: [u32; 4], key: u64) -> [u32; 4] {
    let mut c = counter;
    let mut k = [key as u32, (key >> 32) as u32];
    for _ in 0..10 {
        let (a, b) = (0xD2511F53u64 * u64::from(c[0]), 0xCD9E8D57u64 * u64::from(c[2]));
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E3779B9), k[1].wrapping_add(0xBB67AE85)];
    }
    c
}

/// Its published answer for a counter and a key of zeros.
#[test]
fn philox_known_answer() {
    assert_eq!(philox(0, 0), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
}

/// Flip, and the crop's offsets in [0, 2 pad].
fn draws(augment: &Augment, position: usize) -> (bool, usize, usize) {
    let words = philox(augment.counter.wrapping_add(position as u64), augment.seed);
    let offset = |word: u32| ((u64::from(word) * (2 * augment.pad as u64 + 1)) >> 32) as usize;
    (augment.flip && words[0] & 1 == 1, offset(words[1]), offset(words[2]))
}

/// Rows and columns of the square that is cut out.
fn square(augment: &Augment, position: usize, height: usize, width: usize) -> [Range<usize>; 2] {
    let word = philox(augment.counter.wrapping_add(position as u64), augment.seed)[3] as usize;
    [((word & 0xffff) * height) >> 16, ((word >> 16) * width) >> 16].map(|center| {
        let first = center as isize - (augment.cutout / 2) as isize;
        first.max(0) as usize..(first + augment.cutout as isize) as usize
    })
}

struct DataSet {
    samples: usize,
    height: usize,
    width: usize,
    channels: usize,
    pixels: Vec<u8>,
    labels: Vec<u32>,
}

impl DataSet {
    fn new(random: &mut Random, samples: usize, height: usize, width: usize, channels: usize) -> Self {
        // No zeros, so that only padding is black.
        let pixels = (0..samples * height * width * channels).map(|_| 1 + random.below(255) as u8).collect();
        let labels = (0..samples).map(|_| random.below(1000) as u32).collect();
        Self { samples, height, width, channels, pixels, labels }
    }

    /// Flips the image, pads it with black, cuts out the window and then the square.
    fn gather(&self, order: &[u32], augment: Option<&Augment>) -> Vec<f32> {
        let (height, width, channels) = (self.height, self.width, self.channels);
        let mut out = Vec::new();
        for (position, &sample) in order.iter().enumerate() {
            let pad = augment.map_or(0, |augment| augment.pad);
            let (flip, top, left) = augment.map_or((false, 0, 0), |augment| draws(augment, position));
            let canvas_width = width + 2 * pad;
            let mut canvas = vec![0u8; (height + 2 * pad) * canvas_width * channels];
            for (h, w) in (0..height).flat_map(|h| (0..width).map(move |w| (h, w))) {
                let from = ((sample as usize * height + h) * width + if flip { width - 1 - w } else { w }) * channels;
                let to = ((h + pad) * canvas_width + w + pad) * channels;
                canvas[to..to + channels].copy_from_slice(&self.pixels[from..from + channels]);
            }
            let square =
                augment.filter(|augment| augment.cutout > 0).map(|augment| square(augment, position, height, width));
            for (i, j) in (0..height).flat_map(|i| (0..width).map(move |j| (i, j))) {
                for c in 0..channels {
                    if square.as_ref().is_some_and(|[rows, columns]| rows.contains(&i) && columns.contains(&j)) {
                        out.push(0.0);
                        continue;
                    }
                    let value = f32::from(canvas[((i + top) * canvas_width + j + left) * channels + c]);
                    out.push((value / 255.0 - NORMALIZATION.mean[c]) / NORMALIZATION.std[c]);
                }
            }
        }
        out
    }

    fn run<T: Scalar>(&self, device: &Device, order: &[u32], augment: Option<Augment>) -> Result<(Vec<T>, Vec<u32>)> {
        let order = device.upload(order)?;
        self.run_at(device, order.len(), &order, Position::default(), augment)
    }

    fn run_at<T: Scalar>(
        &self,
        device: &Device,
        count: usize,
        order: &Buffer<u32>,
        position: Position<'_>,
        augment: Option<Augment>,
    ) -> Result<(Vec<T>, Vec<u32>)> {
        let shape = BatchShape { batch: count, height: self.height, width: self.width, channels: self.channels };
        let (pixels, labels) = (device.upload(&self.pixels)?, device.upload(&self.labels)?);
        let mut out = device.poisoned::<T>(count * self.height * self.width * self.channels)?;
        let mut out_labels = device.poisoned::<u32>(count)?;
        let (images, labels, order) = (pixels.view(), labels.view(), order.view());
        let into = (out.view_mut(), out_labels.view_mut());
        batch(&shape, images, labels, order, position, &NORMALIZATION, augment, into.0, into.1)?;
        Ok((out.to_vec()?, out_labels.to_vec()?))
    }

    fn order(&self, random: &mut Random, batch: usize) -> Vec<u32> {
        (0..batch).map(|_| random.below(self.samples) as u32).collect()
    }
}

/// The values in single precision are exact, because the arithmetic is the same on every device.
#[test]
fn equals_an_explicit_gather() {
    for (height, width, channels, batch) in [(5, 6, 3, 40), (7, 4, 1, 3), (8, 8, 4, 17), (32, 32, 3, 9), (3, 5, 2, 1)] {
        let mut random = Random((height * width) as u64);
        let data = DataSet::new(&mut random, 23, height, width, channels);
        let order = data.order(&mut random, batch);
        let labels: Vec<u32> = order.iter().map(|&sample| data.labels[sample as usize]).collect();
        let augments = [
            (0, false, 0),
            (0, true, 0),
            (2, false, 0),
            (2, true, 0),
            (9, true, 0),
            (0, false, 1),
            (2, true, 4),
            (1, true, 5),
            (0, true, 99),
        ]
        .map(|(pad, flip, cutout)| Augment {
            pad,
            flip,
            cutout,
            erasing: 0.0,
            seed: 0x1234_5678_9abc_def0,
            counter: (1 << 32) - 5,
        })
        .map(Some);
        for augment in [None].into_iter().chain(augments) {
            let expected = data.gather(&order, augment.as_ref());
            for (name, device) in devices() {
                let (out, out_labels) = data.run::<f32>(&device, &order, augment).unwrap();
                let what = format!("{name}, {height} x {width} x {channels}, {augment:?}");
                assert_eq!(bits(&out), bits(&expected), "{what}");
                assert_eq!(out_labels, labels, "{what}");
            }
        }
    }
}

/// Erasing blanks a rectangle of what is there without it, the same as where images are augmented as a whole
/// (`augment.rs` compares that with torchvision).
#[test]
fn erased_images_are_blank_in_a_rectangle() {
    let mut random = Random(12);
    let data = DataSet::new(&mut random, 7, 18, 21, 3);
    let order = data.order(&mut random, 30);
    let plain = Augment { pad: 2, flip: true, cutout: 5, seed: 3, counter: 9, ..Augment::default() };
    let erasing = Augment { erasing: 0.6, ..plain };
    let shape = BatchShape { batch: 30, height: 18, width: 21, channels: 3 };
    for (name, device) in devices() {
        let (expected, _) = data.run::<f32>(&device, &order, Some(plain)).unwrap();
        let (found, _) = data.run::<f32>(&device, &order, Some(erasing)).unwrap();
        let mut erased = 0;
        for (found, expected) in found.chunks(18 * 21 * 3).zip(expected.chunks(18 * 21 * 3)) {
            erased += usize::from(found != expected);
            assert!(found.iter().zip(expected).all(|(a, b)| a == b || *a == 0.0), "{name}");
        }
        assert!((10..27).contains(&erased), "{name}: {erased}");
        let wanted = Augmentation { basic: erasing, ..Augmentation::default() };
        let mut augmenter = Augmenter::new(&device, shape, wanted).unwrap();
        let (pixels, labels) = (device.upload(&data.pixels).unwrap(), device.upload(&data.labels).unwrap());
        let order = device.upload(&order).unwrap();
        let mut out = device.poisoned::<f32>(found.len()).unwrap();
        let mut truth = device.poisoned::<u32>(30).unwrap();
        let (views, into) = ((pixels.view(), labels.view(), order.view()), (out.view_mut(), truth.view_mut()));
        augmenter.run(views.0, views.1, views.2, Position::default(), &NORMALIZATION, into.0, into.1).unwrap();
        assert_eq!(bits(&out.to_vec().unwrap()), bits(&found), "{name}");
    }
}

#[test]
fn double_precision_differs_by_rounding_alone() {
    let mut random = Random(6);
    let data = DataSet::new(&mut random, 5, 6, 7, 3);
    let order = data.order(&mut random, 8);
    let augment = Augment { pad: 1, flip: true, cutout: 3, seed: 3, ..Augment::default() };
    let expected: Vec<f64> = data.gather(&order, Some(&augment)).into_iter().map(f64::from).collect();
    for (name, device) in host_devices() {
        let (out, _) = data.run::<f64>(&device, &order, Some(augment)).unwrap();
        common::assert_close(&name, &out, &expected, 1e-6);
    }
}

#[test]
fn every_offset_and_both_flips_occur() {
    let (pad, batch) = (2, 4000);
    let augment = Augment { pad, flip: true, seed: 42, counter: 1000, ..Augment::default() };
    let mut counts = vec![0; 2 * 5 * 5];
    for position in 0..batch {
        let (flip, top, left) = draws(&augment, position);
        counts[(usize::from(flip) * 5 + top) * 5 + left] += 1;
    }
    // 80 expected each; 5 deviations of sqrt(80) are 45.
    assert!(counts.iter().all(|&count| (35..125).contains(&count)), "{counts:?}");
    // The kernel cuts where these draws say: an image with a single white pixel shows it.
    let mut data = DataSet { samples: 1, height: 5, width: 5, channels: 1, pixels: vec![0; 25], labels: vec![3] };
    data.pixels[2 * 5 + 2] = 255;
    let white = (1.0 - NORMALIZATION.mean[0]) / NORMALIZATION.std[0];
    for (name, device) in devices() {
        let (out, _) = data.run::<f32>(&device, &vec![0; batch], Some(augment)).unwrap();
        for (position, image) in out.chunks(25).enumerate() {
            let (_, top, left) = draws(&augment, position);
            let place = image.iter().position(|&value| value == white);
            assert_eq!(place, Some((2 + pad - top) * 5 + 2 + pad - left), "{name}, image {position}");
            assert_eq!(image.iter().filter(|&&value| value == white).count(), 1, "{name}, image {position}");
        }
    }
}

#[test]
fn successive_batches_continue_the_stream() {
    let mut random = Random(1);
    let data = DataSet::new(&mut random, 10, 4, 4, 3);
    let order = data.order(&mut random, 12);
    let augment = |counter| Some(Augment { pad: 3, flip: true, seed: 9, counter, ..Augment::default() });
    for (name, device) in devices() {
        let (whole, _) = data.run::<f32>(&device, &order, augment(100)).unwrap();
        let (first, _) = data.run::<f32>(&device, &order[..5], augment(100)).unwrap();
        let (rest, _) = data.run::<f32>(&device, &order[5..], augment(105)).unwrap();
        assert_eq!(whole, [first, rest].concat(), "{name}");
    }
}

/// A clock advances the position in the order by the epoch's batches, and that in the random numbers by the run's
/// steps. Nothing is read beyond the end of the order.
#[test]
fn a_clock_points_at_the_batch() {
    let mut random = Random(8);
    let data = DataSet::new(&mut random, 10, 4, 5, 3);
    let order = data.order(&mut random, 21);
    let augment = |counter| Some(Augment { pad: 3, flip: true, seed: 9, counter, ..Augment::default() });
    for (name, device) in devices() {
        let on_device = device.upload(&order).unwrap();
        let rates = device.upload(&[0.5, 0.25, 0.125]).unwrap();
        let mut rate = device.upload(&[0.5]).unwrap();
        let mut clock = device.upload(&[0u64, 40]).unwrap();
        for tick in 0..3 {
            assert_eq!(rate.to_vec().unwrap(), [0.5 / f64::from(1 << tick)], "{name}");
            for first in [0, 3] {
                let place = 8 * tick + first;
                let position = Position { first, clock: Some((clock.view(), 8)) };
                let (found, labels) = data.run_at::<f32>(&device, 4, &on_device, position, augment(7)).unwrap();
                let known = &order[place..(place + 4).min(order.len())];
                let expected = data.gather(known, augment((7 + 8 * (40 + tick) + first) as u64).as_ref());
                assert_eq!(bits(&found[..expected.len()]), bits(&expected), "{name}, tick {tick}, from {first}");
                assert!(found[expected.len()..].iter().all(|value| value.is_nan()), "{name}");
                assert!(labels[known.len()..].iter().all(|&label| label == u32::MAX), "{name}");
            }
            clock::advance(clock.view_mut(), rates.view(), rate.view_mut()).unwrap();
        }
        assert_eq!((clock.to_vec().unwrap(), rate.to_vec().unwrap()), (vec![3, 43], vec![0.0]), "{name}");
        let position = Position { first: 20, clock: None };
        let refused = data.run_at::<f32>(&device, 4, &on_device, position, None);
        assert!(matches!(refused, Err(Error::Length { argument: "order", expected: 24, .. })), "{refused:?}");
    }
}

#[test]
fn unknown_samples_show() {
    let data = DataSet::new(&mut Random(2), 4, 3, 5, 3);
    for (name, device) in devices() {
        let (out, labels) = data.run::<f32>(&device, &[3, 4, 0, u32::MAX], None).unwrap();
        let known = data.gather(&[3, 0], None);
        let images: Vec<&[f32]> = out.chunks(45).collect();
        assert_eq!(([images[0], images[2]]).concat(), known, "{name}");
        assert!(images[1].iter().chain(images[3]).all(|value| value.is_nan()), "{name}");
        assert_eq!(labels, [data.labels[3], u32::MAX, data.labels[0], u32::MAX], "{name}");
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let device = Device::host();
    let call = |shape: BatchShape, images: usize, labels: usize, std: f32| {
        let (images, labels) = (device.zeros::<u8>(images).unwrap(), device.zeros::<u32>(labels).unwrap());
        let order = device.zeros::<u32>(2).unwrap();
        let mut out = device.zeros::<f32>(2 * 12).unwrap();
        let mut out_labels = device.zeros::<u32>(2).unwrap();
        let normalization = Normalization { mean: [0.0; 4], std: [std; 4] };
        let (images, labels, order) = (images.view(), labels.view(), order.view());
        batch(
            &shape,
            images,
            labels,
            order,
            Position::default(),
            &normalization,
            None,
            out.view_mut(),
            out_labels.view_mut(),
        )
    };
    let shape = BatchShape { batch: 2, height: 2, width: 3, channels: 2 };
    let operation = "image::batch";
    assert_eq!(call(shape, 36, 3, 1.0), Ok(()));
    assert_eq!(call(shape, 35, 3, 1.0), Err(Error::Length { operation, argument: "images", found: 35, expected: 24 }));
    assert_eq!(call(shape, 36, 4, 1.0), Err(Error::Length { operation, argument: "labels", found: 4, expected: 3 }));
    let three = BatchShape { batch: 3, ..shape };
    assert_eq!(call(three, 36, 3, 1.0), Err(Error::Length { operation, argument: "order", found: 2, expected: 3 }));
    for std in [0.0, -1.0, f32::NAN] {
        assert!(matches!(call(shape, 36, 3, std), Err(Error::Argument { .. })), "{std}");
    }
    for (height, channels) in [(0, 2), (2, 0), (2, 5)] {
        let refused = call(BatchShape { height, channels, ..shape }, 36, 3, 1.0);
        assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    }
}
