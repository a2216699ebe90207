//! The plan: gradients of whole networks against central differences in double, memory, statistics, and planning
//! errors.

use approx::{abs_diff_eq, assert_abs_diff_eq, assert_relative_eq};

use crate::common::{self, Random, relative_error, to_f64, weights};
use half::f16;
use polder::device::{Buffer, Compute, Device, Error, HostOptions, Result};
use polder::kernels::batch_norm::Mode;
use polder::kernels::conv::ConvShape;
use polder::kernels::image::Position;
use polder::kernels::vector::{self, Reduction};
use polder::nn::{CifarResNet, Shortcut};
use polder::objective::{self, Objective, ObjectiveExt, RunningStats};
use polder::optim::{Base, Optimizer, Sam, Settings};
use polder::plan::{Graph, Plan, PlanError, PlanOptions, Shape, Value};

fn set_batch(plan: &mut Plan<f64>, random: &mut Random) {
    let classes = plan.classes();
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&random.vector(images.len())).unwrap();
    let truth: Vec<u32> = (0..labels.len()).map(|_| random.below(classes) as u32).collect();
    labels.write(&truth).unwrap();
}

#[test]
fn a_graph_tells_what_its_operations_read_and_write() {
    let mut graph = Graph::new(Shape { batch: 2, height: 5, width: 7, channels: 3 });
    let input = graph.input();
    let convolved = graph.convolution(input, "conv", 4, 3, 2, 1).unwrap();
    let sum = graph.batch_norm(convolved, "bn", Some(convolved), true).unwrap();
    let pooled = graph.global_average_pool(sum).unwrap();
    let logits = graph.linear(pooled, "fc", 6).unwrap();
    let operations = graph.operations();
    let found: Vec<_> = operations
        .iter()
        .map(|operation| (operation.name, operation.inputs.clone(), operation.output, operation.parameters))
        .collect();
    let expected = [
        ("Convolution", vec![input], convolved, 9 * 3 * 4),
        ("BatchNorm", vec![convolved, convolved], sum, 2 * 4),
        ("GlobalAveragePool", vec![sum], pooled, 0),
        ("Linear", vec![pooled], logits, 4 * 6 + 6),
    ];
    assert_eq!(found, expected);
    let multiply_adds: Vec<u64> = operations.iter().map(|operation| operation.multiply_adds).collect();
    assert_eq!(multiply_adds, [2 * 3 * 4 * 4 * 9 * 3, 0, 0, 2 * 4 * 6]);
    assert_eq!(graph.multiply_adds(), multiply_adds.iter().sum::<u64>());
}

struct Pass {
    loss: f64,
    gradient: Vec<f64>,
}

