//! `log.jsonl`: a line per epoch, and on request per step and per measurement of the curvature.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Number;

use super::files::{MOST_LINES, if_there, read_regular};
use super::{Finding, Held, TrainError, write_whole};

/// A line of the log. Losses are cross-entropies in nats, accuracies are shares from 0 to 1. A number that was not
/// finite is none here and null in the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// One step.
    Step {
        /// Steps done.
        step: u64,
        /// The epoch of the step, counted from 1.
        epoch: u64,
        /// Mean loss of the batch at the unperturbed weights.
        loss: Option<f64>,
        /// Accuracy on the batch at the same weights.
        accuracy: f64,
        /// Learning rate: the schedule's, or the step size that the method computes.
        lr: f64,
        /// Training images per second since the epoch began.
        images_per_second: f64,
        /// ‖g‖ at the unperturbed weights.
        gradient_norm: Option<f64>,
        /// The method's own numbers and counters, under the names that
        /// [`Method::telemetry`](crate::optim::Method::telemetry) and
        /// [`Method::counters`](crate::optim::Method::counters) give them. Numbers that are not finite are left out.
        #[serde(flatten)]
        method: BTreeMap<String, Number>,
        /// How far the batch's loss rises from the unperturbed to the perturbed weights: SAM's sharpness.
        #[serde(skip_serializing_if = "Option::is_none")]
        sharpness: Option<f64>,
        /// Cosine between the gradients at the unperturbed and at the perturbed weights.
        #[serde(skip_serializing_if = "Option::is_none")]
        cosine_gradients: Option<f64>,
        /// Cosine between the perturbation that survived rounding and the intended one.
        #[serde(skip_serializing_if = "Option::is_none")]
        cosine_perturbation: Option<f64>,
        /// In f16, the loss scale after the step.
        #[serde(skip_serializing_if = "Option::is_none")]
        loss_scale: Option<f64>,
        /// Steps skipped so far because something was not finite.
        skipped: u32,
    },
    /// One epoch.
    Epoch {
        /// Counted from 1.
        epoch: u64,
        /// Steps done.
        step: u64,
        /// Mean training loss over the epoch, at the weights of each step; none if every step was skipped.
        train_loss: Option<f64>,
        /// Training accuracy in the same way.
        train_accuracy: Option<f64>,
        /// Mean test cross-entropy after the epoch.
        test_loss: Option<f64>,
        /// Test accuracy after the epoch.
        test_accuracy: f64,
        /// Mean cross-entropy over the validation images after the epoch.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        validation_loss: Option<f64>,
        /// Accuracy on them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        validation_accuracy: Option<f64>,
        /// Mean test cross-entropy of the averaged weights after the epoch.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ema_test_loss: Option<f64>,
        /// Their test accuracy.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ema_test_accuracy: Option<f64>,
        /// After the last epoch: mean test cross-entropy of the weights averaged over epochs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        swa_test_loss: Option<f64>,
        /// Their test accuracy.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        swa_test_accuracy: Option<f64>,
        /// Learning rate of its last step.
        lr: f64,
        /// ‖g‖ at the unperturbed weights of its last step.
        gradient_norm: Option<f64>,
        /// The method's own numbers in its last step, and its counters.
        #[serde(flatten)]
        method: BTreeMap<String, Number>,
        /// Training images per second, without evaluation.
        images_per_second: f64,
        /// Seconds of training since the start, without evaluation.
        seconds: f64,
        /// The chip: the name of the GPU or of the processor, or `cpu` where the system does not tell it.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        device: String,
        /// Whether the loss diverged in this epoch, which may have ended before its last step.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        diverged: bool,
        /// Steps skipped so far because something was not finite.
        skipped: u32,
    },
    /// The curvature at the weights after an epoch.
    Curvature {
        /// Counted from 1.
        epoch: u64,
        /// Steps done.
        step: u64,
        /// The findings by the names of the measures, as in `curvature.json`.
        measures: BTreeMap<String, Finding>,
    },
}

impl Record {
    /// The most bytes of a line. Reading takes many times the memory of a line, so a longer one counts as damaged.
    const MOST_BYTES: usize = 1 << 20;

    /// Reads one line of a log; none if it is damaged or incomplete.
    pub(crate) fn read(line: &[u8]) -> Option<Self> {
        if line.len() > Self::MOST_BYTES {
            return None;
        }
        serde_json::from_slice(line).ok()
    }

    /// Steps done.
    pub(crate) fn step(&self) -> u64 {
        match self {
            Record::Step { step, .. } | Record::Epoch { step, .. } | Record::Curvature { step, .. } => *step,
        }
    }
}

/// The open log of a run.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    /// The step of the newest line about curvature when the log was opened.
    newest_curvature: Option<u64>,
    /// The best result on the validation images of the epochs in the log when it was opened: accuracy and loss.
    pub best: Option<(f64, f64)>,
    /// Keeps other processes out of the run.
    held: Held,
}

