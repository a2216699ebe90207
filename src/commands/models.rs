//! `polder models`: the networks that have a name.

use polder::device::Device;
use polder::nn::{MODELS, Model};
use polder::plan::{Plan, PlanOptions, Shape};
use polder::train::TrainError;
use serde_json::json;

use super::{Failure, option, print};

/// What the numbers are for: images as those of CIFAR-10.
const IMAGES: Shape = Shape { batch: 128, height: 32, width: 32, channels: 3 };
const CLASSES: usize = 10;

pub fn run(as_json: bool) -> Result<(), Failure> {
    let mut object = serde_json::Map::new();
    if !as_json {
        let of = format!("{CLASSES} classes, images of {}x{}", IMAGES.height, IMAGES.width);
        print(&format!("{of}: parameters, FLOPs of an image's forward pass, memory of a batch of {}\n", IMAGES.batch))?;
    }
    for model in MODELS {
        let plan_error = |source| TrainError::Plan { data: model.name.into(), source };
        let traced = Model::from_name(model.name, None).map_err(|unknown| option("model", unknown))?;
        let (graph, logits) = traced.trace(IMAGES, CLASSES).map_err(plan_error)?;
        let parameters = graph.parameters().parameters();
        let flops = 2 * graph.multiply_adds() / IMAGES.batch as u64;
        let bytes = Plan::<f32>::arena_bytes_of(&Device::host(), &graph, logits, PlanOptions::training());
        let bytes = bytes.map_err(plan_error)?;
        if as_json {
            let numbers = json!({
                "summary": model.summary, "parameters": parameters, "forward_flops": flops, "activation_bytes": bytes
            });
            object.insert(model.name.into(), numbers);
            continue;
        }
        let [parameters, gigaflops] = [parameters as f64 / 1e6, flops as f64 / 1e9];
        let mebibytes = bytes.div_ceil(1 << 20);
        let numbers = format!("{parameters:>6.2} M {gigaflops:>7.3} GFLOPs {mebibytes:>6} MiB");
        print(&format!("{:<26}{numbers}  {}", model.name, model.summary))?;
    }
    if as_json { print(&json!(object).to_string()) } else { Ok(()) }
}
