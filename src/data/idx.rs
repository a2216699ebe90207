//! IDX files, the format of MNIST, Fashion-MNIST and similar sets: a big-endian header (magic number, one size per
//! dimension), then unsigned bytes. Images are a file of three dimensions, labels one of one dimension; both are often
//! compressed with gzip. The format is described at <http://yann.lecun.com/exdb/mnist/>.

use std::cmp::Ordering;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;

use super::{
    DataError, Dataset, Format, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, is_there,
    mean_and_std, open,
};

/// IDX.
pub(super) const FORMAT: Format = Format {
    name: "IDX",
    files: "train-images-idx3-ubyte and so on (IDX)",
    recognise: Recognise::InFolder(|path| Ok(has_files(path)?.then(|| path.into()))),
    load,
    load_split,
};

/// Magic number of unsigned bytes; the number of dimensions is added to it.
const UNSIGNED_BYTES: u32 = 0x0000_0800;

/// A data set with published statistics. MNIST and Fashion-MNIST have the same file names and sizes, so they are told
/// apart by their first labels: that sixteen labels agree by chance has a probability of 1e-16.
struct Published {
    name: &'static str,
    first_train_labels: [u32; 16],
    first_test_labels: [u32; 16],
    mean: f32,
    std: f32,
}

const PUBLISHED: [Published; 2] = [
    Published {
        name: "mnist",
        first_train_labels: [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7],
        first_test_labels: [7, 2, 1, 0, 4, 1, 4, 9, 5, 9, 0, 6, 9, 0, 1, 5],
        mean: 0.1307,
        std: 0.3081,
    },
    Published {
        name: "fashion-mnist",
        first_train_labels: [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9],
        first_test_labels: [9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1],
        mean: 0.2860,
        std: 0.3530,
    },
];
const PUBLISHED_CLASSES: usize = 10;

/// The contents of a file, by the word in its name; `D` is the number of dimensions.
#[derive(Clone, Copy)]
struct Content<const D: usize> {
    word: &'static str,
}

const IMAGES: Content<3> = Content { word: "images" };
const LABELS: Content<1> = Content { word: "labels" };

/// Whether any of the four files lies in the folder.
fn has_files(folder: &Path) -> Result<bool, DataError> {
    for split in [Split::Train, Split::Test] {
        if find(folder, split, IMAGES)?.is_some() || find(folder, split, LABELS)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn load(folder: &Path) -> Result<Dataset, DataError> {
    let (mut train, published) = read_split(folder, Split::Train)?;
    let (mut test, _) = read_split(folder, Split::Test)?;
    if test.shape != train.shape {
        return Err(DataError::ShapeMismatch { path: folder.into(), train: train.shape, test: test.shape });
    }
    train.classes = train.classes.max(test.classes);
    test.classes = train.classes;
    let (name, mean, std, statistics) = match published {
        Some(published) => published.describe(),
        None => {
            let (mean, std) = mean_and_std(&train.pixels, train.shape.channels);
            (folder_name(folder), mean, std, StatisticsSource::TrainImages)
        }
    };
    Ok(Dataset { name, train, test, mean, std, statistics })
}

fn load_split(folder: &Path, split: Split) -> Result<SplitImages, DataError> {
    let (images, published) = read_split(folder, split)?;
    let (name, mean, std, statistics) = match published {
        Some(published) => published.describe(),
        // A network is trained with the statistics of the training images. Those of the test images would be others.
        None if split == Split::Test && find(folder, Split::Train, IMAGES)?.is_none() => {
            (folder_name(folder), Vec::new(), Vec::new(), StatisticsSource::Unknown)
        }
        None => {
            let (mean, std) = match split {
                Split::Train => mean_and_std(&images.pixels, 1),
                Split::Test => mean_and_std(&read_file(folder, Split::Train, IMAGES)?.values, 1),
            };
            (folder_name(folder), mean, std, StatisticsSource::TrainImages)
        }
    };
    Ok(SplitImages { name, images, mean, std, statistics })
}

impl Published {
    fn of(labels: &[u32], split: Split) -> Option<&'static Published> {
        PUBLISHED.iter().find(|published| {
            labels.starts_with(match split {
                Split::Train => &published.first_train_labels,
                Split::Test => &published.first_test_labels,
            })
        })
    }

    fn describe(&self) -> (String, Vec<f32>, Vec<f32>, StatisticsSource) {
        (self.name.into(), vec![self.mean], vec![self.std], StatisticsSource::Published)
    }
}

fn folder_name(folder: &Path) -> String {
    folder.file_name().map_or_else(|| "idx".into(), |name| name.to_string_lossy().into_owned())
}

/// Reads images and labels of one split, and finds the published data set that they belong to.
fn read_split(folder: &Path, split: Split) -> Result<(Images, Option<&'static Published>), DataError> {
    let label_file = read_file(folder, split, LABELS)?;
    let labels: Vec<u32> = label_file.values.iter().map(|&label| label.into()).collect();
    let published = Published::of(&labels, split);
    let classes = match published {
        Some(_) => PUBLISHED_CLASSES,
        None => {
            let other = match split {
                Split::Train => Split::Test,
                Split::Test => Split::Train,
            };
            let other_labels = match find(folder, other, LABELS)? {
                Some(_) => read_file(folder, other, LABELS)?.values,
                None => Vec::new(),
            };
            let mut present = [false; 256];
            label_file.values.iter().chain(&other_labels).for_each(|&label| present[usize::from(label)] = true);
            let different = present.iter().filter(|&&present| present).count();
            let classes = present.iter().rposition(|&present| present).map_or(0, |largest| largest + 1);
            let largest = labels.iter().position(|&label| label as usize + 1 == classes);
            // A few samples may well miss most classes.
            let many = labels.len() >= 10 * classes;
            if let (true, Some(index)) = (many && 2 * different < classes, largest) {
                return Err(DataError::SparseLabels { path: label_file.path, index, label: labels[index], different });
            }
            classes
        }
    };
    if let Some(index) = labels.iter().position(|&label| label as usize >= classes) {
        return Err(DataError::Label { path: label_file.path, index, label: labels[index], classes });
    }

    let image_file = read_file(folder, split, IMAGES)?;
    let [count, height, width] = image_file.sizes;
    if count != labels.len() {
        let (path, labels_path) = (image_file.path, label_file.path);
        return Err(DataError::Count { path, images: count, labels: labels.len(), labels_path });
    }
    let shape = ImageShape { height, width, channels: 1 };
    Ok((Images { pixels: image_file.values, labels, shape, classes }, published))
}

/// The prefix of the file names of a split.
fn prefix(split: Split) -> &'static str {
    match split {
        Split::Train => "train",
        Split::Test => "t10k",
    }
}

