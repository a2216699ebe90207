//! The families of networks: small members against float64 PyTorch, models by name against the number of parameters of
//! their references, and steps that lower the loss.

use half::{bf16, f16};

use crate::common::fixtures::{fill_in_double, hash_weights, read_json};
use crate::common::methods::AnyMethod;
use crate::common::{Random, fast_devices, relative_error, to_f64, upload};
use crate::vgg;
use polder::arena::{Initial, TensorKind};
use polder::device::{Compute, Device, HostOptions, Tf32};
use polder::kernels::image::Position;
use polder::nn::{
    CifarResNet, Model, PyramidNet, ResNeXt, ResNet, Shortcut, Vgg, VisionTransformer, WideResNet, initial_weights,
};
use polder::objective::{ObjectiveExt, RunningStats};
use polder::optim::{Base, CrSam, Optimizer};
use polder::plan::{Graph, Plan, PlanError, PlanOptions, Shape, Value};
use polder::train::weights::{load, save};

type Trace = fn(Shape, usize) -> Result<(Graph, Value), PlanError>;

const BOTTLENECK_PYRAMID: PyramidNet = PyramidNet { blocks: 2, alpha: 9, bottleneck: true, shake_drop: None };
const SHAKEN_PYRAMID: PyramidNet = PyramidNet { blocks: 2, alpha: 20, bottleneck: false, shake_drop: Some(0.2) };

/// A ResNeXt of torchvision's form.
const fn resnext(group_width: usize) -> ResNet {
    ResNet { width: 16, blocks: [1, 1, 1, 1], bottleneck: true, groups: 4, group_width }
}

/// The networks of `networks.json` and `families.json`, by the names that they have there. PyramidNets have odd widths,
/// too. The last but four has images for which a ResNet has torchvision's stem.
const MEMBERS: [(&str, Trace); 11] = [
    ("bottleneck ResNet of width 8", |images, classes| {
        ResNet { width: 8, blocks: [1, 2, 1, 1], bottleneck: true, groups: 1, group_width: 64 }.trace(images, classes)
    }),
    ("WRN-10-1", |images, classes| WideResNet { blocks: 1, width: 1 }.trace(images, classes)),
    ("WRN-16-2", |images, classes| WideResNet { blocks: 2, width: 2 }.trace(images, classes)),
    ("PyramidNet-14, alpha 20", |images, classes| {
        PyramidNet { shake_drop: None, ..SHAKEN_PYRAMID }.trace(images, classes)
    }),
    ("bottleneck PyramidNet-20, alpha 9", |images, classes| BOTTLENECK_PYRAMID.trace(images, classes)),
    ("ResNeXt-11, 4 groups", |images, classes| {
        ResNeXt { blocks: 1, groups: 4, width: 4, widening: 2 }.trace(images, classes)
    }),
    ("ResNeXt of width 16", |images, classes| resnext(8).trace(images, classes)),
    ("ResNeXt of width 16 with its stem", |images, classes| resnext(16).trace(images, classes)),
    ("VGG-16 of width 4", |images, classes| Vgg { width: 4, convolutions: [2, 2, 3, 3, 3] }.trace(images, classes)),
    ("PyramidNet-14 with ShakeDrop", |images, classes| SHAKEN_PYRAMID.trace(images, classes)),
    ("PyramidNet-14 shaken", |images, classes| SHAKEN_PYRAMID.trace(images, classes)),
];

/// The references of [`MEMBERS`].
fn cases() -> Vec<serde_json::Value> {
    let of = |file: &str| read_json(file)["cases"].as_array().unwrap().clone();
    [of("networks.json"), of("families.json")].concat()
}

/// The images of a case.
fn images_of(case: &serde_json::Value) -> Shape {
    let [height, width] = ["height", "width"].map(|key| case[key].as_u64().unwrap() as usize);
    Shape { height, width, ..IMAGES }
}

const IMAGES: Shape = Shape { batch: 4, height: 16, width: 20, channels: 3 };

#[test]
fn small_members_match_pytorch_in_float64() {
    let cases = cases();
    assert_eq!(cases.len(), MEMBERS.len());
    for ((name, network), case) in MEMBERS.iter().zip(&cases) {
        assert_eq!(case["model"], *name);
        fast_devices().iter().for_each(|device| vgg::check::<f32>(device, case, network, 1e-4));
        vgg::check::<f64>(&Device::host(), case, network, 1e-12);
    }
}

