//! The convolution's three passes on the layers of CIFAR's ResNet-20 and ResNet-18, batch 128: elements per second are
//! floating-point operations per second (two per multiply-add). It runs in f32 on one CPU thread and on all of them,
//! and in f16, tf32 and f32 on the first GPU if there is one, or on the device that `POLDER_TEST_DEVICE` names. Times
//! come from the device's own events.

mod common;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use polder::device::{Buffer, Compute, Device, HostOptions, Result, Tf32};
use polder::kernels::conv::{self, ConvShape};
use polder::kernels::peak::{self, Unit};

const BATCH: usize = 128;

/// (input rows and columns, in channels, out channels, kernel, stride)
const LAYERS: [(usize, usize, usize, usize, usize); 16] = [
    (32, 3, 16, 3, 1),
    (32, 16, 16, 3, 1),
    (32, 16, 32, 3, 2),
    (32, 16, 32, 1, 2),
    (16, 32, 32, 3, 1),
    (16, 32, 64, 3, 2),
    (8, 64, 64, 3, 1),
    (32, 3, 64, 3, 1),
    (32, 64, 64, 3, 1),
    (32, 64, 128, 3, 2),
    (32, 64, 128, 1, 2),
    (16, 128, 128, 3, 1),
    (16, 128, 256, 3, 2),
    (8, 256, 256, 3, 1),
    (8, 256, 512, 3, 2),
    (4, 512, 512, 3, 1),
];

/// Activations come in turn from sets of this many bytes in total. That is more than the last cache of a CPU or a GPU
/// holds: a training step finds most of its activations in memory, too.
const ROTATED_BYTES: usize = 192 << 20;

struct Layer<S: Compute> {
    shape: ConvShape,
    sets: Vec<(Buffer<S>, Buffer<S>)>,
    weight: Buffer<S>,
    gradient: Buffer<S::Master>,
    workspace: Buffer<S::Master>,
}

impl<S: Compute> Layer<S> {
    fn new(device: &Device, shape: ConvShape) -> Result<Self> {
        let bytes = size_of::<S>() * (shape.input_len() + shape.output_len());
        let sets = (0..ROTATED_BYTES.div_ceil(bytes) as u32)
            .map(|seed| {
                Ok((
                    common::noise(device, shape.input_len(), 2 * seed + 1)?,
                    common::noise(device, shape.output_len(), 2 * seed + 2)?,
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            shape,
            sets,
            weight: common::noise(device, shape.weight_len(), 0)?,
            gradient: device.zeros(shape.weight_len())?,
            workspace: device.zeros(shape.workspace_len::<S>(device))?,
        })
    }

    fn run(&mut self, pass: &str, turn: u64) -> Result<()> {
        let count = self.sets.len() as u64;
        let (x, y) = &mut self.sets[(turn % count) as usize];
        let (weight, workspace) = (self.weight.view(), self.workspace.view_mut());
        match pass {
            "forward" => conv::forward(&self.shape, x.view(), weight, y.view_mut(), false, workspace),
            "input gradient" => conv::input_gradient(&self.shape, y.view(), weight, x.view_mut(), false, workspace),
            _ => conv::weight_gradient(&self.shape, x.view(), y.view(), self.gradient.view_mut(), false, workspace),
        }
    }
}

/// The time of `count` calls on the device.
fn timed<S: Compute>(device: &Device, layer: &mut Layer<S>, pass: &str, count: u64) -> Result<Duration> {
    let start = device.event()?;
    for turn in 0..count {
        layer.run(pass, turn)?;
    }
    Ok(Duration::from_secs_f64(device.event()?.elapsed_since(&start)?))
}

fn convolutions(criterion: &mut Criterion) {
    let mut devices = Vec::new();
    for device in common::devices().expect("the device that POLDER_TEST_DEVICE names") {
        if device.is_host() {
            devices.push((
                "cpu, 1 thread".into(),
                Device::host_with(HostOptions { threads: 1, ..HostOptions::default() }),
            ));
        }
        let threads = if device.is_host() { ", all threads" } else { "" };
        devices.push((format!("{}{threads}", device.name()), device));
    }
    for (name, device) in &devices {
        if !device.is_host() {
            tensor_cores(criterion, name, device);
            layers::<f16>(criterion, name, device);
            layers::<Tf32>(criterion, name, device);
        }
        layers::<f32>(criterion, name, device);
    }
}

/// What `mma` reaches without memory: convolutions in f16 are shares of it.
fn tensor_cores(criterion: &mut Criterion, name: &str, device: &Device) {
    // Several times what the largest GPU holds at a time.
    const BLOCKS: u32 = 8192;
    const ROUNDS: u32 = 4096;
    let run = || peak::multiply_adds(device, Unit::Matrix, BLOCKS, ROUNDS);
    let mut group = criterion.benchmark_group(format!("tensor cores {name}"));
    group.sample_size(10).throughput(Throughput::Elements(2 * run().expect("a launch")));
    group.bench_function("mma f16", |bencher| {
        bencher.iter_custom(|count| {
            let start = device.event().expect("an event");
            for _ in 0..count {
                run().expect("a launch");
            }
            let end = device.event().expect("an event");
            Duration::from_secs_f64(end.elapsed_since(&start).expect("two events of one device"))
        });
    });
    group.finish();
}

fn layers<S: Compute>(criterion: &mut Criterion, name: &str, device: &Device) {
    let mut group = criterion.benchmark_group(format!("conv {} {name}", S::NAME));
    // Launches on a GPU are short and take equal times.
    let milliseconds = if device.is_host() { 1000 } else { 200 };
    group.sample_size(10).warm_up_time(Duration::from_millis(milliseconds / 4));
    group.measurement_time(Duration::from_millis(milliseconds));
    for (size, in_channels, out_channels, kernel, stride) in LAYERS {
        let (batch, height, width, padding) = (BATCH, size, size, kernel / 2);
        let shape = ConvShape { batch, height, width, in_channels, out_channels, kernel, stride, padding, groups: 1 };
        let mut layer = Layer::<S>::new(device, shape).expect("memory for one layer");
        group.throughput(Throughput::Elements(2 * shape.macs()));
        for pass in ["forward", "input gradient", "weight gradient"] {
            let layer_name = format!("{size}x{size} {in_channels}-{out_channels} k{kernel} s{stride}");
            group.bench_function(BenchmarkId::new(pass, layer_name), |bencher| {
                bencher.iter_custom(|count| timed(device, &mut layer, pass, count).expect("a launch"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, convolutions);
criterion_main!(benches);
