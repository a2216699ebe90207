//! Branches that are dropped or shaken at random: what the passes of a step and the steps of a run see.

use crate::common::{Random, bits, fast_devices, to_f64, upload, weights};
use crate::generated::settings;
use polder::data::{SyntheticSpec, synthetic};
use polder::device::{Buffer, Device};
use polder::kernels::image::Position;
use polder::nn::PyramidNet;
use polder::objective::{ObjectiveExt, RunningStats};
use polder::plan::{Graph, Plan, PlanError, PlanOptions, Shape, Value};
use polder::train::Training;

const IMAGES: Shape = Shape { batch: 4, height: 8, width: 8, channels: 3 };

/// A block whose branch is dropped with this probability for each sample.
pub fn block(images: Shape, classes: usize, rate: f64) -> Result<(Graph, Value), PlanError> {
    let mut graph = Graph::new(images);
    let x = graph.convolution(graph.input(), "a.weight", 8, 3, 1, 1)?;
    let x = graph.batch_norm(x, "a.bn", None, true)?;
    let branch = graph.convolution(x, "b.weight", 8, 3, 1, 1)?;
    let branch = graph.drop_path(branch, rate)?;
    let x = graph.add(branch, x)?;
    let x = graph.global_average_pool(x)?;
    let logits = graph.linear(x, "fc", classes)?;
    Ok((graph, logits))
}

struct Passes {
    plan: Plan<f32>,
    weights: Buffer<f32>,
}

impl Passes {
    fn new(device: &Device, (graph, logits): (Graph, Value)) -> Self {
        let mut plan = Plan::<f32>::new(device, graph, logits, PlanOptions::training()).unwrap();
        let mut random = Random(3);
        let start = weights(&plan, &mut random);
        let (mut images, mut labels) = plan.batch_mut().unwrap();
        images.write(&random.vector(images.len())).unwrap();
        labels.write(&[0, 1, 2, 1]).unwrap();
        Self { weights: upload(device, &start), plan }
    }

    fn gradient(&mut self) -> Vec<u64> {
        let device = self.plan.device().clone();
        let mut gradient = device.zeros(self.weights.len()).unwrap();
        let (mut loss, mut flag) = (device.zeros(1).unwrap(), device.zeros(1).unwrap());
        let (out, at) = (gradient.view_mut(), self.weights.view());
        self.plan.gradient(at, RunningStats::Keep, out, loss.view_mut(), flag.view_mut()).unwrap();
        [bits(&gradient.to_vec().unwrap()), vec![loss.to_vec().unwrap()[0].to_bits()]].concat()
    }

    fn draw(&mut self, first: usize) {
        self.plan.draw(9, Position { first, clock: None }).unwrap();
    }
}

#[test]
fn passes_see_one_function_until_the_next_draw() {
    for device in fast_devices() {
        let mut dropped = Passes::new(&device, block(IMAGES, 3, 0.5).unwrap());
        let mut whole = Passes::new(&device, block(IMAGES, 3, 0.0).unwrap());
        // Nothing is drawn in evaluation, and a factor of one changes no bit.
        assert_eq!(dropped.gradient(), whole.gradient());
        dropped.draw(0);
        let first = dropped.gradient();
        assert_ne!(first, whole.gradient());
        assert_eq!(dropped.gradient(), first);
        dropped.draw(4);
        assert_ne!(dropped.gradient(), first);
        dropped.draw(0);
        assert_eq!(dropped.gradient(), first);
    }
}

/// A gradient pair, whose passes run at the same time on a GPU, sees the function that single gradients see.
#[test]
fn both_passes_of_a_pair_see_one_function() {
    for device in fast_devices() {
        let mut passes = Passes::new(&device, block(IMAGES, 3, 0.5).unwrap());
        passes.draw(0);
        let single = passes.gradient();
        let len = passes.weights.len();
        let [mut one, mut two] = std::array::from_fn(|_| device.zeros::<f32>(len).unwrap());
        let [mut first_loss, mut second_loss] = std::array::from_fn(|_| device.zeros(1).unwrap());
        let mut flag = device.zeros(1).unwrap();
        let at = passes.weights.view();
        let (gradients, losses) = ([one.view_mut(), two.view_mut()], [first_loss.view_mut(), second_loss.view_mut()]);
        passes.plan.gradient_pair([at, at], gradients, losses, flag.view_mut()).unwrap();
        for gradient in [one, two] {
            assert_eq!(bits(&gradient.to_vec().unwrap()), single[..len]);
        }
    }
}

