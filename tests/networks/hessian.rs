//! Products with the Hessian: against central differences of gradients in double, against PyTorch's double backward,
//! and as a symmetric linear map.

use crate::common::fixtures::{arena, digest_error, fill_in_double, hash_vector, hash_weights, number, read_json};
use crate::common::{self, Random, bits, weights};
use crate::plan::{groups_and_drops, max_pools, transformer};
use half::{bf16, f16};
use polder::device::{Buffer, Compute, Device, Error, Result, Scalar};
use polder::kernels::batch_norm::Mode;
use polder::kernels::image::Position;
use polder::nn::{CifarResNet, Shortcut, initial_weights};
use polder::objective::{Domain, Objective, ObjectiveExt, Pass, RunningStats};
use polder::plan::{Graph, Plan, PlanOptions, Shape, Value};

/// Normal numbers in every tensor, zeros in the padding.
fn direction<T: Scalar>(plan: &Plan<T>, random: &mut Random) -> Vec<f64> {
    let mut direction = vec![0.0; plan.parameters().len()];
    for tensor in plan.parameters().tensors() {
        direction[tensor.range()].fill_with(|| random.normal());
    }
    direction
}

fn set_batch<T: Scalar>(plan: &mut Plan<T>, random: &mut Random) {
    let classes = plan.classes();
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&random.vector(images.len())).unwrap();
    let truth: Vec<u32> = (0..labels.len()).map(|_| random.below(classes) as u32).collect();
    labels.write(&truth).unwrap();
}

fn upload<T: Scalar>(device: &Device, values: &[f64]) -> Buffer<T> {
    device.upload(&values.iter().map(|&value| T::from_f64(value)).collect::<Vec<_>>()).unwrap()
}

/// Zeros in the padding of a result that is otherwise poisoned.
fn poisoned<T: Scalar>(plan: &Plan<T>) -> Buffer<T> {
    let mut values = vec![T::from_f64(0.0); plan.parameters().len()];
    for tensor in plan.parameters().tensors() {
        values[tensor.range()].fill(T::from_f64(f64::NAN));
    }
    plan.device().upload(&values).unwrap()
}

fn product<T: Scalar>(plan: &mut Plan<T>, at: &[f64], along: &[f64]) -> Vec<T> {
    let device = plan.device().clone();
    let (at, along) = (upload::<T>(&device, at), upload::<T>(&device, along));
    let mut product = poisoned(plan);
    let mut flag = device.zeros(1).unwrap();
    plan.hessian_vector(at.view(), along.view(), product.view_mut(), flag.view_mut()).unwrap();
    assert_eq!(flag.to_vec().unwrap(), [0]);
    product.to_vec().unwrap()
}

