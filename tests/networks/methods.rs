//! Five steps of the sharpness-aware methods beyond SAM and CR-SAM against float64 PyTorch;
//! `tests/networks/training.rs` has those and the base optimizers, `tests/fixtures/README.md` says where the references
//! come from.

use approx::abs_diff_eq;
use polder::device::{Device, HostOptions, Scalar};
use polder::optim::Optimizer;
use polder::plan::{Graph, Plan, PlanError, PlanOptions, Shape, Value};

use crate::common::fixtures::{
    check_digest, check_run, check_runs, fill_in_double, hash_weights, number, read_json, settings,
};
use crate::common::{fast_devices, to_f64, upload};
use crate::vision_transformer::MEMBERS;

#[test]
fn sam_with_other_perturbations_matches_pytorch() {
    check_runs(&["asam", "sam-on", "sam-3-steps", "sam-second-order", "sam-clip"]);
}

#[test]
fn gradient_norm_regularisation_matches_pytorch() {
    check_runs(&["gnr", "gnr-sam-every-2", "gnr-difference", "gnr-adamw", "gam"]);
}

#[test]
fn methods_with_a_memory_match_pytorch() {
    check_runs(&["sa-sam", "sa-sgd", "looksam", "friendly-sam"]);
}

#[test]
fn random_perturbations_match_pytorch() {
    check_runs(&["random-sam", "r-sam", "cr-sam-random"]);
}

#[test]
fn momentum_sam_matches_pytorch_over_either_base() {
    check_runs(&["msam", "msam-adamw"]);
}

#[test]
fn weighted_sharpness_beside_either_base_matches_pytorch() {
    check_runs(&["wsam", "wsam-adamw"]);
}

#[test]
fn sassha_matches_pytorch() {
    // Few probes leave some curvatures near zero, whose roots single precision does not have.
    check_run::<f64>(&Device::host(), "sassha", 1e-6);
}

#[test]
fn muon_alone_and_as_a_base_matches_pytorch() {
    check_runs(&["muon", "muon-sam"]);
}

#[test]
fn groups_of_the_batch_match_pytorch() {
    check_runs(&["sam-in-groups"]);
}

#[test]
fn gsam_matches_pytorch() {
    check_runs(&["gsam", "gsam-adamw"]);
}

/// Three convolutions with batch norm and GELU.
fn convolutions(images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
    let mut graph = Graph::new(images);
    let mut x = graph.input();
    for (number, outputs, stride) in [(1, 8, 1), (2, 12, 2), (3, 12, 1)] {
        let y = graph.convolution(x, &format!("conv{number}.weight"), outputs, 3, stride, 1)?;
        let residual = (number == 3).then_some(x);
        let y = graph.batch_norm(y, &format!("bn{number}"), residual, false)?;
        x = graph.bias_gelu(y, &format!("gelu{number}.bias"), outputs)?;
    }
    let x = graph.global_average_pool(x)?;
    let logits = graph.linear(x, "fc", classes)?;
    Ok((graph, logits))
}

/// Five steps of SAMPa, each with a gradient on its own batch and one on the batch before.
fn check_sampa<T: Scalar>(device: &Device, run: &serde_json::Value, tolerance: f64) {
    let rows: Vec<_> = run["rows"].as_array().unwrap().iter().map(|rows| rows.as_array().unwrap()).collect();
    let steps = run["steps"].as_array().unwrap();
    assert_eq!((rows.len(), steps.len()), (5, 5));
    let [height, width] = ["height", "width"].map(|key| run[key].as_u64().unwrap() as usize);
    let images = Shape { batch: rows[0].len(), height, width, channels: 3 };
    let network = if run["model"] == "convolutions" { convolutions(images, 10) } else { MEMBERS[0].trace(images, 10) };
    let (graph, logits) = network.unwrap();
    let options = PlanOptions { label_smoothing: number(&run["label_smoothing"]), ..PlanOptions::training() };
    let mut plan = Plan::<T>::new(device, graph, logits, options).unwrap();
    let layout = plan.parameters().clone();
    assert_eq!(layout.parameters() as u64, run["parameters"].as_u64().unwrap());
    let start = hash_weights(&layout);
    let mut weights = upload::<T>(device, &start);
    let mut optimizer = Optimizer::new(device, start.len(), settings(run, &layout)).unwrap();
    let what = format!("{} with {} in {} on {}", run["model"], run["base"], T::NAME, device.name());
    for (number_of_step, (rows, step)) in rows.into_iter().zip(steps).enumerate() {
        fill_in_double(&mut plan, rows, run);
        optimizer.step(&mut plan, weights.view_mut(), number(&run["lr"])).unwrap();
        let telemetry = optimizer.telemetry().unwrap();
        for (key, found) in [("loss", telemetry.loss), ("grad_norm", telemetry.gradient_norm)] {
            let expected = number(&step[key]);
            let close = abs_diff_eq!(found, expected, epsilon = tolerance * expected);
            assert!(close, "{what}, step {number_of_step}: {key} {found} instead of {expected}");
        }
    }
    assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
    let moved: Vec<f64> = to_f64(&weights.to_vec().unwrap()).iter().zip(&start).map(|(w, s)| w - s).collect();
    check_digest(&what, &layout, &moved, run, ["delta", "delta_norm"], tolerance);
    let statistics = to_f64(&plan.statistics().to_vec().unwrap());
    check_digest(&what, plan.statistics_layout(), &statistics, run, ["running", "running_norm"], tolerance);
}

/// On networks without kinks: in one of ReLUs, hardly any two batches keep clear of them.
#[test]
fn sampa_matches_pytorch() {
    let runs = read_json("sampa.json");
    let runs = runs["cases"].as_array().unwrap();
    assert_eq!(runs.len(), 3);
    // The GPU's launch shapes, where both gradients have buffers of their own.
    let simt = Device::host_with(HostOptions { threads: 2, emulate_gpu: true, ..HostOptions::default() });
    for run in runs {
        fast_devices().iter().chain([&simt]).for_each(|device| check_sampa::<f32>(device, run, 1e-5));
        check_sampa::<f64>(&Device::host(), run, 1e-9);
        check_sampa::<f64>(&simt, run, 1e-9);
    }
}
