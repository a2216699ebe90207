//! CIFAR-10 and CIFAR-100: the files of both sets, and their binary version. A file of the binary version consists of
//! fixed records, each one or two label bytes and then the red, green and blue planes of a 32x32 image. The format is
//! described at <https://www.cs.toronto.edu/~kriz/cifar.html>. `cifar_python.rs` decodes the Python version, and
//! `cifar_archive.rs` reads both versions from their archives.

use std::io::{self, Read};
use std::path::Path;

use super::{
    DataError, Dataset, Format, Growing, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, is_there,
    open,
};

pub(super) const SHAPE: ImageShape = ImageShape { height: 32, width: 32, channels: 3 };
const PLANE: usize = 32 * 32;

/// CIFAR-10.
pub(super) const CIFAR10: Format = Format {
    name: "cifar-10",
    files: "data_batch_1.bin and test_batch.bin (CIFAR-10)",
    recognise: Recognise::ByFiles {
        holds: |folder| has_files(&CIFAR10_BINARY, folder),
        below: &["cifar-10-batches-bin"],
    },
    load: |folder| load(&CIFAR10_BINARY, folder),
    load_split: |folder, split| load_split(&CIFAR10_BINARY, folder, split),
};

/// CIFAR-100.
pub(super) const CIFAR100: Format = Format {
    name: "cifar-100",
    files: "train.bin and test.bin (CIFAR-100)",
    recognise: Recognise::ByFiles { holds: |folder| has_files(&CIFAR100_BINARY, folder), below: &["cifar-100-binary"] },
    load: |folder| load(&CIFAR100_BINARY, folder),
    load_split: |folder, split| load_split(&CIFAR100_BINARY, folder, split),
};

/// What both versions of a data set share.
pub(super) struct Set {
    pub name: &'static str,
    pub classes: usize,
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

pub(super) static CIFAR10_SET: Set =
    Set { name: "cifar-10", classes: 10, mean: [0.4914, 0.4822, 0.4465], std: [0.2470, 0.2435, 0.2616] };

pub(super) static CIFAR100_SET: Set =
    Set { name: "cifar-100", classes: 100, mean: [0.5071, 0.4865, 0.4409], std: [0.2673, 0.2564, 0.2762] };

/// The files of one version of a data set.
pub(super) struct Layout {
    pub set: &'static Set,
    pub train_files: &'static [&'static str],
    pub test_file: &'static str,
    /// A file without images by which a folder is recognised, where the names of the others are too common.
    pub index: Option<&'static str>,
    /// Bytes of an image and its labels, if the files consist of nothing else.
    pub record: Option<usize>,
    /// Appends the images of a file to those before it. The path is for errors.
    pub decode: fn(&Path, &[u8], &mut Growing) -> Result<(), DataError>,
}

/// The binary version of CIFAR-10.
pub(super) static CIFAR10_BINARY: Layout = Layout {
    set: &CIFAR10_SET,
    train_files: &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"],
    test_file: "test_batch.bin",
    index: None,
    record: Some(1 + 3 * PLANE),
    decode: |path, bytes, images| decode(&[10], path, bytes, images),
};

/// The binary version of CIFAR-100. The second label is the fine one, which is used.
pub(super) static CIFAR100_BINARY: Layout = Layout {
    set: &CIFAR100_SET,
    train_files: &["train.bin"],
    test_file: "test.bin",
    index: None,
    record: Some(2 + 3 * PLANE),
    decode: |path, bytes, images| decode(&[20, 100], path, bytes, images),
};

impl Layout {
    /// No images yet.
    pub fn no_images(&self) -> Growing {
        Growing::new(self.set.classes)
    }

    /// The training files from the first to the last one present. If one between is missing, [`Layout::collect`]
    /// reports it: nobody means to train without a batch in the middle.
    fn files(
        &self,
        split: Split,
        is_present: impl Fn(&str) -> Result<bool, DataError>,
    ) -> Result<Vec<&'static str>, DataError> {
        if split == Split::Test {
            return Ok(vec![self.test_file]);
        }
        let mut count = 1;
        for (index, file) in self.train_files.iter().enumerate() {
            if is_present(file)? {
                count = index + 1;
            }
        }
        Ok(self.train_files[..count].to_vec())
    }

    /// The images of a split. `place` is the folder or archive of its files.
    pub fn collect(
        &self,
        place: &Path,
        split: Split,
        is_present: impl Fn(&str) -> Result<bool, DataError>,
        mut append: impl FnMut(&str, &mut Growing) -> Result<(), DataError>,
    ) -> Result<Images, DataError> {
        let mut images = self.no_images();
        for file in self.files(split, &is_present)? {
            if !is_present(file)? {
                return Err(DataError::MissingFile { folder: place.into(), file: file.into(), split });
            }
            append(file, &mut images)?;
        }
        Ok(images.images(SHAPE))
    }

    /// Adds name and published statistics to the images of a split.
    pub fn describe(&self, images: Images) -> SplitImages {
        let Set { name, mean, std, .. } = self.set;
        SplitImages {
            name: (*name).into(),
            images,
            mean: mean.to_vec(),
            std: std.to_vec(),
            statistics: StatisticsSource::Published,
        }
    }

    /// A data set of both splits, with its name and published statistics.
    pub fn dataset(&self, train: Images, test: Images) -> Dataset {
        let SplitImages { name, images: train, mean, std, statistics } = self.describe(train);
        Dataset { name, train, test, mean, std, statistics }
    }
}

