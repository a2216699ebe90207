//! Augmented batches against torchvision's functions on Pillow's images (`tests/fixtures/generate_augment.py`), to the
//! bit.

use safetensors::tensor::SafeTensors;
use serde_json::Value;

use crate::common::fixtures::{fixture, number, read_json};
use crate::common::{Random, bits, devices, on_devices};
use polder::device::{Device, Error};
use polder::kernels::augment::{Augmentation, Augmenter, Jitter, Operation, Policy, Step};
use polder::kernels::image::{Augment, BatchShape, Normalization, Position};

/// With it a blank value is not a byte's.
const NORMALIZATION: Normalization = Normalization { mean: [-0.5; 4], std: [1.0; 4] };
const BLANK: i32 = -1;

struct Fixture {
    tensors: Vec<u8>,
    text: Value,
}

impl Fixture {
    fn read() -> Self {
        Self { tensors: std::fs::read(fixture("augment.safetensors")).unwrap(), text: read_json("augment.json") }
    }

    /// Images and their shape, with the number of images in place of the batch.
    fn images(&self, name: &str) -> (BatchShape, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let view = tensors.tensor(name).unwrap();
        let &[batch, height, width, ref rest @ ..] = view.shape() else { panic!("{name}: {:?}", view.shape()) };
        let channels = rest.first().copied().unwrap_or(1);
        (BatchShape { batch, height, width, channels }, view.data().to_vec())
    }

    fn seed(&self) -> (u64, u64) {
        (self.text["seed"].as_u64().unwrap(), self.text["counter"].as_u64().unwrap())
    }
}

/// The bytes of a batch, or [`BLANK`].
fn run(device: &Device, shape: BatchShape, pixels: &[u8], order: &[u32], wanted: &Augmentation) -> Vec<i32> {
    let shape = BatchShape { batch: order.len(), ..shape };
    let values = shape.height * shape.width * shape.channels;
    let images = device.upload(pixels).unwrap();
    let labels = device.upload(&vec![5u32; pixels.len() / values]).unwrap();
    let order = device.upload(order).unwrap();
    let mut out = device.poisoned::<f32>(shape.batch * values).unwrap();
    let mut truth = device.poisoned::<u32>(shape.batch).unwrap();
    let mut augmenter = Augmenter::new(device, shape, wanted.clone()).unwrap();
    let (views, into) = ((images.view(), labels.view(), order.view()), (out.view_mut(), truth.view_mut()));
    augmenter.run(views.0, views.1, views.2, Position::default(), &NORMALIZATION, into.0, into.1).unwrap();
    assert!(truth.to_vec().unwrap().iter().all(|&label| label == 5));
    let byte = |value: f32| if value == 0.0 { BLANK } else { ((value - 0.5) * 255.0).round() as i32 };
    out.to_vec().unwrap().into_iter().map(byte).collect()
}

fn operation(name: &str, magnitude: f64) -> Operation {
    match name {
        "Identity" => Operation::Identity,
        "ShearX" => Operation::ShearX(magnitude),
        "ShearY" => Operation::ShearY(magnitude),
        "TranslateX" => Operation::TranslateX(magnitude),
        "TranslateY" => Operation::TranslateY(magnitude),
        "Rotate" => Operation::Rotate(magnitude),
        "Brightness" => Operation::Brightness(1.0 + magnitude),
        "Color" => Operation::Color(1.0 + magnitude),
        "Contrast" => Operation::Contrast(1.0 + magnitude),
        "Sharpness" => Operation::Sharpness(1.0 + magnitude),
        "Posterize" => Operation::Posterize(magnitude as u32),
        "Solarize" => Operation::Solarize(magnitude),
        "AutoContrast" => Operation::AutoContrast,
        "Equalize" => Operation::Equalize,
        "Invert" => Operation::Invert,
        other => panic!("{other}"),
    }
}

fn step(value: &Value) -> Step {
    let name = value[0].as_str().unwrap();
    let (probability, magnitude) = (number(&value[1]), number(&value[2]));
    let otherwise = value[3].as_bool().unwrap().then(|| operation(name, -magnitude));
    Step { operation: operation(name, magnitude), otherwise, probability }
}