/// The gradient of one of [`MEMBERS`] at the weights and images of its reference.
fn gradient<S: Compute>(device: &Device, number: usize) -> Vec<f64> {
    let case = &cases()[number];
    let (graph, logits) = MEMBERS[number].1(images_of(case), 10).unwrap();
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    fill_in_double(&mut plan, case["rows"].as_array().unwrap(), case);
    let weights = upload::<S::Master>(device, &hash_weights(plan.parameters()));
    let mut gradient = device.zeros::<S::Master>(weights.len()).unwrap();
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());
    plan.gradient(weights.view(), RunningStats::Keep, gradient.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    assert_eq!(flag.to_vec().unwrap(), [0], "{}", S::NAME);
    to_f64(&gradient.to_vec().unwrap())
}

/// Rounding switches a share of the ReLUs, and with 4 images each of them weighs much. So only gross errors show here;
/// the kernels have tests of their own.
#[test]
fn every_precision_takes_the_shapes_of_all_families() {
    let simt = Device::host_with(HostOptions { threads: 2, emulate_gpu: true, ..HostOptions::default() });
    for (which, device) in fast_devices().into_iter().chain([simt]).enumerate() {
        // The largest images would take long on an emulated GPU, the gradient of VGG at these weights is too large for
        // f16, and the last network is the one before it.
        for (number, (network, _)) in MEMBERS.iter().enumerate().filter(|(number, _)| ![7, 8, 10].contains(number)) {
            let exact = gradient::<f64>(&Device::host(), number);
            let near = |name: &str, found: Vec<f64>, tolerance: f64| {
                let error = relative_error(&found, &exact);
                println!("{network}, {name} on device {which}: relative error {error:.1e}");
                assert!(error < tolerance, "{network}, {name} on device {which}: relative error {error:.1e}");
            };
            near("f32", gradient::<f32>(&device, number), 1e-5);
            near("tf32", gradient::<Tf32>(&device, number), 0.3);
            near("f16", gradient::<f16>(&device, number), 0.3);
            near("bf16", gradient::<bf16>(&device, number), 0.6);
        }
    }
}

/// Counted in PyTorch from torchvision's definitions (with the CIFAR stem; VGG without biases before batch norm and
/// with one linear layer), from prlz77/ResNeXt.pytorch, xternalz/WideResNet-pytorch and dyhan0920/PyramidNet-PyTorch,
/// for 10 classes.
#[test]
fn models_by_name_have_the_parameters_of_their_references() {
    let images = Shape { batch: 2, height: 32, width: 32, channels: 3 };
    for (name, parameters, tensor, shape) in [
        ("resnet18", 11_173_962, "layer4.1.conv2.weight", vec![512, 512, 3, 3]),
        ("resnet34", 21_282_122, "layer3.5.conv2.weight", vec![256, 256, 3, 3]),
        ("resnet50", 23_520_842, "layer1.0.downsample.0.weight", vec![256, 64, 1, 1]),
        ("resnet101", 42_512_970, "layer3.22.conv3.weight", vec![1024, 256, 1, 1]),
        ("resnet152", 58_156_618, "layer2.7.conv2.weight", vec![128, 128, 3, 3]),
        ("wrn-16-8", 10_961_370, "block1.layer.0.bn1.weight", vec![16]),
        ("wrn-28-10", 36_479_194, "block1.layer.0.convShortcut.weight", vec![160, 16, 1, 1]),
        ("wrn-40-2", 2_243_546, "block3.layer.5.conv2.weight", vec![128, 128, 3, 3]),
        ("wrn-40-10", 55_841_754, "bn1.bias", vec![640]),
        ("pyramidnet-110", 28_485_477, "layer1.0.conv2.weight", vec![21, 21, 3, 3]),
        ("pyramidnet-110-bottleneck", 18_323_787, "layer1.0.conv1.weight", vec![24, 16, 1, 1]),
        ("pyramidnet-272", 26_210_842, "bn_final.weight", vec![864]),
        ("pyramidnet-110-shakedrop", 28_485_477, "layer1.0.conv2.weight", vec![21, 21, 3, 3]),
        ("pyramidnet-272-shakedrop", 26_210_842, "bn_final.weight", vec![864]),
        ("resnext29-8x64d", 34_426_698, "stage_2.stage_2_bottleneck_0.conv_conv.weight", vec![1024, 128, 3, 3]),
        ("resnext50-32x4d", 22_992_714, "layer4.2.conv2.weight", vec![1024, 32, 3, 3]),
        ("vgg16-bn", 14_724_042, "features.40.weight", vec![512, 512, 3, 3]),
        ("vgg19-bn", 20_035_018, "features.49.weight", vec![512, 512, 3, 3]),
    ] {
        let (graph, _) = Model::from_name(name, None).unwrap().trace(images, 10).unwrap();
        let layout = graph.parameters();
        assert_eq!(layout.parameters(), parameters, "{name}");
        let found = layout.find(tensor).unwrap_or_else(|| panic!("{name} has no {tensor}"));
        assert_eq!(found.kind.file_shape(), shape, "{name}: {tensor}");
    }
}

