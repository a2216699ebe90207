//! What can go wrong between settings and a trained model. Every message is one line that names the file or the
//! setting. Settings have the names of a settings file (`batch-size`), within a reason between backticks.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::Options;
use super::files::shown;
use crate::data::DataError;
use crate::device;
use crate::plan::PlanError;
use crate::settings::SettingError;

/// The most characters of a reason, which may quote a file.
const REASON: usize = 2000;

/// An error of training, evaluation or their files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting that cannot be used.
    #[error("{name}: {}", shown(reason, REASON))]
    Setting {
        /// Its name, such as `batch-size`.
        name: String,
        /// What is wrong with its value.
        reason: String,
    },
    /// A file of settings that cannot be read as such.
    #[error("{}: {}", path.display(), shown(reason, REASON))]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong, in one line.
        reason: String,
    },
    /// The operating system refused a file or a folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Its reason.
        source: std::io::Error,
    },
    /// A file of weights or a checkpoint that is damaged, or of another model.
    #[error("{}: {}", path.display(), shown(reason, REASON))]
    Weights {
        /// The file.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// A file that is longer than any file of its kind.
    #[error("{}: longer than {limit} bytes, the most that are read of such a file", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The most bytes that are read.
        limit: u64,
    },
    /// The folder for a run's results already holds a run.
    #[error("{}: already holds a run or a partial run", path.display())]
    RunExists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process writes to the run.
    #[error("{}: another process writes to it", path.display())]
    InUse {
        /// Its folder.
        path: PathBuf,
    },
    /// The folder that results were written to is no longer there.
    #[error("{}: was removed, moved or replaced while results were written to it", path.display())]
    Gone {
        /// Where it was.
        path: PathBuf,
    },
    /// A path that is not a run folder.
    #[error("{}: not a run folder (it has no config.toml)", path.display())]
    NoRun {
        /// The path.
        path: PathBuf,
    },
    /// The folder for results already holds others.
    #[error("{}: {}", path.display(), shown(reason, REASON))]
    Occupied {
        /// The folder or the file.
        path: PathBuf,
        /// What it holds.
        reason: String,
    },
    /// Results in files that cannot be used.
    #[error("{}: {}", path.display(), shown(reason, REASON))]
    Results {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The data set.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The network does not fit the images or the device.
    #[error("{data}: the model does not fit the images: {source}")]
    Plan {
        /// The data set's path or name.
        data: String,
        /// What does not fit.
        source: PlanError,
    },
    /// The device.
    #[error(transparent)]
    Device(#[from] device::Error),
}

impl TrainError {
    /// Whether the input is at fault, such as a setting or a file, rather than the machine.
    pub fn is_input(&self) -> bool {
        match self {
            TrainError::Gone { .. } => false,
            TrainError::Device(error) => matches!(error, device::Error::Unavailable { .. }),
            TrainError::Io { source, .. } | TrainError::Data(DataError::Io { source, .. }) => matches!(
                source.kind(),
                ErrorKind::NotFound
                    | ErrorKind::PermissionDenied
                    | ErrorKind::AlreadyExists
                    | ErrorKind::NotADirectory
                    | ErrorKind::IsADirectory
                    | ErrorKind::ReadOnlyFilesystem
                    | ErrorKind::InvalidFilename
                    | ErrorKind::InvalidInput
                    | ErrorKind::InvalidData
                    | ErrorKind::UnexpectedEof
            ),
            _ => true,
        }
    }

    /// The same error, which names the file of settings and the line if the setting at fault is there and was not given
    /// beside it.
    #[must_use]
    pub fn of_file(self, given: &Options, file: Option<&Path>) -> Self {
        match (self, file) {
            (TrainError::Setting { name, reason }, Some(path)) if !given.has(&name) => {
                match Options::line_in(path, &name) {
                    Some(line) => {
                        let reason = format!("line {line}: {name}: {reason}");
                        TrainError::Settings { path: path.into(), reason }
                    }
                    None => TrainError::Setting { name, reason },
                }
            }
            (error, _) => error,
        }
    }

    /// An error of planning a model for the images of `data`.
    pub(crate) fn plan(data: &str) -> impl Fn(PlanError) -> Self + '_ {
        move |error| match error {
            PlanError::Device(error) => TrainError::Device(error),
            source => TrainError::Plan { data: data.into(), source },
        }
    }

    /// The result of work that may be stopped: none if it was.
    ///
    /// # Errors
    /// Those of the work, except [`device::Error::Stopped`].
    pub fn unless_stopped<R>(result: Result<R, Self>) -> Result<Option<R>, Self> {
        match result {
            Err(TrainError::Device(device::Error::Stopped)) => Ok(None),
            result => result.map(Some),
        }
    }

    /// A setting that cannot be used.
    pub fn setting(name: &str, reason: impl Into<String>) -> Self {
        TrainError::Setting { name: name.into(), reason: reason.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| TrainError::Io { path, source }
    }
}

impl From<SettingError> for TrainError {
    fn from(error: SettingError) -> Self {
        TrainError::Setting { name: error.name().into(), reason: error.reason() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_of_the_machine_is_none_of_the_input_whatever_was_read() {
        let io = |kind: ErrorKind| {
            [
                TrainError::Io { path: "file".into(), source: kind.into() },
                TrainError::Data(DataError::Io { path: "file".into(), source: kind.into() }),
            ]
        };
        for kind in [ErrorKind::OutOfMemory, ErrorKind::StorageFull, ErrorKind::Other] {
            assert!(io(kind).iter().all(|error| !error.is_input()), "{kind}");
        }
        for kind in [ErrorKind::NotFound, ErrorKind::PermissionDenied] {
            assert!(io(kind).iter().all(TrainError::is_input), "{kind}");
        }
    }
}