#[test]
fn operations_have_the_bits_of_pillow() {
    let fixture = Fixture::read();
    let cases = fixture.text["operations"].as_array().unwrap();
    assert!(cases.len() > 60, "{}", cases.len());
    for name in ["color", "grey"] {
        let (shape, pixels) = fixture.images(&format!("images.{name}"));
        let (_, expected) = fixture.images(&format!("operations.{name}"));
        let values = shape.height * shape.width * shape.channels;
        // One sequence for each operation, all of them on the first image: a batch draws them at random, so each
        // operation has a batch of its own.
        for (device_name, device) in devices() {
            for (index, case) in cases.iter().enumerate() {
                let operation = operation(case[0].as_str().unwrap(), number(&case[1]));
                let step = Step { operation, otherwise: None, probability: 1.0 };
                let policy = Some(Policy { sequences: vec![vec![step]], draws: 1 });
                let found = run(&device, shape, &pixels, &[0], &Augmentation { policy, ..Augmentation::default() });
                let expected: Vec<i32> =
                    expected[index * values..(index + 1) * values].iter().map(|&byte| byte.into()).collect();
                assert!(found == expected, "{device_name}, {name}, {operation:?}: {}", difference(&found, &expected));
            }
        }
    }
}

/// How many values differ, and the first of them.
fn difference(found: &[i32], expected: &[i32]) -> String {
    let pairs = || found.iter().zip(expected).enumerate().filter(|(_, (a, b))| a != b);
    format!("{} of {} values differ, first {:?}", pairs().count(), found.len(), pairs().next())
}

/// Whole pipelines: what a sample draws, in which order the parts follow each other, and each part.
#[test]
fn pipelines_have_the_bits_of_torchvision() {
    let fixture = Fixture::read();
    let (seed, counter) = fixture.seed();
    for (index, case) in fixture.text["pipelines"].as_array().unwrap().iter().enumerate() {
        for name in ["color", "grey"] {
            let (shape, pixels) = fixture.images(&format!("images.{name}"));
            let (expected_shape, bytes) = fixture.images(&format!("pipeline.{index}.{name}"));
            let (_, blank) = fixture.images(&format!("blank.{index}"));
            let expected: Vec<i32> = bytes
                .iter()
                .enumerate()
                .map(|(e, &byte)| if blank[e / shape.channels] != 0 { BLANK } else { byte.into() })
                .collect();
            let draws = case["draws"].as_u64().unwrap() as usize;
            let policy = match case["policy"].as_str() {
                None => None,
                Some("cifar10") => Some(Policy::auto_augment_cifar10(shape.height, shape.width)),
                Some(name) => {
                    let magnitude = name.trim_start_matches("rand").parse().unwrap();
                    Some(Policy::rand_augment(shape.height, shape.width, draws, magnitude).unwrap())
                }
            };
            let strength = |place: usize| number(&case["jitter"][place]);
            let wanted = Augmentation {
                basic: Augment {
                    pad: case["pad"].as_u64().unwrap() as usize,
                    flip: case["flip"].as_bool().unwrap(),
                    cutout: 0,
                    erasing: number(&case["erasing"]),
                    seed,
                    counter,
                },
                resized_crop: case["resized_crop"].as_f64(),
                policy,
                jitter: Jitter {
                    brightness: strength(0),
                    contrast: strength(1),
                    saturation: strength(2),
                    hue: strength(3),
                },
            };
            let order: Vec<u32> = (0..expected_shape.batch as u32).map(|n| n % 4).collect();
            for (device_name, device) in devices() {
                let found = run(&device, shape, &pixels, &order, &wanted);
                assert!(found == expected, "{device_name}, {name}, {case}: {}", difference(&found, &expected));
            }
        }
    }
}

/// No box of the whole area fits into a wide image: its middle is enlarged.
#[test]
fn a_crop_that_fits_nowhere_is_the_middle() {
    let fixture = Fixture::read();
    let (seed, counter) = fixture.seed();
    let (shape, pixels) = fixture.images("whole.images");
    let expected: Vec<i32> = fixture.images("whole").1.into_iter().map(i32::from).collect();
    let basic = Augment { seed, counter, ..Augment::default() };
    for (name, device) in devices() {
        let wanted = Augmentation { basic, resized_crop: Some(1.0), ..Augmentation::default() };
        assert_eq!(run(&device, shape, &pixels, &[0, 1], &wanted), expected, "{name}");
    }
}

/// Operations, probabilities and magnitudes of the lists.
#[test]
fn policies_are_those_of_torchvision() {
    for case in read_json("augment.json")["policies"].as_array().unwrap() {
        let [height, width] = ["height", "width"].map(|side| case[side].as_u64().unwrap() as usize);
        let name = case["policy"].as_str().unwrap();
        let found = match name.strip_prefix("rand") {
            Some(magnitude) => Policy::rand_augment(height, width, 2, magnitude.parse().unwrap()).unwrap(),
            None => Policy::auto_augment_cifar10(height, width),
        };
        let sequences = case["sequences"].as_array().unwrap();
        let expected: Vec<Vec<Step>> =
            sequences.iter().map(|steps| steps.as_array().unwrap().iter().map(step).collect()).collect();
        assert_eq!(found.sequences, expected, "{name}, {height} x {width}");
    }
    assert!(matches!(Policy::rand_augment(32, 32, 2, 31), Err(Error::Argument { .. })));
}

