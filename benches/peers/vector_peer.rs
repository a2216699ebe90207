//! polder's side of the paired comparison of vector algebra (`benches/peers/vector.py`): the norm, the perturbation and the
//! update of a SAM or CR-SAM step, without any network. It answers commands on standard input with one JSON line each, and
//! with `{"error": "..."}` where it cannot:
//!
//! - `steps N`: N steps on random data, over three sets of buffers that take turns; `{"seconds": ..}`;
//! - `check IN OUT`: one step on `w`, `g0`, `g_plus`, `g_minus`, `momentum` (f32, `--params` values each) and on the losses `l0`,
//!   `l_plus`, `l_minus` (one value each, f32 or f64) of the safetensors file IN; writes `w`, `momentum`, `w_plus` and,
//!   for CR-SAM, `w_minus` to OUT; `{"ok": true}`;
//! - `quit`.

use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;

use clap::{Parser, ValueEnum};
use polder::device::{Buffer, Device, HostOptions, Result as DeviceResult};
use polder::kernels::random;
use polder::kernels::vector::{self, Combination, CrSam, CrSamForm, Rate, Reduction, SgdStep};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::json;

// The same as in benches/peers/common.py.
const RHO: f64 = 0.05;
const SGD: SgdStep =
    SgdStep { lr: Rate::Fixed(0.01), momentum: 0.9, nesterov: false, weight_decay: 5e-4, decay_len: usize::MAX };
const CR_SAM: CrSam = CrSam { form: CrSamForm::Log, alpha: 0.1, beta: 0.01, a_min: 1e-8, b_min: 1e-8 };

const SETS: u64 = 3;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Method {
    Sam,
    CrSam,
}

#[derive(Parser)]
struct Args {
    #[arg(long, value_enum)]
    method: Method,
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[arg(long, default_value_t = 11_173_962)]
    params: usize,
}

/// One set of vectors.
struct Vectors {
    w: Buffer<f32>,
    momentum: Buffer<f32>,
    g0: Buffer<f32>,
    g_plus: Buffer<f32>,
    g_minus: Buffer<f32>,
    w_plus: Buffer<f32>,
    w_minus: Buffer<f32>,
}

impl Vectors {
    fn random(device: &Device, n: usize, seed: u64) -> DeviceResult<Self> {
        let normal = |stream: u64| -> DeviceResult<Buffer<f32>> {
            let mut buffer = device.zeros(n)?;
            random::normal(buffer.view_mut(), seed, stream << 40)?;
            Ok(buffer)
        };
        Ok(Self {
            w: normal(0)?,
            momentum: normal(1)?,
            g0: normal(2)?,
            g_plus: normal(3)?,
            g_minus: normal(4)?,
            w_plus: normal(5)?,
            w_minus: normal(6)?,
        })
    }
}

/// The numbers that one step's kernels hand to one another.
struct Step {
    method: Method,
    reduction: Reduction,
    norm: Buffer<f64>,
    losses: Buffer<f64>,
    coefficients: Buffer<f64>,
    dropped: Buffer<u32>,
    skip: Buffer<u32>,
}

impl Step {
    fn new(device: &Device, method: Method) -> DeviceResult<Self> {
        Ok(Self {
            method,
            reduction: Reduction::new(device)?,
            norm: device.zeros(1)?,
            losses: device.upload(&[2.3, 2.45, 2.2])?,
            coefficients: device.upload(&[0.0, 1.0, 0.0, 0.0])?,
            dropped: device.zeros(2)?,
            skip: device.zeros(1)?,
        })
    }

    fn run(&mut self, x: &mut Vectors) -> DeviceResult<()> {
        vector::l2_norm(x.g0.view(), &mut self.reduction, self.norm.view_mut())?;
        let (mut vectors, mut minus) = ([None, Some(x.g_plus.view()), None, None], None);
        if self.method == Method::CrSam {
            vectors = [Some(x.g0.view()), Some(x.g_plus.view()), Some(x.g_minus.view()), None];
            minus = Some(x.w_minus.view_mut());
            let (coefficients, dropped) = (self.coefficients.slice_mut(0..3)?, self.dropped.view_mut());
            vector::cr_sam_coefficients(self.losses.view(), CR_SAM, coefficients, self.skip.view(), dropped)?;
        }
        vector::perturb(x.w.view(), x.g0.view(), self.norm.view(), RHO, x.w_plus.view_mut(), minus)?;
        let gradients = Combination { vectors, coefficients: self.coefficients.view() };
        vector::sgd(x.w.view_mut(), x.momentum.view_mut(), gradients, SGD, self.skip.view())
    }
}