fn pass(plan: &mut Plan<f64>, at: &[f64]) -> Pass {
    let device = plan.device().clone();
    let at = device.upload(at).unwrap();
    let mut gradient: Buffer<f64> = device.zeros(at.len()).unwrap();
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    plan.gradient(at.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    assert_eq!(flag.to_vec().unwrap(), [0]);
    Pass { loss: loss.to_vec().unwrap()[0], gradient: gradient.to_vec().unwrap() }
}

/// Compares the plan's gradient with central differences along random directions.
fn check_gradient(name: &str, device: &Device, graph: Graph, logits: Value, options: PlanOptions, seed: u64) {
    let mut random = Random(seed);
    let mut plan = Plan::<f64>::new(device, graph, logits, options).unwrap();
    plan.draw(seed, Position::default()).unwrap();
    let at = weights(&plan, &mut random);
    set_batch(&mut plan, &mut random);
    let gradient = pass(&mut plan, &at).gradient;
    // Every tensor on its own, so that a small one is not lost in the sum. Padding is not perturbed.
    let ranges: Vec<_> = plan.parameters().tensors().iter().map(|tensor| tensor.range()).collect();
    for range in &ranges {
        let mut direction = vec![0.0; at.len()];
        direction[range.clone()].fill_with(|| random.normal());
        let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        // A ReLU that switches within the step spoils the difference. Then a smaller step must agree.
        let error_with = |plan: &mut Plan<f64>, h: f64| {
            let shifted =
                |sign: f64| -> Vec<f64> { at.iter().zip(&direction).map(|(w, d)| w + sign * h * d).collect() };
            let difference = (pass(plan, &shifted(1.0)).loss - pass(plan, &shifted(-1.0)).loss) / (2.0 * h);
            (difference - slope).abs() / slope.abs().max(1e-2)
        };
        let agrees = [1e-5, 1e-6, 1e-7].into_iter().any(|h| error_with(&mut plan, h) < 1e-6);
        assert!(agrees, "{name}: {range:?}: slope {slope}, error {:.1e}", error_with(&mut plan, 1e-6));
    }
    let padding = (0..at.len()).filter(|index| !ranges.iter().any(|range| range.contains(index)));
    assert!(padding.into_iter().all(|index| gradient[index] == 0.0), "{name}: gradient in the padding");
}

/// What transformers consist of: tokens, layer norms, attention, biases with and without GELU; with inputs of all of
/// them that another operation reads too, and a GELU before the first product.
pub fn transformer(shape: Shape) -> (Graph, Value) {
    let mut graph = Graph::new(shape);
    let x = graph.input();
    let x = graph.bias_gelu(x, "first.bias", 1).unwrap();
    let patches = graph.convolution(x, "patches.weight", 6, 2, 2, 0).unwrap();
    let moved = graph.bias(patches, "patches.bias", 12).unwrap();
    let both = graph.add(moved, patches).unwrap();
    let tokens = graph.embed_tokens(both, "token", "positions").unwrap();
    let normal = graph.layer_norm(tokens, "norm", 1e-3).unwrap();
    let qkv = graph.projection(normal, "qkv.weight", 18).unwrap();
    let attended = graph.attention(qkv, "qkv.bias", 2).unwrap();
    let wide = graph.projection(attended, "wide.weight", 18).unwrap();
    // The gradients of qkv and tokens come from several operations.
    let curved = graph.bias_gelu(qkv, "curved.bias", 6).unwrap();
    let wide = graph.bias_add(wide, "wide.bias", 6, curved).unwrap();
    let again = graph.attention(wide, "again.bias", 3).unwrap();
    let sum = graph.bias_add(tokens, "sum.bias", 6, again).unwrap();
    let sum = graph.add(sum, tokens).unwrap();
    let sum = graph.bias_add(sum, "twice.bias", 6, sum).unwrap();
    let normal = graph.layer_norm(sum, "last", 1e-3).unwrap();
    let sum = graph.add(normal, sum).unwrap();
    let tokens = graph.shape(sum).width;
    let y = graph.shortcut(sum, 6, tokens).unwrap();
    let logits = graph.linear(y, "head", 3).unwrap();
    (graph, logits)
}

#[test]
fn gradients_through_transformers_match_central_differences() {
    for (name, device) in common::host_devices().into_iter().filter(|(name, _)| name.contains("2 threads")) {
        let (graph, logits) = transformer(Shape { batch: 3, height: 6, width: 4, channels: 2 });
        check_gradient(&name, &device, graph, logits, PlanOptions::training(), 21);
    }
}

#[test]
fn transformers_of_impossible_shapes_are_refused() {
    let mut graph = Graph::new(Shape { batch: 2, height: 3, width: 4, channels: 12 });
    let x = graph.input();
    let refused = |result: std::result::Result<Value, PlanError>| result.unwrap_err().to_string();
    let expected = "attention: 12 channels are not queries, keys and values of 3 heads";
    assert_eq!(refused(graph.attention(x, "bias", 3)), expected);
    assert!(refused(graph.attention(x, "bias", 0)).starts_with("attention: 12 channels"));
    let wide = graph.projection(x, "wide.weight", 3 * 65).unwrap();
    assert!(refused(graph.attention(wide, "bias", 1)).contains("heads of at most 64"));
    assert!(matches!(graph.bias_add(wide, "bias", 12, x), Err(PlanError::Shape { .. })));
    assert!(matches!(graph.bias(x, "wide.weight", 12), Err(PlanError::DuplicateParameter { .. })));
}

/// Max pools before and after the first parameter, with windows that overlap and that touch, and of an activation that
/// another operation reads too. Height and width must be odd.
pub fn max_pools(shape: Shape) -> (Graph, Value) {
    let mut graph = Graph::new(shape);
    let fixed = graph.max_pool(graph.input(), 2, 1, 0).unwrap();
    let x = graph.convolution(fixed, "a.weight", 5, 3, 1, 1).unwrap();
    let x = graph.batch_norm(x, "bn", None, true).unwrap();
    let largest = graph.max_pool(x, 3, 2, 1).unwrap();
    let mean = graph.average_pool(x, 2, 2).unwrap();
    let sum = graph.add(largest, mean).unwrap();
    let x = graph.convolution(sum, "b.weight", 4, 3, 1, 1).unwrap();
    let x = graph.max_pool(x, 2, 2, 0).unwrap();
    let x = graph.global_average_pool(x).unwrap();
    let logits = graph.linear(x, "fc", 3).unwrap();
    (graph, logits)
}

#[test]
fn gradients_through_max_pools_match_central_differences() {
    for (name, device) in common::host_devices().into_iter().filter(|(name, _)| name.contains("2 threads")) {
        let (graph, logits) = max_pools(Shape { batch: 3, height: 9, width: 7, channels: 2 });
        check_gradient(&format!("max pools on {name}"), &device, graph, logits, PlanOptions::training(), 23);
    }
}

/// Grouped convolutions, and branches that are dropped at random, one of them before the first parameter.
pub fn groups_and_drops(shape: Shape) -> (Graph, Value) {
    let mut graph = Graph::new(shape);
    let fixed = graph.drop_path(graph.input(), 0.3).unwrap();
    let x = graph.convolution(fixed, "a.weight", 12, 3, 1, 1).unwrap();
    let x = graph.batch_norm(x, "bn", None, true).unwrap();
    let branch = graph.grouped_convolution(x, "b.weight", 12, 3, 3, 1, 1).unwrap();
    let branch = graph.drop_path(branch, 0.5).unwrap();
    let x = graph.add(branch, x).unwrap();
    let x = graph.grouped_convolution(x, "c.weight", 8, 4, 3, 2, 1).unwrap();
    let x = graph.global_average_pool(x).unwrap();
    let logits = graph.linear(x, "fc", 3).unwrap();
    (graph, logits)
}

#[test]
fn gradients_through_groups_and_dropped_branches_match_central_differences() {
    for (name, device) in common::host_devices().into_iter().filter(|(name, _)| name.contains("2 threads")) {
        let (graph, logits) = groups_and_drops(Shape { batch: 5, height: 6, width: 7, channels: 2 });
        check_gradient(&format!("groups and drops on {name}"), &device, graph, logits, PlanOptions::training(), 29);
    }
}

#[test]
fn impossible_groups_and_rates_are_refused() {
    let mut graph = Graph::new(Shape { batch: 2, height: 4, width: 6, channels: 6 });
    let x = graph.input();
    for groups in [0, 4, 5] {
        let refused = graph.grouped_convolution(x, "w", 12, groups, 3, 1, 1);
        assert!(matches!(refused, Err(PlanError::Shape { .. })), "{groups}: {refused:?}");
    }
    for rate in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(graph.drop_path(x, rate), Err(PlanError::Shape { .. })), "{rate}");
        assert!(matches!(graph.shake_drop(x, 1.0 - rate), Err(PlanError::Shape { .. })), "{rate}");
    }
    assert_eq!((graph.drop_path(x, 0.0), graph.shake_drop(x, 1.0)), (Ok(x), Ok(x)));
}

