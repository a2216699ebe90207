//! polder's side of the paired comparison of convolutions (`benches/peers/conv.py`): one layer's three passes, each
//! alone, in NHWC with HWIO weights. It answers each command on standard input with one line of JSON, or with
//! `{"error": "..."}`:
//!
//! - `layer BATCH SIZE IN OUT KERNEL STRIDE SETS`: makes a layer on images of SIZE × SIZE, padded by half the kernel,
//!   and SETS sets of activations, which take turns; `{"ok": true}`;
//! - `check IN OUT`: reads `x`, `weight` and `dy` (f32, rounded to the precision) from the safetensors file IN, and
//!   writes `y`, `dx` and `dw` to OUT; `{"ok": true}`;
//! - `run PASS N`: runs the pass (`forward`, `input-gradient`, `weight-gradient`) N times on every set;
//!   `{"seconds": ..}`;
//! - `quit`.

use std::path::Path;
use std::time::Instant;

use clap::Parser;
use half::{bf16, f16};
use polder::device::{Bf16x3, Bf16x6, Buffer, Compute, Device, RecordedGraph, Result as DeviceResult, Tf32};
use polder::kernels::conv::{self, ConvShape};
use polder::kernels::{random, vector};
use polder::train::open_device;
use polder_peers::protocol::{self, Answer, number};
use polder_peers::{Precision, tensors};
use serde_json::json;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: String,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    InputGradient,
    WeightGradient,
}

impl Pass {
    fn from_name(name: &str) -> Answer<Self> {
        match name {
            "forward" => Ok(Self::Forward),
            "input-gradient" => Ok(Self::InputGradient),
            "weight-gradient" => Ok(Self::WeightGradient),
            other => Err(format!("there is no pass {other}").into()),
        }
    }
}

struct Layer<S: Compute> {
    shape: ConvShape,
    /// x and y of each set. Gradients read y as dy and write dx to x.
    sets: Vec<[Buffer<S>; 2]>,
    weight: Buffer<S>,
    dw: Buffer<S::Master>,
    workspace: Buffer<S::Master>,
}

/// Standard normal numbers.
fn noise<S: Compute>(device: &Device, len: usize, seed: u64) -> DeviceResult<Buffer<S>> {
    let (mut wide, mut noise) = (device.zeros::<S::Master>(len)?, device.zeros::<S>(len)?);
    random::normal(wide.view_mut(), seed, 0)?;
    vector::convert(wide.view(), noise.view_mut())?;
    Ok(noise)
}

impl<S: Compute> Layer<S> {
    fn new(device: &Device, shape: ConvShape, sets: u64) -> DeviceResult<Self> {
        shape.measure_tiles::<S>(true, device)?;
        let activations = |set: u64| -> DeviceResult<_> {
            Ok([noise(device, shape.input_len(), 2 * set + 1)?, noise(device, shape.output_len(), 2 * set + 2)?])
        };
        Ok(Self {
            shape,
            sets: (0..sets).map(activations).collect::<DeviceResult<_>>()?,
            weight: noise(device, shape.weight_len(), 0)?,
            dw: device.zeros(shape.weight_len())?,
            workspace: device.zeros(shape.workspace_len::<S>(device))?,
        })
    }

    fn run(&mut self, pass: Pass, set: usize) -> DeviceResult<()> {
        let [x, y] = &mut self.sets[set];
        let (weight, workspace) = (self.weight.view(), self.workspace.view_mut());
        match pass {
            Pass::Forward => conv::forward(&self.shape, x.view(), weight, y.view_mut(), false, workspace),
            Pass::InputGradient => conv::input_gradient(&self.shape, y.view(), weight, x.view_mut(), false, workspace),
            Pass::WeightGradient => {
                conv::weight_gradient(&self.shape, x.view(), y.view(), self.dw.view_mut(), false, workspace)
            }
        }
    }
}

