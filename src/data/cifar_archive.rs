//! The archives of CIFAR-10 and CIFAR-100 as they are downloaded, unopened.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use tar::Archive;

use super::cifar::{CIFAR10_BINARY, CIFAR100_BINARY, Layout};
use super::cifar_python::{CIFAR10_PYTHON, CIFAR100_PYTHON};
use super::error::excerpt;
use super::gzip::Members;
use super::{DataError, Dataset, Format, Growing, Images, Recognise, Split, SplitImages, is_there, open};

/// An archive of any of them.
pub(super) const FORMAT: Format = Format {
    name: "an archive of CIFAR",
    files: "cifar-10-python.tar.gz and so on (CIFAR's archives)",
    recognise: Recognise::ByFiles { holds: |path| Ok(known(path).is_some() && is_there(path)?), below: &NAMES },
    load,
    load_split,
};

const NAMES: [&str; 4] =
    ["cifar-10-binary.tar.gz", "cifar-10-python.tar.gz", "cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"];

/// For each name, the folder that is in the archive, and its files.
static CONTENTS: [(&str, &Layout); 4] = [
    ("cifar-10-batches-bin", &CIFAR10_BINARY),
    ("cifar-10-batches-py", &CIFAR10_PYTHON),
    ("cifar-100-binary", &CIFAR100_BINARY),
    ("cifar-100-python", &CIFAR100_PYTHON),
];

/// The most bytes that an archive may unpack to: more than twice what the published ones do.
const MOST_BYTES: u64 = 1 << 29;

fn known(path: &Path) -> Option<&'static (&'static str, &'static Layout)> {
    let name = path.file_name()?;
    NAMES.iter().zip(&CONTENTS).find(|(known, _)| OsStr::new(known) == name).map(|(_, contents)| contents)
}

/// Where an archive's files are if it was unpacked in its own folder.
pub(super) fn unpacked(path: &Path) -> Option<PathBuf> {
    let (folder, _) = known(path)?;
    Some(path.with_file_name(folder))
}

fn load(path: &Path) -> Result<Dataset, DataError> {
    let (layout, mut files) = read(path, &[Split::Train, Split::Test])?;
    let train = collect(layout, path, &mut files, Split::Train)?;
    Ok(layout.dataset(train, collect(layout, path, &mut files, Split::Test)?))
}

fn load_split(path: &Path, split: Split) -> Result<SplitImages, DataError> {
    let (layout, mut files) = read(path, &[split])?;
    Ok(layout.describe(collect(layout, path, &mut files, split)?))
}

/// The images of the files of an archive, by the names of the files.
type Files = HashMap<&'static str, Growing>;

/// Puts the images of a split together, and forgets the files that they came from.
fn collect(layout: &Layout, path: &Path, files: &mut Files, split: Split) -> Result<Images, DataError> {
    let names: Vec<&str> = files.keys().copied().collect();
    let append = |file: &str, images: &mut Growing| {
        if let Some(more) = files.remove(file) {
            super::cifar::reserve(path, more.labels.len(), images)?;
            images.labels.extend(more.labels);
            images.pixels.extend(more.pixels);
        }
        Ok(())
    };
    layout.collect(path, split, |file| Ok(names.contains(&file)), append)
}

/// Reads an archive from start to end, and decodes the files of these splits. Their order in an archive is any.
fn read(path: &Path, splits: &[Split]) -> Result<(&'static Layout, Files), DataError> {
    let Some((folder, layout)) = known(path) else {
        return Err(DataError::NotRecognised { path: path.into() });
    };
    let (file, _) = open(path)?;
    let mut unpacked = Members::new(BufReader::new(file)).take(MOST_BYTES);
    let files = read_entries(path, &mut unpacked, (folder, layout), splits);
    // The end of what may be read looks like the end of the file.
    if unpacked.limit() == 0 {
        let reason = format!("it unpacks to more than {MOST_BYTES} bytes");
        return Err(DataError::Archive { path: path.into(), reason });
    }
    Ok((layout, files?))
}

fn read_entries(
    path: &Path,
    mut unpacked: impl Read,
    (folder, layout): (&str, &Layout),
    splits: &[Split],
) -> Result<Files, DataError> {
    let damaged = |error: io::Error| {
        let reason = excerpt(error.to_string().as_bytes());
        DataError::Archive { path: path.into(), reason }
    };
    let mut files = Files::new();
    // Raw entries: a long name of an entry would be read into memory, whatever its length.
    for entry in Archive::new(&mut unpacked).entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        let Some(file) = wanted(folder, layout, splits, &entry.path_bytes()) else { continue };
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let (name, expected) = (path.join(folder).join(file), entry.size());
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(damaged)?;
        if bytes.len() as u64 != expected {
            return Err(DataError::Truncated { path: name, bytes: bytes.len() as u64, expected });
        }
        let mut images = layout.no_images();
        (layout.decode)(&name, &bytes, &mut images)?;
        if files.insert(file, images).is_some() {
            let reason = format!("two files are named {folder}/{file}");
            return Err(DataError::Archive { path: path.into(), reason });
        }
    }
    // The checksum is at the end of the file.
    io::copy(&mut unpacked, &mut io::sink()).map_err(damaged)?;
    Ok(files)
}

/// The file of these splits that an entry is.
fn wanted(folder: &str, layout: &Layout, splits: &[Split], entry: &[u8]) -> Option<&'static str> {
    let entry = entry.strip_prefix(b"./").unwrap_or(entry);
    let file = entry.strip_prefix(folder.as_bytes())?.strip_prefix(b"/")?;
    let train = layout.train_files.iter().filter(|_| splits.contains(&Split::Train));
    let test = [&layout.test_file].into_iter().filter(|_| splits.contains(&Split::Test));
    train.chain(test).find(|name| name.as_bytes() == file).copied()
}