#[test]
fn max_pools_of_impossible_windows_are_refused() {
    let mut graph = Graph::new(Shape { batch: 1, height: 4, width: 6, channels: 2 });
    let x = graph.input();
    assert_eq!(
        graph.max_pool(x, 3, 2, 1).map(|y| graph.shape(y)),
        Ok(Shape { batch: 1, height: 2, width: 3, channels: 2 })
    );
    for (kernel, stride, padding) in [(5, 1, 0), (0, 1, 0), (2, 0, 0), (2, 1, 2), (17, 1, 8)] {
        assert!(matches!(graph.max_pool(x, kernel, stride, padding), Err(PlanError::Shape { .. })), "{kernel}");
    }
}

#[test]
fn gradients_of_whole_networks_match_central_differences() {
    // The tests of the kernels run every order of blocks and lanes, so here one of each kind of launch shape is enough.
    // Under sanitizers the GPU's launch shapes would take a minute, and other tests cover them, so only the CPU's run.
    let sanitized = std::env::var_os("POLDER_SANITIZE").is_some();
    let wanted = |name: &str| name.contains("2 threads") || (name.contains("forwards") && !sanitized);
    for (device_name, device) in common::host_devices().into_iter().filter(|(name, _)| wanted(name)) {
        for (shortcut, mode, size) in
            [(Shortcut::A, Mode::Train, (7, 6)), (Shortcut::B, Mode::Train, (8, 5)), (Shortcut::B, Mode::Eval, (5, 6))]
        {
            let shape = Shape { batch: 2, height: size.0, width: size.1, channels: 3 };
            let (graph, logits) = CifarResNet { blocks: 1, shortcut }.trace(shape, 7).unwrap();
            let options = PlanOptions { backward: true, batch_norm: mode, label_smoothing: 0.1 };
            check_gradient(&format!("{shortcut:?} {mode:?} on {device_name}"), &device, graph, logits, options, 5);
        }
    }
}

#[test]
fn gradients_through_every_operation_match_central_differences() {
    // What the ResNets do not use: separate ReLU and sum, a sum of two trained values, pools with overlap, values used
    // three times, and a batch norm whose input another operation reads too.
    let device = Device::host();
    let mut graph = Graph::new(Shape { batch: 4, height: 9, width: 7, channels: 2 });
    let x = graph.input();
    let x = graph.convolution(x, "a.weight", 5, 3, 1, 0).unwrap();
    let left = graph.relu(x);
    let right = graph.convolution(x, "b.weight", 5, 1, 1, 0).unwrap();
    let sum = graph.add(left, right).unwrap();
    let sum = graph.add(sum, x).unwrap();
    let normal = graph.batch_norm(sum, "pre", None, true).unwrap();
    let sum = graph.add(normal, sum).unwrap();
    let pooled = graph.average_pool(sum, 3, 2).unwrap();
    let wide = graph.append_channels(pooled, 6).unwrap();
    let wide = graph.shortcut(wide, 8, 1).unwrap();
    let y = graph.batch_norm(wide, "bn", None, false).unwrap();
    let doubled = graph.add(y, y).unwrap();
    let y = graph.global_average_pool(doubled).unwrap();
    let logits = graph.linear(y, "fc", 3).unwrap();
    check_gradient("every operation", &device, graph, logits, PlanOptions::training(), 11);
}

