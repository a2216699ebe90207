//! How results are written, and told from those of other weights.

use std::path::Path;

use flate2::Crc;

use super::TrainError;

/// Writes a file beside its place and moves it there, so that it is whole or not there. What is there and is no file, such as a
/// pipe, is written to.
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
        // What is left of it is of no use to anyone; that it cannot be removed either is no further error.
        let _ = std::fs::remove_file(partial);
        TrainError::io(path)(error)
    })
}

/// A checksum of a file, by which results know the weights that they are of.
///
/// # Errors
/// Those of the file.
pub fn checksum(path: &Path) -> Result<String, TrainError> {
    let mut sum = Crc::new();
    sum.update(&std::fs::read(path).map_err(TrainError::io(path))?);
    Ok(format!("{:08x}", sum.sum()))
}
