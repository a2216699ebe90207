//! Reads `tests/fixtures` (its README.md says how they were made) and checks training runs against them.

use std::path::{Path, PathBuf};

use approx::abs_diff_eq;
use polder::arena::{Layout, Tensor, TensorKind};
use polder::device::{Bf16x6, Buffer, Compute, Device, Scalar};
use polder::kernels::image::{self, BatchShape, Normalization, Position};
use polder::nn::{Model, Shortcut};
use polder::objective::Wrapped;
use polder::optim::{
    Along, Asam, Base, CrSam, Form, FriendlySam, Gam, Gnr, Gsam, Hvp, LookSam, Method, Msam, Norm, Optimizer, Oracle,
    Perturbed, Plain, RSam, RandomSam, SaSam, Sam, Sampa, Sassha, Settings, Sharpness, Wsam,
};
use polder::plan::{Plan, PlanOptions, Shape};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

use super::{Grouped, Random, fast_devices, relative_error, to_f64, upload};

/// The path of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var("POLDER_FIXTURES")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures").to_string());
    Path::new(&folder).join(name)
}

pub fn read_json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn floats(view: &TensorView<'_>) -> Vec<f64> {
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
        Dtype::F64 => bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        other => panic!("no floats: {other:?}"),
    }
}

/// The tensors of a fixture in an arena of this layout.
pub fn arena(layout: &Layout, file: &str) -> Vec<f64> {
    let bytes = std::fs::read(fixture(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut arena = vec![0.0; layout.len()];
    for tensor in layout.tensors() {
        let view = tensors.tensor(&tensor.name).unwrap();
        assert_eq!(view.shape(), tensor.kind.file_shape(), "{}", tensor.name);
        arena[tensor.range()].copy_from_slice(&tensor.kind.from_file(&floats(&view)));
    }
    arena
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("no number: {value}"))
}

fn array4(value: &Value) -> [f32; 4] {
    let values: Vec<f32> = value.as_array().unwrap().iter().map(|v| number(v) as f32).collect();
    [values[0], values[1], values[2], 1.0]
}

/// The pixels of the pool of images that the fixtures' batches are rows of, 32 × 32 × 3 bytes each, and their labels.
fn images_and_labels() -> (Vec<u8>, Vec<u32>) {
    let bytes = std::fs::read(fixture("batches.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let labels = tensors.tensor("labels").unwrap().data().chunks_exact(8).map(|bytes| u32::from(bytes[0])).collect();
    (tensors.tensor("images").unwrap().data().to_vec(), labels)
}

/// Some images of the pool, their upper left parts, or parts of larger images tiled with them, as the plan's batch.
/// They are normalised in double, as the fixture says; [`Pool::fill`] normalises them in single precision, like a
/// training run.
pub fn fill_in_double<S: Compute>(plan: &mut Plan<S>, rows: &[Value], fixture: &Value) {
    let rows: Vec<usize> = rows.iter().map(|row| row.as_u64().unwrap() as usize).collect();
    let (pixels, labels) = images_and_labels();
    let Shape { height, width, .. } = plan.input_shape();
    let mut images = Vec::new();
    for (image, row) in rows.iter().flat_map(|&image| (0..height).map(move |row| (image, row))) {
        let line = pixels[(image * 32 + row % 32) * 96..][..96].iter().cycle().take(width * 3);
        for (i, &pixel) in line.enumerate() {
            let (mean, std) = (number(&fixture["mean"][i % 3]), number(&fixture["std"][i % 3]));
            images.push(S::from_f64((f64::from(pixel) / 255.0 - mean) / std));
        }
    }
    let truth: Vec<u32> = rows.iter().map(|&row| labels[row]).collect();
    let (mut to, mut to_labels) = plan.batch_mut().unwrap();
    to.write(&images).unwrap();
    to_labels.write(&truth).unwrap();
}

/// The pool of images on a device.
pub struct Pool {
    pixels: Buffer<u8>,
    labels: Buffer<u32>,
}

impl Pool {
    pub fn new(device: &Device) -> Self {
        Self::cropped(device, 32, 32)
    }

    /// The upper left part of every image.
    pub fn cropped(device: &Device, height: usize, width: usize) -> Self {
        let (pixels, labels) = images_and_labels();
        let rows = pixels.chunks_exact(32 * 3).enumerate().filter(|(row, _)| row % 32 < height);
        let pixels: Vec<u8> = rows.flat_map(|(_, row)| &row[..width * 3]).copied().collect();
        Self { pixels: device.upload(&pixels).unwrap(), labels: device.upload(&labels).unwrap() }
    }

    /// Some of its images, normalised as the fixture says, as the plan's batch.
    pub fn fill<S: Compute>(&self, plan: &mut Plan<S>, rows: &[Value], fixture: &Value) {
        let rows: Vec<u32> = rows.iter().map(|row| row.as_u64().unwrap() as u32).collect();
        let order = plan.device().upload(&rows).unwrap();
        let normalization = Normalization { mean: array4(&fixture["mean"]), std: array4(&fixture["std"]) };
        let Shape { batch, height, width, channels } = plan.input_shape();
        let shape = BatchShape { batch, height, width, channels };
        let (out, truth) = plan.batch_mut().unwrap();
        let (pixels, labels, start) = (self.pixels.view(), self.labels.view(), Position::default());
        image::batch(&shape, pixels, labels, order.view(), start, &normalization, None, out, truth).unwrap();
    }
}

/// A training plan of the fixture's model.
pub fn plan<S: Compute>(device: &Device, fixture: &Value, batch: usize) -> Plan<S> {
    let shortcut = fixture["shortcut"].as_str().unwrap().parse::<Shortcut>().unwrap();
    let model = fixture["model"].as_str().unwrap();
    let model = Model::from_name(model, Some(shortcut)).unwrap();
    let shape = Shape { batch, height: 32, width: 32, channels: 3 };
    let (graph, logits) = model.trace(shape, 10).unwrap();
    let label_smoothing = fixture["label_smoothing"].as_f64().unwrap_or(0.0);
    Plan::new(device, graph, logits, PlanOptions { label_smoothing, ..PlanOptions::training() }).unwrap()
}

/// The optimizer's settings of a run.
pub fn settings<T: Scalar>(run: &Value, layout: &Layout) -> Settings<T> {
    let base = match run["base"].as_str().unwrap() {
        "sgd" => Base::Sgd { momentum: number(&run["momentum"]), nesterov: run["nesterov"].as_bool().unwrap() },
        "adamw" => {
            let [beta1, beta2, eps] = ["beta1", "beta2", "eps"].map(|key| number(&run[key]));
            Base::AdamW { beta1, beta2, eps }
        }
        "muon" => Base::Muon { momentum: number(&run["momentum"]) },
        other => panic!("no base optimizer: {other}"),
    };
    let decay_len = if run["decay_norm"] == false { layout.weights_len() } else { layout.len() };
    let (method, weight_decay) = (method(run, layout), number(&run["weight_decay"]));
    Settings { method, base, weight_decay, decay_len, clip: run["clip"].as_f64(), matrices: layout.hidden_matrices() }
}

fn method<T: Scalar>(run: &Value, layout: &Layout) -> Box<dyn Method<T>> {
    let of = |key: &str| number(&run[key]);
    let seed = || run["seed"].as_u64().unwrap();
    let every = || run["every"].as_u64().unwrap();
    match run["optimizer"].as_str().unwrap() {
        "sgd" | "adamw" | "muon" => Box::new(Plain {}),
        "sam" | "sam-in-groups" => Box::new(Sam {
            rho: of("rho"),
            p_norm: if run["p_norm"] == "inf" { Norm::Infinity } else { Norm::Two },
            ascent_steps: run["ascent_steps"].as_u64().unwrap_or(1) as usize,
            second_order: run["second_order"].as_bool().unwrap_or(false),
            ascent_length: None,
            perturb: if run["perturb"] == "norm" { Perturbed::Normalisation } else { Perturbed::All },
            normalisation: Some((layout.normalisation().start, layout.normalisation().end)),
        }),
        "random-sam" => Box::new(RandomSam { rho: of("rho"), seed: seed() }),
        "r-sam" => Box::new(RSam { rho: of("rho"), sigma: of("sigma"), seed: seed() }),
        "asam" => Box::new(Asam { rho: of("rho"), eta: of("eta"), scaled_len: layout.weights_len() }),
        "cr-sam" => Box::new(CrSam {
            rho: of("rho"),
            alpha: of("alpha"),
            beta: of("beta"),
            form: if run["form"] == "log" { Form::Log } else { Form::Released },
            a_min: of("a_min"),
            b_min: of("b_min"),
            direction: if run["direction"] == "random" { Along::Random } else { Along::Gradient },
            seed: run["seed"].as_u64().unwrap_or(0),
            loss_error: 0.0,
        }),
        "gnr" => Box::new(Gnr {
            rho: of("rho"),
            alpha: of("alpha"),
            hvp: if run["radius"].is_null() { Hvp::Exact } else { Hvp::Difference },
            hvp_radius: run["radius"].as_f64().unwrap_or(1.0),
            oracle: if run["oracle_rho"].is_null() { Oracle::Loss } else { Oracle::Sam },
            oracle_rho: run["oracle_rho"].as_f64().unwrap_or(1.0),
            every: every(),
        }),
        "gam" => Box::new(Gam {
            rho: of("rho"),
            rho_norm: of("rho_norm"),
            beta0: of("beta0"),
            beta1: of("beta1"),
            gamma: of("gamma"),
        }),
        "sa-sam" | "sa-sgd" => Box::new(SaSam {
            delta: of("delta"),
            eta0: of("eta0"),
            theta0: of("theta0"),
            damping: 0.5,
            perturb: run["optimizer"] == "sa-sam",
        }),
        "gsam" => Box::new(Gsam { rho: of("rho"), alpha: of("alpha") }),
        "friendly-sam" => Box::new(FriendlySam { rho: of("rho"), sigma: of("sigma"), lambda: of("lambda") }),
        "msam" => Box::new(Msam { rho: of("rho") }),
        "wsam" => Box::new(Wsam {
            rho: of("rho"),
            gamma: of("gamma"),
            sharpness: run["sharpness"].as_str().unwrap().parse::<Sharpness>().unwrap(),
        }),
        "sassha" => Box::new(Sassha { rho: of("rho"), every: every(), seed: seed() }),
        "sampa" => Box::new(Sampa { rho: of("rho"), lambda: of("lambda") }),
        "looksam" => Box::new(LookSam { rho: of("rho"), alpha: of("alpha"), every: every() }),
        other => panic!("no method: {other}"),
    }
}

/// Runs on every fast device in single precision, and on the CPU in double, where the formulas must agree to the
/// precision in which the reference is stored.
pub fn check_runs(names: &[&str]) {
    let devices = fast_devices();
    for name in names {
        for device in &devices {
            check_run::<f32>(device, name, 1e-3);
        }
        // As exact as f32. Without matrix units it takes several times as long, which under sanitizers is minutes.
        if std::env::var_os("POLDER_SANITIZE").is_none() {
            check_run::<Bf16x6>(&devices[0], name, 1e-3);
        }
        check_run::<f64>(&devices[0], name, 1e-6);
    }
}

/// Five steps, each on a batch of its own, from the same start as the reference.
pub fn check_run<S: Compute>(device: &Device, name: &str, tolerance: f64) {
    let run = read_json(&format!("run-{name}.json"));
    let (rows, steps) = (run["rows"].as_array().unwrap(), run["steps"].as_array().unwrap());
    assert_eq!((rows.len(), steps.len()), (5, 5));
    let batch = rows[0].as_array().unwrap().len();
    let mut plan = plan::<S>(device, &run, run["m"].as_u64().map_or(batch, |m| m as usize));
    let pool = Pool::new(device);
    let start = arena(plan.parameters(), "resnet8-init.safetensors");
    let mut weights = upload::<S::Master>(device, &start);
    let layout = plan.parameters().clone();
    let mut optimizer = Optimizer::new(device, start.len(), settings(&run, &layout)).unwrap();
    for (rows, step) in rows.iter().zip(steps) {
        let rows = rows.as_array().unwrap();
        let size = plan.input_shape().batch;
        let show = |plan: &mut Plan<S>, group: usize| {
            let rows = &rows[group * size..][..size];
            if S::NAME == "f64" {
                fill_in_double(plan, rows, &run)
            } else {
                pool.fill(plan, rows, &run)
            }
            Ok(())
        };
        let mut images = Wrapped(Grouped { plan: &mut plan, groups: rows.len() / size, show });
        // A method with its own step size must ignore the learning rate.
        optimizer.step(&mut images, weights.view_mut(), run["lr"].as_f64().unwrap_or(f64::NAN)).unwrap();
        let telemetry = optimizer.telemetry().unwrap();
        let close = |found: f64, key: &str, scale: f64| {
            let expected = number(&step[key]);
            assert!(
                abs_diff_eq!(found, expected, epsilon = tolerance * scale),
                "{name}: {key} {found} instead of {expected}"
            );
        };
        close(telemetry.loss, "loss", telemetry.loss);
        close(telemetry.gradient_norm, "grad_norm", telemetry.gradient_norm);
        for (key, found) in ["a", "b"].map(|key| (key, telemetry.get(key))) {
            assert_eq!(found.is_some(), step.get(key).is_some(), "{name}: {key}");
            // A difference of losses: judged on the losses' scale.
            found.iter().for_each(|&found| close(found, key, telemetry.loss));
        }
        for (key, found) in ["eta", "rho"].map(|key| (key, telemetry.get(key))) {
            assert_eq!(found.is_some(), step.get(key).is_some(), "{name}: {key}");
            found.iter().for_each(|&found| close(found, key, found));
        }
    }
    let moved: Vec<f64> = to_f64(&weights.to_vec().unwrap()).iter().zip(&start).map(|(w, s)| w - s).collect();
    let error = relative_error(&moved, &arena(&layout, &format!("run-{name}.safetensors")));
    println!("{name} in {}: relative error of the five steps {error:.1e}", S::NAME);
    assert!(error < tolerance, "{name}: relative error of five steps {error:.2e}");
    let statistics = arena(plan.statistics_layout(), &format!("run-{name}.safetensors"));
    let found: Vec<f64> = to_f64(&plan.statistics().to_vec().unwrap());
    let error = relative_error(&found, &statistics);
    assert!(error < tolerance, "{name}: running statistics' relative error {error:.2e}");
    assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
}

/// The generator's 2u − 1 in [−1, 1) for element `index` of the tensor `name`; see `tests/fixtures/README.md`.
pub fn hash_uniform(name: &str, index: usize) -> f64 {
    let seed =
        name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
    let bits = Random(seed.wrapping_add(index as u64)).bits();
    2.0 * ((bits >> 40) as f64 / f64::from(1 << 24)) - 1.0
}

/// A vector whose tensors both sides compute: [`hash_uniform`] of `prefix` and the tensor's name, in the files' order.
pub fn hash_vector(layout: &Layout, prefix: &str) -> Vec<f64> {
    let mut vector = vec![0.0; layout.len()];
    for tensor in layout.tensors() {
        let name = format!("{prefix}{}", tensor.name);
        let file: Vec<f64> = (0..tensor.kind.len()).map(|index| hash_uniform(&name, index)).collect();
        vector[tensor.range()].copy_from_slice(&tensor.kind.from_file(&file));
    }
    vector
}

/// The errors of a tensor's norm and of its projection on known numbers, the larger of the two, relative to the norm.
/// The projection sees every element and its place; the norm gives the scale. `whole` is the norm of the whole vector:
/// a tensor of less than a hundredth of it is judged by that, because the gradient of a bias before batch norm is zero.
pub fn digest_error(tensor: &Tensor, vector: &[f64], [norm, projection]: [f64; 2], whole: f64) -> f64 {
    let file = tensor.kind.to_file(&vector[tensor.range()]);
    let probe = |index: usize| hash_uniform(&format!("probe:{}", tensor.name), index);
    let found_norm = file.iter().map(|&value| value * value).sum::<f64>().sqrt();
    let found_projection: f64 = file.iter().enumerate().map(|(index, &value)| value * probe(index)).sum();
    (found_norm - norm).abs().max((found_projection - projection).abs()) / norm.max(whole / 100.0)
}

/// The tensors of a case's digest `key` of a vector. `whole` names the norm of all of it.
pub fn check_digest(what: &str, layout: &Layout, found: &[f64], case: &Value, [key, whole]: [&str; 2], tolerance: f64) {
    let (expected, whole) = (&case[key], number(&case[whole]));
    let mut largest = 0.0f64;
    for tensor in layout.tensors() {
        let expected = &expected[&tensor.name];
        let error = digest_error(tensor, found, ["norm", "projection"].map(|key| number(&expected[key])), whole);
        assert!(error < tolerance, "{what}: {key}: {}: {error:.1e}", tensor.name);
        largest = largest.max(error);
    }
    println!("{what}: {key}: largest relative error of a tensor's norm or projection {largest:.1e}");
}

/// Weights that both sides compute, because they are too large to keep.
pub fn hash_weights(layout: &Layout) -> Vec<f64> {
    let mut weights = vec![0.0; layout.len()];
    for tensor in layout.tensors() {
        let file: Vec<f64> = (0..tensor.kind.len())
            .map(|index| {
                let value = hash_uniform(&tensor.name, index);
                let rounded = match tensor.kind {
                    TensorKind::Convolution { kernel, inputs, .. } => {
                        value * (3.0 * (2.0 / (kernel * kernel * inputs) as f64)).sqrt()
                    }
                    TensorKind::Linear { inputs, .. } | TensorKind::Projection { inputs, .. } => {
                        value * (3.0 / inputs as f64).sqrt()
                    }
                    TensorKind::Tokens { .. } => value * (3.0 / tensor.kind.len() as f64).sqrt(),
                    TensorKind::Scale(_) => 1.0 + 0.1 * value,
                    _ => 0.1 * value,
                };
                f64::from(rounded as f32)
            })
            .collect();
        weights[tensor.range()].copy_from_slice(&tensor.kind.from_file(&file));
    }
    weights
}
