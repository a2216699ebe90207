//! Runs of the training loop on generated images: every family of networks learns something in a few steps, and so does
//! Muon by its name alone.

use crate::drop_path::{SHAKEN, block};
use polder::data::{SyntheticSpec, synthetic};
use polder::nn::{ResNeXt, ResNet, Vgg, VisionTransformer, WideResNet};
use polder::optim::Decay;
use polder::plan::Network;
use polder::train::{
    Augmentation, BaseName, DataSettings, LoopSettings, OptimizerSettings, Progress, Record, RunSettings, SgdSettings,
    Training,
};

/// A run of so many steps.
pub fn settings(method: &str, steps: u64, log_every: u64) -> RunSettings {
    RunSettings {
        data: DataSettings { batch_size: 32, ..DataSettings::default() },
        optimizer: OptimizerSettings { optimizer: method.parse().unwrap(), ..OptimizerSettings::default() },
        sgd: SgdSettings { lr: 0.1, ..SgdSettings::default() },
        run: LoopSettings {
            steps: Some(steps),
            log_every,
            // The rate must not depend on the number of steps.
            schedule: Decay::Constant,
            device: "cpu".into(),
            ..LoopSettings::default()
        },
        ..RunSettings::default()
    }
}

/// Mean losses of the epochs of a run on 512 generated images.
fn epoch_losses(network: Network<'_>, side: usize, settings: RunSettings) -> Vec<f64> {
    let data = synthetic(&SyntheticSpec { train: 512, test: 32, side, seed: 0 }).unwrap();
    let mut losses = Vec::new();
    let mut seen = |progress| {
        if let Progress::Epoch(Record::Epoch { train_loss, .. }) = progress {
            losses.extend(train_loss);
        }
    };
    let training = Training::new(settings).network("small", network).dataset(data);
    training.run_with(&std::sync::atomic::AtomicBool::new(false), &mut seen).unwrap();
    losses
}

#[test]
fn families_train_on_generated_images() {
    let wide = |images, classes| WideResNet { blocks: 1, width: 1 }.trace(images, classes);
    let bottleneck = ResNet { width: 8, blocks: [1, 1, 1, 1], bottleneck: true, groups: 1, group_width: 64 };
    let bottleneck = |images, classes| bottleneck.trace(images, classes);
    let resnext = |images, classes| ResNeXt { blocks: 1, groups: 4, width: 4, widening: 2 }.trace(images, classes);
    let vgg = |images, classes| Vgg { width: 4, convolutions: [1, 1, 1, 1, 1] }.trace(images, classes);
    let vit = VisionTransformer { patch: 4, width: 24, depth: 2, heads: 3, drop_path: 0.0 };
    let vit = |images, classes| vit.trace(images, classes);
    let shaken = |images, classes| SHAKEN.trace(images, classes);
    let dropped = |images, classes| block(images, classes, 0.2);
    let networks: [(&str, Network<'_>, usize); 7] = [
        ("WRN-10-1", &wide, 16),
        ("bottleneck ResNet", &bottleneck, 16),
        ("ResNeXt", &resnext, 16),
        ("VGG", &vgg, 32),
        ("ViT", &vit, 16),
        ("ShakeDrop", &shaken, 16),
        ("drop path", &dropped, 16),
    ];
    for (name, network, side) in networks {
        for method in ["sgd", "sam", "cr-sam"] {
            let mut settings = settings(method, 96, 0);
            if (name, method) == ("VGG", "cr-sam") {
                // At 0.1 its loss may leap up: to 11 with one order of rounding, not with another.
                settings.sgd.lr = 0.05;
            }
            let losses = epoch_losses(network, side, settings);
            println!("{name}, {method}: {losses:.3?}");
            // CR-SAM, except with the VGG, and with SGD the ViT, come no further than guessing, 2.303, in so few steps.
            assert!(losses.len() == 6 && losses[5] < 0.99 * losses[0], "{name}, {method}: {losses:?}");
        }
    }
}

/// At its default rate, alone and under SAM, without augmentation. Guessing has a loss of 2.303.
#[test]
fn muon_trains_by_its_name_alone() {
    let resnet = ResNet { width: 8, blocks: [1, 1, 1, 1], bottleneck: false, groups: 1, group_width: 64 };
    let resnet = |images, classes| resnet.trace(images, classes);
    let vit = VisionTransformer { patch: 4, width: 24, depth: 2, heads: 3, drop_path: 0.0 };
    let vit = |images, classes| vit.trace(images, classes);
    let networks: [(&str, Network<'_>, f64); 2] = [("ResNet", &resnet, 1.0), ("ViT", &vit, 2.2)];
    for (name, network, most) in networks {
        for (method, base) in [("muon", BaseName::Sgd), ("sam", BaseName::Muon)] {
            let mut settings = settings(method, 96, 0);
            settings.optimizer.base = base;
            settings.data.augment = Augmentation::None;
            let losses = epoch_losses(network, 16, settings);
            println!("{name}, {method}: {losses:.3?}");
            assert!(losses[5] < most, "{name}, {method}: {losses:?}");
        }
    }
}
