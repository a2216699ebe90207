//! The last stages of a gradient: sums of parts, loss scale, the check for elements that are not finite, and the norm.

use std::ops::Range;

use approx::relative_eq;
use half::{bf16, f16};
use polder::device::{Bf16x3, Bf16x6, Compute, Device, Error, Scalar, Tf32};
use polder::kernels::conv::{self, ConvShape};
use polder::kernels::gradient::{Finish, GradientStages, Stage, Unfinished};
use polder::kernels::precision;

use crate::common::{Random, bits, devices, host_devices, on_devices, to_f64};

/// Elements and parts: every number of parts that is read at a time, complete gradients (no parts), and lengths close
/// to a stretch's.
const GRADIENTS: [(usize, usize); 18] = [
    (1, 0),
    (1023, 0),
    (4099, 0),
    (1, 1),
    (1024, 1),
    (2500, 1),
    (3, 2),
    (512, 2),
    (513, 3),
    (1300, 3),
    (255, 4),
    (257, 7),
    (128, 8),
    (127, 8),
    (129, 9),
    (700, 16),
    (10, 132),
    (432, 33),
];

/// Gradients with gaps between them and between their parts, in three stages, the second of which is a convolution.
struct Case {
    stages: Vec<Stage>,
    parts_len: usize,
    out_len: usize,
}

const OTHER_SQUARES: usize = 5;

fn case() -> Case {
    let (mut parts_len, mut out_len) = (5, 3);
    let mut launches = [Vec::new(), Vec::new()];
    for (index, &(n, splits)) in GRADIENTS.iter().enumerate() {
        let (parts, place) = (parts_len..parts_len + n * splits, out_len..out_len + n);
        (parts_len, out_len) = (parts.end + 2, place.end + 1);
        // Not in the order of their places.
        launches[index % 2].insert(0, Unfinished { parts: (splits > 0).then_some(parts), place });
    }
    let [first, last] = launches;
    Case {
        stages: vec![Stage::Launch(first), Stage::Convolution(OTHER_SQUARES), Stage::Launch(last)],
        parts_len,
        out_len,
    }
}

fn gradients(stages: &[Stage]) -> impl Iterator<Item = &Unfinished> {
    stages.iter().flat_map(|stage| match stage {
        Stage::Launch(gradients) => gradients.as_slice(),
        Stage::Convolution(_) => &[],
    })
}

