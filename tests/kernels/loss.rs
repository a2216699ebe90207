//! Cross-entropy against its definition in double, its gradient against central differences, and its edge cases.

use approx::{abs_diff_eq, relative_eq};

use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices, to_f64};
use polder::device::{Device, Error, Scalar};
use polder::kernels::loss::{LossShape, Targets, cross_entropy, cross_entropy_tangent};
use polder::kernels::precision;

struct Found<T> {
    dlogits: Vec<T>,
    sample_losses: Vec<T>,
    loss: f64,
    correct: u32,
}

fn run<T: Scalar>(device: &Device, classes: usize, logits: &[T], labels: &[u32], smoothing: f64) -> Found<T> {
    run_mixed(device, classes, logits, labels, None, smoothing)
}

fn run_mixed<T: Scalar>(
    device: &Device,
    classes: usize,
    logits: &[T],
    labels: &[u32],
    mixed: Option<(&[u32], f64)>,
    smoothing: f64,
) -> Found<T> {
    let batch = labels.len();
    let shape = LossShape { batch, classes };
    let logits = device.upload(logits).unwrap();
    let labels = device.upload(labels).unwrap();
    let mut dlogits = device.poisoned::<T>(batch * classes).unwrap();
    let mut sample_losses = device.poisoned::<T>(batch).unwrap();
    let mut loss = device.poisoned::<f64>(1).unwrap();
    // The count is added to the previous content.
    let mut correct = device.upload(&[1000u32]).unwrap();
    let mut flag = device.zeros::<u32>(1).unwrap();
    let mixed = mixed.map(|(others, share)| (device.upload(others).unwrap(), device.upload(&[share]).unwrap()));
    let mixed = mixed.as_ref().map(|(others, share)| (others.view(), share.view()));
    let targets = Targets { labels: labels.view(), mixed, smoothing };
    cross_entropy(
        &shape,
        logits.view(),
        targets,
        Some(dlogits.view_mut()),
        None,
        sample_losses.view_mut(),
        loss.view_mut(),
        correct.view_mut(),
        Some(flag.view_mut()),
    )
    .unwrap();
    let found = Found {
        dlogits: dlogits.to_vec().unwrap(),
        sample_losses: sample_losses.to_vec().unwrap(),
        loss: loss.to_vec().unwrap()[0],
        correct: correct.to_vec().unwrap()[0] - 1000,
    };
    // Without the gradient, the other results are the same.
    cross_entropy(
        &shape,
        logits.view(),
        targets,
        None,
        None,
        sample_losses.view_mut(),
        loss.view_mut(),
        correct.view_mut(),
        None,
    )
    .unwrap();
    assert_eq!(bits(&sample_losses.to_vec().unwrap()), bits(&found.sample_losses));
    assert_eq!(loss.to_vec().unwrap()[0].to_bits(), found.loss.to_bits());
    assert_eq!(flag.to_vec().unwrap()[0], u32::from(!found.loss.is_finite()), "{}", found.loss);
    assert_eq!(correct.to_vec().unwrap()[0], 1000 + 2 * found.correct);
    found
}

/// The losses, the mean's gradient and the count, from the definition.
fn reference(
    classes: usize,
    logits: &[f64],
    labels: &[u32],
    (others, share): (&[u32], f64),
    smoothing: f64,
) -> (Vec<f64>, Vec<f64>, u32) {
    let (mut losses, mut gradient, mut correct) = (Vec::new(), Vec::new(), 0);
    for ((z, &label), &other) in logits.chunks(classes).zip(labels).zip(others) {
        let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = z.iter().map(|z| (z - largest).exp()).sum();
        let mut loss = 0.0;
        for (k, z) in z.iter().enumerate() {
            let log_p = z - largest - sum.ln();
            let is = |label: u32| if k == label as usize { 1.0 } else { 0.0 };
            let one_hot = share * is(label) + (1.0 - share) * is(other);
            let target = (1.0 - smoothing) * one_hot + smoothing / classes as f64;
            loss -= target * log_p;
            gradient.push((log_p.exp() - target) / labels.len() as f64);
        }
        losses.push(loss);
        correct += u32::from(z.iter().position(|&z| z == largest) == Some(label as usize));
    }
    (losses, gradient, correct)
}

