//! SVHN's cropped digits: `train_32x32.mat` and so on, files of MATLAB (version 5) with the images `X`, 32x32x3xN bytes
//! in column-major order, and the labels `y`, where 10 means the digit 0. The data set is described at
//! <http://ufldl.stanford.edu/housenumbers>, and the format in MathWorks' "MAT-File Format".

use std::cmp::Ordering;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use flate2::bufread::ZlibDecoder;

use super::error::excerpt;
use super::{
    DataError, Dataset, Format, Growing, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, is_there,
    open,
};

/// SVHN.
pub(super) const FORMAT: Format = Format {
    name: "svhn",
    files: "train_32x32.mat and test_32x32.mat (SVHN)",
    recognise: Recognise::ByFiles { holds, below: &[] },
    load,
    load_split,
};

const TRAIN: &str = "train_32x32.mat";
const TEST: &str = "test_32x32.mat";
/// More training images, which are read if the path is that of this file.
const EXTRA: &str = "extra_32x32.mat";

const SHAPE: ImageShape = ImageShape { height: 32, width: 32, channels: 3 };

fn holds(path: &Path) -> Result<bool, DataError> {
    if is_extra(path) {
        return is_there(path);
    }
    Ok(is_there(&path.join(TRAIN))? || is_there(&path.join(TEST))?)
}

fn is_extra(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == EXTRA)
}

/// The folder of the files, and the names of those with training images.
fn files(path: &Path) -> (&Path, &'static [&'static str]) {
    match path.parent() {
        Some(folder) if is_extra(path) && folder.as_os_str().is_empty() => (Path::new("."), &[TRAIN, EXTRA]),
        Some(folder) if is_extra(path) => (folder, &[TRAIN, EXTRA]),
        _ => (path, &[TRAIN]),
    }
}

fn load(path: &Path) -> Result<Dataset, DataError> {
    let train = read_split(path, Split::Train)?;
    let test = read_split(path, Split::Test)?;
    let (mean, std) = train.mean_and_std()?;
    let (name, statistics) = (FORMAT.name.into(), StatisticsSource::TrainImages);
    Ok(Dataset { name, train, test, mean, std, statistics })
}

fn load_split(path: &Path, split: Split) -> Result<SplitImages, DataError> {
    let images = read_split(path, split)?;
    let (folder, _) = files(path);
    let (mean, std, statistics) = if split == Split::Test && !is_there(&folder.join(TRAIN))? {
        (Vec::new(), Vec::new(), StatisticsSource::Unknown)
    } else {
        let train = if split == Split::Test { Some(read_split(path, Split::Train)?) } else { None };
        let (mean, std) = train.as_ref().unwrap_or(&images).mean_and_std()?;
        (mean, std, StatisticsSource::TrainImages)
    };
    Ok(SplitImages { name: FORMAT.name.into(), images, mean, std, statistics })
}

fn read_split(path: &Path, split: Split) -> Result<Images, DataError> {
    let (folder, train_files) = files(path);
    let mut images = Growing::new(10);
    for file in if split == Split::Train { train_files } else { &[TEST] } {
        if !is_there(&folder.join(file))? {
            return Err(DataError::MissingFile { folder: folder.into(), file: (*file).into(), split });
        }
        append(&folder.join(file), &mut images)?;
    }
    Ok(images.images(SHAPE))
}

/// Appends the images of a file. The sizes of images and labels are compared before either is read.
fn append(path: &Path, images: &mut Growing) -> Result<(), DataError> {
    let (labels, pixels) = (Variable::open(path, "y")?, Variable::open(path, "X")?);
    let count = match pixels.sizes[..] {
        [32, 32, 3, count] if pixels.kind == UINT8 => count,
        _ => return Err(pixels.wrong("32 x 32 x 3 x N unsigned bytes")),
    };
    let label_count = match labels.sizes[..] {
        [count, 1] | [1, count] => count,
        _ => return Err(labels.wrong("N x 1 numbers")),
    };
    if count != label_count || count == 0 {
        let (path, labels_path) = (path.into(), path.into());
        return Err(DataError::Count { path, images: count, labels: label_count, labels_path });
    }
    // Before anything is unpacked: a file of a few bytes can have labels for many more images than it has pixels.
    pixels.check_length(1)?;
    let first = images.labels.len();
    labels.read_labels(images)?;
    if let Some(index) = images.labels[first..].iter().position(|&label| label > 10) {
        let label = images.labels[first + index].into();
        return Err(DataError::Label { path: path.into(), index, label, classes: 11 });
    }
    images.labels[first..].iter_mut().filter(|label| **label == 10).for_each(|label| *label = 0);
    pixels.read_images(images)
}

