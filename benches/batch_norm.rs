//! Batch normalisation at the shape where a CIFAR ResNet spends most of it (128 images of 32x32 pixels, 16 channels),
//! forward and backward, beside a plain copy. Throughput is in bytes per second of the documented memory traffic.
//!
//! `cargo bench --bench batch_norm`; on the CPU and on the first GPU if there is one, or on the device that
//! `POLDER_TEST_DEVICE` names. Times come from the device's own events. The buffers are rotated so that no cache keeps
//! them from one iteration to the next.

mod common;

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use polder::device::{Buffer, Device, Result};
use polder::kernels::batch_norm::{
    Activation, Backward, BatchNormShape, Forward, Gradients, Mode, ResidualGradient, Saved, Workspace, backward,
    forward_train,
};
use std::time::Duration;

const SHAPE: BatchNormShape = BatchNormShape { rows: 128 * 32 * 32, channels: 16 };
/// Sets of four tensors of 8.4 MB: more than a GPU's L2 and a server CPU's L3 together hold.
const SETS: usize = 8;

struct Tensors {
    x: Buffer<f32>,
    dy: Buffer<f32>,
    y: Buffer<f32>,
    dx: Buffer<f32>,
}

struct Setup {
    device: Device,
    sets: Vec<Tensors>,
    gamma: Buffer<f32>,
    beta: Buffer<f32>,
    mean: Buffer<f32>,
    inv_std: Buffer<f32>,
    dgamma: Buffer<f32>,
    dbeta: Buffer<f32>,
    workspace: Workspace,
}

impl Setup {
    fn new(device: Device) -> Result<Self> {
        let (len, channels) = (SHAPE.rows * SHAPE.channels, SHAPE.channels);
        // Any numbers except zeros.
        let values: Vec<f32> =
            (0..len as u32).map(|i| (i.wrapping_mul(2654435761) >> 8) as f32 / 8388608.0 - 1.0).collect();
        let tensors = || -> Result<Tensors> {
            let zeros = || device.zeros(len);
            Ok(Tensors { x: device.upload(&values)?, dy: device.upload(&values)?, y: zeros()?, dx: zeros()? })
        };
        Ok(Self {
            sets: (0..SETS).map(|_| tensors()).collect::<Result<_>>()?,
            gamma: device.upload(&vec![1.5; channels])?,
            beta: device.upload(&vec![0.1; channels])?,
            mean: device.zeros(channels)?,
            inv_std: device.zeros(channels)?,
            dgamma: device.zeros(channels)?,
            dbeta: device.zeros(channels)?,
            workspace: Workspace::new(&device, [SHAPE])?,
            device,
        })
    }

    fn copy(&mut self, set: usize) -> Result<()> {
        let Tensors { x, y, .. } = &mut self.sets[set];
        y.copy_from(x)
    }

    fn forward(&mut self, set: usize, with_residual: bool) -> Result<()> {
        let Tensors { x, dy, y, .. } = &mut self.sets[set];
        let input = Forward {
            x: x.view(),
            gamma: self.gamma.view(),
            beta: self.beta.view(),
            eps: 1e-5,
            residual: with_residual.then(|| dy.view()),
            relu: true,
        };
        let saved = Saved { mean: self.mean.view_mut(), inv_std: self.inv_std.view_mut() };
        forward_train(SHAPE, input, y.view_mut(), saved, None, &mut self.workspace)
    }

    fn backward(&mut self, set: usize, with_residual: bool) -> Result<()> {
        let next = (set + 1) % SETS;
        let [set, other] = self.sets.get_disjoint_mut([set, next]).expect("two sets");
        let activation = match with_residual {
            true => Activation::Relu { y: set.y.view() },
            false => Activation::ReluRecomputed { beta: self.beta.view() },
        };
        let input = Backward {
            x: set.x.view(),
            dy: set.dy.view(),
            gamma: self.gamma.view(),
            mean: self.mean.view(),
            inv_std: self.inv_std.view(),
            activation,
        };
        let gradients =
            Gradients { dx: set.dx.view_mut(), dgamma: self.dgamma.view_mut(), dbeta: self.dbeta.view_mut() };
        let residual = with_residual.then(|| ResidualGradient { gradient: other.dx.view_mut(), accumulate: false });
        backward(SHAPE, Mode::Train, input, gradients, residual, &mut self.workspace)
    }
}

/// Times `work`, with the device's events on a GPU.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    setup: &mut Setup,
    name: &str,
    bytes_per_element: usize,
    work: impl Fn(&mut Setup, usize) -> Result<()>,
) {
    group.throughput(Throughput::Bytes((SHAPE.rows * SHAPE.channels * bytes_per_element) as u64));
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let device = setup.device.clone();
            let start = device.event().expect("an event");
            for iteration in 0..iterations {
                work(setup, iteration as usize % SETS).expect("a kernel that runs");
            }
            let end = device.event().expect("an event");
            Duration::from_secs_f64(end.elapsed_since(&start).expect("a device that works"))
        });
    });
}

fn batch_norm(criterion: &mut Criterion) {
    for device in common::devices().expect("the device that POLDER_TEST_DEVICE names") {
        let mut group = criterion.benchmark_group(format!("batch_norm/{}", device.name()));
        let mut setup = Setup::new(device).expect("enough memory");
        measure(&mut group, &mut setup, "copy", 8, Setup::copy);
        measure(&mut group, &mut setup, "forward, relu", 12, |setup, set| setup.forward(set, false));
        measure(&mut group, &mut setup, "forward, residual, relu", 16, |setup, set| setup.forward(set, true));
        measure(&mut group, &mut setup, "backward, relu", 20, |setup, set| setup.backward(set, false));
        measure(&mut group, &mut setup, "backward, residual, relu", 28, |setup, set| setup.backward(set, true));
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1));
    targets = batch_norm
}
criterion_main!(benches);
