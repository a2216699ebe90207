//! A training run from its parts: settings, a network, a data set and a method, each by name or your own.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};

use super::TrainError;
use super::folder::{Config, RunImages};
use super::images::{normalization, open_data, training_images};
use super::run::{Progress, Run, Summary};
use super::settings::{Precision, RunSettings};
use crate::data::{Dataset, Images};
use crate::device::{Bf16x3, Bf16x6, Tf32};
use crate::kernels::image::Normalization;
use crate::optim::Method;
use crate::plan::{Network, Shape};

/// A training run. Network, data set and method are those that the settings name, unless they are given here.
///
/// ```no_run
/// use polder::data::{SyntheticSpec, synthetic};
/// use polder::optim::Sam;
/// use polder::plan::{Graph, PlanError, Shape, Value};
/// use polder::train::{RunSettings, Training};
///
/// /// One convolution, and a linear layer over the mean of its output.
/// fn network(images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
///     let mut graph = Graph::new(images);
///     let x = graph.input();
///     let x = graph.convolution(x, "conv.weight", 16, 3, 1, 1)?;
///     let x = graph.batch_norm(x, "bn", None, true)?;
///     let x = graph.global_average_pool(x)?;
///     let logits = graph.linear(x, "fc", classes)?;
///     Ok((graph, logits))
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let summary = Training::new(RunSettings::default())
///     .network("one-convolution", &network)
///     .dataset(synthetic(&SyntheticSpec::default())?)
///     .method("sam-0.1", Box::new(Sam::new(0.1)))
///     .run()?;
/// println!("{:?}", summary.test);
/// # Ok(())
/// # }
/// ```
pub struct Training<'a> {
    settings: RunSettings,
    network: Option<(String, Network<'a>)>,
    dataset: Option<Dataset>,
    method: Option<(String, Box<dyn Method<f32>>)>,
    out: Option<PathBuf>,
    /// Whether the folder holds the run already.
    resume: bool,
}

impl<'a> Training<'a> {
    /// A run with these settings.
    pub fn new(settings: RunSettings) -> Self {
        Self { settings, network: None, dataset: None, method: None, out: None, resume: false }
    }

    /// Trains this network. The name stands for `model` in `config.toml`.
    #[must_use]
    pub fn network(mut self, name: &str, network: Network<'a>) -> Self {
        self.network = Some((name.into(), network));
        self
    }

    /// Trains on this data set, which is reduced and relabelled as the settings say. Its name stands for `data` in
    /// `config.toml`.
    #[must_use]
    pub fn dataset(mut self, dataset: Dataset) -> Self {
        self.dataset = Some(dataset);
        self
    }

    /// Trains with this method over the base optimizer of the settings. The name stands for `optimizer` in
    /// `config.toml`, beside the method's options.
    #[must_use]
    pub fn method(mut self, name: &str, method: Box<dyn Method<f32>>) -> Self {
        self.method = Some((name.into(), method));
        self
    }

    /// Writes `config.toml`, `log.jsonl`, `model.safetensors` and `checkpoint/` to this folder, which must not hold a
    /// run.
    #[must_use]
    pub fn out(mut self, folder: impl Into<PathBuf>) -> Self {
        (self.out, self.resume) = (Some(folder.into()), false);
        self
    }

    /// Continues the run in this folder from its checkpoint, with bit-identical results. A run that was stopped before
    /// its first checkpoint starts again.
    #[must_use]
    pub fn resume(mut self, folder: impl Into<PathBuf>) -> Self {
        (self.out, self.resume) = (Some(folder.into()), true);
        self
    }

    /// Trains to the end.
    ///
    /// # Errors
    /// Settings that cannot be used, files, and failures of the device. What was saved before stays.
    pub fn run(self) -> Result<Summary, TrainError> {
        self.run_with(&AtomicBool::new(false), &mut |_| ())
    }

