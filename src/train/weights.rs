//! Weights in files: safetensors with torchvision's names and shapes.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::de::{self, Deserializer as _, IgnoredAny, MapAccess};

use super::files::{read_regular, shown};
use super::{TrainError, write_whole};
use crate::arena::{Layout, Tensor};

/// Writes a model: parameters and running statistics under torchvision's names in f32, as PyTorch's `load_state_dict`
/// expects them. Each entry of `model` is a layout and the values of all its tensors, as long as the layout.
///
/// # Errors
/// Those of the file.
///
/// # Panics
/// If there are fewer values than the layout has.
pub fn save(path: &Path, model: &[(&Layout, &[f32])]) -> Result<(), TrainError> {
    let tensors: Vec<(&str, Vec<usize>, Vec<f32>)> = model
        .iter()
        .flat_map(|(layout, values)| {
            layout.tensors().iter().map(|tensor| {
                let stored = &values[tensor.range()];
                (tensor.name.as_str(), tensor.kind.file_shape(), tensor.kind.to_file(stored))
            })
        })
        .collect();
    let views: Vec<(&str, View<'_>)> = tensors
        .iter()
        .map(|(name, shape, values)| (*name, View { shape: shape.clone(), bytes: bytemuck::cast_slice(values) }))
        .collect();
    write(path, views, HashMap::from([("format".to_string(), "pt".to_string())]))
}

/// An f32 tensor for the writer.
pub(super) struct View<'a> {
    pub shape: Vec<usize>,
    pub bytes: &'a [u8],
}

impl safetensors::View for View<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes tensors to a file that appears whole or not at all: under a temporary name first, then renamed.
pub(super) fn write<'a>(
    path: &Path,
    tensors: Vec<(&str, View<'a>)>,
    metadata: HashMap<String, String>,
) -> Result<(), TrainError> {
    let bytes = safetensors::serialize(tensors, Some(metadata))
        .map_err(|error| TrainError::Weights { path: path.into(), reason: error.to_string() })?;
    write_whole(path, &bytes)
}

/// Reads a model into two arrays, as long as these two layouts: usually parameters and running statistics. Padding
/// between tensors becomes zero. Prefixes (`module.`, `_orig_mod.`, `model.`) and the usual other names (`linear` for
/// `fc`, `shortcut` for `downsample`) are accepted, `num_batches_tracked` is ignored, and f16, bf16 and f64 are
/// converted.
///
/// # Errors
/// A file that is not a safetensors file; a tensor that is missing, unknown or of another shape, as in a file of
/// another model.
pub fn load(path: &Path, layouts: [&Layout; 2]) -> Result<[Vec<f32>; 2], TrainError> {
    load_but(path, layouts, None)
}

/// The same without the layer of this name, such as `fc`: what the file has of it is left out, and its place is zero.
pub(super) fn load_but(path: &Path, layouts: [&Layout; 2], layer: Option<&str>) -> Result<[Vec<f32>; 2], TrainError> {
    let of_layer = |name: &str| layer.is_some_and(|layer| belongs_to(name, layer));
    let failed = |reason: String| TrainError::Weights { path: path.into(), reason };
    // At most eight bytes for each number. A file of a larger model is read as well, to say what it holds.
    let limit = layouts.iter().map(|layout| 8 * layout.len() as u64).sum::<u64>() + (1 << 30);
    let bytes = read_regular(path, limit)?;
    let file = parse(&bytes).map_err(|error| failed(format!("not a safetensors file, or a damaged one ({error})")))?;
    let mut arenas = layouts.map(|layout| vec![0.0f32; layout.len()]);
    let mut found = layouts.map(|layout| vec![false; layout.tensors().len()]);
    let mut unknown = Vec::new();
    for (name, view) in file.iter() {
        let known = canonical(name, |name| layouts.iter().any(|layout| layout.find(name).is_some()));
        if known.ends_with("num_batches_tracked") || of_layer(&known) {
            continue;
        }
        let place = layouts.iter().enumerate().find_map(|(role, layout)| {
            let index = layout.tensors().iter().position(|tensor| tensor.name == known)?;
            Some((role, index, &layout.tensors()[index]))
        });
        let Some((role, index, tensor)) = place else {
            unknown.push(name);
            continue;
        };
        let values = values(tensor, name, &view).map_err(&failed)?;
        arenas[role][tensor.range()].copy_from_slice(&tensor.kind.from_file(&values));
        if std::mem::replace(&mut found[role][index], true) {
            return Err(failed(format!("two tensors are `{}`", shown(&known, NAME))));
        }
    }
    let tensors = layouts.iter().zip(&found).flat_map(|(layout, found)| layout.tensors().iter().zip(found));
    let mut missing: Vec<&str> = tensors.filter(|(_, found)| !**found).map(|(tensor, _)| &*tensor.name).collect();
    missing.retain(|name| !of_layer(name));
    if !unknown.is_empty() || !missing.is_empty() {
        let list = |what: &str, names: &mut Vec<&str>| {
            names.sort_unstable();
            let more = names.len().saturating_sub(NAMES);
            let some = names.iter().take(NAMES).map(|name| format!("`{}`", shown(name, NAME)));
            let all: Vec<String> = some.chain((more > 0).then(|| format!("and {more} more"))).collect();
            (!all.is_empty()).then(|| format!("{what} {}", all.join(", ")))
        };
        let lists = [list("missing", &mut missing), list("unknown", &mut unknown)];
        let lists: Vec<String> = lists.into_iter().flatten().collect();
        return Err(failed(format!("the weights of another model: {}", lists.join("; "))));
    }
    Ok(arenas)
}

