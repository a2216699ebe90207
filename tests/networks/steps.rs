//! Whole steps of an optimizer on networks: gradients accumulated over parts of a batch, and images that are not
//! finite.

use approx::assert_abs_diff_eq;

use crate::common::{self, Random, assert_close, bits, weights};
use polder::device::{Buffer, Device, Result, Scalar};
use polder::nn::{CifarResNet, Shortcut};
use polder::objective::{Accumulator, Answer, Domain, Objective, ObjectiveExt, Pass, RunningStats, Wrapped, Wrapper};
use polder::optim::{
    Base, CrSam, Gam, Gnr, Gsam, Hvp, LookSam, Method, Norm, Optimizer, Oracle, Plain, RSam, SaSam, Sam, Settings,
};
use polder::plan::{Graph, Plan, PlanOptions, Shape, Value};

/// A plan over some images on the host, a few at a time. `damage` replaces a value of one image in one pass.
struct Images<T: Scalar> {
    plan: Plan<T>,
    pixels: Vec<T>,
    labels: Vec<u32>,
    group: usize,
    passes: usize,
    damage: Option<(usize, f64)>,
}

impl<T: Scalar> Images<T> {
    fn new(device: &Device, (graph, logits): (Graph, Value), count: usize, random: &mut Random) -> Self {
        let plan = Plan::<T>::new(device, graph, logits, PlanOptions::training()).unwrap();
        let Shape { height, width, channels, .. } = plan.input_shape();
        let pixels = random.vector(count * height * width * channels);
        let labels = (0..count).map(|_| random.below(plan.classes()) as u32).collect();
        Self { plan, pixels, labels, group: 0, passes: 0, damage: None }
    }

    fn begin_pass(&mut self) -> Result<()> {
        self.show(self.damage.and_then(|(pass, value)| (pass == self.passes).then_some(value)))?;
        self.passes += 1;
        Ok(())
    }

    fn show(&mut self, damage: Option<f64>) -> Result<()> {
        let batch = self.plan.input_shape().batch;
        let size = self.pixels.len() / self.labels.len();
        let first = self.group * batch;
        let mut shown = self.pixels[first * size..(first + batch) * size].to_vec();
        if let Some(value) = damage {
            let middle = shown.len() / 2;
            shown[middle] = T::from_f64(value);
        }
        let (mut images, mut labels) = self.plan.batch_mut()?;
        images.write(&shown)?;
        labels.write(&self.labels[first..first + batch])
    }
}

impl<T: Scalar> Objective<T> for Images<T> {
    fn domain(&self) -> Domain<'_> {
        Domain { len: self.plan.len(), groups: self.labels.len() / self.plan.input_shape().batch, padding: &[] }
    }

    fn pass(&mut self, pass: Pass<'_, T>) -> Result<()> {
        match pass {
            Pass::Gradient { .. } | Pass::HessianVector { .. } => {
                self.begin_pass()?;
                self.plan.pass(pass)
            }
            Pass::Select { group } => {
                self.group = group;
                Ok(())
            }
            Pass::Commit { .. } | Pass::Abandon => self.plan.pass(pass),
            // Every other pass is taken one gradient or product at a time, each on images of its own.
            other => other.split(self),
        }
    }
}

fn methods<T: Scalar>() -> Vec<Box<dyn Method<T>>> {
    let gnr = |hvp| Gnr { hvp, oracle: Oracle::Sam, ..Gnr::default() };
    vec![
        Box::new(Plain {}),
        Box::new(Sam::new(0.05)),
        Box::new(Sam { p_norm: Norm::Infinity, ..Sam::new(0.01) }),
        Box::new(Sam { ascent_steps: 2, ..Sam::new(0.05) }),
        Box::new(Sam { second_order: true, ..Sam::new(0.05) }),
        Box::new(CrSam::default()),
        Box::new(gnr(Hvp::Exact)),
        Box::new(gnr(Hvp::Difference)),
        Box::new(Gam::default()),
        Box::new(SaSam { eta0: 0.05, ..SaSam::default() }),
        Box::new(Gsam::default()),
        Box::new(LookSam { every: 2, ..LookSam::default() }),
        Box::new(RSam { seed: 3, ..RSam::default() }),
    ]
}

