//! Networks in fewer than 32 bits: the distance of their gradients and steps from double precision, the loss scale, and
//! steps that overflow and must change nothing.

use crate::common::methods::AnyMethod;
use crate::common::{self, Grouped, Random, bits, devices, fast_devices, relative_error, roundoff, to_f64, upload};
use half::{bf16, f16};
use polder::arena::TensorKind;
use polder::device::{Bf16x3, Bf16x6, Compute, Device, Scalar, Tf32};
use polder::kernels::vector::{self, Reduction};
use polder::nn::{CifarResNet, Model, Shortcut, initial_weights};
use polder::objective::{Accumulator, Answer, Objective, ObjectiveExt, Pass, RunningStats, Wrapped, Wrapper};
use polder::optim::{Base, CrSam, Gam, Optimizer, SaSam, Settings};
use polder::plan::{Graph, Plan, PlanError, PlanOptions, Shape};

/// Convolutions, batch norms, a residual and a classifier, without a ReLU, so that nothing switches. The channels are
/// multiples of eight, so that on a GPU the backward of the second convolution computes the sums of the first batch
/// norm.
fn smooth(batch: usize) -> (Graph, polder::plan::Value) {
    let mut graph = Graph::new(Shape { batch, height: 7, width: 6, channels: 3 });
    let x = graph.input();
    let x = graph.convolution(x, "conv1", 16, 3, 1, 1).unwrap();
    let x = graph.batch_norm(x, "bn1", None, false).unwrap();
    let y = graph.convolution(x, "conv2", 16, 3, 1, 1).unwrap();
    let y = graph.batch_norm(y, "bn2", Some(x), false).unwrap();
    let y = graph.average_pool(y, 2, 2).unwrap();
    let y = graph.convolution(y, "conv3", 24, 3, 2, 1).unwrap();
    let y = graph.global_average_pool(y).unwrap();
    let logits = graph.linear(y, "fc", 5).unwrap();
    (graph, logits)
}

/// Writes a batch of noise, the same pixels in every precision, and these labels.
fn write_batch<S: Compute>(plan: &mut Plan<S>, random: &mut Random, classes: &[u32]) {
    let pixels: Vec<bf16> = random.vector(plan.input_shape().len());
    let pixels: Vec<S> = pixels.into_iter().map(|value| S::from_f64(value.to_f64())).collect();
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&pixels).unwrap();
    labels.write(classes).unwrap();
}

/// Gradient and product with the Hessian of the smooth network, as doubles, and the bits of both.
fn smooth_results<S: Compute>(device: &Device, scale: Option<f64>) -> ([Vec<f64>; 2], Vec<u64>) {
    smooth_along::<S>(device, scale, 0.1)
}

/// The same, with a direction of this size.
fn smooth_along<S: Compute>(device: &Device, scale: Option<f64>, size: f64) -> ([Vec<f64>; 2], Vec<u64>) {
    let (graph, logits) = smooth(4);
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    let mut random = Random(31);
    let weights = common::weights(&plan, &mut random);
    write_batch(&mut plan, &mut random, &[1, 4, 0, 2]);
    if let (Some(scale), Some(state)) = (scale, plan.loss_scale_mut()) {
        state.write(&[scale, 0.0]).unwrap();
    }
    let direction: Vec<f64> = weights.iter().map(|_| size * random.normal()).collect();
    let [weights, direction] = [weights, direction].map(|vector| upload::<S::Master>(device, &vector));
    let results = [0, 1].map(|which| {
        let mut result = device.zeros::<S::Master>(weights.len()).unwrap();
        let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
        let (out, flags) = (result.view_mut(), flag.view_mut());
        match which {
            0 => plan.gradient(weights.view(), RunningStats::Keep, out, loss.view_mut(), flags).unwrap(),
            _ => plan.hessian_vector(weights.view(), direction.view(), out, flags).unwrap(),
        }
        assert_eq!(flag.to_vec().unwrap(), [0]);
        to_f64(&result.to_vec().unwrap())
    });
    let bits = results.iter().flat_map(|result| bits(result)).collect();
    (results, bits)
}

