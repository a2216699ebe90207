//! Writing results: folders that one process holds, files that are whole or absent, and the checksum that identifies
//! weights.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use flate2::Crc;

use super::TrainError;

/// A folder that this process writes to, and no other one, for as long as the value lives.
#[derive(Debug)]
pub struct Held(#[allow(dead_code)] Option<File>);

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
    Ok(Held(lock))
}

/// Writes a file under a temporary name and renames it, so that readers see all of it or nothing, after a loss of power
/// too: file and folder are synchronised with the disk, as far as the file system keeps its promise. An existing path
/// that is not a regular file, such as a pipe, is written to directly.
///
/// # Errors
/// Those of the file.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return std::fs::write(path, bytes).map_err(TrainError::io(path));
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let write = || {
        let mut file = File::create(partial)?;
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

/// Reads a regular file of at most `limit` bytes. A pipe or a device is refused, because it could block or never end.
///
/// # Errors
/// A path that is not a regular file, a file that is too large, and those of the file.
pub fn read_regular(path: &Path, limit: u64) -> Result<Vec<u8>, TrainError> {
    let unusable = |reason: String| TrainError::Results { path: path.into(), reason };
    let metadata = std::fs::metadata(path).map_err(TrainError::io(path))?;
    if !metadata.is_file() {
        return Err(unusable("not a regular file".into()));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(TrainError::io(path))?;
    // A file can grow while it is read.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(TrainError::io(path))?;
    if bytes.len() as u64 > limit {
        return Err(unusable(format!("larger than {limit} bytes")));
    }
    Ok(bytes)
}

/// A checksum of a file, by which results identify the weights that they belong to.
///
/// # Errors
/// Those of the file.
pub fn checksum(path: &Path) -> Result<String, TrainError> {
    let mut sum = Crc::new();
    sum.update(&std::fs::read(path).map_err(TrainError::io(path))?);
    Ok(format!("{:08x}", sum.sum()))
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
        assert!(read_regular(&path, 3).unwrap_err().to_string().ends_with("file: larger than 3 bytes"));
        assert!(read_regular(folder.path(), 4).unwrap_err().to_string().ends_with(": not a regular file"));
        assert!(matches!(read_regular(&folder.path().join("none"), 4), Err(TrainError::Io { .. })));
    }

    #[test]
    fn a_folder_is_held_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("a/b");
        let held = hold(&inner).unwrap();
        assert!(matches!(hold(&inner), Err(TrainError::InUse { path }) if path == inner));
        drop(held);
        hold(&inner).unwrap();
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 0);
        std::fs::write(inner.join("file"), "").unwrap();
        assert!(matches!(hold(&inner.join("file")), Err(TrainError::Io { .. })));
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