const SGD: Base = Base::Sgd { momentum: 0.9, nesterov: false };

/// A network without batch norm, whose loss over a batch is the mean of those of its parts.
fn plain_network(batch: usize) -> (Graph, Value) {
    let mut graph = Graph::new(Shape { batch, height: 5, width: 6, channels: 2 });
    let x = graph.input();
    let x = graph.convolution(x, "a.weight", 6, 3, 1, 1).unwrap();
    let x = graph.relu(x);
    let x = graph.convolution(x, "b.weight", 5, 3, 2, 1).unwrap();
    let x = graph.relu(x);
    let x = graph.global_average_pool(x).unwrap();
    let logits = graph.linear(x, "fc", 4).unwrap();
    (graph, logits)
}

#[test]
fn accumulated_parts_are_the_whole_batch_in_every_pass() {
    let device = Device::host();
    for index in 0..methods::<f64>().len() {
        let method = || methods::<f64>().swap_remove(index);
        let name = format!("{:?}", method());
        let run = |part: usize| {
            let mut random = Random(17);
            let mut images = Images::<f64>::new(&device, plain_network(part), 12, &mut random);
            let mut parameters = device.upload(&weights(&images.plan, &mut random)).unwrap();
            let mut optimizer = Optimizer::new(&device, parameters.len(), Settings::boxed(method(), SGD)).unwrap();
            let mut accumulator = Accumulator::new(&device, parameters.len(), 12 / part).unwrap();
            let mut losses = Vec::new();
            for _ in 0..3 {
                optimizer.step(&mut accumulator.over(&mut images), parameters.view_mut(), 0.1).unwrap();
                losses.push(optimizer.telemetry().unwrap().loss);
                // Of all parts, at w alone.
                losses.push(f64::from(images.plan.correct().unwrap().to_vec().unwrap()[0]));
            }
            (parameters.to_vec().unwrap(), losses, images.passes)
        };
        let (whole, losses, passes) = run(12);
        for part in [6, 4] {
            let (found, found_losses, found_passes) = run(part);
            assert_eq!(found_passes, passes * 12 / part, "{name}");
            // The tolerance is for rounding, which differences of gradients and of losses magnify.
            assert_close(&format!("{name}, parts of {part}"), &found, &whole, 1e-9);
            assert_close("losses and correct predictions", &found_losses, &losses, 1e-11);
        }
    }
}

#[test]
fn one_part_changes_no_bit_and_parts_can_be_gathered_in_groups() {
    let device = Device::host();
    let shape = |batch| Shape { batch, height: 5, width: 6, channels: 3 };
    let model = CifarResNet { blocks: 1, shortcut: Shortcut::A };
    let network = |batch| model.trace(shape(batch), 4).unwrap();
    // 8 images in groups of 4 for m-sharpness, in one part or, of a network without batch norm, in two.
    let run = |network: (Graph, Value), parts: Option<usize>| {
        let mut random = Random(23);
        let mut images = Images::<f64>::new(&device, network, 8, &mut random);
        let mut parameters = device.upload(&weights(&images.plan, &mut random)).unwrap();
        let settings = Settings::new(Sam::new(0.1), SGD);
        let mut optimizer = Optimizer::new(&device, parameters.len(), settings).unwrap();
        for _ in 0..2 {
            match parts {
                None => optimizer.step(&mut images, parameters.view_mut(), 0.1).unwrap(),
                Some(parts) => {
                    let mut accumulator = Accumulator::new(&device, parameters.len(), parts).unwrap();
                    optimizer.step(&mut accumulator.over(&mut images), parameters.view_mut(), 0.1).unwrap();
                }
            }
        }
        let loss = optimizer.telemetry().unwrap().loss;
        (parameters.to_vec().unwrap(), images.plan.statistics().to_vec().unwrap(), loss)
    };
    let (plain, statistics, loss) = run(network(4), None);
    let (same, same_statistics, same_loss) = run(network(4), Some(1));
    assert_eq!((bits(&same), bits(&same_statistics)), (bits(&plain), bits(&statistics)));
    assert_eq!(same_loss.to_bits(), loss.to_bits());
    let (grouped, _, loss) = run(plain_network(4), None);
    let (found, _, found_loss) = run(plain_network(2), Some(2));
    assert_close("two groups of two parts", &found, &grouped, 1e-12);
    assert_abs_diff_eq!(found_loss, loss, epsilon = 1e-13);
}

