//! IDX files, the format of MNIST, Fashion-MNIST and similar sets: a big-endian header (magic number, one size per
//! dimension), then unsigned bytes. Images are a file of three dimensions, labels one of one dimension; both are often
//! compressed with gzip. The format is described at <http://yann.lecun.com/exdb/mnist/>.
//!
//! EMNIST (Cohen et al. 2017) has six sets of these files, which its names tell apart, and stores its images with rows
//! and columns exchanged. They are read upright.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::gzip::{self, Members};
use super::{
    DataError, Dataset, Format, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, is_there,
    mean_and_std, open,
};

/// IDX.
pub(super) const FORMAT: Format = Format {
    name: "IDX",
    files: "train-images-idx3-ubyte and so on (IDX)",
    recognise: Recognise::ByFiles {
        holds,
        below: &["raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw", "EMNIST/raw", "gzip"],
    },
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

/// What the names of EMNIST's files begin with, for each of its sets.
const EMNIST: [&str; 6] =
    ["emnist-balanced", "emnist-byclass", "emnist-bymerge", "emnist-digits", "emnist-letters", "emnist-mnist"];

/// The four files of a set.
#[derive(Clone, Copy)]
struct Files<'a> {
    folder: &'a Path,
    /// One of [`EMNIST`], or none for the names of MNIST.
    emnist: Option<&'static str>,
}

