//! polder: the plan of a ResNet-20, and a recorded step.

use polder::arena::Layout;
use polder::device::{Buffer, Device, RecordedGraph};
use polder::nn::{Model, initial_weights};
use polder::objective::{ObjectiveExt, RunningStats};
use polder::optim::{Base, Optimizer, Plain, Settings};
use polder::plan::{Plan, PlanOptions, Shape};

use crate::{Batch, CLASSES, MOMENTUM, Outcome, RATE, SIZE, Side, Tensors};

pub struct Polder {
    device: Device,
    plan: Plan<f32>,
    weights: Buffer<f32>,
    optimizer: Optimizer<f32>,
    recorded: Option<RecordedGraph>,
}

fn tensors(layout: &Layout, vector: &[f32]) -> Tensors {
    let one = |tensor: &polder::arena::Tensor| {
        let values = tensor.kind.to_file(&vector[tensor.range()]);
        (tensor.name.clone(), (tensor.kind.file_shape(), values))
    };
    layout.tensors().iter().map(one).collect()
}

impl Polder {
    /// With the weights that it begins with.
    pub fn new(batch: &Batch) -> Outcome<(Self, Tensors)> {
        let device = Device::host();
        let shape = Shape { batch: batch.labels.len(), height: SIZE, width: SIZE, channels: 3 };
        let (graph, logits) = Model::from_name("resnet20", None)?.trace(shape, CLASSES)?;
        let mut plan = Plan::<f32>::new(&device, graph, logits, PlanOptions::training())?;
        let (mut images, mut labels) = plan.batch_mut()?;
        images.write(&batch.images)?;
        labels.write(&batch.labels)?;
        let start = initial_weights(plan.parameters(), 0)?;
        let named = tensors(plan.parameters(), &start);
        let base = Base::Sgd { momentum: MOMENTUM, nesterov: false };
        let settings = Settings { decay_len: start.len(), ..Settings::boxed(Box::new(Plain {}), base) };
        let optimizer = Optimizer::new(&device, start.len(), settings)?;
        let weights = device.upload(&start)?;
        Ok((Self { device, plan, weights, optimizer, recorded: None }, named))
    }
}

impl Side for Polder {
    fn name(&self) -> String {
        "polder".into()
    }

    fn gradient(&mut self) -> Outcome<(f64, Tensors)> {
        let len = self.weights.len();
        let (mut gradient, mut loss) = (self.device.zeros(len)?, self.device.zeros(1)?);
        let mut flag = self.device.zeros(1)?;
        let (g, l) = (gradient.view_mut(), loss.view_mut());
        self.plan.gradient(self.weights.view(), RunningStats::Keep, g, l, flag.view_mut())?;
        Ok((loss.to_vec()?[0], tensors(self.plan.parameters(), &gradient.to_vec()?)))
    }

    fn step(&mut self) -> Outcome<()> {
        if let Some(graph) = &self.recorded {
            return Ok(graph.replay()?);
        }
        let mut step = || self.optimizer.step(&mut self.plan, self.weights.view_mut(), RATE);
        step()?;
        self.recorded = Some(self.device.capture(step)?);
        Ok(())
    }
}
