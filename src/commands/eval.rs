//! `polder eval`: loss and accuracy of trained weights.

use std::path::PathBuf;

use polder::kernels::batch_norm::Mode;
use polder::train::{Evaluation, Evaluator, TrainError};
use serde_json::json;

use super::model::{ModelArgs, Samples, SplitName, Subject};
use super::{print, write_npy};

#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Which images
    #[arg(long, value_enum, default_value = "test")]
    split: SplitName,
    /// The first N images only
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Write the logits (samples × classes, f32) to this file
    #[arg(long, value_name = "FILE.npy")]
    logits: Option<PathBuf>,
}

pub fn run(args: &EvalArgs) -> Result<(), TrainError> {
    let split = args.split.split();
    let subject = args.model.open(split, args.samples.map_or(Samples::All, Samples::First))?;
    let Subject { device, name, data, images, normalization, init, .. } = &subject;
    let batch_size = args.model.batch_size;
    let mut evaluator =
        Evaluator::new(device, &subject.network(), (data, images), *normalization, batch_size, Mode::Eval)?;
    let [parameters, statistics] = subject.load(init, evaluator.plan())?;
    let mut logits = Vec::new();
    let found = evaluator.evaluate(parameters.view(), statistics.view(), |batch| {
        if args.logits.is_some() {
            logits.extend(batch.to_vec()?);
        }
        Ok(())
    })?;
    if let Some(path) = &args.logits {
        let shape = [images.len() as u64, images.classes as u64];
        write_npy(path, &logits, &shape)?;
    }
    if args.model.json {
        return print(&json!(found).to_string());
    }
    let Evaluation { samples, errors, accuracy, loss } = found;
    let percent = 100.0 * accuracy;
    print(&format!(
        "{name}, {split} split: {samples} samples, {errors} errors, accuracy {percent:.2} %, loss {loss:.5}"
    ))
}
