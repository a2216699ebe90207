//! Roofline of a training step on the CPU: for each kind of operation the bytes that it must move and the operations
//! that it must do, the time that these take at the machine's peaks, and the measured time. The peaks are measured in
//! the same run. A convolution counts as the operations of its direct form, so Winograd's form can be faster than the
//! floor. It is for networks without grouped convolutions.
//!
//! `cargo bench --bench roofline [-- MODEL [sgd|sam [BATCH [f32|bf16|bf16x3|bf16x6]]]]`; a SAM step of a ResNet-20 with
//! 128 images in f32 by default. It prints tables as Markdown.

mod common;

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Instant;

use half::bf16;
use polder::device::{Bf16x3, Bf16x6, Compute, Device};
use polder::kernels::peak::{self, Unit};
use polder::kernels::vector;
use polder::nn::{Model, initial_weights};
use polder::optim::{Base, Method, Optimizer, Plain, Sam, Settings};
use polder::plan::{Graph, Plan, PlanOptions, Shape};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Repetitions of each measurement, of which the median counts.
const ROUNDS: usize = 11;
/// Bytes of a vector whose bandwidth is measured: more than a cache holds.
const VECTOR_BYTES: usize = 256 << 20;

/// The part of a step that a kernel belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Forward,
    InputGradient,
    WeightGradient,
    BatchNorm,
    BatchNormBackward,
    Weights,
    Other,
}

impl Part {
    const ALL: [(Self, &str); 7] = [
        (Self::Forward, "convolution"),
        (Self::InputGradient, "its input gradient"),
        (Self::WeightGradient, "its weight gradient"),
        (Self::BatchNorm, "batch norm, sum, ReLU"),
        (Self::BatchNormBackward, "its backward"),
        (Self::Weights, "norm, perturbation, update"),
        (Self::Other, "shortcuts, pooling, linear layer, loss"),
    ];
}

/// A launch's part, and whether a convolution ends with it. `turned` tells whether a convolution's weights were packed
/// for the input gradient last: that and the forward share some kernels.
fn part_of(kernel: &str, turned: &mut bool) -> (Part, bool) {
    if kernel.starts_with("conv_") {
        let packs = kernel.contains("weights") || kernel.contains("pack");
        if packs {
            *turned = kernel.contains("turned") || kernel.contains("input_gradient");
        }
        return if kernel.contains("weight_gradient") || kernel.contains("sum_parts") {
            (Part::WeightGradient, kernel.contains("weight_gradient"))
        } else {
            (if *turned { Part::InputGradient } else { Part::Forward }, !packs)
        };
    }
    let starts = |names: &[&str]| names.iter().any(|name| kernel.starts_with(name));
    let part = if starts(&["batch_norm_sums", "batch_norm_input", "batch_norm_parameters"]) {
        Part::BatchNormBackward
    } else if starts(&["batch_norm_"]) {
        Part::BatchNorm
    } else if starts(&["perturb", "sgd", "check_finite", "finish", "squares", "advance", "gradient_pieces", "convert"])
    {
        Part::Weights
    } else {
        Part::Other
    };
    (part, false)
}

/// What must be moved and computed.
#[derive(Debug, Clone, Copy, Default)]
struct Work {
    bytes: f64,
    multiply_adds: f64,
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.multiply_adds += other.multiply_adds;
    }
}

/// A convolution's shape as the table shows it, and the work of each of its three passes.
struct Layer {
    name: String,
    works: [Work; 3],
}

