//! Fine-tuning: which tensors are frozen, and the learning rates of the others.

use std::ops::Range;

use super::TrainError;
use super::settings::OptimizerSettings;
use crate::arena::Layout;
use crate::plan::{Graph, Network, PlanError, Shape, Value};

/// Whether a name matches a pattern, in which `*` stands for any characters and `?` for one.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match (pattern.get(p), star) {
            (Some(b'*'), _) => {
                star = Some((p, n));
                p += 1;
            }
            (Some(&letter), _) if letter == b'?' || letter == name[n] => (p, n) = (p + 1, n + 1),
            // The newest star takes one more character.
            (_, Some((at, from))) => {
                star = Some((at, from + 1));
                (p, n) = (at + 1, from + 1);
            }
            _ => return false,
        }
    }
    pattern[p..].iter().all(|&letter| letter == b'*')
}

fn matches_any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// Fails for a pattern that matches no tensor, and shows names like it.
fn check(setting: &str, pattern: &str, layout: &Layout) -> Result<(), TrainError> {
    let names = || layout.tensors().iter().map(|tensor| tensor.name.as_str());
    if names().any(|name| matches(pattern, name)) {
        return Ok(());
    }
    let mut near: Vec<(f64, &str)> = names().map(|name| (strsim::jaro_winkler(pattern, name), name)).collect();
    near.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let near: Vec<String> = near.iter().take(3).map(|(_, name)| format!("`{name}`")).collect();
    let reason = format!("`{pattern}` matches no tensor of the model; names like it are {}", near.join(", "));
    Err(TrainError::setting(setting, reason))
}

/// Fails for a pattern of `freeze` that matches none of the tensors of a model, and where nothing is left to train.
pub(super) fn check_frozen(patterns: &[String], layout: &Layout) -> Result<(), TrainError> {
    patterns.iter().try_for_each(|pattern| check("freeze", pattern, layout))?;
    if layout.tensors().iter().all(|tensor| matches_any(patterns, &tensor.name)) {
        return Err(TrainError::setting("freeze", "leaves no tensor to train"));
    }
    Ok(())
}

/// A network whose tensors of these patterns are frozen.
pub(super) fn frozen<'a>(
    network: Network<'a>,
    patterns: &'a [String],
) -> impl Fn(Shape, usize) -> Result<(Graph, Value), PlanError> + 'a {
    move |images, classes| {
        let (mut graph, logits) = network(images, classes)?;
        graph.freeze(|name| matches_any(patterns, name));
        Ok((graph, logits))
    }
}

/// A piece of the weights with a learning rate of its own.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    pub place: Range<usize>,
    /// What the learning rate is multiplied by.
    pub factor: f64,
    /// Whether weight decay acts on it.
    pub decays: bool,
}

/// The pieces of the weights, which are placed as `layout` says; none if all have one learning rate. `model` has the
/// tensors of the whole model, in their order in the network.
pub(super) fn pieces(settings: &OptimizerSettings, layout: &Layout, model: &Layout) -> Result<Vec<Piece>, TrainError> {
    let patterns = patterns(settings, model)?;
    let (layers, decay) = (layers(model), settings.layer_decay.unwrap_or(1.0));
    let last = layers.iter().copied().max().unwrap_or(0);
    let factor = |name: &str| {
        let index = model.tensors().iter().position(|tensor| tensor.name == name);
        let depth = index.map_or(0, |index| last - layers[index]);
        let own = patterns.iter().rev().find(|(pattern, _)| matches(pattern, name));
        // A network so deep that this underflows has no rate at its beginning.
        own.map_or(1.0, |(_, factor)| *factor) * decay.powi(i32::try_from(depth).unwrap_or(i32::MAX))
    };
    let mut tensors: Vec<_> = layout.tensors().iter().collect();
    tensors.sort_by_key(|tensor| tensor.offset);
    let mut pieces: Vec<Piece> = Vec::new();
    for tensor in tensors {
        let (factor, decays) = (factor(&tensor.name), !settings.no_decay_norm || tensor.kind.is_weight());
        match pieces.last_mut() {
            Some(piece) if piece.factor == factor && piece.decays == decays => piece.place.end = tensor.range().end,
            _ => pieces.push(Piece { place: tensor.range(), factor, decays }),
        }
    }
    let one_rate = pieces.iter().all(|piece| piece.factor == 1.0);
    Ok(if one_rate { Vec::new() } else { pieces })
}