fn matches_the_definition<T: Scalar>(devices: Vec<(String, Device)>, tolerance: f64) {
    for (index, (batch, classes)) in [(1, 1), (7, 3), (37, 10), (300, 17), (5, 1000), (64, 100)].into_iter().enumerate()
    {
        let mut random = Random(index as u64);
        let logits: Vec<T> = (0..batch * classes).map(|_| T::from_f64(4.0 * random.normal() + 30.0)).collect();
        let labels: Vec<u32> = (0..batch).map(|_| random.below(classes) as u32).collect();
        let others: Vec<u32> = (0..batch).map(|_| random.below(classes) as u32).collect();
        for (smoothing, share) in [0.0, 0.1, 1.0].into_iter().flat_map(|s| [1.0, 0.3, 0.0].map(|share| (s, share))) {
            let (losses, gradient, correct) =
                reference(classes, &to_f64(&logits), &labels, (&others, share), smoothing);
            for (name, device) in &devices {
                let what = format!("{name}, {batch} x {classes}, smoothing {smoothing}, share {share}");
                let found = match share {
                    1.0 => run(device, classes, &logits, &labels, smoothing),
                    _ => run_mixed(device, classes, &logits, &labels, Some((&others, share)), smoothing),
                };
                assert_close(&format!("{what}: losses"), &found.sample_losses, &losses, tolerance);
                assert_close(&format!("{what}: gradient"), &found.dlogits, &gradient, tolerance);
                let mean = losses.iter().sum::<f64>() / batch as f64;
                assert!(
                    abs_diff_eq!(found.loss, mean, epsilon = tolerance * mean.abs().max(1e-3)),
                    "{what}: {} not {mean}",
                    found.loss
                );
                // The mean of the losses that it wrote, in double precision.
                let written = to_f64(&found.sample_losses).iter().sum::<f64>() / batch as f64;
                assert!(
                    relative_eq!(found.loss, written, epsilon = 0.0, max_relative = 1e-14),
                    "{what}: {} not {written}",
                    found.loss
                );
                assert_eq!(found.correct, correct, "{what}: correct");
            }
        }
    }
}

#[test]
fn single_precision_matches_the_definition() {
    matches_the_definition::<f32>(devices(), 2e-6);
}

#[test]
fn double_precision_matches_the_definition() {
    matches_the_definition::<f64>(host_devices(), 4e-15);
}

#[test]
fn gradient_is_that_of_the_loss() {
    const STEP: f64 = 1e-5;
    let (batch, classes) = (5, 7);
    let mut random = Random(4);
    let mut logits: Vec<f64> = random.vector(batch * classes);
    let labels: Vec<u32> = (0..batch).map(|_| random.below(classes) as u32).collect();
    for (name, device) in host_devices() {
        let found = run(&device, classes, &logits, &labels, 0.1);
        let mut differences = Vec::new();
        for i in 0..logits.len() {
            let original = logits[i];
            logits[i] = original + STEP;
            let above = run(&device, classes, &logits, &labels, 0.1).loss;
            logits[i] = original - STEP;
            let below = run(&device, classes, &logits, &labels, 0.1).loss;
            logits[i] = original;
            differences.push((above - below) / (2.0 * STEP));
        }
        assert_close(&name, &found.dlogits, &differences, 1e-9);
    }
}

/// A scale that is a power of two multiplies the gradient and its tangent exactly, and changes nothing else.
#[test]
fn a_loss_scale_multiplies_gradients_alone() {
    let (batch, classes) = (37, 10);
    let mut random = Random(5);
    let logits: Vec<f32> = random.vector(batch * classes);
    let direction: Vec<f32> = random.vector(batch * classes);
    let labels: Vec<u32> = (0..batch).map(|_| random.below(classes) as u32).collect();
    let shape = LossShape { batch, classes };
    for (name, device) in devices() {
        let plain = run(&device, classes, &logits, &labels, 0.1);
        let scaled = |values: &[f32]| values.iter().map(|value| value * 4096.0).collect::<Vec<f32>>();
        let plain_tangent = run_tangent(&device, classes, &logits, &direction);
        let (logits, direction) = (device.upload(&logits).unwrap(), device.upload(&direction).unwrap());
        let (labels, scale) = (device.upload(&labels).unwrap(), device.upload(&[4096.0, 7.0]).unwrap());
        let mut dlogits = device.poisoned::<f32>(batch * classes).unwrap();
        let (mut losses, mut loss) = (device.poisoned::<f32>(batch).unwrap(), device.poisoned(1).unwrap());
        let mut correct = device.zeros(1).unwrap();
        let (out, scale) = (Some(dlogits.view_mut()), Some(scale.view()));
        let results = (losses.view_mut(), loss.view_mut(), correct.view_mut());
        let targets = Targets { labels: labels.view(), mixed: None, smoothing: 0.1 };
        cross_entropy(&shape, logits.view(), targets, out, scale, results.0, results.1, results.2, None).unwrap();
        assert_eq!(dlogits.to_vec().unwrap(), scaled(&plain.dlogits), "{name}");
        assert_eq!(loss.to_vec().unwrap(), [plain.loss], "{name}");
        cross_entropy_tangent(&shape, logits.view(), direction.view(), dlogits.view_mut(), scale).unwrap();
        assert_eq!(dlogits.to_vec().unwrap(), scaled(&plain_tangent), "{name}");
    }
}

