//! Convolutions against a direct sum in double precision, on every device and in every order of blocks.

use approx::abs_diff_eq;

use crate::common::{Random, assert_close, bits, devices, host_devices, schedules_left_out, to_f64};
use half::{bf16, f16};
use polder::device::{Bf16x3, Bf16x6, Buffer, Compute, Device, Error, HostOptions, Result, SliceMut, Tf32};
use polder::kernels::batch_norm::{
    self, Activation, Backward, BatchNormShape, Forward, Gradients, Mode, Normalized, ResidualGradient, Saved, Summed,
    Workspace,
};
use polder::kernels::conv::{self, ConvShape};

const fn shape(extents: [usize; 5], kernel: usize, stride: usize, padding: usize) -> ConvShape {
    let [batch, height, width, in_channels, out_channels] = extents;
    ConvShape { batch, height, width, in_channels, out_channels, kernel, stride, padding, groups: 1 }
}

const fn grouped(groups: usize, dense: ConvShape) -> ConvShape {
    ConvShape { groups, ..dense }
}

/// Small, uneven shapes: tails of every tile, odd and even sizes under stride 2, with and without padding. Groups:
/// several in a panel of the CPU's kernels, with and without a tail, of equal and of different sizes; each with whole
/// panels in both tensors or in one; of one channel each.
const SHAPES: [ConvShape; 46] = [
    shape([2, 5, 6, 3, 16], 3, 1, 1),
    shape([1, 5, 6, 3, 10], 3, 2, 1),
    shape([3, 7, 5, 4, 17], 3, 1, 0),
    shape([5, 6, 5, 16, 16], 3, 1, 1),
    shape([2, 8, 8, 16, 32], 3, 2, 1),
    shape([2, 7, 9, 16, 33], 3, 2, 1),
    shape([2, 8, 7, 17, 16], 3, 2, 0),
    shape([1, 9, 8, 33, 10], 3, 2, 0),
    shape([4, 5, 6, 3, 7], 1, 1, 0),
    shape([3, 5, 6, 16, 32], 1, 2, 0),
    shape([3, 6, 5, 33, 17], 1, 2, 0),
    shape([2, 4, 3, 5, 6], 1, 1, 1),
    shape([2, 5, 4, 5, 6], 1, 2, 1),
    shape([1, 11, 9, 20, 24], 3, 1, 1),
    shape([2, 4, 4, 64, 64], 3, 1, 1),
    shape([3, 3, 3, 96, 20], 3, 2, 1),
    shape([1, 1, 1, 3, 2], 1, 1, 0),
    shape([1, 1, 1, 3, 2], 3, 1, 1),
    shape([2, 10, 12, 3, 8], 5, 2, 2),
    shape([1, 13, 14, 3, 9], 7, 2, 3),
    shape([1, 7, 8, 2, 3], 3, 3, 1),
    shape([1, 6, 9, 2, 3], 2, 3, 0),
    shape([1, 3, 4, 2, 3], 1, 1, 2),
    shape([1, 6, 7, 130, 70], 3, 1, 1),
    shape([37, 3, 2, 6, 5], 3, 1, 1),
    shape([3, 7, 9, 16, 48], 3, 1, 0),
    shape([2, 5, 6, 48, 16], 3, 1, 2),
    shape([35, 5, 4, 80, 32], 3, 1, 1),
    shape([2, 26, 14, 192, 32], 3, 1, 1),
    shape([3, 7, 21, 32, 48], 3, 2, 1),
    shape([5, 6, 7, 64, 16], 1, 1, 0),
    shape([2, 9, 20, 32, 16], 5, 2, 2),
    shape([1, 8, 10, 16, 32], 2, 3, 0),
    shape([3, 5, 7, 80, 64], 3, 1, 1),
    shape([2, 9, 6, 64, 112], 3, 1, 2),
    grouped(5, shape([2, 7, 6, 20, 20], 3, 1, 1)),
    grouped(8, shape([3, 9, 6, 32, 32], 3, 2, 1)),
    grouped(4, shape([2, 6, 5, 32, 32], 3, 1, 1)),
    grouped(9, shape([1, 7, 8, 18, 18], 3, 2, 1)),
    grouped(18, shape([2, 5, 7, 18, 18], 3, 1, 1)),
    grouped(4, shape([2, 8, 7, 12, 20], 3, 2, 1)),
    grouped(2, shape([2, 6, 7, 32, 64], 3, 1, 1)),
    grouped(2, shape([3, 7, 6, 64, 32], 3, 2, 1)),
    grouped(3, shape([2, 5, 6, 15, 48], 1, 1, 0)),
    grouped(2, shape([1, 9, 10, 48, 4], 5, 2, 2)),
    grouped(3, shape([2, 5, 4, 24, 9], 1, 2, 0)),
];

/// Cheap shapes that are large enough for each of the GPU's tiles and for a split weight gradient: one tap, many
/// pixels.
const WIDE_SHAPES: [ConvShape; 5] = [
    shape([13, 32, 30, 2, 70], 1, 1, 0),
    shape([13, 30, 32, 70, 2], 1, 1, 0),
    shape([3, 14, 13, 12, 132], 3, 2, 1),
    shape([2, 12, 13, 65, 68], 1, 1, 0),
    grouped(4, shape([9, 13, 14, 16, 32], 3, 1, 1)),
];

