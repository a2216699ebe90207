//! Networks in fewer than 32 bits: how far their gradients and steps are from double precision, what the loss
//! scale is for, and that a step which overflowed leaves nothing behind.

mod common;

use common::{Grouped, Random, bits, devices, fast_devices, relative_error, roundoff, to_f64, upload};
use half::{bf16, f16};
use polder::device::{Compute, Device, Tf32};
use polder::kernels::vector::{self, Reduction};
use polder::nn::{Model, Shortcut, initial_weights};
use polder::objective::{Accumulator, Objective, Statistics};
use polder::optim::{Base, CrSamTerms, Form, Method, Optimizer, Settings};
use polder::plan::{Graph, Plan, PlanError, PlanOptions, Shape};

/// Two convolutions, batch norms, a residual and a classifier, without a ReLU: nothing switches.
fn smooth(batch: usize) -> (Graph, polder::plan::Value) {
    let mut graph = Graph::new(Shape { batch, height: 7, width: 6, channels: 3 });
    let x = graph.input();
    let x = graph.convolution(x, "conv1", 12, 3, 1, 1).unwrap();
    let x = graph.batch_norm(x, "bn1", None, false).unwrap();
    let y = graph.convolution(x, "conv2", 12, 3, 1, 1).unwrap();
    let y = graph.batch_norm(y, "bn2", Some(x), false).unwrap();
    let y = graph.average_pool(y, 2, 2).unwrap();
    let y = graph.convolution(y, "conv3", 24, 3, 2, 1).unwrap();
    let y = graph.global_average_pool(y).unwrap();
    let logits = graph.linear(y, "fc", 5).unwrap();
    (graph, logits)
}

/// Gradient and product with the Hessian of the smooth network, as doubles, and the bits of both.
fn smooth_results<S: Compute>(device: &Device, scale: Option<f64>) -> ([Vec<f64>; 2], Vec<u64>) {
    let (graph, logits) = smooth(4);
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    let mut random = Random(31);
    let weights = common::weights(&plan, &mut random);
    // The same pixels in every precision.
    let pixels: Vec<bf16> = random.vector(plan.input_shape().len());
    let pixels: Vec<S> = pixels.into_iter().map(|value| S::from_f64(value.to_f64())).collect();
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&pixels).unwrap();
    labels.write(&[1, 4, 0, 2]).unwrap();
    if let (Some(scale), Some(state)) = (scale, plan.loss_scale_mut()) {
        state.write(&[scale, 0.0]).unwrap();
    }
    let direction: Vec<f64> = weights.iter().map(|_| 0.1 * random.normal()).collect();
    let [weights, direction] = [weights, direction].map(|vector| upload::<S::Master>(device, &vector));
    let results = [0, 1].map(|which| {
        let mut result = device.zeros::<S::Master>(weights.len()).unwrap();
        let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
        let (out, flags) = (result.view_mut(), flag.view_mut());
        match which {
            0 => plan.gradient(weights.view(), Statistics::Keep, out, loss.view_mut(), flags).unwrap(),
            _ => plan.hessian_vector(weights.view(), direction.view(), out, flags).unwrap(),
        }
        assert_eq!(flag.to_vec().unwrap(), [0]);
        to_f64(&result.to_vec().unwrap())
    });
    let bits = results.iter().flat_map(|result| bits(result)).collect();
    (results, bits)
}

/// Without a ReLU, errors are a few roundings, on every device; and their bits depend on no schedule and no number of threads.
fn check_smooth<S: Compute>() {
    let ([gradient, product], _) = smooth_results::<f64>(&Device::host(), None);
    let mut seen: [Option<Vec<u64>>; 2] = [None, None];
    for (name, device) in devices() {
        let (found, bits) = smooth_results::<S>(&device, None);
        for (what, found, expected) in [("gradient", &found[0], &gradient), ("product", &found[1], &product)] {
            let error = relative_error(found, expected) / roundoff::<S>();
            println!("{} on {name}: {what} off by {error:.2} roundings", S::NAME);
            assert!(error < 2.0, "{} on {name}: {what} off by {error:.2} roundings", S::NAME);
        }
        if device.is_host() {
            let expected = seen[usize::from(name.starts_with("gpu"))].get_or_insert_with(|| bits.clone());
            assert!(*expected == bits, "{} on {name}: other bits", S::NAME);
        }
    }
}

#[test]
fn a_smooth_network_is_off_by_a_few_roundings() {
    check_smooth::<Tf32>();
    check_smooth::<f16>();
    check_smooth::<bf16>();
}

