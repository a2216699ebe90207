//! Errors of data sets. Every message is one line: the file, what was found, what was expected.

use std::io;
use std::path::PathBuf;

/// Why a data set could not be read, generated or reduced. The fields are the parts of the message; sizes are in
/// bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // of the fields, whose names and messages say it
pub enum DataError {
    /// The operating system refused: no such path, no permission, a failing disk.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },

    /// The data path is a file that is no data set.
    #[error("{path}: not a data set; expected a folder with {}", files())]
    NotAFolder { path: PathBuf },

    /// A data file is a pipe or a device.
    #[error("{path}: not a regular file")]
    NotAFile { path: PathBuf },

    /// No file of a known format lies in the folder.
    #[error("{path}: no data set found; expected {}", files())]
    NotRecognised { path: PathBuf },

    /// The folder holds files of several data sets, in itself or in folders below.
    #[error("{path}: holds two data sets, {first} and {second}; expected a folder with one")]
    Ambiguous { path: PathBuf, first: &'static str, second: &'static str },

    /// The folder holds IDX files of several data sets, such as those of EMNIST.
    #[error("{path}: holds two data sets, {first} and {second}; expected one, or the path of one of EMNIST's files")]
    SeveralIdx { path: PathBuf, first: &'static str, second: &'static str },

    /// The format was recognised, but a file of the requested split is missing.
    #[error("{folder}: no {file}, which the {split} split needs")]
    MissingFile { folder: PathBuf, file: String, split: super::Split },

    /// Images of another shape than CIFAR's, which corruptions are defined for.
    #[error("images of {found}, expected {expected}, for which the corruptions are defined")]
    NotCifar { found: super::ImageShape, expected: super::ImageShape },

    /// A severity of corruptions that does not exist.
    #[error("severity {severity}, expected 1 to {}", super::SEVERITIES)]
    NoSeverity { severity: usize },

    /// A hold-out that leaves one of the parts empty.
    #[error("a hold-out of {fraction} of {len} samples leaves a part without any")]
    HoldOut { fraction: f64, len: usize },

    /// A CIFAR file is empty or does not consist of whole records.
    #[error("{path}: {bytes} bytes, expected a positive multiple of {record}")]
    RecordSize { path: PathBuf, bytes: u64, record: usize },

    /// A label that the data set does not have.
    #[error("{path}: label {label} at sample {index}, expected 0 to {}", classes - 1)]
    Label { path: PathBuf, index: usize, label: i64, classes: usize },

    /// A label so large that most classes below it have no sample: a damaged file.
    #[error("{path}: label {label} at sample {index}, but there are only {different} different labels")]
    SparseLabels { path: PathBuf, index: usize, label: u32, different: usize },

    /// A pickle that is damaged, or that holds something else than images and labels.
    #[error("{path}: not a pickle with images: {reason}")]
    Pickle { path: PathBuf, reason: String },

    /// A pickle that wants something to be called. It was not.
    #[error("{path}: the pickle names `{name}`, which no data set needs; nothing of it was executed")]
    PickleName { path: PathBuf, name: String },

    /// An archive that is damaged, or that holds other files than its name says.
    #[error("{path}: damaged archive: {reason}")]
    Archive { path: PathBuf, reason: String },

    /// A file of MATLAB that is damaged, or that holds other variables than the data set has.
    #[error("{path}: not a MATLAB file of SVHN: {reason}")]
    Mat { path: PathBuf, reason: String },

    /// A `.npy` file that is damaged, or that holds another array than is expected.
    #[error("{path}: {reason}")]
    Npy { path: PathBuf, reason: String },

    /// A picture that is damaged or too large.
    #[error("{path}: not a picture that can be read: {reason}")]
    Picture { path: PathBuf, reason: String },

    /// Pictures of different sizes, where no size was asked for.
    #[error("{path}: {found}, expected {expected} as {first} is; `image-size` makes them the same")]
    PictureSizes { path: PathBuf, found: super::ImageShape, first: PathBuf, expected: super::ImageShape },

    /// A picture has other pixels than when the data set was opened.
    #[error("{path}: the picture has changed since the data set was opened")]
    PictureChanged { path: PathBuf },

    /// Pictures that do not fit in memory.
    #[error("{bytes} bytes of pictures do not fit in memory")]
    PictureMemory { bytes: usize },

    /// The caller has stopped the reading of pictures.
    #[error("stopped while the pictures were read")]
    Stopped,

