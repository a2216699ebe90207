//! A folder of pictures by class: `train/CLASS/*.jpg` and `test/CLASS/*.jpg` (or `val/`), as PNG, JPEG or WebP. The
//! classes are numbered in the order of their folders' names, and so are the pictures of a class.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::pictures::{CHANNELS, Form, MOST_SIDE, Pictures, decode_all, sides};
use super::pixels::Sums;
use super::{
    DataError, Dataset, Format, ImageShape, Images, LoadOptions, Pixels, Recognise, Split, SplitImages,
    StatisticsSource, is_there,
};

/// Pictures in folders. [`load`] and [`load_split`] take options for them.
pub(super) const FORMAT: Format = Format {
    name: "a folder of pictures",
    files: "train/CLASS/*.jpg and test/CLASS/*.jpg (pictures by class)",
    recognise: Recognise::ByFiles { holds, below: &[] },
    load: |folder| load(folder, &LoadOptions::default(), &mut |_, _| true),
    load_split: |folder, split| load_split(folder, split, &LoadOptions::default(), &mut |_, _| true),
};

/// Where the pictures of a split may be.
fn names(split: Split) -> &'static [&'static str] {
    if split == Split::Train { &["train"] } else { &["test", "val"] }
}

fn holds(path: &Path) -> Result<bool, DataError> {
    for name in ["train", "test", "val"] {
        for class in class_names(&path.join(name))? {
            if !pictures(&path.join(name).join(class))?.is_empty() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Reads both splits. Without a size all pictures must have the same one.
pub(super) fn load(
    folder: &Path,
    options: &LoadOptions,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Dataset, DataError> {
    let (train, sums) = read(folder, Split::Train, options, watch)?;
    let (test, _) = read(folder, Split::Test, options, watch)?;
    if test.shape != train.shape {
        return Err(DataError::ShapeMismatch { path: folder.into(), train: train.shape, test: test.shape });
    }
    let (mean, std) = sums.map_or_else(|| train.mean_and_std(), |sums| Ok(sums.mean_and_std()))?;
    Ok(Dataset { name: folder_name(folder), train, test, mean, std, statistics: StatisticsSource::TrainImages })
}

/// Reads one split as [`load`] does. For the statistics of a test split the training pictures are decoded, but not
/// kept.
pub(super) fn load_split(
    folder: &Path,
    split: Split,
    options: &LoadOptions,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<SplitImages, DataError> {
    let (images, sums) = read(folder, split, options, watch)?;
    let known = match (split, sums) {
        _ if options.without_statistics => None,
        (Split::Train, None) => Some(images.mean_and_std()?),
        (Split::Train, Some(sums)) => Some(sums.mean_and_std()),
        (Split::Test, _) if class_names(&folder.join("train"))?.is_empty() => None,
        (Split::Test, _) => {
            let Listed { files, form, .. } = list(folder, Split::Train, options.image_size)?;
            Some(Pictures::open(files, form, watch)?.1.mean_and_std())
        }
    };
    let statistics = if known.is_some() { StatisticsSource::TrainImages } else { StatisticsSource::Unknown };
    let (mean, std) = known.unwrap_or_default();
    Ok(SplitImages { name: folder_name(folder), images, mean, std, statistics })
}

fn folder_name(folder: &Path) -> String {
    folder.file_name().map_or_else(|| "pictures".into(), |name| name.to_string_lossy().into_owned())
}

// ---- What there is --------------------------------------------------------------------------------------------------

/// The entries of a folder, none if there is no such folder.
fn entries(folder: &Path) -> Result<Vec<DirEntry>, DataError> {
    let io = |source| DataError::Io { path: folder.into(), source };
    match fs::read_dir(folder) {
        Ok(entries) => entries.collect::<io::Result<_>>().map_err(io),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(io(error)),
    }
}

/// The folders in a folder, which are classes, in the order of their names.
fn class_names(folder: &Path) -> Result<BTreeSet<std::ffi::OsString>, DataError> {
    let folders = entries(folder)?.into_iter().filter(|entry| entry.path().is_dir());
    Ok(folders.map(|entry| entry.file_name()).filter(|name| !name.as_encoded_bytes().starts_with(b".")).collect())
}

/// The pictures in a folder, in the order of their names.
fn pictures(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let is_picture = |path: &PathBuf| {
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let extension = path.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
        !hidden && matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg" | "webp"))
    };
    let mut paths: Vec<PathBuf> = entries(folder)?.iter().map(DirEntry::path).filter(is_picture).collect();
    paths.sort();
    let mut files = Vec::new();
    for path in paths {
        if is_there(&path)? {
            files.push(path);
        }
    }
    Ok(files)
}

/// The folder of a split.
fn split_folder(folder: &Path, split: Split) -> Result<PathBuf, DataError> {
    let mut found = names(split).iter().map(|name| folder.join(name)).filter(|path| path.is_dir());
    match (found.next(), found.next()) {
        (Some(_), Some(_)) => Err(DataError::Ambiguous { path: folder.into(), first: "test", second: "val" }),
        (Some(path), None) => Ok(path),
        (None, _) => {
            let file = names(split).join(" or ");
            Err(DataError::MissingFile { folder: folder.into(), file, split })
        }
    }
}

/// The pictures of a split, as their names and the first header say.
struct Listed {
    files: Vec<Arc<Path>>,
    labels: Vec<u32>,
    form: Form,
    classes: usize,
}

fn list(folder: &Path, split: Split, size: Option<usize>) -> Result<Listed, DataError> {
    let place = split_folder(folder, split)?;
    // The classes of both splits, so that a class has one number.
    let mut classes = BTreeSet::new();
    for name in ["train", "test", "val"] {
        classes.extend(class_names(&folder.join(name))?);
    }
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for (label, class) in (0..).zip(&classes) {
        let found = pictures(&place.join(class))?;
        labels.extend(found.iter().map(|_| label));
        files.extend(found.into_iter().map(Arc::<Path>::from));
    }
    let Some(first) = files.first() else {
        return Err(DataError::MissingFile { folder: place, file: "CLASS/*.png, .jpg or .webp".into(), split });
    };
    let (like, side) = match size {
        Some(size) => (None, [size, size]),
        None => (Some(first.clone()), sides(first)?.map(|side| side as usize)),
    };
    let shape = ImageShape { height: side[1], width: side[0], channels: CHANNELS };
    if side.contains(&0) {
        return Err(DataError::NoImages { images: files.len(), shape });
    }
    if side.iter().any(|&side| side > MOST_SIDE as usize) {
        let bytes = [side[0], side[1], CHANNELS].into_iter().fold(files.len(), usize::saturating_mul);
        return Err(DataError::PictureMemory { bytes });
    }
    Ok(Listed { files, labels, form: Form { shape, like }, classes: classes.len() })
}

/// Reads a split: into memory, or where it would take too much, once without keeping the pixels, which gives the sums
/// over them.
fn read(
    folder: &Path,
    split: Split,
    options: &LoadOptions,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<(Images, Option<Sums>), DataError> {
    let Listed { files, labels, form, classes } = list(folder, split, options.image_size)?;
    let shape = form.shape;
    let bytes = (files.len() as u64).saturating_mul(shape.bytes() as u64);
    let (pixels, sums) = if bytes > options.most_bytes() {
        let (pictures, sums) = Pictures::open(files, form, watch)?;
        (Pixels::Files(pictures), Some(sums))
    } else {
        (decode_all(&files, &form, watch)?.into(), None)
    };
    Ok((Images { pixels, labels, shape, classes }, sums))
}
