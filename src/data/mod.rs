//! Labelled images, in host memory or in the files of pictures: read from disk, generated, reduced, relabelled and
//! shuffled.
//!
//! [`load`] recognises the format of a folder: CIFAR-10 or CIFAR-100 in the binary or the Python version or as an
//! archive, SVHN, IDX files as MNIST and Fashion-MNIST have them, gzip'd or not, arrays of NumPy, or pictures in a
//! folder for each class. [`Corrupted`] reads CIFAR-10-C, and [`Corruption`] makes such images.
//! [`synthetic`](fn@synthetic) generates a set that needs no files, and [`Dataset::new`] takes one from memory. A
//! format is one file of this module and one entry of [`FORMATS`]. Pixels stay `u8` in NHWC order (samples, rows,
//! columns, channels); they are normalised when a batch is assembled on the device. Pictures that take more memory than
//! [`LoadOptions::memory`] stay in their files ([`Pixels::Files`]).
//!
//! Everything random here comes from ChaCha8 through integer arithmetic, so a seed means the same on every platform.
//! The corruptions alone take Philox4x32-10, and functions of the platform's library.

mod cifar;
mod cifar_archive;
mod cifar_python;
mod corrupt;
mod corrupted;
mod error;
mod gzip;
mod idx;
mod image_folder;
mod npy;
mod pickle;
mod pictures;
mod pixels;
mod svhn;
mod synthetic;

use std::borrow::Cow;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crc32fast::Hasher;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

pub use corrupt::{CORRUPTIONS, Corruption};
pub use corrupted::{Corrupted, SEVERITIES};
pub use error::DataError;
pub(crate) use npy::npy_labels;
pub use pictures::Pictures;
pub use pixels::Pixels;
use pixels::mean_and_std;
pub use synthetic::{SyntheticSpec, synthetic};

use crate::words;

/// Size of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageShape {
    /// Rows, in pixels.
    pub height: usize,
    /// Columns, in pixels.
    pub width: usize,
    /// 1 for grey, 3 for red, green and blue.
    pub channels: usize,
}

impl ImageShape {
    /// Bytes of one image: height · width · channels.
    pub fn bytes(&self) -> usize {
        self.height * self.width * self.channels
    }
}

impl fmt::Display for ImageShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.height, self.width, self.channels)
    }
}

words! {
    /// Which half of a data set.
    pub enum Split {
        /// The images that a model is trained on
        Train = "train",
        /// The images that it is tested on
        Test = "test",
    }
}

/// The labelled images of one split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// `len() · shape.bytes()` bytes, NHWC, in memory or in files.
    pub pixels: Pixels,
    /// One class per image, below `classes`.
    pub labels: Vec<u32>,
    /// Size of every image.
    pub shape: ImageShape,
    /// Number of classes of the data set, whether or not each of them occurs in this split.
    pub classes: usize,
}

impl Images {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no images; never so for [`load`] and [`synthetic`](fn@synthetic).
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Labelled images from memory: `pixels` holds the images one after another, each NHWC, and `labels` the class of
    /// each.
    ///
    /// # Errors
    /// Those of [`Images::check`].
    pub fn new(pixels: Vec<u8>, labels: Vec<u32>, shape: ImageShape, classes: usize) -> Result<Self, DataError> {
        let images = Self { pixels: pixels.into(), labels, shape, classes };
        images.check()?;
        Ok(images)
    }

    /// Checks that there are images, that pixels and labels belong together, and that every label is a class.
    ///
    /// # Errors
    /// [`DataError::NoImages`], [`DataError::PixelCount`], [`DataError::Class`].
    pub fn check(&self) -> Result<(), DataError> {
        let image = self.shape.bytes();
        let (found, expected) = (self.pixels.count(image), self.len().saturating_mul(image));
        if self.is_empty() || image == 0 {
            return Err(DataError::NoImages { images: self.len(), shape: self.shape });
        }
        if found != expected {
            return Err(DataError::PixelCount { found, expected, images: self.len(), shape: self.shape });
        }
        match self.labels.iter().position(|&label| label as usize >= self.classes) {
            Some(index) => Err(DataError::Class { index, label: self.labels[index], classes: self.classes }),
            None => Ok(()),
        }
    }

