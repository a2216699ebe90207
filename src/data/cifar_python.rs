//! CIFAR-10 and CIFAR-100 in their Python versions: each file is a pickled dictionary with an array of 3072 bytes per
//! image (its red, green and blue planes) and a list of labels. `pickle.rs` reads it and executes nothing.

use std::path::Path;

use super::cifar::{self, CIFAR10_SET, CIFAR100_SET, Layout, SHAPE};
use super::pickle::Pickle;
use super::{DataError, Format, Growing, Recognise};

/// CIFAR-10.
pub(super) const CIFAR10: Format = Format {
    name: "cifar-10 (Python version)",
    files: "data_batch_1 and test_batch (CIFAR-10, Python version)",
    recognise: Recognise::ByFiles {
        holds: |folder| cifar::has_files(&CIFAR10_PYTHON, folder),
        below: &["cifar-10-batches-py"],
    },
    load: |folder| cifar::load(&CIFAR10_PYTHON, folder),
    load_split: |folder, split| cifar::load_split(&CIFAR10_PYTHON, folder, split),
};

/// CIFAR-100.
pub(super) const CIFAR100: Format = Format {
    name: "cifar-100 (Python version)",
    files: "train, test and meta (CIFAR-100, Python version)",
    recognise: Recognise::ByFiles {
        holds: |folder| cifar::has_files(&CIFAR100_PYTHON, folder),
        below: &["cifar-100-python"],
    },
    load: |folder| cifar::load(&CIFAR100_PYTHON, folder),
    load_split: |folder, split| cifar::load_split(&CIFAR100_PYTHON, folder, split),
};

/// The Python version of CIFAR-10.
pub(super) static CIFAR10_PYTHON: Layout = Layout {
    set: &CIFAR10_SET,
    train_files: &["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"],
    test_file: "test_batch",
    index: None,
    record: None,
    decode: |path, bytes, images| decode("labels", path, bytes, images),
};

/// The Python version of CIFAR-100.
pub(super) static CIFAR100_PYTHON: Layout = Layout {
    set: &CIFAR100_SET,
    train_files: &["train"],
    test_file: "test",
    index: Some("meta"),
    record: None,
    decode: |path, bytes, images| decode("fine_labels", path, bytes, images),
};

/// Appends the images of a file, with the labels of this key.
fn decode(labels_key: &str, path: &Path, bytes: &[u8], images: &mut Growing) -> Result<(), DataError> {
    let pickle = Pickle::read(path, bytes)?;
    let (rows, pixels) = pickle.bytes_by_rows("data", SHAPE.bytes())?;
    let labels = pickle.integers(labels_key)?;
    if labels.len() != rows {
        let (path, labels_path) = (path.into(), path.into());
        return Err(DataError::Count { path, images: rows, labels: labels.len(), labels_path });
    }
    cifar::reserve(path, rows, images)?;
    for (index, (planes, &label)) in pixels.chunks_exact(SHAPE.bytes()).zip(&labels).enumerate() {
        match u32::try_from(label) {
            Ok(known) if (known as usize) < images.classes => images.labels.push(known),
            _ => {
                return Err(DataError::Label { path: path.into(), index, label, classes: images.classes });
            }
        }
        cifar::append_planes(planes, &mut images.pixels);
    }
    Ok(())
}
