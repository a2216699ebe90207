//! The commands, and what they share: how they print, and how they show that they go on.

pub mod curvature;
pub mod devices;
pub mod eval;
pub mod landscape;
mod model;
pub mod report;
pub mod train;

use std::io::{IsTerminal, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use polder::train::TrainError;

/// An option that cannot be used.
fn option(option: &str, reason: impl ToString) -> TrainError {
    TrainError::Option { option: option.into(), reason: reason.to_string() }
}

/// Prints to standard output; a reader that has gone away is no error of ours.
///
/// # Errors
/// Any other reason why the text was lost.
fn print(text: &str) -> Result<(), TrainError> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(TrainError::Output(error)),
        _ => Ok(()),
    }
}

/// Says something on standard error; where nobody can hear it, nothing else is to be done.
pub fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// On a terminal, how far a work of several parts is.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:12} {pos}/{len}, {eta} left  {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self(bar)
    }

    fn show(&self, part: &str, done: usize, of: usize) {
        let Some(bar) = &self.0 else { return };
        if bar.message() != part {
            bar.reset();
            bar.set_message(part.to_string());
        }
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Makes a folder for results.
///
/// # Errors
/// Those of the folder.
fn make_folder(folder: &Path) -> Result<(), TrainError> {
    std::fs::create_dir_all(folder).map_err(|source| TrainError::Io { path: folder.into(), source })
}

/// Writes an array in C order.
///
/// # Errors
/// Those of the file.
fn write_npy<T: npyz::AutoSerialize + Copy>(path: &Path, values: &[T], shape: &[u64]) -> Result<(), TrainError> {
    use npyz::WriterBuilder;
    let write = || {
        let file = std::io::BufWriter::new(std::fs::File::create(path)?);
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd()?;
        writer.extend(values.iter().copied())?;
        writer.finish()
    };
    write().map_err(|source| TrainError::Io { path: path.into(), source })
}