/// The initial `y`, `dx` and `dw`, for results that are added.
struct Case<S: Compute> {
    x: Vec<S>,
    weight: Vec<S>,
    dy: Vec<S>,
    y: Vec<S>,
    dx: Vec<S>,
    dw: Vec<S::Master>,
}

fn case<S: Compute>(shape: &ConvShape, seed: u64) -> Case<S> {
    let mut random = Random(seed);
    Case {
        x: random.vector(shape.input_len()),
        weight: random.vector(shape.weight_len()),
        dy: random.vector(shape.output_len()),
        y: random.vector(shape.output_len()),
        dx: random.vector(shape.input_len()),
        dw: random.vector(shape.weight_len()),
    }
}

/// The definition, term by term: (y, dx, dw).
fn reference(shape: &ConvShape, x: &[f64], weight: &[f64], dy: &[f64]) -> [Vec<f64>; 3] {
    let (c, o) = (shape.in_channels, shape.out_channels);
    let (group_inputs, group_outputs) = (c / shape.groups, o / shape.groups);
    let mut results = [vec![0.0; shape.output_len()], vec![0.0; x.len()], vec![0.0; weight.len()]];
    let [y, dx, dw] = &mut results;
    for n in 0..shape.batch {
        for i in 0..shape.out_height() {
            for j in 0..shape.out_width() {
                let output = ((n * shape.out_height() + i) * shape.out_width() + j) * o;
                for tap in 0..shape.kernel * shape.kernel {
                    let row = (i * shape.stride + tap / shape.kernel).checked_sub(shape.padding);
                    let column = (j * shape.stride + tap % shape.kernel).checked_sub(shape.padding);
                    let (Some(row), Some(column)) = (row, column) else { continue };
                    if row >= shape.height || column >= shape.width {
                        continue;
                    }
                    let input = ((n * shape.height + row) * shape.width + column) * c;
                    for out in 0..o {
                        let input = input + out / group_outputs * group_inputs;
                        for channel in 0..group_inputs {
                            let w = (tap * group_inputs + channel) * o + out;
                            y[output + out] += x[input + channel] * weight[w];
                            dx[input + channel] += dy[output + out] * weight[w];
                            dw[w] += x[input + channel] * dy[output + out];
                        }
                    }
                }
            }
        }
    }
    results
}

/// The results of a pass that writes over poison, and of one that adds to the case's numbers.
type Both<T> = [Vec<T>; 2];

/// y, dx and dw.
type Found<S> = (Both<S>, Both<S>, Both<<S as Compute>::Master>);

/// One pass. The workspace is poisoned before, and so is the output unless the result is added to it.
fn both<S: Compute, T: Compute>(
    device: &Device,
    shape: &ConvShape,
    start: &[T],
    pass: impl Fn(SliceMut<'_, T>, bool, SliceMut<'_, S::Master>) -> Result<()>,
) -> Result<Both<T>> {
    let workspace = || device.poisoned(shape.workspace_len::<S>(device));
    let (mut written, mut added) = (device.poisoned(start.len())?, device.upload(start)?);
    pass(written.view_mut(), false, workspace()?.view_mut())?;
    pass(added.view_mut(), true, workspace()?.view_mut())?;
    Ok([written.to_vec()?, added.to_vec()?])
}

/// All passes on a device.
fn run<S: Compute>(device: &Device, shape: &ConvShape, case: &Case<S>) -> Result<Found<S>> {
    let (x, weight, dy) = (device.upload(&case.x)?, device.upload(&case.weight)?, device.upload(&case.dy)?);
    let (x, weight, dy) = (x.view(), weight.view(), dy.view());
    Ok((
        both::<S, S>(device, shape, &case.y, |y, add, workspace| conv::forward(shape, x, weight, y, add, workspace))?,
        both::<S, S>(device, shape, &case.dx, |dx, add, workspace| {
            conv::input_gradient(shape, dy, weight, dx, add, workspace)
        })?,
        both::<S, S::Master>(device, shape, &case.dw, |dw, add, workspace| {
            conv::weight_gradient(shape, x, dy, dw, add, workspace)
        })?,
    ))
}

fn check_pass<T: Compute>(what: &str, [written, added]: &Both<T>, expected: &[f64], start: &[T], tolerance: f64) {
    assert_close(what, written, expected, tolerance);
    let sum: Vec<f64> = expected.iter().zip(to_f64(start)).map(|(&value, start)| value + start).collect();
    assert_close(&format!("{what} added"), added, &sum, tolerance);
}

fn check<S: Compute>(devices: &[(String, Device)], stored: f64, sums: f64) {
    check_shapes::<S>(SHAPES.iter().chain(&WIDE_SHAPES), 0, devices, stored, sums);
}

