//! Training steps and products with the Hessian allocate nothing after the first, neither on the device nor on the
//! host. On the CPU both use the same allocator, which this test counts.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::Grouped;
use common::methods::AnyMethod;
use half::f16;
use polder::curvature::Curvature;
use polder::device::{Compute, Device};
use polder::kernels::image::{self, Augment, BatchShape, Normalization, Position};
use polder::nn::{CifarResNet, Shortcut, initial_weights};
use polder::objective::{Accumulator, ObjectiveExt, Wrapped};
use polder::optim::{Base, CrSam, Optimizer, Settings};
use polder::plan::{Plan, PlanOptions, Shape};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// Bytes that are allocated now, and the maximum so far.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Waits until nothing has been allocated for a while. The threads of a new device allocate as they start, which takes
/// long on a busy machine, and no launch waits for them.
fn wait_for_new_threads() {
    let mut before = None;
    while before != Some(ALLOCATIONS.load(Ordering::Relaxed)) {
        before = Some(ALLOCATIONS.load(Ordering::Relaxed));
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
}

/// Allocations during `run(1)`, `run(2)` and `run(3)`, after `run(0)`.
fn allocations_after_the_first(device: &Device, mut run: impl FnMut(u64)) -> usize {
    run(0);
    device.synchronize().unwrap();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for counter in 1..4 {
        run(counter);
    }
    device.synchronize().unwrap();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

/// One test, because it counts the allocations of the whole process.
#[test]
fn steps_and_products_after_the_first_allocate_nothing() {
    if std::env::var_os("POLDER_SANITIZE").is_some() {
        println!(
            "skipped: under sanitizers this takes over a minute, and the test harness's message about that allocates"
        );
        return;
    }
    let methods = [AnyMethod::PLAIN, AnyMethod::sam(0.05), CrSam::default().into()];
    let bases = [Base::sgd(0.9), Base::ADAMW, Base::MUON];
    count::<f32>(&methods, &bases);
    count::<f16>(&methods, &bases);
    a_thousand_probes_take_the_memory_of_two();
    #[cfg(feature = "train")]
    measuring_the_curvature_of_a_run_leaves_nothing();
}

/// While a run has a recorded step, the device keeps memory that is dropped. The memory of a measurement must not be
/// kept.
#[cfg(feature = "train")]
fn measuring_the_curvature_of_a_run_leaves_nothing() {
    use polder::train::{CurvatureLogSettings, DataSettings, LoopSettings, RunSettings, Training};
    let settings = RunSettings {
        data: DataSettings { train_size: Some(48), batch_size: 16, ..DataSettings::default() },
        run: LoopSettings { epochs: 4, device: "cpu".into(), ..LoopSettings::default() },
        curvature: CurvatureLogSettings {
            curvature_every: 1,
            curvature_samples: Some(16),
            curvature_probes: 2,
            ..CurvatureLogSettings::default()
        },
        ..RunSettings::default()
    };
    let mut live = Vec::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let training = Training::new(settings);
    let found = training.run_with(&stop, &mut |progress| {
        if matches!(progress, polder::train::Progress::Epoch(polder::train::Record::Curvature { .. })) {
            live.push(LIVE.load(Ordering::Relaxed));
        }
    });
    found.unwrap();
    // The first makes room for tangents. A vector as long as the weights is 300 kB.
    assert_eq!(live.len(), 4);
    assert!(live[1].abs_diff(live[3]) < 50_000, "bytes after each measurement: {live:?}");
}

/// A trace from 1,000 probes needs no more memory than one from two probes, except for the list of 1,000 numbers, which
/// doubles when it is full. Nothing stays allocated.
fn a_thousand_probes_take_the_memory_of_two() {
    let device = Device::host();
    let shape = Shape { batch: 2, height: 8, width: 8, channels: 3 };
    let (graph, logits) = CifarResNet { blocks: 1, shortcut: Shortcut::A }.trace(shape, 10).unwrap();
    let mut plan = Plan::<f32>::new(&device, graph, logits, PlanOptions::training()).unwrap();
    let weights = device.upload(&initial_weights(plan.parameters(), 1).unwrap()).unwrap();
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&(0..images.len()).map(|i| (i % 17) as f32 / 9.0 - 1.0).collect::<Vec<_>>()).unwrap();
    labels.write(&[3, 7]).unwrap();
    let mut curvature = Curvature::new(&mut plan, weights.view()).unwrap();
    wait_for_new_threads();
    // The first pair allocates what it keeps for the next.
    curvature.trace(2, 5, |_| ()).unwrap();
    let mut more_at_most = |probes: usize| {
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        curvature.trace(probes, 5, |_| ()).unwrap();
        assert_eq!(LIVE.load(Ordering::Relaxed), before, "bytes that stay after {probes} probes");
        PEAK.load(Ordering::Relaxed) - before
    };
    let (two, thousand) = (more_at_most(2), more_at_most(1000));
    assert!(thousand <= two + 3 * 8 * 1024, "{two} bytes for two probes, {thousand} for 1,000");
}

fn count<S: Compute<Master = f32>>(methods: &[AnyMethod], bases: &[Base]) {
    let mut devices = common::devices();
    devices.retain(|(name, _)| !name.contains("backwards") && !name.contains("random"));
    wait_for_new_threads();
    for (name, device) in devices {
        let (batch, side) = if name.starts_with("gpu shapes") { (2, 8) } else { (4, 16) };
        for (method, base) in methods.iter().zip(bases.iter().cycle()) {
            let shape = Shape { batch, height: side, width: side, channels: 3 };
            let (graph, logits) = CifarResNet { blocks: 1, shortcut: Shortcut::B }.trace(shape, 10).unwrap();
            let mut plan = Plan::<S>::new(&device, graph, logits, PlanOptions::training()).unwrap();
            let len = plan.parameters().len();
            let mut weights = device.upload(&initial_weights(plan.parameters(), 1).unwrap()).unwrap();
            let matrices = plan.parameters().hidden_matrices();
            let settings = Settings { weight_decay: 5e-4, decay_len: len, matrices, ..method.over(*base) };
            let mut optimizer = Optimizer::new(&device, len, settings).unwrap();
            let mut accumulator = Accumulator::new(&device, len, 2).unwrap();
            let pixels: Vec<u8> = (0..64 * side * side * 3).map(|i| (i * 7919 % 251) as u8).collect();
            let (pixels, labels) = (device.upload(&pixels).unwrap(), device.upload(&[3u32; 64]).unwrap());
            let order = device.upload(&(0..batch as u32).collect::<Vec<_>>()).unwrap();
            let steps = allocations_after_the_first(&device, |counter| {
                let normalization = Normalization { mean: [0.5; 4], std: [0.25; 4] };
                let shape = BatchShape { batch, height: side, width: side, channels: 3 };
                let augment = Some(Augment { pad: 4, flip: true, seed: 1, counter, ..Augment::default() });
                let (out, truth) = plan.batch_mut().unwrap();
                let (pixels, labels, start) = (pixels.view(), labels.view(), Position::default());
                image::batch(&shape, pixels, labels, order.view(), start, &normalization, augment, out, truth).unwrap();
                // SAM in groups of several parts, the others on the whole batch.
                if *method == AnyMethod::sam(0.05) {
                    let mut batch = Wrapped(Grouped { plan: &mut plan, groups: 4, show: |_: &mut Plan<S>, _| Ok(()) });
                    optimizer.step(&mut accumulator.over(&mut batch), weights.view_mut(), 0.01).unwrap();
                } else {
                    optimizer.step(&mut plan, weights.view_mut(), 0.01).unwrap();
                }
            });
            assert_eq!(steps, 0, "{} and {method:?} on {name}: allocations in three steps", S::NAME);

            if *method != AnyMethod::PLAIN {
                continue; // the product is the plan's, whatever the method
            }
            let direction = device.upload(&vec![0.1f32; len]).unwrap();
            let mut product = device.zeros::<f32>(len).unwrap();
            let mut flag = device.zeros(1).unwrap();
            let products = allocations_after_the_first(&device, |_| {
                plan.hessian_vector(weights.view(), direction.view(), product.view_mut(), flag.view_mut()).unwrap();
            });
            assert_eq!(products, 0, "{} on {name}: allocations in three products", S::NAME);
        }
    }
}