    /// A checksum of images and labels, by which results identify the data that they belong to: CRC-32 of sizes, labels
    /// and pixels, as eight hexadecimal digits. It does not depend on the files that the images came from, on whether
    /// the pixels are in memory, or on the number of classes. Pictures in files are not read again for it.
    ///
    /// ```
    /// use polder::data::{SyntheticSpec, synthetic};
    ///
    /// let spec = SyntheticSpec { train: 4, test: 2, side: 8, seed: 1 };
    /// let mut images = synthetic(&spec)?.test;
    /// let before = images.checksum();
    /// assert_eq!(before, synthetic(&spec)?.test.checksum());
    /// images.labels[1] = 0;
    /// assert_ne!(images.checksum(), before);
    /// # Ok::<(), polder::data::DataError>(())
    /// ```
    pub fn checksum(&self) -> String {
        let mut sum = Hasher::new();
        let ImageShape { height, width, channels } = self.shape;
        for size in [self.len(), height, width, channels] {
            sum.update(&(size as u64).to_le_bytes());
        }
        let labels: Vec<u8> = self.labels.iter().flat_map(|label| label.to_le_bytes()).collect();
        sum.update(&labels);
        match &self.pixels {
            Pixels::Memory(bytes) => sum.update(bytes),
            Pixels::Files(pictures) => pictures.add_to(&mut sum),
        }
        format!("{:08x}", sum.finalize())
    }