/// The path of the file, under any of its names.
fn find<const D: usize>(folder: &Path, split: Split, content: Content<D>) -> Result<Option<PathBuf>, DataError> {
    for (separator, suffix) in [("-", ""), (".", ""), ("-", ".gz"), (".", ".gz")] {
        let path = folder.join(format!("{}-{}{separator}idx{D}-ubyte{suffix}", prefix(split), content.word));
        if is_there(&path)? {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

struct IdxFile<const D: usize> {
    path: PathBuf,
    sizes: [usize; D],
    /// The values, row-major; as many as the product of the sizes.
    values: Vec<u8>,
}

fn read_file<const D: usize>(folder: &Path, split: Split, content: Content<D>) -> Result<IdxFile<D>, DataError> {
    let Some(path) = find(folder, split, content)? else {
        let file = format!("{}-{}-idx{D}-ubyte[.gz]", prefix(split), content.word);
        return Err(DataError::MissingFile { folder: folder.into(), file, split });
    };
    let (file, file_bytes) = open(&path)?;
    let mut file = BufReader::new(file);
    let start = file.fill_buf().map_err(|source| DataError::Io { path: path.clone(), source })?;
    let gzipped = start.starts_with(&[0x1f, 0x8b]);
    let mut reader: Box<dyn Read> = if gzipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let read_error = |source: io::Error| {
        let path = path.clone();
        if gzipped { DataError::Gzip { path, source } } else { DataError::Io { path, source } }
    };

    let header_bytes = 4 + 4 * D as u64;
    let mut header = Vec::new();
    reader.by_ref().take(header_bytes).read_to_end(&mut header).map_err(read_error)?;
    let words: Vec<u32> =
        header.chunks_exact(4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]])).collect();
    let expected = UNSIGNED_BYTES + D as u32;
    if let Some(&found) = words.first().filter(|&&found| found != expected) {
        return Err(DataError::Magic { path, found, expected });
    }
    if (header.len() as u64) < header_bytes {
        return Err(DataError::Truncated { path, bytes: header.len() as u64, expected: header_bytes });
    }
    let sizes: [usize; D] = std::array::from_fn(|dimension| words[1 + dimension] as usize);
    let announced = sizes.map(|size| size.to_string()).join(" x ");
    if sizes.contains(&0) {
        return Err(DataError::EmptyDimension { path, announced });
    }
    let value_bytes = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64));
    let Some(value_bytes) = value_bytes.filter(|&bytes| isize::try_from(bytes).is_ok()) else {
        return Err(DataError::TooLarge { path, announced });
    };

    // The header is not trusted: at most the size of the file is reserved at first, and more as data arrives. One byte
    // more than announced is requested, which detects trailing bytes and makes gzip verify its checksum.
    let mut values = Vec::new();
    let reserved = values.try_reserve_exact(value_bytes.min(file_bytes) as usize);
    reserved.map_err(|_| read_error(io::ErrorKind::OutOfMemory.into()))?;
    reader.take(value_bytes + 1).read_to_end(&mut values).map_err(read_error)?;
    let (bytes, expected) = (header_bytes + values.len() as u64, header_bytes + value_bytes);
    match bytes.cmp(&expected) {
        Ordering::Less => Err(DataError::Truncated { path, bytes, expected }),
        Ordering::Greater => Err(DataError::TrailingBytes { path, expected }),
        Ordering::Equal => Ok(IdxFile { path, sizes, values }),
    }
}