/// Fails unless the errors of y and dx are at most `stored` times their largest magnitude, and those of dw at most
/// `sums` times. The first shape's numbers have the seed `seed`.
fn check_shapes<'a, S: Compute>(
    shapes: impl Iterator<Item = &'a ConvShape>,
    seed: u64,
    devices: &[(String, Device)],
    stored: f64,
    sums: f64,
) {
    for (shape, seed) in shapes.zip(seed..) {
        let case = case::<S>(shape, seed);
        let [y, dx, dw] = reference(shape, &to_f64(&case.x), &to_f64(&case.weight), &to_f64(&case.dy));
        for (name, device) in devices {
            let found = run(device, shape, &case).unwrap_or_else(|e| panic!("{name}, {shape:?}: {e}"));
            let what = format!("{}, {name}, {shape:?}", S::NAME);
            check_pass(&format!("{what}: y"), &found.0, &y, &case.y, stored);
            check_pass(&format!("{what}: dx"), &found.1, &dx, &case.dx, stored);
            check_pass(&format!("{what}: dw"), &found.2, &dw, &case.dw, sums);
        }
    }
}

#[test]
fn equals_the_definition_in_single_precision() {
    // Sums of up to 1170 terms, each rounded to 2^-24 of the running sum.
    check::<f32>(&devices(), 3e-6, 3e-6);
}

/// Products of 16-bit numbers are exact in single precision, in which they are summed. The result is rounded once. TF32
/// rounds both factors, but only on a GPU. (The kernels for tensor cores have their own tests on the CPU, in
/// `conv/tensor.rs`.)
#[test]
fn equals_the_definition_in_fewer_bits() {
    let (cpu, gpu): (Vec<_>, Vec<_>) =
        devices().into_iter().filter(|(name, _)| !name.starts_with("gpu shapes")).partition(|(_, d)| d.is_host());
    check::<Tf32>(&cpu, 3e-6, 3e-6);
    check::<Tf32>(&gpu, 2f64.powi(-10), 2f64.powi(-10));
    for devices in [cpu, gpu] {
        check::<f16>(&devices, 2f64.powi(-11) + 3e-6, 3e-6);
        check::<bf16>(&devices, 2f64.powi(-8) + 3e-6, 3e-6);
    }
}

/// A bf16 number is off by at most 2^-9 of what it rounds, so two pieces leave at most 2^-18 of a factor. A product of
/// two such sums lacks this part of either factor and the product of the two small pieces: 3 * 2^-18 at most. Three
/// pieces hold the whole factor. The products that are left out are 2^-26 at most, less than a rounding of f32.
#[test]
fn equals_the_definition_in_pieces() {
    let (emulated, mut devices): (Vec<_>, Vec<_>) =
        devices().into_iter().partition(|(name, _)| name.starts_with("gpu shapes"));
    if std::env::var_os("POLDER_SANITIZE").is_some() {
        devices.truncate(1); // without optimisation the vector code for matrix units takes long
    } else if std::env::var_os("POLDER_ISA").is_none() {
        // One order of an emulated GPU's blocks: all orders have the same bits (`conv/tensor.rs`). The emulated kernels
        // exist for one instruction set alone.
        devices.extend(emulated.into_iter().take(1));
    }
    check::<Bf16x3>(&devices, 2f64.powi(-16), 2f64.powi(-16));
    check::<Bf16x6>(&devices, 3e-6, 3e-6);
    if !Device::host().has_matrix_units() {
        println!("NOT TESTED HERE: matrix units (AMX), which this processor lacks: vector code stood for them");
    }
}

#[test]
fn equals_the_definition_in_double_precision() {
    // Sums of up to 12,480 terms.
    check::<f64>(&host_devices(), 3e-14, 3e-14);
}

/// The bits of all passes.
fn bits_of<S: Compute>((y, dx, dw): &Found<S>) -> Vec<Vec<u64>> {
    y.iter().chain(dx).map(|pass| bits(pass)).chain(dw.iter().map(|pass| bits(pass))).collect()
}

/// A hash of the bits of all passes.
fn digest<S: Compute>(device: &Device) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    for (number, shape) in SHAPES.iter().chain(&WIDE_SHAPES).enumerate() {
        let all = bits_of(&run(device, shape, &case::<S>(shape, 200 + number as u64)).unwrap());
        digest = all
            .into_iter()
            .flatten()
            .fold(digest, |digest, bits| (digest ^ bits).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29));
    }
    digest
}

/// A process chooses its instruction set when it first uses the device, so the test starts itself again for each older
/// one. The other tests run on the newest one that this CPU has.
#[test]
fn older_instruction_sets_are_right_and_those_from_avx2_on_agree_to_the_bit() {
    let device = Device::host();
    let used = device.description();
    let digests = format!(
        "digests {:016x} {:016x} {:016x} {:016x} {:016x}",
        digest::<f32>(&device),
        digest::<f16>(&device),
        digest::<f64>(&device),
        digest::<Bf16x3>(&device),
        digest::<Bf16x6>(&device),
    );
    println!("\n{used}\n{digests}");
    if std::env::var_os("POLDER_ISA").is_some() || used.contains("baseline kernels") {
        println!("skipped: there is no older instruction set, or POLDER_ISA names this one");
        return;
    }
    let again = |older: &str, tests: &[&str]| {
        let this = std::env::current_exe().unwrap();
        let mut child = std::process::Command::new(this);
        child.args(tests).args(["older_instruction_sets", "--nocapture"]).env("POLDER_ISA", older);
        let output = child.env_remove("POLDER_TEST_DEVICE").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let passed = format!("{} passed", 1 + 4 * tests.len());
        assert!(
            output.status.success() && text.contains(&passed) && text.contains(&format!("{older} kernels")),
            "{text}"
        );
        text
    };
    for older in ["avx2", "avx512"] {
        if used.contains(&format!("{older} kernels")) {
            break;
        }
        let text = again(older, &[]);
        assert!(text.lines().any(|found| found == digests), "{used}: {digests}, and on {text}");
    }
    if std::env::var_os("POLDER_SANITIZE").is_some() {
        println!("skipped: the sanitizers' build has no baseline");
        return;
    }
    again("baseline", &["equals_the_definition_in"]);
}

