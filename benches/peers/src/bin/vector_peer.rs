//! polder's side of the paired comparison of vector algebra (`benches/peers/vector.py`): the norm, the perturbation and
//! the update of a SAM or CR-SAM step, without any network. It answers each command on standard input with one line of
//! JSON, or with `{"error": "..."}`:
//!
//! - `steps N`: takes N steps on random data, over three sets of buffers that take turns; `{"seconds": ..}`;
//! - `check IN OUT`: takes one step on `w`, `g0`, `g_plus`, `g_minus`, `momentum` (f32, `--params` values each) and on
//!   the losses `l0`, `l_plus`, `l_minus` (one value each, f32 or f64) of the safetensors file IN; writes `w`,
//!   `momentum`, `w_plus` and, for CR-SAM, `w_minus` to OUT; `{"ok": true}`;
//! - `quit`.

use std::path::Path;

use clap::{Parser, ValueEnum};
use polder::device::{Buffer, Device, Result as DeviceResult};
use polder::kernels::random;
use polder::kernels::vector::{self, Combination, CrSamTerms, Rate, Reduction, SgdStep};
use polder::train::open_device;
use polder_peers::protocol::{self, Answer, number};
use polder_peers::tensors;
use serde_json::json;

// The same as in benches/peers/common.py.
const RHO: f64 = 0.05;
const SGD: SgdStep =
    SgdStep { lr: Rate::Fixed(0.01), momentum: 0.9, nesterov: false, weight_decay: 5e-4, decay_len: usize::MAX };
const CR_SAM: CrSamTerms =
    CrSamTerms { log_form: true, alpha: 0.1, beta: 0.01, a_min: 1e-8, b_min: 1e-8, loss_error: 0.0 };

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

/// The numbers that the kernels of one step pass on.
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

fn check(device: &Device, method: Method, n: usize, input: &Path, output: &Path) -> Answer<()> {
    let tensors =
        [("w", n), ("g0", n), ("g_plus", n), ("g_minus", n), ("momentum", n), ("l0", 1), ("l_plus", 1), ("l_minus", 1)];
    let [w, g0, g_plus, g_minus, momentum, l0, l_plus, l_minus] = tensors::read(input, tensors)?;
    let upload = |values: Vec<f64>| device.upload(&values.into_iter().map(|value| value as f32).collect::<Vec<_>>());
    let mut vectors = Vectors {
        w: upload(w)?,
        momentum: upload(momentum)?,
        g0: upload(g0)?,
        g_plus: upload(g_plus)?,
        g_minus: upload(g_minus)?,
        w_plus: device.poisoned(n)?,
        w_minus: device.poisoned(n)?,
    };
    let mut step = Step::new(device, method)?;
    step.losses.write(&[l0[0], l_plus[0], l_minus[0]])?;
    step.run(&mut vectors)?;
    let mut written = vec![
        ("w", vectors.w.to_vec()?),
        ("momentum", vectors.momentum.to_vec()?),
        ("w_plus", vectors.w_plus.to_vec()?),
    ];
    if method == Method::CrSam {
        written.push(("w_minus", vectors.w_minus.to_vec()?));
    }
    tensors::write(output, &written)
}

fn main() -> Answer<()> {
    let args = Args::parse();
    let device = open_device(&args.device, args.threads)?;
    let mut sets =
        (0..SETS).map(|seed| Vectors::random(&device, args.params, seed)).collect::<DeviceResult<Vec<_>>>()?;
    let mut step = Step::new(&device, args.method)?;
    let mut turn = 0;
    protocol::serve(|words| match *words {
        ["steps", count] => {
            let count: usize = number(count)?;
            device.synchronize()?;
            let start = std::time::Instant::now();
            for _ in 0..count {
                step.run(&mut sets[turn])?;
                turn = (turn + 1) % sets.len();
            }
            device.synchronize()?;
            Ok(json!({ "seconds": start.elapsed().as_secs_f64() }))
        }
        ["check", input, output] => {
            check(&device, args.method, args.params, Path::new(input), Path::new(output))?;
            Ok(json!({ "ok": true }))
        }
        _ => protocol::unknown(words),
    })
}
