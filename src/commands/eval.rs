//! `polder eval`: loss and accuracy of trained weights.

use std::path::PathBuf;

use polder::data::Split;
use polder::kernels::batch_norm::Mode;
use polder::settings;
use polder::train::{Evaluation, Evaluator};
use serde_json::json;

use super::flags::Flags;
use super::model::{ModelArgs, Samples, Subject};
use super::{Failure, print, shown, write_npy};

settings! {
    /// The images to evaluate on.
    pub struct EvalSettings {
        /// Which images
        split: Split = Split::Test;
        /// The first N images
        samples: Option<usize> = None, else "all", in at_least(1);
    }
}

#[derive(clap::Args)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: Flags<EvalSettings>,
    /// Write the logits (samples × classes, f32) to this file
    #[arg(long, value_name = "FILE.npy")]
    logits: Option<PathBuf>,
}

pub fn run(args: &EvalArgs) -> Result<(), Failure> {
    let EvalSettings { split, samples } = args.images.settings()?;
    let subject = args.model.open(split, samples.map_or(Samples::All, Samples::First))?;
    let Subject { device, name, data, images, normalization, init, batch_size, .. } = &subject;
    let mut evaluator =
        Evaluator::new(device, &subject.network(), (data, images), *normalization, *batch_size, Mode::Eval)?;
    let [parameters, statistics] = subject.load(init, evaluator.plan())?;
    let mut logits = Vec::new();
    let found = evaluator.evaluate(parameters.view(), statistics.view(), |batch| {
        if args.logits.is_some() {
            logits.extend(batch.to_vec()?);
        }
        Ok(())
    })?;
    if !found.loss.is_finite() {
        return Err(subject.weights_error(format!("the loss is not finite ({})", found.loss)).into());
    }
    if let Some(path) = &args.logits {
        let shape = [images.len() as u64, images.classes as u64];
        write_npy(path, &logits, &shape)?;
    }
    if args.model.json {
        return print(&json!(found).to_string());
    }
    let Evaluation { samples, errors, accuracy, top5_accuracy, loss } = found;
    let percent = 100.0 * accuracy;
    let top5 = top5_accuracy.map(|share| format!(" (top five {:.2} %)", 100.0 * share)).unwrap_or_default();
    print(&format!(
        "{name}, {split} split: {samples} samples, {errors} errors, accuracy {percent:.2} %{top5}, loss {}",
        shown(loss, 5)
    ))
}
