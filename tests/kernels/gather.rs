//! Tensors of another framework gathered into one vector, against copies and sums in double on the host.

use approx::relative_eq;

use crate::common::{Random, assert_close, bits, devices, host_devices, on_devices, to_f64};
use polder::device::{Buffer, Device, Error, Scalar};
use polder::kernels::gather::{Gather, Source};
use polder::kernels::vector::Reduction;

/// Lengths around those of a line, of a pack and of the piece that a block copies; the last vector leaves the caches.
const CASES: [&[usize]; 4] = [&[1], &[3, 64, 129, 1], &[8191, 8193, 7, 20_000], &[4_300_000, 65]];

/// Tensors of these lengths, each at a multiple of 64; every third has no gradient, every fourth lies at its place.
/// Without a scale, the first one stays where it is.
fn check<T: Scalar>(devices: &[(String, Device)], lengths: &[usize], scale: Option<f64>) {
    let mut random = Random(lengths.len() as u64);
    let mut places = Vec::new();
    let mut len = 0usize;
    for &n in lengths {
        let start = len.next_multiple_of(64);
        len = start + n;
        places.push(start..len);
    }
    let tensors: Vec<Vec<T>> = lengths.iter().map(|&n| random.vector(n)).collect();
    let (absent, in_place) = (|k: usize| k % 3 == 2, |k: usize| k % 4 == 3);
    let stays = |k: usize| scale.is_none() && k == 0;
    let (mut expected, mut squares) = (vec![-7.0; len], 0.0);
    for (k, (tensor, place)) in tensors.iter().zip(&places).enumerate() {
        let values = to_f64(tensor).into_iter().map(|x| if absent(k) { 0.0 } else { x / scale.unwrap_or(1.0) });
        let values: Vec<f64> = values.collect();
        squares += values.iter().map(|x| x * x).sum::<f64>();
        if !stays(k) {
            expected.splice(place.clone(), values);
        }
    }
    let norm = squares.sqrt();
    let rounding = if size_of::<T>() == 4 { 6e-8 } else { 1e-15 };
    on_devices(devices, false, |name, device| {
        let what = format!("{name}, {lengths:?}");
        // At addresses that no pack is aligned to, from the second tensor on.
        let from: Vec<Buffer<T>> =
            tensors.iter().map(|tensor| device.upload(&[&[T::default()], &tensor[..]].concat()).unwrap()).collect();
        let mut start = vec![T::from_f64(-7.0); len];
        for (k, place) in places.iter().enumerate().filter(|(k, _)| in_place(*k)) {
            start[place.clone()].copy_from_slice(&tensors[k]);
        }
        let mut out = device.upload(&start).unwrap();
        let (mut flag, mut found) = (device.zeros(1).unwrap(), device.poisoned(1).unwrap());
        let (mut gather, mut reduction) = (Gather::new(device).unwrap(), Reduction::new(device).unwrap());
        let divisor = scale.map(|scale| device.upload(&[scale]).unwrap());
        let own = out.view().address();
        let sources = places.iter().enumerate().map(|(k, place)| {
            let source = from[k].slice(1..1 + place.len()).unwrap();
            // SAFETY: the tensor's place in `out`, which the kernel reads before it writes there.
            let at_place = unsafe {
                polder::device::Slice::from_raw(device, own + (place.start * size_of::<T>()) as u64, place.len())
            };
            let tensor = match k {
                _ if absent(k) => Source::Zeros,
                _ if in_place(k) => Source::Tensor(at_place.unwrap()),
                _ if stays(k) => Source::Stays(source),
                _ => Source::Tensor(source),
            };
            (tensor, place.clone())
        });
        let scale = divisor.as_ref().map(Buffer::view);
        gather.run(sources, scale, out.view_mut(), flag.view_mut(), &mut reduction, Some(found.view_mut())).unwrap();
        let (gathered, found) = (out.to_vec().unwrap(), found.to_vec().unwrap());
        assert_close(&what, &gathered, &expected, rounding);
        assert!(relative_eq!(found[0], norm, max_relative = 8.0 * rounding), "{what}: {} {norm}", found[0]);
        assert_eq!(flag.to_vec().unwrap(), [0], "{what}");
        vec![bits(&gathered), bits(&found)]
    });
}

#[test]
fn tensors_are_gathered() {
    for lengths in CASES {
        // Emulated GPUs take long over millions of elements.
        let long = lengths[0] > 1_000_000;
        let devices: Vec<_> = devices().into_iter().filter(|(name, _)| !long || name.starts_with("cpu")).collect();
        check::<f32>(&devices, lengths, None);
        check::<f32>(&devices, lengths, Some(1024.0));
        if !long {
            check::<f64>(&host_devices(), lengths, None);
            check::<f64>(&host_devices(), lengths, Some(8.0));
        }
    }
}

#[test]
fn what_is_not_finite_is_flagged() {
    for (name, device) in devices() {
        for (place, value) in [(0, f32::NAN), (8191, f32::INFINITY), (9000, f32::NEG_INFINITY)] {
            let mut values = vec![1.0f32; 9001];
            values[place] = value;
            let (from, mut out) = (device.upload(&values).unwrap(), device.poisoned(9001).unwrap());
            let mut flag = device.zeros(1).unwrap();
            let (mut gather, mut reduction) = (Gather::new(&device).unwrap(), Reduction::new(&device).unwrap());
            let source = if value.is_nan() { Source::Stays(from.view()) } else { Source::Tensor(from.view()) };
            let sources = [(source, 0..9001)];
            gather.run(sources, None, out.view_mut(), flag.view_mut(), &mut reduction, None).unwrap();
            assert_eq!(flag.to_vec().unwrap(), [1], "{name}: {value} at {place}");
        }
    }
}

#[test]
fn places_that_do_not_fit_are_refused() {
    let device = Device::host();
    let (from, mut out) = (device.zeros::<f32>(5).unwrap(), device.poisoned(9).unwrap());
    let (mut gather, mut reduction) = (Gather::new(&device).unwrap(), Reduction::new(&device).unwrap());
    let mut flag = device.zeros(1).unwrap();
    let mut run = |places: &[(usize, usize)]| {
        let sources = places.iter().map(|&(start, end)| (Source::Tensor(from.view()), start..end));
        gather.run(sources, None, out.view_mut(), flag.view_mut(), &mut reduction, None).unwrap_err()
    };
    assert!(matches!(run(&[(0, 4)]), Error::Length { argument: "source", .. }));
    assert!(matches!(run(&[(5, 10)]), Error::Range { start: 5, end: 10, .. }));
    assert!(matches!(run(&[(0, 5), (4, 9)]), Error::Argument { .. }));
}
