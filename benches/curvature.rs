//! The cost of curvature: a gradient, a product with the Hessian, two products together, and a trace from eight probes,
//! over 128 images.
//!
//! `cargo bench --bench curvature`; on the CPU and on the first GPU if there is one, or on the device that
//! `POLDER_TEST_DEVICE` names. A trace should cost no more than its products.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use polder::curvature::Curvature;
use polder::nn::{Model, initial_weights};
use polder::objective::{ObjectiveExt, RunningStats};
use polder::plan::{Plan, PlanOptions, Shape};

const BATCH: usize = 128;

fn curvature(criterion: &mut Criterion) {
    for device in common::devices().expect("the device that POLDER_TEST_DEVICE names") {
        let models: &[&str] = if device.is_host() { &["resnet8", "resnet20"] } else { &["resnet20", "resnet18"] };
        for &name in models {
            let model = Model::from_name(name, None).expect("a known model");
            let shape = Shape { batch: BATCH, height: 32, width: 32, channels: 3 };
            let (graph, logits) = model.trace(shape, 10).expect("a model that fits");
            let mut plan = Plan::<f32>::new(&device, graph, logits, PlanOptions::training()).expect("memory");
            let start = initial_weights(plan.parameters(), 0).expect("memory");
            let weights = device.upload(&start).expect("memory");
            let (mut images, mut labels) = plan.batch_mut().expect("a batch");
            let noise: Vec<f32> = (0..images.len()).map(|i| ((i * 7919 % 2003) as f32 / 1001.5) - 1.0).collect();
            images.write(&noise).expect("a copy");
            labels.write(&(0..BATCH as u32).map(|i| i % 10).collect::<Vec<_>>()).expect("a copy");
            let directions = [1, 2].map(|step| {
                let values: Vec<f32> = (0..start.len()).map(|i| (i * step % 7) as f32 - 3.0).collect();
                device.upload(&values).expect("memory")
            });
            let mut products = [1, 2].map(|_| device.zeros::<f32>(start.len()).expect("memory"));
            let (mut loss, mut flag) = (device.zeros(1).expect("memory"), device.zeros(1).expect("memory"));

            let mut group = criterion.benchmark_group(format!("curvature of {name} on {}", device.name()));
            group.sample_size(10);
            let at = weights.view();
            group.bench_function("gradient", |bencher| {
                bencher.iter(|| {
                    let (out, loss, flag) = (products[0].view_mut(), loss.view_mut(), flag.view_mut());
                    plan.gradient(at, RunningStats::Keep, out, loss, flag).expect("a gradient");
                    device.synchronize().expect("a device in order");
                });
            });
            group.bench_function("product", |bencher| {
                bencher.iter(|| {
                    let (out, flag) = (products[0].view_mut(), flag.view_mut());
                    plan.hessian_vector(at, directions[0].view(), out, flag).expect("a product");
                    device.synchronize().expect("a device in order");
                });
            });
            group.bench_function("pair of products", |bencher| {
                bencher.iter(|| {
                    let along = directions.each_ref().map(|direction| direction.view());
                    let out = products.each_mut().map(|product| product.view_mut());
                    plan.hessian_vector_pair(at, along, out, flag.view_mut()).expect("two products");
                    device.synchronize().expect("a device in order");
                });
            });
            let mut measured = Curvature::new(&mut plan, at).expect("memory");
            group.bench_function("trace of 8 probes", |bencher| {
                bencher.iter(|| measured.trace(8, 1, |_| ()).expect("a trace"));
            });
        }
    }
}

criterion_group!(benches, curvature);
criterion_main!(benches);