    /// Trains, and reports its progress. Setting `stop` ends the run after the current step, on a GPU after the few
    /// steps that have been launched.
    ///
    /// # Errors
    /// Those of [`Training::run`]; [`Error::Stopped`](crate::device::Error::Stopped) if it is stopped before the data
    /// set is read.
    pub fn run_with(self, stop: &AtomicBool, progress: &mut dyn FnMut(Progress)) -> Result<Summary, TrainError> {
        let Self { settings, network, dataset, method, out, resume } = self;
        settings.check()?;
        let named;
        let (network_name, network): (_, Network<'_>) = match network {
            Some((name, network)) => (Some(name), network),
            None => {
                let model = settings.model()?;
                named = move |images: Shape, classes: usize| model.trace(images, classes);
                (None, &named)
            }
        };
        let (data_name, dataset) = match dataset {
            Some(dataset) => (Some(dataset.name.clone()), dataset),
            None => {
                let mut watch = |done, of| {
                    progress(Progress::Reading { done, of });
                    !stop.load(Ordering::Relaxed)
                };
                (None, open_data(&settings.data.data, &settings.data.load_options(), &mut watch)?)
            }
        };
        let (method_name, method) = match method {
            Some((name, method)) => (Some(name), method),
            None => (None, settings.method()?),
        };
        method.check()?;
        method.check_combination()?;
        let dataset = with_classes(dataset, settings.data.classes)?;
        dataset.check()?;
        let (given, of_data) = (&settings.data, (&*dataset.mean, &*dataset.std));
        let (mean, std, channels) = (given.mean.as_deref(), given.std.as_deref(), dataset.train.shape.channels);
        let normalization = normalization(mean, std, of_data, channels)?;
        let images = RunImages::of(&dataset, &normalization);
        let absent_classes = dataset.absent_classes();
        let mut dataset = dataset;
        let (train, validation) = training_images(dataset.train, (&dataset.name, dataset.statistics), &settings)?;
        dataset.train = train;
        let precision = settings.run.precision;
        let names = Names { network: network_name, data: data_name, method: method_name };
        let subject = Subject {
            settings,
            network,
            dataset,
            validation,
            absent_classes,
            normalization,
            images,
            method,
            names,
            steps_per_launch: None,
        };
        match precision {
            Precision::F32 => Run::<f32>::open(subject, out, resume)?.train(stop, progress),
            Precision::Tf32 => Run::<Tf32>::open(subject, out, resume)?.train(stop, progress),
            Precision::Bf16x3 => Run::<Bf16x3>::open(subject, out, resume)?.train(stop, progress),
            Precision::Bf16x6 => Run::<Bf16x6>::open(subject, out, resume)?.train(stop, progress),
            Precision::F16 => Run::<f16>::open(subject, out, resume)?.train(stop, progress),
            Precision::Bf16 => Run::<bf16>::open(subject, out, resume)?.train(stop, progress),
        }
    }
}

/// The data set with this number of classes, if one is given.
fn with_classes(mut dataset: Dataset, classes: Option<usize>) -> Result<Dataset, TrainError> {
    let Some(classes) = classes else { return Ok(dataset) };
    for images in [&mut dataset.train, &mut dataset.test] {
        images.classes = classes;
        images.check().map_err(|error| TrainError::setting("classes", error.to_string()))?;
    }
    Ok(dataset)
}

/// The names of parts that the settings do not name.
#[derive(Default)]
pub(super) struct Names {
    pub network: Option<String>,
    pub data: Option<String>,
    pub method: Option<String>,
}

/// What a run trains, opened.
pub(super) struct Subject<'a> {
    pub settings: RunSettings,
    pub network: Network<'a>,
    /// As the settings reduce and relabel it.
    pub dataset: Dataset,
    /// The training images that are held out.
    pub validation: Option<Images>,
    /// The classes that the whole data set has no image of.
    pub absent_classes: Vec<u32>,
    pub normalization: Normalization,
    /// The whole data set.
    pub images: RunImages,
    pub method: Box<dyn Method<f32>>,
    pub names: Names,
    /// The most steps that are launched at once; none for what suits the device.
    pub steps_per_launch: Option<u64>,
}