/// The convolutions of a network in order, and the work of each part in a pass forward and back. An activation has
/// `size` bytes a number, a weight 4.
fn count(graph: &Graph, size: f64) -> (Vec<Layer>, BTreeMap<Part, Work>) {
    let mut layers = Vec::new();
    let mut works = BTreeMap::<Part, Work>::new();
    let bytes = |value| size * graph.shape(value).len() as f64;
    for operation in graph.operations() {
        let (x, y) = (operation.inputs[0], operation.output);
        match operation.name {
            "Convolution" => {
                let (from, to) = (graph.shape(x), graph.shape(y));
                let all = bytes(x) + bytes(y) + 4.0 * operation.parameters as f64;
                let work = Work { bytes: all, multiply_adds: operation.multiply_adds as f64 };
                // The gradient of the images is not computed.
                let none = Work::default();
                let input = if x == graph.input() { none } else { work };
                let taps = operation.parameters / (from.channels * to.channels);
                let side = taps.isqrt();
                let name = format!(
                    "{side}×{side}, {}→{}, {}×{}→{}×{}",
                    from.channels, to.channels, from.height, from.width, to.height, to.width
                );
                for (part, work) in [(Part::Forward, work), (Part::InputGradient, input), (Part::WeightGradient, work)]
                {
                    *works.entry(part).or_default() += work;
                }
                layers.push(Layer { name, works: [work, input, work] });
            }
            // The traffic that the kernels' documentation states. With a residual, the backward also writes its
            // gradient, and reads the mask from y twice.
            "BatchNorm" => {
                let (forward, backward) = if operation.inputs.len() == 2 { (4.0, 8.0) } else { (3.0, 5.0) };
                for (part, tensors) in [(Part::BatchNorm, forward), (Part::BatchNormBackward, backward)] {
                    *works.entry(part).or_default() += Work { bytes: tensors * bytes(y), multiply_adds: 0.0 };
                }
            }
            _ => {
                let both = 2.0 * operation.inputs.iter().map(|&value| bytes(value)).sum::<f64>() + 2.0 * bytes(y);
                let multiply_adds = 3.0 * operation.multiply_adds as f64;
                *works.entry(Part::Other).or_default() += Work { bytes: both, multiply_adds };
            }
        }
    }
    (layers, works)
}

/// The median of the seconds that `work` takes.
fn median_of(mut work: impl FnMut() -> Outcome<f64>) -> Outcome<f64> {
    let mut seconds = (0..ROUNDS).map(|_| work()).collect::<Outcome<Vec<f64>>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[ROUNDS / 2])
}

/// The machine's peaks, on all threads.
struct Peaks {
    bytes: f64,
    vector: f64,
    matrix: Option<f64>,
}

impl Peaks {
    fn measure(device: &Device) -> Outcome<Self> {
        let len = VECTOR_BYTES / 4;
        let (x, mut y) = (device.upload(&vec![1.0_f32; len])?, device.upload(&vec![0.0_f32; len])?);
        let seconds = median_of(|| {
            let start = Instant::now();
            vector::axpy(0.5, x.view(), y.view_mut())?;
            Ok(start.elapsed().as_secs_f64())
        })?;
        let bytes = 12.0 * len as f64 / seconds;
        let blocks = std::thread::available_parallelism()?.get() as u32;
        let rate = |unit, rounds: u32| -> Outcome<f64> {
            let mut done = 0;
            let seconds = median_of(|| {
                let start = Instant::now();
                done = peak::multiply_adds(device, unit, blocks, rounds)?;
                Ok(start.elapsed().as_secs_f64())
            })?;
            Ok(done as f64 / seconds)
        };
        let matrix = if device.has_matrix_units() { Some(rate(Unit::Matrix, 200_000)?) } else { None };
        Ok(Self { bytes, vector: rate(Unit::Vector, 2_000_000)?, matrix })
    }

    /// Seconds at the peaks: `products` multiplications of numbers in pieces for each multiplication.
    fn floor(&self, work: Work, products: f64) -> f64 {
        let compute = match self.matrix {
            Some(matrix) if products > 0.0 => products / matrix,
            _ => 1.0 / self.vector,
        };
        (work.bytes / self.bytes).max(work.multiply_adds * compute)
    }
}

