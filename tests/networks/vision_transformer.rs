//! Vision transformers: small ones against float64 PyTorch, those by name against timm's numbers of parameters, every
//! precision, and steps that lower the loss.

use half::{bf16, f16};

use crate::common::fixtures::{Pool, hash_weights, read_json};
use crate::common::methods::AnyMethod;
use crate::common::{fast_devices, relative_error, to_f64, upload};
use crate::families::losses;
use crate::vgg;
use polder::arena::{Initial, TensorKind};
use polder::device::{Compute, Device, HostOptions, Tf32};
use polder::kernels::image::Position;
use polder::nn::{Model, VisionTransformer};
use polder::objective::{ObjectiveExt, RunningStats};
use polder::optim::CrSam;
use polder::plan::{Plan, PlanOptions, Shape};

const IMAGES: Shape = Shape { batch: 4, height: 16, width: 20, channels: 3 };
/// Those of `vision-transformers.json`.
pub const MEMBERS: [VisionTransformer; 2] = [
    VisionTransformer { patch: 4, width: 24, depth: 3, heads: 3, drop_path: 0.0 },
    VisionTransformer { patch: 2, width: 128, depth: 1, heads: 2, drop_path: 0.0 },
];

#[test]
fn small_members_match_pytorch_in_float64() {
    let cases = read_json("vision-transformers.json");
    let cases = cases["cases"].as_array().unwrap();
    assert_eq!(cases.len(), MEMBERS.len());
    for (member, case) in MEMBERS.iter().zip(cases) {
        let network = |images, classes| member.trace(images, classes);
        fast_devices().iter().for_each(|device| vgg::check::<f32>(device, case, &network, 1e-5));
        vgg::check::<f64>(&Device::host(), case, &network, 1e-12);
    }
}