/// The CPU's launch shapes give the same bits on one thread and on many, and a GPU's launch shapes in every order.
#[test]
fn bits_depend_on_neither_threads_nor_schedule() {
    if schedules_left_out() {
        return;
    }
    for (number, shape) in SHAPES.iter().chain(&WIDE_SHAPES).enumerate() {
        let case = case::<f32>(shape, 100 + number as u64);
        let mut seen: [Option<(String, Vec<Vec<u64>>)>; 2] = [None, None];
        for (name, device) in host_devices() {
            let found = bits_of(&run(&device, shape, &case).unwrap());
            let group = &mut seen[usize::from(name.starts_with("gpu"))];
            match group {
                Some((first, expected)) => assert_eq!(*expected, found, "{first} and {name} differ: {shape:?}"),
                None => *group = Some((name, found)),
            }
        }
        assert!(seen.iter().all(Option::is_some));
    }
}

/// Shapes that are large enough to be split, in the CPU's launch shapes, into bands of images and blocks of the depth.
/// In the last two the weights do not fit in a cache, so that blocks share the output's channels, unevenly.
const LARGE_SHAPES: [ConvShape; 7] = [
    shape([2, 48, 40, 40, 48], 3, 1, 1),
    shape([1, 45, 47, 64, 20], 3, 2, 1),
    shape([40, 4, 4, 96, 33], 3, 1, 1),
    grouped(6, shape([2, 48, 40, 24, 24], 3, 1, 1)),
    grouped(2, shape([3, 33, 30, 64, 96], 3, 1, 1)),
    shape([3, 6, 5, 144, 272], 3, 1, 1),
    shape([9, 5, 4, 272, 144], 3, 1, 0),
];

#[test]
fn splits_large_images_and_many_channels() {
    // Sums of up to 4000 terms.
    splits::<f64>(1e-14);
    splits::<f32>(3e-6);
    splits::<Bf16x3>(2f64.powi(-16));
    splits::<Bf16x6>(3e-6);
}

fn splits<S: Compute>(tolerance: f64) {
    let device = Device::host_with(HostOptions { threads: 2, ..HostOptions::default() });
    check_shapes::<S>(LARGE_SHAPES.iter(), 200, &[("cpu, 2 threads".into(), device)], tolerance, tolerance);
}

/// In the CPU's launch shapes. The emulated GPU's orders of blocks are compared in `conv/tensor.rs`.
#[test]
fn bits_in_pieces_do_not_depend_on_threads() {
    same_on_any_number_of_threads::<Bf16x3>();
    same_on_any_number_of_threads::<Bf16x6>();
}

fn same_on_any_number_of_threads<S: Compute>() {
    for (number, shape) in SHAPES.iter().chain(&LARGE_SHAPES).enumerate() {
        let case = case::<S>(shape, 600 + number as u64);
        let on = |threads| {
            let device = Device::host_with(HostOptions { threads, ..HostOptions::default() });
            bits_of(&run(&device, shape, &case).unwrap())
        };
        let one = on(1);
        assert!([2, 3].into_iter().all(|threads| on(threads) == one), "{}, {shape:?}", S::NAME);
    }
}

/// With loss = sum of dy * y, which is linear in x and in the weights, a central difference along any direction is
/// exact except for rounding.
#[test]
fn gradients_equal_central_differences() {
    for (number, shape) in SHAPES.iter().enumerate() {
        let case = case::<f64>(shape, 300 + number as u64);
        let mut random = Random(400 + number as u64);
        for (name, device) in host_devices() {
            let loss = |x: &[f64], weight: &[f64]| -> f64 {
                let mut y = device.poisoned(shape.output_len()).unwrap();
                let mut workspace = device.poisoned(shape.workspace_len::<f64>(&device)).unwrap();
                let (x, weight) = (device.upload(x).unwrap(), device.upload(weight).unwrap());
                conv::forward(shape, x.view(), weight.view(), y.view_mut(), false, workspace.view_mut()).unwrap();
                y.to_vec().unwrap().iter().zip(&case.dy).map(|(y, dy)| y * dy).sum()
            };
            let (_, [dx, _], [dw, _]) = run(&device, shape, &case).unwrap();
            let along_x: Vec<f64> = random.vector(case.x.len());
            let along_w: Vec<f64> = random.vector(case.weight.len());
            let moved = |from: &[f64], along: &[f64], step: f64| -> Vec<f64> {
                from.iter().zip(along).map(|(from, along)| from + step * along).collect()
            };
            let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            let step = 0.5;
            let by_x = loss(&moved(&case.x, &along_x, step), &case.weight)
                - loss(&moved(&case.x, &along_x, -step), &case.weight);
            let by_w = loss(&case.x, &moved(&case.weight, &along_w, step))
                - loss(&case.x, &moved(&case.weight, &along_w, -step));
            let scale = loss(&case.x, &case.weight).abs().max(1.0) * 1e-11;
            for (what, difference, exact) in
                [("x", by_x / (2.0 * step), dot(&dx, &along_x)), ("w", by_w / (2.0 * step), dot(&dw, &along_w))]
            {
                assert!(
                    abs_diff_eq!(difference, exact, epsilon = scale.max(exact.abs() * 1e-11)),
                    "{name}, {shape:?}, d{what}: difference {difference}, gradient {exact}"
                );
            }
        }
    }
}

