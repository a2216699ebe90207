//! CIFAR-10 and CIFAR-100 in their binary versions: files of fixed records, each one or two label bytes and then the
//! red, green and blue planes of a 32x32 image. The format is described at
//! <https://www.cs.toronto.edu/~kriz/cifar.html>.

use std::io::Read;
use std::path::Path;

use super::{
    DataError, Dataset, Format, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, is_there, open,
};

const SHAPE: ImageShape = ImageShape { height: 32, width: 32, channels: 3 };
const PLANE: usize = 32 * 32;

/// CIFAR-10.
pub(super) const CIFAR10: Format = Format {
    name: "cifar-10",
    files: "data_batch_1.bin and test_batch.bin (CIFAR-10)",
    recognise: Recognise::InFolder {
        holds: |folder| has_files(&CIFAR10_LAYOUT, folder),
        below: &["cifar-10-batches-bin"],
    },
    load: |folder| load(&CIFAR10_LAYOUT, folder),
    load_split: |folder, split| load_split(&CIFAR10_LAYOUT, folder, split),
};

/// CIFAR-100.
pub(super) const CIFAR100: Format = Format {
    name: "cifar-100",
    files: "train.bin and test.bin (CIFAR-100)",
    recognise: Recognise::InFolder {
        holds: |folder| has_files(&CIFAR100_LAYOUT, folder),
        below: &["cifar-100-binary"],
    },
    load: |folder| load(&CIFAR100_LAYOUT, folder),
    load_split: |folder, split| load_split(&CIFAR100_LAYOUT, folder, split),
};

/// The differences between the two data sets.
struct Layout {
    name: &'static str,
    train_files: &'static [&'static str],
    test_file: &'static str,
    /// Number of classes behind each of the label bytes of a record; the last one is the label in use.
    label_classes: &'static [usize],
    mean: [f32; 3],
    std: [f32; 3],
}

static CIFAR10_LAYOUT: Layout = Layout {
    name: "cifar-10",
    train_files: &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"],
    test_file: "test_batch.bin",
    label_classes: &[10],
    mean: [0.4914, 0.4822, 0.4465],
    std: [0.2470, 0.2435, 0.2616],
};

static CIFAR100_LAYOUT: Layout = Layout {
    name: "cifar-100",
    train_files: &["train.bin"],
    test_file: "test.bin",
    label_classes: &[20, 100],
    mean: [0.5071, 0.4865, 0.4409],
    std: [0.2673, 0.2564, 0.2762],
};

/// Whether any file of the data set lies in the folder.
fn has_files(layout: &Layout, folder: &Path) -> Result<bool, DataError> {
    for file in layout.train_files.iter().chain([&layout.test_file]) {
        if is_there(&folder.join(file))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The archive to take instead, if a folder or one below it holds the python version of either set. Its files are
/// pickles, which are not read.
pub(super) fn instead_of_python_version(path: &Path) -> Result<Option<&'static str>, DataError> {
    let sets = [
        ("cifar-10-batches-py", ["batches.meta", "data_batch_1"], "cifar-10-binary.tar.gz"),
        ("cifar-100-python", ["meta", "train"], "cifar-100-binary.tar.gz"),
    ];
    for (folder, [index, train], archive) in sets {
        for folder in [path.to_path_buf(), path.join(folder)] {
            if is_there(&folder.join(index))? && is_there(&folder.join(train))? {
                return Ok(Some(archive));
            }
        }
    }
    Ok(None)
}

fn load(layout: &Layout, folder: &Path) -> Result<Dataset, DataError> {
    let train = load_split(layout, folder, Split::Train)?;
    let test = read(layout, folder, Split::Test)?;
    let SplitImages { name, images: train, mean, std, statistics } = train;
    Ok(Dataset { name, train, test, mean, std, statistics })
}

fn load_split(layout: &Layout, folder: &Path, split: Split) -> Result<SplitImages, DataError> {
    Ok(describe(layout, read(layout, folder, split)?))
}

/// Adds name and published statistics to the images of a split.
fn describe(layout: &Layout, images: Images) -> SplitImages {
    SplitImages {
        name: layout.name.into(),
        images,
        mean: layout.mean.to_vec(),
        std: layout.std.to_vec(),
        statistics: StatisticsSource::Published,
    }
}

fn read(layout: &Layout, folder: &Path, split: Split) -> Result<Images, DataError> {
    let files = match split {
        Split::Train => present_train_files(layout, folder)?,
        Split::Test => &[layout.test_file],
    };
    let classes = layout.label_classes[layout.label_classes.len() - 1];
    let mut images = Images { pixels: Vec::new(), labels: Vec::new(), shape: SHAPE, classes };
    for file in files {
        let path = folder.join(file);
        if !is_there(&path)? {
            return Err(DataError::MissingFile { folder: folder.into(), file: (*file).into(), split });
        }
        append(layout, &path, &mut images)?;
    }
    Ok(images)
}

/// The training files from the first to the last one present. If one between is missing, `read` reports it: nobody
/// means to train without a batch in the middle.
fn present_train_files(layout: &Layout, folder: &Path) -> Result<&'static [&'static str], DataError> {
    let mut count = 1;
    for (index, file) in layout.train_files.iter().enumerate() {
        if is_there(&folder.join(file))? {
            count = index + 1;
        }
    }
    Ok(&layout.train_files[..count])
}

/// Appends the records of one file.
fn append(layout: &Layout, path: &Path, images: &mut Images) -> Result<(), DataError> {
    let labels = layout.label_classes.len();
    let record = labels + SHAPE.bytes();
    let io = |source| DataError::Io { path: path.into(), source };

    // The size is checked before the file is read, and again after, in case it was being written meanwhile.
    let (mut file, size) = open(path)?;
    let wrong_size = |bytes: u64| bytes == 0 || !bytes.is_multiple_of(record as u64);
    if wrong_size(size) {
        return Err(DataError::RecordSize { path: path.into(), bytes: size, record });
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(io)?;
    if wrong_size(bytes.len() as u64) {
        return Err(DataError::RecordSize { path: path.into(), bytes: bytes.len() as u64, record });
    }

    let samples = bytes.len() / record;
    let out_of_memory = |_| io(std::io::ErrorKind::OutOfMemory.into());
    images.labels.try_reserve_exact(samples).map_err(out_of_memory)?;
    images.pixels.try_reserve_exact(samples * SHAPE.bytes()).map_err(out_of_memory)?;
    for (index, record) in bytes.chunks_exact(record).enumerate() {
        let (label_bytes, planes) = record.split_at(labels);
        for (&label, &classes) in label_bytes.iter().zip(layout.label_classes) {
            if usize::from(label) >= classes {
                return Err(DataError::Label { path: path.into(), index, label: label.into(), classes });
            }
        }
        images.labels.push(label_bytes[labels - 1].into());
        let (red, rest) = planes.split_at(PLANE);
        let (green, blue) = rest.split_at(PLANE);
        for ((&r, &g), &b) in red.iter().zip(green).zip(blue) {
            images.pixels.extend_from_slice(&[r, g, b]);
        }
    }
    Ok(())
}