fn gradient<S: Compute>(device: &Device, member: VisionTransformer, case: &serde_json::Value) -> Vec<f64> {
    let (graph, logits) = member.trace(IMAGES, 10).unwrap();
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    Pool::cropped(device, IMAGES.height, IMAGES.width).fill(&mut plan, case["rows"].as_array().unwrap(), case);
    let weights = upload::<S::Master>(device, &hash_weights(plan.parameters()));
    let mut gradient = device.zeros::<S::Master>(weights.len()).unwrap();
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    plan.gradient(weights.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    assert_eq!(flag.to_vec().unwrap(), [0], "{}", S::NAME);
    to_f64(&gradient.to_vec().unwrap())
}

/// Nothing switches here, unlike in a network of ReLUs, so the errors are those of rounding.
#[test]
fn every_precision_is_near_the_exact_gradient() {
    let cases = read_json("vision-transformers.json");
    let simt = Device::host_with(HostOptions { threads: 2, emulate_gpu: true, ..HostOptions::default() });
    for (member, case) in MEMBERS.into_iter().zip(cases["cases"].as_array().unwrap()) {
        let exact = gradient::<f64>(&Device::host(), member, case);
        for (which, device) in fast_devices().into_iter().chain([simt.clone()]).enumerate() {
            let near = |name: &str, found: Vec<f64>, tolerance: f64| {
                let error = relative_error(&found, &exact);
                println!("{member:?}, {name} on device {which}: relative error {error:.1e}");
                assert!(error < tolerance, "{member:?}, {name} on device {which}: relative error {error:.1e}");
            };
            near("f32", gradient::<f32>(&device, member, case), 2e-6);
            near("tf32", gradient::<Tf32>(&device, member, case), 5e-3);
            near("f16", gradient::<f16>(&device, member, case), 5e-3);
            near("bf16", gradient::<bf16>(&device, member, case), 4e-2);
        }
    }
}

/// Counted in timm from `VisionTransformer(img_size=32, num_classes=10, …)`.
#[test]
fn models_by_name_have_the_parameters_of_their_references() {
    let images = Shape { batch: 2, height: 32, width: 32, channels: 3 };
    for (name, parameters, tensor, shape) in [
        ("vit-ti-4", 5_362_762, "pos_embed", vec![1, 65, 192]),
        ("vit-ti-16", 5_489_482, "patch_embed.proj.weight", vec![192, 3, 16, 16]),
        ("vit-s-4", 21_342_346, "blocks.11.attn.qkv.weight", vec![1152, 384]),
        ("vit-s-16", 21_595_786, "cls_token", vec![1, 1, 384]),
    ] {
        let (graph, _) = Model::from_name(name, None).unwrap().trace(images, 10).unwrap();
        let layout = graph.parameters();
        assert_eq!(layout.parameters(), parameters, "{name}");
        let found = layout.find(tensor).unwrap_or_else(|| panic!("{name} has no {tensor}"));
        assert_eq!(found.kind.file_shape(), shape, "{name}: {tensor}");
    }
}

#[test]
fn weights_start_as_in_timm() {
    let layout = MEMBERS[0].trace(IMAGES, 10).unwrap().0.parameters();
    let initial = |name: &str| layout.find(name).unwrap().initial;
    assert_eq!(initial("blocks.1.attn.qkv.weight"), Initial::Normal { std: 0.02 });
    assert_eq!(initial("head.weight"), Initial::Normal { std: 0.02 });
    assert_eq!(initial("blocks.2.mlp.fc2.bias"), Initial::Constant(0.0));
    assert_eq!(initial("patch_embed.proj.weight"), Initial::Uniform { fan_in: 48 });
    assert_eq!(initial("patch_embed.proj.bias"), Initial::Uniform { fan_in: 48 });
    assert_eq!(initial("cls_token"), Initial::Normal { std: 1e-6 });
    assert_eq!(initial("pos_embed"), Initial::Normal { std: 0.02 });
    // As in timm, positions and the class token are exempt from weight decay where biases are.
    for tensor in layout.tensors() {
        let decays = matches!(
            tensor.kind,
            TensorKind::Convolution { .. } | TensorKind::Projection { .. } | TensorKind::Linear { .. }
        );
        assert_eq!(tensor.kind.is_weight(), decays, "{}", tensor.name);
    }
}

#[test]
fn images_that_the_patches_do_not_divide_are_refused() {
    let refused = MEMBERS[0].trace(Shape { height: 18, ..IMAGES }, 10).map(|_| ()).unwrap_err().to_string();
    let expected = "VisionTransformer: expected images whose height and width are multiples of 4, found 18x20";
    assert_eq!(refused, expected);
    let narrow = VisionTransformer { width: 25, ..MEMBERS[0] };
    let refused = narrow.trace(IMAGES, 10).map(|_| ()).unwrap_err().to_string();
    assert_eq!(refused, "VisionTransformer: 3 heads do not divide a width of 25");
}

/// Stochastic depth adds no parameters, changes nothing before a draw, and a draw changes the loss.
#[test]
fn stochastic_depth_leaves_branches_out() {
    let cases = read_json("vision-transformers.json");
    let case = &cases["cases"][0];
    let dropping = VisionTransformer { drop_path: 0.6, ..MEMBERS[0] };
    let device = Device::host();
    assert_eq!(gradient::<f64>(&device, dropping, case), gradient::<f64>(&device, MEMBERS[0], case));
    let (graph, logits) = dropping.trace(IMAGES, 10).unwrap();
    let mut plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
    Pool::cropped(&device, IMAGES.height, IMAGES.width).fill(&mut plan, case["rows"].as_array().unwrap(), case);
    let weights = upload::<f64>(&device, &hash_weights(plan.parameters()));
    let mut gradient = device.zeros::<f64>(weights.len()).unwrap();
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    let mut losses = Vec::new();
    for first in [0, 0, 4, 8] {
        plan.draw(5, Position { first, clock: None }).unwrap();
        let (gradient, flag) = (gradient.view_mut(), flag.view_mut());
        plan.gradient(weights.view(), RunningStats::Keep, gradient, loss.view_mut(), flag).unwrap();
        losses.push(loss.to_vec().unwrap()[0]);
    }
    assert!(losses[0] == losses[1] && losses[0] != losses[2] && losses[2] != losses[3], "{losses:?}");
}

#[test]
fn steps_of_sgd_sam_and_cr_sam_lower_the_loss() {
    for method in [AnyMethod::PLAIN, AnyMethod::sam(0.05), CrSam::default().into()] {
        for device in fast_devices() {
            let losses = losses::<f32>(&device, MEMBERS[0].trace(IMAGES, 10).unwrap(), method);
            println!("{method:?}: {losses:.3?}");
            assert!(losses[9] < 0.5 * losses[0], "{method:?}: {losses:?}");
        }
    }
}
