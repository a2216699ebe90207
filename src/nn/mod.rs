//! Models by name, one file per family, and their initial weights.
//!
//! A model is a function that traces a network with the methods of [`Graph`], and an entry in [`MODELS`].
//! `docs/extending.md` shows how to add one. A network of your own needs no entry: whatever takes a
//! [`Network`](crate::plan::Network) takes any function from image shape and number of classes to a graph.

mod init;
mod pyramidnet;
mod resnet;
mod resnext;
mod vgg;
mod vision_transformer;
mod wide_resnet;

pub use init::initial_weights;
pub use pyramidnet::PyramidNet;
pub use resnet::{CifarResNet, ResNet, Shortcut};
pub use resnext::ResNeXt;
pub use vgg::Vgg;
pub use vision_transformer::VisionTransformer;
pub use wide_resnet::WideResNet;

use crate::arena::{Initial, TensorKind};
use crate::plan::{Graph, PlanError, Shape, Value};
use crate::settings::Choice;
use resnet::staged;

/// All models that have a name.
pub const MODELS: &[Registration] = &[
    Registration::new("resnet8", "CIFAR ResNet of 8 layers", Shortcut::BOTH, resnet::cifar::<8>),
    Registration::new("resnet20", "CIFAR ResNet of 20 layers", Shortcut::BOTH, resnet::cifar::<20>),
    Registration::new("resnet32", "CIFAR ResNet of 32 layers", Shortcut::BOTH, resnet::cifar::<32>),
    Registration::new("resnet44", "CIFAR ResNet of 44 layers", Shortcut::BOTH, resnet::cifar::<44>),
    Registration::new("resnet56", "CIFAR ResNet of 56 layers", Shortcut::BOTH, resnet::cifar::<56>),
    Registration::new("resnet110", "CIFAR ResNet of 110 layers", Shortcut::BOTH, resnet::cifar::<110>),
    Registration::new("resnet18", "ResNet-18", &[Shortcut::B], staged::<2, 2, 2, 2, false>),
    Registration::new("resnet34", "ResNet-34", &[Shortcut::B], staged::<3, 4, 6, 3, false>),
    Registration::new("resnet50", "ResNet-50", &[Shortcut::B], staged::<3, 4, 6, 3, true>),
    Registration::new("resnet101", "ResNet-101", &[Shortcut::B], staged::<3, 4, 23, 3, true>),
    Registration::new("resnet152", "ResNet-152", &[Shortcut::B], staged::<3, 8, 36, 3, true>),
    Registration::new("resnext50-32x4d", "ResNeXt-50 of 32 groups", &[Shortcut::B], resnet::resnext50),
    Registration::new("resnext29-8x64d", "ResNeXt-29 of 8 groups for CIFAR", &[], resnext::resnext29),
    Registration::new("wrn-16-8", "Wide ResNet of 16 layers, 8 times as wide", &[], wide_resnet::named::<16, 8>),
    Registration::new("wrn-28-10", "Wide ResNet of 28 layers, 10 times as wide", &[], wide_resnet::named::<28, 10>),
    Registration::new("wrn-40-2", "Wide ResNet of 40 layers, 2 times as wide", &[], wide_resnet::named::<40, 2>),
    Registration::new("wrn-40-10", "Wide ResNet of 40 layers, 10 times as wide", &[], wide_resnet::named::<40, 10>),
    Registration::new(
        "pyramidnet-110",
        "PyramidNet-110 with α = 270",
        &[],
        pyramidnet::named::<110, 270, false, false>,
    ),
    Registration::new(
        "pyramidnet-110-bottleneck",
        "PyramidNet-110 of bottlenecks, α = 270",
        &[],
        pyramidnet::named::<110, 270, true, false>,
    ),
    Registration::new(
        "pyramidnet-110-shakedrop",
        "PyramidNet-110 with α = 270 and ShakeDrop",
        &[],
        pyramidnet::named::<110, 270, false, true>,
    ),
    Registration::new(
        "pyramidnet-272",
        "PyramidNet-272 of bottlenecks, α = 200",
        &[],
        pyramidnet::named::<272, 200, true, false>,
    ),
    Registration::new(
        "pyramidnet-272-shakedrop",
        "PyramidNet-272 of bottlenecks with α = 200 and ShakeDrop",
        &[],
        pyramidnet::named::<272, 200, true, true>,
    ),
    Registration::new("vgg11-bn", "VGG-11 with batch norm for images of 32x32", &[], vgg::named::<1, 2>),
    Registration::new("vgg16-bn", "VGG-16 with batch norm for images of 32x32", &[], vgg::named::<2, 3>),
    Registration::new("vgg19-bn", "VGG-19 with batch norm for images of 32x32", &[], vgg::named::<2, 4>),
    Registration::new("vit-ti-4", "ViT-Tiny with patches of 4x4", &[], vision_transformer::named::<4, 192, 3, 0>),
    Registration::new("vit-ti-16", "ViT-Tiny with patches of 16x16", &[], vision_transformer::named::<16, 192, 3, 0>),
    Registration::new("vit-s-4", "ViT-Small with patches of 4x4", &[], vision_transformer::named::<4, 384, 6, 0>),
    Registration::new("vit-s-16", "ViT-Small with patches of 16x16", &[], vision_transformer::named::<16, 384, 6, 0>),
    Registration::new(
        "vit-ti-4-droppath",
        "ViT-Tiny with patches of 4x4 and stochastic depth",
        &[],
        vision_transformer::named::<4, 192, 3, 10>,
    ),
    Registration::new(
        "vit-ti-16-droppath",
        "ViT-Tiny with patches of 16x16 and stochastic depth",
        &[],
        vision_transformer::named::<16, 192, 3, 10>,
    ),
    Registration::new(
        "vit-s-4-droppath",
        "ViT-Small with patches of 4x4 and stochastic depth",
        &[],
        vision_transformer::named::<4, 384, 6, 10>,
    ),
    Registration::new(
        "vit-s-16-droppath",
        "ViT-Small with patches of 16x16 and stochastic depth",
        &[],
        vision_transformer::named::<16, 384, 6, 10>,
    ),
];

