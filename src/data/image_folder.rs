//! A folder of pictures by class: `train/CLASS/*.jpg` and `test/CLASS/*.jpg` (or `val/`), as PNG, JPEG or WebP. The
//! classes are numbered in the order of their folders' names, and so are the pictures of a class.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};

use super::error::excerpt;
use super::{
    DataError, Dataset, Format, ImageShape, Images, Recognise, Split, SplitImages, StatisticsSource, is_there,
    mean_and_std, open,
};

/// Pictures in folders. [`load_sized`] and [`load_split_sized`] also resize them.
pub(super) const FORMAT: Format = Format {
    name: "a folder of pictures",
    files: "train/CLASS/*.jpg and test/CLASS/*.jpg (pictures by class)",
    recognise: Recognise::ByFiles { holds, below: &[] },
    load: |folder| load_sized(folder, None),
    load_split: |folder, split| load_split_sized(folder, split, None),
};

const CHANNELS: usize = 3;
/// The longest side of a picture, in pixels.
const MOST_SIDE: u32 = 1 << 14;
/// The most bytes that a picture may take while it is decoded.
const MOST_BYTES: u64 = 1 << 28;

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
pub(super) fn load_sized(folder: &Path, size: Option<usize>) -> Result<Dataset, DataError> {
    let train = read(folder, Split::Train, size)?;
    let test = read(folder, Split::Test, size)?;
    if test.shape != train.shape {
        return Err(DataError::ShapeMismatch { path: folder.into(), train: train.shape, test: test.shape });
    }
    let (mean, std) = mean_and_std(&train.pixels, CHANNELS);
    Ok(Dataset { name: folder_name(folder), train, test, mean, std, statistics: StatisticsSource::TrainImages })
}

/// Reads one split as [`load_sized`] does.
pub(super) fn load_split_sized(folder: &Path, split: Split, size: Option<usize>) -> Result<SplitImages, DataError> {
    let images = read(folder, split, size)?;
    let name = folder_name(folder);
    if split == Split::Test && class_names(&folder.join("train"))?.is_empty() {
        let (mean, std, statistics) = (Vec::new(), Vec::new(), StatisticsSource::Unknown);
        return Ok(SplitImages { name, images, mean, std, statistics });
    }
    let train = if split == Split::Test { Some(read(folder, Split::Train, size)?) } else { None };
    let (mean, std) = mean_and_std(&train.as_ref().unwrap_or(&images).pixels, CHANNELS);
    Ok(SplitImages { name, images, mean, std, statistics: StatisticsSource::TrainImages })
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

// ---- Decoding -------------------------------------------------------------------------------------------------------

fn read(folder: &Path, split: Split, size: Option<usize>) -> Result<Images, DataError> {
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
        files.extend(found);
    }
    let Some(first) = files.first() else {
        return Err(DataError::MissingFile { folder: place, file: "CLASS/*.png, .jpg or .webp".into(), split });
    };
    let side = match size {
        Some(size) => [size, size],
        None => decoder(first)?.1.map(|side| side as usize),
    };
    let shape = ImageShape { height: side[1], width: side[0], channels: CHANNELS };
    if side.contains(&0) {
        return Err(DataError::NoImages { images: files.len(), shape });
    }
    let out_of_memory = || DataError::Io { path: place.clone(), source: io::ErrorKind::OutOfMemory.into() };
    let is_possible = side.iter().all(|&side| side <= MOST_SIDE as usize);
    let bytes = if is_possible { files.len().checked_mul(shape.bytes()) } else { None };
    let bytes = bytes.ok_or_else(out_of_memory)?;
    // Without a size the first header decides how much memory all pictures take, so that picture has to be there.
    if size.is_none() {
        let mut pixels = vec![0; shape.bytes()];
        decode_one(first, first, shape, size, &mut pixels)?;
        for file in &files[1..] {
            check_size(file, decoder(file)?.1, first, shape)?;
        }
    }
    let mut pixels = Vec::new();
    pixels.try_reserve_exact(bytes).map_err(|_| out_of_memory())?;
    // Memory of the system, which is taken as the pictures are decoded: a damaged one ends that before.
    pixels = vec![0; bytes];
    decode_all(&files, shape, size, &mut pixels)?;
    Ok(Images { pixels, labels, shape, classes: classes.len() })
}

/// Decodes pictures on all cores, each to its place. The error is that of the first picture that cannot be used.
fn decode_all(files: &[PathBuf], shape: ImageShape, size: Option<usize>, pixels: &mut [u8]) -> Result<(), DataError> {
    let work = Mutex::new(files.iter().zip(pixels.chunks_mut(shape.bytes())).enumerate());
    let failed: Mutex<Option<(usize, DataError)>> = Mutex::new(None);
    let decode = || {
        loop {
            if failed.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                return;
            }
            let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((index, (file, into))) = next else { return };
            if let Err(error) = decode_one(file, &files[0], shape, size, into) {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|(other, _)| index < *other) {
                    *failed = Some((index, error));
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(decode);
        }
        decode();
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

fn decode_one(
    file: &Path,
    first: &Path,
    shape: ImageShape,
    size: Option<usize>,
    into: &mut [u8],
) -> Result<(), DataError> {
    let (decoder, sides) = decoder(file)?;
    if size.is_none() {
        check_size(file, sides, first, shape)?;
    }
    let decoded = DynamicImage::from_decoder(decoder).map_err(|error| damaged(file, &error))?.into_rgb8();
    let fitted = if size.is_some() { fit(&decoded, shape.height as u32) } else { decoded };
    into.copy_from_slice(fitted.as_raw());
    Ok(())
}

/// Fails for a picture of another size than the first one.
fn check_size(file: &Path, [width, height]: [u32; 2], first: &Path, expected: ImageShape) -> Result<(), DataError> {
    let found = ImageShape { height: height as usize, width: width as usize, channels: CHANNELS };
    if found == expected {
        return Ok(());
    }
    Err(DataError::PictureSizes { path: file.into(), found, first: first.into(), expected })
}

/// The middle square of a picture, resized. A filter as wide as the shrinking is averages what is left out.
fn fit(picture: &RgbImage, size: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let side = width.min(height);
    let square = imageops::crop_imm(picture, (width - side) / 2, (height - side) / 2, side, side);
    imageops::resize(&*square, size, size, FilterType::Triangle)
}

/// A decoder for a picture, and its width and height, which are within the limits.
fn decoder(file: &Path) -> Result<(impl ImageDecoder, [u32; 2]), DataError> {
    let (opened, _) = open(file)?;
    let io = |source| DataError::Io { path: file.into(), source };
    let mut reader = ImageReader::new(BufReader::new(opened)).with_guessed_format().map_err(io)?;
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MOST_SIDE), Some(MOST_SIDE));
    limits.max_alloc = Some(MOST_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(|error| damaged(file, &error))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 || width.max(height) > MOST_SIDE || decoder.total_bytes() > MOST_BYTES {
        let reason = format!("{width} x {height} pixels, more than {MOST_SIDE} a side or {MOST_BYTES} bytes decoded");
        return Err(DataError::Picture { path: file.into(), reason });
    }
    Ok((decoder, [width, height]))
}

fn damaged(file: &Path, error: &image::ImageError) -> DataError {
    DataError::Picture { path: file.into(), reason: excerpt(error.to_string().as_bytes()) }
}