/// Whether any file of the data set lies in the folder.
pub(super) fn has_files(layout: &Layout, folder: &Path) -> Result<bool, DataError> {
    if let Some(index) = layout.index
        && !is_there(&folder.join(index))?
    {
        return Ok(false);
    }
    for file in layout.train_files.iter().chain([&layout.test_file]) {
        if is_there(&folder.join(file))? {
            return Ok(true);
        }
    }
    Ok(false)
}

pub(super) fn load(layout: &Layout, folder: &Path) -> Result<Dataset, DataError> {
    let train = read(layout, folder, Split::Train)?;
    Ok(layout.dataset(train, read(layout, folder, Split::Test)?))
}

pub(super) fn load_split(layout: &Layout, folder: &Path, split: Split) -> Result<SplitImages, DataError> {
    Ok(layout.describe(read(layout, folder, split)?))
}

fn read(layout: &Layout, folder: &Path, split: Split) -> Result<Images, DataError> {
    let append = |file: &str, images: &mut Growing| {
        let path = folder.join(file);
        (layout.decode)(&path, &read_file(layout, &path)?, images)
    };
    layout.collect(folder, split, |file| is_there(&folder.join(file)), append)
}

/// The bytes of a file. The size of one that consists of records is checked before it is read.
fn read_file(layout: &Layout, path: &Path) -> Result<Vec<u8>, DataError> {
    let (mut file, size) = open(path)?;
    if let Some(record) = layout.record {
        check_size(path, size, record)?;
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|source| DataError::Io { path: path.into(), source })?;
    Ok(bytes)
}

fn check_size(path: &Path, bytes: u64, record: usize) -> Result<(), DataError> {
    if bytes == 0 || !bytes.is_multiple_of(record as u64) {
        return Err(DataError::RecordSize { path: path.into(), bytes, record });
    }
    Ok(())
}

/// Appends the records of a file of the binary version. Each label byte has a number of classes; the last label is the
/// one in use.
fn decode(label_classes: &[usize], path: &Path, bytes: &[u8], images: &mut Growing) -> Result<(), DataError> {
    let labels = label_classes.len();
    let record = labels + SHAPE.bytes();
    // Once more: the file may have grown since its size was asked for.
    check_size(path, bytes.len() as u64, record)?;
    reserve(path, bytes.len() / record, images)?;
    for (index, record) in bytes.chunks_exact(record).enumerate() {
        let (label_bytes, planes) = record.split_at(labels);
        for (&label, &classes) in label_bytes.iter().zip(label_classes) {
            if usize::from(label) >= classes {
                return Err(DataError::Label { path: path.into(), index, label: label.into(), classes });
            }
        }
        images.labels.push(label_bytes[labels - 1].into());
        append_planes(planes, &mut images.pixels);
    }
    Ok(())
}

/// Makes room for more images.
pub(super) fn reserve(path: &Path, samples: usize, images: &mut Growing) -> Result<(), DataError> {
    let out_of_memory = |_| DataError::Io { path: path.into(), source: io::ErrorKind::OutOfMemory.into() };
    images.labels.try_reserve_exact(samples).map_err(out_of_memory)?;
    images.pixels.try_reserve_exact(samples * SHAPE.bytes()).map_err(out_of_memory)
}

/// Appends an image that is stored as a red, a green and a blue plane.
pub(super) fn append_planes(planes: &[u8], pixels: &mut Vec<u8>) {
    let (red, rest) = planes.split_at(PLANE);
    let (green, blue) = rest.split_at(PLANE);
    for ((&r, &g), &b) in red.iter().zip(green).zip(blue) {
        pixels.extend_from_slice(&[r, g, b]);
    }
}