/// Division by the scale is exact, NaN and infinity are found anywhere, and the flag is never cleared.
#[test]
fn a_result_is_unscaled_and_checked() {
    let mut random = Random(6);
    let whole: Vec<f32> = random.vector(5003);
    for (name, device) in devices() {
        let state = device.upload(&[65536.0, 3.0]).unwrap();
        for len in [1, 3, 4, 1001, 5003] {
            let values = &whole[..len];
            let check = |values: &[f32], flag: u32| {
                let scaled: Vec<f32> = values.iter().map(|value| value * 65536.0).collect();
                let mut x = device.upload(&scaled).unwrap();
                let mut flag = device.upload(&[flag]).unwrap();
                precision::unscale(x.view_mut(), state.view(), flag.view_mut()).unwrap();
                (x.to_vec().unwrap(), flag.to_vec().unwrap()[0])
            };
            assert_eq!(check(values, 0), (values.to_vec(), 0), "{name}, {len}");
            assert_eq!(check(values, 1).1, 1, "{name}, {len}");
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
                let mut damaged = values.to_vec();
                damaged[random.below(len)] = bad;
                assert_eq!(check(&damaged, 0).1, 1, "{name}, {len}, {bad}");
            }
        }
    }
}

/// The scale halves after a skipped step and doubles after enough consecutive good ones. It stays between 1 and 2^24.
#[test]
fn the_loss_scale_follows_the_steps() {
    for (name, device) in devices() {
        let (good, skipped) = (device.upload(&[0u32]).unwrap(), device.upload(&[1u32]).unwrap());
        let after = |start: [f64; 2], skip: &polder::device::Buffer<u32>| {
            let mut state = device.upload(&start).unwrap();
            precision::update_scale(state.view_mut(), skip.view()).unwrap();
            state.to_vec().unwrap()
        };
        let last = precision::SCALE_GROWTH_INTERVAL - 1.0;
        assert_eq!(after([65536.0, 5.0], &good), [65536.0, 6.0], "{name}");
        assert_eq!(after([65536.0, last], &good), [131072.0, 0.0], "{name}");
        assert_eq!(after([65536.0, last], &skipped), [32768.0, 0.0], "{name}");
        assert_eq!(after([1.0, 5.0], &skipped), [1.0, 0.0], "{name}");
        assert_eq!(after([16777216.0, last], &good), [16777216.0, 0.0], "{name}");
        let mut state = device.zeros::<f64>(1).unwrap();
        let refused = precision::update_scale(state.view_mut(), good.view());
        assert!(matches!(refused, Err(Error::Length { argument: "state", .. })), "{refused:?}");
    }
}

fn run_tangent<T: Scalar>(device: &Device, classes: usize, logits: &[T], tangent: &[T]) -> Vec<T> {
    let shape = LossShape { batch: logits.len() / classes, classes };
    let (logits, tangent) = (device.upload(logits).unwrap(), device.upload(tangent).unwrap());
    let mut found = device.poisoned::<T>(logits.len()).unwrap();
    cross_entropy_tangent(&shape, logits.view(), tangent.view(), found.view_mut(), None).unwrap();
    found.to_vec().unwrap()
}

/// p (z' − Σ p z') / batch, from the definition.
fn tangent_reference(classes: usize, logits: &[f64], tangent: &[f64]) -> Vec<f64> {
    let batch = (logits.len() / classes) as f64;
    let of_sample = |(z, dz): (&[f64], &[f64])| {
        let largest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = z.iter().map(|z| (z - largest).exp()).sum();
        let p: Vec<f64> = z.iter().map(|z| (z - largest).exp() / sum).collect();
        let mean: f64 = p.iter().zip(dz).map(|(p, dz)| p * dz).sum();
        p.iter().zip(dz).map(|(p, dz)| p * (dz - mean) / batch).collect::<Vec<f64>>()
    };
    logits.chunks(classes).zip(tangent.chunks(classes)).flat_map(of_sample).collect()
}

