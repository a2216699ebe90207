//! Every vector kernel: `cargo bench --bench vector`, on the CPU and on the first GPU if there is one, or on the device
//! that `POLDER_TEST_DEVICE` names.
//!
//! Lengths are those of a small and of a large ResNet; the small one's vectors fit in a CPU's last cache. Inputs are
//! random. Three sets of buffers take turns, because one set of the large length fits in a GPU's cache. Times come from
//! the device's own events. At the end a table shows each kernel's share of the bandwidth of a copy of the same length.
//! The copy is the faster of the device's copy and of a conversion from `f32` to `f32`, which uses every core.

mod common;

use std::cell::RefCell;
use std::error::Error;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use half::f16;
use polder::device::{Buffer, Device, Result};
use polder::kernels::random;
use polder::kernels::vector::{self, AdamWStep, Combination, CrSamTerms, Rate, Reduction, SgdStep};

/// ResNet-20 for CIFAR-10 and ResNet-18.
const LENGTHS: [usize; 2] = [269_722, 11_173_962];
const SETS: usize = 3;

const SGD: SgdStep =
    SgdStep { lr: Rate::Fixed(0.01), momentum: 0.9, nesterov: false, weight_decay: 5e-4, decay_len: usize::MAX };
const ADAMW: AdamWStep =
    AdamWStep { lr: Rate::Fixed(1e-3), beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, decay_len: usize::MAX };

const CR_SAM: CrSamTerms =
    CrSamTerms { log_form: true, alpha: 0.1, beta: 0.01, a_min: 1e-8, b_min: 1e-8, loss_error: 0.0 };

/// One set of vectors.
struct Vectors {
    w: Buffer<f32>,
    m: Buffer<f32>,
    v: Buffer<f32>,
    g: [Buffer<f32>; 3],
    plus: Buffer<f32>,
    minus: Buffer<f32>,
    halves: Buffer<f16>,
}

impl Vectors {
    fn new(device: &Device, n: usize, seed: u64) -> Result<Self> {
        let normal = |stream: u64| -> Result<Buffer<f32>> {
            let mut buffer = device.zeros(n)?;
            random::normal(buffer.view_mut(), seed, stream << 40)?;
            Ok(buffer)
        };
        let mut v = device.zeros(n)?;
        random::uniform(v.view_mut(), seed, 0)?;
        let mut halves = device.zeros(n)?;
        let w = normal(1)?;
        vector::convert(w.view(), halves.view_mut())?;
        Ok(Self {
            w,
            m: normal(2)?,
            v,
            g: [normal(3)?, normal(4)?, normal(5)?],
            plus: normal(6)?,
            minus: normal(7)?,
            halves,
        })
    }
}

/// The numbers that kernels take from the device.
struct Numbers {
    reduction: Reduction,
    norm: Buffer<f64>,
    losses: Buffer<f64>,
    coefficients: Buffer<f64>,
    dropped: Buffer<u32>,
    step: Buffer<u32>,
    skip: Buffer<u32>,
    flag: Buffer<u32>,
}

impl Numbers {
    fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            reduction: Reduction::new(device)?,
            norm: device.upload(&[3000.0])?,
            losses: device.upload(&[2.3, 2.45, 2.2])?,
            coefficients: device.upload(&[1.0, 0.5, -0.25, 0.0])?,
            dropped: device.zeros(2)?,
            step: device.upload(&[100u32])?,
            skip: device.zeros(1)?,
            flag: device.zeros(1)?,
        })
    }
}