/// Without a ReLU, errors are a few roundings, on every device. The bits do not depend on the order of blocks or the
/// number of threads.
fn check_smooth<S: Compute>() {
    let ([gradient, product], _) = smooth_results::<f64>(&Device::host(), None);
    let mut seen: [Option<Vec<u64>>; 2] = [None, None];
    for (name, device) in devices() {
        let (found, bits) = smooth_results::<S>(&device, None);
        for (what, found, expected) in [("gradient", &found[0], &gradient), ("product", &found[1], &product)] {
            let error = relative_error(found, expected) / roundoff::<S>();
            println!("{} on {name}: {what} off by {error:.2} roundings", S::NAME);
            // TF32 rounds on the GPU alone.
            let most = if S::NAME == "tf32" && name.starts_with("cpu") { 0.01 } else { 2.0 };
            assert!(error < most, "{} on {name}: {what} off by {error:.2} roundings", S::NAME);
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
    check_smooth::<Bf16x3>();
    check_smooth::<Bf16x6>();
    check_smooth::<f16>();
    check_smooth::<bf16>();
}

/// A scale far below 1 makes gradients so small that f16 loses them, as it would lose those of a trained network
/// without a scale. At 1 the gradients of this network are large enough, and at 2^16 none overflows. bf16 has no scale.
#[test]
fn the_scale_keeps_small_gradients() {
    let device = Device::host();
    let ([expected, _], _) = smooth_results::<f64>(&device, None);
    let error = |scale: f64| relative_error(&smooth_results::<f16>(&device, Some(scale)).0[0], &expected);
    let [small, plain, large] = [2f64.powi(-12), 1.0, 65536.0].map(error);
    println!("relative error of the gradient with a scale of 2^-12: {small:.1e}, 1: {plain:.1e}, 2^16: {large:.1e}");
    let few = 2.0 * roundoff::<f16>();
    assert!(large < few && plain < few && small > 10.0 * large, "{small:.1e}, {plain:.1e}, {large:.1e}");
    let (graph, logits) = smooth(4);
    assert!(Plan::<bf16>::new(&device, graph, logits, PlanOptions::training()).unwrap().loss_scale().is_none());
}

/// A product with the Hessian is linear in its direction, however small or large. Without scaling, a direction as small
/// as a gradient near a minimum would vanish in f16.
#[test]
fn products_hold_for_directions_of_any_size() {
    let device = Device::host();
    let ([_, expected], _) = smooth_along::<f64>(&device, None, 0.1);
    for size in [1e-12, 1e-7, 1e-3, 1e4] {
        let ([_, found], _) = smooth_along::<f16>(&device, None, size);
        let brought_back: Vec<f64> = found.iter().map(|value| value * 0.1 / size).collect();
        let error = relative_error(&brought_back, &expected) / roundoff::<f16>();
        assert!(error < 2.0, "a direction of size {size:e}: off by {error:.2} roundings");
    }
}

fn settings<T: Scalar>(method: AnyMethod, len: usize) -> Settings<T> {
    let base = Base::Sgd { momentum: 0.9, nesterov: false };
    Settings { weight_decay: 5e-4, decay_len: len, ..method.over(base) }
}

fn small_resnet<S: Compute>(device: &Device) -> Plan<S> {
    let shape = Shape { batch: 6, height: 8, width: 8, channels: 3 };
    let model = CifarResNet { blocks: 1, shortcut: Shortcut::A };
    let (graph, logits) = model.trace(shape, 10).unwrap();
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&Random(3).vector::<S>(images.len())).unwrap();
    labels.write(&[1, 7, 0, 9, 3, 3]).unwrap();
    plan
}

/// A scale that overflows skips the whole step, whatever the passes of the method, and is halved until it fits. Then
/// steps are taken, and after enough of them the scale is doubled.
#[test]
fn an_overflow_skips_the_step_and_halves_the_scale() {
    for device in fast_devices() {
        for method in [AnyMethod::PLAIN, AnyMethod::sam(0.05), CrSam::default().into()] {
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
                optimizer.step(&mut plan, weights.view_mut(), 0.05).unwrap();
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
            optimizer.step(&mut plan, weights.view_mut(), 0.05).unwrap();
            assert_eq!(plan.loss_scale().unwrap().to_vec().unwrap(), [scale / 2.0, 0.0], "{method:?}");
        }
    }
}

/// A step that ends with an error does not change the scale.
#[test]
fn a_failed_step_leaves_the_scale_alone() {
    let device = Device::host();
    let mut plan = small_resnet::<f16>(&device);
    let len = plan.parameters().len();
    let mut weights = device.upload(&initial_weights(plan.parameters(), 2).unwrap()).unwrap();
    let method = SaSam { eta0: 0.05, ..SaSam::default() }.into();
    let mut optimizer = Optimizer::new(&device, len, settings(method, len)).unwrap();
    plan.loss_scale_mut().unwrap().write(&[1024.0, 7.0]).unwrap();
    let mut groups = Wrapped(Grouped { plan: &mut plan, groups: 2, show: |_: &mut Plan<f16>, _| Ok(()) });
    assert!(
        optimizer.step(&mut groups, weights.view_mut(), 0.05).is_err(),
        "it remembers, and cannot be taken in groups"
    );
    assert_eq!(plan.loss_scale().unwrap().to_vec().unwrap(), [1024.0, 7.0]);
}

/// The scale is a power of two, so steps do not depend on it unless a number vanishes or overflows.
#[test]
fn steps_do_not_depend_on_the_scale() {
    let device = Device::host();
    let moved = |scale: f64| {
        let mut plan = small_resnet::<f16>(&device);
        let len = plan.parameters().len();
        let start = initial_weights(plan.parameters(), 2).unwrap();
        let mut weights = device.upload(&start).unwrap();
        let mut optimizer = Optimizer::new(&device, len, settings(AnyMethod::sam(0.05), len)).unwrap();
        plan.loss_scale_mut().unwrap().write(&[scale, 0.0]).unwrap();
        for _ in 0..3 {
            optimizer.step(&mut plan, weights.view_mut(), 0.05).unwrap();
        }
        assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
        weights.to_vec().unwrap().iter().zip(&start).map(|(w, s)| f64::from(w - s)).collect::<Vec<f64>>()
    };
    let (one, other) = (moved(4096.0), moved(16384.0));
    // The remaining differences come from numbers that are subnormal under one of the scales.
    let difference = relative_error(&one, &other);
    println!("two scales differ by {difference:.1e}");
    assert!(difference < 1e-3, "{difference:.1e}");
}

/// The number that a convolution multiplies for `value`: the sum of the type's pieces.
fn in_pieces<S: Compute>(value: f64) -> f64 {
    let (mut rest, mut sum) = (value, 0.0);
    for _ in 0..S::PIECES {
        let piece = bf16::from_f32(rest as f32).to_f64();
        (rest, sum) = (rest - piece, sum + piece);
    }
    if S::PIECES > 0 { sum } else { value }
}

/// The cosine between a perturbation of length ρ and what the network sees of it, at initial weights. Where its
/// convolutions split the weights, that is the difference of what they multiply.
fn cosine_seen<S: Compute<Master = f32>>(device: &Device, model: Model, rho: f64) -> f64 {
    let (graph, logits) = model.trace(Shape { batch: 2, height: 32, width: 32, channels: 3 }, 10).unwrap();
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::evaluation()).unwrap();
    let weights = device.upload(&initial_weights(plan.parameters(), 1).unwrap()).unwrap();
    let mut direction = vec![0.0f32; weights.len()];
    for tensor in plan.parameters().tensors() {
        direction[tensor.range()].copy_from_slice(&Random(5).vector::<f32>(tensor.range().len()));
    }
    let direction = device.upload(&direction).unwrap();
    let mut norm = device.zeros(1).unwrap();
    vector::l2_norm(direction.view(), &mut Reduction::new(device).unwrap(), norm.view_mut()).unwrap();
    let (mut point, mut seen) = (device.zeros(weights.len()).unwrap(), device.poisoned(weights.len()).unwrap());
    vector::perturb(weights.view(), direction.view(), norm.view(), rho, point.view_mut(), None).unwrap();
    let (from, to, out) = (weights.view(), point.view(), seen.view_mut());
    plan.pass(Pass::RealizedStep { from, to, out }).unwrap();
    let (mut seen, direction) = (to_f64(&seen.to_vec().unwrap()), to_f64(&direction.to_vec().unwrap()));
    if !S::NARROW {
        let split = |at: &[f32]| to_f64(at).into_iter().map(in_pieces::<S>).collect::<Vec<f64>>();
        let (from, to) = (split(&weights.to_vec().unwrap()), split(&point.to_vec().unwrap()));
        seen = to.iter().zip(from).map(|(to, from)| to - from).collect();
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&seen, &direction) / (dot(&seen, &seen) * dot(&direction, &direction)).sqrt()
}

