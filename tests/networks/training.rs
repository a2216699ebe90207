//! Whole networks against float64 PyTorch: gradients, five training steps with the base optimizers, SAM and CR-SAM (the
//! other methods are in `tests/networks/methods.rs`), and the pretrained ResNet-20 on the CIFAR-10 test images.
//! `tests/fixtures/README.md` says where the references come from.

use std::path::Path;

use approx::abs_diff_eq;

use crate::common::fixtures::{Pool, arena, check_runs, digest_error, hash_weights, number, plan, read_json};
use crate::common::methods::AnyMethod;
use crate::common::{self, Grouped, Random, fast_devices, relative_error, roundoff, to_f64, upload};
use half::{bf16, f16};
use polder::curvature::Curvature;
use polder::data::{self, Split};
use polder::device::{Bf16x3, Bf16x6, Compute, Device, Scalar, Tf32};
use polder::kernels::batch_norm::Mode;
use polder::kernels::image::Normalization;
use polder::nn::{CifarResNet, Model, Shortcut, initial_weights};
use polder::objective::{Accumulator, ObjectiveExt, RunningStats, Wrapped};
use polder::optim::{Base, CrSam, Optimizer, Settings};
use polder::plan::{Plan, PlanOptions, Shape};
use polder::train::{Evaluator, weights};