/// The results of the stages: the vector of gradients, the flag, and the norm if it was wanted. They run twice.
fn run<T: Scalar>(
    device: &Device,
    case: &Case,
    (parts, whole): (&[T], &[T]),
    scale: Option<f64>,
    norm: bool,
) -> (Vec<T>, u32, f64) {
    let mut stages = GradientStages::new(device, &case.stages).unwrap();
    let parts = device.upload(parts).unwrap();
    let state = scale.map(|scale| device.upload(&[scale, 3.0]).unwrap());
    let state = || state.as_ref().map(|state| state.view());
    let mut runs = [(); 2].map(|()| {
        let mut out = device.upload(whole).unwrap();
        let (mut flag, mut found) = (device.zeros::<u32>(1).unwrap(), device.upload(&[-1.0]).unwrap());
        stages.launch(0, parts.view(), out.view_mut(), state(), flag.view_mut(), norm).unwrap();
        let mut other = stages.finish(1, state(), flag.view_mut(), norm).unwrap();
        assert_eq!(other.squares.is_some(), norm);
        if let Some(squares) = &mut other.squares {
            squares.write(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        }
        let asked = norm.then(|| found.view_mut());
        stages.end(parts.view(), out.view_mut(), state(), flag.view_mut(), asked).unwrap();
        (out.to_vec().unwrap(), flag.to_vec().unwrap()[0], found.to_vec().unwrap()[0])
    });
    let (first, again) = (runs[0].clone(), std::mem::take(&mut runs[1]));
    assert_eq!((bits(&first.0), first.1, first.2.to_bits()), (bits(&again.0), again.1, again.2.to_bits()));
    again
}

/// Integers, so that every sum is exact in any order, and powers of two to divide by.
fn check_exactly<T: Scalar>(devices: Vec<(String, Device)>, scales: &[Option<f64>]) {
    let (case, mut random) = (case(), Random(91));
    let mut whole_numbers = |n| (0..n).map(|_| T::from_f64(random.below(129) as f64 - 64.0)).collect::<Vec<T>>();
    let (parts, whole) = (whole_numbers(case.parts_len), whole_numbers(case.out_len));
    for &scale in scales {
        let (mut expected, mut squares) = (to_f64(&whole), 15.0);
        for Unfinished { parts: from, place } in gradients(&case.stages) {
            for i in 0..place.len() {
                let all = |from: &Range<usize>| from.clone().skip(i).step_by(place.len()).map(|at| parts[at].into());
                let value = match from {
                    Some(from) => all(from).sum::<f64>(),
                    None => expected[place.start + i],
                };
                expected[place.start + i] = value / scale.unwrap_or(1.0);
                squares += expected[place.start + i].powi(2);
            }
        }
        for (name, device) in &devices {
            let (found, flag, norm) = run(device, &case, (&parts, &whole), scale, true);
            assert_eq!(to_f64(&found), expected, "{name}, {scale:?}");
            assert_eq!((flag, norm), (0, squares.sqrt()), "{name}, {scale:?}");
            let (found, flag, norm) = run(device, &case, (&parts, &whole), scale, false);
            assert_eq!(to_f64(&found), expected, "{name}, {scale:?}");
            assert_eq!((flag, norm), (0, -1.0), "{name}, {scale:?}: no norm was wanted");
        }
        // An element that is not finite is found anywhere, in a part or in a complete gradient.
        for Unfinished { parts: from, place } in gradients(&case.stages) {
            let within = from.as_ref().unwrap_or(place);
            // All places on the first device, and one on the last, which may be a GPU.
            let cases = [(0, within.start), (0, within.start + within.len() / 2), (0, within.end - 1)];
            for (device, at) in cases.into_iter().chain([(devices.len() - 1, within.end - 1)]) {
                let (mut parts, mut whole) = (parts.clone(), whole.clone());
                let bad = if at % 2 == 0 { f64::INFINITY } else { f64::NAN };
                (if from.is_some() { &mut parts } else { &mut whole })[at] = T::from_f64(bad);
                let (name, device) = &devices[device];
                let (_, flag, norm) = run(device, &case, (&parts, &whole), scale, true);
                assert!(flag == 1 && !norm.is_finite(), "{name}, {place:?}, {bad} at {at}: {flag}, {norm}");
            }
        }
    }
}

#[test]
fn last_stages_sum_scale_look_and_measure() {
    check_exactly::<f32>(devices(), &[None, Some(1024.0)]);
    check_exactly::<f64>(host_devices(), &[None]);
}

#[test]
fn no_schedule_changes_a_finished_gradient() {
    let (case, mut random) = (case(), Random(92));
    let (parts, whole) = (random.vector::<f32>(case.parts_len), random.vector::<f32>(case.out_len));
    on_devices(&devices(), false, |_, device| {
        let (out, flag, norm) = run(device, &case, (&parts, &whole), Some(8.0), true);
        assert_eq!(flag, 0);
        vec![bits(&out), vec![norm.to_bits()]]
    });
}

/// A convolution that finishes its weight gradient divides by the scale, checks that it is finite and sums its squares.
fn check_convolution<S: Compute<Master = f32>>() {
    let shapes = [(6, 5, 7, 3, 1), (5, 7, 24, 200, 1), (7, 8, 72, 17, 2), (1, 1, 3, 2, 1), (9, 9, 8, 130, 3)];
    for (name, device) in devices() {
        for (number, (height, width, in_channels, out_channels, stride)) in shapes.into_iter().enumerate() {
            let shape = ConvShape {
                batch: 1,
                height,
                width,
                in_channels,
                out_channels,
                kernel: 3,
                stride,
                padding: 1,
                groups: 1,
            };
            let mut random = Random(93 + number as u64);
            let mut dy_values = random.vector::<S>(shape.output_len());
            let x = device.upload(&random.vector::<S>(shape.input_len())).unwrap();
            let mut dw = [(); 2].map(|()| device.poisoned::<f32>(shape.weight_len()).unwrap());
            let state = device.upload(&[4096.0, 0.0]).unwrap();
            let mut flag = device.zeros::<u32>(1).unwrap();
            let squares = shape.finished_squares::<S>(&device);
            // With so few pixels no gradient is split.
            assert_eq!(squares.is_some(), shape.moments_len::<S>(&device).is_some(), "{name}: {shape:?}");
            let mut sums = device.poisoned::<f64>(squares.unwrap_or(1)).unwrap();
            for bad in [false, true] {
                if bad {
                    dy_values[shape.output_len() / 2] = S::from_f64(f64::INFINITY);
                }
                let dy = device.upload(&dy_values).unwrap();
                let [plain, finished] = &mut dw;
                let finish =
                    Finish { scale: Some(state.view()), flag: flag.view_mut(), squares: Some(sums.view_mut()) };
                let done = conv::finished_weight_gradient(&shape, x.view(), dy.view(), finished.view_mut(), finish);
                if squares.is_none() {
                    assert!(matches!(done, Err(Error::Argument { .. })), "{name}: {done:?}");
                    continue;
                }
                done.unwrap();
                let mut longer = device.zeros(sums.len() + 1).unwrap();
                let mut untouched = device.zeros(1).unwrap();
                let finish = Finish { scale: None, flag: untouched.view_mut(), squares: Some(longer.view_mut()) };
                let refused = conv::finished_weight_gradient(&shape, x.view(), dy.view(), plain.view_mut(), finish);
                assert!(matches!(refused, Err(Error::Length { argument: "squares", .. })), "{name}: {refused:?}");
                let mut scratch = device.poisoned(shape.workspace_len::<S>(&device)).unwrap();
                let scratch = scratch.view_mut();
                conv::weight_gradient(&shape, x.view(), dy.view(), plain.view_mut(), false, scratch).unwrap();
                let mut plain_flag = device.zeros(1).unwrap();
                precision::unscale(plain.view_mut(), state.view(), plain_flag.view_mut()).unwrap();
                let what = format!("{} on {name}, {shape:?}, infinite: {bad}", S::NAME);
                assert_eq!(flag.to_vec().unwrap(), [u32::from(bad)], "{what}");
                assert_eq!(plain_flag.to_vec().unwrap(), [u32::from(bad)], "{what}");
                let (plain, finished) = (plain.to_vec().unwrap(), finished.to_vec().unwrap());
                if !bad {
                    assert_eq!(bits(&plain), bits(&finished), "{what}");
                    let expected: f64 = to_f64(&finished).iter().map(|value| value * value).sum();
                    let found: f64 = sums.to_vec().unwrap().iter().sum();
                    assert!(
                        relative_eq!(found, expected, epsilon = 0.0, max_relative = 1e-13) && expected > 0.0,
                        "{what}: {found}"
                    );
                    // Without a scale and without a norm.
                    let (mut again, mut flag) = (device.poisoned(plain.len()).unwrap(), device.zeros(1).unwrap());
                    let finish = Finish { scale: None, flag: flag.view_mut(), squares: None };
                    conv::finished_weight_gradient(&shape, x.view(), dy.view(), again.view_mut(), finish).unwrap();
                    let unscaled: Vec<f32> = again.to_vec().unwrap().iter().map(|value| value / 4096.0).collect();
                    assert_eq!((bits(&unscaled), flag.to_vec().unwrap()), (bits(&plain), vec![0]), "{what}");
                }
            }
        }
    }
}

#[test]
fn a_convolution_finishes_its_weight_gradient() {
    check_convolution::<f16>();
    check_convolution::<bf16>();
    check_convolution::<Tf32>();
    check_convolution::<Bf16x3>();
    check_convolution::<Bf16x6>();
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = Device::host();
    let launch = |parts: Option<Range<usize>>, place| Stage::Launch(vec![Unfinished { parts, place }]);
    // The length of the parts is not a multiple of their gradient's.
    for (parts, place) in [(0..7, 0..3), (0..0, 0..3), (0..4, 2..2)] {
        let refused = GradientStages::new(&device, &[launch(Some(parts), place)]).err();
        assert!(matches!(refused, Some(Error::Length { argument: "parts", .. })), "{refused:?}");
    }
    let meeting = [(Some(0..6), 2..5), (None, 0..3)].map(|(parts, place)| Unfinished { parts, place });
    for stages in [
        vec![Stage::Launch(meeting.to_vec())],
        vec![launch(Some(0..6), 2..5), launch(None, 0..3)],
        vec![],
        vec![launch(None, 0..2), Stage::Convolution(1)],
    ] {
        let refused = GradientStages::new(&device, &stages).err();
        assert!(matches!(refused, Some(Error::Argument { .. })), "{stages:?}: {refused:?}");
    }
    let all = [launch(Some(1..7), 2..5), Stage::Convolution(4), launch(None, 5..8)];
    let mut stages = GradientStages::new(&device, &all).unwrap();
    let (parts, mut out) = (device.zeros::<f32>(7).unwrap(), device.zeros::<f32>(8).unwrap());
    let (mut flag, mut norm) = (device.zeros::<u32>(2).unwrap(), device.zeros::<f64>(2).unwrap());
    let mut one = device.zeros::<u32>(1).unwrap();
    let (short_parts, short_out) = (parts.slice(0..6).unwrap(), 0..4);
    let refused = stages.launch(0, short_parts, out.view_mut(), None, one.view_mut(), false);
    assert!(matches!(refused, Err(Error::Length { argument: "parts", found: 6, expected: 7, .. })), "{refused:?}");
    let refused = stages.launch(0, parts.view(), out.slice_mut(short_out).unwrap(), None, one.view_mut(), false);
    assert!(matches!(refused, Err(Error::Length { argument: "out", found: 4, expected: 5, .. })), "{refused:?}");
    let refused = stages.launch(0, parts.view(), out.view_mut(), None, flag.view_mut(), false);
    assert!(matches!(refused, Err(Error::Length { argument: "flag", .. })), "{refused:?}");
    let refused = stages.end(parts.view(), out.view_mut(), None, one.view_mut(), Some(norm.view_mut()));
    assert!(matches!(refused, Err(Error::Length { argument: "norm", .. })), "{refused:?}");
    for stage in [1, 3] {
        let refused = stages.launch(stage, parts.view(), out.view_mut(), None, one.view_mut(), false);
        assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
    }
    for stage in [0, 3] {
        let refused = stages.finish(stage, None, one.view_mut(), true).err();
        assert!(matches!(refused, Some(Error::Argument { .. })), "{refused:?}");
    }
    // Vectors of another device, and a scale for a type that has none.
    let elsewhere = Device::host();
    let (other_parts, mut other_out) = (elsewhere.zeros::<f32>(7).unwrap(), elsewhere.zeros::<f32>(8).unwrap());
    let (mut other_flag, mut other_norm) = (elsewhere.zeros::<u32>(1).unwrap(), elsewhere.zeros::<f64>(1).unwrap());
    let refused = [
        ("parts", stages.end(other_parts.view(), out.view_mut(), None, one.view_mut(), None)),
        ("out", stages.end(parts.view(), other_out.view_mut(), None, one.view_mut(), None)),
        ("flag", stages.end(parts.view(), out.view_mut(), None, other_flag.view_mut(), None)),
        ("norm", stages.end(parts.view(), out.view_mut(), None, one.view_mut(), Some(other_norm.view_mut()))),
    ];
    for (name, refused) in refused {
        assert!(matches!(refused, Err(Error::OtherDevice { argument, .. }) if argument == name), "{name}: {refused:?}");
    }
    let (wide, mut wide_out) = (device.zeros::<f64>(7).unwrap(), device.zeros::<f64>(8).unwrap());
    let scale = device.upload(&[2.0, 0.0]).unwrap();
    let refused = stages.end(wide.view(), wide_out.view_mut(), Some(scale.view()), one.view_mut(), None);
    assert!(matches!(refused, Err(Error::Argument { .. })), "{refused:?}");
}
