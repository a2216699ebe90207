//! Whole training steps: SGD, SAM and CR-SAM on the CIFAR ResNets, batch 128, images per second.
//!
//! `cargo bench --bench step`; on the CPU and on the first GPU if there is one, or on the device that
//! `POLDER_TEST_DEVICE` names. Timed with the device's own events.

mod common;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use polder::nn::{Model, initial_weights};
use polder::optim::{Base, CrSam, Method, Optimizer, Plain, Sam, Settings};
use polder::plan::{Plan, PlanOptions, Shape};

const BATCH: usize = 128;

type NewMethod = fn() -> Box<dyn Method<f32>>;

/// Images and labels are noise. The time does not depend on them.
fn step(criterion: &mut Criterion) {
    let methods: [(&str, NewMethod); 3] = [
        ("sgd", || Box::new(Plain {})),
        ("sam", || Box::new(Sam::new(0.05))),
        ("cr-sam", || Box::new(CrSam::default())),
    ];
    for device in common::devices().expect("the device that POLDER_TEST_DEVICE names") {
        let models: &[&str] =
            if device.is_host() { &["resnet8", "resnet20"] } else { &["resnet8", "resnet20", "resnet18"] };
        let mut group = criterion.benchmark_group(format!("step on {}", device.name()));
        group.throughput(Throughput::Elements(BATCH as u64)).sample_size(10);
        for &name in models {
            let model = Model::from_name(name, None).expect("a known model");
            for (method_name, method) in methods {
                let shape = Shape { batch: BATCH, height: 32, width: 32, channels: 3 };
                let (graph, logits) = model.trace(shape, 10).expect("a model that fits");
                let mut plan = Plan::<f32>::new(&device, graph, logits, PlanOptions::training()).expect("memory");
                let len = plan.parameters().len();
                let start = initial_weights(plan.parameters(), 0).expect("memory");
                let mut weights = device.upload(&start).expect("memory");
                let (mut images, mut labels) = plan.batch_mut().expect("a batch");
                let noise: Vec<f32> = (0..images.len()).map(|i| ((i * 7919 % 2003) as f32 / 1001.5) - 1.0).collect();
                images.write(&noise).expect("a copy");
                labels.write(&(0..BATCH as u32).map(|i| i % 10).collect::<Vec<_>>()).expect("a copy");
                let base = Base::Sgd { momentum: 0.9, nesterov: false };
                let settings = Settings { weight_decay: 5e-4, decay_len: len, ..Settings::boxed(method(), base) };
                let mut optimizer = Optimizer::new(&device, len, settings).expect("memory");
                group.bench_function(BenchmarkId::new(method_name, name), |bencher| {
                    bencher.iter_custom(|count| {
                        device.synchronize().expect("a device in order");
                        let begin = device.event().expect("an event");
                        for _ in 0..count {
                            optimizer.step(&mut plan, weights.view_mut(), 0.01).expect("a step");
                        }
                        let end = device.event().expect("an event");
                        Duration::from_secs_f64(end.elapsed_since(&begin).expect("a time"))
                    });
                });
            }
        }
    }
}

criterion_group!(benches, step);
criterion_main!(benches);