/// Kinds of data in the file, by their numbers.
const INT8: u32 = 1;
const UINT8: u32 = 2;
const INT32: u32 = 5;
const UINT32: u32 = 6;
const DOUBLE: u32 = 9;
const MATRIX: u32 = 14;
const COMPRESSED: u32 = 15;

/// Bytes before the first element.
const HEADER: u64 = 128;
/// Variables of a file that are looked at: there are two.
const MOST_VARIABLES: usize = 16;

/// A numeric array whose sizes were read, and whose values were not.
struct Variable {
    path: PathBuf,
    name: &'static str,
    sizes: Vec<usize>,
    /// The kind of the values.
    kind: u32,
    /// How many bytes the values have.
    bytes: u64,
    /// How many bytes the file has.
    file_bytes: u64,
    /// Values that lie in the element's tag.
    in_tag: Option<[u8; 4]>,
    reader: Box<dyn Read>,
}

impl Variable {
    /// Looks for a variable of this name.
    fn open(path: &Path, name: &'static str) -> Result<Self, DataError> {
        let io = |source| DataError::Io { path: path.into(), source };
        let (mut file, length) = open(path)?;
        let mut header = Vec::new();
        file.by_ref().take(HEADER).read_to_end(&mut header).map_err(io)?;
        if header.get(126..) != Some(&b"IM"[..]) || header[124..126] != [0, 1] {
            let start = excerpt(&header[..header.len().min(40)]);
            let reason = format!("it begins with `{start}`, expected a little-endian MATLAB file of version 5");
            return Err(mat(path, reason));
        }
        let mut at = HEADER;
        for _ in 0..MOST_VARIABLES {
            if at >= length {
                break;
            }
            let (mut file, _) = open(path)?;
            file.seek(SeekFrom::Start(at)).map_err(io)?;
            let tag = Tag::read(&mut file).map_err(|error| damaged(path, &error))?;
            at += 8 + u64::from(tag.bytes);
            if at > length {
                return Err(DataError::Truncated { path: path.into(), bytes: length, expected: at });
            }
            let element = BufReader::new(file).take(tag.bytes.into());
            let (mut reader, kind): (Box<dyn Read>, _) = match tag.kind {
                COMPRESSED => {
                    let mut reader = ZlibDecoder::new(element);
                    let tag = Tag::read(&mut reader).map_err(|error| damaged(path, &error))?;
                    (Box::new(reader), tag.kind)
                }
                kind => (Box::new(element), kind),
            };
            if kind != MATRIX {
                continue;
            }
            let array = read_array(&mut reader).map_err(|error| damaged(path, &error))?;
            if let Some(ArrayHeader { sizes, values, .. }) = array.filter(|array| array.name == name.as_bytes()) {
                let Tag { kind, bytes, in_tag } = values;
                return Ok(Self {
                    path: path.into(),
                    name,
                    sizes,
                    kind,
                    bytes: bytes.into(),
                    file_bytes: length,
                    in_tag,
                    reader,
                });
            }
        }
        Err(mat(path, format!("it has no variable {name}")))
    }

    fn wrong(&self, expected: &str) -> DataError {
        let sizes: Vec<String> = self.sizes.iter().map(usize::to_string).collect();
        let reason =
            format!("{} has {} numbers of kind {}, expected {expected}", self.name, sizes.join(" x "), self.kind);
        mat(&self.path, reason)
    }

    /// Reads the values in parts of so many bytes and gives each to `take`. The checksum of a compressed variable is
    /// verified, because it is read to its end.
    fn read(mut self, part: usize, mut take: impl FnMut(&[u8]) -> Result<(), DataError>) -> Result<(), DataError> {
        if let Some(bytes) = self.in_tag {
            return take(&bytes[..self.bytes as usize]);
        }
        let mut values = vec![0; part];
        for done in (0..self.bytes).step_by(part) {
            let part = usize::try_from(self.bytes - done).unwrap_or(part).min(part);
            self.reader.read_exact(&mut values[..part]).map_err(|error| damaged(&self.path, &error))?;
            take(&values[..part])?;
        }
        // Values are filled up to a multiple of eight bytes.
        match io::copy(&mut self.reader.take(8), &mut io::sink()) {
            Ok(8) => Err(mat(&self.path, format!("bytes behind the values of {}", self.name))),
            Ok(_) => Ok(()),
            Err(error) => Err(damaged(&self.path, &error)),
        }
    }

