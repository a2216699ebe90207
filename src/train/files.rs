//! Writing results, and the checksum that identifies the weights that they belong to.

use std::path::Path;

use flate2::Crc;

use super::TrainError;

/// Writes a file under a temporary name and renames it, so that readers see all of it or nothing. An existing path
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
    std::fs::write(partial, bytes).and_then(|()| std::fs::rename(partial, path)).map_err(|error| {
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
