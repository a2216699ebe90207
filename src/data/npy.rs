//! Arrays of NumPy: a data set of four `.npy` files with images and labels, and the reader of one such file.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use npyz::{DType, Endianness, NpyHeader, Order, TypeChar};

use super::error::excerpt;
use super::{
    DataError, Dataset, Format, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, is_there,
    mean_and_std, open,
};

/// Images and labels as arrays.
pub(super) const FORMAT: Format = Format {
    name: "npy",
    files: "train_images.npy, train_labels.npy, test_images.npy and test_labels.npy",
    recognise: Recognise::ByFiles { holds: has_files, below: &[] },
    load,
    load_split,
};

/// Labels are below this, so that a damaged one does not announce a network of billions of outputs.
const MOST_CLASSES: usize = 1 << 16;

fn images_file(folder: &Path, split: Split) -> PathBuf {
    folder.join(if split == Split::Train { "train_images.npy" } else { "test_images.npy" })
}

fn labels_file(folder: &Path, split: Split) -> PathBuf {
    folder.join(if split == Split::Train { "train_labels.npy" } else { "test_labels.npy" })
}

fn has_files(folder: &Path) -> Result<bool, DataError> {
    for split in [Split::Train, Split::Test] {
        if is_there(&images_file(folder, split))? || is_there(&labels_file(folder, split))? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn load(folder: &Path) -> Result<Dataset, DataError> {
    let (train, test) = (read_split(folder, Split::Train)?, read_split(folder, Split::Test)?);
    if test.shape != train.shape {
        return Err(DataError::ShapeMismatch { path: folder.into(), train: train.shape, test: test.shape });
    }
    let (mean, std) = train.mean_and_std()?;
    Ok(Dataset { name: folder_name(folder), train, test, mean, std, statistics: StatisticsSource::TrainImages })
}

fn load_split(folder: &Path, split: Split) -> Result<SplitImages, DataError> {
    let images = read_split(folder, split)?;
    let train = images_file(folder, Split::Train);
    let (mean, std, statistics) = if split == Split::Train {
        let (mean, std) = images.mean_and_std()?;
        (mean, std, StatisticsSource::TrainImages)
    } else if is_there(&train)? {
        let (shape, pixels) = read_images(&train)?;
        let (mean, std) = mean_and_std(&pixels, shape.channels);
        (mean, std, StatisticsSource::TrainImages)
    } else {
        (Vec::new(), Vec::new(), StatisticsSource::Unknown)
    };
    Ok(SplitImages { name: folder_name(folder), images, mean, std, statistics })
}

fn folder_name(folder: &Path) -> String {
    folder.file_name().map_or_else(|| "npy".into(), |name| name.to_string_lossy().into_owned())
}

/// Images and labels of a split. The labels of both splits, where both are there, say how many classes there are.
fn read_split(folder: &Path, split: Split) -> Result<Images, DataError> {
    let (images_path, labels_path) = (images_file(folder, split), labels_file(folder, split));
    for path in [&images_path, &labels_path] {
        if !is_there(path)? {
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(DataError::MissingFile { folder: folder.into(), file, split });
        }
    }
    let (images, labels) = (NpyFile::open(&images_path)?, NpyFile::open(&labels_path)?);
    if images.sizes.first() != labels.sizes.first() {
        let count = |file: &NpyFile| file.sizes.first().copied().unwrap_or(1);
        let (images, labels) = (count(&images), count(&labels));
        return Err(DataError::Count { path: images_path, images, labels, labels_path });
    }
    let labels = labels.labels(MOST_CLASSES)?;
    let other = labels_file(folder, if split == Split::Train { Split::Test } else { Split::Train });
    let others = if is_there(&other)? { NpyFile::open(&other)?.labels(MOST_CLASSES)? } else { Vec::new() };
    let classes = count_classes(&labels_path, &labels, &others)?;
    let (shape, pixels) = read_images(&images_path)?;
    Ok(Images { pixels: pixels.into(), labels, shape, classes })
}

/// The largest label of both splits, plus one. With many samples, most classes below it must have some: otherwise the
/// file is damaged.
fn count_classes(path: &Path, labels: &[u32], others: &[u32]) -> Result<usize, DataError> {
    let mut present = vec![false; MOST_CLASSES];
    labels.iter().chain(others).for_each(|&label| present[label as usize] = true);
    let different = present.iter().filter(|&&present| present).count();
    let classes = present.iter().rposition(|&present| present).map_or(0, |largest| largest + 1);
    match labels.iter().position(|&label| label as usize + 1 == classes) {
        Some(index) if labels.len() >= 10 * classes && 2 * different < classes => {
            Err(DataError::SparseLabels { path: path.into(), index, label: labels[index], different })
        }
        _ => Ok(classes),
    }
}

fn read_images(path: &Path) -> Result<(ImageShape, Vec<u8>), DataError> {
    let file = NpyFile::open(path)?;
    let (height, width, channels) = match file.sizes[..] {
        [_, height, width] => (height, width, 1),
        [_, height, width, channels @ 1..=4] => (height, width, channels),
        _ => return Err(file.wrong("images x rows x columns, or images x rows x columns x channels (1 to 4)")),
    };
    if !file.is_bytes() {
        return Err(file.wrong("unsigned bytes (u1)"));
    }
    let all = 0..file.count;
    Ok((ImageShape { height, width, channels }, file.bytes(all)?))
}

/// The labels of a `.npy` file: integers below `classes`.
pub(crate) fn npy_labels(path: &Path, classes: usize) -> Result<Vec<u32>, DataError> {
    NpyFile::open(path)?.labels(classes)
}

/// A `.npy` file whose header was read, and whose values were not.
pub(super) struct NpyFile {
    path: PathBuf,
    /// The sizes of the array; none is zero, and the last one varies fastest.
    pub sizes: Vec<usize>,
    /// The product of the sizes.
    count: u64,
    /// The type of its elements, as NumPy writes it.
    dtype: String,
    kind: TypeChar,
    width: u64,
    big_endian: bool,
    /// Bytes before the values.
    header: u64,
    file: File,
}

impl NpyFile {
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let npy = |reason: String| DataError::Npy { path: path.into(), reason };
        let (mut file, length) = open(path)?;
        let text = read_header(&mut file).map_err(|source| DataError::Io { path: path.into(), source })?;
        if let Some(reason) = unusual(&text) {
            return Err(npy(reason));
        }
        let header = NpyHeader::from_reader(&text[..]);
        let header = header.map_err(|error| npy(format!("damaged: {}", excerpt(error.to_string().as_bytes()))))?;
        let dtype = excerpt(header.dtype().descr().trim_matches('\'').as_bytes());
        let DType::Plain(element) = header.dtype() else {
            return Err(npy(format!("its elements are {dtype}, expected integers")));
        };
        if header.order() != Order::C {
            return Err(npy("it is in Fortran order, expected C order (numpy.ascontiguousarray)".into()));
        }
        let width = element.size_field();
        let big_endian = element.endianness() == Endianness::Big;
        let sizes: Option<Vec<usize>> = header.shape().iter().map(|&size| usize::try_from(size).ok()).collect();
        let product = |sizes: &Vec<usize>| sizes.iter().try_fold(1u64, |all, &size| all.checked_mul(size as u64));
        let sized = sizes.and_then(|sizes| product(&sizes).map(|count| (sizes, count)));
        let whole = sized.and_then(|(sizes, count)| Some((sizes, count, count.checked_mul(width)?)));
        let Some((sizes, count, bytes)) = whole.filter(|(_, count, _)| *count > 0 && *count < 1 << 48) else {
            return Err(npy("it has no elements, or more than a computer can address".into()));
        };
        let expected = bytes + text.len() as u64;
        if length < expected {
            return Err(DataError::Truncated { path: path.into(), bytes: length, expected });
        }
        if length > expected {
            return Err(DataError::TrailingBytes { path: path.into(), expected });
        }
        let (kind, header) = (element.type_char(), text.len() as u64);
        Ok(Self { path: path.into(), sizes, count, dtype, kind, width, big_endian, header, file })
    }

    /// An error that says what the array is, and what was expected.
    pub fn wrong(&self, expected: &str) -> DataError {
        let sizes: Vec<String> = self.sizes.iter().take(8).map(usize::to_string).collect();
        let reason = format!("an array of {} and type {}, expected {expected}", sizes.join(" x "), self.dtype);
        DataError::Npy { path: self.path.clone(), reason }
    }

    /// Whether the elements are unsigned bytes.
    pub fn is_bytes(&self) -> bool {
        self.kind == TypeChar::Uint && self.width == 1
    }

    /// The bytes of some elements. At most the size of the file is allocated.
    pub fn bytes(&self, elements: std::ops::Range<u64>) -> Result<Vec<u8>, DataError> {
        let io = |source| DataError::Io { path: self.path.clone(), source };
        let (start, length) = (self.header + elements.start * self.width, (elements.end - elements.start) * self.width);
        let mut bytes = Vec::new();
        let reserved = usize::try_from(length).map(|length| bytes.try_reserve_exact(length));
        if !matches!(reserved, Ok(Ok(()))) {
            return Err(io(io::ErrorKind::OutOfMemory.into()));
        }
        let mut file = BufReader::new(&self.file);
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        file.take(length).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 != length {
            let (bytes, expected) = (start + bytes.len() as u64, start + length);
            return Err(DataError::Truncated { path: self.path.clone(), bytes, expected });
        }
        Ok(bytes)
    }

    /// The array as labels: a vector of integers below `classes`.
    pub fn labels(&self, classes: usize) -> Result<Vec<u32>, DataError> {
        let signed = match self.kind {
            TypeChar::Int => true,
            TypeChar::Uint => false,
            _ => return Err(self.wrong("a vector of integers")),
        };
        if self.sizes.len() != 1 || !matches!(self.width, 1 | 2 | 4 | 8) {
            return Err(self.wrong("a vector of integers"));
        }
        let mut labels = Vec::new();
        // In parts: eight bytes for each label of one byte would be much for a large file.
        const PART: u64 = 1 << 16;
        for first in (0..self.count).step_by(PART as usize) {
            let bytes = self.bytes(first..self.count.min(first + PART))?;
            let numbers = super::integers(&bytes, self.width as usize, signed, self.big_endian);
            for number in numbers.ok_or_else(|| self.wrong("labels of at most 8 bytes"))? {
                match u32::try_from(number) {
                    Ok(label) if (label as usize) < classes => labels.push(label),
                    _ => {
                        let (path, index) = (self.path.clone(), labels.len());
                        return Err(DataError::Label { path, index, label: number, classes });
                    }
                }
            }
        }
        Ok(labels)
    }
}

/// Headers are padded to 128 bytes; longer ones belong to records, which hold no images.
const MOST_HEADER: u64 = 1024;

/// The start of a file, up to its values; less if the file is no `.npy` file.
fn read_header(file: &mut File) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    file.by_ref().take(12).read_to_end(&mut header)?;
    let length = match header[..] {
        [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, a, b, ..] => 10 + u64::from(u16::from_le_bytes([a, b])),
        [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b, c, d] => 12 + u64::from(u32::from_le_bytes([a, b, c, d])),
        _ => 0,
    };
    file.take(length.min(MOST_HEADER).saturating_sub(12)).read_to_end(&mut header)?;
    if length > 0 && header.len() as u64 != length {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a .npy header that is cut off or too long"));
    }
    Ok(header)
}

/// What is wrong with a header, before it is parsed: the parser would trust its length and the depth of its brackets.
fn unusual(header: &[u8]) -> Option<String> {
    if !header.starts_with(b"\x93NUMPY") {
        let start = excerpt(&header[..header.len().min(12)]);
        return Some(format!("it begins with `{start}`, and not as a .npy file does"));
    }
    let brackets = header.iter().skip(12).filter(|byte| b"([{".contains(byte)).count();
    (brackets > 4).then(|| "it has the header of a record, not of numbers".into())
}
