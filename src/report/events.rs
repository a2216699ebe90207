//! A run's log as a TensorBoard event file: a sequence of TFRecords, each an `Event` in the encoding of protocol
//! buffers. Only scalars are written, so a few lines suffice for both formats.

use std::path::PathBuf;

use super::runs::{LoadedRun, numbers};
use crate::train::{Record, TrainError, write_whole};

/// CRC-32C (Castagnoli), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let shifted = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| shifted(crc)))
}

/// The masked checksum of TFRecord: the sum of data that contains sums must not look like one of them.
fn masked(bytes: &[u8]) -> [u8; 4] {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn append_record(file: &mut Vec<u8>, data: &[u8]) {
    let length = (data.len() as u64).to_le_bytes();
    for part in [&length[..], &masked(&length), data, &masked(data)] {
        file.extend_from_slice(part);
    }
}

fn append_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// A field that is a text or another message.
fn append_bytes(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    append_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

/// An `Event` at a time in seconds since 1970.
fn event(time: f64) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(time.to_le_bytes());
    event
}

/// The `Event` that some scalars belong to one step.
fn scalars(time: f64, step: u64, values: &[(String, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut entry = Vec::new();
        append_bytes(&mut entry, 1, tag.as_bytes());
        entry.push(2 << 3 | 5);
        entry.extend((*value as f32).to_le_bytes());
        append_bytes(&mut summary, 1, &entry);
    }
    let mut event = event(time);
    event.push(2 << 3);
    append_varint(&mut event, step);
    append_bytes(&mut event, 5, &summary);
    event
}

/// The scalars of a line of the log, and the step that they belong to.
fn of_record(record: &Record) -> (u64, Vec<(String, f64)>) {
    let named = |prefix: &str, values: &[(&str, Option<f64>)]| -> Vec<(String, f64)> {
        values.iter().filter_map(|&(name, value)| Some((format!("{prefix}/{name}"), value?))).collect()
    };
    match record {
        Record::Step {
            step,
            loss,
            accuracy,
            lr,
            gradient_norm,
            method,
            sharpness,
            cosine_gradients,
            cosine_perturbation,
            loss_scale,
            ..
        } => {
            let values = [
                ("loss", *loss),
                ("accuracy", Some(*accuracy)),
                ("lr", Some(*lr)),
                ("gradient_norm", *gradient_norm),
                ("sharpness", *sharpness),
                ("cosine_gradients", *cosine_gradients),
                ("cosine_perturbation", *cosine_perturbation),
                ("loss_scale", *loss_scale),
            ];
            let own = method.iter().filter_map(|(name, value)| Some((format!("step/{name}"), value.as_f64()?)));
            (*step, named("step", &values).into_iter().chain(own).collect())
        }
        Record::Epoch {
            step,
            train_loss,
            train_accuracy,
            test_loss,
            test_accuracy,
            validation_loss,
            validation_accuracy,
            ema_test_loss,
            ema_test_accuracy,
            swa_test_loss,
            swa_test_accuracy,
            lr,
            gradient_norm,
            images_per_second,
            skipped,
            ..
        } => {
            let values = [
                ("train_loss", *train_loss),
                ("train_accuracy", *train_accuracy),
                ("test_loss", *test_loss),
                ("test_accuracy", Some(*test_accuracy)),
                ("validation_loss", *validation_loss),
                ("validation_accuracy", *validation_accuracy),
                ("ema_test_loss", *ema_test_loss),
                ("ema_test_accuracy", *ema_test_accuracy),
                ("swa_test_loss", *swa_test_loss),
                ("swa_test_accuracy", *swa_test_accuracy),
                ("lr", Some(*lr)),
                ("gradient_norm", *gradient_norm),
                ("images_per_second", Some(*images_per_second)),
                ("skipped", Some(f64::from(*skipped))),
            ];
            (*step, named("epoch", &values))
        }
        Record::Curvature { step, measures, .. } => {
            // TensorBoard allows letters, digits and a few signs in names.
            let plain = |name: &str| name.replace('λ', "lambda").replace(['/', ' ', ','], "_");
            let values = numbers(measures).into_iter();
            (*step, values.map(|(name, number)| (format!("curvature/{}", plain(&name)), number.value)).collect())
        }
    }
}

/// Seconds of training before each record, from the lines of epochs: steps between them take the same time.
fn seconds(records: &[Record]) -> Vec<f64> {
    let mut before = Vec::new();
    let mut known: Vec<(u64, f64)> = vec![(0, 0.0)];
    for record in records {
        if let Record::Epoch { step, seconds, .. } = record
            && seconds.is_finite()
        {
            // A line that was written twice replaces the earlier one.
            while known.pop_if(|(earlier, _)| *earlier >= *step).is_some() {}
            known.push((*step, *seconds));
        }
    }
    for record in records {
        let (Record::Step { step, .. } | Record::Epoch { step, .. } | Record::Curvature { step, .. }) = record;
        let after = known.partition_point(|(other, _)| other < step);
        let (earlier, later) = (after.checked_sub(1).and_then(|index| known.get(index)), known.get(after));
        before.push(match (earlier, later) {
            (Some((from, start)), Some((to, end))) => start + (end - start) * (step - from) as f64 / (to - from) as f64,
            (Some((_, seconds)), None) | (None, Some((_, seconds))) => *seconds,
            (None, None) => 0.0,
        });
    }
    before
}

/// Writes the log of a run to `tensorboard/` in its folder, and replaces an earlier one.
pub(super) fn write(run: &LoadedRun) -> Result<PathBuf, TrainError> {
    let log = run.path.join("log.jsonl");
    let modified = std::fs::metadata(&log).and_then(|data| data.modified()).map_err(TrainError::io(&log))?;
    // The last line is as old as the file. The seconds of training tell how much older the others are.
    let end = modified.duration_since(std::time::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    let seconds = seconds(&run.records);
    let last = seconds.iter().copied().fold(0.0, f64::max);
    let time = |seconds: f64| end - (last - seconds);
    let mut file = Vec::new();
    let mut first = event(time(seconds.first().copied().unwrap_or(last)));
    append_bytes(&mut first, 3, b"brain.Event:2");
    append_record(&mut file, &first);
    for (record, seconds) in run.records.iter().zip(seconds) {
        let (step, values) = of_record(record);
        append_record(&mut file, &scalars(time(seconds), step, &values));
    }
    let folder = run.path.join("tensorboard");
    std::fs::create_dir_all(&folder).map_err(TrainError::io(&folder))?;
    let path = folder.join("events.out.tfevents.polder");
    write_whole(&path, &file)?;
    Ok(path)
}
