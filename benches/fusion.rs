//! The gain of each fusion, and of two passes at the same time: the same work with separate stages and with fused ones.
//! It runs in f16 on the first GPU if there is one, or on the device that `POLDER_TEST_DEVICE` names; times come from
//! the device's own events. Without a GPU only the last pair exists.

mod common;

use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use half::f16;
use polder::device::{Device, Result};
use polder::kernels::batch_norm::{
    self, Activation, Backward, BatchNormShape, Forward, Gradients, Mode, Normalized, Saved, Summed, Workspace,
};
use polder::kernels::conv::{self, ConvShape};
use polder::kernels::gradient::{GradientStages, Stage, Unfinished};
use polder::kernels::precision::SCALE_START;
use polder::kernels::vector::{self, Reduction};
use polder::nn::{Model, initial_weights};
use polder::objective::{ObjectiveExt, RunningStats};
use polder::plan::{Plan, PlanOptions, Shape};

const BATCH: usize = 128;

/// A 3×3 convolution on images of `size`×`size`.
fn layer(size: usize, in_channels: usize, out_channels: usize) -> ConvShape {
    let (height, width, kernel) = (size, size, 3);
    ConvShape { batch: BATCH, height, width, in_channels, out_channels, kernel, stride: 1, padding: 1, groups: 1 }
}

/// Times `work`, which is called with true for fused stages and with false for separate ones.
fn pair(
    group: &mut BenchmarkGroup<'_, WallTime>,
    device: &Device,
    name: &str,
    mut work: impl FnMut(bool) -> Result<()>,
) {
    for (form, together) in [("apart", false), ("together", true)] {
        group.bench_function(format!("{name}, {form}"), |bencher| {
            bencher.iter_custom(|count| {
                let mut timed = || -> Result<Duration> {
                    let start = device.event()?;
                    for _ in 0..count {
                        work(together)?;
                    }
                    Ok(Duration::from_secs_f64(device.event()?.elapsed_since(&start)?))
                };
                timed().expect("a launch")
            });
        });
    }
}

/// A convolution, then batch norm with a ReLU. The moments come from a pass over x or from the convolution's registers.
fn moments(group: &mut BenchmarkGroup<'_, WallTime>, device: &Device, shape: ConvShape) -> Result<()> {
    let Some(len) = shape.moments_len::<f16>(device) else { return Ok(()) };
    let (x, weight) =
        (common::noise::<f16>(device, shape.input_len(), 1)?, common::noise::<f16>(device, shape.weight_len(), 1)?);
    let (mut y, mut out) = (device.zeros(shape.output_len())?, device.zeros::<f16>(shape.output_len())?);
    let channels = shape.out_channels;
    let rows = BatchNormShape { rows: shape.output_len() / channels, channels };
    let (gamma, beta) = (device.upload(&vec![1.5; channels])?, device.upload(&vec![0.1; channels])?);
    let (mut mean, mut inv_std) = (device.zeros(channels)?, device.zeros(channels)?);
    let (mut tiles, mut workspace) = (device.zeros(len)?, Workspace::new(device, [rows])?);
    let mut scratch = device.zeros(shape.workspace_len::<f16>(device))?;
    let name = format!("convolution and batch norm, {}x{} {channels}", shape.height, shape.width);
    pair(group, device, &name, |together| {
        let saved = Saved { mean: mean.view_mut(), inv_std: inv_std.view_mut() };
        let (gamma, beta) = (gamma.view(), beta.view());
        if together {
            conv::forward_with_moments(&shape, x.view(), weight.view(), y.view_mut(), tiles.view_mut())?;
            let input = Forward { x: y.view(), gamma, beta, eps: 1e-5, residual: None, relu: true };
            batch_norm::forward_from_moments(rows, input, tiles.view(), out.view_mut(), saved, None)
        } else {
            conv::forward(&shape, x.view(), weight.view(), y.view_mut(), false, scratch.view_mut())?;
            let input = Forward { x: y.view(), gamma, beta, eps: 1e-5, residual: None, relu: true };
            batch_norm::forward_train(rows, input, out.view_mut(), saved, None, &mut workspace)
        }
    });
    Ok(())
}

