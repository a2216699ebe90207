//! A model of your own, trained by the loop: a function from the shape of the images and the number of classes to a
//! graph.
//!
//! `cargo run --release --example own_model`

use polder::data::{SyntheticSpec, synthetic};
use polder::plan::{Graph, PlanError, Shape, Value};
use polder::train::{DataSettings, LoopSettings, RunSettings, SgdSettings, TrainError, Training};

/// Two convolutions with batch norm, the second with stride 2, and a linear layer over the mean of each channel.
fn network(images: Shape, classes: usize) -> Result<(Graph, Value), PlanError> {
    let mut graph = Graph::new(images);
    let mut x = graph.input();
    for (number, (width, stride)) in [(16, 1), (32, 2)].into_iter().enumerate() {
        x = graph.convolution(x, &format!("conv{number}.weight"), width, 3, stride, 1)?;
        x = graph.batch_norm(x, &format!("bn{number}"), None, true)?;
    }
    let x = graph.global_average_pool(x)?;
    let logits = graph.linear(x, "fc", classes)?;
    Ok((graph, logits))
}

fn main() -> Result<(), TrainError> {
    // Ten classes of coloured textures, 16×16 pixels.
    let data = synthetic(&SyntheticSpec { train: 1024, test: 256, side: 16, seed: 0 })?;
    let settings = RunSettings {
        data: DataSettings { batch_size: 32, ..DataSettings::default() },
        sgd: SgdSettings { lr: 0.1, ..SgdSettings::default() },
        run: LoopSettings { epochs: 10, device: "cpu".into(), ..LoopSettings::default() },
        ..RunSettings::default()
    };
    // The method is the settings': SAM with its usual radius.
    let summary = Training::new(settings).network("two-convolutions", &network).dataset(data).run()?;
    let test = summary.test.expect("a run that ended");
    println!("{} steps, test accuracy {:.1} %, loss {:.3}", summary.steps, 100.0 * test.accuracy, test.loss);
    assert_eq!((summary.steps, test.samples), (320, 256));
    assert!(test.accuracy > 0.2, "guessing is right in one of ten cases");
    Ok(())
}