#[test]
fn roundings_of_the_perturbed_weights() {
    let device = Device::host();
    // The larger network runs no other code, so sanitizers skip it.
    let models = [("ResNet-20", "resnet20"), ("ResNet-18", "resnet18")];
    let count = if std::env::var_os("POLDER_SANITIZE").is_some() { 1 } else { models.len() };
    for (name, model) in models.into_iter().take(count) {
        let model = Model::from_name(model, None).unwrap();
        for rho in [0.05, 0.1] {
            let of = [cosine_seen::<f32>, cosine_seen::<f16>, cosine_seen::<bf16>];
            let [single, narrow, brain] = of.map(|cosine| cosine(&device, model, rho));
            let [two, three] = [cosine_seen::<Bf16x3>, cosine_seen::<Bf16x6>].map(|cosine| cosine(&device, model, rho));
            println!(
                "{name}, rho {rho}: f32 {single:.6}, bf16x6 {three:.6}, bf16x3 {two:.6}, f16 {narrow:.3}, bf16 {brain:.3}"
            );
            assert!(single > 0.9999 && narrow > 0.85 && brain < 0.85, "{name}: {single}, {narrow}, {brain}");
            assert!(two > 0.9999 && three > 0.999999, "{name}: {two}, {three}");
        }
    }
}