impl Subject<'_> {
    /// How errors call the data: its path, or its name.
    pub fn data(&self) -> String {
        self.names.data.clone().unwrap_or_else(|| self.settings.data.data.clone())
    }

    /// What `config.toml` says of the run.
    pub fn config(&self) -> Result<Config, TrainError> {
        let Names { network, data, method } = &self.names;
        let names = [("model", network), ("data", data), ("optimizer", method)];
        let own = names.into_iter().filter_map(|(option, name)| Some((option, name.clone()?)));
        let own: Vec<(&str, String)> = own.collect();
        let settings = self.settings.to_toml_with(&*self.method, &own)?;
        Ok(Config::new(&settings, self.images.clone(), own.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{
        AugmentPolicy, BaseName, CurvatureLogSettings, DataSettings, Evaluator, LoopSettings, Measure, open_device,
    };
    use super::*;
    use crate::data::{SyntheticSpec, synthetic};
    use crate::kernels::batch_norm::Mode;
    use crate::optim::Sam;
    use crate::plan::{Graph, PlanError, Value};

    fn network(images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
        let mut graph = Graph::new(images);
        let x = graph.input();
        let x = graph.convolution(x, "conv.weight", 4, 3, 1, 1)?;
        let x = graph.batch_norm(x, "bn", None, true)?;
        let x = graph.global_average_pool(x)?;
        let logits = graph.linear(x, "fc", classes)?;
        Ok((graph, logits))
    }

    fn training(steps: u64, rho: f64) -> Training<'static> {
        let data = DataSettings { batch_size: 8, ..DataSettings::default() };
        let run =
            LoopSettings { steps: Some(steps), schedule: crate::optim::Decay::Constant, ..LoopSettings::default() };
        let run = LoopSettings { device: "cpu".into(), ..run };
        let set = synthetic(&SyntheticSpec { train: 40, test: 16, side: 8, seed: 3 }).unwrap();
        Training::new(RunSettings { data, run, ..RunSettings::default() })
            .network("one-convolution", &network)
            .dataset(set)
            .method("my-sam", Box::new(Sam::new(rho)))
    }

    #[test]
    fn a_run_of_own_parts_is_written_and_resumed_with_the_same_bits() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
        let summary = training(12, 0.1).out(&whole).run().unwrap();
        assert_eq!((summary.steps, summary.test.unwrap().samples), (12, 16));
        training(7, 0.1).out(&parts).run().unwrap();
        let config = std::fs::read_to_string(parts.join("config.toml")).unwrap();
        for line in ["model = \"one-convolution\"", "data = \"synthetic\"", "optimizer = \"my-sam\"", "rho = 0.1"] {
            assert!(config.lines().any(|other| other == line), "{line}: {config}");
        }
        // Another radius would not continue the run.
        let error = training(12, 0.2).resume(&parts).run().unwrap_err().to_string();
        assert!(error.contains("`rho` differs from the checkpoint"), "{error}");
        training(12, 0.1).resume(&parts).run().unwrap();
        let model = |run: &std::path::Path| std::fs::read(run.join("model.safetensors")).unwrap();
        assert!(model(&whole) == model(&parts));
    }

    /// What is drawn for a batch depends on the step alone: a run that is resumed draws the same.
    #[test]
    fn augmented_images_are_the_same_after_a_pause() {
        let folder = tempfile::tempdir().unwrap();
        let model = |run: &Path| std::fs::read(run.join("model.safetensors")).unwrap();
        let mut models = Vec::new();
        let changes: [fn(&mut DataSettings); 6] = [
            |_| {},
            |data| data.erasing = Some(0.9),
            |data| data.random_resized_crop = Some(0.2),
            |data| data.color_jitter = Some(vec![0.4, 0.4, 0.4, 0.1]),
            |data| data.auto_augment = Some(AugmentPolicy::Cifar10),
            |data| data.rand_augment = Some(vec![2.0, 9.0]),
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let augmented = |steps| {
                let mut training = training(steps, 0.1);
                change(&mut training.settings.data);
                training.settings.data.micro_batch = (index % 2 == 1).then_some(4);
                training
            };
            let (whole, parts) = (folder.path().join(format!("whole {index}")), folder.path().join(index.to_string()));
            augmented(12).out(&whole).run().unwrap();
            augmented(7).out(&parts).run().unwrap();
            augmented(12).resume(&parts).run().unwrap();
            assert!(model(&whole) == model(&parts), "{index}");
            assert!(!models.contains(&model(&whole)), "{index}: an option changed nothing");
            models.push(model(&whole));
        }
    }

    /// What is drawn for a batch depends on the step alone: a run that is resumed draws the same.
    #[test]
    fn cut_and_mixed_images_are_the_same_after_a_pause() {
        let folder = tempfile::tempdir().unwrap();
        let mixed = |steps, micro_batch, [cutout, mixup, cutmix]: [bool; 3]| {
            let mut training = training(steps, 0.1);
            let data = &mut training.settings.data;
            (data.cutout, data.micro_batch) = (if cutout { 4 } else { 0 }, micro_batch);
            (data.mixup, data.cutmix) = (mixup.then_some(0.5), cutmix.then_some(1.0));
            training
        };
        let model = |run: &Path| std::fs::read(run.join("model.safetensors")).unwrap();
        let mut models = Vec::new();
        for kinds in [[false; 3], [true, false, false], [false, true, false], [false, false, true], [true; 3]] {
            for micro_batch in [None, Some(4)] {
                let name = format!("{kinds:?} {micro_batch:?}");
                let (whole, parts) = (folder.path().join(format!("{name} whole")), folder.path().join(&name));
                mixed(12, micro_batch, kinds).out(&whole).run().unwrap();
                mixed(7, micro_batch, kinds).out(&parts).run().unwrap();
                mixed(12, micro_batch, kinds).resume(&parts).run().unwrap();
                assert!(model(&whole) == model(&parts), "{name}");
                models.push(model(&whole));
            }
        }
        for (index, one) in models.iter().enumerate() {
            assert!(models[..index].iter().all(|other| other != one), "{index}: an option changed nothing");
        }
    }

    /// The log without what depends on the clock.
    fn records(run: &Path) -> Vec<serde_json::Value> {
        let log = std::fs::read_to_string(run.join("log.jsonl")).unwrap();
        let mut records: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for record in &mut records {
            let record = record.as_object_mut().unwrap();
            record.remove("seconds");
            if let Some(rate) = record.remove("images_per_second") {
                assert!(rate.as_f64().is_some_and(|rate| rate > 0.0), "{rate}");
            }
        }
        records
    }

    #[test]
    fn a_run_that_is_stopped_during_its_test_or_measurement_catches_up() {
        let folder = tempfile::tempdir().unwrap();
        let measured = || {
            let mut training = training(10, 0.1);
            let curvature_measures = vec![Measure::GradNorm, Measure::Trace];
            training.settings.curvature = CurvatureLogSettings {
                curvature_every: 1,
                curvature_measures,
                curvature_probes: 6,
                ..Default::default()
            };
            training
        };
        let whole = folder.path().join("whole");
        measured().out(&whole).run().unwrap();
        for name in ["test", "measurement"] {
            let (run, stop) = (folder.path().join(name), AtomicBool::new(false));
            let mut watch = |progress: Progress| {
                let now = match progress {
                    Progress::Testing => "test",
                    Progress::Measuring { .. } => "measurement",
                    _ => "",
                };
                if now == name {
                    stop.store(true, Ordering::Relaxed);
                }
            };
            let summary = measured().out(&run).run_with(&stop, &mut watch).unwrap();
            assert!(summary.interrupted && summary.steps == 5 && summary.test.is_none(), "{name}: {summary:?}");
            let lines = records(&run).len();
            assert_eq!(lines, usize::from(name == "measurement"), "{name}: nothing half done is logged");
            measured().resume(&run).run().unwrap();
            assert_eq!(records(&run), records(&whole), "{name}");
            let model = |run: &Path| std::fs::read(run.join("model.safetensors")).unwrap();
            assert!(model(&run) == model(&whole), "{name}");
        }
    }

    /// The average begins with the initial weights; it is that of its equation, whether or not the run was interrupted.
    #[test]
    fn weights_are_averaged_over_the_steps() {
        let folder = tempfile::tempdir().unwrap();
        let averaged = |steps| {
            let mut training = training(steps, 0.1);
            training.settings.optimizer.ema = Some(0.4);
            training
        };
        let values = |run: &Path, file: &str| -> Vec<f32> {
            let bytes = std::fs::read(run.join(file)).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let mut tensors: Vec<_> = file.tensors();
            tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
            let floats = |view: safetensors::tensor::TensorView<'_>| -> Vec<f32> {
                view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
            };
            tensors.into_iter().flat_map(|(_, view)| floats(view)).collect()
        };
        let mut expected: Option<Vec<f64>> = None;
        for steps in 1..=6u64 {
            let run = folder.path().join(format!("{steps}"));
            averaged(steps).out(&run).run().unwrap();
            let (now, average) = (values(&run, "model.safetensors"), values(&run, "ema.safetensors"));
            let t = (steps - 1) as f64;
            let decay = 0.4f64.min((1.0 + t) / (10.0 + t));
            if let Some(before) = expected {
                let close = |((before, now), average): ((f64, &f32), &f32)| {
                    let wanted = decay * before + (1.0 - decay) * f64::from(*now);
                    (wanted - f64::from(*average)).abs() <= 1e-6 * wanted.abs().max(1e-2)
                };
                assert!(before.into_iter().zip(&now).zip(&average).all(close), "after {steps} steps");
            }
            expected = Some(average.iter().copied().map(f64::from).collect());
            assert!(now != average, "after {steps} steps");
        }
        let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
        averaged(12).out(&whole).run().unwrap();
        averaged(7).out(&parts).run().unwrap();
        averaged(12).resume(&parts).run().unwrap();
        assert_eq!(values(&whole, "ema.safetensors"), values(&parts, "ema.safetensors"));
        assert!(records(&whole).last().unwrap()["ema_test_accuracy"].is_f64());
    }

    /// The tensors of a file of weights, by name.
    fn tensors(run: &Path, file: &str) -> std::collections::BTreeMap<String, Vec<f32>> {
        let bytes = std::fs::read(run.join(file)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let floats = |view: safetensors::tensor::TensorView<'_>| -> Vec<f32> {
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        file.tensors().into_iter().map(|(name, view)| (name, floats(view))).collect()
    }

    /// Frozen tensors keep the bits with which they begin, in every form of the training loop.
    #[test]
    fn frozen_tensors_stay_as_they_begin_and_a_run_resumes() {
        let folder = tempfile::tempdir().unwrap();
        // A rate that is zero in f32 leaves the initial weights.
        let mut still = training(1, 0.1);
        (still.settings.sgd.lr, still.settings.model.freeze_bn) = (1e-300, true);
        let start = folder.path().join("start");
        still.out(&start).run().unwrap();
        let start = tensors(&start, "model.safetensors");
        for base in [BaseName::Sgd, BaseName::AdamW] {
            for freeze_bn in [false, true] {
                let frozen = |steps| {
                    let mut training = training(steps, 0.1);
                    training.settings.optimizer.base = base;
                    training.settings.optimizer.ema = Some(0.4);
                    training.settings.model.freeze = Some(vec!["conv.*".into(), "bn.bias".into()]);
                    training.settings.model.freeze_bn = freeze_bn;
                    training
                };
                let name = format!("{base} {freeze_bn}");
                let (whole, parts) = (folder.path().join(format!("{name} whole")), folder.path().join(&name));
                frozen(12).out(&whole).run().unwrap();
                frozen(7).out(&parts).run().unwrap();
                frozen(12).resume(&parts).run().unwrap();
                for file in ["model.safetensors", "ema.safetensors"] {
                    let found = tensors(&whole, file);
                    assert_eq!(found, tensors(&parts, file), "{name}");
                    for (tensor, values) in &found {
                        let stays = ["conv.weight", "bn.bias"].contains(&tensor.as_str())
                            || freeze_bn && tensor.contains("running");
                        assert_eq!(*values == start[tensor], stays, "{name}: {tensor} of {file}");
                    }
                }
            }
        }
        let mut none = training(1, 0.1);
        none.settings.model.freeze = Some(vec!["convolution.*".into()]);
        let error = none.run().unwrap_err().to_string();
        assert!(error.contains("freeze: `convolution.*` matches no tensor"), "{error}");
        assert!(error.contains("`conv.weight`"), "{error}");
    }

    /// A frozen head is reset, too, and everything else is taken from the file.
    #[test]
    fn a_frozen_head_keeps_its_own_weights_when_it_is_reset() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        training(5, 0.1).out(&first).run().unwrap();
        let mut tuned = training(5, 0.1);
        tuned.settings.run.seed = 1;
        tuned.settings.model.init = Some(first.join("model.safetensors").to_str().unwrap().into());
        (tuned.settings.model.reset_head, tuned.settings.model.freeze) =
            (true, Some(vec!["fc.*".into(), "conv.weight".into()]));
        tuned.out(&second).run().unwrap();
        let (before, after) = (tensors(&first, "model.safetensors"), tensors(&second, "model.safetensors"));
        assert_eq!(before["conv.weight"], after["conv.weight"]);
        let head = &after["fc.weight"];
        assert!(*head != before["fc.weight"] && head.iter().all(|weight| *weight != 0.0));
    }

    /// A rate with a factor is that many times the rate: for both bases, for a method with a term beside the base, and
    /// for one that computes its step size; in single steps and in recorded ones.
    #[test]
    fn the_rate_of_a_tensor_is_multiplied() {
        let folder = tempfile::tempdir().unwrap();
        let run = |name: &str, method: &str, base: BaseName, (lr, rates): (f64, &[&str])| {
            let mut training = training(8, 0.1);
            (training.settings.sgd.lr, training.settings.adamw.lr) = (lr, lr);
            training.settings.optimizer.base = base;
            training.settings.optimizer.layer_rate = Some(rates.iter().map(|rate| rate.to_string()).collect());
            training.method = Some((method.into(), (crate::optim::find(method).unwrap().new)()));
            let run = folder.path().join(format!("{name} {method} {base}"));
            training.out(&run).run().unwrap();
            tensors(&run, "model.safetensors")
        };
        for (method, base) in [("sam", BaseName::Sgd), ("wsam", BaseName::Sgd), ("sam", BaseName::AdamW)] {
            let twice = run("twice", method, base, (0.05, &["*=2"]));
            assert_eq!(twice, run("plain", method, base, (0.1, &["*=1"])), "{method} {base}");
            let stopped = run("stopped", method, base, (0.05, &["*=1", "fc.*=0"]));
            assert!(stopped["fc.weight"] != twice["fc.weight"] && stopped["conv.weight"] != twice["conv.weight"]);
            let initial = run("initial", method, base, (1e-30, &["*=0"]));
            assert!(stopped["fc.weight"] == initial["fc.weight"] && stopped["fc.bias"] == initial["fc.bias"]);
        }
        let own = |rates| run(&format!("{rates:?}"), "sa-sam", BaseName::Sgd, (0.1, rates));
        let (plain, stopped) = (own(&["*=1"]), own(&["fc.*=0", "bn.*=1"]));
        assert!(stopped["fc.weight"] != plain["fc.weight"] && stopped["conv.weight"] != plain["conv.weight"]);
        assert!(own(&["*=0.5"])["conv.weight"] != plain["conv.weight"]);
    }

    /// The mean of the weights after the last epochs, whatever interrupts the run.
    #[test]
    fn weights_are_averaged_over_epochs() {
        let folder = tempfile::tempdir().unwrap();
        let averaged = |epochs: u64| {
            let mut training = training(5 * epochs, 0.1);
            training.settings.optimizer.swa = Some(1.0);
            training
        };
        let at = |name: &str| folder.path().join(name);
        averaged(4).out(at("whole")).run().unwrap();
        for epochs in [2, 3, 4] {
            training(5 * epochs, 0.1).out(at(&epochs.to_string())).run().unwrap();
        }
        let swa = tensors(&at("whole"), "swa.safetensors");
        let each = [2, 3, 4].map(|epochs| tensors(&at(&epochs.to_string()), "model.safetensors"));
        for (name, values) in &swa {
            let mean = |index: usize| each.iter().map(|of| f64::from(of[name][index])).sum::<f64>() / 3.0;
            let close = values.iter().enumerate().all(|(index, value)| (f64::from(*value) - mean(index)).abs() < 1e-6);
            assert_eq!(close, !name.contains("running"), "{name}");
        }
        // The model itself is that of a run without an average.
        assert_eq!(tensors(&at("whole"), "model.safetensors"), each[2]);
        let lines = records(&at("whole"));
        let has = |line: &serde_json::Value| line["swa_test_accuracy"].is_f64();
        assert!(lines[..3].iter().all(|line| !has(line)) && has(&lines[3]), "{lines:?}");
        // Stopped within an epoch, and in the last test.
        let (mut tests, stop) = (0, AtomicBool::new(false));
        let mut watch = |progress: Progress| {
            tests += u64::from(matches!(progress, Progress::Testing));
            stop.store(tests == 4, Ordering::Relaxed);
        };
        let summary = averaged(4).out(at("test")).run_with(&stop, &mut watch).unwrap();
        assert!(summary.interrupted && !at("test").join("swa.safetensors").exists());
        averaged(4).resume(at("test")).run().unwrap();
        let mut part = averaged(4);
        part.settings.run.steps = Some(13);
        part.out(at("parts")).run().unwrap();
        averaged(4).resume(at("parts")).run().unwrap();
        for run in ["test", "parts"] {
            assert_eq!(tensors(&at(run), "swa.safetensors"), swa, "{run}");
        }
        assert_eq!(records(&at("test")), lines);
        let mut late = averaged(4);
        late.settings.optimizer.swa = Some(4.0);
        let error = late.run().unwrap_err().to_string();
        assert_eq!(error, "swa: 4, but no whole epoch ends after that: the run has 4");
    }

    /// The labels of a bootstrap are the predictions of the first model, and a run that is resumed keeps them.
    #[test]
    fn a_run_learns_from_the_predictions_of_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        training(20, 0.1).out(at("first")).run().unwrap();
        let second = |steps| {
            let mut training = training(steps, 0.1);
            training.settings.data.train_size = Some(32);
            training.settings.data.bootstrap =
                Some(at("first").join("model.safetensors").to_str().unwrap().to_string());
            training
        };
        let mut changed = None;
        let mut watch = |progress: Progress| {
            if let Progress::Start { relabelled, .. } = progress {
                changed = relabelled;
            }
        };
        second(12).out(at("whole")).run_with(&AtomicBool::new(false), &mut watch).unwrap();
        let set = synthetic(&SyntheticSpec { train: 40, test: 16, side: 8, seed: 3 }).unwrap();
        let labels = crate::data::npy_labels(&at("whole").join("labels.npy"), 10).unwrap();
        let different = labels.iter().zip(&set.train.labels).filter(|(a, b)| a != b).count();
        assert_eq!((labels.len(), Some(different)), (32, changed));
        assert!(different > 0, "the test shows nothing");
        // The evaluator finds what the file says: every prediction is right.
        let device = open_device("cpu", 1).unwrap();
        let normalization = normalization(None, None, (&set.mean, &set.std), 3).unwrap();
        let images = super::super::bootstrapped(&at("whole"), set.train.clone().take(32).unwrap()).unwrap();
        let mut evaluator = Evaluator::new(&device, &network, ("set", &images), normalization, 8, Mode::Eval).unwrap();
        let layouts = evaluator.layouts();
        let loaded = super::super::weights::load(&at("first").join("model.safetensors"), layouts).unwrap();
        let [weights, statistics] = loaded.map(|values| device.upload(&values).unwrap());
        let found = evaluator.evaluate(weights.view(), statistics.view(), |_| Ok(())).unwrap();
        assert_eq!(found.errors, 0);
        // In two parts, without the first model.
        second(7).out(at("parts")).run().unwrap();
        std::fs::rename(at("first"), at("elsewhere")).unwrap();
        second(12).resume(at("parts")).run().unwrap();
        assert_eq!(tensors(&at("whole"), "model.safetensors"), tensors(&at("parts"), "model.safetensors"));
        // Other labels are not those that the run began with.
        let text = |error: Result<Summary, TrainError>| error.unwrap_err().to_string();
        let mut bytes = std::fs::read(at("parts").join("labels.npy")).unwrap();
        let last = bytes.len() - 4;
        bytes[last] = (bytes[last] + 1) % 10;
        std::fs::write(at("parts").join("labels.npy"), bytes).unwrap();
        let error = text(second(13).resume(at("parts")).run());
        assert_eq!(error, "data: not the images of the run: other labels by the bootstrap (their checksum differs)");
        let error = text(second(1).run());
        assert!(error.contains("model.safetensors"), "{error}");
        let mut noisy = second(1);
        noisy.settings.data.label_noise = Some(0.2);
        let expected = "bootstrap: cannot be given together with `label-noise`, whose labels it would replace";
        assert_eq!(text(noisy.run()), expected);
    }

    /// Whatever interrupts it, a run keeps the weights of the best of its epochs on the images that it holds out.
    #[test]
    fn the_weights_of_the_best_epoch_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let held_out = |steps| {
            let mut training = training(steps, 0.1);
            training.settings.data.validation = Some(0.2);
            training.settings.data.label_noise = Some(0.9);
            training
        };
        let whole = folder.path().join("whole");
        held_out(40).out(&whole).run().unwrap();
        let lines = records(&whole);
        assert_eq!(lines.len(), 10, "32 images in steps of 8");
        let of = |line: &serde_json::Value| {
            (line["validation_accuracy"].as_f64().unwrap(), line["validation_loss"].as_f64().unwrap())
        };
        let best = (0..10).rev().max_by(|&a, &b| {
            let ((a, other_loss), (b, loss)) = (of(&lines[a]), of(&lines[b]));
            a.total_cmp(&b).then(loss.total_cmp(&other_loss))
        });
        let best = best.unwrap();
        let file = |run: &Path, name: &str| std::fs::read(run.join(name)).unwrap();
        // A run that ends with that epoch has its weights.
        let until = folder.path().join("until");
        held_out(4 * (best as u64 + 1)).out(&until).run().unwrap();
        assert!(file(&whole, "best.safetensors") == file(&until, "model.safetensors"), "epoch {best} of {lines:?}");
        // In two parts.
        held_out(40).resume(&until).run().unwrap();
        assert_eq!(records(&until), lines);
        for name in ["best.safetensors", "model.safetensors"] {
            assert!(file(&whole, name) == file(&until, name), "{name}");
        }
        let mut none = held_out(4);
        none.settings.data.validation = Some(0.01);
        let error = none.run().unwrap_err().to_string();
        assert_eq!(error, "validation: a hold-out of 0.01 of 40 samples leaves a part without any");
    }

    /// The loss is checked over 50 steps, whatever ends and begins between them.
    #[test]
    fn a_test_that_was_stopped_does_not_count_as_divergence() {
        let folder = tempfile::tempdir().unwrap();
        let (run, stop, mut tests) = (folder.path().join("run"), AtomicBool::new(false), 0);
        let mut watch = |progress: Progress| {
            tests += u64::from(matches!(progress, Progress::Testing));
            stop.store(tests == 9, Ordering::Relaxed);
        };
        assert_eq!(training(55, 0.1).out(&run).run_with(&stop, &mut watch).unwrap().steps, 45);
        let resumed = training(55, 0.1).resume(&run).run().unwrap();
        assert_eq!((resumed.diverged, resumed.steps), (None, 55));
    }

    #[test]
    fn a_run_whose_folder_was_moved_ends_with_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (run, moved) = (folder.path().join("run"), folder.path().join("moved"));
        let mut moves = |progress: Progress| {
            if matches!(progress, Progress::Testing) && run.exists() {
                std::fs::rename(&run, &moved).unwrap();
            }
        };
        let found = training(10, 0.1).out(&run).run_with(&AtomicBool::new(false), &mut moves);
        assert!(
            matches!(&found, Err(error @ TrainError::Gone { path }) if *path == run && !error.is_input()),
            "{found:?}"
        );
        assert!(!run.exists(), "nothing is written where the folder was");
    }

    #[test]
    fn settings_and_data_that_cannot_be_used_are_refused() {
        let mut wrong = training(1, 0.1);
        wrong.settings.sgd.lr = -1.0;
        assert_eq!(wrong.run().unwrap_err().to_string(), "lr: -1, expected a finite number above 0");
        assert_eq!(training(1, -0.1).run().unwrap_err().to_string(), "rho: -0.1, expected a finite number, 0 or more");
        let mut wrong = training(1, 0.1);
        wrong.dataset.as_mut().unwrap().test.labels[3] = 10;
        assert_eq!(wrong.run().unwrap_err().to_string(), "label 10 at sample 3, expected 0 to 9");
    }
}