/// Loss, logits and gradient of one batch; the tolerances are the precision's.
fn check_gradient<T: Scalar>(device: &Device, name: &str, tolerance: f64) {
    let fixture = read_json("resnet8-gradient.json");
    let mut plan = plan::<T>(device, &fixture, fixture["rows"].as_array().unwrap().len());
    Pool::new(device).fill(&mut plan, fixture["rows"].as_array().unwrap(), &fixture);
    let weights = upload::<T>(device, &arena(plan.parameters(), "resnet8-init.safetensors"));
    let mut gradient = device.poisoned::<T>(weights.len()).unwrap();
    gradient.clear().unwrap();
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    plan.gradient(weights.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    let loss = loss.to_vec().unwrap()[0];
    assert!(abs_diff_eq!(loss, number(&fixture["loss"]), epsilon = tolerance), "{name}: loss {loss}");
    let logits: Vec<f64> =
        fixture["logits"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap()).map(number).collect();
    common::assert_close(&format!("{name}: logits"), &plan.logits().unwrap().to_vec().unwrap(), &logits, tolerance);
    let reference = arena(plan.parameters(), "resnet8-gradient.safetensors");
    let error = relative_error(&common::to_f64(&gradient.to_vec().unwrap()), &reference);
    assert!(error < tolerance, "{name}: gradient's relative error {error:.2e}");
}

#[test]
fn a_gradient_matches_pytorch_in_float64() {
    for (name, device) in common::devices() {
        // f32 through eight layers; the batch keeps every ReLU clear of zero, so that no unit flips.
        check_gradient::<f32>(&device, &name, 2e-5);
    }
    // The reference gradient is stored as f32.
    check_gradient::<f64>(&Device::host(), "double", 1e-7);
}

/// The relative error of a ResNet-8's gradient against float64 PyTorch, of its loss, and of a product with its Hessian
/// against the same in double precision.
fn errors<S: Compute<Master = f32>>(device: &Device) -> [f64; 3] {
    let fixture = read_json("resnet8-gradient.json");
    let rows = fixture["rows"].as_array().unwrap();
    let mut narrow = plan::<S>(device, &fixture, rows.len());
    Pool::new(device).fill(&mut narrow, rows, &fixture);
    let start = arena(narrow.parameters(), "resnet8-init.safetensors");
    let weights = upload::<f32>(device, &start);
    let mut gradient = device.zeros::<f32>(weights.len()).unwrap();
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    narrow.gradient(weights.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    let reference = arena(narrow.parameters(), "resnet8-gradient.safetensors");
    let found = to_f64(&gradient.to_vec().unwrap());
    let loss = loss.to_vec().unwrap()[0] / number(&fixture["loss"]) - 1.0;

    let host = Device::host();
    let mut double = plan::<f64>(&host, &fixture, rows.len());
    Pool::new(&host).fill(&mut double, rows, &fixture);
    let (w, v) = (upload::<f64>(&host, &start), upload::<f64>(&host, &reference));
    let (mut product, mut host_flag) = (host.zeros::<f64>(w.len()).unwrap(), host.zeros(1).unwrap());
    double.hessian_vector(w.view(), v.view(), product.view_mut(), host_flag.view_mut()).unwrap();
    let expected = product.to_vec().unwrap();
    let direction = upload::<f32>(device, &reference);
    let mut product = device.zeros::<f32>(weights.len()).unwrap();
    narrow.hessian_vector(weights.view(), direction.view(), product.view_mut(), flag.view_mut()).unwrap();
    assert_eq!(flag.to_vec().unwrap(), [0]);
    [relative_error(&found, &reference), loss.abs(), relative_error(&to_f64(&product.to_vec().unwrap()), &expected)]
}

/// A share of the ReLU units, as large as the rounding error, is so close to zero that it switches. Each changes the
/// gradient by what passes through it, so errors are of the order of the square root of the rounding error.
fn check_errors<S: Compute<Master = f32>>(device: &Device) {
    let [gradient, loss, product] = errors::<S>(device);
    // TF32 rounds on a GPU only. On the CPU it is f32.
    let (name, roundoff) = (S::NAME, if S::NAME == "tf32" && device.is_host() { 1e-8 } else { roundoff::<S>() });
    println!("{name}: gradient {gradient:.1e}, loss {loss:.1e}, product with the Hessian {product:.1e}");
    assert!(gradient < roundoff.sqrt(), "{name}: gradient's relative error {gradient:.1e}");
    assert!(product < roundoff.sqrt(), "{name}: product's relative error {product:.1e}");
    assert!(loss < roundoff.max(1e-6), "{name}: loss's relative error {loss:.1e}");
}

#[test]
fn gradients_and_products_are_near_those_in_double_precision() {
    for device in fast_devices() {
        check_errors::<Tf32>(&device);
        check_errors::<Bf16x3>(&device);
        check_errors::<Bf16x6>(&device);
        check_errors::<f16>(&device);
        check_errors::<bf16>(&device);
    }
}

#[test]
fn five_steps_match_pytorch_in_float64() {
    check_runs(&["sgd", "sgd-nesterov", "adamw", "sam", "sam-inf", "cr-sam-log", "cr-sam-released"]);
}

#[test]
fn other_models_and_shapes_match_pytorch_in_float64() {
    fast_devices().iter().for_each(check_other_models);
}

fn check_other_models(device: &Device) {
    let cases = read_json("hash-models.json");
    let cases = cases["cases"].as_array().unwrap();
    assert!(cases.iter().any(|case| case["model"] == "resnet18") && cases.iter().any(|case| case["shortcut"] == "b"));
    for case in cases {
        let of = |key: &str| case[key].as_u64().unwrap() as usize;
        let (height, width, batch) = (of("height"), of("width"), case["rows"].as_array().unwrap().len());
        let name = format!("{}-{} {height}x{width}", case["model"], case["shortcut"]);
        let shortcut = case["shortcut"].as_str().unwrap().parse::<Shortcut>().unwrap();
        let model = Model::from_name(case["model"].as_str().unwrap(), Some(shortcut)).unwrap();
        let (graph, logits) = model.trace(Shape { batch, height, width, channels: 3 }, 10).unwrap();
        let mut plan = Plan::<f32>::new(device, graph, logits, PlanOptions::training()).unwrap();
        assert_eq!(plan.parameters().parameters(), of("parameters"), "{name}");
        Pool::cropped(device, height, width).fill(&mut plan, case["rows"].as_array().unwrap(), case);
        let weights = upload::<f32>(device, &hash_weights(plan.parameters()));
        let mut gradient = device.zeros::<f32>(weights.len()).unwrap();
        let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
        plan.gradient(weights.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut())
            .unwrap();
        let loss = loss.to_vec().unwrap()[0];
        assert!(abs_diff_eq!(loss, number(&case["loss"]), epsilon = 2e-5 * loss), "{name}: loss {loss}");
        let gradient = to_f64(&gradient.to_vec().unwrap());
        let whole = number(&case["grad_norm"]);
        for tensor in plan.parameters().tensors() {
            let expected = &case["tensors"][&tensor.name];
            let error =
                digest_error(tensor, &gradient, ["grad_norm", "projection"].map(|key| number(&expected[key])), whole);
            assert!(error <= 1e-4, "{name}: {}: relative error {error:.1e}", tensor.name);
        }
    }
}

/// A step, or two, are recorded as a graph, where allocating and waiting are refused, and replayed: the same bits as
/// steps taken one by one.
#[test]
fn a_whole_step_can_be_captured_and_replayed() {
    for device in fast_devices() {
        for method in [AnyMethod::PLAIN, AnyMethod::sam(0.05), CrSam::default().into()] {
            let run = |recorded: usize| {
                let shape = Shape { batch: 4, height: 8, width: 9, channels: 3 };
                let model = CifarResNet { blocks: 1, shortcut: Shortcut::B };
                let (graph, logits) = model.trace(shape, 10).unwrap();
                let mut plan = Plan::<f32>::new(&device, graph, logits, PlanOptions::training()).unwrap();
                let (mut images, mut labels) = plan.batch_mut().unwrap();
                images.write(&Random(3).vector::<f32>(images.len())).unwrap();
                labels.write(&[1, 7, 0, 9]).unwrap();
                let len = plan.parameters().len();
                let mut weights = device.upload(&initial_weights(plan.parameters(), 2).unwrap()).unwrap();
                let base = Base::Sgd { momentum: 0.9, nesterov: false };
                let settings = Settings { weight_decay: 5e-4, decay_len: len, ..method.over(base) };
                let mut optimizer = Optimizer::new(&device, len, settings).unwrap();
                let mut accumulator = Accumulator::new(&device, len, 2).unwrap();
                // SAM in two groups of two parts, the others on the whole batch.
                let groups = if method == AnyMethod::sam(0.05) { 4 } else { 1 };
                let mut step = || match groups {
                    1 => optimizer.step(&mut plan, weights.view_mut(), 0.05),
                    _ => {
                        let mut batch =
                            Wrapped(Grouped { plan: &mut plan, groups, show: |_: &mut Plan<f32>, _| Ok(()) });
                        optimizer.step(&mut accumulator.over(&mut batch), weights.view_mut(), 0.05)
                    }
                };
                step().unwrap();
                if recorded == 0 {
                    step().unwrap();
                    step().unwrap();
                } else {
                    let graph = device.capture(|| (0..recorded).try_for_each(|_| step())).unwrap();
                    assert!(graph.operations() > 0);
                    (0..2).step_by(recorded).for_each(|_| graph.replay().unwrap());
                }
                (common::bits(&weights.to_vec().unwrap()), common::bits(&plan.statistics().to_vec().unwrap()))
            };
            let direct = run(0);
            for recorded in [1, 2] {
                assert!(run(recorded) == direct, "{recorded} steps of {method:?} on {}", device.name());
            }
        }
    }
}

/// Gradient norm, eigenvalues and trace of the Hessian from PyTorch's double backward, in double.
#[test]
fn curvature_matches_pytorch_in_float64() {
    let cases = read_json("curvature.json");
    let cases = cases["cases"].as_array().unwrap();
    assert_eq!(cases.iter().map(|case| case["model"].as_str().unwrap()).collect::<Vec<_>>(), ["resnet8", "resnet20"]);
    for case in cases {
        check_curvature::<f64>(&Device::host(), case, [1e-7, 1e-6]);
        fast_devices().iter().for_each(|device| check_curvature::<f32>(device, case, [1e-4, 1e-3]));
    }
}

/// Tolerances of the gradient's norm and of the eigenvalues; the trace has that of its probes.
fn check_curvature<T: Scalar>(device: &Device, case: &serde_json::Value, [norm, eigenvalue]: [f64; 2]) {
    let name = format!("{} in {} on {}", case["model"], T::NAME, device.name());
    let rows = case["rows"].as_array().unwrap();
    let mut plan = plan::<T>(device, case, rows.len());
    Pool::new(device).fill(&mut plan, rows, case);
    let start = match case["init"].as_str().unwrap() {
        "hash" => hash_weights(plan.parameters()),
        file => arena(plan.parameters(), file),
    };
    let weights = upload::<T>(device, &start);
    let mut curvature = Curvature::new(&mut plan, weights.view()).unwrap();
    let relative = |found: f64, expected: &serde_json::Value| (found / number(expected) - 1.0).abs();
    let error = relative(curvature.gradient_norm().unwrap(), &case["grad_norm"]);
    assert!(error < norm, "{name}: the gradient's norm is off by {error:.1e}");
    let expected = case["top_eigenvalues"].as_array().unwrap();
    let found = curvature.top_eigenvalues(expected.len(), (200, 1e-6), 3, |_| ()).unwrap();
    assert_eq!(found.len(), expected.len());
    for (pair, expected) in found.iter().zip(expected) {
        let error = relative(pair.value, expected);
        assert!(error < eigenvalue, "{name}: eigenvalue {} instead of {expected}", pair.value);
    }
    let (value, error) = (number(&case["trace"]["value"]), number(&case["trace"]["standard_error"]));
    let found = curvature.trace(40, 5, |_| ()).unwrap();
    let both = found.standard_error.unwrap().hypot(error);
    println!("{name}: trace {found:?}, PyTorch's {value} ± {error}");
    assert!(abs_diff_eq!(found.value, value, epsilon = 3.0 * both), "{name}: {found:?} instead of {value} ± {error}");
    assert!(both < 0.2 * value.abs(), "{name}: errors so large say nothing: {found:?}");
}

/// The pretrained ResNet-20 and the CIFAR-10 test images, if `POLDER_DATA` names a folder that holds them.
#[test]
fn the_pretrained_resnet20_makes_827_errors() {
    let Ok(folder) = std::env::var("POLDER_DATA") else {
        println!("skipped: POLDER_DATA is not set");
        return;
    };
    let folder = Path::new(&folder);
    let test = data::load_split(&folder.join("cifar-10"), Split::Test).unwrap();
    let normalization = Normalization { mean: [0.485, 0.456, 0.406, 0.0], std: [0.229, 0.224, 0.225, 1.0] };
    let device = Device::from_name(&std::env::var("POLDER_TEST_DEVICE").unwrap_or("cpu".into())).unwrap();
    let model = CifarResNet { blocks: 3, shortcut: Shortcut::A };
    let network = |images, classes| model.trace(images, classes);
    let mut evaluator =
        Evaluator::new(&device, &network, ("cifar-10", &test.images), normalization, 250, Mode::Eval).unwrap();
    let layouts = evaluator.layouts();
    let [parameters, statistics] = weights::load(&folder.join("pretrained/resnet20.safetensors"), layouts).unwrap();
    let (parameters, statistics) = (device.upload(&parameters).unwrap(), device.upload(&statistics).unwrap());
    let mut logits = Vec::new();
    let found = evaluator.evaluate(parameters.view(), statistics.view(), |batch| {
        logits.extend(batch.to_vec()?);
        Ok(())
    });
    let found = found.unwrap();
    assert_eq!((found.samples, found.errors), (10_000, 827));
    assert!(abs_diff_eq!(found.loss, 0.37266, epsilon = 5e-5), "mean cross-entropy {}", found.loss);
    let npy = std::fs::read(folder.join("pretrained/resnet20-test-logits.npy")).unwrap();
    let reference: Vec<f32> = npyz::NpyFile::new(&npy[..]).unwrap().into_vec().unwrap();
    let furthest = logits.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert_eq!(logits.len(), reference.len());
    assert!(furthest < 1e-3, "a logit is {furthest} away");
}