#[test]
fn a_parameter_without_influence_is_an_error_when_planned() {
    let mut graph = Graph::new(Shape { batch: 2, height: 4, width: 4, channels: 3 });
    let x = graph.input();
    let used = graph.convolution(x, "used.weight", 4, 3, 1, 1).unwrap();
    graph.convolution(x, "unused.weight", 4, 3, 1, 1).unwrap();
    let pooled = graph.global_average_pool(used).unwrap();
    let logits = graph.linear(pooled, "fc", 2).unwrap();
    let error = Plan::<f32>::new(&Device::host(), graph, logits, PlanOptions::training()).err().unwrap();
    assert_eq!(error, PlanError::NoGradient { parameter: "unused.weight".into() });
}

#[test]
fn shapes_that_do_not_fit_are_errors_when_traced() {
    let mut graph = Graph::new(Shape { batch: 2, height: 4, width: 5, channels: 3 });
    let x = graph.input();
    let y = graph.convolution(x, "a.weight", 4, 3, 2, 1).unwrap();
    assert_eq!(graph.shape(y), Shape { batch: 2, height: 2, width: 3, channels: 4 });
    assert!(graph.add(x, y).is_err());
    assert!(graph.batch_norm(y, "bn", Some(x), true).is_err());
    assert!(graph.linear(y, "fc", 2).is_err());
    assert!(graph.shortcut(y, 3, 1).is_err());
    assert!(graph.append_channels(y, 3).is_err());
    assert!(graph.average_pool(y, 3, 1).is_err());
    assert!(graph.convolution(x, "b.weight", 4, 7, 1, 0).is_err());
    assert!(graph.convolution(x, "c.weight", 4, 3, 0, 1).is_err());
    let duplicate = graph.convolution(x, "a.weight", 4, 3, 1, 1).err().unwrap();
    assert_eq!(duplicate, PlanError::DuplicateParameter { name: "a.weight".into() });
}