    /// The pixels of some images, NHWC. Those in files are decoded on all cores.
    ///
    /// # Errors
    /// A file that is gone, damaged or another one than before; [`DataError::PictureMemory`].
    ///
    /// # Panics
    /// If there are no such images.
    pub fn bytes_of(&self, samples: Range<usize>) -> Result<Cow<'_, [u8]>, DataError> {
        let image = self.shape.bytes();
        match &self.pixels {
            Pixels::Memory(bytes) => Ok(Cow::Borrowed(&bytes[samples.start * image..samples.end * image])),
            Pixels::Files(pictures) => Ok(Cow::Owned(pictures.decode_range(samples)?)),
        }
    }

    /// The same images with their pixels in memory.
    ///
    /// # Errors
    /// Those of [`Images::bytes_of`].
    pub fn into_memory(mut self) -> Result<Images, DataError> {
        if let Pixels::Files(pictures) = &self.pixels {
            self.pixels = Pixels::Memory(pictures.decode_range(0..self.len())?);
        }
        Ok(self)
    }

    /// Mean and standard deviation of pixel/255, per channel.
    fn mean_and_std(&self) -> Result<(Vec<f32>, Vec<f32>), DataError> {
        match &self.pixels {
            Pixels::Memory(bytes) => Ok(mean_and_std(bytes, self.shape.channels)),
            Pixels::Files(pictures) => Ok(pictures.sums()?.mean_and_std()),
        }
    }

    /// The first `n` samples, in the order of the files.
    ///
    /// # Errors
    /// [`DataError::SubsetSize`] if `n` is 0 or more than there are.
    pub fn take(mut self, n: usize) -> Result<Images, DataError> {
        if n == 0 || n > self.len() {
            return Err(DataError::SubsetSize { n, len: self.len() });
        }
        self.labels.truncate(n);
        self.pixels.truncate(n, self.shape.bytes());
        Ok(self)
    }

    /// Symmetric label noise: `fraction · len()` labels, rounded to the nearest count, are replaced by a uniformly
    /// random *other* class. Which ones, and by what, depends on `seed` and `len()` alone.
    ///
    /// # Errors
    /// [`DataError::NoiseFraction`] if `fraction` is not within 0 to 1, [`DataError::NoiseClasses`] if there is no
    /// other class.
    ///
    /// # Panics
    /// If there are more than `u32::MAX` samples.
    pub fn with_label_noise(mut self, fraction: f64, seed: u64) -> Result<Images, DataError> {
        let classes = self.check_noise(fraction)?;
        let mut rng = generator(seed, b"lblnoise", 0);
        let mut order = vec![0; self.len()];
        shuffle(&mut rng, &mut order);
        let noisy = (fraction * self.len() as f64).round() as usize;
        for &sample in &order[..noisy] {
            let label = &mut self.labels[sample as usize];
            let other = below(&mut rng, classes - 1);
            *label = if other < *label { other } else { other + 1 };
        }
        Ok(self)
    }

    /// Asymmetric label noise: of the images of each class that is often mistaken for another one, `fraction`, rounded
    /// to the nearest count, get the label of that one. Which ones depends on `seed` and the labels alone.
    ///
    /// The pairs are those of the data set of this `name`. CIFAR-10 (Patrini et al. 2017): truck to automobile, bird to
    /// airplane, deer to horse, cat and dog to each other. MNIST (the same): 2 to 7, 3 to 8, 7 to 1, 5 and 6 to each
    /// other. Fashion-MNIST (Zhang and Sabuncu 2018): ankle boot to sneaker, sneaker to sandal, pullover to shirt, coat
    /// and dress to each other. In any other set, and in one that has not ten classes, every class turns into the next
    /// one (Han et al. 2018).
    ///
    /// # Errors
    /// Those of [`Images::with_label_noise`].
    ///
    /// # Panics
    /// If there are more than `u32::MAX` samples.
    pub fn with_asymmetric_noise(mut self, fraction: f64, seed: u64, name: &str) -> Result<Images, DataError> {
        let classes = self.check_noise(fraction)?;
        let pairs: Vec<(u32, u32)> = match name {
            _ if classes != 10 => (0..classes).map(|class| (class, (class + 1) % classes)).collect(),
            "cifar-10" => vec![(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)],
            "mnist" => vec![(2, 7), (3, 8), (7, 1), (5, 6), (6, 5)],
            "fashion-mnist" => vec![(9, 7), (7, 5), (2, 6), (4, 3), (3, 4)],
            _ => (0..classes).map(|class| (class, (class + 1) % classes)).collect(),
        };
        let clean = self.labels.clone();
        for (class, other) in pairs {
            let of_class: Vec<usize> = (0..clean.len()).filter(|&sample| clean[sample] == class).collect();
            let mut order = vec![0; of_class.len()];
            shuffle(&mut generator(seed, b"asymnois", u64::from(class)), &mut order);
            let noisy = (fraction * of_class.len() as f64).round() as usize;
            for &index in &order[..noisy] {
                self.labels[of_class[index as usize]] = other;
            }
        }
        Ok(self)
    }

    /// The number of classes, if labels can be mistaken.
    fn check_noise(&self, fraction: f64) -> Result<u32, DataError> {
        if !(0.0..=1.0).contains(&fraction) {
            return Err(DataError::NoiseFraction { fraction });
        }
        let classes = u32::try_from(self.classes).ok().filter(|&classes| classes >= 2);
        classes.ok_or(DataError::NoiseClasses { classes: self.classes })
    }

    /// Two parts: `fraction · len()` samples, rounded to the nearest count, are held out. Both parts keep the order.
    /// Which samples depends on `seed` and `len()` alone.
    ///
    /// # Errors
    /// [`DataError::HoldOut`] unless both parts have a sample.
    ///
    /// # Panics
    /// If there are more than `u32::MAX` samples.
    pub fn hold_out(self, fraction: f64, seed: u64) -> Result<[Images; 2], DataError> {
        let len = self.len();
        let held = (fraction * len as f64).round();
        if !(held >= 1.0 && held < len as f64) {
            return Err(DataError::HoldOut { fraction, len });
        }
        let mut order = vec![0; len];
        shuffle(&mut generator(seed, b"validate", 0), &mut order);
        let mut is_held = vec![false; len];
        order[..held as usize].iter().for_each(|&sample| is_held[sample as usize] = true);
        let part = |wanted: bool| {
            let samples: Vec<usize> = (0..len).filter(|&sample| is_held[sample] == wanted).collect();
            let pixels = self.pixels.select(&samples, self.shape.bytes());
            let labels = samples.iter().map(|&sample| self.labels[sample]).collect();
            Images { pixels, labels, ..self }
        };
        Ok([part(false), part(true)])
    }
}

/// Images in memory that a reader appends to.
struct Growing {
    pixels: Vec<u8>,
    labels: Vec<u32>,
    classes: usize,
}

impl Growing {
    fn new(classes: usize) -> Self {
        Self { pixels: Vec::new(), labels: Vec::new(), classes }
    }

    fn images(self, shape: ImageShape) -> Images {
        Images { pixels: self.pixels.into(), labels: self.labels, shape, classes: self.classes }
    }
}