/// The values of a floating-point tensor.
fn values(tensors: &SafeTensors<'_>, name: &str, len: usize) -> Result<Vec<f64>, Box<dyn Error>> {
    let tensor = tensors.tensor(name).map_err(|error| format!("{name}: {error}"))?;
    let data = tensor.data();
    let values: Vec<f64> = match tensor.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|&bytes| f64::from(f32::from_le_bytes(bytes))).collect(),
        Dtype::F64 => data.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect(),
        other => return Err(format!("{name}: {other:?} is neither F32 nor F64").into()),
    };
    if values.len() == len {
        Ok(values)
    } else {
        Err(format!("{name}: {} values, expected {len}", values.len()).into())
    }
}

fn check(device: &Device, method: Method, n: usize, input: &Path, output: &Path) -> Result<(), Box<dyn Error>> {
    let file = std::fs::read(input).map_err(|error| format!("{}: {error}", input.display()))?;
    let tensors = SafeTensors::deserialize(&file).map_err(|error| format!("{}: {error}", input.display()))?;
    let upload = |name: &str| -> Result<Buffer<f32>, Box<dyn Error>> {
        let values: Vec<f32> = values(&tensors, name, n)?.into_iter().map(|value| value as f32).collect();
        Ok(device.upload(&values)?)
    };
    let mut vectors = Vectors {
        w: upload("w")?,
        momentum: upload("momentum")?,
        g0: upload("g0")?,
        g_plus: upload("g_plus")?,
        g_minus: upload("g_minus")?,
        w_plus: device.poisoned(n)?,
        w_minus: device.poisoned(n)?,
    };
    let mut step = Step::new(device, method)?;
    let loss = |name| values(&tensors, name, 1).map(|values| values[0]);
    step.losses.write(&[loss("l0")?, loss("l_plus")?, loss("l_minus")?])?;
    step.run(&mut vectors)?;
    let mut written = vec![("w", vectors.w), ("momentum", vectors.momentum), ("w_plus", vectors.w_plus)];
    if method == Method::CrSam {
        written.push(("w_minus", vectors.w_minus));
    }
    let mut read = Vec::new();
    for (name, buffer) in written {
        read.push((name, buffer.to_vec()?));
    }
    let views = read.iter().map(|(name, values)| {
        TensorView::new(Dtype::F32, vec![n], bytemuck::cast_slice(values)).map(|view| (*name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    Ok(serialize_to_file(views, None, output).map_err(|error| format!("{}: {error}", output.display()))?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = match args.device.as_str() {
        "cpu" => Device::host_with(HostOptions { threads: args.threads, ..HostOptions::default() }),
        name => Device::from_name(name)?,
    };
    let mut sets =
        (0..SETS).map(|seed| Vectors::random(&device, args.params, seed)).collect::<DeviceResult<Vec<_>>>()?;
    let mut step = Step::new(&device, args.method)?;
    let mut turn = 0;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut steps = |count: &str| -> Result<f64, Box<dyn Error>> {
            let count: usize = count.parse().map_err(|_| format!("steps {count}: not a number"))?;
            device.synchronize()?;
            let start = std::time::Instant::now();
            for _ in 0..count {
                step.run(&mut sets[turn])?;
                turn = (turn + 1) % sets.len();
            }
            device.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        };
        let answer = match words[..] {
            ["quit"] => break,
            ["steps", count] => steps(count).map(|seconds| json!({ "seconds": seconds })),
            ["check", input, output] => check(&device, args.method, args.params, Path::new(input), Path::new(output))
                .map(|()| json!({ "ok": true })),
            _ => Err(format!("unknown command `{line}`").into()),
        };
        let answer = answer.unwrap_or_else(|error| json!({ "error": error.to_string() }));
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