/// An input gradient, then the backward of the batch norm with ReLU that made the convolution's input. The sums come
/// from a pass of their own or from the convolution's registers.
fn sums(group: &mut BenchmarkGroup<'_, WallTime>, device: &Device, shape: ConvShape) -> Result<()> {
    if !shape.leaves_sums::<f16>(device) {
        return Ok(());
    }
    let (channels, len) = (shape.in_channels, shape.input_len());
    let rows = BatchNormShape { rows: len / channels, channels };
    let (x, dy) = (common::noise::<f16>(device, len, 1)?, common::noise::<f16>(device, shape.output_len(), 2)?);
    let weight = common::noise::<f16>(device, shape.weight_len(), 3)?;
    let (gamma, beta) = (device.upload(&vec![1.5; channels])?, device.upload(&vec![0.1; channels])?);
    let (mean, inv_std) = (device.zeros(channels)?, device.upload(&vec![1.0; channels])?);
    let (mut dz, mut dx) = (device.zeros::<f16>(len)?, device.zeros::<f16>(len)?);
    let (mut dgamma, mut dbeta) = (device.zeros(channels)?, device.zeros(channels)?);
    let mut workspace = Workspace::new(device, [rows])?.with_convolutions::<f16>([&shape])?;
    let mut scratch = device.zeros(shape.workspace_len::<f16>(device))?;
    let name = format!("input gradient and batch norm, {}x{} {channels}", shape.height, shape.width);
    pair(group, device, &name, |together| {
        let (x, gamma, mean, inv_std) = (x.view(), gamma.view(), mean.view(), inv_std.view());
        let activation = Activation::ReluRecomputed { beta: beta.view() };
        let (dy, weight) = (dy.view(), weight.view());
        if together {
            let normalized = Normalized { x, gamma, mean, inv_std, activation };
            let (to, dgamma_out, dbeta_out) = (dz.view_mut(), dgamma.view_mut(), dbeta.view_mut());
            conv::input_gradient_with_sums(
                &shape,
                dy,
                weight,
                to,
                false,
                normalized,
                dgamma_out,
                dbeta_out,
                &mut workspace,
            )?;
            let (dz, dgamma, dbeta) = (dz.view(), dgamma.view(), dbeta.view());
            let summed = Summed { x, dz, gamma, mean, inv_std, dgamma, dbeta };
            batch_norm::backward_from_sums(rows, Mode::Train, summed, dx.view_mut(), None)
        } else {
            conv::input_gradient(&shape, dy, weight, dz.view_mut(), false, scratch.view_mut())?;
            let input = Backward { x, dy: dz.view(), gamma, mean, inv_std, activation };
            let gradients = Gradients { dx: dx.view_mut(), dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut() };
            batch_norm::backward(rows, Mode::Train, input, gradients, None, &mut workspace)
        }
    });
    Ok(())
}

/// Weight gradients as a step of SAM in f16 needs them: parts added up, the loss scale taken out, checked for finite
/// values, and with their norm. These are passes one after the other, or part of the kernel that writes the gradient
/// last.
fn gradients(
    group: &mut BenchmarkGroup<'_, WallTime>,
    device: &Device,
    name: &str,
    layers: &[ConvShape],
) -> Result<()> {
    if layers.iter().any(|shape| shape.moments_len::<f16>(device).is_none()) {
        return Ok(()); // no tensor cores
    }
    let operands: Vec<_> = layers
        .iter()
        .map(|shape| {
            Ok((
                common::noise::<f16>(device, shape.input_len(), 1)?,
                common::noise::<f16>(device, shape.output_len(), 1)?,
            ))
        })
        .collect::<Result<_>>()?;
    let (mut partial, mut out) = (0, 0);
    let places: Vec<_> = (layers.iter())
        .map(|shape| {
            let (from, to) = (partial, out);
            partial += shape.workspace_len::<f16>(device);
            out += shape.weight_len();
            (from..partial, to..out)
        })
        .collect();
    let (mut stages, mut rest) = (Vec::new(), Vec::new());
    for (shape, (parts, place)) in layers.iter().zip(&places) {
        match shape.finished_squares::<f16>(device) {
            Some(squares) => stages.push(Stage::Convolution(squares)),
            None => rest.push(Unfinished { parts: Some(parts.clone()), place: place.clone() }),
        }
    }
    stages.push(Stage::Launch(rest));
    let mut stages = GradientStages::new(device, &stages)?;
    let (mut partials, mut gradient) = (device.zeros::<f32>(partial)?, device.zeros::<f32>(out)?);
    let (mut flag, mut norm, mut reduction) = (device.zeros(1)?, device.zeros(1)?, Reduction::new(device)?);
    let scale = device.upload(&SCALE_START)?;
    pair(group, device, name, |together| {
        let mut stage = 0;
        for ((shape, (x, dy)), (from, to)) in layers.iter().zip(&operands).zip(&places) {
            let (scratch, dw) = (partials.slice_mut(from.clone())?, gradient.slice_mut(to.clone())?);
            if !together {
                conv::weight_gradient(shape, x.view(), dy.view(), dw, false, scratch)?;
            } else if scratch.is_empty() {
                let finish = stages.finish(stage, Some(scale.view()), flag.view_mut(), true)?;
                conv::finished_weight_gradient(shape, x.view(), dy.view(), dw, finish)?;
                stage += 1;
            } else {
                conv::partial_weight_gradients(shape, x.view(), dy.view(), scratch)?;
            }
        }
        let (gradient, scale, flag, norm) = (gradient.view_mut(), Some(scale.view()), flag.view_mut(), norm.view_mut());
        if together {
            return stages.end(partials.view(), gradient, scale, flag, Some(norm));
        }
        vector::finish_gradient(gradient, scale, flag, &mut reduction, norm)
    });
    Ok(())
}