fn check<S: Compute>(device: &Device, shape: ConvShape, input: &Path, output: &Path) -> Answer<()> {
    let lens = [("x", shape.input_len()), ("weight", shape.weight_len()), ("dy", shape.output_len())];
    let upload = |values: Vec<f64>| device.upload(&values.into_iter().map(S::from_f64).collect::<Vec<S>>());
    let [x, weight, dy] = tensors::read(input, lens)?.map(upload);
    let (x, weight, dy) = (x?, weight?, dy?);
    let mut layer = Layer { weight, ..Layer::<S>::new(device, shape, 0)? };
    layer.sets = vec![[x, device.poisoned(shape.output_len())?], [device.poisoned(shape.input_len())?, dy]];
    layer.run(Pass::Forward, 0)?;
    layer.run(Pass::InputGradient, 1)?;
    let [[x, y], [dx, dy]] = &layer.sets[..] else { unreachable!("two sets") };
    let (dw, workspace) = (layer.dw.view_mut(), layer.workspace.view_mut());
    conv::weight_gradient(&shape, x.view(), dy.view(), dw, false, workspace)?;
    let read = |buffer: &Buffer<S>| -> DeviceResult<Vec<f32>> {
        Ok(buffer.to_vec()?.into_iter().map(|value| value.to_f64() as f32).collect())
    };
    let dw = layer.dw.to_vec()?.into_iter().map(|value| value.to_f64() as f32).collect();
    tensors::write(output, &[("y", read(y)?), ("dx", read(dx)?), ("dw", dw)])
}

fn serve<S: Compute>(args: &Args) -> Answer<()> {
    let device = open_device(&args.device, args.threads)?;
    let mut layer: Option<Layer<S>> = None;
    // A recorded pass holds the layer's addresses.
    let mut recorded: Option<(Pass, RecordedGraph)> = None;
    protocol::serve(|words| match *words {
        ["layer", batch, size, in_channels, out_channels, kernel, stride, sets] => {
            let (size, kernel) = (number(size)?, number::<usize>(kernel)?);
            let shape = ConvShape {
                groups: 1,
                batch: number(batch)?,
                height: size,
                width: size,
                in_channels: number(in_channels)?,
                out_channels: number(out_channels)?,
                kernel,
                stride: number(stride)?,
                padding: kernel / 2,
            };
            (recorded, layer) = (None, None);
            layer = Some(Layer::new(&device, shape, number(sets)?)?);
            Ok(json!({ "ok": true }))
        }
        ["check", input, output] => {
            let shape = layer.as_ref().ok_or("there is no layer yet")?.shape;
            check::<S>(&device, shape, Path::new(input), Path::new(output))?;
            Ok(json!({ "ok": true }))
        }
        ["run", pass, count] => {
            let (pass, count) = (Pass::from_name(pass)?, number::<usize>(count)?);
            let layer = layer.as_mut().ok_or("there is no layer yet")?;
            if recorded.as_ref().is_none_or(|(of, _)| *of != pass) {
                let turn = || (0..layer.sets.len()).try_for_each(|set| layer.run(pass, set));
                recorded = Some((pass, device.capture(turn)?));
            }
            let Some((_, graph)) = &recorded else { unreachable!("recorded above") };
            device.synchronize()?;
            let start = Instant::now();
            (0..count).try_for_each(|_| graph.replay())?;
            device.synchronize()?;
            Ok(json!({ "seconds": start.elapsed().as_secs_f64() }))
        }
        _ => protocol::unknown(words),
    })
}

fn main() -> Answer<()> {
    let args = Args::parse();
    match args.precision {
        Precision::F32 => serve::<f32>(&args),
        Precision::Tf32 => serve::<Tf32>(&args),
        Precision::Bf16x3 => serve::<Bf16x3>(&args),
        Precision::Bf16x6 => serve::<Bf16x6>(&args),
        Precision::F16 => serve::<f16>(&args),
        Precision::Bf16 => serve::<bf16>(&args),
    }
}