impl Log {
    /// Opens the log of a run that has done `step` steps. Later lines, from a run that was stopped after its
    /// checkpoint, are removed, since they will be written again, and so is what is no line of JSON.
    pub fn open(path: &Path, step: u64, held: Held) -> Result<Self, TrainError> {
        let found = if_there(read_regular(path, MOST_LINES))?.unwrap_or_default();
        let (mut kept, mut newest_curvature, mut best) = (Vec::new(), None, None);
        for line in found.split_inclusive(|&byte| byte == b'\n') {
            let (line, whole) = line.strip_suffix(b"\n").map_or((line, false), |line| (line, true));
            match Record::read(line) {
                Some(record) if record.step() > step => continue,
                Some(Record::Curvature { step, .. }) => newest_curvature = Some(step),
                Some(Record::Epoch { validation_loss, validation_accuracy: Some(accuracy), .. }) => {
                    let found = (accuracy, validation_loss.unwrap_or(f64::INFINITY));
                    best = Some(best.map_or(found, |best| if is_better(found, best) { found } else { best }));
                }
                Some(_) => {}
                // A line of another kind may be that of another version, and is not lost.
                None if whole && serde_json::from_slice::<IgnoredAny>(line).is_ok() => {}
                None => continue,
            }
            kept.extend_from_slice(line);
            kept.push(b'\n');
        }
        if kept != found {
            write_whole(path, &kept)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(TrainError::io(path))?;
        Ok(Self { path: path.into(), file, newest_curvature, best, held })
    }

    /// The folder of the run.
    pub fn held(&self) -> &Held {
        &self.held
    }

    /// Whether the log had a line about the curvature after `step` steps when it was opened.
    pub fn has_curvature_of(&self, step: u64) -> bool {
        self.newest_curvature == Some(step)
    }

    pub fn write(&mut self, record: &Record) -> Result<(), TrainError> {
        let mut line = serde_json::to_string(record).map_err(|e| TrainError::io(&self.path)(e.into()))?;
        line.push('\n');
        self.held.check()?;
        self.file.write_all(line.as_bytes()).map_err(TrainError::io(&self.path))
    }
}

/// Whether the first of two results (accuracy, loss) is better: a higher accuracy, or of equal ones the lower loss.
pub(super) fn is_better(found: (f64, f64), other: (f64, f64)) -> bool {
    found.0 > other.0 || found.0 == other.0 && found.1 < other.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::hold;

    #[test]
    fn a_log_is_continued_whatever_bytes_its_end_has() {
        let line = |step| format!("{{\"kind\":\"curvature\",\"epoch\":1,\"step\":{step},\"measures\":{{}}}}\n");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let whole = [line(1), line(2)].concat();
        for (number, end) in
            [&b"\xff"[..], b"{\"kind\":\"step\",\"st\xc3", b"\0\0\0\0", b"\xff\n\xff\n"].iter().enumerate()
        {
            let held = folder.path().join(number.to_string());
            std::fs::write(&path, [whole.as_bytes(), end].concat()).unwrap();
            let log = Log::open(&path, 2, hold(&held).unwrap()).unwrap();
            assert!(log.has_curvature_of(2));
            assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        }
        drop(Log::open(&path, 1, hold(folder.path()).unwrap()).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), line(1));
        let other = ["{\"kind\":\"future\",\"x\":1}\n".to_string(), line(1)].concat();
        std::fs::write(&path, [other.as_str(), "damaged\n"].concat()).unwrap();
        drop(Log::open(&path, 1, hold(folder.path()).unwrap()).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
        let long = [line(1), format!("[{}0]", "0,".repeat(1 << 20))].concat();
        std::fs::write(&path, long).unwrap();
        drop(Log::open(&path, 1, hold(folder.path()).unwrap()).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), line(1), "a line without an end was cut off");
    }

    #[test]
    fn numbers_and_counters_of_a_method_are_read_as_they_were_written() {
        let line = concat!(
            r#"{"kind":"step","step":7,"epoch":1,"loss":2.5,"accuracy":0.25,"lr":0.1,"images_per_second":10.0,"#,
            r#""gradient_norm":null,"dropped_alpha":3,"dropped_beta":0,"vhv":-2.0,"skipped":1}"#
        );
        let record: Record = serde_json::from_str(line).unwrap();
        let Record::Step { method, .. } = &record else { panic!("{record:?}") };
        let expected =
            [("dropped_alpha", 3.into()), ("dropped_beta", 0.into()), ("vhv", Number::from_f64(-2.0).unwrap())];
        assert_eq!(*method, expected.map(|(name, number)| (name.to_string(), number)).into());
        assert_eq!(serde_json::to_string(&record).unwrap(), line);
    }
}