fn tangent_matches_the_definition<T: Scalar>(devices: Vec<(String, Device)>, tolerance: f64) {
    for (index, (batch, classes)) in [(7, 3), (37, 10), (300, 17), (5, 1000), (64, 100)].into_iter().enumerate() {
        let mut random = Random(50 + index as u64);
        let logits: Vec<T> = (0..batch * classes).map(|_| T::from_f64(2.0 * random.normal() + 30.0)).collect();
        // A constant added to all logits must not change the result. The reference subtracts it, which is exact.
        let tangent: Vec<T> = (0..batch * classes).map(|_| T::from_f64(random.normal() + 100.0)).collect();
        let less: Vec<f64> = to_f64(&tangent).iter().map(|tangent| tangent - 100.0).collect();
        let expected = tangent_reference(classes, &to_f64(&logits), &less);
        for (name, device) in &devices {
            let found = run_tangent(device, classes, &logits, &tangent);
            assert_close(&format!("{name}, {batch} x {classes}"), &found, &expected, tolerance);
        }
    }
    for (name, device) in devices {
        // A single class has the probability 1 for any logit. Logits of 1e4 do not overflow.
        let zero = T::from_f64(0.0);
        let found = run_tangent(&device, 1, &[zero, T::from_f64(3.0)], &[T::from_f64(1.0), T::from_f64(-2.0)]);
        assert_eq!(to_f64(&found), [0.0; 2], "{name}");
        let found = run_tangent(&device, 2, &[T::from_f64(1e4), T::from_f64(-1e4)], &[T::from_f64(5.0), zero]);
        assert_eq!(to_f64(&found), [0.0; 2], "{name}");
    }
}

#[test]
fn the_gradients_tangent_matches_the_definition() {
    tangent_matches_the_definition::<f32>(devices(), 2e-6);
    tangent_matches_the_definition::<f64>(host_devices(), 4e-15);
}

#[test]
fn the_gradients_tangent_is_its_derivative() {
    const STEP: f64 = 1e-5;
    let (batch, classes) = (5, 7);
    let mut random = Random(6);
    let [logits, tangent]: [Vec<f64>; 2] = [random.vector(batch * classes), random.vector(batch * classes)];
    let labels: Vec<u32> = (0..batch).map(|_| random.below(classes) as u32).collect();
    for (name, device) in host_devices() {
        let at = |step: f64| {
            let moved: Vec<f64> = logits.iter().zip(&tangent).map(|(z, dz)| z + step * dz).collect();
            run(&device, classes, &moved, &labels, 0.1).dlogits
        };
        let differences: Vec<f64> =
            at(STEP).iter().zip(at(-STEP)).map(|(above, below)| (above - below) / (2.0 * STEP)).collect();
        assert_close(&name, &run_tangent(&device, classes, &logits, &tangent), &differences, 1e-8);
    }
}

/// Closed forms: equal logits have the loss ln K for any smoothing, and two classes give a logistic function. Logits of
/// 1e4 do not overflow.
#[test]
fn closed_forms() {
    for (name, device) in devices() {
        let uniform = run::<f32>(&device, 10, &[7.5; 30], &[0, 4, 9], 0.2);
        assert!(abs_diff_eq!(uniform.loss, 10f64.ln(), epsilon = 3e-7), "{name}: {}", uniform.loss);
        let two = run::<f32>(&device, 2, &[0.0, 2.0], &[0], 0.0);
        assert!(abs_diff_eq!(two.loss, (1.0 + 2f64.exp()).ln(), epsilon = 3e-7), "{name}: {}", two.loss);
        let smoothed = run::<f32>(&device, 2, &[0.0, 2.0], &[0], 0.5);
        // 3/4 and 1/4 of the two classes' losses.
        let expected = 0.75 * (1.0 + 2f64.exp()).ln() + 0.25 * (1.0 + (-2f64).exp()).ln();
        assert!(abs_diff_eq!(smoothed.loss, expected, epsilon = 3e-7), "{name}: {}", smoothed.loss);
        let large = run::<f32>(&device, 3, &[1e4, -1e4, 0.0], &[0], 0.0);
        assert_eq!((large.loss, large.correct), (0.0, 1), "{name}");
        assert_eq!(large.dlogits, [0.0; 3], "{name}");
    }
}

#[test]
fn first_maximum_wins() {
    // The label is the first, the second, and a later one of two equal maxima; lanes of one warp hold them at K = 40.
    for classes in [5, 40] {
        let mut logits = vec![0f32; 3 * classes];
        for row in 0..3 {
            logits[row * classes + 1] = 2.0;
            logits[row * classes + classes - 1] = 2.0;
        }
        for (name, device) in devices() {
            let found = run(&device, classes, &logits, &[1, classes as u32 - 1, 0], 0.0);
            assert_eq!(found.correct, 1, "{name}, {classes} classes");
        }
    }
}