    /// A size was asked for, and the data set is no folder of pictures.
    #[error("{path}: {name} has images of one size; `image-size` is for folders of pictures alone")]
    NotResized { path: PathBuf, name: &'static str },

    /// A folder of corrupted test images, which are for `polder eval` alone.
    #[error("{path}: holds corrupted test images; only an evaluation with a corruption reads them")]
    OnlyCorrupted { path: PathBuf },

    /// A corruption that the folder does not have.
    #[error("{folder}: no {name}.npy; it has {present}")]
    NoCorruption { folder: PathBuf, name: String, present: String },

    /// An IDX file with another magic number.
    #[error("{path}: magic number {found:#010x}, expected {expected:#010x}")]
    Magic { path: PathBuf, found: u32, expected: u32 },

    /// A file that begins like neither an IDX file nor a gzip file, such as a page that a browser saved.
    #[error("{path}: not an IDX file, nor a gzip file with one; it begins with `{start}`")]
    NotIdx { path: PathBuf, start: String },

    /// An IDX file whose header announces no samples, or samples without pixels.
    #[error("{path}: header announces {announced}, expected positive sizes")]
    EmptyDimension { path: PathBuf, announced: String },

    /// An IDX file whose header announces more than a computer can address.
    #[error("{path}: header announces {announced} bytes, more than this machine can address")]
    TooLarge { path: PathBuf, announced: String },

    /// An IDX file that ends early. Sizes are those of the unpacked file.
    #[error("{path}: {bytes} bytes, expected {expected}")]
    Truncated { path: PathBuf, bytes: u64, expected: u64 },

    /// An IDX file with bytes after its last sample. Sizes are those of the unpacked file.
    #[error("{path}: more than {expected} bytes, expected exactly those")]
    TrailingBytes { path: PathBuf, expected: u64 },

    /// A damaged gzip stream.
    #[error("{path}: damaged gzip file: {source}")]
    Gzip { path: PathBuf, source: io::Error },

    /// Images and labels of one split that do not belong together.
    #[error("{path}: {images} images, expected {labels}, as many as there are labels in {labels_path}")]
    Count { path: PathBuf, images: usize, labels: usize, labels_path: PathBuf },

    /// Training and test images of different sizes.
    #[error("{path}: test images are {test}, expected {train}, as the training images are")]
    ShapeMismatch { path: PathBuf, train: super::ImageShape, test: super::ImageShape },

    /// A subset that is empty or larger than the set.
    #[error("cannot take {n} samples: expected 1 to {len}")]
    SubsetSize { n: usize, len: usize },

    /// A fraction of noisy labels that is not between 0 and 1.
    #[error("label noise {fraction}: expected a fraction from 0 to 1")]
    NoiseFraction { fraction: f64 },

    /// Label noise in a set with a single class.
    #[error("label noise needs at least 2 classes, found {classes}")]
    NoiseClasses { classes: usize },

    /// A synthetic set of an impossible size.
    #[error("synthetic data: {name} is {found}, expected {expected}")]
    Synthetic { name: &'static str, found: usize, expected: &'static str },

    /// A synthetic set that does not fit in memory.
    #[error("synthetic data: {bytes} bytes of images do not fit in memory")]
    SyntheticMemory { bytes: usize },

    /// A set without images, or images without pixels.
    #[error("{images} images of {shape}: expected at least one image with pixels")]
    NoImages { images: usize, shape: super::ImageShape },

    /// A number of pixels that does not match the number of labels.
    #[error("{found} bytes of pixels, expected {expected}: {images} labels, images of {shape}")]
    PixelCount { found: usize, expected: usize, images: usize, shape: super::ImageShape },

    /// A label that is not a class.
    #[error("label {label} at sample {index}, expected 0 to {}", classes.saturating_sub(1))]
    Class { index: usize, label: u32, classes: usize },

    /// Training and test images of different sizes.
    #[error("test images are {test}, expected {train}, as the training images are")]
    SplitShapes { train: super::ImageShape, test: super::ImageShape },

    /// Training and test images of different numbers of classes.
    #[error("the test images have {test} classes, expected {train}, as the training images have")]
    SplitClasses { train: usize, test: usize },

    /// A mean or standard deviation that is not given for each channel.
    #[error("{name} has {found} values, expected one for each of {channels} channels")]
    Channels { name: &'static str, found: usize, channels: usize },
}

/// The files of all formats.
fn files() -> String {
    let files: Vec<&str> = super::FORMATS.iter().map(|format| format.files).filter(|files| !files.is_empty()).collect();
    files.join(", or ")
}

/// The start of what a file holds, without control characters, for an error.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    const MOST: usize = 60;
    let dots = if bytes.len() > MOST { "…" } else { "" };
    format!("{}{dots}", bytes[..bytes.len().min(MOST)].escape_ascii())
}