/// A gradient so small that f16 has lost it without the scale. With one, whichever it is, the result is the same but for
/// rounding; bf16 has none.
#[test]
fn the_scale_keeps_small_gradients() {
    let device = Device::host();
    let ([expected, _], _) = smooth_results::<f64>(&device, None);
    let error = |scale: f64| relative_error(&smooth_results::<f16>(&device, Some(scale)).0[0], &expected);
    let [small, plain, large] = [2f64.powi(-12), 1.0, 65536.0].map(error);
    println!("relative error of the gradient with a scale of 2^-12: {small:.1e}, 1: {plain:.1e}, 2^16: {large:.1e}");
    assert!(large < 2.0 * roundoff::<f16>() && small > 10.0 * large, "{small:.1e}, {plain:.1e}, {large:.1e}");
    let (graph, logits) = smooth(4);
    assert!(Plan::<bf16>::new(&device, graph, logits, PlanOptions::training()).unwrap().loss_scale().is_none());
}

fn settings(method: Method, len: usize) -> Settings {
    let base = Base::Sgd { momentum: 0.9, nesterov: false };
    Settings { method, base, weight_decay: 5e-4, decay_len: len, clip: None }
}

fn small_resnet<S: Compute>(device: &Device) -> Plan<S> {
    let shape = Shape { batch: 6, height: 8, width: 8, channels: 3 };
    let model = Model::CifarResNet { blocks: 1, shortcut: Shortcut::A };
    let (graph, logits) = model.trace(shape, 10).unwrap();
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&Random(3).vector::<S>(images.len())).unwrap();
    labels.write(&[1, 7, 0, 9, 3, 3]).unwrap();
    plan
}

/// A scale that overflows skips the step as a whole, whatever its method's passes, and is halved until it fits; then steps are
/// taken, and after enough of them it is doubled.
#[test]
fn an_overflow_skips_the_step_and_halves_the_scale() {
    let terms = CrSamTerms { form: Form::Log, alpha: 0.1, beta: 0.01, a_min: 1e-8, b_min: 1e-8 };
    for device in fast_devices() {
        for method in [Method::Plain, Method::sam(0.05), Method::CrSam { rho: 0.1, terms }] {
            let mut plan = small_resnet::<f16>(&device);
            let len = plan.parameters().len();
            let start = initial_weights(plan.parameters(), 2).unwrap();
            let mut weights = device.upload(&start).unwrap();
            let statistics = plan.statistics().to_vec().unwrap();
            let mut optimizer = Optimizer::new(&device, len, settings(method, len)).unwrap();
            plan.loss_scale_mut().unwrap().write(&[2f64.powi(24), 0.0]).unwrap();
            let mut skipped = 0;
            loop {
                let before = (bits(&weights.to_vec().unwrap()), bits(&optimizer.state().momentum.to_vec().unwrap()));
                optimizer.step(&mut plan, &mut weights, 0.05).unwrap();
                let scale = plan.loss_scale().unwrap().to_vec().unwrap();
                if optimizer.telemetry().unwrap().skipped == skipped {
                    assert_eq!(scale, [2f64.powi(24 - skipped as i32), 1.0], "{method:?}");
                    break;
                }
                skipped += 1;
                assert_eq!(optimizer.telemetry().unwrap().skipped, skipped);
                assert_eq!(scale, [2f64.powi(24 - skipped as i32), 0.0], "{method:?}");
                let after = (bits(&weights.to_vec().unwrap()), bits(&optimizer.state().momentum.to_vec().unwrap()));
                assert!(before == after, "{method:?}: a skipped step has moved something");
                assert_eq!(plan.statistics().to_vec().unwrap(), statistics, "{method:?}");
                assert!(skipped < 20, "{method:?}: the scale never fits");
            }
            assert!(skipped > 0, "{method:?}: nothing overflowed");
            assert!(weights.to_vec().unwrap() != start && plan.statistics().to_vec().unwrap() != statistics);
            let scale = plan.loss_scale().unwrap().to_vec().unwrap()[0];
            plan.loss_scale_mut().unwrap().write(&[scale / 4.0, 1999.0]).unwrap();
            optimizer.step(&mut plan, &mut weights, 0.05).unwrap();
            assert_eq!(plan.loss_scale().unwrap().to_vec().unwrap(), [scale / 2.0, 0.0], "{method:?}");
        }
    }
}

/// The scale is a power of two, so where nothing vanishes and nothing overflows the steps do not depend on it.
#[test]
fn steps_do_not_depend_on_the_scale() {
    let device = Device::host();
    let moved = |scale: f64| {
        let mut plan = small_resnet::<f16>(&device);
        let len = plan.parameters().len();
        let start = initial_weights(plan.parameters(), 2).unwrap();
        let mut weights = device.upload(&start).unwrap();
        let mut optimizer = Optimizer::new(&device, len, settings(Method::sam(0.05), len)).unwrap();
        plan.loss_scale_mut().unwrap().write(&[scale, 0.0]).unwrap();
        for _ in 0..3 {
            optimizer.step(&mut plan, &mut weights, 0.05).unwrap();
        }
        assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
        weights.to_vec().unwrap().iter().zip(&start).map(|(w, s)| f64::from(w - s)).collect::<Vec<f64>>()
    };
    let (one, other) = (moved(4096.0), moved(16384.0));
    // What still differs are numbers that one scale has left subnormal.
    let difference = relative_error(&one, &other);
    println!("two scales differ by {difference:.1e}");
    assert!(difference < 1e-3, "{difference:.1e}");
}

