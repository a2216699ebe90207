//! Vectors in safetensors files: the two sides of a comparison exchange them this way.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};

use crate::protocol::Answer;

/// Reads floating-point tensors, each given by its name and its expected number of elements.
pub fn read<const N: usize>(path: &Path, tensors: [(&str, usize); N]) -> Answer<[Vec<f64>; N]> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let file = std::fs::read(path).map_err(|error| named(&error))?;
    let given = SafeTensors::deserialize(&file).map_err(|error| named(&error))?;
    let mut all = [(); N].map(|()| Vec::new());
    for (values, (name, len)) in all.iter_mut().zip(tensors) {
        let tensor = given.tensor(name).map_err(|error| format!("{name}: {error}"))?;
        let data = tensor.data();
        *values = match tensor.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|&bytes| f64::from(f32::from_le_bytes(bytes))).collect(),
            Dtype::F64 => data.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect(),
            other => return Err(format!("{name}: {other:?} is neither F32 nor F64").into()),
        };
        if values.len() != len {
            return Err(format!("{name}: {} values, expected {len}", values.len()).into());
        }
    }
    Ok(all)
}

pub fn write(path: &Path, tensors: &[(&str, Vec<f32>)]) -> Answer<()> {
    let views = tensors.iter().map(|(name, values)| {
        TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values)).map(|view| (*name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    Ok(serialize_to_file(views, None, path).map_err(|error| format!("{}: {error}", path.display()))?)
}
