//! CIFAR-10-C and CIFAR-100-C (Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common
//! Corruptions and Perturbations"): the test images with one corruption a file, all severities one after another, and
//! `labels.npy` for them.

use std::fs;
use std::path::{Path, PathBuf};

use super::cifar::{CIFAR10_SET, CIFAR100_SET, SHAPE, Set};
use super::npy::NpyFile;
use super::{DataError, Format, Images, Recognise, Split, SplitImages, StatisticsSource, is_there};

/// Corrupted test images. They cannot be loaded as a data set: [`Corrupted`] reads them.
pub(super) const FORMAT: Format = Format {
    name: "cifar-10-c",
    files: "labels.npy and gaussian_noise.npy and so on (CIFAR-10-C, for eval)",
    recognise: Recognise::ByFiles { holds: has_files, below: &[] },
    load: |folder| Err(DataError::OnlyCorrupted { path: folder.into() }),
    load_split: |folder, _| Err(DataError::OnlyCorrupted { path: folder.into() }),
};

/// How many severities each corruption has.
pub const SEVERITIES: usize = 5;

/// The fifteen corruptions of the benchmark, in its order. The published files have four more, for validation.
const BENCHMARK: [&str; 15] = [
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
];

const LABELS: &str = "labels.npy";

fn has_files(folder: &Path) -> Result<bool, DataError> {
    if !is_there(&folder.join(LABELS))? {
        return Ok(false);
    }
    Ok(!names(folder)?.is_empty())
}

/// The corruptions in a folder, those of the benchmark first, in its order.
fn names(folder: &Path) -> Result<Vec<String>, DataError> {
    let io = |source| DataError::Io { path: folder.into(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let is_array = path.extension().is_some_and(|extension| extension == "npy");
        let Some(name) = path.file_stem().and_then(|name| name.to_str()).filter(|_| is_array) else { continue };
        if name != "labels" && is_there(&path)? {
            names.push(name.to_string());
        }
    }
    let place = |name: &str| BENCHMARK.iter().position(|known| *known == name).unwrap_or(BENCHMARK.len());
    names.sort_by(|a, b| (place(a), a).cmp(&(place(b), b)));
    Ok(names)
}

/// A folder of corrupted test images: `NAME.npy` for each corruption, with five severities of the same images one after
/// another, and `labels.npy`. A severity is read when it is asked for.
pub struct Corrupted {
    folder: PathBuf,
    set: &'static Set,
    /// The corruptions, those of the benchmark first, in its order.
    pub names: Vec<String>,
    /// One label for each image of all severities.
    labels: Vec<u32>,
}

impl Corrupted {
    /// Reads the names of the corruptions, and the labels.
    ///
    /// # Errors
    /// [`DataError::MissingFile`] or [`DataError::NotRecognised`] without such files; a `labels.npy` that is damaged,
    /// or whose length is no multiple of five.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(LABELS);
        if !is_there(&path)? {
            return Err(DataError::MissingFile { folder: folder.into(), file: LABELS.into(), split: Split::Test });
        }
        let names = names(folder)?;
        if names.is_empty() {
            return Err(DataError::NotRecognised { path: folder.into() });
        }
        let file = NpyFile::open(&path)?;
        let labels = file.labels(CIFAR100_SET.classes)?;
        if !labels.len().is_multiple_of(SEVERITIES) {
            return Err(file.wrong("five times as many labels as images"));
        }
        let is_ten = labels.iter().all(|&label| (label as usize) < CIFAR10_SET.classes);
        let set = if is_ten { &CIFAR10_SET } else { &CIFAR100_SET };
        Ok(Self { folder: folder.into(), set, names, labels })
    }

    /// Whether a corruption counts in the benchmark's mean.
    pub fn is_of_benchmark(name: &str) -> bool {
        BENCHMARK.contains(&name)
    }

    /// The images of a corruption at a severity from 1 to [`SEVERITIES`], with the normalisation of the clean set.
    ///
    /// # Errors
    /// [`DataError::NoCorruption`], for a severity too; a damaged file.
    pub fn read(&self, name: &str, severity: usize) -> Result<SplitImages, DataError> {
        if !self.names.iter().any(|known| known == name) || !(1..=SEVERITIES).contains(&severity) {
            let (folder, present) = (self.folder.clone(), self.names.join(", "));
            return Err(DataError::NoCorruption { folder, name: name.into(), present });
        }
        let path = self.folder.join(format!("{name}.npy"));
        let file = NpyFile::open(&path)?;
        if file.sizes.get(1..) != Some(&[SHAPE.height, SHAPE.width, SHAPE.channels]) || !file.is_bytes() {
            return Err(file.wrong("N x 32 x 32 x 3 unsigned bytes (u1)"));
        }
        if file.sizes[0] != self.labels.len() {
            let (images, labels, labels_path) = (file.sizes[0], self.labels.len(), self.folder.join(LABELS));
            return Err(DataError::Count { path, images, labels, labels_path });
        }
        let count = self.labels.len() / SEVERITIES;
        let first = (severity - 1) * count;
        let place = |image: usize| (image * SHAPE.bytes()) as u64;
        let pixels = file.bytes(place(first)..place(first + count))?;
        let labels = self.labels[first..first + count].to_vec();
        let Set { name: of, classes, mean, std } = self.set;
        Ok(SplitImages {
            name: format!("{of}-c"),
            images: Images { pixels: pixels.into(), labels, shape: SHAPE, classes: *classes },
            mean: mean.to_vec(),
            std: std.to_vec(),
            statistics: StatisticsSource::Published,
        })
    }
}
