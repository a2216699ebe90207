//! Writing results: folders that one process holds, files that are whole or absent, and the checksum that identifies
//! weights.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Crc;

use super::TrainError;

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
        let same = match (std::fs::metadata(&self.folder), self.open.as_ref().map(File::metadata)) {
            (Err(_), _) => false,
            #[cfg(unix)]
            (Ok(now), Some(Ok(held))) => {
                use std::os::unix::fs::MetadataExt;
                (now.dev(), now.ino()) == (held.dev(), held.ino())
            }
            (Ok(_), _) => true,
        };
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