/// The parts add up to the weight gradient. The CPU's convolution leaves no parts.
fn check_parts<S: Compute>(devices: Vec<(String, Device)>) {
    let shapes =
        [shape([3, 12, 11, 3, 7], 3, 1, 1), shape([4, 17, 15, 5, 20], 3, 2, 1), shape([5, 9, 8, 4, 33], 1, 1, 0)];
    for (name, device) in devices {
        let splits = shapes.map(|shape| shape.weight_gradient_splits::<S>(&device));
        let mut most = 1;
        for (number, (shape, splits)) in shapes.iter().zip(splits).enumerate() {
            let case = case::<S>(shape, 500 + number as u64);
            let (x, dy) = (device.upload(&case.x).unwrap(), device.upload(&case.dy).unwrap());
            let mut parts = device.poisoned::<S::Master>(splits * shape.weight_len()).unwrap();
            let done = conv::partial_weight_gradients(shape, x.view(), dy.view(), parts.view_mut());
            if splits == 1 {
                assert!(matches!(done, Err(Error::Argument { .. })), "{done:?}");
                continue;
            }
            done.unwrap();
            most = most.max(splits);
            let parts = to_f64(&parts.to_vec().unwrap());
            let sums: Vec<f64> =
                (0..shape.weight_len()).map(|i| parts.iter().skip(i).step_by(shape.weight_len()).sum()).collect();
            let (_, _, [dw, _]) = run(&device, shape, &case).unwrap();
            // One rounding per part, of partial sums that may be somewhat larger than the total.
            let half_ulp = if size_of::<S::Master>() == 8 { 2f64.powi(-53) } else { 2f64.powi(-24) };
            let tolerance = 4.0 * splits as f64 * half_ulp;
            assert_close(&format!("{name}: the sum of parts"), &dw, &sums, tolerance);
        }
        assert!(splits.iter().all(|&splits| splits == 1) || most > 2, "{splits:?}");
    }
}

#[test]
fn parts_add_up_to_the_weight_gradient() {
    check_parts::<f64>(host_devices());
    check_parts::<f32>(devices());
    check_parts::<f16>(devices());
    check_parts::<Bf16x3>(devices());
}

/// Leaving moments does not change a convolution's result, and batch norm gets the same statistics as from a pass over
/// it.
#[test]
fn moments_of_a_convolution_serve_batch_norm() {
    let shape = shape([3, 11, 13, 20, 40], 3, 1, 1);
    let case = case::<f16>(&shape, 600);
    let (channels, len) = (shape.out_channels, shape.output_len());
    let rows = BatchNormShape { rows: len / channels, channels };
    for (name, device) in devices() {
        let (x, weight) = (device.upload(&case.x).unwrap(), device.upload(&case.weight).unwrap());
        let (mut plain, mut y) = (device.poisoned::<f16>(len).unwrap(), device.poisoned::<f16>(len).unwrap());
        let Some(moments_len) = shape.moments_len::<f16>(&device) else {
            let mut moments = device.zeros(0).unwrap();
            let refused = conv::forward_with_moments(&shape, x.view(), weight.view(), y.view_mut(), moments.view_mut());
            assert!(matches!(refused, Err(Error::Argument { .. })), "{name}: {refused:?}");
            continue;
        };
        let mut moments = device.poisoned::<f32>(moments_len + 1).unwrap();
        let forward = |moments: SliceMut<'_, f32>, y: &mut Buffer<f16>| {
            conv::forward_with_moments(&shape, x.view(), weight.view(), y.view_mut(), moments)
        };
        let refused = forward(moments.view_mut(), &mut y);
        assert!(matches!(refused, Err(Error::Length { argument: "moments", .. })), "{name}: {refused:?}");
        forward(moments.slice_mut(0..moments_len).unwrap(), &mut y).unwrap();
        let mut workspace = device.zeros(shape.workspace_len::<f16>(&device)).unwrap();
        conv::forward(&shape, x.view(), weight.view(), plain.view_mut(), false, workspace.view_mut()).unwrap();
        assert_eq!(bits(&y.to_vec().unwrap()), bits(&plain.to_vec().unwrap()), "{name}");
        assert!(moments.to_vec().unwrap()[moments_len].is_nan(), "{name}: a write past the moments");

        let (gamma, beta) = (device.upload(&vec![1.5f32; channels]).unwrap(), device.zeros::<f32>(channels).unwrap());
        let input =
            Forward { x: y.view(), gamma: gamma.view(), beta: beta.view(), eps: 1e-5, residual: None, relu: false };
        let normalize = |from_moments: bool| {
            let [mut mean, mut inv_std] = std::array::from_fn(|_| device.poisoned::<f32>(channels).unwrap());
            let mut out = device.poisoned::<f16>(len).unwrap();
            let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
            if from_moments {
                let moments = moments.slice(0..moments_len).unwrap();
                batch_norm::forward_from_moments(rows, input, moments, out.view_mut(), saved, None).unwrap();
            } else {
                let mut workspace = Workspace::new(&device, [rows]).unwrap();
                batch_norm::forward_train(rows, input, out.view_mut(), saved, None, &mut workspace).unwrap();
            }
            [mean.to_vec().unwrap(), inv_std.to_vec().unwrap()].map(|values| to_f64(&values))
        };
        let ([mean, inv_std], [expected_mean, expected_inv_std]) = (normalize(true), normalize(false));
        assert_close(&format!("{name}: mean"), &mean, &expected_mean, 1e-6);
        assert_close(&format!("{name}: inv_std"), &inv_std, &expected_inv_std, 1e-6);
    }
}