/// Sequences are equally likely, and so are both signs; a step is applied with its probability.
#[test]
fn choices_follow_their_probabilities() {
    let bits_of = |bits| Operation::Posterize(bits);
    let sequence =
        |one, other| vec![Step { operation: bits_of(one), otherwise: Some(bits_of(other)), probability: 0.7 }];
    let policy = Policy { sequences: vec![sequence(1, 2), sequence(3, 4), sequence(5, 6)], draws: 1 };
    let wanted = Augmentation { policy: Some(policy), ..Augmentation::default() };
    let shape = BatchShape { batch: 1, height: 1, width: 1, channels: 1 };
    let count = 12_000;
    let found = run(&Device::host(), shape, &[255], &vec![0; count], &wanted);
    for (value, share) in [
        (128, 0.7 / 6.0),
        (192, 0.7 / 6.0),
        (224, 0.7 / 6.0),
        (240, 0.7 / 6.0),
        (248, 0.7 / 6.0),
        (252, 0.7 / 6.0),
        (255, 0.3),
    ] {
        let expected = share * count as f64;
        let times = found.iter().filter(|&&byte| byte == value).count() as f64;
        assert!((times - expected).abs() < 5.0 * expected.sqrt(), "{value}: {times} times, expected {expected}");
    }
}

/// Factors are uniform, also where 1 − strength is below 0.
#[test]
fn jitter_follows_its_distribution() {
    let shape = BatchShape { batch: 1, height: 1, width: 1, channels: 1 };
    let count = 8000;
    for (brightness, low, high) in [(0.4, 60.0, 140.0), (1.2, 0.0, 220.0)] {
        let jitter = Jitter { brightness, ..Jitter::default() };
        let found =
            run(&Device::host(), shape, &[100], &vec![0; count], &Augmentation { jitter, ..Default::default() });
        let mean = found.iter().map(|&byte| f64::from(byte) + 0.5).sum::<f64>() / count as f64;
        let deviation = (high - low) / 12f64.sqrt() / (count as f64).sqrt();
        assert!((mean - (low + high) / 2.0).abs() < 5.0 * deviation, "{mean}");
        let (least, most) = (found.iter().min().unwrap(), found.iter().max().unwrap());
        assert!(f64::from(*least) - low < 2.0 && high - f64::from(*most) < 3.0, "{least} to {most}");
    }
}

/// A rectangle is erased from the share of images that is asked for. Its area is 0.02 to 0.33 of the image, and it lies
/// anywhere.
#[test]
fn erased_rectangles_follow_their_distribution() {
    let shape = BatchShape { batch: 1, height: 40, width: 40, channels: 1 };
    let count = 4000;
    let basic = Augment { erasing: 0.25, seed: 3, ..Augment::default() };
    let jitter = Jitter::default();
    let found =
        run(&Device::host(), shape, &[9; 1600], &vec![0; count], &Augmentation { basic, jitter, ..Default::default() });
    let areas: Vec<usize> = found
        .chunks(1600)
        .map(|image| image.iter().filter(|&&value| value == BLANK).count())
        .filter(|&area| area > 0)
        .collect();
    // 1000 expected, with a deviation of 27.
    assert!((860..1140).contains(&areas.len()), "{}", areas.len());
    // Sides are rounded: a share of 0.02 is 32 pixels, one of 0.33 is 528.
    assert!(areas.iter().all(|area| (20..=570).contains(area)), "{areas:?}");
    let mean = areas.iter().sum::<usize>() as f64 / areas.len() as f64 / 1600.0;
    assert!((mean - 0.175).abs() < 0.015, "{mean}");
    let hit = |place: usize| found.chunks(1600).any(|image| image[place] == BLANK);
    assert!([0, 39, 1560, 1599, 820].into_iter().all(hit));
}

/// Images that fit into shared memory and images that do not, in every order of blocks and lanes.
#[test]
fn the_bits_do_not_depend_on_the_schedule() {
    for (height, width, channels) in [(32, 32, 3), (7, 5, 3), (100, 90, 3), (160, 170, 1), (1, 1, 1), (2, 3, 3)] {
        let mut random = Random(height as u64);
        let values = height * width * channels;
        let pixels: Vec<u8> = (0..3 * values).map(|_| random.below(256) as u8).collect();
        let shape = BatchShape { batch: 5, height, width, channels };
        let wanted = Augmentation {
            basic: Augment { pad: 0, flip: true, cutout: 6, erasing: 0.5, seed: 4, counter: 9 },
            resized_crop: Some(0.3),
            policy: Some(Policy::rand_augment(height, width, 6, 12).unwrap()),
            jitter: Jitter { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1 },
        };
        on_devices(&devices(), true, |_, device| {
            let found = run(device, shape, &pixels, &[2, 0, 1, 0, 2], &wanted);
            vec![found.into_iter().map(|value| value as u64).collect()]
        });
    }
}