#[test]
fn statistics_of_several_parts_follow_one_another() {
    let device = Device::host();
    let shape = Shape { batch: 4, height: 5, width: 6, channels: 3 };
    let network = || CifarResNet { blocks: 1, shortcut: Shortcut::B }.trace(shape, 4).unwrap();
    let statistics = |parts: usize, commit_each: bool| {
        let mut random = Random(29);
        let mut images = Images::<f64>::new(&device, network(), 12, &mut random);
        let parameters = device.upload(&weights(&images.plan, &mut random)).unwrap();
        let mut gradient = device.zeros(parameters.len()).unwrap();
        let (mut loss, mut flag) = (device.zeros(1).unwrap(), device.zeros(1).unwrap());
        let skip = device.zeros(1).unwrap();
        for group in 0..parts {
            images.select(group).unwrap();
            let (loss, flag) = (loss.view_mut(), flag.view_mut());
            images.gradient(parameters.view(), RunningStats::Update, gradient.view_mut(), loss, flag).unwrap();
            if commit_each {
                images.commit(skip.view()).unwrap();
            }
        }
        images.commit(skip.view()).unwrap();
        bits(&images.plan.statistics().to_vec().unwrap())
    };
    assert_eq!(statistics(3, false), statistics(3, true));
    assert!(statistics(0, false) != statistics(1, false) && statistics(1, false) != statistics(3, false));
}

/// Everything that a step changes: weights, momentum, the method's memory, running statistics.
fn all_bits<T: Scalar>(parameters: &Buffer<T>, optimizer: &Optimizer<T>, images: &Images<T>) -> Vec<Vec<u64>> {
    let state = optimizer.state();
    let mut all: Vec<Vec<u64>> = [parameters, &state.momentum, &state.memory, images.plan.statistics()]
        .map(|buffer| bits(&buffer.to_vec().unwrap()))
        .into();
    all.push(bits(&state.scalars.to_vec().unwrap()));
    all
}

#[test]
fn an_image_that_is_not_finite_in_any_pass_skips_the_step() {
    // The CPU, and the GPU where there is one.
    let devices = common::devices().into_iter().filter(|(name, device)| name == "cpu, 2 threads" || !device.is_host());
    for ((device_name, device), method) in
        devices.flat_map(|device| methods().into_iter().map(move |m| (device.clone(), m)))
    {
        skips_damaged_images(&device_name, &device, method);
    }
}