/// Input gradients that continue into batch norm: whole tiles and tails, parity classes without taps and without
/// pixels, and more blocks than the last block of a GPU combines at a time.
const NORMALIZED_SHAPES: [ConvShape; 8] = [
    shape([3, 11, 13, 24, 12], 3, 1, 1),
    shape([2, 8, 8, 16, 32], 3, 2, 1),
    shape([5, 13, 11, 72, 3], 1, 2, 0),
    shape([4, 1, 9, 8, 8], 1, 2, 0),
    shape([1, 6, 7, 136, 20], 3, 1, 1),
    shape([3, 16, 15, 32, 4], 3, 1, 0),
    shape([8, 24, 24, 8, 8], 1, 1, 0),
    shape([5, 32, 31, 8, 8], 1, 2, 0),
];

/// A case: whether a residual and a relu follow batch norm, and whether the residual's gradient is added to another.
const FOLLOWERS: [(bool, bool, bool); 4] =
    [(false, false, false), (false, true, false), (true, true, false), (true, true, true)];

/// Compares dgamma and dbeta of every channel with the sums of dz xhat and of dz in double. `statistics` is mean and
/// inv_std.
fn check_sums<S: Compute>(name: &str, x: &[S], dz: &[S], [mean, inv_std]: &[Vec<f32>; 2], found: [&[f32]; 2]) {
    let channels = mean.len();
    for c in 0..channels {
        let (mut sums, mut magnitudes) = ([0.0; 2], [0.0; 2]);
        for place in (c..x.len()).step_by(channels) {
            let dz = dz[place].to_f64();
            let xhat = (x[place].to_f64() - f64::from(mean[c])) * f64::from(inv_std[c]);
            for (i, term) in [dz * xhat, dz].into_iter().enumerate() {
                sums[i] += term;
                magnitudes[i] += term.abs();
            }
        }
        // Up to 32 rows are summed in f32.
        for (i, value) in found.map(|values| values[c]).into_iter().enumerate() {
            let error = (f64::from(value) - sums[i]).abs();
            assert!(error <= 1e-6 * magnitudes[i], "{name}: sum {i} of channel {c}: {value}, not {}", sums[i]);
        }
    }
}