/// Batch norm and the classifier are not rounded, so a perturbation of these alone reaches the network unchanged.
#[test]
fn convolutions_alone_are_rounded() {
    for (name, device) in devices() {
        let mut plan = small_resnet::<bf16>(&device);
        let weights = initial_weights(plan.parameters(), 2).unwrap();
        let mut moved = weights.clone();
        let mut random = Random(9);
        for weight in &mut moved {
            *weight += 1e-4 * random.normal() as f32;
        }
        let mut seen = device.poisoned(weights.len()).unwrap();
        let (from, to) = (device.upload(&weights).unwrap(), device.upload(&moved).unwrap());
        let (from, to, out) = (from.view(), to.view(), seen.view_mut());
        plan.pass(Pass::RealizedStep { from, to, out }).unwrap();
        let seen = seen.to_vec().unwrap();
        for tensor in plan.parameters().tensors() {
            let narrow = matches!(tensor.kind, TensorKind::Convolution { .. });
            let round = |value: f32| if narrow { bf16::from_f32(value).to_f32() } else { value };
            for place in tensor.range() {
                let expected = round(moved[place]) - round(weights[place]);
                assert_eq!(seen[place], expected, "{name}: {} at {place}", tensor.name);
            }
        }
    }
}

/// The gradient and a product with the Hessian of a ResNet-8, tensor by tensor.
fn resnet_results<S: Compute>(device: &Device, shortcut: Shortcut) -> Vec<(String, [Vec<f64>; 2])> {
    let shape = Shape { batch: 12, height: 8, width: 8, channels: 3 };
    let (graph, logits) = CifarResNet { blocks: 1, shortcut }.trace(shape, 10).unwrap();
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    let mut random = Random(41);
    let weights = common::weights(&plan, &mut random);
    write_batch(&mut plan, &mut random, &[1, 7, 0, 9, 3, 3, 2, 5, 4, 6, 8, 1]);
    let direction: Vec<f64> = weights.iter().map(|_| 0.1 * random.normal()).collect();
    let [weights, direction] = [weights, direction].map(|vector| upload::<S::Master>(device, &vector));
    let [mut gradient, mut product] = std::array::from_fn(|_| device.zeros::<S::Master>(weights.len()).unwrap());
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    let (weights, keep) = (weights.view(), RunningStats::Keep);
    plan.gradient(weights, keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    plan.hessian_vector(weights, direction.view(), product.view_mut(), flag.view_mut()).unwrap();
    let results = [gradient, product].map(|result| to_f64(&result.to_vec().unwrap()));
    let tensors = plan.parameters().tensors().iter();
    tensors.map(|t| (t.name.clone(), results.each_ref().map(|result| result[t.range()].to_vec()))).collect()
}

/// On a GPU the backward of convolutions computes the masks of ReLUs, with and without a residual, and batch norm's
/// sums. The result is as near to double precision as on the CPU, where these are passes of their own. The error of a
/// tensor is a tenth at most, because rounding switches some ReLUs.
#[test]
fn sums_in_convolutions_are_as_good_as_those_of_their_own() {
    for shortcut in [Shortcut::A, Shortcut::B] {
        let exact = resnet_results::<f64>(&Device::host(), shortcut);
        let apart = resnet_results::<f16>(&Device::host(), shortcut);
        for (name, device) in devices().into_iter().filter(|(name, _)| !name.starts_with("cpu")).take(1) {
            let together = resnet_results::<f16>(&device, shortcut);
            for ((tensor, exact), (apart, together)) in exact.iter().zip(apart.iter().zip(&together)) {
                for (k, what) in ["gradient", "product"].into_iter().enumerate() {
                    let [apart, together] = [&apart.1[k], &together.1[k]].map(|found| relative_error(found, &exact[k]));
                    let found = format!("{name}, {tensor}: {what} off by {together:.1e}, apart by {apart:.1e}");
                    println!("{found}");
                    assert!(together < 0.15 && apart < 0.15, "{found}");
                }
            }
        }
    }
}

/// The curvature along the gradient from the losses at `w ± ρv` and from their gradients, and CR-SAM's direction in the
/// log form with α = 0.1.
fn along_the_gradient<S: Compute>(rho: f64) -> ([f64; 2], Vec<f64>) {
    let device = Device::host();
    let mut plan = small_resnet::<S>(&device);
    let weights = common::weights(&plan, &mut Random(41));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut pass = |w: &[f64]| {
        let w = upload::<S::Master>(&device, w);
        let mut gradient = device.zeros::<S::Master>(w.len()).unwrap();
        let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
        plan.gradient(w.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
        (loss.to_vec().unwrap()[0], to_f64(&gradient.to_vec().unwrap()))
    };
    let (l0, g) = pass(&weights);
    let norm = dot(&g, &g).sqrt();
    let moved = |by: f64| weights.iter().zip(&g).map(|(w, g)| w + by * g / norm).collect::<Vec<f64>>();
    let ((l1, g1), (l2, g2)) = (pass(&moved(rho)), pass(&moved(-rho)));
    let (a, b) = (l1 + l2 - 2.0 * l0, l1 - l2);
    let slope = (dot(&g, &g1) - dot(&g, &g2)) / norm / (2.0 * rho);
    let term = |k: usize| 0.1 / a * (g1[k] + g2[k] - 2.0 * g[k]) + 0.01 / b * (g1[k] - g2[k]);
    ([a / (rho * rho), slope], (0..g.len()).map(|k| g1[k] + term(k)).collect())
}

/// `A/ρ²` is a difference of losses over ρ², `v·(g₊ − g₋)/2ρ` one of gradients over ρ: in f32 the second loses less to
/// rounding. They are other numbers in a ReLU network, which bends where units switch.
#[test]
fn the_curvature_along_the_gradient_is_steadier_from_gradients_than_from_losses() {
    for rho in [0.1, 0.01] {
        let (exact, direction) = along_the_gradient::<f64>(rho);
        let of = [("f32", along_the_gradient::<f32>(rho)), ("f16", along_the_gradient::<f16>(rho))];
        for (name, (found, step)) in of {
            let [losses, gradients] = [0, 1].map(|k| (found[k] / exact[k] - 1.0).abs());
            let step = relative_error(&step, &direction);
            println!(
                "rho {rho}, {name}: relative errors of A/rho^2 {losses:.1e}, from gradients {gradients:.1e}, of the log \
                 form's direction {step:.1e}; {exact:?}"
            );
            // In f16 the gradients are rounded, too, and their difference vanishes in that at a small radius.
            assert!(name != "f32" || gradients < losses, "rho {rho}: {gradients} from gradients, {losses} from losses");
        }
    }
}

/// A plan that computes one gradient at a time.
struct OneByOne<'a, S: Compute>(&'a mut Plan<S>);

impl<S: Compute> Wrapper<S::Master> for OneByOne<'_, S> {
    fn inner(&self) -> &dyn Objective<S::Master> {
        self.0
    }

    fn inner_mut(&mut self) -> &mut dyn Objective<S::Master> {
        self.0
    }

    fn answer<'p>(&mut self, pass: Pass<'p, S::Master>) -> polder::device::Result<Answer<'p, S::Master>> {
        Ok(match pass {
            Pass::GradientDisplaced { .. } | Pass::GradientPairDisplaced { .. } => Answer::Split(pass),
            other => Answer::Forward(other),
        })
    }
}