/// A kernel (or a sequence) with the bytes it moves per element.
type Kernel = (&'static str, u64, fn(&mut Vectors, &mut Numbers) -> Result<()>);

fn combined<'a>(x: &'a [Buffer<f32>; 3], count: usize, coefficients: &'a Buffer<f64>) -> Combination<'a, f32> {
    Combination { vectors: [0, 1, 2, 3].map(|k| (k < count).then(|| x[k].view())), coefficients: coefficients.view() }
}

fn sgd(x: &mut Vectors, y: &mut Numbers, count: usize) -> Result<()> {
    vector::sgd(x.w.view_mut(), x.m.view_mut(), combined(&x.g, count, &y.coefficients), SGD, y.skip.view())
}

fn adamw(x: &mut Vectors, y: &mut Numbers, count: usize) -> Result<()> {
    let gradients = combined(&x.g, count, &y.coefficients);
    let (w, m, v) = (x.w.view_mut(), x.m.view_mut(), x.v.view_mut());
    vector::adamw(w, m, v, gradients, ADAMW, y.step.view(), y.skip.view())
}

fn perturb(x: &mut Vectors, y: &mut Numbers, both: bool) -> Result<()> {
    let minus = both.then(|| x.minus.view_mut());
    vector::perturb(x.w.view(), x.g[0].view(), y.norm.view(), 0.05, x.plus.view_mut(), minus)
}

const KERNELS: &[Kernel] = &[
    ("copy", 8, |x, _| x.plus.copy_from(&x.w)),
    ("convert_f32_f32", 8, |x, _| vector::convert(x.w.view(), x.plus.view_mut())),
    ("convert_f32_f16", 6, |x, _| vector::convert(x.w.view(), x.halves.view_mut())),
    ("convert_f16_f32", 6, |x, _| vector::convert(x.halves.view(), x.plus.view_mut())),
    ("fill", 4, |x, _| vector::fill(x.plus.view_mut(), 0.5)),
    ("axpy", 12, |x, _| vector::axpy(1e-3, x.w.view(), x.plus.view_mut())),
    ("commit", 8, |x, y| vector::commit(y.skip.view(), x.w.view(), x.plus.view_mut())),
    ("check_finite", 4, |x, y| vector::check_finite(x.w.view(), y.flag.view_mut())),
    ("l2_norm", 4, |x, y| vector::l2_norm(x.g[0].view(), &mut y.reduction, y.norm.view_mut())),
    ("dot", 8, |x, y| vector::dot(x.g[0].view(), x.g[1].view(), &mut y.reduction, y.norm.view_mut())),
    ("perturb", 12, |x, y| perturb(x, y, false)),
    ("perturb_both", 16, |x, y| perturb(x, y, true)),
    ("perturb_f16", 10, |x, y| {
        vector::perturb(x.w.view(), x.g[0].view(), y.norm.view(), 0.05, x.halves.view_mut(), None)
    }),
    ("perturb_linf", 12, |x, _| vector::perturb_linf(x.w.view(), x.g[0].view(), 0.05, x.plus.view_mut(), None)),
    ("sgd_1", 20, |x, y| sgd(x, y, 1)),
    ("sgd_2", 24, |x, y| sgd(x, y, 2)),
    ("sgd_3", 28, |x, y| sgd(x, y, 3)),
    ("adamw_1", 28, |x, y| adamw(x, y, 1)),
    ("adamw_3", 36, |x, y| adamw(x, y, 3)),
    ("random_uniform", 4, |x, _| random::uniform(x.plus.view_mut(), 1, 0)),
    ("random_normal", 4, |x, _| random::normal(x.plus.view_mut(), 1, 0)),
    ("sam_step", 36, |x, y| {
        vector::l2_norm(x.g[0].view(), &mut y.reduction, y.norm.view_mut())?;
        perturb(x, y, false)?;
        sgd(x, y, 1)
    }),
    ("cr_sam_step", 48, |x, y| {
        vector::l2_norm(x.g[0].view(), &mut y.reduction, y.norm.view_mut())?;
        perturb(x, y, true)?;
        let (coefficients, dropped) = (y.coefficients.slice_mut(0..3)?, y.dropped.view_mut());
        vector::cr_sam_coefficients(y.losses.view(), CR_SAM, coefficients, y.skip.view(), dropped)?;
        sgd(x, y, 3)
    }),
];

/// A row of the table at the end.
struct Row {
    name: String,
    bytes: u64,
    seconds: f64,
}

fn bench_device(criterion: &mut Criterion, device: &Device, n: usize) -> Result<Vec<Row>> {
    let mut sets = (0..SETS as u64).map(|seed| Vectors::new(device, n, seed)).collect::<Result<Vec<_>>>()?;
    let mut numbers = Numbers::new(device)?;
    let mut rows = Vec::new();
    let mut group = criterion.benchmark_group(format!("{}/{n}", device.name()));
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    for (name, bytes, kernel) in KERNELS {
        let bytes = bytes * n as u64;
        let best = RefCell::new(f64::INFINITY);
        group.throughput(Throughput::Bytes(bytes)).bench_function(*name, |bencher| {
            bencher.iter_custom(|count| {
                let run = |sets: &mut [Vectors], numbers: &mut Numbers| -> Result<f64> {
                    let start = device.event()?;
                    for turn in 0..count as usize {
                        kernel(&mut sets[turn % SETS], numbers)?;
                    }
                    device.event()?.elapsed_since(&start)
                };
                let seconds = run(&mut sets, &mut numbers).unwrap_or_else(|error| panic!("{name}: {error}"));
                let mut best = best.borrow_mut();
                *best = best.min(seconds / count as f64);
                Duration::from_secs_f64(seconds)
            });
        });
        rows.push(Row { name: (*name).into(), bytes, seconds: best.into_inner() });
    }
    Ok(rows)
}

/// `function(x, y, z)` on parts of the three vectors, a thread for each part.
fn in_parallel(threads: usize, x: &[f32], y: &mut [f32], z: &[f32], function: fn(&[f32], &mut [f32], &[f32])) {
    let part = x.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for ((x, y), z) in x.chunks(part).zip(y.chunks_mut(part)).zip(z.chunks(part)) {
            scope.spawn(move || function(x, y, z));
        }
    });
}