/// torchvision's own numbers for 1000 classes and images of 224x224, which have its stem.
#[test]
fn residual_networks_for_large_images_have_the_parameters_of_torchvision() {
    let images = Shape { batch: 1, height: 224, width: 224, channels: 3 };
    for (name, parameters) in [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("resnext50-32x4d", 25_028_904),
    ] {
        let model = Model::from_name(name, None).unwrap();
        let layout = model.trace(images, 1000).unwrap().0.parameters();
        assert_eq!(layout.parameters(), parameters, "{name}");
        assert_eq!(layout.find("conv1.weight").unwrap().kind.file_shape(), [64, 3, 7, 7]);
        // The stem depends on the smaller side.
        let kernel = |height, width| {
            let (graph, _) = model.trace(Shape { height, width, ..images }, 10).unwrap();
            graph.parameters().find("conv1.weight").unwrap().kind.file_shape()[3]
        };
        assert_eq!([kernel(64, 64), kernel(63, 80), kernel(80, 63)], [7, 3, 3], "{name}");
    }
}

#[test]
fn wide_resnets_pyramidnets_and_resnexts_start_as_in_their_references() {
    for (network, bias) in [
        (MEMBERS[2].1, Initial::Constant(0.0)),
        (MEMBERS[4].1, Initial::Uniform { fan_in: 100 }),
        (MEMBERS[5].1, Initial::Constant(0.0)),
    ] {
        let layout = network(IMAGES, 10).unwrap().0.parameters();
        for tensor in layout.tensors() {
            if let TensorKind::Convolution { kernel, outputs, .. } = tensor.kind {
                assert_eq!(tensor.initial, Initial::HeNormal { fan: kernel * kernel * outputs }, "{}", tensor.name);
            }
        }
        let last = layout.tensors().iter().find(|tensor| ["fc.bias", "classifier.bias"].contains(&&*tensor.name));
        assert_eq!(last.unwrap().initial, bias);
    }
}

#[test]
fn pyramidnets_refuse_images_that_they_cannot_halve_twice() {
    for (height, width) in [(30, 32), (32, 33), (28, 26)] {
        let refused = BOTTLENECK_PYRAMID.trace(Shape { height, width, ..IMAGES }, 10).map(|_| ()).unwrap_err();
        let expected =
            format!("PyramidNet: expected images whose height and width are multiples of 4, found {height}x{width}");
        assert_eq!(refused.to_string(), expected);
    }
}

/// The losses of steps on one batch.
pub fn losses<S: Compute>(device: &Device, (graph, logits): (Graph, Value), method: AnyMethod) -> Vec<f64> {
    let case = &cases()[0];
    let mut plan = Plan::<S>::new(device, graph, logits, PlanOptions::training()).unwrap();
    fill_in_double(&mut plan, case["rows"].as_array().unwrap(), case);
    let start: Vec<f64> = to_f64(&initial_weights(plan.parameters(), 3).unwrap());
    let mut weights = upload::<S::Master>(device, &start);
    let settings = method.over(Base::Sgd { momentum: 0.9, nesterov: false });
    let mut optimizer = Optimizer::new(device, start.len(), settings).unwrap();
    let step = |_| {
        optimizer.step(&mut plan, weights.view_mut(), 0.02).unwrap();
        optimizer.telemetry().unwrap().loss
    };
    (0..10).map(step).collect()
}

#[test]
fn steps_of_sgd_sam_and_cr_sam_lower_the_loss() {
    let basic = CifarResNet { blocks: 1, shortcut: Shortcut::A };
    // The last network is the one before it, whose factors are drawn.
    let networks = MEMBERS[..10].iter().zip(cases()).map(|((_, network), case)| network(images_of(&case), 10));
    let networks = networks.chain([basic.trace(IMAGES, 10)]);
    for (number, network) in networks.enumerate() {
        let network = network.unwrap();
        for method in [AnyMethod::PLAIN, AnyMethod::sam(0.05), CrSam::default().into()] {
            for device in fast_devices() {
                let losses = losses::<f32>(&device, network.clone(), method);
                println!("network {number}, {method:?}: {losses:.3?}");
                // ShakeDrop's expected factors leave little of its last branches.
                let share = if number == 9 { 0.7 } else { 0.5 };
                assert!(losses[9] < share * losses[0], "network {number}, {method:?}: {losses:?}");
            }
        }
    }
}

