//! Pictures in files: decoded on all cores into memory, or one by one when they are needed.

use std::io::BufReader;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crc32fast::Hasher;
use image::imageops::{self, FilterType};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, RgbImage};

use super::error::excerpt;
use super::pixels::Sums;
use super::{DataError, ImageShape, open};

/// Channels of every decoded picture.
pub(super) const CHANNELS: usize = 3;
/// The longest side of a picture, in pixels.
pub(super) const MOST_SIDE: u32 = 1 << 14;
/// The most bytes that a picture may take while it is decoded.
const MOST_BYTES: u64 = 1 << 28;

/// The pictures of a split, which stay in their files. Each has been decoded once when the data set was opened, so none
/// was damaged then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pictures {
    list: Vec<Picture>,
    form: Form,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Picture {
    file: Arc<Path>,
    /// CRC-32 of its pixels. The checksum of all images is made of these, and a file that changes is noticed.
    checksum: u32,
}

/// What pictures are decoded to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub shape: ImageShape,
    /// The picture whose size all others must have; none where they are resized.
    pub like: Option<Arc<Path>>,
}

impl Pictures {
    /// Decodes each of these files once, and keeps none of their pixels. Also returns the sums over all pixels. `watch`
    /// receives how many pictures are done, and of how many; it stops the work by returning false.
    pub(super) fn open(
        files: Vec<Arc<Path>>,
        form: Form,
        watch: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<(Self, Sums), DataError> {
        let found = Mutex::new((vec![0; files.len()], Sums::new(CHANNELS)));
        let decode = |(index, file): (usize, &Arc<Path>)| {
            let pixels = form.decode(file)?;
            let mut sums = Sums::new(CHANNELS);
            sums.add(&pixels);
            let checksum = crc32fast::hash(&pixels);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.0[index] = checksum;
            found.1.merge(&sums);
            Ok(())
        };
        in_parallel(files.iter().enumerate(), decode, watch)?;
        let (checksums, sums) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let list = files.into_iter().zip(checksums).map(|(file, checksum)| Picture { file, checksum }).collect();
        Ok((Self { list, form }, sums))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The pixels of one picture, NHWC.
    ///
    /// # Errors
    /// A file that is gone or damaged; [`DataError::PictureChanged`].
    ///
    /// # Panics
    /// If there is no picture of this number.
    pub fn decode(&self, index: usize) -> Result<Vec<u8>, DataError> {
        let Picture { file, checksum } = &self.list[index];
        let pixels = self.form.decode(file)?;
        if crc32fast::hash(&pixels) == *checksum {
            return Ok(pixels);
        }
        Err(DataError::PictureChanged { path: file.to_path_buf() })
    }

    /// The pixels of some pictures, one after another.
    pub(super) fn decode_range(&self, range: Range<usize>) -> Result<Vec<u8>, DataError> {
        let bytes = self.form.shape.bytes();
        let mut pixels = zeros(range.len().saturating_mul(bytes))?;
        let decode = |(index, into): (usize, &mut [u8])| {
            into.copy_from_slice(&self.decode(index)?);
            Ok(())
        };
        in_parallel(range.zip(pixels.chunks_mut(bytes)), decode, &mut |_, _| true)?;
        Ok(pixels)
    }

    /// The sums over all pixels.
    pub(super) fn sums(&self) -> Result<Sums, DataError> {
        let sums = Mutex::new(Sums::new(CHANNELS));
        let add = |index: usize| {
            let mut own = Sums::new(CHANNELS);
            own.add(&self.decode(index)?);
            sums.lock().unwrap_or_else(PoisonError::into_inner).merge(&own);
            Ok(())
        };
        in_parallel(0..self.len(), add, &mut |_, _| true)?;
        Ok(sums.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// Extends a checksum by the pixels of all pictures, as if they were in memory.
    pub(super) fn add_to(&self, sum: &mut Hasher) {
        let bytes = self.form.shape.bytes() as u64;
        self.list.iter().for_each(|picture| sum.combine(&Hasher::new_with_initial_len(picture.checksum, bytes)));
    }

    /// Keeps the first ones.
    pub(super) fn truncate(&mut self, count: usize) {
        self.list.truncate(count);
    }

    /// Some of the pictures.
    pub(super) fn select(&self, samples: &[usize]) -> Self {
        Self { list: samples.iter().map(|&sample| self.list[sample].clone()).collect(), form: self.form.clone() }
    }
}

/// Decodes all pictures into memory.
pub(super) fn decode_all(
    files: &[Arc<Path>],
    form: &Form,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Vec<u8>, DataError> {
    let bytes = form.shape.bytes();
    // The first header decides how much memory all pictures take, so that picture has to be there, and the others must
    // have its size.
    if form.like.is_some() {
        form.decode(&files[0])?;
        files[1..].iter().try_for_each(|file| form.check_size(file, decoder(file)?.1))?;
    }
    let mut pixels = zeros(files.len().saturating_mul(bytes))?;
    let decode = |(file, into): (&Arc<Path>, &mut [u8])| {
        into.copy_from_slice(&form.decode(file)?);
        Ok(())
    };
    in_parallel(files.iter().zip(pixels.chunks_mut(bytes)), decode, watch)?;
    Ok(pixels)
}

/// Zeros, or an error that says how many could not be had.
fn zeros(bytes: usize) -> Result<Vec<u8>, DataError> {
    let mut zeros: Vec<u8> = Vec::new();
    zeros.try_reserve_exact(bytes).map_err(|_| DataError::PictureMemory { bytes })?;
    drop(zeros);
    // Memory of the system, which is taken as the pictures are decoded: a damaged one ends that before.
    Ok(vec![0; bytes])
}

/// Does the work for each item on all cores. The error is that of the first item that fails. `watch` is called on this
/// thread.
fn in_parallel<T: Send>(
    items: impl ExactSizeIterator<Item = T> + Send,
    work: impl Fn(T) -> Result<(), DataError> + Sync,
    watch: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<(), DataError> {
    let (count, done) = (items.len(), AtomicUsize::new(0));
    let items = Mutex::new(items.enumerate());
    let failed: Mutex<Option<(usize, DataError)>> = Mutex::new(None);
    let fail = |index: usize, error: DataError| {
        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.as_ref().is_none_or(|(other, _)| index < *other) {
            *failed = Some((index, error));
        }
    };
    // Returns whether there was an item.
    let one = || {
        if failed.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return false;
        }
        let next = items.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some((index, item)) = next else { return false };
        work(item).unwrap_or_else(|error| fail(index, error));
        done.fetch_add(1, Ordering::Relaxed);
        true
    };
    thread::scope(|scope| {
        for _ in 1..thread::available_parallelism().map_or(1, usize::from) {
            // Where no thread can be made, fewer do the work.
            drop(thread::Builder::new().spawn_scoped(scope, || while one() {}));
        }
        while one() {
            if !watch(done.load(Ordering::Relaxed), count) {
                fail(0, DataError::Stopped);
            }
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None if watch(count, count) => Ok(()),
        None => Err(DataError::Stopped),
    }
}

impl Form {
    fn decode(&self, file: &Path) -> Result<Vec<u8>, DataError> {
        let (decoder, sides) = decoder(file)?;
        self.check_size(file, sides)?;
        let decoded = DynamicImage::from_decoder(decoder).map_err(|error| damaged(file, &error))?.into_rgb8();
        let fitted = if self.like.is_none() { fit(&decoded, self.shape.height as u32) } else { decoded };
        Ok(fitted.into_raw())
    }

    /// Fails for a picture of another size than the others, unless they are resized.
    fn check_size(&self, file: &Path, [width, height]: [u32; 2]) -> Result<(), DataError> {
        let found = ImageShape { height: height as usize, width: width as usize, channels: CHANNELS };
        match &self.like {
            Some(first) if found != self.shape => {
                let (path, first, expected) = (file.into(), first.to_path_buf(), self.shape);
                Err(DataError::PictureSizes { path, found, first, expected })
            }
            _ => Ok(()),
        }
    }
}

/// The middle square of a picture, resized. A filter as wide as the shrinking is averages what is left out.
fn fit(picture: &RgbImage, size: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    let side = width.min(height);
    let square = imageops::crop_imm(picture, (width - side) / 2, (height - side) / 2, side, side);
    imageops::resize(&*square, size, size, FilterType::Triangle)
}

/// Width and height of a picture, from its header.
pub(super) fn sides(file: &Path) -> Result<[u32; 2], DataError> {
    Ok(decoder(file)?.1)
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