/// How much of SAM's perturbation is left when the perturbed weights are rounded: cos(S(w + εv) − S(w), v).
#[test]
fn roundings_of_the_perturbed_weights() {
    let device = Device::host();
    for (name, model) in [("ResNet-20", "resnet20"), ("ResNet-18", "resnet18")] {
        let model = Model::from_name(model, None).unwrap();
        let shape = Shape { batch: 1, height: 32, width: 32, channels: 3 };
        let (graph, _) = model.trace(shape, 10).unwrap();
        let layout = graph.parameters();
        let weights = initial_weights(&layout, 1).unwrap();
        let mut gradient = vec![0.0f32; weights.len()];
        for tensor in layout.tensors() {
            gradient[tensor.range()].copy_from_slice(&Random(5).vector::<f32>(tensor.range().len()));
        }
        let (w, g) = (device.upload(&weights).unwrap(), device.upload(&gradient).unwrap());
        let mut norm = device.zeros(1).unwrap();
        let mut reduction = Reduction::new(&device).unwrap();
        vector::l2_norm(g.view(), &mut reduction, norm.view_mut()).unwrap();
        fn cosine<S: Compute>(weights: &[f32], gradient: &[f32], perturbed: Vec<S>) -> f64 {
            let [mut dot, mut a, mut b] = [0.0; 3];
            for ((&w, &g), p) in weights.iter().zip(gradient).zip(perturbed) {
                let (moved, g) = (p.to_f64() - S::from_f64(w.into()).to_f64(), f64::from(g));
                (dot, a, b) = (dot + moved * g, a + moved * moved, b + g * g);
            }
            dot / (a * b).sqrt()
        }
        let found = [0.05, 0.1].map(|rho| {
            let mut narrow = device.poisoned::<f16>(weights.len()).unwrap();
            vector::perturb(w.view(), g.view(), norm.view(), rho, narrow.view_mut(), None).unwrap();
            let mut brain = device.poisoned::<bf16>(weights.len()).unwrap();
            vector::perturb(w.view(), g.view(), norm.view(), rho, brain.view_mut(), None).unwrap();
            let narrow = cosine(&weights, &gradient, narrow.to_vec().unwrap());
            [narrow, cosine(&weights, &gradient, brain.to_vec().unwrap())]
        });
        println!(
            "{name}: rho 0.05: f16 {:.3}, bf16 {:.3}; rho 0.1: f16 {:.3}, bf16 {:.3}",
            found[0][0], found[0][1], found[1][0], found[1][1]
        );
        assert!(found.iter().all(|[narrow, brain]| *narrow > 0.85 && *brain < 0.85), "{name}: {found:?}");
    }
}

/// The telemetry tells what is left of the perturbation once the weights are rounded, also through groups and parts.
#[test]
fn telemetry_tells_what_rounding_leaves_of_the_perturbation() {
    fn cosine<S: Compute<Master = f32>>(device: &Device, groups: usize) -> f64 {
        let mut plan = small_resnet::<S>(device);
        let len = plan.parameters().len();
        let mut weights = device.upload(&initial_weights(plan.parameters(), 2).unwrap()).unwrap();
        let mut optimizer = Optimizer::new(device, len, settings(Method::sam(0.002), len)).unwrap();
        optimizer.observe(true);
        let mut accumulator = Accumulator::new(device, len, groups).unwrap();
        let mut batch = Grouped { plan: &mut plan, groups, show: |_: &mut Plan<S>, _| Ok(()) };
        optimizer.step(&mut accumulator.over(&mut batch), &mut weights, 0.01).unwrap();
        optimizer.telemetry().unwrap().cosine_perturbation.unwrap()
    }
    for device in fast_devices() {
        for groups in [1, 2] {
            let found = [cosine::<f32>, cosine::<f16>, cosine::<bf16>].map(|of| of(&device, groups));
            println!("cosine of the perturbations in f32, f16 and bf16: {found:?}");
            let [single, narrow, brain] = found;
            assert!(single > 0.999999 && narrow < 0.99 && brain < 0.8 * narrow, "{found:?}");
        }
    }
}

/// What 16 bits do not have is refused when the plan is made.
#[test]
fn a_hidden_linear_layer_needs_wide_activations() {
    let mut graph = Graph::new(Shape { batch: 2, height: 1, width: 1, channels: 4 });
    let x = graph.input();
    let x = graph.linear(x, "hidden", 6).unwrap();
    let x = graph.relu(x);
    let logits = graph.linear(x, "fc", 3).unwrap();
    let device = Device::host();
    assert!(Plan::<f32>::new(&device, graph.clone(), logits, PlanOptions::training()).is_ok());
    let error = Plan::<f16>::new(&device, graph, logits, PlanOptions::training()).err().unwrap();
    assert!(matches!(&error, PlanError::Shape { reason, .. } if reason.contains("linear layer")), "{error}");
}