/// A clock moves the draws as a counter does; a batch in parts has the bits of the whole one.
#[test]
fn draws_follow_the_clock() {
    let shape = BatchShape { batch: 4, height: 8, width: 9, channels: 3 };
    let mut random = Random(4);
    let pixels: Vec<u8> = (0..3 * 216).map(|_| random.below(256) as u8).collect();
    for (name, device) in devices() {
        let (images, labels) = (device.upload(&pixels).unwrap(), device.upload(&[1u32, 2, 3]).unwrap());
        let order = device.upload(&[0u32, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]).unwrap();
        let batch = |counter: u64, position: Position<'_>| {
            let wanted = Augmentation {
                basic: Augment { pad: 2, flip: true, seed: 4, counter, ..Augment::default() },
                policy: Some(Policy::auto_augment_cifar10(8, 9)),
                jitter: Jitter { hue: 0.5, ..Jitter::default() },
                ..Augmentation::default()
            };
            let mut augmenter = Augmenter::new(&device, shape, wanted).unwrap();
            let mut out = device.poisoned::<f32>(4 * 216).unwrap();
            let mut truth = device.poisoned::<u32>(4).unwrap();
            let (views, into) = ((images.view(), labels.view(), order.view()), (out.view_mut(), truth.view_mut()));
            augmenter.run(views.0, views.1, views.2, position, &NORMALIZATION, into.0, into.1).unwrap();
            (bits(&out.to_vec().unwrap()), truth.to_vec().unwrap())
        };
        let clock = device.upload(&[1u64, 40]).unwrap();
        let found = batch(7, Position { first: 2, clock: Some((clock.view(), 4)) });
        assert_eq!(found, batch(7 + 160 - 4, Position { first: 6, clock: None }), "{name}");
        assert_ne!(found, batch(7, Position { first: 6, clock: None }), "{name}");
        // Beyond the end of the order there are no samples.
        let (values, truth) = batch(7, Position { first: 6, clock: Some((clock.view(), 4)) });
        assert_eq!(truth[2..], [u32::MAX; 2], "{name}");
        assert!(values[2 * 216..].iter().all(|&value| f64::from_bits(value).is_nan()), "{name}");
    }
}

#[test]
fn what_has_no_meaning_is_refused() {
    let device = Device::host();
    let shape = BatchShape { batch: 2, height: 4, width: 4, channels: 3 };
    let new = |shape: BatchShape, wanted: Augmentation| Augmenter::new(&device, shape, wanted).err();
    let policy = |step: Step| {
        let policy = Some(Policy { sequences: vec![vec![step]], draws: 1 });
        Augmentation { policy, ..Augmentation::default() }
    };
    let invert = Step { operation: Operation::Invert, otherwise: None, probability: 1.0 };
    assert_eq!(new(shape, policy(invert)), None);
    let jitter = |jitter| Augmentation { jitter, ..Augmentation::default() };
    let uneven = Policy { sequences: vec![vec![invert], vec![invert; 2]], draws: 1 };
    for (shape, wanted) in [
        (BatchShape { channels: 2, ..shape }, policy(invert)),
        (BatchShape { height: 0, ..shape }, policy(invert)),
        (BatchShape { width: 40_000, ..shape }, policy(invert)),
        (shape, policy(Step { probability: 1.5, ..invert })),
        (shape, policy(Step { otherwise: Some(Operation::Equalize), ..invert })),
        (shape, policy(Step { operation: Operation::Color(f64::NAN), ..invert })),
        (shape, policy(Step { operation: Operation::TranslateX(1e6), ..invert })),
        (shape, Augmentation { policy: Some(uneven), ..Augmentation::default() }),
        (shape, Augmentation { resized_crop: Some(0.0), ..Augmentation::default() }),
        (shape, jitter(Jitter { hue: 0.6, ..Jitter::default() })),
        (shape, jitter(Jitter { contrast: -0.1, ..Jitter::default() })),
    ] {
        let what = format!("{shape:?}, {wanted:?}");
        assert!(matches!(new(shape, wanted), Some(Error::Argument { .. })), "{what}");
    }
}