fn skips_damaged_images(device_name: &str, device: &Device, method: Box<dyn Method<f32>>) {
    let name = format!("{device_name}, {method:?}");
    let shape = Shape { batch: 4, height: 6, width: 5, channels: 3 };
    let mut random = Random(31);
    let network = CifarResNet { blocks: 1, shortcut: Shortcut::A }.trace(shape, 4).unwrap();
    let mut images = Images::<f32>::new(device, network, 4, &mut random);
    let start: Vec<f32> = weights(&images.plan, &mut random).iter().map(|&w| w as f32).collect();
    let mut parameters = device.upload(&start).unwrap();
    let mut optimizer = Optimizer::new(device, start.len(), Settings::boxed(method, SGD)).unwrap();
    let mut step = |images: &mut Images<f32>, parameters: &mut Buffer<f32>| {
        images.passes = 0;
        optimizer.step(images, parameters.view_mut(), 0.05).unwrap();
        let skipped = optimizer.telemetry().unwrap().skipped;
        (skipped, all_bits(parameters, &optimizer, images))
    };
    let (_, mut before) = step(&mut images, &mut parameters);
    let mut expected = 0;
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut pass = 0;
        loop {
            images.damage = Some((pass, value));
            let (skipped, after) = step(&mut images, &mut parameters);
            let passes = images.passes;
            if pass >= passes {
                // The step has no pass of this number, so it is not damaged.
                assert_eq!(skipped, expected, "{name}");
                before = after;
                break;
            }
            expected += 1;
            assert_eq!(skipped, expected, "{name}: {value} in pass {pass}");
            assert!(after == before, "{name}: {value} in pass {pass} left a trace");
            pass += 1;
        }
        images.damage = None;
        let (skipped, after) = step(&mut images, &mut parameters);
        assert_eq!(skipped, expected, "{name}");
        assert!(after != before, "{name}: training goes on");
        before = after;
    }
    assert!(parameters.to_vec().unwrap().iter().all(|w| w.is_finite()), "{name}");
}

#[test]
fn accumulators_of_no_part_or_of_too_many_are_refused() {
    let device = Device::host();
    let error = Accumulator::<f32>::new(&device, 8, 0).err().unwrap();
    assert!(error.to_string().contains("0 parts"), "{error}");
    let mut random = Random(37);
    let mut images = Images::<f32>::new(&device, plain_network(4), 8, &mut random);
    let mut parameters = device.zeros(images.len()).unwrap();
    let mut optimizer = Optimizer::new(&device, parameters.len(), Settings::new(Plain {}, SGD)).unwrap();
    let mut accumulator = Accumulator::new(&device, parameters.len(), 3).unwrap();
    let error = optimizer.step(&mut accumulator.over(&mut images), parameters.view_mut(), 0.1).unwrap_err();
    assert!(error.to_string().contains("3 parts of an objective that has 2 groups"), "{error}");
}

#[test]
fn a_step_that_fails_leaves_nothing_for_the_next() {
    // Without an exact product the step ends after its first pass.
    struct NoProduct<'a>(&'a mut Images<f32>);
    impl Wrapper<f32> for NoProduct<'_> {
        fn inner(&self) -> &dyn Objective<f32> {
            self.0
        }
        fn inner_mut(&mut self) -> &mut dyn Objective<f32> {
            self.0
        }
        fn answer<'p>(&mut self, pass: Pass<'p, f32>) -> Result<Answer<'p, f32>> {
            Ok(match pass {
                Pass::HessianVector { .. } => Answer::Split(pass),
                other => Answer::Forward(other),
            })
        }
    }
    let device = Device::host();
    let shape = Shape { batch: 4, height: 6, width: 5, channels: 3 };
    let run = |failed: bool| {
        let mut random = Random(43);
        let network = CifarResNet { blocks: 1, shortcut: Shortcut::A }.trace(shape, 4).unwrap();
        let mut images = Images::<f32>::new(&device, network, 4, &mut random);
        let start: Vec<f32> = weights(&images.plan, &mut random).iter().map(|&w| w as f32).collect();
        let mut parameters = device.upload(&start).unwrap();
        if failed {
            let settings = Settings::new(Gnr { hvp: Hvp::Exact, ..Gnr::default() }, SGD);
            let mut optimizer = Optimizer::new(&device, start.len(), settings).unwrap();
            let error = optimizer.step(&mut Wrapped(NoProduct(&mut images)), parameters.view_mut(), 0.1).unwrap_err();
            assert!(error.to_string().contains("no exact product"), "{error}");
        }
        let mut optimizer = Optimizer::new(&device, start.len(), Settings::new(Sam::new(0.1), SGD)).unwrap();
        optimizer.step(&mut images, parameters.view_mut(), 0.1).unwrap();
        (all_bits(&parameters, &optimizer, &images), images.plan.correct().unwrap().to_vec().unwrap())
    };
    assert!(run(true) == run(false));
}