/// A model in [`MODELS`].
#[derive(Debug, Clone, Copy)]
pub struct Registration {
    /// The name by which [`Model::from_name`] finds it.
    pub name: &'static str,
    /// One line about it.
    pub summary: &'static str,
    /// The shortcuts it can have, the default first; empty where it has none.
    pub shortcuts: &'static [Shortcut],
    trace: Trace,
}

/// Traces a model for one batch of images, with these classes and this shortcut. A model without shortcuts ignores the
/// last.
type Trace = fn(Shape, usize, Shortcut) -> Result<(Graph, Value), PlanError>;

impl Registration {
    const fn new(name: &'static str, summary: &'static str, shortcuts: &'static [Shortcut], trace: Trace) -> Self {
        Self { name, summary, shortcuts, trace }
    }
}

/// How convolutions start in some families: normal with variance `2/(kernel² outputs)`.
fn fan_out(kind: TensorKind) -> Option<Initial> {
    match kind {
        TensorKind::Convolution { kernel, outputs, .. } => Some(Initial::HeNormal { fan: kernel * kernel * outputs }),
        _ => None,
    }
}

/// A network by name, with its options.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    registration: &'static Registration,
    shortcut: Shortcut,
}

/// A model name that is not known, or an option that the model does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnknownModel(String);

impl Model {
    /// The model of that name in [`MODELS`]. `shortcut` is for models with shortcuts; none means their default.
    ///
    /// # Errors
    /// An unknown name, or a shortcut that the model does not have.
    pub fn from_name(name: &str, shortcut: Option<Shortcut>) -> Result<Self, UnknownModel> {
        let Some(registration) = MODELS.iter().find(|model| model.name == name) else {
            let known: Vec<&str> = MODELS.iter().map(|model| model.name).collect();
            return Err(UnknownModel(format!("no model is named `{name}`; known: {}", known.join(", "))));
        };
        let offered = registration.shortcuts;
        if let Some(shortcut) = shortcut.filter(|shortcut| !offered.contains(shortcut)) {
            let words: Vec<&str> = offered.iter().map(|shortcut| shortcut.word()).collect();
            let offer = if offered.is_empty() { "none".into() } else { words.join(", ") };
            return Err(UnknownModel(format!("{name} has no shortcut `{shortcut}`; it has: {offer}")));
        }
        let default = offered.first().copied().unwrap_or_default();
        Ok(Self { registration, shortcut: shortcut.unwrap_or(default) })
    }

    /// The shortcuts that a user can choose between; empty if there is no choice.
    pub fn shortcuts(self) -> &'static [Shortcut] {
        match self.registration.shortcuts {
            [_] => &[],
            shortcuts => shortcuts,
        }
    }

    /// Traces the model for one batch of images; returns the graph and its logits.
    ///
    /// # Errors
    /// Images that do not fit the model: too small for its strides, or none.
    pub fn trace(self, images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        (self.registration.trace)(images, classes, self.shortcut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_traces_with_every_shortcut_that_it_has() {
        let images = Shape { batch: 2, height: 32, width: 32, channels: 3 };
        for (index, model) in MODELS.iter().enumerate() {
            assert!(
                MODELS[..index].iter().all(|other| other.name != model.name),
                "two models are named {}",
                model.name
            );
            assert!(!model.summary.is_empty(), "{}", model.name);
            for shortcut in [None, Some(Shortcut::A), Some(Shortcut::B)] {
                let offered = shortcut.is_none_or(|shortcut| model.shortcuts.contains(&shortcut));
                let Ok(found) = Model::from_name(model.name, shortcut) else {
                    assert!(!offered, "{} refuses {shortcut:?}", model.name);
                    continue;
                };
                assert!(offered, "{} takes {shortcut:?}", model.name);
                let (graph, logits) = found.trace(images, 7).unwrap();
                assert_eq!(graph.shape(logits), Shape { batch: 2, height: 1, width: 1, channels: 7 }, "{}", model.name);
            }
        }
        let refused = |name| Model::from_name(name, Some(Shortcut::A)).unwrap_err().to_string();
        assert_eq!(refused("resnet18"), "resnet18 has no shortcut `a`; it has: b");
        assert_eq!(refused("vgg11-bn"), "vgg11-bn has no shortcut `a`; it has: none");
        let unknown = Model::from_name("resnet9", None).unwrap_err().to_string();
        assert!(MODELS.iter().all(|model| unknown.contains(model.name)), "{unknown}");
    }
}
