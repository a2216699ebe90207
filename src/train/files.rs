//! Files of settings and results: reading what is a file and no longer than expected, folders that one process holds,
//! files that are whole or absent, and the checksum that identifies weights.

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use flate2::Crc;

use super::TrainError;
use crate::data::{self, DataError};

/// The most bytes of a file of settings, which has some hundred lines.
pub(crate) const MOST_SETTINGS: u64 = 1 << 20;
/// The most bytes of `curvature.json`, which has some thousand numbers.
pub(crate) const MOST_FINDINGS: u64 = 1 << 24;
/// The most bytes of a file that grows with a run or a landscape.
pub(crate) const MOST_LINES: u64 = 1 << 32;

/// Reads a regular file of at most `limit` bytes. Anything else is refused before a byte of it is read: a pipe can
/// block, and a device may never end.
///
/// # Errors
/// What is no regular file, or too long; those of the file.
pub(crate) fn read_regular(path: &Path, limit: u64) -> Result<Vec<u8>, TrainError> {
    let (file, size) = open(path)?;
    if size > limit {
        return Err(TrainError::TooLong { path: path.into(), limit });
    }
    let mut bytes = Vec::new();
    let reserved = usize::try_from(size).is_ok_and(|size| bytes.try_reserve_exact(size).is_ok());
    if !reserved {
        return Err(TrainError::io(path)(ErrorKind::OutOfMemory.into()));
    }
    read_at_most(path, file, limit, bytes)
}

/// Reads a text file as [`read_regular`] does.
///
/// # Errors
/// Those of [`read_regular`]; text that is not UTF-8.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, TrainError> {
    text(path, read_regular(path, limit)?)
}

/// Reads a file of settings, or the pipe that a shell gives for `/dev/stdin` or `<(command)`.
///
/// # Errors
/// Those of [`read_text`].
pub(super) fn read_settings(path: &Path) -> Result<String, TrainError> {
    let pipe = std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir());
    // A named pipe would block until somebody writes to it. A pipe without a name has no path but that of its
    // descriptor, so that path leads nowhere.
    if pipe && std::fs::canonicalize(path).is_err() {
        let file = File::open(path).map_err(TrainError::io(path))?;
        return text(path, read_at_most(path, file, MOST_SETTINGS, Vec::new())?);
    }
    read_text(path, MOST_SETTINGS)
}

fn open(path: &Path) -> Result<(File, u64), TrainError> {
    data::open(path).map_err(|error| match error {
        DataError::Io { path, source } => TrainError::Io { path, source },
        error => error.into(),
    })
}

/// Reads to the end, which must come before the limit: a file may grow after its size was asked for.
fn read_at_most(path: &Path, file: File, limit: u64, mut bytes: Vec<u8>) -> Result<Vec<u8>, TrainError> {
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(TrainError::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(TrainError::TooLong { path: path.into(), limit });
    }
    Ok(bytes)
}

fn text(path: &Path, bytes: Vec<u8>) -> Result<String, TrainError> {
    String::from_utf8(bytes).map_err(|_| {
        TrainError::io(path)(std::io::Error::new(ErrorKind::InvalidData, "not a text file (it is not UTF-8)"))
    })
}

/// What was read, or none if there is no such file.
pub(crate) fn if_there<T>(read: Result<T, TrainError>) -> Result<Option<T>, TrainError> {
    match read {
        Err(TrainError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// Text from a file as an error shows it: in one line, without characters that a terminal would obey, and at most
/// `most` characters of it.
pub(crate) fn shown(text: &str, most: usize) -> String {
    let mut line = String::new();
    let mut characters = text.chars();
    for character in characters.by_ref().take(most) {
        match character {
            '"' | '\'' | '\\' => line.push(character),
            other => line.extend(other.escape_debug()),
        }
    }
    if characters.next().is_some() {
        line.push('…');
    }
    line
}

/// A folder that this process writes to, and no other one, for as long as the value lives.
#[derive(Debug)]
pub struct Held {
    folder: PathBuf,
    /// The open folder, which carries the lock.
    open: Option<File>,
}

impl Held {
    /// Fails if the folder is no longer where it was: if it was removed, moved or replaced. What is written under its
    /// name afterwards would be lost, or would mix with the results of others.
    ///
    /// # Errors
    /// [`TrainError::Gone`].
    pub fn check(&self) -> Result<(), TrainError> {
        let same = self.folder.is_dir() && self.open.as_ref().is_none_or(|folder| is_same_file(folder, &self.folder));
        if same { Ok(()) } else { Err(TrainError::Gone { path: self.folder.clone() }) }
    }
}

/// Creates a folder for results, holds it, and checks that a file can be written there. Two processes that wrote to one
/// folder would mix their results. Where the file system has no locks, nothing keeps other processes out.
///
/// # Errors
/// [`TrainError::InUse`] while another process holds the folder; those of the folder.
pub fn hold(folder: &Path) -> Result<Held, TrainError> {
    std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
    let lock = match File::open(folder) {
        Err(_) => None,
        Ok(file) => match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(TrainError::InUse { path: folder.into() }),
            Err(TryLockError::Error(_)) => None,
            Ok(()) => Some(file),
        },
    };
    let probe = folder.join("probe.partial");
    std::fs::write(&probe, "").and_then(|()| std::fs::remove_file(&probe)).map_err(TrainError::io(folder))?;
    Ok(Held { folder: folder.into(), open: lock })
}

/// Writes a file under a temporary name and renames it, so that readers see all of it or nothing, after a loss of power
/// too: file and folder are synchronised with the disk, as far as the file system keeps its promise. An existing path
/// that is not a regular file, such as a pipe, is written to directly.
///
/// # Errors
/// [`TrainError::InUse`] while another process writes the same file; those of the file.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return std::fs::write(path, bytes).map_err(TrainError::io(path));
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let mut file = open_alone(partial, path)?;
    for _ in 0..100 {
        // Another writer may have renamed the file after it was opened here.
        if is_same_file(&file, partial) {
            break;
        }
        file = open_alone(partial, path)?;
    }
    let mut write = || {
        file.set_len(0)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(partial, path)?;
        // A folder that cannot be opened cannot be synchronised; the file is whole all the same.
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).map_or(Ok(()), |folder| folder.sync_all())
    };
    write().map_err(|error| {
        // A partial file has no use. A failure to remove it is not reported on top of the first error.
        let _ = std::fs::remove_file(partial);
        TrainError::io(path)(error)
    })
}

