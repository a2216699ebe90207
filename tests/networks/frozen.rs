//! Frozen parameters: gradients and products with the Hessian are those of the whole network without the frozen
//! tensors, nothing moves them, and a backward pass ends where only they lie before it.

use half::{bf16, f16};

use crate::common::{self, Random, bits, devices, relative_error, roundoff, to_f64, upload};
use polder::arena::Layout;
use polder::device::{Compute, Device};
use polder::kernels::batch_norm::Mode;
use polder::objective::{ObjectiveExt, RunningStats};
use polder::optim::{Base, METHODS, Optimizer, Settings};
use polder::plan::{Graph, Plan, PlanOptions, Shape, Value};

/// Three blocks of convolution and batch norm, of which one has a residual, and a classifier. The channels are
/// multiples of eight, for which a GPU has the most fast paths.
fn network(frozen: &[&str]) -> (Graph, Value) {
    let mut graph = Graph::new(Shape { batch: 4, height: 7, width: 6, channels: 3 });
    let x = graph.input();
    let x = graph.convolution(x, "conv1", 16, 3, 1, 1).unwrap();
    let x = graph.batch_norm(x, "bn1", None, true).unwrap();
    let y = graph.convolution(x, "conv2", 16, 3, 1, 1).unwrap();
    let y = graph.batch_norm(y, "bn2", Some(x), true).unwrap();
    let y = graph.average_pool(y, 2, 2).unwrap();
    // A block with the batch norm first: two operations read y, and of these batch norm always writes its gradient.
    let before = graph.batch_norm(y, "bn", None, true).unwrap();
    let branch = graph.convolution(before, "conv", 16, 3, 1, 1).unwrap();
    let y = graph.add(y, branch).unwrap();
    let y = graph.convolution(y, "conv3", 24, 3, 2, 1).unwrap();
    let y = graph.batch_norm(y, "bn3", None, true).unwrap();
    let y = graph.global_average_pool(y).unwrap();
    let logits = graph.linear(y, "fc", 5).unwrap();
    graph.freeze(|name| frozen.contains(&name));
    (graph, logits)
}

const PREFIX: &[&str] = &["conv1", "bn1.weight", "bn1.bias"];
const CHOICES: &[&[&str]] = &[
    PREFIX,
    &["conv1", "bn1.weight", "bn1.bias", "conv2", "bn2.weight", "bn2.bias"],
    &[
        "conv1",
        "bn1.weight",
        "bn1.bias",
        "conv2",
        "bn2.weight",
        "bn2.bias",
        "conv",
        "bn.weight",
        "bn.bias",
        "conv3",
        "bn3.weight",
        "bn3.bias",
    ],
    &["conv1", "conv2"],
    &["conv2", "bn2.bias"],
    &["conv1", "bn1.weight", "bn1.bias", "conv2"],
    &["bn1.weight", "bn3.bias", "fc.bias"],
    &["bn1.bias", "bn2.weight", "fc.weight"],
    &["conv3", "fc.weight", "fc.bias"],
];

/// Puts the tensors of the whole network where a layout has them.
fn take(whole: &Layout, values: &[f64], layout: &Layout, mut into: Vec<f64>) -> Vec<f64> {
    for tensor in layout.tensors() {
        if let Some(found) = whole.find(&tensor.name) {
            into[tensor.range()].copy_from_slice(&values[found.range()]);
        }
    }
    into
}

/// A plan with a batch, its weights, and the layout of the whole network.
fn plan<S: Compute>(device: &Device, frozen: &[&str], mode: Mode) -> (Plan<S>, Vec<f64>, Layout) {
    let (graph, logits) = network(&[]);
    let options = PlanOptions { batch_norm: mode, ..PlanOptions::training() };
    let mut random = Random(5);
    let whole = Plan::<S>::new(device, graph, logits, options).unwrap();
    let values = common::weights(&whole, &mut random);
    let pixels: Vec<bf16> = random.vector(whole.input_shape().len());
    let pixels: Vec<S> = pixels.into_iter().map(|value| S::from_f64(value.to_f64())).collect();
    let layout = whole.parameters().clone();
    let (graph, logits) = network(frozen);
    let mut plan = Plan::<S>::new(device, graph, logits, options).unwrap();
    let statistics = to_f64(&plan.statistics().to_vec().unwrap());
    let statistics = take(&layout, &values, plan.statistics_layout(), statistics);
    plan.set_statistics(upload(device, &statistics).view()).unwrap();
    let weights = take(&layout, &values, plan.parameters(), vec![0.0; plan.parameters().len()]);
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&pixels).unwrap();
    labels.write(&[1, 4, 0, 2]).unwrap();
    (plan, weights, layout)
}

/// Gradient, and product with the Hessian along a direction that does not move the tensors of `still`.
fn results<S: Compute>(device: &Device, frozen: &[&str], still: &[&str], mode: Mode) -> (Layout, [Vec<f64>; 2]) {
    let (mut plan, weights, whole) = plan::<S>(device, frozen, mode);
    let mut random = Random(8);
    let mut along = vec![0.0; whole.len()];
    for tensor in whole.tensors() {
        let moves = if still.contains(&tensor.name.as_str()) { 0.0 } else { 0.1 };
        along[tensor.range()].fill_with(|| moves * random.normal());
    }
    let layout = plan.parameters().clone();
    let along = take(&whole, &along, &layout, vec![0.0; layout.len()]);
    let [weights, along] = [weights, along].map(|vector| upload::<S::Master>(device, &vector));
    let results = [0, 1].map(|which| {
        let mut result = device.zeros::<S::Master>(weights.len()).unwrap();
        let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
        match which {
            0 => {
                let (out, flags) = (result.view_mut(), flag.view_mut());
                plan.gradient(weights.view(), RunningStats::Keep, out, loss.view_mut(), flags).unwrap();
            }
            _ => plan.hessian_vector(weights.view(), along.view(), result.view_mut(), flag.view_mut()).unwrap(),
        }
        assert_eq!(flag.to_vec().unwrap(), [0]);
        to_f64(&result.to_vec().unwrap())
    });
    (layout, results)
}

