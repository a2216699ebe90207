//! Corruptions of images against SciPy, Pillow and NumPy (`tests/fixtures/generate_corrupt.py`).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use polder::data::{CORRUPTIONS, Corruption, DataError, ImageShape, Images, SEVERITIES};
use safetensors::SafeTensors;

const SHAPE: ImageShape = ImageShape { height: 32, width: 32, channels: 3 };
const BYTES: usize = 32 * 32 * 3;

fn images(pixels: Vec<u8>) -> Images {
    let labels = vec![0; pixels.len() / BYTES];
    Images::new(pixels, labels, SHAPE, 10).unwrap()
}

fn corrupted(corruption: &Corruption, images: &Images, severity: usize, seed: u64, threads: usize) -> Vec<u8> {
    let done = AtomicUsize::new(0);
    let found = corruption.images(images, severity, (seed, threads), &AtomicBool::new(false), &done).unwrap();
    assert_eq!(done.load(Ordering::Relaxed), images.len());
    found.unwrap()
}

/// The image of the fixture is number 3 of its set. Sums of other order and other functions may round to the byte
/// below or above.
#[test]
fn corruptions_are_those_of_the_benchmark() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/corrupt.safetensors");
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let image = tensors.tensor("image").unwrap().data().to_vec();
    let set = images(image.repeat(4));
    assert_eq!(tensors.len(), CORRUPTIONS.len() + 1);
    for corruption in CORRUPTIONS {
        let expected = tensors.tensor(corruption.name).unwrap();
        for severity in 1..=SEVERITIES {
            let found = corrupted(corruption, &set, severity, 11, 2);
            let found = &found[3 * BYTES..];
            let expected = &expected.data()[(severity - 1) * BYTES..severity * BYTES];
            let distances: Vec<u8> = found.iter().zip(expected).map(|(&a, &b)| a.abs_diff(b)).collect();
            let (most, off) =
                (distances.iter().max().unwrap(), distances.iter().filter(|&&distance| distance > 0).count());
            assert!(*most <= 1 && off < BYTES / 100, "{} {severity}: {most}, {off}", corruption.name);
            let changed = found.iter().zip(&image).filter(|(a, b)| a != b).count();
            assert!(changed > 20, "{} {severity} changes {changed} values", corruption.name);
        }
    }
}

/// Mean and deviation of the noises on one value.
#[test]
fn noises_have_their_moments() {
    let set = images(vec![102; 8 * BYTES]);
    let scaled = |name: &str, deviation: [f64; SEVERITIES]| (name.to_string(), deviation);
    let photons = [500.0, 250.0, 100.0, 75.0, 50.0].map(|count: f64| (0.4 / count).sqrt());
    for (name, deviations) in [
        scaled("gaussian_noise", [0.04, 0.06, 0.08, 0.09, 0.10]),
        scaled("speckle_noise", [0.06, 0.1, 0.12, 0.16, 0.2].map(|scale: f64| 0.4 * scale)),
        scaled("shot_noise", photons),
    ] {
        for (severity, deviation) in (1..).zip(deviations) {
            let found = corrupted(Corruption::find(&name).unwrap(), &set, severity, 1, 1);
            let values: Vec<f64> = found.iter().map(|&byte| (f64::from(byte) + 0.5) / 255.0).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let spread = (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
            // Bytes are cut off, so their middle is half a step above them.
            assert!((mean - 0.4).abs() < 0.003, "{name} {severity}: {mean}");
            assert!((spread / deviation - 1.0).abs() < 0.04, "{name} {severity}: {spread}, expected {deviation}");
        }
    }
    for (severity, share) in (1..).zip([0.01, 0.02, 0.03, 0.05, 0.07]) {
        let found = corrupted(Corruption::find("impulse_noise").unwrap(), &set, severity, 1, 1);
        for value in [0, 255] {
            let hit = found.iter().filter(|&&byte| byte == value).count() as f64 / found.len() as f64;
            assert!((hit - share / 2.0).abs() < 0.006, "{severity}: {hit} are {value}");
        }
    }
}

/// Every image has its own numbers, and they depend on nothing else.
#[test]
fn draws_depend_on_seed_and_image_alone() {
    let set = images((0..5 * BYTES).map(|e| (e % BYTES * 7 % 251) as u8).collect());
    for corruption in CORRUPTIONS {
        let found = corrupted(corruption, &set, 3, 5, 1);
        assert!(found == corrupted(corruption, &set, 3, 5, 4), "{}", corruption.name);
        let first = images(set.bytes_of(0..2).unwrap().into_owned());
        assert!(found[..2 * BYTES] == corrupted(corruption, &first, 3, 5, 1), "{}", corruption.name);
        let is_random = found != corrupted(corruption, &set, 3, 6, 1);
        assert_eq!(is_random, found[..BYTES] != found[BYTES..2 * BYTES], "{}", corruption.name);
    }
}

#[test]
fn other_images_and_severities_are_refused() {
    let fog = Corruption::find("fog").unwrap();
    let call =
        |images: &Images, severity| fog.images(images, severity, (0, 1), &AtomicBool::new(false), &AtomicUsize::new(0));
    let small = Images::new(vec![0; 48], vec![0], ImageShape { height: 4, width: 4, channels: 3 }, 10).unwrap();
    assert!(matches!(call(&small, 1), Err(DataError::NotCifar { .. })));
    let set = images(vec![9; BYTES]);
    assert!(matches!(call(&set, 0), Err(DataError::NoSeverity { severity: 0 })));
    assert!(matches!(call(&set, 6), Err(DataError::NoSeverity { severity: 6 })));
    let stopped = fog.images(&set, 1, (0, 1), &AtomicBool::new(true), &AtomicUsize::new(0)).unwrap();
    assert_eq!(stopped, None);
    assert!(Corruption::find("frost").is_none());
}
