//! polder's side of the paired comparison with PyTorch (`benches/peers/pytorch.py`): a process that reads weights and
//! one batch. It answers each command on standard input with one line of JSON, or with `{"error": "..."}`.
//!
//! - `gradient FILE`: writes the gradient of the batch's loss (batch norm in train mode) and answers `{"loss": …}`;
//! - `steps N`: takes N training steps on the batch and answers `{"seconds": …, "images_per_s": …}`. The first step is
//!   recorded and then replayed, as in `polder train`;
//! - `memory`: answers `{"peak_rss_bytes": …}` (on Linux; 0 elsewhere);
//! - `quit`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Parser, ValueEnum};
use half::{bf16, f16};
use polder::device::{Bf16x3, Bf16x6, Compute, Device, RecordedGraph, Tf32};
use polder::kernels::image::{self, BatchShape, Normalization, Position};
use polder::nn::Model;
use polder::objective::{ObjectiveExt, RunningStats};
use polder::optim::{Base, CrSam, Method, Optimizer, Plain, Sam, Settings};
use polder::plan::{Plan, PlanOptions, Shape};
use polder::train::{open_device, weights};
use polder_peers::Precision;
use polder_peers::protocol::{self, Answer, number};
use safetensors::SafeTensors;
use serde_json::json;

#[derive(Clone, Copy, ValueEnum)]
enum MethodName {
    Sgd,
    Sam,
    CrSam,
}

#[derive(Parser)]
struct Args {
    #[arg(long)]
    model: String,
    #[arg(long, value_enum)]
    method: MethodName,
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Weights and running statistics, with torchvision's names.
    #[arg(long)]
    weights: PathBuf,
    /// `images` (u8, NHWC) and `labels` (i64).
    #[arg(long)]
    images: PathBuf,
}

fn main() -> Answer<()> {
    let args = Args::parse();
    match args.precision {
        Precision::F32 => answer::<f32>(&args),
        Precision::Tf32 => answer::<Tf32>(&args),
        Precision::Bf16x3 => answer::<Bf16x3>(&args),
        Precision::Bf16x6 => answer::<Bf16x6>(&args),
        Precision::F16 => answer::<f16>(&args),
        Precision::Bf16 => answer::<bf16>(&args),
    }
}

fn answer<S: Compute<Master = f32>>(args: &Args) -> Answer<()> {
    let device = open_device(&args.device, args.threads)?;
    let file = std::fs::read(&args.images)?;
    let tensors = SafeTensors::deserialize(&file)?;
    let (images, labels) = (tensors.tensor("images")?, tensors.tensor("labels")?);
    let &[samples, height, width, channels] = images.shape() else { return Err("images are not NHWC".into()) };
    if samples < args.batch_size {
        return Err(format!("{samples} images are fewer than a batch of {}", args.batch_size).into());
    }
    let labels: Vec<u32> = labels.data().chunks_exact(8).map(|bytes| u32::from(bytes[0])).collect();
    let shape = Shape { batch: args.batch_size, height, width, channels };
    let (graph, logits) = Model::from_name(&args.model, None)?.trace(shape, 10)?;
    let mut plan = Plan::<S>::new(&device, graph, logits, PlanOptions::training())?;
    set_batch(&device, &mut plan, images.data(), &labels)?;
    let [start, statistics] = weights::load(&args.weights, [plan.parameters(), plan.statistics_layout()])?;
    plan.set_statistics(device.upload(&statistics)?.view())?;
    let len = start.len();
    let mut parameters = device.upload(&start)?;
    let method: Box<dyn Method<f32>> = match args.method {
        MethodName::Sgd => Box::new(Plain {}),
        MethodName::Sam => Box::new(Sam::new(0.05)),
        MethodName::CrSam => Box::new(CrSam { rho: 0.05, alpha: 0.1, ..CrSam::default() }),
    };
    let base = Base::Sgd { momentum: 0.9, nesterov: false };
    let mut optimizer =
        Optimizer::new(&device, len, Settings { weight_decay: 5e-4, decay_len: len, ..Settings::boxed(method, base) })?;
    let mut recorded: Option<RecordedGraph> = None;

    protocol::serve(|words| match *words {
        ["gradient", path] => {
            let (mut gradient, mut loss) = (device.zeros(len)?, device.zeros(1)?);
            let mut flag = device.zeros(1)?;
            let (g, l) = (gradient.view_mut(), loss.view_mut());
            plan.gradient(parameters.view(), RunningStats::Keep, g, l, flag.view_mut())?;
            weights::save(Path::new(path), &[(plan.parameters(), &gradient.to_vec()?)])?;
            Ok(json!({"loss": loss.to_vec()?[0]}))
        }
        ["steps", count] => {
            let count: usize = number(count)?;
            device.synchronize()?;
            // Wall-clock time, as on the other side.
            let start = Instant::now();
            for _ in 0..count {
                if let Some(graph) = &recorded {
                    graph.replay()?;
                    continue;
                }
                let mut step = || optimizer.step(&mut plan, parameters.view_mut(), 0.01);
                step()?;
                recorded = Some(device.capture(step)?);
            }
            device.synchronize()?;
            let seconds = start.elapsed().as_secs_f64();
            let images_per_s = (count * args.batch_size) as f64 / seconds;
            Ok(json!({"seconds": seconds, "images_per_s": images_per_s}))
        }
        ["memory"] => Ok(json!({"peak_rss_bytes": peak_memory()})),
        _ => protocol::unknown(words),
    })
}

/// The first batch, normalised with CIFAR-10's published values.
fn set_batch<S: Compute>(device: &Device, plan: &mut Plan<S>, pixels: &[u8], labels: &[u32]) -> Answer<()> {
    let Shape { batch, height, width, channels } = plan.input_shape();
    let normalization = Normalization { mean: [0.4914, 0.4822, 0.4465, 0.0], std: [0.2470, 0.2435, 0.2616, 1.0] };
    let (pixels, labels) = (device.upload(pixels)?, device.upload(labels)?);
    let order = device.upload(&(0..batch as u32).collect::<Vec<_>>())?;
    let shape = BatchShape { batch, height, width, channels };
    let (out, truth) = plan.batch_mut()?;
    let start = Position::default();
    image::batch(&shape, pixels.view(), labels.view(), order.view(), start, &normalization, None, out, truth)?;
    device.synchronize()?;
    Ok(())
}

/// The peak resident set size of the process, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}