    /// Appends labels, which are whole numbers in bytes or in double precision.
    fn read_labels(self, images: &mut Growing) -> Result<(), DataError> {
        let width = match self.kind {
            UINT8 => 1,
            DOUBLE => 8,
            _ => return Err(self.wrong("unsigned bytes or doubles")),
        };
        self.check_length(width as u64)?;
        let path = self.path.clone();
        self.read(1 << 16, |part| {
            for value in part.chunks_exact(width) {
                let mut word = [0; 8];
                word[..width].copy_from_slice(value);
                let label = if width == 1 { f64::from(value[0]) } else { f64::from_le_bytes(word) };
                if !(0.0..=f64::from(u32::MAX)).contains(&label) || label.fract() != 0.0 {
                    return Err(mat(&path, format!("label {label}, expected 1 to 10")));
                }
                images.labels.push(label as u32);
            }
            Ok(())
        })
    }

    /// Appends images, whose bytes are in the order of channels, columns, rows.
    fn read_images(self, images: &mut Growing) -> Result<(), DataError> {
        self.check_length(1)?;
        // Photographs shrink to more than half, and a header is not trusted.
        let reserved = images.pixels.try_reserve_exact(self.bytes.min(2 * self.file_bytes) as usize);
        reserved.map_err(|_| DataError::Io { path: self.path.clone(), source: io::ErrorKind::OutOfMemory.into() })?;
        self.read(SHAPE.bytes(), |image| {
            for y in 0..32 {
                for x in 0..32 {
                    images.pixels.extend([0, 1, 2].map(|channel| image[y + 32 * x + 1024 * channel]));
                }
            }
            Ok(())
        })
    }

    fn check_length(&self, width: u64) -> Result<(), DataError> {
        let count = self.sizes.iter().try_fold(width, |product, &size| product.checked_mul(size as u64));
        match count.map(|expected| (expected, self.bytes.cmp(&expected))) {
            Some((_, Ordering::Equal)) => Ok(()),
            _ => Err(self.wrong(&format!("as many as its {} bytes are", self.bytes))),
        }
    }
}

fn mat(path: &Path, reason: String) -> DataError {
    DataError::Mat { path: path.into(), reason }
}

fn damaged(path: &Path, error: &io::Error) -> DataError {
    mat(path, format!("damaged: {}", excerpt(error.to_string().as_bytes())))
}

/// What stands before the data of an element: its kind and length. Up to four bytes of data may lie in the tag.
struct Tag {
    kind: u32,
    bytes: u32,
    in_tag: Option<[u8; 4]>,
}

impl Tag {
    fn read(mut reader: impl Read) -> io::Result<Self> {
        let mut tag = [0; 8];
        reader.read_exact(&mut tag)?;
        let word = |at: usize| u32::from_le_bytes([tag[at], tag[at + 1], tag[at + 2], tag[at + 3]]);
        let (first, second) = (word(0), word(4));
        match first >> 16 {
            0 => Ok(Self { kind: first, bytes: second, in_tag: None }),
            bytes @ 1..=4 => Ok(Self { kind: first & 0xffff, bytes, in_tag: Some(second.to_le_bytes()) }),
            bytes => Err(invalid(format!("{bytes} bytes in a tag"))),
        }
    }

    /// The data of a short element, of this kind.
    fn data(&self, mut reader: impl Read, kind: u32, most: u32) -> io::Result<Vec<u8>> {
        if self.kind != kind || self.bytes > most {
            return Err(invalid(format!("an element of kind {} and {} bytes in a header", self.kind, self.bytes)));
        }
        let bytes = self.bytes as usize;
        if let Some(data) = self.in_tag {
            return Ok(data[..bytes].to_vec());
        }
        let mut data = vec![0; bytes.next_multiple_of(8)];
        reader.read_exact(&mut data)?;
        data.truncate(bytes);
        Ok(data)
    }
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// The header of an array.
struct ArrayHeader {
    name: Vec<u8>,
    sizes: Vec<usize>,
    values: Tag,
}

/// Reads the header of an array, up to its values. None if it is no array of real numbers.
fn read_array(mut reader: impl Read) -> io::Result<Option<ArrayHeader>> {
    let flags = Tag::read(&mut reader)?.data(&mut reader, UINT32, 8)?;
    let (Some(&class), Some(&flags)) = (flags.first(), flags.get(1)) else {
        return Err(invalid("an array without flags".into()));
    };
    let sizes = Tag::read(&mut reader)?.data(&mut reader, INT32, 32)?;
    let size = |word: &[u8]| {
        let size = i32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        usize::try_from(size).map_err(|_| invalid(format!("an array of size {size}")))
    };
    let sizes = sizes.chunks_exact(4).map(size).collect::<io::Result<Vec<usize>>>()?;
    let name = Tag::read(&mut reader)?.data(&mut reader, INT8, 64)?;
    // Classes 6 to 15 are numbers; bit 3 of the flags means complex ones.
    if !(6..=15).contains(&class) || flags & 8 != 0 {
        return Ok(None);
    }
    Ok(Some(ArrayHeader { name, sizes, values: Tag::read(&mut reader)? }))
}