#[test]
fn statistics_follow_the_rule_and_the_commit() {
    let device = Device::host();
    let mut graph = Graph::new(Shape { batch: 6, height: 1, width: 2, channels: 2 });
    let x = graph.input();
    let x = graph.batch_norm(x, "bn", None, false).unwrap();
    let x = graph.global_average_pool(x).unwrap();
    let logits = graph.linear(x, "fc", 2).unwrap();
    let mut plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
    let mut random = Random(3);
    let at = device.upload(&weights(&plan, &mut random)).unwrap();
    set_batch(&mut plan, &mut random);
    let images = {
        let (images, _) = plan.batch_mut().unwrap();
        images.view().to_vec().unwrap()
    };
    let before = plan.statistics().to_vec().unwrap();
    let mut gradient = device.zeros(at.len()).unwrap();
    let (mut loss, mut flag) = (device.zeros(1).unwrap(), device.zeros(1).unwrap());
    let mut run = |plan: &mut Plan<f64>, statistics| {
        plan.gradient(at.view(), statistics, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    };
    run(&mut plan, RunningStats::Update);
    run(&mut plan, RunningStats::Keep);
    assert_eq!(plan.statistics().to_vec().unwrap(), before, "nothing changes before the commit");
    plan.commit(device.upload(&[1]).unwrap().view()).unwrap();
    assert_eq!(plan.statistics().to_vec().unwrap(), before, "a skipped step changes nothing");
    run(&mut plan, RunningStats::Update);
    plan.commit(device.upload(&[0]).unwrap().view()).unwrap();
    let after = plan.statistics().to_vec().unwrap();
    for channel in 0..2 {
        let values: Vec<f64> = images.iter().skip(channel).step_by(2).copied().collect();
        let mean = values.iter().sum::<f64>() / 12.0;
        let unbiased = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 11.0;
        let layout = plan.statistics_layout();
        let at = |name: &str| after[layout.find(name).unwrap().offset + channel];
        assert_abs_diff_eq!(at("bn.running_mean"), 0.1 * mean, epsilon = 1e-14);
        assert_abs_diff_eq!(at("bn.running_var"), 0.9 + 0.1 * unbiased, epsilon = 1e-14);
    }
}

/// With shares 1, 1/2 and 1/3 the statistics are the means over three batches, whatever they were before. In
/// evaluation they stay.
#[test]
fn statistics_are_averaged_over_batches() {
    let device = Device::host();
    let plan = |mode: Mode| {
        let (graph, logits) = max_pools(Shape { batch: 3, height: 9, width: 7, channels: 2 });
        let options = PlanOptions { batch_norm: mode, ..PlanOptions::training() };
        let mut plan = Plan::<f64>::new(&device, graph, logits, options).unwrap();
        let before: Vec<f64> = (0..plan.statistics().len()).map(|index| 2.0 + index as f64).collect();
        plan.set_statistics(device.upload(&before).unwrap().view()).unwrap();
        (plan, before)
    };
    let (mut averaged, _) = plan(Mode::Train);
    let (mut fixed, before) = plan(Mode::Eval);
    let at = device.upload(&weights(&averaged, &mut Random(3))).unwrap();
    let mut sums = vec![0.0; before.len()];
    for number in 0..3 {
        let mut single = plan(Mode::Train).0;
        for plan in [&mut averaged, &mut single, &mut fixed] {
            set_batch(plan, &mut Random(40 + number));
        }
        averaged.average_statistics(at.view(), 1.0 / (number + 1) as f64).unwrap();
        single.average_statistics(at.view(), 1.0).unwrap();
        fixed.average_statistics(at.view(), 1.0).unwrap();
        sums.iter_mut().zip(single.statistics().to_vec().unwrap()).for_each(|(sum, value)| *sum += value);
    }
    let found = averaged.statistics().to_vec().unwrap();
    for tensor in averaged.statistics_layout().tensors() {
        for index in tensor.range() {
            assert_relative_eq!(found[index], sums[index] / 3.0, max_relative = 1e-12, epsilon = 1e-12);
            assert!((found[index] - before[index]).abs() > 0.1, "{}", tensor.name);
        }
    }
    assert_eq!(fixed.statistics().to_vec().unwrap(), before);
}

/// A batch so large that, where the CPU emulates a GPU, weight gradients are computed in parts that stay until the end
/// of the pass.
#[test]
fn gradients_in_parts_are_the_gradients() {
    let shape = Shape { batch: 24, height: 9, width: 7, channels: 3 };
    let mut gradients: Vec<Vec<f64>> = Vec::new();
    for emulate_gpu in [false, true] {
        let device = Device::host_with(HostOptions { threads: 2, emulate_gpu, ..HostOptions::default() });
        let (graph, logits) = CifarResNet { blocks: 1, shortcut: Shortcut::B }.trace(shape, 7).unwrap();
        let mut plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
        let mut random = Random(8);
        let at = weights(&plan, &mut random);
        set_batch(&mut plan, &mut random);
        gradients.push(pass(&mut plan, &at).gradient);
        let (at, mut gradient) = (device.upload(&at).unwrap(), device.zeros(at.len()).unwrap());
        let (mut loss, mut flag) = (device.zeros(1).unwrap(), device.zeros(1).unwrap());
        let again =
            || plan.gradient(at.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut());
        let list = device.capture(again).unwrap().list().unwrap();
        let sums = list.iter().filter(|name| *name == "gradient_pieces_f64").count();
        assert_eq!(sums, usize::from(emulate_gpu), "{list:?}");
    }
    common::assert_close("in parts", &gradients[1], &gradients[0], 1e-11);
}

/// Weight gradients in large parts, which are added up at once, in small parts, and complete, next to the gradients of
/// other layers. The CPU emulates a GPU, where the kernel that writes a gradient last also finishes it.
#[test]
fn every_stage_finishes_its_gradients() {
    fn check<S: Compute>(tolerance: f64) {
        let mut gradients: Vec<Vec<f64>> = Vec::new();
        for emulate_gpu in [false, true] {
            let device = Device::host_with(HostOptions { threads: 2, emulate_gpu, ..HostOptions::default() });
            let mut graph = Graph::new(Shape { batch: 9, height: 16, width: 8, channels: 256 });
            let x = graph.input();
            let x = graph.convolution(x, "large.weight", 512, 1, 1, 0).unwrap();
            let x = graph.convolution(x, "small.weight", 8, 1, 1, 0).unwrap();
            let x = graph.average_pool(x, 4, 4).unwrap();
            let x = graph.convolution(x, "one.weight", 24, 3, 1, 1).unwrap();
            let x = graph.batch_norm(x, "bn", None, true).unwrap();
            let x = graph.global_average_pool(x).unwrap();
            let logits = graph.linear(x, "fc", 3).unwrap();
            let mut plan = Plan::<S>::new(&device, graph, logits, PlanOptions::training()).unwrap();
            let mut random = Random(6);
            let at = common::upload::<S::Master>(&device, &weights(&plan, &mut random));
            let (mut images, mut labels) = plan.batch_mut().unwrap();
            images.write(&random.vector::<S>(images.len())).unwrap();
            labels.write(&[0, 1, 2, 1, 0, 2, 2, 1, 0]).unwrap();
            let mut gradient = device.zeros::<S::Master>(at.len()).unwrap();
            let (mut loss, mut norm) = (device.zeros(1).unwrap(), device.zeros(1).unwrap());
            let (mut flag, mut reduction) = (device.zeros(1).unwrap(), Reduction::new(&device).unwrap());
            let mut pass = || {
                let (gradient, loss, flag) = (gradient.view_mut(), loss.view_mut(), flag.view_mut());
                let (keep, norm) = (RunningStats::Keep, norm.view_mut());
                plan.gradient_and_norm(at.view(), keep, gradient, loss, flag, &mut reduction, norm)
            };
            pass().unwrap();
            let list = device.capture(&mut pass).unwrap().list().unwrap();
            let one = ConvShape {
                groups: 1,
                batch: 9,
                height: 4,
                width: 2,
                in_channels: 8,
                out_channels: 24,
                kernel: 3,
                stride: 1,
                padding: 1,
            };
            assert_eq!(one.finished_squares::<S>(&device).is_some(), emulate_gpu && S::NARROW);
            let launches = list.iter().filter(|name| name.starts_with("gradient_pieces")).count();
            assert_eq!(launches, if emulate_gpu { 2 } else { 0 }, "{list:?}");
            assert_eq!(flag.to_vec().unwrap(), [0]);
            let found = to_f64(&gradient.to_vec().unwrap());
            let expected = found.iter().map(|value| value * value).sum::<f64>().sqrt();
            let norm = norm.to_vec().unwrap()[0];
            assert_relative_eq!(norm, expected, epsilon = 0.0, max_relative = 1e-13);
            gradients.push(found);
        }
        let error = relative_error(&gradients[1], &gradients[0]);
        assert!(error <= tolerance, "{} in stages: off by {error:e}", S::NAME);
    }
    check::<f64>(1e-13);
    check::<f16>(2e-3); // sums in another order, rounded to 11 bits
}

/// A small plan with a batch, weights for it on its device, and others near them.
fn small_plan<S: Compute<Master = f32>>(device: &Device) -> (Plan<S>, [Buffer<f32>; 2]) {
    let shape = Shape { batch: 8, height: 8, width: 8, channels: 3 };
    let (graph, logits) = CifarResNet { blocks: 1, shortcut: Shortcut::A }.trace(shape, 5).unwrap();
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    let mut random = Random(4);
    let at = weights(&plan, &mut random);
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&random.vector::<S>(images.len())).unwrap();
    labels.write(&[0, 1, 2, 3, 4, 0, 1, 2]).unwrap();
    let near: Vec<f64> = at.iter().map(|weight| weight * 1.1).collect();
    (plan, [common::upload(device, &at), common::upload(device, &near)])
}

