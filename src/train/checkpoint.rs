//! The full state of a run in one file, from which it resumes with bit-identical results.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use flate2::Crc;
use safetensors::tensor::SafeTensors;

use super::files::{if_there, read_regular, shown};
use super::weights::{View, elements, parse, write};
use super::{Record, TrainError};

/// Everything that a run needs to continue: arenas as they lie in memory, and counters.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// The parameters.
    pub weights: Vec<f32>,
    /// Running statistics of batch norm.
    pub statistics: Vec<f32>,
    /// The optimizer's momentum, or AdamW's first moment; empty without one.
    pub momentum: Vec<f32>,
    /// AdamW's second moment; empty otherwise.
    pub second_moment: Vec<f32>,
    /// The method's vectors that last from step to step.
    pub memory: Vec<f32>,
    /// The method's numbers that last from step to step.
    pub scalars: Vec<f64>,
    /// The optimizer's counters on the device.
    pub counters: Vec<u32>,
    /// The current epoch's sums.
    pub totals: Vec<f64>,
    /// The state of the loss scale in f16; empty otherwise.
    pub loss_scale: Vec<f64>,
    /// The moving average of weights and statistics; empty without one.
    pub average: Vec<f32>,
    /// The mean of the weights after some epochs, and its statistics; empty without one.
    pub swa: Vec<f32>,
    /// Of how many epochs it is the mean, and 1 if its statistics are complete; empty without one.
    pub swa_progress: Vec<u64>,
    /// The mini-batch of the step before, for a method that needs it; otherwise empty.
    pub kept_batch: Vec<u32>,
    /// The run's settings, as TOML.
    pub settings: String,
    /// The line of the log of an epoch whose test was stopped, still without the result of the test.
    pub untested: Option<Record>,
    /// Steps done.
    pub step: u64,
    /// Seconds of training so far.
    pub seconds: f64,
}

/// The tensors of the file, in the order of [`Checkpoint`]'s fields.
const TENSORS: [&str; 13] = [
    "weights",
    "statistics",
    "momentum",
    "second_moment",
    "memory",
    "scalars",
    "counters",
    "totals",
    "loss_scale",
    "average",
    "swa",
    "swa_progress",
    "kept_batch",
];

/// Those that earlier checkpoints do not have.
const LATER: [&str; 4] = ["average", "swa", "swa_progress", "kept_batch"];

/// The entries of the file beside the tensors.
const ENTRIES: [&str; 3] = ["settings", "step", "seconds"];

/// An entry that is there after a test that was stopped.
const UNTESTED: &str = "untested";

/// The checksum over everything in a checkpoint. Without it, damaged numbers would not be noticed.
fn checksum<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut sum = Crc::new();
    parts.for_each(|bytes| sum.update(bytes));
    format!("{:08x}", sum.sum())
}

/// The path of a run's checkpoint.
pub(super) fn path(run: &Path) -> PathBuf {
    run.join("checkpoint").join("state.safetensors")
}

impl Checkpoint {
    pub(super) fn save(&self, run: &Path) -> Result<(), TrainError> {
        let path = path(run);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(TrainError::io(folder))?;
        }
        // Every tensor is declared as f32 words. The bits of wider types pass through unchanged.
        fn view<T: Pod>(values: &[T]) -> View<'_> {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            View { shape: vec![bytes.len() / 4], bytes }
        }
        let views = [
            view(&self.weights),
            view(&self.statistics),
            view(&self.momentum),
            view(&self.second_moment),
            view(&self.memory),
            view(&self.scalars),
            view(&self.counters),
            view(&self.totals),
            view(&self.loss_scale),
            view(&self.average),
            view(&self.swa),
            view(&self.swa_progress),
            view(&self.kept_batch),
        ];
        let tensors: Vec<(&str, View<'_>)> = TENSORS.into_iter().zip(views).collect();
        let mut metadata = HashMap::from([
            ("settings".to_string(), self.settings.clone()),
            ("step".to_string(), self.step.to_string()),
            ("seconds".to_string(), self.seconds.to_string()),
        ]);
        if let Some(record) = &self.untested {
            let line = serde_json::to_string(record).map_err(|error| TrainError::io(&path)(error.into()))?;
            metadata.insert(UNTESTED.to_string(), line);
        }
        let words = ENTRIES.iter().chain([&UNTESTED]).filter_map(|&entry| metadata.get(entry)).map(String::as_bytes);
        let sum = checksum(tensors.iter().map(|(_, view)| view.bytes).chain(words));
        metadata.insert("checksum".to_string(), sum);
        write(&path, tensors, metadata)
    }

    /// Reads the checkpoint of the run in a folder; none if the run has none.
    ///
    /// # Errors
    /// The file, or what is wrong in it. A checksum covers its contents.
    pub fn load(run: &Path) -> Result<Option<Self>, TrainError> {
        let path = path(run);
        // How long a checkpoint is depends on a model that is not known here.
        let Some(bytes) = if_there(read_regular(&path, u64::MAX))? else { return Ok(None) };
        let damaged = |reason: String| {
            let reason = format!("damaged: {}", shown(&reason, 200));
            TrainError::Weights { path: path.clone(), reason }
        };
        let file = parse(&bytes).map_err(damaged)?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| damaged(error.to_string()))?;
        let entry = |key: &str| {
            let text = metadata.metadata().as_ref().and_then(|entries| entries.get(key));
            text.ok_or_else(|| damaged(format!("no `{key}`")))
        };
        let data = |name: &str| match file.tensor(name) {
            Ok(view) => Ok(view.data()),
            Err(_) if LATER.contains(&name) => Ok(&[][..]),
            Err(error) => Err(damaged(error.to_string())),
        };
        let untested = entry(UNTESTED).ok();
        let words = ENTRIES.into_iter().map(|name| entry(name).map(String::as_bytes));
        let words = words.chain(untested.map(|line| Ok(line.as_bytes())));
        let all = TENSORS.into_iter().map(data).chain(words).collect::<Result<Vec<_>, _>>()?;
        if checksum(all.into_iter()) != *entry("checksum")? {
            return Err(damaged("checksum mismatch".into()));
        }
        Ok(Some(Self {
            weights: elements(data("weights")?, f32::from_le_bytes),
            statistics: elements(data("statistics")?, f32::from_le_bytes),
            momentum: elements(data("momentum")?, f32::from_le_bytes),
            second_moment: elements(data("second_moment")?, f32::from_le_bytes),
            memory: elements(data("memory")?, f32::from_le_bytes),
            scalars: elements(data("scalars")?, f64::from_le_bytes),
            counters: elements(data("counters")?, u32::from_le_bytes),
            totals: elements(data("totals")?, f64::from_le_bytes),
            loss_scale: elements(data("loss_scale")?, f64::from_le_bytes),
            average: elements(data("average")?, f32::from_le_bytes),
            swa: elements(data("swa")?, f32::from_le_bytes),
            swa_progress: elements(data("swa_progress")?, u64::from_le_bytes),
            kept_batch: elements(data("kept_batch")?, u32::from_le_bytes),
            settings: entry("settings")?.clone(),
            untested: match untested {
                Some(line) => {
                    let record = Record::read(line.as_bytes());
                    Some(record.ok_or_else(|| damaged(format!("`{UNTESTED}` is not a line of a log")))?)
                }
                None => None,
            },
            step: entry("step")?.parse().map_err(|_| damaged("`step` is not a number".into()))?,
            seconds: entry("seconds")?.parse().map_err(|_| damaged("`seconds` is not a number".into()))?,
        }))
    }
}