/// Prints the tables for activations of type `S`, of which a matrix unit takes so many `products`; 0 for none.
fn roofline<S: Compute<Master = f32>>(model: &str, method: &str, batch: usize, products: f64) -> Outcome<()> {
    let device = Device::host();
    let shape = Shape { batch, height: 32, width: 32, channels: 3 };
    let (graph, logits) = Model::from_name(model, None)?.trace(shape, 10)?;
    let (layers, mut works) = count(&graph, size_of::<S>() as f64);
    let mut plan = Plan::<S>::new(&device, graph, logits, PlanOptions::training())?;
    let len = plan.parameters().len();
    let mut weights = device.upload(&initial_weights(plan.parameters(), 0)?)?;
    let (mut images, mut labels) = plan.batch_mut()?;
    let noise = common::noise::<S>(&device, images.len(), 1)?;
    images.copy_from(noise.view())?;
    labels.write(&(0..batch as u32).map(|i| i % 10).collect::<Vec<_>>())?;
    // Bytes a weight: the gradient's norm, the perturbation and the update.
    let (method, passes, vectors): (Box<dyn Method<f32>>, f64, f64) = match method {
        "sgd" => (Box::new(Plain {}), 1.0, 4.0 + 20.0),
        "sam" => (Box::new(Sam::new(0.05)), 2.0, 4.0 + 12.0 + 4.0 + 20.0),
        _ => return Err(format!("the method is {method}, expected sgd or sam").into()),
    };
    let base = Base::Sgd { momentum: 0.9, nesterov: false };
    let settings = Settings { weight_decay: 5e-4, decay_len: len, ..Settings::boxed(method, base) };
    let mut optimizer = Optimizer::new(&device, len, settings)?;
    for _ in 0..2 {
        optimizer.step(&mut plan, weights.view_mut(), 0.01)?;
    }
    let graph = device.capture(|| optimizer.step(&mut plan, weights.view_mut(), 0.01))?;
    let kernels = graph.list()?;
    let rounds = (0..ROUNDS).map(|_| graph.replay_timed()).collect::<Result<Vec<_>, _>>()?;
    let median = |index: usize| {
        let mut seconds: Vec<f64> = rounds.iter().map(|round| round[index]).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[ROUNDS / 2]
    };
    let peaks = Peaks::measure(&device)?;

    let mut measured = BTreeMap::<Part, (usize, f64)>::new();
    let mut by_pass: [Vec<f64>; 3] = Default::default();
    let mut by_kernel = BTreeMap::<&str, (usize, f64)>::new();
    let mut turned = false;
    let mut sum = [0.0; 3];
    for (index, kernel) in kernels.iter().enumerate() {
        let (part, ends) = part_of(kernel, &mut turned);
        let seconds = median(index);
        let entry = by_kernel.entry(kernel).or_default();
        *entry = (entry.0 + 1, entry.1 + seconds);
        let entry = measured.entry(part).or_default();
        *entry = (entry.0 + 1, entry.1 + seconds);
        if let Some(pass) = [Part::Forward, Part::InputGradient, Part::WeightGradient].iter().position(|p| *p == part) {
            sum[pass] += seconds;
            if ends {
                by_pass[pass].push(std::mem::take(&mut sum[pass]));
            } else if pass == 2 {
                // The parts of a weight gradient are added up after it.
                if let Some(last) = by_pass[2].last_mut() {
                    *last += std::mem::take(&mut sum[pass]);
                }
            }
        }
    }
    for work in works.values_mut() {
        *work = Work { bytes: passes * work.bytes, multiply_adds: passes * work.multiply_adds };
    }
    works.insert(Part::Weights, Work { bytes: vectors * len as f64, multiply_adds: 0.0 });

    let matrix = peaks.matrix.map_or("none".into(), |rate| format!("{:.0} Gflop/s", 2e-9 * rate));
    println!(
        "{model}, {batch} images, {} on {}: `y += x` {:.1} GB/s; multiply-adds {:.0} Gflop/s; matrix units {matrix}\n",
        S::NAME,
        device.description(),
        1e-9 * peaks.bytes,
        2e-9 * peaks.vector,
    );
    println!("| part | launches | MB | Gflop | floor, ms | measured, ms | floor / measured | share of the step |");
    println!("|---|---|---|---|---|---|---|---|");
    let total: f64 = measured.values().map(|(_, seconds)| seconds).sum();
    let mut floors = 0.0;
    for (part, name) in Part::ALL {
        let (launches, seconds) = measured.get(&part).copied().unwrap_or_default();
        let work = works.get(&part).copied().unwrap_or_default();
        let is_product = matches!(part, Part::Forward | Part::InputGradient | Part::WeightGradient);
        let floor = peaks.floor(work, if is_product { products } else { 0.0 });
        floors += floor;
        println!(
            "| {name} | {launches} | {:.0} | {:.2} | {:.1} | {:.1} | {:.0} % | {:.1} % |",
            1e-6 * work.bytes,
            2e-9 * work.multiply_adds,
            1e3 * floor,
            1e3 * seconds,
            100.0 * floor / seconds,
            100.0 * seconds / total
        );
    }
    let percent = 100.0 * floors / total;
    println!("| all | {} | | | {:.1} | {:.1} | {percent:.0} % | |\n", kernels.len(), 1e3 * floors, 1e3 * total);

    let mut by_kernel: Vec<_> = by_kernel.into_iter().collect();
    by_kernel.sort_by(|(_, (_, a)), (_, (_, b))| b.total_cmp(a));
    println!("| kernel | launches | ms | share of the step |\n|---|---|---|---|");
    for (name, (launches, seconds)) in by_kernel {
        println!("| `{name}` | {launches} | {:.2} | {:.1} % |", 1e3 * seconds, 100.0 * seconds / total);
    }
    println!();

    println!("Convolutions, Gflop/s (floor / measured) of the forward, the input gradient and the weight gradient:\n");
    println!("| layer | number | forward | input gradient | weight gradient |\n|---|---|---|---|---|");
    // Backward passes meet the layers in reverse order, and the first has no input gradient.
    let count = layers.len();
    let last_first = |index: usize| count - 1 - index % count;
    let with_input: Vec<usize> = (0..count).filter(|&i| layers[i].works[1].multiply_adds > 0.0).collect();
    let mut seconds = vec![[0.0; 3]; count];
    for (index, time) in by_pass[0].iter().enumerate() {
        seconds[index % count][0] += time / passes;
    }
    for (index, time) in by_pass[1].iter().enumerate() {
        seconds[with_input[with_input.len() - 1 - index % with_input.len()]][1] += time / passes;
    }
    for (index, time) in by_pass[2].iter().enumerate() {
        seconds[last_first(index)][2] += time / passes;
    }
    let mut shown = Vec::<&str>::new();
    for layer in &layers {
        if shown.contains(&layer.name.as_str()) {
            continue;
        }
        shown.push(&layer.name);
        let same: Vec<usize> = (0..count).filter(|&i| layers[i].name == layer.name).collect();
        let cells: Vec<String> = (0..3)
            .map(|pass| {
                let work = layer.works[pass];
                if work.multiply_adds == 0.0 {
                    return "none".into();
                }
                let time = same.iter().map(|&i| seconds[i][pass]).sum::<f64>() / same.len() as f64;
                let rate = 2e-9 * work.multiply_adds / time;
                format!("{rate:.0} ({:.0} %)", 100.0 * peaks.floor(work, products) / time)
            })
            .collect();
        println!("| {} | {} | {} |", layer.name, same.len(), cells.join(" | "));
    }
    println!();
    Ok(())
}

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let word = |index: usize, default: &str| words.get(index).cloned().unwrap_or_else(|| default.into());
    let (model, method, batch) = (word(0, "resnet20"), word(1, "sam"), word(2, "128").parse()?);
    match word(3, "f32").as_str() {
        "f32" => roofline::<f32>(&model, &method, batch, 0.0),
        "bf16" => roofline::<bf16>(&model, &method, batch, 1.0),
        "bf16x3" => roofline::<Bf16x3>(&model, &method, batch, 3.0),
        "bf16x6" => roofline::<Bf16x6>(&model, &method, batch, 6.0),
        other => Err(format!("the precision is {other}, expected f32, bf16, bf16x3 or bf16x6").into()),
    }
}