/// Two steps, with weights that are rounded while they are displaced, or displaced first and rounded afterwards.
fn displaced_steps<S: Compute<Master = f32>>(
    device: &Device,
    method: AnyMethod,
    at_once: bool,
) -> (Vec<u64>, Vec<u64>) {
    let mut plan = small_resnet::<S>(device);
    let len = plan.len();
    let mut weights = upload::<f32>(device, &common::weights(&plan, &mut Random(41)));
    let mut optimizer = Optimizer::new(device, len, settings(method, len)).unwrap();
    for _ in 0..2 {
        if at_once {
            optimizer.step(&mut plan, weights.view_mut(), 0.05).unwrap();
        } else {
            optimizer.step(&mut Wrapped(OneByOne(&mut plan)), weights.view_mut(), 0.05).unwrap();
        }
    }
    assert_eq!(optimizer.telemetry().unwrap().skipped, 0, "{method:?} in {}", S::NAME);
    (bits(&weights.to_vec().unwrap()), bits(&plan.statistics().to_vec().unwrap()))
}

#[test]
fn weights_are_rounded_alike_as_they_are_displaced_and_after() {
    for device in fast_devices() {
        for method in [AnyMethod::sam(0.05), Gam::default().into()] {
            let [at_once, after] = [true, false].map(|at_once| displaced_steps::<f16>(&device, method, at_once));
            assert!(at_once == after, "{method:?} on {}", device.name());
        }
    }
    // With a GPU's launch shapes two passes of CR-SAM run at the same time, in either order.
    for (name, device) in devices() {
        let method = AnyMethod::from(CrSam::default());
        let [at_once, after] = [true, false].map(|at_once| displaced_steps::<bf16>(&device, method, at_once));
        assert!(at_once == after, "{name}");
    }
}

/// The telemetry reports how much of the perturbation is left after the weights are rounded, also through groups and
/// parts.
#[test]
fn telemetry_tells_what_rounding_leaves_of_the_perturbation() {
    fn cosine<S: Compute<Master = f32>>(device: &Device, groups: usize) -> f64 {
        let mut plan = small_resnet::<S>(device);
        let len = plan.parameters().len();
        let mut weights = device.upload(&initial_weights(plan.parameters(), 2).unwrap()).unwrap();
        let mut optimizer = Optimizer::new(device, len, settings(AnyMethod::sam(0.002), len)).unwrap();
        optimizer.observe(true);
        let mut accumulator = Accumulator::new(device, len, groups).unwrap();
        let mut batch = Wrapped(Grouped { plan: &mut plan, groups, show: |_: &mut Plan<S>, _| Ok(()) });
        optimizer.step(&mut accumulator.over(&mut batch), weights.view_mut(), 0.01).unwrap();
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

/// A plan refuses networks that 16 bits do not support.
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