/// Patterns and factors of `layer-rate`.
fn patterns<'a>(settings: &'a OptimizerSettings, model: &Layout) -> Result<Vec<(&'a str, f64)>, TrainError> {
    let read = |text: &'a String| {
        let parts = text.rsplit_once('=').and_then(|(pattern, factor)| Some((pattern, factor.parse().ok()?)));
        let Some((pattern, factor)) = parts.filter(|(_, factor): &(_, f64)| factor.is_finite() && *factor >= 0.0)
        else {
            let reason = format!("{text}, expected PATTERN=FACTOR with a finite number, 0 or more");
            return Err(TrainError::setting("layer-rate", reason));
        };
        check("layer-rate", pattern, model)?;
        Ok((pattern, factor))
    };
    settings.layer_rate.iter().flatten().map(read).collect()
}

/// The layer of each tensor, counted from the input. Tensors of one block, such as `layer1.0` and `features.3`, or of
/// one module outside of blocks, are a layer. Normalisation without a convolution beside it belongs to the layer
/// before.
fn layers(model: &Layout) -> Vec<usize> {
    let tensors = model.tensors();
    let blocks: Vec<&str> = tensors.iter().map(|tensor| block(&tensor.name)).collect();
    let has_weights =
        |name: &str| tensors.iter().zip(&blocks).any(|(tensor, of)| *of == name && tensor.kind.is_weight());
    let mut seen: Vec<&str> = Vec::new();
    let mut layers = Vec::new();
    for &name in &blocks {
        if has_weights(name) && !seen.contains(&name) {
            seen.push(name);
        }
        let own = seen.iter().position(|other| *other == name);
        layers.push(own.unwrap_or(seen.len().saturating_sub(1)));
    }
    layers
}