/// The check that a gradient is finite, and its norm.
fn norm(group: &mut BenchmarkGroup<'_, WallTime>, device: &Device, len: usize) -> Result<()> {
    let mut gradient = device.upload(&vec![0.1f32; len])?;
    let (mut flag, mut norm, mut reduction) = (device.zeros(1)?, device.zeros(1)?, Reduction::new(device)?);
    pair(group, device, &format!("norm of {len} elements"), |together| {
        if together {
            let (flag, norm) = (flag.view_mut(), norm.view_mut());
            return vector::finish_gradient(gradient.view_mut(), None, flag, &mut reduction, norm);
        }
        vector::check_finite(gradient.view(), flag.view_mut())?;
        vector::l2_norm(gradient.view(), &mut reduction, norm.view_mut())
    });
    Ok(())
}

/// The time of a launch inside a graph, measured on many launches with almost no work. `POLDER_EARLY_LAUNCH=0` shows it
/// without programmatic dependent launch.
fn launches(group: &mut BenchmarkGroup<'_, WallTime>, device: &Device) -> Result<()> {
    const COUNT: u32 = 256;
    let mut out = device.zeros::<f32>(1024)?;
    let recorded = device.capture(|| (0..COUNT).try_for_each(|_| vector::fill(out.view_mut(), 1.0)))?;
    group.bench_function("one launch in a graph", |bencher| {
        bencher.iter_custom(|count| {
            let timed = || -> Result<Duration> {
                let start = device.event()?;
                for _ in 0..count {
                    recorded.replay()?;
                }
                Ok(Duration::from_secs_f64(device.event()?.elapsed_since(&start)?) / COUNT)
            };
            timed().expect("a launch")
        });
    });
    Ok(())
}

/// Two passes on both sides of the weights, one after the other or at the same time. Each form is replayed as a graph.
fn passes(group: &mut BenchmarkGroup<'_, WallTime>, device: &Device, name: &str) -> Result<()> {
    if device.is_host() {
        return Ok(());
    }
    let model = Model::from_name(name, None).expect("a model's name");
    let images = Shape { batch: BATCH, height: 32, width: 32, channels: 3 };
    let (graph, logits) = model.trace(images, 10).expect("images large enough");
    let mut plan = Plan::<f16>::new(device, graph, logits, PlanOptions::training()).expect("memory for a plan");
    let initial = initial_weights(plan.parameters(), 1)?;
    let sides = [1.0, 1.01].map(|factor| initial.iter().map(|weight| weight * factor).collect::<Vec<f32>>());
    let weights = [device.upload(&sides[0])?, device.upload(&sides[1])?];
    let (mut images, mut labels) = plan.batch_mut()?;
    let pixels = common::noise::<f16>(device, images.len(), 1)?;
    images.copy_from(pixels.view())?;
    labels.clear()?;
    let [mut plus, mut minus] = [device.zeros::<f32>(initial.len())?, device.zeros::<f32>(initial.len())?];
    let ([mut loss_plus, mut loss_minus], mut flag) = ([device.zeros(1)?, device.zeros(1)?], device.zeros(1)?);
    let mut both = |together: bool| -> Result<()> {
        let [at_plus, at_minus] = [weights[0].view(), weights[1].view()];
        if together {
            let (gradients, losses) =
                ([plus.view_mut(), minus.view_mut()], [loss_plus.view_mut(), loss_minus.view_mut()]);
            return plan.gradient_pair([at_plus, at_minus], gradients, losses, flag.view_mut());
        }
        let keep = RunningStats::Keep;
        plan.gradient(at_plus, keep, plus.view_mut(), loss_plus.view_mut(), flag.view_mut())?;
        plan.gradient(at_minus, keep, minus.view_mut(), loss_minus.view_mut(), flag.view_mut())
    };
    both(true)?;
    let recorded = [device.capture(|| both(false))?, device.capture(|| both(true))?];
    pair(group, device, &format!("two passes of {name}"), |together| recorded[usize::from(together)].replay());
    Ok(())
}

fn fusions(criterion: &mut Criterion) {
    for device in common::devices().expect("the device that POLDER_TEST_DEVICE names") {
        let mut group = criterion.benchmark_group(format!("fusion {}", device.name()));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1));
        for (size, channels) in [(32, 16), (32, 64), (16, 128), (8, 256), (4, 512)] {
            moments(&mut group, &device, layer(size, channels, channels)).expect("memory for one layer");
            sums(&mut group, &device, layer(size, channels, channels)).expect("memory for one layer");
        }
        let small = [(32, 16, 7), (16, 32, 6), (8, 64, 6)].map(|(size, c, count)| vec![layer(size, c, c); count]);
        let name = "weight gradients of 19 layers, finished";
        gradients(&mut group, &device, name, &small.concat()).expect("memory for the layers");
        let large = [layer(4, 512, 512); 3];
        let name = "weight gradients of 3 layers of 512 channels, finished";
        gradients(&mut group, &device, name, &large).expect("memory for the layers");
        launches(&mut group, &device).expect("memory for a vector");
        for name in ["resnet20", "resnet56", "resnet18"] {
            passes(&mut group, &device, name).expect("memory for two passes");
        }
        for len in [272_474, 11_173_962] {
            norm(&mut group, &device, len).expect("memory for a gradient");
        }
        group.finish();
    }
}

criterion_group!(benches, fusions);
criterion_main!(benches);
