//! Bootstrap: a run's training labels are the predictions of a model that was trained before, for labels that are wrong
//! in part (Foret et al. 2021, section 3.3).

use std::path::{Path, PathBuf};

use super::evaluate::Evaluator;
use super::folder::{RunImages, RunSplit};
use super::training::Subject;
use super::{Options, TrainError, weights};
use crate::data::{Images, npy_labels};
use crate::device::Device;
use crate::kernels::batch_norm::Mode;
use crate::kernels::image::Normalization;
use crate::plan::{Network, Shape};

/// The file in the folder of a run with the labels of its training images.
pub(super) const FILE: &str = "labels.npy";

/// What a bootstrap has done.
pub(super) struct Relabelled {
    /// The labels, one for each training image of the run.
    pub labels: Vec<u32>,
    /// How many of them differ from the data set's.
    pub changed: usize,
}

/// Gives the training images of a run new labels, if its settings ask for it: those that a run that is resumed has in
/// its folder, or else the predictions of the model. The record of the images then knows them.
pub(super) fn relabel(
    subject: &mut Subject<'_>,
    device: &Device,
    resumed: Option<&Path>,
) -> Result<Option<Relabelled>, TrainError> {
    let Some(of) = subject.settings.data.bootstrap.clone() else { return Ok(None) };
    let train = &subject.dataset.train;
    let labels = match resumed.map(|run| run.join(FILE)).filter(|file| file.exists()) {
        Some(file) => read(&file, train)?,
        None => {
            let own = (subject.network, subject.normalization);
            predictions(Path::new(&of), train, own, device, subject.settings.data.batch_size)?
        }
    };
    let changed = labels.iter().zip(&train.labels).filter(|(new, old)| new != old).count();
    subject.dataset.train.labels.clone_from(&labels);
    subject.images.bootstrap = Some(RunSplit::of(&subject.dataset.train));
    Ok(Some(Relabelled { labels, changed }))
}

/// The training images of the run in a folder with the labels that its bootstrap gave them.
///
/// # Errors
/// The file of the labels, and one that does not fit the images.
pub fn bootstrapped(run: &Path, mut images: Images) -> Result<Images, TrainError> {
    images.labels = read(&run.join(FILE), &images)?;
    Ok(images)
}

fn read(file: &Path, images: &Images) -> Result<Vec<u32>, TrainError> {
    let labels = npy_labels(file, images.classes)?;
    if labels.len() != images.len() {
        let reason = format!("{} labels, but the run has {} training images", labels.len(), images.len());
        return Err(TrainError::Results { path: file.into(), reason });
    }
    Ok(labels)
}

/// The class with the largest logit for each image, by the model of the run in a folder, or by the run's own network
/// with the weights of a file.
fn predictions(
    of: &Path,
    images: &Images,
    (own_network, own_normalization): (Network<'_>, Normalization),
    device: &Device,
    batch: usize,
) -> Result<Vec<u32>, TrainError> {
    let name = of.display().to_string();
    if !of.is_dir() {
        return classify(of, images, (own_network, &name), own_normalization, (device, batch));
    }
    let model = Options::some_of_run(of, &["model", "shortcut"])?.resolve()?.model()?;
    let network = move |shape: Shape, classes: usize| model.trace(shape, classes);
    let mut normalization = own_normalization;
    if let Some(record) = RunImages::of_run(of)? {
        let shape = images.shape;
        let (own, found) = ([shape.height, shape.width, shape.channels], record.shape);
        if (record.classes, found[2]) != (images.classes, own[2]) {
            let reason = format!(
                "{name} was trained on {} classes of images of {found:?}, this run has {} of {own:?}",
                record.classes, images.classes
            );
            return Err(TrainError::setting("bootstrap", reason));
        }
        let (mean, std) = (Some(&*record.mean), Some(&*record.std));
        normalization = super::normalization(mean, std, (&[], &[]), shape.channels)?;
    }
    classify(&weights_of(of)?, images, (&network, &name), normalization, (device, batch))
}

/// The file of a run's last weights.
fn weights_of(run: &Path) -> Result<PathBuf, TrainError> {
    let file = run.join("model.safetensors");
    if file.exists() {
        return Ok(file);
    }
    Err(TrainError::Results { path: run.into(), reason: "the run has saved no weights".into() })
}

fn classify(
    file: &Path,
    images: &Images,
    (network, name): (Network<'_>, &str),
    normalization: Normalization,
    (device, batch): (&Device, usize),
) -> Result<Vec<u32>, TrainError> {
    let mut evaluator = Evaluator::new(device, network, (name, images), normalization, batch, Mode::Eval)?;
    let [weights, statistics] = weights::load(file, evaluator.layouts())?;
    let (weights, statistics) = (device.upload(&weights)?, device.upload(&statistics)?);
    let mut labels = Vec::with_capacity(images.len());
    evaluator.evaluate(weights.view(), statistics.view(), |logits| {
        for row in logits.to_vec()?.chunks(images.classes) {
            if row.iter().any(|logit| !logit.is_finite()) {
                let reason = format!("its prediction for training image {} is not finite", labels.len());
                return Err(TrainError::Weights { path: file.into(), reason });
            }
            // Of equal ones the first.
            let largest = (1..row.len()).fold(0, |best, class| if row[class] > row[best] { class } else { best });
            labels.push(largest as u32);
        }
        Ok(())
    })?;
    Ok(labels)
}