#[test]
fn what_is_not_finite_shows() {
    for (name, device) in devices() {
        for smoothing in [0.0, 0.1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for place in 0..4 {
                    let mut logits = [0.5f32, 1.0, -1.0, 0.0, 0.1, 0.2, 0.3, 0.4];
                    logits[place] = bad;
                    let found = run(&device, 4, &logits, &[1, 3], smoothing);
                    assert!(!found.loss.is_finite(), "{name}: {bad} at {place} gives {}", found.loss);
                    assert!(!found.sample_losses[0].is_finite() && found.sample_losses[1].is_finite(), "{name}");
                }
            }
            let unknown = run(&device, 4, &[0.5f32, 1.0, -1.0, 0.0, 0.1, 0.2, 0.3, 0.4], &[4, 3], smoothing);
            assert!(unknown.loss.is_nan(), "{name}: a label beyond the classes");
            assert!(unknown.dlogits[..4].iter().all(|value| value.is_nan()), "{name}");
            assert!(unknown.dlogits[4..].iter().all(|value| value.is_finite()), "{name}");
            assert_eq!(unknown.correct, 1, "{name}");
            let logits = [0.5f32, 1.0, -1.0, 0.0, 0.1, 0.2, 0.3, 0.4];
            let unknown = run_mixed(&device, 4, &logits, &[1, 3], Some((&[u32::MAX, 3], 0.5)), smoothing);
            assert!(unknown.loss.is_nan() && unknown.sample_losses[1].is_finite(), "{name}: another label beyond them");
        }
    }
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    let (batch, classes) = (700, 33);
    let mut random = Random(12);
    let logits: Vec<f32> = random.vector(batch * classes);
    let labels: Vec<u32> = (0..batch).map(|_| random.below(classes) as u32).collect();
    on_devices(&host_devices(), false, |_, device| {
        let found = run(device, classes, &logits, &labels, 0.1);
        let tangent = run_tangent(device, classes, &logits, &found.dlogits);
        vec![vec![found.loss.to_bits(), u64::from(found.correct)], bits(&found.dlogits), bits(&tangent)]
    });
}

#[test]
fn wrong_arguments_are_refused() {
    let device = Device::host();
    let call = |shape: LossShape, logits: usize, smoothing: f64| {
        let (logits, labels) = (device.zeros::<f32>(logits).unwrap(), device.zeros::<u32>(2).unwrap());
        let mut losses = device.zeros::<f32>(2).unwrap();
        let (mut loss, mut correct) = (device.zeros::<f64>(1).unwrap(), device.zeros::<u32>(1).unwrap());
        let (loss, correct) = (loss.view_mut(), correct.view_mut());
        let targets = Targets { labels: labels.view(), mixed: None, smoothing };
        cross_entropy(&shape, logits.view(), targets, None, None, losses.view_mut(), loss, correct, None)
    };
    let operation = "loss::cross_entropy";
    assert_eq!(call(LossShape { batch: 2, classes: 3 }, 6, 0.1), Ok(()));
    assert_eq!(
        call(LossShape { batch: 2, classes: 3 }, 5, 0.1),
        Err(Error::Length { operation, argument: "logits", found: 5, expected: 6 })
    );
    assert_eq!(
        call(LossShape { batch: 3, classes: 2 }, 6, 0.1),
        Err(Error::Length { operation, argument: "labels", found: 2, expected: 3 })
    );
    for (shape, smoothing) in [((2, 3), -0.1), ((2, 3), 1.5), ((2, 3), f64::NAN), ((2, 0), 0.0), ((0, 3), 0.0)] {
        let (batch, classes) = shape;
        let refused = call(LossShape { batch, classes }, batch * classes, smoothing);
        assert!(matches!(refused, Err(Error::Argument { .. })), "{shape:?}, {smoothing}: {refused:?}");
    }
    let (logits, short) = (device.zeros::<f32>(6).unwrap(), device.zeros::<f32>(5).unwrap());
    let mut found = device.zeros::<f32>(6).unwrap();
    let shape = LossShape { batch: 2, classes: 3 };
    let refused = cross_entropy_tangent(&shape, logits.view(), short.view(), found.view_mut(), None);
    let operation = "loss::cross_entropy_tangent";
    assert_eq!(refused, Err(Error::Length { operation, argument: "logits_tangent", found: 5, expected: 6 }));
    let empty = cross_entropy_tangent(
        &LossShape { batch: 0, classes: 3 },
        logits.view(),
        logits.view(),
        found.view_mut(),
        None,
    );
    assert!(matches!(empty, Err(Error::Argument { .. })), "{empty:?}");
}