/// Where the mean and standard deviation of a data set come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatisticsSource {
    /// The published values of this data set.
    Published,
    /// Computed from the training images.
    TrainImages,
    /// Not known, because [`load_split`] found no training images beside the test images, or because they were not
    /// asked for ([`LoadOptions::without_statistics`]). `mean` and `std` are empty.
    Unknown,
}

/// A data set with both its splits.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// `cifar-10`, `cifar-100`, `svhn`, `mnist`, `fashion-mnist`, `synthetic`; for other sets, the folder's name.
    pub name: String,
    /// The training images, in the order of the files.
    pub train: Images,
    /// The test images, of the same shape and classes.
    pub test: Images,
    /// Per channel, of pixel/255.
    pub mean: Vec<f32>,
    /// Per channel, of pixel/255; positive.
    pub std: Vec<f32>,
    /// Where `mean` and `std` come from.
    pub statistics: StatisticsSource,
}

impl Dataset {
    /// A data set from memory. Mean and standard deviation are computed from the training images.
    ///
    /// ```
    /// use polder::data::{Dataset, ImageShape, Images};
    ///
    /// // Four grey images of 8×8 pixels for training, two for testing; bright images are class 1.
    /// let shape = ImageShape { height: 8, width: 8, channels: 1 };
    /// let images = |labels: Vec<u32>| {
    ///     let pixels = labels.iter().flat_map(|&label| vec![if label == 1 { 200u8 } else { 50 }; 64]).collect();
    ///     Images::new(pixels, labels, shape, 2)
    /// };
    /// let data = Dataset::new("brightness", images(vec![0, 1, 0, 1])?, images(vec![1, 0])?)?;
    /// assert_eq!((data.train.len(), data.test.len(), data.mean.len()), (4, 2, 1));
    /// assert!(images(vec![0, 2]).is_err(), "there is no class 2");
    /// # Ok::<(), polder::data::DataError>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`Dataset::check`], and of pictures in files.
    pub fn new(name: &str, train: Images, test: Images) -> Result<Self, DataError> {
        train.check()?;
        let (mean, std) = train.mean_and_std()?;
        let data = Self { name: name.into(), train, test, mean, std, statistics: StatisticsSource::TrainImages };
        data.check()?;
        Ok(data)
    }

    /// Checks both splits, that their shapes and classes agree, and that there is a mean and a standard deviation for
    /// each channel.
    ///
    /// # Errors
    /// Those of [`Images::check`], [`DataError::SplitShapes`], [`DataError::SplitClasses`], [`DataError::Channels`].
    pub fn check(&self) -> Result<(), DataError> {
        self.train.check()?;
        self.test.check()?;
        let (train, test) = (self.train.shape, self.test.shape);
        if train != test {
            return Err(DataError::SplitShapes { train, test });
        }
        let (train, test) = (self.train.classes, self.test.classes);
        if train != test {
            return Err(DataError::SplitClasses { train, test });
        }
        let channels = self.train.shape.channels;
        for (name, values) in [("mean", &self.mean), ("std", &self.std)] {
            if values.len() != channels {
                return Err(DataError::Channels { name, found: values.len(), channels });
            }
        }
        Ok(())
    }

    /// The classes that neither split has an image of. Labels that begin at 1, as those of EMNIST's letters do, leave
    /// class 0 without images: a model still has an output for it.
    pub fn absent_classes(&self) -> Vec<u32> {
        let mut present = vec![false; self.train.classes.max(self.test.classes)];
        for &label in self.train.labels.iter().chain(&self.test.labels) {
            if let Some(class) = present.get_mut(label as usize) {
                *class = true;
            }
        }
        (0..).zip(present).filter(|(_, present)| !present).map(|(class, _)| class).collect()
    }
}

/// One split of a data set, with what is needed to normalise it; the fields are as in [`Dataset`].
#[derive(Clone, Debug)]
pub struct SplitImages {
    /// Name of the data set.
    pub name: String,
    /// The images of the split asked for.
    pub images: Images,
    /// Per channel, of pixel/255; empty where it is not known.
    pub mean: Vec<f32>,
    /// Per channel, of pixel/255; positive; empty where it is not known.
    pub std: Vec<f32>,
    /// Where `mean` and `std` come from.
    pub statistics: StatisticsSource,
}