/// Opens the temporary file of `path` and keeps other processes from writing to it, where the file system has locks.
fn open_alone(partial: &Path, path: &Path) -> Result<File, TrainError> {
    let file = File::options().create(true).write(true).truncate(false).open(partial).map_err(TrainError::io(path))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(TrainError::InUse { path: path.into() }),
        Err(TryLockError::Error(_)) | Ok(()) => Ok(file),
    }
}

/// Whether the path still leads to the file or folder that was opened.
#[cfg(unix)]
fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(found)) => (open.dev(), open.ino()) == (found.dev(), found.ino()),
        (open, _) => open.is_err(),
    }
}

/// Elsewhere an open file or folder is not renamed.
#[cfg(not(unix))]
fn is_same_file(_: &File, _: &Path) -> bool {
    true
}

/// A checksum of a file, by which results identify the weights that they belong to.
///
/// # Errors
/// Those of the file.
pub fn checksum(path: &Path) -> Result<String, TrainError> {
    let (mut file, _) = open(path)?;
    let (mut sum, mut part) = (Crc::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut part).map_err(TrainError::io(path))? {
            0 => return Ok(format!("{:08x}", sum.sum())),
            read => sum.update(&part[..read]),
        }
    }
}

/// Writes an array in C order.
///
/// # Errors
/// Those of the file.
pub fn write_npy<T: npyz::AutoSerialize + Copy>(path: &Path, values: &[T], shape: &[u64]) -> Result<(), TrainError> {
    use npyz::WriterBuilder;
    let write = || {
        let mut bytes = Vec::new();
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(&mut bytes).begin_nd()?;
        writer.extend(values.iter().copied())?;
        writer.finish()?;
        Ok(bytes)
    };
    let bytes = write().map_err(|source| TrainError::Io { path: path.into(), source })?;
    write_whole(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_limited_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "1234").unwrap();
        assert_eq!(read_regular(&path, 4).unwrap(), b"1234");
        assert!(matches!(read_regular(&path, 3), Err(TrainError::TooLong { limit: 3, .. })));
        assert!(read_regular(folder.path(), 4).unwrap_err().to_string().ends_with(": not a regular file"));
        assert!(matches!(read_regular(&folder.path().join("none"), 4), Err(TrainError::Io { .. })));
    }

    #[test]
    fn a_folder_is_held_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        let held = hold(&inner).unwrap();
        assert!(matches!(hold(&inner), Err(TrainError::InUse { path }) if path == inner));
        held.check().unwrap();
        let gone = || matches!(held.check(), Err(TrainError::Gone { path }) if path == inner);
        let moved = folder.path().join("moved");
        std::fs::rename(&inner, &moved).unwrap();
        assert!(gone());
        std::fs::create_dir(&inner).unwrap();
        assert_eq!(gone(), cfg!(unix), "another folder in its place");
        std::fs::remove_dir(&inner).unwrap();
        std::fs::rename(&moved, &inner).unwrap();
        held.check().unwrap();
        drop(held);
        hold(&inner).unwrap();
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 0);
        std::fs::write(inner.join("file"), "").unwrap();
        assert!(matches!(hold(&inner.join("file")), Err(TrainError::Io { .. })));
    }

    #[test]
    fn a_file_is_written_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "old").unwrap();
        let other = open_alone(&folder.path().join("file.partial"), &path).unwrap();
        assert!(matches!(write_whole(&path, b"new"), Err(TrainError::InUse { path: named }) if named == path));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        drop(other);
        write_whole(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for bytes in [&b"first"[..], b"", b"second"] {
            write_whole(&path, bytes).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
        assert!(write_whole(&folder.path().join("none/file"), b"").is_err());
    }
}