/// The same work as plain Rust loops on all cores, for comparison.
fn bench_plain(criterion: &mut Criterion, n: usize) -> Result<Vec<Row>> {
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let device = Device::host();
    let mut sets = Vec::new();
    for seed in 0..SETS as u64 {
        let vectors = Vectors::new(&device, n, seed)?;
        sets.push([vectors.w.to_vec()?, vectors.plus.to_vec()?, vectors.g[0].to_vec()?]);
    }
    type Loop = fn(&[f32], &mut [f32], &[f32]);
    let loops: [(&str, u64, Loop); 2] = [
        ("axpy", 12, |x, y, _| y.iter_mut().zip(x).for_each(|(y, x)| *y += 1e-3 * x)),
        ("perturb", 12, |x, y, z| y.iter_mut().zip(x.iter().zip(z)).for_each(|(y, (w, g))| *y = w + 1e-5 * g)),
    ];
    let mut rows = Vec::new();
    let mut group = criterion.benchmark_group(format!("plain loops/{n}"));
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    for (name, bytes, function) in loops {
        let bytes = bytes * n as u64;
        let best = RefCell::new(f64::INFINITY);
        group.throughput(Throughput::Bytes(bytes)).bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let start = std::time::Instant::now();
                for turn in 0..count as usize {
                    let [x, y, z] = &mut sets[turn % SETS];
                    in_parallel(threads, x, y, z, function);
                }
                let elapsed = start.elapsed();
                let mut best = best.borrow_mut();
                *best = best.min(elapsed.as_secs_f64() / count as f64);
                elapsed
            });
        });
        rows.push(Row { name: format!("{name} (plain loop)"), bytes, seconds: best.into_inner() });
    }
    Ok(rows)
}

/// Rows whose benchmark was filtered out have no time.
fn print_table(title: &str, rows: &[Row]) {
    let measured: Vec<&Row> = rows.iter().filter(|row| row.seconds.is_finite()).collect();
    let bandwidth = |row: &Row| row.bytes as f64 / row.seconds;
    let is_copy = |row: &&&Row| row.name == "copy" || row.name == "convert_f32_f32";
    let copy = measured.iter().filter(is_copy).map(|row| bandwidth(row)).fold(f64::NAN, f64::max);
    println!("\n{title}\n{:24} {:>11} {:>10} {:>14}", "", "ms (best)", "GB/s", "share of copy");
    for row in measured {
        let (milliseconds, speed) = (1e3 * row.seconds, bandwidth(row));
        println!("{:24} {milliseconds:11.4} {:10.1} {:13.0}%", row.name, speed / 1e9, 100.0 * speed / copy);
    }
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let mut criterion = Criterion::default().configure_from_args();
    let mut tables = Vec::new();
    for n in LENGTHS {
        for device in common::devices()? {
            let mut rows = bench_device(&mut criterion, &device, n)?;
            if device.is_host() {
                rows.extend(bench_plain(&mut criterion, n)?);
            }
            tables.push((format!("{} ({}), {n} elements", device.name(), device.description()), rows));
        }
    }
    criterion.final_summary();
    for (title, rows) in tables {
        print_table(&title, &rows);
    }
    Ok(())
}