/// The norm that a pass computes on the side is the norm of its gradient, with a loss scale and without.
#[test]
fn the_norm_comes_with_the_gradient() {
    fn check<S: Compute<Master = f32>>(device: &Device) {
        let (mut plan, [at, _]) = small_plan::<S>(device);
        let mut reduction = Reduction::new(device).unwrap();
        let (mut first, mut second) = (device.zeros(at.len()).unwrap(), device.zeros(at.len()).unwrap());
        let (mut losses, mut norms) = (device.poisoned::<f64>(2).unwrap(), device.poisoned::<f64>(2).unwrap());
        let mut flag = device.zeros::<u32>(1).unwrap();
        let keep = RunningStats::Keep;
        let loss = losses.slice_mut(0..1).unwrap();
        plan.gradient(at.view(), keep, first.view_mut(), loss, flag.view_mut()).unwrap();
        vector::l2_norm(first.view(), &mut reduction, norms.slice_mut(0..1).unwrap()).unwrap();
        let (loss, norm) = (losses.slice_mut(1..2).unwrap(), norms.slice_mut(1..2).unwrap());
        plan.gradient_and_norm(at.view(), keep, second.view_mut(), loss, flag.view_mut(), &mut reduction, norm)
            .unwrap();
        assert_eq!(flag.to_vec().unwrap(), [0]);
        assert_eq!(common::bits(&first.to_vec().unwrap()), common::bits(&second.to_vec().unwrap()));
        let (losses, norms) = (losses.to_vec().unwrap(), norms.to_vec().unwrap());
        // On a GPU the squares are summed in another order, in double precision.
        assert!(losses[0] == losses[1] && norms[0] > 0.0, "{losses:?}");
        assert!(abs_diff_eq!(norms[0], norms[1], epsilon = 1e-14 * norms[0]), "{norms:?}");
    }
    for (_, device) in common::devices() {
        check::<f32>(&device);
        check::<f16>(&device);
    }
}

