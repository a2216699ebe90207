//! The folder of a run: `config.toml`, `log.jsonl`, `model.safetensors` and `checkpoint/`.

use std::path::Path;

use super::checkpoint::{self, Checkpoint};
use super::files::{MOST_SETTINGS, read_regular};
use super::log::Log;
use super::settings::continues;
use super::{Options, TrainError, hold, write_whole};

/// The files of a run. Each of them shows that the folder holds a run or a partial run.
const FILES: [&str; 4] = ["config.toml", "log.jsonl", "model.safetensors", "checkpoint"];

/// What a run was set to, as its files hold it.
pub(super) struct Config {
    /// `config.toml`.
    pub text: String,
    /// Whether network, data and method are all known by name, so that the settings can be read from the text.
    pub by_name: bool,
}

impl Config {
    /// The settings that the checkpoint was saved with, as a table, with the defaults of options that came later.
    fn before(&self, saved: &str) -> Result<toml::Table, TrainError> {
        let damaged = |reason: String| TrainError::setting("settings", reason);
        let text = if self.by_name {
            let mine = Options::from_toml(&self.text).map_err(damaged)?;
            let mut theirs = Options::from_toml(saved).map_err(damaged)?;
            // Files may have been moved.
            for name in ["data", "init"] {
                theirs.copy(name, &mine);
            }
            theirs.resolve()?.to_toml()?
        } else {
            saved.into()
        };
        toml::from_str(&text).map_err(|error| damaged(error.message().replace('\n', "; ")))
    }
}

/// The checkpoint of a run that is resumed. None for a run that was stopped before its first: it starts again.
pub(super) fn saved(run: &Path, config: &Config) -> Result<Option<Checkpoint>, TrainError> {
    let path = checkpoint::path(run);
    let Some(saved) = Checkpoint::load(run)? else {
        if !run.join("model.safetensors").exists() {
            return Ok(None);
        }
        let reason = "is missing: the run has weights, but cannot be resumed without its checkpoint".into();
        return Err(TrainError::Weights { path, reason });
    };
    let damaged = |error: TrainError| TrainError::Weights { path: path.clone(), reason: format!("damaged: {error}") };
    let before = config.before(&saved.settings).map_err(damaged)?;
    let now: toml::Table = toml::from_str(&config.text)
        .map_err(|error| TrainError::Settings { path: run.join("config.toml"), reason: error.message().into() })?;
    if let Some(name) = continues(&now, &before) {
        let reason = format!("`{name}` differs from the checkpoint");
        return Err(TrainError::Settings { path: run.join("config.toml"), reason });
    }
    Ok(Some(saved))
}

/// Prepares the folder of a run that has done `step` of `steps` steps, and opens its log.
pub(super) fn open(run: &Path, config: &Config, resume: bool, (step, steps): (u64, u64)) -> Result<Log, TrainError> {
    let path = run.join("config.toml");
    // What the folder holds is looked at while no other process can write to it.
    let held = hold(run)?;
    if !resume && FILES.iter().any(|name| run.join(name).exists()) {
        return Err(TrainError::RunExists { path: run.into() });
    }
    // The weights are written after the last epoch. What is in their way should not be found so late.
    if let Some(name) = FILES[..3].iter().find(|name| run.join(name).is_dir()) {
        let reason = "a folder, where the run needs a file".into();
        return Err(TrainError::Occupied { path: run.join(name), reason });
    }
    let text = config.text.as_bytes();
    // A run that is resumed unchanged, or that is already longer, keeps its settings file.
    if step <= steps && read_regular(&path, MOST_SETTINGS).map_or(true, |found| found != text) {
        write_whole(&path, text)?;
    }
    Log::open(&run.join("log.jsonl"), step, held)
}