pub const SHAKEN: PyramidNet = PyramidNet { blocks: 1, alpha: 12, bottleneck: false, shake_drop: Some(0.5) };

/// A run whose steps are recorded and replayed, one that launches each step, and one that is stopped and resumed end
/// with the same bits.
#[test]
fn recorded_and_resumed_steps_draw_what_the_run_would_have_drawn() {
    let network = |images, classes| SHAKEN.trace(images, classes);
    let data = synthetic(&SyntheticSpec { train: 96, test: 32, side: 8, seed: 0 }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let model = |name: &str| std::fs::read(folder.path().join(name).join("model.safetensors")).unwrap();
    let run = |name: &str, steps: u64, log_every: u64| {
        let training = Training::new(settings("sam", steps, log_every)).network("shaken", &network);
        training.dataset(data.clone()).out(folder.path().join(name)).run().unwrap();
    };
    run("replayed", 9, 0);
    run("launched", 9, 1);
    assert!(model("replayed") == model("launched"), "replayed steps have other bits");
    run("resumed", 6, 0);
    assert!(model("resumed") != model("replayed"));
    let resumed = Training::new(settings("sam", 9, 0)).network("shaken", &network).dataset(data.clone());
    resumed.resume(folder.path().join("resumed")).run().unwrap();
    assert!(model("resumed") == model("replayed"), "a resumed run has other bits");
}

/// A product with the Hessian is that of the function that the forward computes: second differences of the loss agree
/// with it, though the gradient is not that function's.
#[test]
fn products_through_shaken_branches_are_those_of_the_forward() {
    let mut graph = Graph::new(IMAGES);
    let x = graph.convolution(graph.input(), "a.weight", 4, 3, 1, 1).unwrap();
    let x = graph.shake_drop(x, 0.01).unwrap();
    let x = graph.convolution(x, "b.weight", 4, 3, 1, 1).unwrap();
    let x = graph.global_average_pool(x).unwrap();
    let logits = graph.linear(x, "fc", 3).unwrap();
    let device = Device::host();
    let mut plan = Plan::<f64>::new(&device, graph, logits, PlanOptions::training()).unwrap();
    plan.draw(9, Position::default()).unwrap();
    let mut random = Random(4);
    let at = weights(&plan, &mut random);
    let (mut images, mut labels) = plan.batch_mut().unwrap();
    images.write(&random.vector(images.len())).unwrap();
    labels.write(&[0, 1, 2, 1]).unwrap();
    let mut along = vec![0.0; at.len()];
    for tensor in plan.parameters().clone().tensors() {
        along[tensor.range()].fill_with(|| random.normal());
    }
    let [mut scratch, mut product] = std::array::from_fn(|_| device.zeros::<f64>(at.len()).unwrap());
    let (mut loss, mut flag) = (device.zeros(1).unwrap(), device.zeros(1).unwrap());
    let mut loss_at = |plan: &mut Plan<f64>, step: f64| {
        let moved: Vec<f64> = at.iter().zip(&along).map(|(w, d)| w + step * d).collect();
        let moved = device.upload(&moved).unwrap();
        plan.loss(moved.view(), scratch.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
        loss.to_vec().unwrap()[0]
    };
    let h = 1e-4;
    let [above, middle, below] = [h, 0.0, -h].map(|step| loss_at(&mut plan, step));
    let (slope, curvature) = ((above - below) / (2.0 * h), (above - 2.0 * middle + below) / (h * h));
    let (w, direction) = (device.upload(&at).unwrap(), device.upload(&along).unwrap());
    let dot = |vector: &Buffer<f64>| -> f64 {
        to_f64(&vector.to_vec().unwrap()).iter().zip(&along).map(|(a, b)| a * b).sum()
    };
    let mut flag = device.zeros(1).unwrap();
    plan.hessian_vector(w.view(), direction.view(), product.view_mut(), flag.view_mut()).unwrap();
    let exact = dot(&product);
    assert!((exact - curvature).abs() < 1e-5 * exact.abs(), "{exact} and {curvature}");
    let mut loss = device.zeros(1).unwrap();
    plan.gradient(w.view(), RunningStats::Keep, product.view_mut(), loss.view_mut(), flag.view_mut()).unwrap();
    assert!((dot(&product) - slope).abs() > 1e-2 * slope.abs(), "the gradient takes the backward's own factors");
}