/// Two passes at the same time give the bits of two passes one after the other, also in a recorded graph and for
/// another batch, and do not affect the pass after them.
#[test]
fn a_pair_of_gradients_is_two_gradients() {
    fn check<S: Compute<Master = f32>>(device: &Device) {
        let (mut plan, at) = small_plan::<S>(device);
        let len = at[0].len();
        let mut flag = device.zeros::<u32>(1).unwrap();
        let mut alone = |plan: &mut Plan<S>, at: &Buffer<f32>| {
            let (mut gradient, mut loss) = (device.zeros::<f32>(len).unwrap(), device.poisoned::<f64>(1).unwrap());
            let (into, loss_into) = (gradient.view_mut(), loss.view_mut());
            plan.gradient(at.view(), RunningStats::Keep, into, loss_into, flag.view_mut()).unwrap();
            (common::bits(&gradient.to_vec().unwrap()), loss.to_vec().unwrap())
        };
        let mut flags = device.zeros::<u32>(1).unwrap();
        let (mut g0, mut g1) = (device.zeros::<f32>(len).unwrap(), device.zeros::<f32>(len).unwrap());
        let (mut l0, mut l1) = (device.poisoned::<f64>(1).unwrap(), device.poisoned::<f64>(1).unwrap());
        for round in 0..4 {
            let expected = [alone(&mut plan, &at[0]), alone(&mut plan, &at[1])];
            let mut pair = || {
                let weights = [at[0].view(), at[1].view()];
                let gradients = [g0.view_mut(), g1.view_mut()];
                plan.gradient_pair(weights, gradients, [l0.view_mut(), l1.view_mut()], flags.view_mut())
            };
            // Recorded before the second arena exists, then run twice without recording, then recorded once more.
            match round {
                0 | 3 => device.capture(pair).unwrap().replay().unwrap(),
                _ => pair().unwrap(),
            }
            let found = [(&g0, &l0), (&g1, &l1)]
                .map(|(gradient, loss)| (common::bits(&gradient.to_vec().unwrap()), loss.to_vec().unwrap()));
            assert!(found == expected && found[0] != found[1], "{} {}, round {round}", S::NAME, device.name());
            assert!(alone(&mut plan, &at[0]) == expected[0], "the pass after a pair");
            let (mut images, _) = plan.batch_mut().unwrap();
            images.write(&Random(50 + round).vector::<S>(images.len())).unwrap();
        }
        assert_eq!(flags.to_vec().unwrap(), [0]);
        // The flag shows that the second pass is not finite.
        let mut broken = at[1].to_vec().unwrap();
        broken[7] = f32::NAN;
        let broken = device.upload(&broken).unwrap();
        let (gradients, losses) = ([g0.view_mut(), g1.view_mut()], [l0.view_mut(), l1.view_mut()]);
        plan.gradient_pair([at[0].view(), broken.view()], gradients, losses, flags.view_mut()).unwrap();
        assert_eq!(flags.to_vec().unwrap(), [1]);
        assert!(l0.to_vec().unwrap()[0].is_finite() && l1.to_vec().unwrap()[0].is_nan());
    }
    for (_, device) in common::devices() {
        // Sanitizers see the same code in both.
        if std::env::var_os("POLDER_SANITIZE").is_none() {
            check::<f32>(&device);
        }
        check::<f16>(&device);
    }
}

/// A gradient on the batch of this step and one on the batch that was kept. A skipped step keeps
/// the earlier batch, the current one stays where it is, and a checkpoint's words bring the kept one back.
#[test]
fn gradients_across_batches_are_gradients_on_each() {
    fn check<S: Compute<Master = f32>>(device: &Device) {
        let (mut plan, at) = small_plan::<S>(device);
        let len = at[0].len();
        let mut flag = device.zeros::<u32>(1).unwrap();
        let show = |plan: &mut Plan<S>, number: usize| {
            let (mut images, mut labels) = plan.batch_mut().unwrap();
            images.write(&Random(70 + number as u64).vector::<S>(images.len())).unwrap();
            labels.write(&vec![number as u32; labels.len()]).unwrap();
        };
        let mut alone = |plan: &mut Plan<S>, at: &Buffer<f32>| {
            let (mut gradient, mut loss) = (device.zeros::<f32>(len).unwrap(), device.poisoned::<f64>(1).unwrap());
            let (into, loss_into) = (gradient.view_mut(), loss.view_mut());
            plan.gradient(at.view(), RunningStats::Keep, into, loss_into, flag.view_mut()).unwrap();
            (common::bits(&gradient.to_vec().unwrap()), loss.to_vec().unwrap())
        };
        let mut flags = device.zeros::<u32>(1).unwrap();
        let skips = [0, 1].map(|skip| device.upload(&[skip]).unwrap());
        let (mut g0, mut g1) = (device.zeros::<f32>(len).unwrap(), device.zeros::<f32>(len).unwrap());
        let (mut l0, mut l1) = (device.poisoned::<f64>(1).unwrap(), device.poisoned::<f64>(1).unwrap());
        let mut across = |plan: &mut Plan<S>| -> Result<[(Vec<u64>, Vec<f64>); 2]> {
            let weights = [at[0].view(), at[1].view()];
            let (gradients, losses) = ([g0.view_mut(), g1.view_mut()], [l0.view_mut(), l1.view_mut()]);
            plan.pass(objective::Pass::GradientAcross { weights, gradients, losses, flag: flags.view_mut() })?;
            plan.pass(objective::Pass::Abandon)?;
            Ok([(&g0, &l0), (&g1, &l1)].map(|(g, l)| (common::bits(&g.to_vec().unwrap()), l.to_vec().unwrap())))
        };
        let nothing = across(&mut plan);
        assert!(matches!(&nothing, Err(Error::Argument { message, .. }) if message.contains("no mini-batch")));
        assert!(plan.kept_batch().unwrap().is_empty());
        show(&mut plan, 0);
        // The first batch is kept even if its step was skipped.
        plan.pass(objective::Pass::KeepBatch { skip: skips[1].view() }).unwrap();
        let mut kept = 0;
        for round in 1..5 {
            show(&mut plan, kept);
            let before = alone(&mut plan, &at[1]);
            show(&mut plan, round);
            let expected = [alone(&mut plan, &at[0]), before];
            let found = across(&mut plan).unwrap();
            assert!(found == expected && found[0] != found[1], "{} {}, round {round}", S::NAME, device.name());
            assert!(alone(&mut plan, &at[0]) == expected[0], "the current batch stays");
            let skipped = usize::from(round == 2);
            plan.pass(objective::Pass::KeepBatch { skip: skips[skipped].view() }).unwrap();
            kept = if skipped == 1 { kept } else { round };
            if round == 3 {
                let words = plan.kept_batch().unwrap();
                assert_eq!(words.len(), plan.kept_batch_len());
                assert!(plan.restore_kept_batch(&words[1..]).is_err());
                (plan, _) = small_plan::<S>(device);
                plan.restore_kept_batch(&words).unwrap();
                assert_eq!(plan.kept_batch().unwrap(), words);
            }
        }
        assert_eq!(flags.to_vec().unwrap(), [0]);
    }
    for (_, device) in common::devices() {
        check::<f32>(&device);
        check::<f16>(&device);
    }
}