/// One member of each family of convolutions in groups, max pools, shaken branches and attention, so small that an
/// interpreter of a GPU's code trains it in seconds. With the side of its images.
const TINY: [(&str, usize, Trace); 4] = [
    ("ResNeXt", 8, |images, classes| ResNeXt { blocks: 1, groups: 2, width: 4, widening: 2 }.trace(images, classes)),
    ("VGG", 32, |images, classes| Vgg { width: 2, convolutions: [1, 1, 1, 1, 1] }.trace(images, classes)),
    ("PyramidNet", 8, |images, classes| {
        PyramidNet { blocks: 1, alpha: 4, bottleneck: false, shake_drop: Some(0.8) }.trace(images, classes)
    }),
    ("ViT", 8, |images, classes| {
        VisionTransformer { patch: 4, width: 16, depth: 1, heads: 2, drop_path: 0.0 }.trace(images, classes)
    }),
];

#[test]
fn tiny_members_train_on_every_device() {
    const STEPS: usize = 4;
    for (name, side, network) in TINY {
        for method in [AnyMethod::PLAIN, AnyMethod::sam(0.05), CrSam::default().into()] {
            for device in fast_devices() {
                let shape = Shape { batch: 4, height: side, width: side, channels: 3 };
                let (graph, logits) = network(shape, 4).unwrap();
                let mut plan = Plan::<f32>::new(&device, graph, logits, PlanOptions::training()).unwrap();
                let (mut images, mut labels) = plan.batch_mut().unwrap();
                images.write(&Random(5).vector::<f32>(images.len())).unwrap();
                labels.write(&[2, 0, 3, 1]).unwrap();
                let mut weights = upload::<f32>(&device, &hash_weights(plan.parameters()));
                let settings = method.over(Base::Sgd { momentum: 0.9, nesterov: false });
                let mut optimizer = Optimizer::new(&device, weights.len(), settings).unwrap();
                let losses: Vec<f64> = (0..STEPS)
                    .map(|_| {
                        // The same factors in each step, so that the losses are those of one function.
                        plan.draw(7, Position::default()).unwrap();
                        optimizer.step(&mut plan, weights.view_mut(), 0.05).unwrap();
                        optimizer.telemetry().unwrap().loss
                    })
                    .collect();
                println!("{name}, {method:?} on {}: {losses:.3?}", device.name());
                assert!(losses[STEPS - 1] < 0.9 * losses[0], "{name}, {method:?} on {}: {losses:?}", device.name());
                assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
            }
        }
    }
}

/// The shape of the first convolution tells the stems apart, so weights of one are refused by a network with the other.
#[test]
fn weights_of_another_stem_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let layouts = |side: usize| {
        let (graph, _) = resnext(16).trace(Shape { height: side, width: side, ..IMAGES }, 10).unwrap();
        [graph.parameters(), graph.statistics()]
    };
    for (of, other, expected) in [(32, 64, "the stem for images below 64x64"), (64, 32, "images of 64x64 and more")] {
        let [parameters, statistics] = layouts(of);
        let (weights, values) = (hash_weights(&parameters), vec![0.5f32; statistics.len()]);
        let weights: Vec<f32> = weights.into_iter().map(|weight| weight as f32).collect();
        save(&file, &[(&parameters, &weights), (&statistics, &values)]).unwrap();
        let found = load(&file, [&parameters, &statistics]).unwrap();
        assert_eq!(found[0], weights);
        let [parameters, statistics] = layouts(other);
        let refused = load(&file, [&parameters, &statistics]).unwrap_err().to_string();
        assert!(refused.contains("`conv1.weight`") && refused.contains(expected), "{refused}");
    }
}

/// A shortcut of `prlz77/ResNeXt.pytorch` keeps its name, though other files' shortcuts are torchvision's `downsample`.
#[test]
fn members_read_back_the_weights_that_they_have_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    for ((name, network), case) in MEMBERS.iter().zip(cases()) {
        let (graph, _) = network(images_of(&case), 10).unwrap();
        let (parameters, statistics) = (graph.parameters(), graph.statistics());
        let weights: Vec<f32> = hash_weights(&parameters).into_iter().map(|weight| weight as f32).collect();
        let values = vec![0.5f32; statistics.len()];
        save(&file, &[(&parameters, &weights), (&statistics, &values)]).unwrap();
        let [found, _] = load(&file, [&parameters, &statistics]).unwrap();
        assert!(found == weights, "{name}");
    }
}