/// How a format is found.
#[derive(Clone, Copy)]
pub enum Recognise {
    /// By its name in place of a path.
    ByName,
    /// By the names of files.
    ByFiles {
        /// Whether any file of the format lies in a folder, or whether the path is that of such a file.
        holds: fn(&Path) -> Result<bool, DataError>,
        /// Where archives and torchvision put the files, below the folder that was named.
        below: &'static [&'static str],
    },
}

/// A format of data sets: an entry of [`FORMATS`].
#[derive(Clone, Copy)]
pub struct Format {
    /// Its name.
    pub name: &'static str,
    /// Its files, for an error: "train.bin and test.bin (CIFAR-100)".
    pub files: &'static str,
    /// How it is found.
    pub recognise: Recognise,
    /// Reads both splits from the folder that was recognised.
    pub load: fn(&Path) -> Result<Dataset, DataError>,
    /// Reads one split; the other one need not be there.
    pub load_split: fn(&Path, Split) -> Result<SplitImages, DataError>,
}

/// All formats. Each is one file of this module.
pub const FORMATS: &[Format] = &[
    synthetic::FORMAT,
    cifar::CIFAR10,
    cifar::CIFAR100,
    cifar_python::CIFAR10,
    cifar_python::CIFAR100,
    cifar_archive::FORMAT,
    svhn::FORMAT,
    idx::FORMAT,
    npy::FORMAT,
    corrupted::FORMAT,
    image_folder::FORMAT,
];

/// Reads the data set at a path: `synthetic`, or a folder whose format is recognised by the names of the files.
///
/// - CIFAR-10, binary version: `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`. Fewer training batches
///   are enough if they are the first ones; a gap in their numbers is an error. A batch may have any number of records.
/// - CIFAR-100, binary version: `train.bin` and `test.bin`. The label is the fine one.
/// - Both in the Python version: `data_batch_1` to `data_batch_5` and `test_batch`, or `train`, `test` and `meta`. The
///   pickles are read by an interpreter that executes nothing; names that images do not need are errors.
/// - Both as an archive: `cifar-10-python.tar.gz`, `cifar-10-binary.tar.gz`, `cifar-100-python.tar.gz`,
///   `cifar-100-binary.tar.gz`. The path may be that of the archive.
/// - SVHN: `train_32x32.mat` and `test_32x32.mat`. If the path is that of `extra_32x32.mat`, its images follow those of
///   `train_32x32.mat`.
/// - IDX: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`,
///   also written `train-images.idx3-ubyte`, each with or without `.gz` (the first bytes of a file decide whether it is
///   unpacked). The largest label of both splits decides how many classes there are.
/// - EMNIST's IDX files: `emnist-letters-train-images-idx3-ubyte` and so on, and those of `balanced`, `byclass`,
///   `bymerge`, `digits` and `mnist`. They store every image with rows and columns exchanged, and are read upright. In
///   a folder with several sets the path of a file names one.
/// - Arrays of NumPy: `train_images.npy`, `train_labels.npy`, `test_images.npy`, `test_labels.npy`. The images are
///   unsigned bytes, samples × rows × columns or with up to four channels behind; the labels are integers, and decide
///   how many classes there are as in IDX files.
/// - A folder of pictures by class: `train/CLASS/*.jpg` and `test/CLASS/*.jpg` (or `val/`), as PNG, JPEG or WebP. They
///   have one size, or [`load_with`] gives them one. Grey pictures become coloured ones, and transparency is dropped.
///
/// The files may also lie in the sub-folder that their archives unpack to (`cifar-10-batches-bin`, `cifar-100-binary`,
/// `cifar-10-batches-py`, `cifar-100-python`, `gzip`) or that torchvision puts them in (`MNIST/raw`,
/// `FashionMNIST/raw`, `KMNIST/raw`, `EMNIST/raw`), if there is only one of them. An archive beside the folder that it
/// unpacks to is passed over.
///
/// Mean and standard deviation are the published ones for both CIFARs and for MNIST and Fashion-MNIST, which are told
/// apart by their first labels, since their files have the same names. For other sets they are computed from the
/// training images.
///
/// # Errors
/// Any variant of [`DataError`] that names a path. Memory is allocated for what the files really hold, unpacked,
/// whatever their headers claim, and for no more than the headers claim.
pub fn load(path: &Path) -> Result<Dataset, DataError> {
    load_with(path, &LoadOptions::default(), &mut |_, _| true)
}