/// The part of a tensor's name that names its block: up to the first number (`layer1.0`), or else up to the last part
/// that ends in an underscore and a number (`stage_1.stage_1_bottleneck_0`), or else its module.
fn block(name: &str) -> &str {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|letter| letter.is_ascii_digit());
    let (mut end, mut numbered) = (0, None);
    for part in name.split('.') {
        end += part.len();
        if is_number(part) {
            return &name[..end];
        }
        if part.rsplit_once('_').is_some_and(|(_, number)| is_number(number)) {
            numbered = Some(end);
        }
        end += 1;
    }
    let module = || name.rsplit_once('.').map_or(name, |(module, _)| module);
    numbered.map_or_else(module, |end| &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Model;

    fn layout(model: &str) -> Layout {
        let images = Shape { batch: 2, height: 32, width: 32, channels: 3 };
        Model::from_name(model, None).unwrap().trace(images, 10).unwrap().0.parameters()
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("conv1.weight", "conv1.weight", true),
            ("conv1", "conv1.weight", false),
            ("layer1.*", "layer1.0.conv1.weight", true),
            ("layer1.*", "layer10.conv1.weight", false),
            ("*.weight", "layer1.0.bn1.weight", true),
            ("*.weight", "layer1.0.bn1.bias", false),
            ("layer?.*.bias", "layer3.0.bn1.bias", true),
            ("*bn*.b*s", "layer3.0.bn1.bias", true),
            ("*bn*.b*t", "layer3.0.bn1.bias", false),
            ("*", "", true),
            ("", "a", false),
            ("**a", "ba", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
        // No pattern takes long.
        assert!(!matches(&"*a".repeat(40), &"a".repeat(39)));
    }

    #[test]
    fn a_pattern_of_nothing_shows_names_like_it() {
        let layout = layout("resnet8");
        let error = check_frozen(&["layer1.*".into(), "conv1.weigth".into()], &layout).unwrap_err().to_string();
        assert!(
            error.starts_with("freeze: `conv1.weigth` matches no tensor of the model; names like it are"),
            "{error}"
        );
        assert!(error.contains("`conv1.weight`"), "{error}");
        let error = check_frozen(&["*".into()], &layout).unwrap_err().to_string();
        assert_eq!(error, "freeze: leaves no tensor to train");
        let rate = |text: &str| {
            let settings = OptimizerSettings { layer_rate: Some(vec![text.into()]), ..Default::default() };
            pieces(&settings, &layout, &layout).unwrap_err().to_string()
        };
        assert!(rate("layer9.*=2").contains("`layer9.*` matches no tensor"), "{}", rate("layer9.*=2"));
        for text in ["fc.*", "fc.*=-1", "fc.*=inf", "fc.*=x"] {
            let expected = format!("layer-rate: {text}, expected PATTERN=FACTOR with a finite number, 0 or more");
            assert_eq!(rate(text), expected);
        }
    }

    #[test]
    fn a_block_is_a_layer_and_normalisation_belongs_to_one() {
        let of = |model: &str, name: &str| {
            let layout = layout(model);
            let index = layout.tensors().iter().position(|tensor| tensor.name == name).unwrap();
            layers(&layout)[index]
        };
        let names =
            ["conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.0.bn2.weight", "layer2.0.conv1.weight"];
        assert_eq!(names.map(|name| of("resnet8", name)), [0, 0, 1, 1, 2]);
        assert_eq!((of("resnet8", "layer3.0.bn1.weight"), of("resnet8", "fc.bias")), (3, 4));
        assert_eq!(of("resnet20", "fc.weight"), 10);
        let names = ["features.0.weight", "features.1.weight", "features.4.weight", "classifier.bias"];
        assert_eq!(names.map(|name| of("vgg11-bn", name)), [0, 0, 1, 8]);
        let parts = ["conv_reduce.weight", "conv_conv.weight", "shortcut.shortcut_conv.weight", "bn_expand.bias"];
        let names = parts.map(|part| format!("stage_2.stage_2_bottleneck_0.{part}"));
        assert_eq!(names.map(|name| of("resnext29-8x64d", &name)), [4; 4]);
        let names = ["conv1.weight", "block1.layer.1.conv2.weight", "block3.layer.0.convShortcut.weight", "fc.bias"];
        assert_eq!(names.map(|name| of("wrn-16-8", name)), [0, 2, 5, 7]);
        let names = ["patch_embed.proj.bias", "blocks.0.norm1.bias", "blocks.11.mlp.fc2.weight", "head.weight"];
        assert_eq!(names.map(|name| of("vit-ti-4", name)), [0, 1, 12, 13]);
    }

    #[test]
    fn pieces_cover_every_tensor_with_its_rate() {
        let layout = layout("resnet8");
        let settings = OptimizerSettings {
            layer_rate: Some(vec!["*=0.5".into(), "fc.*=2".into()]),
            layer_decay: Some(0.1),
            no_decay_norm: true,
            ..Default::default()
        };
        let pieces = pieces(&settings, &layout, &layout).unwrap();
        for tensor in layout.tensors() {
            let of = |piece: &&Piece| piece.place.start <= tensor.offset && tensor.range().end <= piece.place.end;
            let found: Vec<&Piece> = pieces.iter().filter(of).collect();
            let layer = ["conv1", "layer1", "layer2", "layer3"].iter().position(|name| tensor.name.starts_with(name));
            let stem = tensor.name.starts_with("bn1");
            let expected = match (layer, stem) {
                (_, true) => 0.5 * 1e-4,
                (Some(layer), _) => 0.5 * 0.1f64.powi(4 - layer as i32),
                _ => 2.0,
            };
            assert!(found.len() == 1 && (found[0].factor / expected - 1.0).abs() < 1e-12, "{}: {found:?}", tensor.name);
            assert_eq!(found[0].decays, tensor.kind.is_weight(), "{}", tensor.name);
        }
        assert!(super::pieces(&OptimizerSettings::default(), &layout, &layout).unwrap().is_empty());
    }
}