impl<'a> Files<'a> {
    /// The sets of a folder of which any file is there. The path of a file of EMNIST's stands for its set.
    fn all(path: &'a Path) -> Result<Vec<Self>, DataError> {
        let folder = match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            Some(folder) => folder,
            None => path,
        };
        let name = path.file_name().unwrap_or_default();
        let emnist = EMNIST.map(Some);
        let of_file = emnist.map(|emnist| Files { folder, emnist }).into_iter().find(|files| files.has_name(name));
        if let Some(files) = of_file
            && is_there(path)?
        {
            return Ok(vec![files]);
        }
        let mut found = Vec::new();
        for emnist in std::iter::once(None).chain(emnist) {
            let files = Files { folder: path, emnist };
            if files.any()? {
                found.push(files);
            }
        }
        Ok(found)
    }

    /// The only set.
    fn at(path: &'a Path) -> Result<Self, DataError> {
        let found = Self::all(path)?;
        if let [first, second, ..] = found[..] {
            let (first, second) = (first.set(), second.set());
            return Err(DataError::SeveralIdx { path: path.into(), first, second });
        }
        Ok(found.into_iter().next().unwrap_or(Files { folder: path, emnist: None }))
    }

    fn set(self) -> &'static str {
        self.emnist.unwrap_or("MNIST")
    }

    /// The name of the data set, unless its labels say it: EMNIST's, or the folder's, or that of the folder above
    /// `raw`, where torchvision puts files.
    fn name(self) -> String {
        let folder =
            if self.folder.ends_with("raw") { self.folder.parent().unwrap_or(self.folder) } else { self.folder };
        let of_folder = || folder.file_name().map_or_else(|| "idx".into(), |name| name.to_string_lossy().into_owned());
        self.emnist.map_or_else(of_folder, String::from)
    }

    /// What the names of the files of a split begin with.
    fn prefix(self, split: Split) -> String {
        match (self.emnist, split) {
            (None, Split::Train) => "train".into(),
            (None, Split::Test) => "t10k".into(),
            (Some(emnist), split) => format!("{emnist}-{split}"),
        }
    }

    /// The names that a file may have.
    fn names<const D: usize>(self, split: Split, content: Content<D>) -> [String; 4] {
        let start = format!("{}-{}", self.prefix(split), content.word);
        [("-", ""), (".", ""), ("-", ".gz"), (".", ".gz")]
            .map(|(separator, suffix)| format!("{start}{separator}idx{D}-ubyte{suffix}"))
    }

    fn has_name(self, name: &OsStr) -> bool {
        let is_one = |names: [String; 4]| names.iter().any(|other| name == other.as_str());
        [Split::Train, Split::Test]
            .into_iter()
            .any(|split| is_one(self.names(split, IMAGES)) || is_one(self.names(split, LABELS)))
    }

    /// The path of the file, under any of its names.
    fn find<const D: usize>(self, split: Split, content: Content<D>) -> Result<Option<PathBuf>, DataError> {
        for name in self.names(split, content) {
            let path = self.folder.join(name);
            if is_there(&path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Whether any of the files is there.
    fn any(self) -> Result<bool, DataError> {
        for split in [Split::Train, Split::Test] {
            if self.find(split, IMAGES)?.is_some() || self.find(split, LABELS)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn holds(path: &Path) -> Result<bool, DataError> {
    Ok(!Files::all(path)?.is_empty())
}

fn load(path: &Path) -> Result<Dataset, DataError> {
    let files = Files::at(path)?;
    let (mut train, published) = read_split(files, Split::Train)?;
    let (mut test, _) = read_split(files, Split::Test)?;
    if test.shape != train.shape {
        return Err(DataError::ShapeMismatch { path: path.into(), train: train.shape, test: test.shape });
    }
    train.classes = train.classes.max(test.classes);
    test.classes = train.classes;
    let (name, mean, std, statistics) = match published {
        Some(published) => published.describe(),
        None => {
            let (mean, std) = train.mean_and_std()?;
            (files.name(), mean, std, StatisticsSource::TrainImages)
        }
    };
    Ok(Dataset { name, train, test, mean, std, statistics })
}

fn load_split(path: &Path, split: Split) -> Result<SplitImages, DataError> {
    let files = Files::at(path)?;
    let (images, published) = read_split(files, split)?;
    let (name, mean, std, statistics) = match published {
        Some(published) => published.describe(),
        // A network is trained with the statistics of the training images. Those of the test images would be others.
        None if split == Split::Test && files.find(Split::Train, IMAGES)?.is_none() => {
            (files.name(), Vec::new(), Vec::new(), StatisticsSource::Unknown)
        }
        None => {
            let (mean, std) = match split {
                Split::Train => images.mean_and_std()?,
                Split::Test => mean_and_std(&IdxFile::open(files, Split::Train, IMAGES)?.values()?, 1),
            };
            (files.name(), mean, std, StatisticsSource::TrainImages)
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

/// Reads images and labels of one split, and finds the published data set that they belong to. Both headers are
/// compared before anything is read that they announce.
fn read_split(files: Files<'_>, split: Split) -> Result<(Images, Option<&'static Published>), DataError> {
    let label_file = IdxFile::open(files, split, LABELS)?;
    let image_file = IdxFile::open(files, split, IMAGES)?;
    let ([labels], [count, rows, columns]) = (label_file.sizes, image_file.sizes);
    if count != labels {
        let (path, labels_path) = (image_file.path, label_file.path);
        return Err(DataError::Count { path, images: count, labels, labels_path });
    }

    let path = label_file.path.clone();
    let labels: Vec<u32> = label_file.values()?.into_iter().map(u32::from).collect();
    let published = if files.emnist.is_none() { Published::of(&labels, split) } else { None };
    let classes = match published {
        Some(_) => PUBLISHED_CLASSES,
        None => count_classes(files, split, &path, &labels)?,
    };
    if let Some(index) = labels.iter().position(|&label| label as usize >= classes) {
        return Err(DataError::Label { path, index, label: labels[index].into(), classes });
    }
    let mut pixels = image_file.values()?;
    let mut shape = ImageShape { height: rows, width: columns, channels: 1 };
    if files.emnist.is_some() {
        transpose(&mut pixels, rows, columns);
        shape = ImageShape { height: columns, width: rows, channels: 1 };
    }
    Ok((Images { pixels: pixels.into(), labels, shape, classes }, published))
}

/// Exchanges rows and columns of every image.
fn transpose(pixels: &mut [u8], rows: usize, columns: usize) {
    let mut stored = vec![0; rows * columns];
    for image in pixels.chunks_exact_mut(rows * columns) {
        stored.copy_from_slice(image);
        for (row, values) in stored.chunks_exact(columns).enumerate() {
            for (column, &value) in values.iter().enumerate() {
                image[column * rows + row] = value;
            }
        }
    }
}

/// The number of classes up to the largest label of both splits. The labels of the other split need not be there.
fn count_classes(files: Files<'_>, split: Split, path: &Path, labels: &[u32]) -> Result<usize, DataError> {
    let other = match split {
        Split::Train => Split::Test,
        Split::Test => Split::Train,
    };
    let mut present = [false; 256];
    labels.iter().for_each(|&label| present[label as usize] = true);
    if files.find(other, LABELS)?.is_some() {
        let mark = |part: &[u8]| part.iter().for_each(|&label| present[usize::from(label)] = true);
        IdxFile::open(files, other, LABELS)?.read(mark)?;
    }
    let different = present.iter().filter(|&&present| present).count();
    let classes = present.iter().rposition(|&present| present).map_or(0, |largest| largest + 1);
    let largest = labels.iter().position(|&label| label as usize + 1 == classes);
    // A few samples may well miss most classes.
    let many = labels.len() >= 10 * classes;
    match largest {
        Some(index) if many && 2 * different < classes => {
            Err(DataError::SparseLabels { path: path.into(), index, label: labels[index], different })
        }
        _ => Ok(classes),
    }
}

/// A file whose header was read, and whose values were not.
struct IdxFile<const D: usize> {
    path: PathBuf,
    sizes: [usize; D],
    /// The product of the sizes.
    count: u64,
    /// Bytes of the file as it is on the disk.
    file_bytes: u64,
    gzipped: bool,
    /// Stands behind the header.
    reader: Box<dyn Read>,
}

impl<const D: usize> IdxFile<D> {
    const HEADER: u64 = 4 + 4 * D as u64;

    fn open(files: Files<'_>, split: Split, content: Content<D>) -> Result<Self, DataError> {
        let Some(path) = files.find(split, content)? else {
            let file = format!("{}-{}-idx{D}-ubyte[.gz]", files.prefix(split), content.word);
            return Err(DataError::MissingFile { folder: files.folder.into(), file, split });
        };
        let (file, file_bytes) = open(&path)?;
        let mut file = BufReader::new(file);
        let start = file.fill_buf().map_err(|source| DataError::Io { path: path.clone(), source })?;
        let gzipped = start.starts_with(&gzip::START);
        let mut reader: Box<dyn Read> = if gzipped { Box::new(Members::new(file)) } else { Box::new(file) };

        let mut header = Vec::new();
        let read = reader.by_ref().take(Self::HEADER).read_to_end(&mut header);
        read.map_err(|source| read_error(&path, gzipped, source))?;
        // The first two bytes of every IDX file are zero.
        if header.iter().take(2).any(|&byte| byte != 0) {
            return Err(DataError::NotIdx { path, start: header.escape_ascii().to_string() });
        }
        let words: Vec<u32> =
            header.chunks_exact(4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]])).collect();
        let expected = UNSIGNED_BYTES + D as u32;
        if let Some(&found) = words.first().filter(|&&found| found != expected) {
            return Err(DataError::Magic { path, found, expected });
        }
        if (header.len() as u64) < Self::HEADER {
            return Err(DataError::Truncated { path, bytes: header.len() as u64, expected: Self::HEADER });
        }
        let sizes: [usize; D] = std::array::from_fn(|dimension| words[1 + dimension] as usize);
        let announced = sizes.map(|size| size.to_string()).join(" x ");
        if sizes.contains(&0) {
            return Err(DataError::EmptyDimension { path, announced });
        }
        let count = sizes.iter().try_fold(1u64, |product, &size| product.checked_mul(size as u64));
        let Some(count) = count.filter(|&count| isize::try_from(count).is_ok()) else {
            return Err(DataError::TooLarge { path, announced });
        };
        if !gzipped {
            check_length(&path, file_bytes, Self::HEADER + count)?;
        }
        Ok(Self { path, sizes, count, file_bytes, gzipped, reader })
    }

    /// Reads all values, row-major, and gives them to `take` part by part.
    fn read(mut self, mut take: impl FnMut(&[u8])) -> Result<(), DataError> {
        let mut part = vec![0; 1 << 16];
        let mut found = 0;
        // One byte more than announced is asked for: it would be a trailing byte, and gzip verifies its checksum only
        // at the end.
        while found <= self.count {
            let most = part.len().min(usize::try_from(self.count + 1 - found).unwrap_or(usize::MAX));
            match self.reader.read(&mut part[..most]) {
                Ok(0) => break,
                Ok(bytes) => {
                    found += bytes as u64;
                    take(&part[..bytes]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read_error(&self.path, self.gzipped, error)),
            }
        }
        check_length(&self.path, Self::HEADER + found, Self::HEADER + self.count)
    }

    /// All values, row-major. At most the size of the file is reserved at first, and more as data arrives, because a
    /// header is not trusted.
    fn values(self) -> Result<Vec<u8>, DataError> {
        let mut values = Vec::new();
        let reserved = values.try_reserve_exact(self.count.min(self.file_bytes) as usize);
        reserved.map_err(|_| read_error(&self.path, self.gzipped, io::ErrorKind::OutOfMemory.into()))?;
        self.read(|part| values.extend_from_slice(part))?;
        Ok(values)
    }
}

fn read_error(path: &Path, gzipped: bool, source: io::Error) -> DataError {
    let path = path.into();
    if gzipped { DataError::Gzip { path, source } } else { DataError::Io { path, source } }
}

fn check_length(path: &Path, bytes: u64, expected: u64) -> Result<(), DataError> {
    match bytes.cmp(&expected) {
        Ordering::Less => Err(DataError::Truncated { path: path.into(), bytes, expected }),
        Ordering::Greater => Err(DataError::TrailingBytes { path: path.into(), expected }),
        Ordering::Equal => Ok(()),
    }
}