/// A ResNet-20 whose operations do one thing each.
fn unfused_resnet20(images: Shape) -> (Graph, Value) {
    let mut graph = Graph::new(images);
    let x = graph.input();
    let layer = |graph: &mut Graph, x: Value, name: String, width: usize, stride: usize| {
        let y = graph.convolution(x, &format!("{name}.weight"), width, 3, stride, 1).unwrap();
        graph.batch_norm(y, &format!("{name}.bn"), None, false).unwrap()
    };
    let first = layer(&mut graph, x, "conv1".into(), 16, 1);
    let mut x = graph.relu(first);
    for (stage, width) in [16, 32, 64].into_iter().enumerate() {
        for block in 0..3 {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let y = layer(&mut graph, x, format!("{stage}.{block}.1"), width, stride);
            let y = graph.relu(y);
            let y = layer(&mut graph, y, format!("{stage}.{block}.2"), width, 1);
            let shortcut = if stride == 1 { x } else { graph.shortcut(x, width, stride).unwrap() };
            let sum = graph.add(y, shortcut).unwrap();
            x = graph.relu(sum);
        }
    }
    let x = graph.global_average_pool(x).unwrap();
    let logits = graph.linear(x, "fc", 10).unwrap();
    (graph, logits)
}

/// The launches of one step of SAM on a GPU, by name.
fn launches_of_a_step<S: Compute<Master = f32>>((graph, logits): (Graph, Value)) -> Vec<String> {
    let device = Device::host_with(HostOptions { emulate_gpu: true, ..HostOptions::default() });
    let mut plan = Plan::<S>::new(&device, graph, logits, PlanOptions::training()).unwrap();
    let mut weights = device.zeros::<f32>(plan.len()).unwrap();
    let settings = Settings::new(Sam::new(0.05), Base::sgd(0.9));
    let mut optimizer = Optimizer::new(&device, plan.len(), settings).unwrap();
    device.capture(|| optimizer.step(&mut plan, weights.view_mut(), 0.1)).unwrap().list().unwrap()
}

/// On a GPU, the number of launches should bound networks of CIFAR's size. A step of SAM for ResNet-20 in f16 has at
/// most half the launches of a plan whose operations do one thing each, with a kernel for every stage.
#[test]
fn a_step_of_resnet20_launches_few_kernels() {
    let images = Shape { batch: 128, height: 32, width: 32, channels: 3 };
    let model = CifarResNet { blocks: 3, shortcut: Shortcut::A };
    let fused = launches_of_a_step::<f16>(model.trace(images, 10).unwrap());
    let apart = launches_of_a_step::<f16>(unfused_resnet20(images));
    let count = |list: &[String], name: &str| list.iter().filter(|launch| launch.contains(name)).count();
    let (convolutions, passes) = (19, 2);
    // Further tasks that the kernels of the second plan still share: the moments of batch norm's input, its dgamma and
    // dbeta, the sums of a split weight gradient, the finiteness checks of loss and gradient, and the norm's squares
    // and their sum.
    let stages = passes * (convolutions + convolutions + convolutions - 1 + 2) + 2;
    let unfused = apart.len() + stages;
    let mut names: Vec<&String> = fused.iter().collect();
    names.sort();
    names.dedup();
    for name in names {
        println!("{:4} {name}", fused.iter().filter(|launch| *launch == name).count());
    }
    println!("{} of {unfused}", fused.len());
    assert_eq!(count(&fused, "conv_tensor_forward"), passes * convolutions);
    assert_eq!(count(&fused, "batch_norm_moments"), 0);
    // No convolution computes the sums of the last one, because none reads its output.
    assert_eq!(count(&fused, "batch_norm_sums"), passes);
    assert_eq!(count(&fused, "batch_norm"), passes * (convolutions * 3 + 1));
    assert_eq!(count(&fused, "gradient_pieces"), passes);
    assert_eq!(count(&fused, "finish"), 0);
    assert!(fused.len() * 2 <= unfused, "{} launches of {unfused}", fused.len());
}