fn gradient<T: Scalar>(plan: &mut Plan<T>, at: &[f64]) -> Vec<T> {
    let device = plan.device().clone();
    let at = upload::<T>(&device, at);
    let mut gradient = poisoned(plan);
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    plan.gradient(at.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    assert_eq!(flag.to_vec().unwrap(), [0]);
    gradient.to_vec().unwrap()
}

fn moved(at: &[f64], step: f64, along: &[f64]) -> Vec<f64> {
    at.iter().zip(along).map(|(w, d)| w + step * d).collect()
}

/// (∇L(w + hd) − ∇L(w − hd)) / 2h
fn difference<T: Scalar>(plan: &mut Plan<T>, at: &[f64], along: &[f64], step: f64) -> Vec<f64> {
    let above = common::to_f64(&gradient(plan, &moved(at, step, along)));
    let below = common::to_f64(&gradient(plan, &moved(at, -step, along)));
    above.iter().zip(&below).map(|(a, b)| (a - b) / (2.0 * step)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// ‖a − b‖/‖b‖.
fn relative_error(found: &[f64], reference: &[f64]) -> f64 {
    norm(&moved(found, -1.0, reference)) / norm(reference)
}

fn resnet8<T: Scalar>(device: &Device, shortcut: Shortcut, mode: Mode, shape: Shape, classes: usize) -> Plan<T> {
    let (graph, logits) = CifarResNet { blocks: 1, shortcut }.trace(shape, classes).unwrap();
    let options = PlanOptions { backward: true, batch_norm: mode, label_smoothing: 0.1 };
    Plan::new(device, graph, logits, options).unwrap()
}

/// One device with the CPU's launch shapes and one with the GPU's. The tests of the kernels run every order of blocks
/// and lanes.
fn two_devices() -> impl Iterator<Item = (String, Device)> {
    common::host_devices().into_iter().filter(|(name, _)| name.contains("2 threads") || name.contains("forwards"))
}

/// Everything that a product must be, for one network.
fn check(name: &str, mut plan: Plan<f64>, seed: u64) {
    let mut random = Random(seed);
    let at = weights(&plan, &mut random);
    set_batch(&mut plan, &mut random);
    let before = bits(&plan.statistics().to_vec().unwrap());
    let (u, v) = (direction(&plan, &mut random), direction(&plan, &mut random));
    let hu = product(&mut plan, &at, &u);
    let hv = product(&mut plan, &at, &v);

    // Each tensor's direction on its own, so that none is lost in the sum. A ReLU that switches within the step spoils
    // the difference. Then a smaller step must agree.
    let ranges: Vec<_> =
        plan.parameters().tensors().iter().map(|tensor| (tensor.name.clone(), tensor.range())).collect();
    let mut worst = 0.0f64;
    for (tensor, range) in
        ranges.iter().map(|(name, range)| (name.as_str(), range.clone())).chain([("all", 0..at.len())])
    {
        let mut along = vec![0.0; at.len()];
        along[range.clone()].copy_from_slice(&u[range]);
        let exact = product(&mut plan, &at, &along);
        let mut error = f64::INFINITY;
        for step in [1e-5, 1e-6, 1e-7] {
            if error > 1e-8 {
                let difference = difference(&mut plan, &at, &along, step / norm(&along));
                error = error.min(relative_error(&difference, &exact));
            }
        }
        assert!(error < 1e-6, "{name}: along {tensor}: error {error:.1e}");
        worst = worst.max(error);
    }
    println!("{name}: largest difference from a central difference {worst:.1e}");

    let (uhv, vhu) = (dot(&u, &hv), dot(&v, &hu));
    let asymmetry = (uhv - vhu).abs() / uhv.abs();
    println!("{name}: asymmetry {asymmetry:.1e}");
    assert!(asymmetry < 1e-12, "{name}: {uhv} and {vhu}");
    let along = moved(&v, -2.5, &u);
    let error = relative_error(&product(&mut plan, &at, &along), &moved(&hv, -2.5, &hu));
    assert!(error < 1e-13, "{name}: not linear: {error:.1e}");
    assert!(product(&mut plan, &at, &vec![0.0; at.len()]).iter().all(|&value| value == 0.0), "{name}: along nothing");
    assert_eq!(bits(&product(&mut plan, &at, &u)), bits(&hu), "{name}: the same call again");
    assert_eq!(bits(&plan.statistics().to_vec().unwrap()), before, "{name}: statistics");
}

#[test]
fn products_of_residual_networks_match_central_differences() {
    for (device_name, device) in two_devices() {
        for (shortcut, mode, size) in [
            (Shortcut::A, Mode::Train, (7, 6)),
            (Shortcut::B, Mode::Train, (8, 5)),
            (Shortcut::A, Mode::Eval, (6, 7)),
            (Shortcut::B, Mode::Eval, (5, 6)),
        ] {
            let shape = Shape { batch: 2, height: size.0, width: size.1, channels: 3 };
            let plan = resnet8(&device, shortcut, mode, shape, 7);
            check(&format!("{shortcut:?} {mode:?} on {device_name}"), plan, 5);
        }
    }
}

/// What the ResNets do not use: separate ReLU and sum, a sum of two trained values, pools with overlap, values used
/// three times, a batch norm whose input another operation reads too, and operations before the first parameter.
fn every_operation(shape: Shape) -> (Graph, Value) {
    let mut graph = Graph::new(shape);
    let x = graph.input();
    let fixed = graph.average_pool(x, 2, 1).unwrap();
    let fixed = graph.relu(fixed);
    let x = graph.convolution(fixed, "a.weight", 5, 3, 1, 0).unwrap();
    let left = graph.relu(x);
    let right = graph.convolution(x, "b.weight", 5, 1, 1, 0).unwrap();
    let sum = graph.add(left, right).unwrap();
    let sum = graph.add(sum, x).unwrap();
    let normal = graph.batch_norm(sum, "pre", None, true).unwrap();
    let sum = graph.add(normal, sum).unwrap();
    let pooled = graph.average_pool(sum, 3, 2).unwrap();
    let wide = graph.append_channels(pooled, 6).unwrap();
    let wide = graph.shortcut(wide, 8, 1).unwrap();
    let residual = graph.convolution(pooled, "c.weight", 8, 1, 1, 0).unwrap();
    let y = graph.batch_norm(wide, "bn", Some(residual), false).unwrap();
    let doubled = graph.add(y, y).unwrap();
    let y = graph.global_average_pool(doubled).unwrap();
    let logits = graph.linear(y, "fc", 3).unwrap();
    (graph, logits)
}

#[test]
fn products_through_every_operation_match_central_differences() {
    for (name, device) in two_devices() {
        let (graph, logits) = every_operation(Shape { batch: 4, height: 10, width: 8, channels: 2 });
        let plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
        check(&format!("every operation on {name}"), plan, 11);
    }
}

#[test]
fn products_through_transformers_match_central_differences() {
    for (name, device) in two_devices() {
        let (graph, logits) = transformer(Shape { batch: 3, height: 6, width: 4, channels: 2 });
        let plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
        check(&format!("a transformer on {name}"), plan, 23);
    }
}

#[test]
fn products_through_max_pools_match_central_differences() {
    for (name, device) in two_devices() {
        let (graph, logits) = max_pools(Shape { batch: 3, height: 9, width: 7, channels: 2 });
        let plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
        check(&format!("max pools on {name}"), plan, 13);
    }
}

#[test]
fn products_through_groups_and_dropped_branches_match_central_differences() {
    for (name, device) in two_devices() {
        let (graph, logits) = groups_and_drops(Shape { batch: 5, height: 6, width: 7, channels: 2 });
        let mut plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
        plan.draw(17, Position::default()).unwrap();
        check(&format!("groups and drops on {name}"), plan, 17);
    }
}

#[test]
fn threads_and_schedules_do_not_change_a_bit() {
    if common::schedules_left_out() {
        return;
    }
    let results: Vec<Vec<u64>> = common::host_devices()
        .into_iter()
        .map(|(_, device)| {
            let shape = Shape { batch: 3, height: 9, width: 10, channels: 3 };
            let mut plan = resnet8::<f32>(&device, Shortcut::B, Mode::Train, shape, 10);
            let mut random = Random(8);
            let at = weights(&plan, &mut random);
            set_batch(&mut plan, &mut random);
            let along = direction(&plan, &mut random);
            bits(&product(&mut plan, &at, &along))
        })
        .collect();
    assert!(results[0] == results[1], "one and two threads");
    assert!(results[2] == results[3] && results[2] == results[4], "three schedules");
}

// ---- PyTorch's double backward: tests/fixtures/README.md describes the files
// -------------------------------------------

/// Softmax regression: `logits = W x + b` on samples of some features.
fn regression<T: Scalar>(device: &Device, batch: usize, features: usize, classes: usize) -> Plan<T> {
    let mut graph = Graph::new(Shape { batch, height: 1, width: 1, channels: features });
    let x = graph.global_average_pool(graph.input()).unwrap();
    let logits = graph.linear(x, "fc", classes).unwrap();
    Plan::new(device, graph, logits, PlanOptions::training()).unwrap()
}

/// Its Hessian times (D, d), with `p = softmax(W x + b)` and `u = D x + d`: the mean of `(diag p − ppᵀ) u` for the
/// biases and of that times xᵀ for W. Of two classes `diag p − ppᵀ` is `σ(z)(1 − σ(z)) [1 −1; −1 1]` with `z = z_0 −
/// z_1`: logistic regression.
fn analytic_product<T: Scalar>(plan: &mut Plan<T>, at: &[f64], along: &[f64]) -> Vec<f64> {
    let (classes, features, batch) = (plan.classes(), plan.input_shape().channels, plan.input_shape().batch);
    let find = |name: &str| plan.parameters().find(name).unwrap().range();
    let (w, b) = (find("fc.weight"), find("fc.bias"));
    let x = common::to_f64(&plan.batch_mut().unwrap().0.view().to_vec().unwrap());
    let mut product = vec![0.0; at.len()];
    for x in x.chunks(features) {
        // The weights lie with the classes side by side.
        let column =
            |from: &[f64], c: usize| -> Vec<f64> { from[w.clone()].iter().skip(c).step_by(classes).copied().collect() };
        let map = |from: &[f64], c: usize| dot(&column(from, c), x) + from[b.clone()][c];
        let (z, u): (Vec<f64>, Vec<f64>) = (0..classes).map(|c| (map(at, c), map(along, c))).unzip();
        let rows: Vec<f64> = if classes == 2 {
            let sigma = 1.0 / (1.0 + (z[1] - z[0]).exp());
            let pull = sigma * (1.0 - sigma) * (u[0] - u[1]);
            vec![pull, -pull]
        } else {
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            let p: Vec<f64> = z.iter().map(|z| z.exp() / sum).collect();
            let mean = dot(&p, &u);
            p.iter().zip(&u).map(|(p, u)| p * (u - mean)).collect()
        };
        for (c, row) in rows.iter().enumerate() {
            product[b.start + c] += row / batch as f64;
            for (k, x) in x.iter().enumerate() {
                product[w.start + k * classes + c] += row * x / batch as f64;
            }
        }
    }
    product
}

#[test]
fn logistic_and_softmax_regression_have_their_analytic_hessians() {
    fn errors<T: Scalar>(device: &Device, classes: usize) -> [f64; 2] {
        let mut random = Random(41);
        let mut plan = regression::<T>(device, 7, 5, classes);
        let (at, along) = (weights(&plan, &mut random), direction(&plan, &mut random));
        set_batch(&mut plan, &mut random);
        let rounded = |values: &[f64]| -> Vec<f64> { values.iter().map(|&v| T::from_f64(v).into()).collect() };
        let (at, along) = (rounded(&at), rounded(&along));
        let expected = analytic_product(&mut plan, &at, &along);
        let exact = common::to_f64(&product(&mut plan, &at, &along));
        [relative_error(&exact, &expected), relative_error(&difference(&mut plan, &at, &along, 1e-4), &expected)]
    }
    for (name, device) in two_devices() {
        for classes in [2, 6] {
            let [exact, by_difference] = errors::<f64>(&device, classes);
            assert!(exact < 1e-14, "{name}, {classes} classes: {exact:e}");
            // The third derivative is left over, 1e-8 of it, and rounding of 1e-16 over a step of 1e-4.
            assert!(by_difference < 1e-7, "{name}, {classes} classes: {by_difference:e} by difference");
            let [exact, _] = errors::<f32>(&device, classes);
            assert!(exact < 5e-7, "{name}, {classes} classes in f32: {exact:e}");
        }
    }
}

/// A plan with the case's batch, normalised in double.
fn case_plan<T: Scalar>(device: &Device, case: &serde_json::Value) -> Plan<T> {
    let of = |key: &str| case[key].as_u64().unwrap() as usize;
    let shape =
        Shape { batch: case["rows"].as_array().unwrap().len(), height: of("height"), width: of("width"), channels: 3 };
    let shortcut = case["shortcut"].as_str().unwrap().parse::<Shortcut>().unwrap();
    let (graph, logits) = CifarResNet { blocks: 1, shortcut }.trace(shape, 10).unwrap();
    let label_smoothing = number(&case["label_smoothing"]);
    let options = PlanOptions { label_smoothing, ..PlanOptions::training() };
    let mut plan = Plan::<T>::new(device, graph, logits, options).unwrap();
    fill_in_double(&mut plan, case["rows"].as_array().unwrap(), case);
    plan
}

fn matches_pytorch<T: Scalar>(device: &Device, name: &str, tolerance: f64) {
    let cases: serde_json::Value = read_json("resnet8-hessian.json");
    let mut plan = case_plan::<T>(device, &cases["whole"]);
    let at = arena(plan.parameters(), "resnet8-init.safetensors");
    let along = hash_vector(plan.parameters(), "direction:");
    let found = common::to_f64(&product(&mut plan, &at, &along));
    let error = relative_error(&found, &arena(plan.parameters(), "resnet8-hessian.safetensors"));
    println!("{name}, {}: relative L2 error of the product {error:.1e}", T::NAME);
    assert!(error < tolerance, "{name}: {error:.2e}");

    let case = &cases["digest"];
    let mut plan = case_plan::<T>(device, case);
    let at = hash_weights(plan.parameters());
    let along = hash_vector(plan.parameters(), "direction:");
    let found = common::to_f64(&product(&mut plan, &at, &along));
    let mut largest = 0.0f64;
    for tensor in plan.parameters().tensors() {
        let expected = &case["tensors"][&tensor.name];
        let error = digest_error(
            tensor,
            &found,
            ["norm", "projection"].map(|key| number(&expected[key])),
            number(&case["norm"]),
        );
        assert!(error < tolerance, "{name}: {}: {error:.2e}", tensor.name);
        largest = largest.max(error);
    }
    println!("{name}, {}: largest relative error of a tensor's norm or projection {largest:.1e}", T::NAME);
}

#[test]
fn products_match_pytorchs_double_backward() {
    for (name, device) in common::devices() {
        matches_pytorch::<f32>(&device, &name, 1e-4);
    }
    for (name, device) in two_devices() {
        matches_pytorch::<f64>(&device, &name, 1e-10);
    }
}

/// Central differences along the gradient, as sharpness-aware methods take them. Over a large step many ReLUs switch.
/// Their jumps have no common sign, so divided by the step their error falls only as the inverse square root of the
/// step. Over a small step single precision rounds the difference away. The exact product has neither error.
#[test]
fn a_difference_in_single_precision_is_far_from_the_exact_product() {
    let cases: serde_json::Value = read_json("resnet8-hessian.json");
    let device = Device::host();
    let mut double = case_plan::<f64>(&device, &cases["whole"]);
    let mut single = case_plan::<f32>(&device, &cases["whole"]);
    let at = arena(double.parameters(), "resnet8-init.safetensors");
    let slope = gradient(&mut double, &at);
    let along: Vec<f64> = slope.iter().map(|g| f64::from((g / norm(&slope)) as f32)).collect();
    let reference = product(&mut double, &at, &along);
    let exact = relative_error(&common::to_f64(&product(&mut single, &at, &along)), &reference);
    println!("exact product: error {exact:.1e} in f32");
    let errors = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7].map(|step| {
        let error = relative_error(&difference(&mut single, &at, &along, step), &reference);
        let rounded_less = relative_error(&difference(&mut double, &at, &along, step), &reference);
        println!("central difference, step {step:.0e}: error {error:.1e} in f32, {rounded_less:.1e} in f64");
        error
    });
    let best = errors.into_iter().fold(f64::INFINITY, f64::min);
    assert!(exact < 2e-6 && best < 0.1 && exact < best / 1000.0, "exact {exact:.1e}, best difference {best:.1e}");
    assert!(errors[0] > 5.0 * best && errors[6] > 5.0 * best, "{errors:?}");
}

// ---- Errors and flags
// --------------------------------------------------------------------------------------------------

#[test]
fn what_is_not_finite_shows() {
    for (name, device) in two_devices() {
        let shape = Shape { batch: 2, height: 5, width: 6, channels: 3 };
        let mut plan = resnet8::<f32>(&device, Shortcut::A, Mode::Train, shape, 4);
        let mut random = Random(2);
        let (at, along) = (weights(&plan, &mut random), direction(&plan, &mut random));
        let mut run = |weight: f64, label: u32, step: f64| {
            let mut random = Random(3);
            set_batch(&mut plan, &mut random);
            plan.batch_mut().unwrap().1.write(&[label, 0]).unwrap();
            let (mut at, mut along) = (at.clone(), along.clone());
            at[0] *= weight;
            along[0] *= step;
            let (at, along) = (upload::<f32>(&device, &at), upload::<f32>(&device, &along));
            let mut product = poisoned(&plan);
            let mut flag = device.zeros(1).unwrap();
            plan.hessian_vector(at.view(), along.view(), product.view_mut(), flag.view_mut()).unwrap();
            flag.to_vec().unwrap()[0]
        };
        assert_eq!(run(1.0, 1, 1.0), 0, "{name}");
        assert_eq!(run(f64::NAN, 1, 1.0), 1, "{name}: a weight");
        assert_eq!(run(1.0, 4, 1.0), 1, "{name}: a label beyond the classes");
        assert_eq!(run(1.0, 1, f64::INFINITY), 1, "{name}: a direction");
        assert_eq!(run(1.0, 1, 1.0), 0, "{name}: nothing stays");
    }
}

struct Bowl;

impl Objective<f64> for Bowl {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(1)
    }

    fn pass(&mut self, pass: Pass<'_, f64>) -> Result<()> {
        match pass {
            Pass::Gradient { .. } => Ok(()),
            other => other.split(self),
        }
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let device = Device::host();
    let shape = Shape { batch: 2, height: 5, width: 6, channels: 3 };
    let call = |plan: &mut Plan<f32>, lens: [usize; 3]| {
        let [at, along, mut product] = lens.map(|len| device.zeros::<f32>(len).unwrap());
        let mut flag = device.zeros(1).unwrap();
        plan.hessian_vector(at.view(), along.view(), product.view_mut(), flag.view_mut())
    };
    let mut plan = resnet8::<f32>(&device, Shortcut::A, Mode::Train, shape, 4);
    let n = plan.parameters().len();
    assert_eq!(call(&mut plan, [n; 3]), Ok(()));
    let operation = "Plan::hessian_vector";
    for (position, argument) in ["weights", "direction", "product"].into_iter().enumerate() {
        let mut lens = [n; 3];
        lens[position] = n - 1;
        let refused = Err(Error::Length { operation, argument, found: n - 1, expected: n });
        assert_eq!(call(&mut plan, lens), refused);
    }
    let (graph, logits) = CifarResNet { blocks: 1, shortcut: Shortcut::A }.trace(shape, 4).unwrap();
    let mut plan = Plan::<f32>::new(&device, graph, logits, PlanOptions::evaluation()).unwrap();
    assert!(matches!(call(&mut plan, [n; 3]), Err(Error::Argument { operation: found, .. }) if found == operation));

    let mut zeros = [1.0f64; 3].map(|value| device.upload(&[value]).unwrap());
    let [at, along, product] = &mut zeros;
    let mut flag = device.zeros(1).unwrap();
    let refused = Bowl.hessian_vector(at.view(), along.view(), product.view_mut(), flag.view_mut()).unwrap_err();
    assert!(refused.to_string().contains("no exact product"), "{refused}");
}

/// Two products at once have the bits of two products one after the other, in every type, and do not affect a third one
/// after them.
#[test]
fn a_pair_of_products_has_the_bits_of_two() {
    fn pair<S: Compute<Master = f32>>(name: &str, device: &Device) {
        let shape = Shape { batch: 3, height: 9, width: 10, channels: 3 };
        let (graph, logits) = CifarResNet { blocks: 1, shortcut: Shortcut::B }.trace(shape, 5).unwrap();
        let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
        let mut random = Random(41);
        let at = device.upload(&initial_weights(plan.parameters(), 3).unwrap()).unwrap();
        let len = at.len();
        let directions: [Vec<f32>; 3] = std::array::from_fn(|_| random.vector(len));
        let (mut images, mut labels) = plan.batch_mut().unwrap();
        images.write(&random.vector(images.len())).unwrap();
        labels.write(&[4, 0, 2]).unwrap();
        let directions = directions.map(|values| device.upload(&values).unwrap());
        let mut flag = device.zeros(1).unwrap();
        let blank = || device.upload(&vec![0.0f32; len]).unwrap();
        let mut one_by_one = [blank(), blank(), blank()];
        for (direction, product) in directions.iter().zip(&mut one_by_one) {
            plan.hessian_vector(at.view(), direction.view(), product.view_mut(), flag.view_mut()).unwrap();
        }
        let [mut first, mut second, mut third] = [blank(), blank(), blank()];
        let [a, b, c] = &directions;
        for order in [[a, b], [b, a]] {
            let (products, along) = ([first.view_mut(), second.view_mut()], order.map(Buffer::view));
            plan.hessian_vector_pair(at.view(), along, products, flag.view_mut()).unwrap();
        }
        plan.hessian_vector(at.view(), c.view(), third.view_mut(), flag.view_mut()).unwrap();
        let found = [second, first, third].map(|product| bits(&product.to_vec().unwrap()));
        assert!(found == one_by_one.map(|product| bits(&product.to_vec().unwrap())), "{} on {name}", S::NAME);
        assert_eq!(flag.to_vec().unwrap(), [0], "{} on {name}", S::NAME);
    }
    for (name, device) in two_devices() {
        pair::<f32>(&name, &device);
        pair::<f16>(&name, &device);
        pair::<bf16>(&name, &device);
    }
}