/// How the pictures of a folder are read. Sets of other formats are always in memory and have one size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Cut each picture to its middle square, and resize it to so many pixels a side; none for pictures of one size.
    pub image_size: Option<usize>,
    /// The most bytes that the decoded pictures of a split may take in memory. More stay in their files, from which
    /// training and evaluation decode them as they need them. None for a quarter of the memory that is available, and
    /// for no limit where this is not known.
    pub memory: Option<u64>,
    /// Leave out mean and standard deviation of a single split of pictures, for which training images may have to be
    /// decoded.
    pub without_statistics: bool,
}

impl LoadOptions {
    /// The most bytes of a split that are decoded into memory.
    fn most_bytes(&self) -> u64 {
        self.memory.or_else(available_memory).unwrap_or(u64::MAX)
    }
}

/// A quarter of the memory that programs can have, as Linux tells it; none elsewhere. There may be two splits, and on
/// the CPU each is in memory twice for a moment.
fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kibibytes = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB"))?;
    Some(kibibytes.trim().parse::<u64>().ok()?.saturating_mul(256))
}

/// Reads a data set as [`load`] does, with options for the pictures of a folder. While these are decoded, `watch`
/// receives how many of a split are done, and of how many; it stops the work by returning false.
///
/// # Errors
/// As [`load`]; [`DataError::NotResized`] for a size with another format; [`DataError::Stopped`].
pub fn load_with(
    path: &Path,
    options: &LoadOptions,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Dataset, DataError> {
    let (format, folder) = find(path)?;
    if is_pictures(path, format, options)? {
        return image_folder::load(&folder, options, watch);
    }
    (format.load)(&folder)
}

/// Whether a format is a folder of pictures. Others are not resized.
fn is_pictures(path: &Path, format: &Format, options: &LoadOptions) -> Result<bool, DataError> {
    match (format.name == image_folder::FORMAT.name, options.image_size) {
        (false, Some(_)) => Err(DataError::NotResized { path: path.into(), name: format.name }),
        (is_pictures, _) => Ok(is_pictures),
    }
}

/// Reads one split as [`load`] does; the other one need not be there.
///
/// Sets without published statistics take them from the training images where these are present; elsewhere they have
/// none, and [`SplitImages::statistics`] says so. The number of classes comes from the label files that are there.
///
/// # Errors
/// As [`load`].
pub fn load_split(path: &Path, split: Split) -> Result<SplitImages, DataError> {
    load_split_with(path, split, &LoadOptions::default(), &mut |_, _| true)
}

/// Reads one split as [`load_split`] does, with options as in [`load_with`].
///
/// # Errors
/// As [`load_with`].
pub fn load_split_with(
    path: &Path,
    split: Split,
    options: &LoadOptions,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<SplitImages, DataError> {
    let (format, folder) = find(path)?;
    if is_pictures(path, format, options)? {
        return image_folder::load_split(&folder, split, options, watch);
    }
    (format.load_split)(&folder, split)
}

/// The format whose name stands in place of a path.
fn find_generated(path: &Path) -> Option<&'static Format> {
    let by_name = |format: &&Format| matches!(format.recognise, Recognise::ByName) && Path::new(format.name) == path;
    FORMATS.iter().find(by_name)
}

/// Whether this is the name of a data set that needs no files, such as `synthetic`, and not a path.
pub fn is_generated(name: &str) -> bool {
    find_generated(Path::new(name)).is_some()
}

/// The format of a path, and the folder that its files lie in.
fn find(path: &Path) -> Result<(&'static Format, PathBuf), DataError> {
    if let Some(format) = find_generated(path) {
        return Ok((format, path.into()));
    }
    let metadata = fs::metadata(path).map_err(|source| DataError::Io { path: path.into(), source })?;
    let mut found: Vec<(&Format, PathBuf, &'static str)> = Vec::new();
    for format in FORMATS {
        let Recognise::ByFiles { holds, below } = format.recognise else { continue };
        if holds(path)? {
            found.push((format, path.into(), format.name));
            continue;
        }
        for &name in below {
            let folder = path.join(name);
            if holds(&folder)? {
                found.push((format, folder, name));
            }
        }
    }
    // An archive usually lies beside what was unpacked from it.
    let places: Vec<PathBuf> = found.iter().map(|(_, place, _)| place.clone()).collect();
    found.retain(|(_, place, _)| !cifar_archive::unpacked(place).is_some_and(|folder| places.contains(&folder)));
    match found.pop() {
        None if metadata.is_dir() => Err(DataError::NotRecognised { path: path.into() }),
        None => Err(DataError::NotAFolder { path: path.into() }),
        Some((format, folder, _)) if found.is_empty() => Ok((format, folder)),
        Some((.., second)) => Err(DataError::Ambiguous { path: path.into(), first: found[0].2, second }),
    }
}

/// The integers of `width` bytes (1, 2, 4 or 8) in the bytes of an array. None if a number is cut off, or larger than
/// `i64` holds.
fn integers(bytes: &[u8], width: usize, signed: bool, big_endian: bool) -> Option<Vec<i64>> {
    if !bytes.len().is_multiple_of(width) {
        return None;
    }
    let number = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..width].copy_from_slice(bytes);
        if big_endian {
            word[..width].reverse();
        }
        let number = u64::from_le_bytes(word);
        let unused = 64 - 8 * width as u32;
        if signed { Some((number << unused) as i64 >> unused) } else { i64::try_from(number).ok() }
    };
    bytes.chunks_exact(width).map(number).collect()
}