/// Whether a tensor is one of a layer: `fc.weight` of `fc`.
pub(super) fn belongs_to(name: &str, layer: &str) -> bool {
    name.strip_prefix(layer).is_some_and(|rest| rest.starts_with('.'))
}

/// The most characters of a tensor's name in an error, and the most names.
const NAME: usize = 80;
const NAMES: usize = 8;

/// The contents of a safetensors file.
pub(super) fn parse(bytes: &[u8]) -> Result<SafeTensors<'_>, String> {
    if let Some(name) = repeated_name(bytes) {
        return Err(format!("two tensors are named `{}`", shown(&name, NAME)));
    }
    SafeTensors::deserialize(bytes).map_err(|error| shown(&error.to_string(), 200))
}

/// A name that the header has twice, if it is readable: the format's reader would silently take the last of them.
fn repeated_name(bytes: &[u8]) -> Option<String> {
    let (length, rest) = bytes.split_first_chunk()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    serde_json::Deserializer::from_slice(header).deserialize_map(RepeatedName).ok()?
}

/// Finds a key that a map has twice.
struct RepeatedName;

impl<'de> de::Visitor<'de> for RepeatedName {
    type Value = Option<String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a map of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<String>, A::Error> {
        let (mut seen, mut repeated) = (HashSet::new(), None);
        while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
            if let Some(name) = seen.replace(name) {
                repeated.get_or_insert(name);
            }
        }
        Ok(repeated)
    }
}

/// The name that the model has: without the prefixes, and if the model does not know it so, as torchvision has it.
fn canonical(name: &str, is_known: impl Fn(&str) -> bool) -> String {
    // What `torch.compile`, data parallelism and common wrappers put before the names.
    let mut name = name;
    while let Some(rest) = ["module.", "_orig_mod.", "model."].iter().find_map(|prefix| name.strip_prefix(prefix)) {
        name = rest;
    }
    if is_known(name) {
        return name.into();
    }
    let name = name.replace(".shortcut.", ".downsample.");
    match name.strip_prefix("linear.") {
        Some(rest) => format!("fc.{rest}"),
        None => name,
    }
}

/// A tensor's values as f32, in the file's order.
fn values(tensor: &Tensor, name: &str, view: &TensorView<'_>) -> Result<Vec<f32>, String> {
    let expected = tensor.kind.file_shape();
    let name = shown(name, NAME);
    if view.shape() != expected {
        let found = shown(&format!("{:?}", view.shape()), 60);
        let stems = stem_difference(view.shape(), &expected);
        return Err(format!("tensor `{name}` has shape {found}, this model's has {expected:?}{stems}"));
    }
    let data = view.data();
    match view.dtype() {
        Dtype::F32 => Ok(elements(data, f32::from_le_bytes)),
        Dtype::F64 => Ok(elements(data, |bytes| f64::from_le_bytes(bytes) as f32)),
        Dtype::F16 => Ok(elements(data, |bytes| half::f16::from_le_bytes(bytes).to_f32())),
        Dtype::BF16 => Ok(elements(data, |bytes| half::bf16::from_le_bytes(bytes).to_f32())),
        other => Err(format!("tensor `{name}` holds {other:?}, expected floating-point numbers")),
    }
}

/// Why the first convolution of a ResNet may have another shape than in a file.
fn stem_difference(found: &[usize], expected: &[usize]) -> &'static str {
    let kernels = |from: usize, to: usize| found.ends_with(&[3, from, from]) && expected.ends_with(&[3, to, to]);
    match (kernels(7, 3), kernels(3, 7)) {
        (true, _) => ": the file's network has the stem for images of 64x64 and more, and these are smaller",
        (_, true) => ": the file's network has the stem for images below 64x64, and these are larger",
        _ => "",
    }
}

pub(super) fn elements<const N: usize, T>(data: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    data.chunks_exact(N)
        .map(|chunk| {
            let mut bytes = [0; N];
            bytes.copy_from_slice(chunk);
            convert(bytes)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::canonical;

    #[test]
    fn prefixes_and_other_names_of_tensors_are_accepted() {
        for (name, expected) in [
            ("layer1.0.conv1.weight", "layer1.0.conv1.weight"),
            ("module.layer2.0.shortcut.0.weight", "layer2.0.downsample.0.weight"),
            ("_orig_mod.linear.bias", "fc.bias"),
            ("module._orig_mod.fc.weight", "fc.weight"),
            ("_orig_mod.module.model.bn1.weight", "bn1.weight"),
            ("models.conv1.weight", "models.conv1.weight"),
        ] {
            assert_eq!(canonical(name, |_| false), expected);
        }
        let own = "stage_1.stage_1_bottleneck_0.shortcut.shortcut_bn.weight";
        assert_eq!(canonical(&format!("module.{own}"), |name| name == own), own);
    }
}