fn check_sums_for_batch_norm<S: Compute<Master = f32>>(
    shape: &ConvShape,
    device: &Device,
    name: &str,
    dx_tolerance: f64,
) {
    let case = case::<S>(shape, 700);
    let (channels, len) = (shape.in_channels, shape.input_len());
    let rows = BatchNormShape { rows: len / channels, channels };
    let mut random = Random(701);
    let upload = |values: &[f32]| device.upload(values).unwrap();
    let (gamma, beta) = (upload(&random.vector(channels)), upload(&random.vector(channels)));
    let (x, dy) = (device.upload(&case.x).unwrap(), device.upload(&case.dy).unwrap());
    let weight = device.upload(&case.weight).unwrap();
    let other = device.upload(&random.vector::<S>(len)).unwrap();
    let mut conv_workspace = device.zeros(shape.workspace_len::<S>(device)).unwrap();
    let mut workspace = Workspace::new(device, [rows]).unwrap().with_convolutions::<S>([shape]).unwrap();
    for ((residual, relu, add_residual), accumulate) in FOLLOWERS.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let name = format!("{name}, {}, {shape:?}, residual {residual}, relu {relu}, add {accumulate}", S::NAME);
        let mode = if accumulate { Mode::Eval } else { Mode::Train }; // either would do
        let mut y = device.poisoned::<S>(len).unwrap();
        let [mut mean, mut inv_std] = std::array::from_fn(|_| device.poisoned::<f32>(channels).unwrap());
        let input = Forward {
            x: x.view(),
            gamma: gamma.view(),
            beta: beta.view(),
            eps: 1e-5,
            residual: residual.then(|| other.view()),
            relu,
        };
        let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
        batch_norm::forward_train(rows, input, y.view_mut(), saved, None, &mut workspace).unwrap();
        let activation = match (relu, residual) {
            (false, _) => Activation::Identity,
            (true, false) => Activation::ReluRecomputed { beta: beta.view() },
            (true, true) => Activation::Relu { y: y.view() },
        };
        let (gamma, mean, inv_std) = (gamma.view(), mean.view(), inv_std.view());

        // The two kernels separately.
        let begin = || if accumulate { device.upload(&case.dx).unwrap() } else { device.poisoned::<S>(len).unwrap() };
        let mut plain = begin();
        conv::input_gradient(shape, dy.view(), weight.view(), plain.view_mut(), accumulate, conv_workspace.view_mut())
            .unwrap();
        let mut expected_residual = device.upload(&case.dx).unwrap();
        let [mut dgamma, mut dbeta] = std::array::from_fn(|_| device.poisoned::<f32>(channels).unwrap());
        let mut dx = device.poisoned::<S>(len).unwrap();
        let gradients = Gradients { dx: dx.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
        let to =
            residual.then(|| ResidualGradient { gradient: expected_residual.view_mut(), accumulate: add_residual });
        let backward = Backward { x: x.view(), dy: plain.view(), gamma, mean, inv_std, activation };
        batch_norm::backward(rows, mode, backward, gradients, to, &mut workspace).unwrap();

        // And fused, twice, because the tickets must be as before.
        let mut found = Vec::new();
        for _ in 0..2 {
            let mut dz = begin();
            let [mut dgamma, mut dbeta] = std::array::from_fn(|_| device.poisoned::<f32>(channels).unwrap());
            let normalized = Normalized { x: x.view(), gamma, mean, inv_std, activation };
            let (dgamma_out, dbeta_out) = (dgamma.view_mut(), dbeta.view_mut());
            conv::input_gradient_with_sums(
                shape,
                dy.view(),
                weight.view(),
                dz.view_mut(),
                accumulate,
                normalized,
                dgamma_out,
                dbeta_out,
                &mut workspace,
            )
            .unwrap();
            let mut dx = device.poisoned::<S>(len).unwrap();
            let mut residual_gradient = device.upload(&case.dx).unwrap();
            let to =
                residual.then(|| ResidualGradient { gradient: residual_gradient.view_mut(), accumulate: add_residual });
            let (dgamma_in, dbeta_in) = (dgamma.view(), dbeta.view());
            let summed =
                Summed { x: x.view(), dz: dz.view(), gamma, mean, inv_std, dgamma: dgamma_in, dbeta: dbeta_in };
            batch_norm::backward_from_sums(rows, mode, summed, dx.view_mut(), to).unwrap();
            let wide = [dgamma, dbeta].map(|buffer| buffer.to_vec().unwrap());
            found.push(([dz, dx, residual_gradient].map(|buffer| buffer.to_vec().unwrap()), wide));
        }
        let ([dz, dx_found, residual_found], [dgamma_found, dbeta_found]) = &found[0];
        assert_eq!(bits(dz), bits(&found[1].0[0]), "{name}: dz again");
        assert_eq!(bits(dgamma_found), bits(&found[1].1[0]), "{name}: dgamma again");

        let (plain, y) = (plain.to_vec().unwrap(), y.to_vec().unwrap());
        let masked = plain.iter().zip(&y).map(|(&dy, y)| if relu && y.to_f64() <= 0.0 { S::from_f64(0.0) } else { dy });
        assert_eq!(bits(dz), bits(&masked.collect::<Vec<S>>()), "{name}: dz");
        if residual {
            assert_eq!(bits(residual_found), bits(&expected_residual.to_vec().unwrap()), "{name}: residual");
        }
        let statistics = [mean.to_vec().unwrap(), inv_std.to_vec().unwrap()];
        check_sums(&name, &case.x, dz, &statistics, [dgamma_found, dbeta_found]);
        assert_close(&format!("{name}: dx"), dx_found, &to_f64(&dx.to_vec().unwrap()), dx_tolerance);
    }
}

/// An input gradient with sums for batch norm gives the results of the plain one followed by batch norm's backward: dz
/// and the residual's gradient have the same bits, the sums differ by the rounding of short f32 sums, and dx by at most
/// a unit in the last place.
#[test]
fn input_gradients_leave_sums_for_batch_norm() {
    for (name, device) in devices().into_iter().filter(|(_, device)| NORMALIZED_SHAPES[0].leaves_sums::<f16>(device)) {
        // Under sanitizers, leave out what runs the same code: the last two shapes, which are large, and the other
        // type.
        let sanitized = std::env::var_os("POLDER_SANITIZE").is_some();
        for shape in NORMALIZED_SHAPES.iter().take(if sanitized { 6 } else { 8 }) {
            check_sums_for_batch_norm::<f16>(shape, &device, &name, 1.0 / 1024.0);
            if !sanitized {
                check_sums_for_batch_norm::<bf16>(shape, &device, &name, 1.0 / 128.0);
            }
        }
    }
}

