//! VGG with batch norm against float64 PyTorch: logits, loss, gradient and a product with the Hessian.

use approx::abs_diff_eq;

use crate::common::fixtures::{check_digest, fill_in_double, hash_vector, hash_weights, number, read_json};
use crate::common::{fast_devices, to_f64, upload};
use polder::device::{Device, Scalar};
use polder::kernels::image::Position;
use polder::nn::{Model, Shortcut};
use polder::objective::{ObjectiveExt, RunningStats};
use polder::plan::{Network, Plan, PlanError, PlanOptions, Shape};
use serde_json::Value;

fn images(batch: usize, height: usize, width: usize) -> Shape {
    Shape { batch, height, width, channels: 3 }
}

/// A network against its reference: logits, loss, gradient and a product with the Hessian. A case with a seed draws the
/// network's random factors.
pub fn check<T: Scalar>(device: &Device, case: &Value, network: Network<'_>, tolerance: f64) {
    let rows = case["rows"].as_array().unwrap();
    let [height, width] = ["height", "width"].map(|key| case[key].as_u64().unwrap() as usize);
    let (graph, logits) = network(images(rows.len(), height, width), 10).unwrap();
    let mut plan = Plan::<T>::new(device, graph, logits, PlanOptions::training()).unwrap();
    let layout = plan.parameters().clone();
    assert_eq!(layout.parameters() as u64, case["parameters"].as_u64().unwrap());
    fill_in_double(&mut plan, rows, case);
    if let Some(seed) = case["seed"].as_u64() {
        let first = case["first"].as_u64().unwrap() as usize;
        plan.draw(seed, Position { first, clock: None }).unwrap();
    }
    let weights = upload::<T>(device, &hash_weights(&layout));
    let direction = upload::<T>(device, &hash_vector(&layout, "direction:"));
    let mut result = device.zeros::<T>(layout.len()).unwrap();
    let (mut loss, mut flag) = (device.poisoned(1).unwrap(), device.zeros(1).unwrap());

    plan.gradient(weights.view(), RunningStats::Keep, result.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    let what = format!("{} in {} on {}", case["model"], T::NAME, device.name());
    let loss = loss.to_vec().unwrap()[0];
    assert!(abs_diff_eq!(loss, number(&case["loss"]), epsilon = tolerance * loss), "{what}: loss {loss}");
    let expected: Vec<f64> =
        case["logits"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap()).map(number).collect();
    let found = to_f64(&plan.logits().unwrap().to_vec().unwrap());
    assert_eq!(found.len(), expected.len());
    let furthest = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(furthest < tolerance, "{what}: a logit is off by {furthest:.1e}");
    let gradient = to_f64(&result.to_vec().unwrap());
    check_digest(&what, &layout, &gradient, case, ["gradient", "grad_norm"], tolerance);

    plan.hessian_vector(weights.view(), direction.view(), result.view_mut(), flag.view_mut()).unwrap();
    let product = to_f64(&result.to_vec().unwrap());
    check_digest(&what, &layout, &product, case, ["product", "product_norm"], tolerance);
    assert_eq!(flag.to_vec().unwrap(), [0]);
}

#[test]
fn vgg11_matches_pytorch_in_float64() {
    let case = read_json("vgg11-bn.json");
    let model = Model::from_name("vgg11-bn", None).unwrap();
    let network = |images, classes| model.trace(images, classes);
    fast_devices().iter().for_each(|device| check::<f32>(device, &case, &network, 1e-4));
    check::<f64>(&Device::host(), &case, &network, 1e-12);
}

#[test]
fn vggs_take_images_that_leave_one_pixel_and_have_no_shortcuts() {
    let model = Model::from_name("vgg11-bn", None).unwrap();
    assert!(model.shortcuts().is_empty());
    assert!(Model::from_name("vgg11-bn", Some(Shortcut::A)).is_err());
    for (height, width) in [(32, 32), (40, 63)] {
        let (graph, logits) = model.trace(images(2, height, width), 7).unwrap();
        assert_eq!(graph.shape(logits), Shape { batch: 2, height: 1, width: 1, channels: 7 });
    }
    for (height, width) in [(31, 32), (32, 64), (28, 28)] {
        let refused = model.trace(images(2, height, width), 7).map(|_| ());
        assert!(matches!(refused, Err(PlanError::Shape { .. })), "{height}x{width}: {refused:?}");
    }
}