fn check<S: Compute>() {
    for (name, device) in devices().iter().filter(|(name, _)| !name.contains("1 thread") && !name.contains("random")) {
        for (mode, frozen) in CHOICES.iter().map(|frozen| (Mode::Train, frozen)).chain([(Mode::Eval, &PREFIX)]) {
            let (whole, [gradient, product]) = results::<S>(device, &[], frozen, mode);
            let (layout, found) = results::<S>(device, frozen, frozen, mode);
            for (what, found, whole_result) in [("gradient", &found[0], gradient), ("product", &found[1], product)] {
                let expected = take(&whole, &whole_result, &layout, vec![0.0; layout.len()]);
                let what = format!("{} on {name}, {mode:?} without {frozen:?}: {what}", S::NAME);
                // In f16 the size of a direction depends on its length, and with it the roundings of a product.
                let error = relative_error(found, &expected);
                assert!(error < if S::NAME == "f16" { 3.0 * roundoff::<f16>() } else { 1e-12 }, "{what}: {error:e}");
                if what.ends_with("gradient") {
                    assert!(bits(found) == bits(&expected), "{what} has other bits");
                }
            }
        }
    }
}

#[test]
fn gradients_and_products_are_those_of_the_whole_network() {
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn in_double_too() {
    let device = Device::host();
    for frozen in CHOICES {
        let (whole, all) = results::<f64>(&device, &[], frozen, Mode::Train);
        let (layout, found) = results::<f64>(&device, frozen, frozen, Mode::Train);
        for (found, all) in found.iter().zip(&all) {
            let expected = take(&whole, all, &layout, vec![0.0; layout.len()]);
            assert!(relative_error(found, &expected) < 1e-14, "{frozen:?}");
        }
    }
}

/// A backward pass that ends early needs less memory and launches fewer kernels.
#[test]
fn what_lies_before_trained_parameters_is_not_differentiated() {
    let device = Device::host();
    let of = |frozen: &[&str]| {
        let (mut plan, weights, _) = plan::<f32>(&device, frozen, Mode::Train);
        let weights = upload::<f32>(&device, &weights);
        let mut gradient = device.zeros::<f32>(weights.len()).unwrap();
        let (mut loss, mut flag) = (device.zeros(1).unwrap(), device.zeros(1).unwrap());
        let mut pass = || {
            let (out, flags) = (gradient.view_mut(), flag.view_mut());
            plan.gradient(weights.view(), RunningStats::Keep, out, loss.view_mut(), flags)
        };
        pass().unwrap();
        (device.capture(pass).unwrap().list().unwrap().len(), plan.arena_bytes())
    };
    let found: Vec<(usize, usize)> = [&[][..], CHOICES[0], CHOICES[1], CHOICES[2]].map(of).into();
    println!("launches and bytes: {found:?}");
    for pair in found.windows(2) {
        assert!(pair[1].0 < pair[0].0 && pair[1].1 < pair[0].1, "{found:?}");
    }
    // A frozen convolution behind trained parameters still passes the gradient on.
    let (behind, whole) = (of(&["conv3"]), found[0]);
    assert!(behind.0 < whole.0 && behind.1 == whole.1, "{behind:?} {whole:?}");
}

/// Steps of every method over both bases, as they come and as a recorded graph, change every trained tensor and no
/// frozen one, and running statistics follow.
#[test]
fn no_step_moves_frozen_parameters() {
    let device = Device::host();
    for base in [Base::sgd(0.9), Base::ADAMW] {
        for entry in METHODS {
            let (name, method) = (entry.name, (entry.new)());
            let (mut plan, weights, _) = plan::<f32>(&device, PREFIX, Mode::Train);
            let before = to_f64(&plan.statistics().to_vec().unwrap());
            let mut w = upload::<f32>(&device, &weights);
            let settings = Settings { weight_decay: 0.1, ..Settings::boxed(method, base) };
            let mut optimizer = Optimizer::new(&device, w.len(), settings).unwrap();
            let mut step = || optimizer.step(&mut plan, w.view_mut(), 0.01);
            (0..2).for_each(|_| step().unwrap());
            let graph = device.capture(step).unwrap();
            graph.replay().unwrap();
            let (after, now) = (to_f64(&plan.statistics().to_vec().unwrap()), to_f64(&w.to_vec().unwrap()));
            for tensor in plan.statistics_layout().tensors() {
                let same = before[tensor.range()] == after[tensor.range()];
                assert_eq!(same, PREFIX.contains(&tensor.name.as_str()), "{name} {base:?}: {}", tensor.name);
            }
            for tensor in plan.parameters().tensors() {
                assert!(weights[tensor.range()] != now[tensor.range()], "{name} {base:?}: {}", tensor.name);
            }
        }
    }
}