/// Whether there is something to read at the path: anything but a folder, such as one that an archive was unpacked to
/// and that has the name of its only file. Unlike with `Path::exists`, a folder that cannot be searched is an error.
fn is_there(path: &Path) -> Result<bool, DataError> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(!metadata.is_dir()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(source) => Err(DataError::Io { path: path.into(), source }),
    }
}

/// Opens a regular file and returns its size in bytes. Pipes are refused, because they can block, and devices, because
/// they may never end.
pub(crate) fn open(path: &Path) -> Result<(File, u64), DataError> {
    let io = |source| DataError::Io { path: path.into(), source };
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(DataError::NotAFile { path: path.into() });
    }
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    Ok((file, bytes))
}

/// Writes the order in which an epoch visits its `order.len()` samples: a uniformly random permutation of `0..len` that
/// depends on `len`, `seed` and `epoch` alone, so that a run can be resumed at any epoch. Allocates nothing.
///
/// Fisher–Yates, driven by ChaCha8 with the seed as its key and the epoch as its stream: 4 bytes are written per
/// sample, and every sample is then touched in a random place.
///
/// # Panics
/// If there are more than `u32::MAX` samples.
///
/// ```
/// let mut order = [0; 5];
/// polder::data::epoch_order(7, 0, &mut order);
/// order.sort_unstable();
/// assert_eq!(order, [0, 1, 2, 3, 4]);
/// ```
pub fn epoch_order(seed: u64, epoch: u64, order: &mut [u32]) {
    shuffle(&mut generator(seed, b"epochord", epoch), order);
}

/// Fills `order` with a random permutation of its indices.
fn shuffle(rng: &mut ChaCha8Rng, order: &mut [u32]) {
    let len = u32::try_from(order.len()).expect("a data set has at most u32::MAX samples");
    for (index, entry) in (0..len).zip(order.iter_mut()) {
        *entry = index;
    }
    for last in (1..len).rev() {
        let chosen = below(rng, last + 1);
        order.swap(last as usize, chosen as usize);
    }
}

/// ChaCha8 whose key is the seed (little-endian) and then `purpose`, so that one seed gives unrelated numbers for
/// unrelated things. The key is laid out here, not by a library's seeding function, whose result may change with its
/// version.
fn generator(seed: u64, purpose: &[u8; 8], stream: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(purpose);
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(stream);
    rng
}

/// A uniform number below `bound`, without bias: the high half of a 32x32-bit product, redrawn in the rare case that
/// its low half falls into the incomplete last interval (Lemire 2019, "Fast random integer generation in an
/// interval").
fn below(rng: &mut ChaCha8Rng, bound: u32) -> u32 {
    loop {
        let product = u64::from(rng.next_u32()) * u64::from(bound);
        let low = product as u32;
        if low >= bound || low >= bound.wrapping_neg() % bound {
            return (product >> 32) as u32;
        }
    }
}