#[test]
fn sums_for_batch_norm_are_refused_where_there_are_none() {
    let shape = shape([2, 5, 6, 16, 8], 3, 1, 1);
    let channels = shape.in_channels;
    let simt = Device::host_with(HostOptions { emulate_gpu: true, ..HostOptions::default() });
    assert!(shape.leaves_sums::<f16>(&simt) && !shape.leaves_sums::<f16>(&Device::host()));
    assert!(!ConvShape { groups: 2, ..shape }.leaves_sums::<f16>(&simt));
    assert!(!shape.leaves_sums::<Tf32>(&simt) && !ConvShape { in_channels: 12, ..shape }.leaves_sums::<f16>(&simt));
    let call = |device: &Device, x_offset: usize, offset: usize, dgamma_len: usize, room: &[ConvShape]| {
        let buffer = |len: usize| device.zeros::<f16>(len + offset + x_offset).unwrap();
        let (x, dy, weight) = (buffer(shape.input_len()), buffer(shape.output_len()), buffer(shape.weight_len()));
        let mut dz = buffer(shape.input_len());
        let vector = device.zeros::<f32>(channels).unwrap();
        let (mut dgamma, mut dbeta) = (device.zeros(dgamma_len).unwrap(), device.zeros(channels).unwrap());
        let mut workspace = Workspace::new(device, []).unwrap().with_convolutions::<f16>(room).unwrap();
        let normalized = Normalized {
            x: x.slice(x_offset..x_offset + shape.input_len()).unwrap(),
            gamma: vector.view(),
            mean: vector.view(),
            inv_std: vector.view(),
            activation: Activation::Identity,
        };
        conv::input_gradient_with_sums(
            &shape,
            dy.slice(0..shape.output_len()).unwrap(),
            weight.slice(0..shape.weight_len()).unwrap(),
            dz.slice_mut(offset..offset + shape.input_len()).unwrap(),
            false,
            normalized,
            dgamma.view_mut(),
            dbeta.view_mut(),
            &mut workspace,
        )
    };
    call(&simt, 0, 0, channels, &[shape]).unwrap();
    assert!(matches!(call(&Device::host(), 0, 0, channels, &[shape]), Err(Error::Argument { .. })));
    assert!(matches!(call(&simt, 1, 0, channels, &[shape]), Err(Error::Argument { .. })));
    assert!(matches!(call(&simt, 0, 1, channels, &[shape]), Err(Error::Argument { .. })));
    assert!(matches!(call(&simt, 0, 0, channels - 1, &[shape]), Err(Error::Length { argument: "dgamma", .. })));
    assert!(matches!(call(&simt, 0, 0, channels, &[]), Err(Error::Length { argument: "workspace", .. })));
}

#[test]
fn refuses_wrong_lengths_devices_and_shapes() {
    let right = shape([2, 5, 6, 3, 7], 3, 1, 1);
    let device = Device::host();
    let call = |shape: &ConvShape, x: usize, weight: usize, y: usize, workspace: usize| -> Result<()> {
        let (x, weight) = (device.zeros::<f32>(x)?, device.zeros::<f32>(weight)?);
        let (mut y, mut workspace) = (device.zeros::<f32>(y)?, device.zeros::<f32>(workspace)?);
        conv::forward(shape, x.view(), weight.view(), y.view_mut(), false, workspace.view_mut())?;
        let mut dw = device.zeros(weight.len())?;
        conv::weight_gradient(shape, x.view(), y.view(), dw.view_mut(), false, workspace.view_mut())?;
        conv::input_gradient(
            shape,
            y.view(),
            weight.view(),
            device.zeros(x.len())?.view_mut(),
            false,
            workspace.view_mut(),
        )
    };
    let lengths = [right.input_len(), right.weight_len(), right.output_len(), right.workspace_len::<f32>(&device)];
    let [x, weight, y, workspace] = lengths;
    call(&right, x, weight, y, workspace).unwrap();
    call(&right, x, weight, y, workspace + 5).unwrap();
    for (argument, wrong) in [
        ("x", [x - 1, weight, y, workspace]),
        ("weight", [x, weight + 1, y, workspace]),
        ("y", [x, weight, y + 1, workspace]),
        ("workspace", [x, weight, y, workspace - 1]),
    ] {
        let [x, weight, y, workspace] = wrong;
        let error = call(&right, x, weight, y, workspace).unwrap_err();
        assert!(matches!(&error, Error::Length { argument: found, .. } if *found == argument), "{error}");
    }
    let other = Device::host();
    let foreign = other.zeros::<f32>(weight).unwrap();
    let (input, mut output) = (device.zeros::<f32>(x).unwrap(), device.zeros::<f32>(y).unwrap());
    let mut scratch = device.zeros::<f32>(workspace).unwrap();
    let (y, workspace) = (output.view_mut(), scratch.view_mut());
    let error = conv::forward(&right, input.view(), foreign.view(), y, false, workspace).unwrap_err();
    assert!(matches!(&error, Error::OtherDevice { argument: "weight", .. }), "{error}");

    for wrong in [
        ConvShape { stride: 0, ..right },
        ConvShape { kernel: 0, ..right },
        ConvShape { batch: 0, ..right },
        ConvShape { kernel: 9, ..right },
        ConvShape { batch: 1 << 30, ..right },
        ConvShape { padding: usize::MAX / 2, ..right },
        ConvShape { groups: 0, ..right },
        ConvShape { groups: 3, ..right },
        ConvShape { in_channels: 1 << 16, out_channels: 1 << 16, groups: 1 << 16, ..right },
    ] {
        let error = wrong.check().unwrap_err();
        assert!(matches!(&error, Error::Argument { .. }), "{error}");
    }
}
