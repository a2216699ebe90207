//! What augmentation costs: the time to assemble a batch of 128 images of 32×32 pixels, and its share of a step of SGD
//! and of SAM on a ResNet-8.
//!
//! `cargo bench --bench augment`; on the CPU and on the first GPU if there is one, or on the device that
//! `POLDER_TEST_DEVICE` names. Of each time the least of 40 counts, measured in turns, so that other load matters
//! little.

mod common;

use std::time::Instant;

use polder::device::{Device, Result};
use polder::kernels::augment::{Augmentation, Augmenter, Jitter, Policy};
use polder::kernels::image::{self, Augment, BatchShape, Normalization, Position};
use polder::kernels::mixing::{MixedLabels, Mixer, Mixing};
use polder::nn::{Model, initial_weights};
use polder::optim::{Base, Method, Optimizer, Plain, Sam, Settings};
use polder::plan::{Plan, PlanOptions, Shape};

const BATCH: usize = 128;
const SAMPLES: usize = 2048;
const ROUNDS: usize = 40;

type Work = Box<dyn FnMut() -> Result<()>>;

/// The assembly of a batch in one pass, and its mixture if one is wanted.
fn in_one_pass(device: &Device, augment: Augment, mixing: Option<Mixing>) -> Result<Work> {
    let shape = BatchShape { batch: BATCH, height: 32, width: 32, channels: 3 };
    let pixels: Vec<u8> = (0..SAMPLES * 3072).map(|e| (e * 7919 % 251) as u8).collect();
    let (pixels, labels) = (device.upload(&pixels)?, device.upload(&vec![3u32; SAMPLES])?);
    let order = device.upload(&(0..BATCH as u32).map(|n| n * 13 % SAMPLES as u32).collect::<Vec<u32>>())?;
    let (mut out, mut truth) = (device.zeros::<f32>(BATCH * 3072)?, device.zeros::<u32>(BATCH)?);
    let (mut others, mut share) = (device.zeros::<u32>(BATCH)?, device.zeros::<f64>(1)?);
    let mixer = mixing.map(|mixing| Mixer::new(device, mixing)).transpose()?;
    let device = device.clone();
    Ok(Box::new(move || {
        let (views, into) = ((pixels.view(), labels.view(), order.view()), (out.view_mut(), truth.view_mut()));
        let (normalization, start) = (NORMALIZATION, Position::default());
        image::batch(&shape, views.0, views.1, views.2, start, &normalization, Some(augment), into.0, into.1)?;
        if let Some(mixer) = &mixer {
            let mut mixed = MixedLabels { others: others.view_mut(), share: share.view_mut() };
            mixer.run(&shape, start, out.view_mut(), truth.view(), &mut mixed)?;
        }
        device.synchronize()
    }))
}

/// The assembly of a batch with operations on whole images.
fn of_whole_images(device: &Device, wanted: Augmentation) -> Result<Work> {
    let shape = BatchShape { batch: BATCH, height: 32, width: 32, channels: 3 };
    let pixels: Vec<u8> = (0..SAMPLES * 3072).map(|e| (e * 7919 % 251) as u8).collect();
    let (pixels, labels) = (device.upload(&pixels)?, device.upload(&vec![3u32; SAMPLES])?);
    let order = device.upload(&(0..BATCH as u32).map(|n| n * 13 % SAMPLES as u32).collect::<Vec<u32>>())?;
    let (mut out, mut truth) = (device.zeros::<f32>(BATCH * 3072)?, device.zeros::<u32>(BATCH)?);
    let mut augmenter = Augmenter::new(device, shape, wanted)?;
    let device = device.clone();
    Ok(Box::new(move || {
        let (views, into) = ((pixels.view(), labels.view(), order.view()), (out.view_mut(), truth.view_mut()));
        augmenter.run(views.0, views.1, views.2, Position::default(), &NORMALIZATION, into.0, into.1)?;
        device.synchronize()
    }))
}

const NORMALIZATION: Normalization =
    Normalization { mean: [0.4914, 0.4822, 0.4465, 0.0], std: [0.247, 0.2435, 0.2616, 1.0] };

/// A step of a method on a ResNet-8. The images are zeros: the time does not depend on them.
fn step(device: &Device, method: Box<dyn Method<f32>>) -> Result<Work> {
    let shape = Shape { batch: BATCH, height: 32, width: 32, channels: 3 };
    let (graph, logits) = Model::from_name("resnet8", None).expect("a known model").trace(shape, 10).expect("a model");
    let mut plan = Plan::<f32>::new(device, graph, logits, PlanOptions::training()).expect("memory");
    let len = plan.parameters().len();
    let mut weights = device.upload(&initial_weights(plan.parameters(), 0).expect("memory"))?;
    let settings = Settings { decay_len: len, ..Settings::boxed(method, Base::sgd(0.9)) };
    let mut optimizer = Optimizer::new(device, len, settings)?;
    let device = device.clone();
    Ok(Box::new(move || {
        optimizer.step(&mut plan, weights.view_mut(), 0.01)?;
        device.synchronize()
    }))
}

fn main() -> Result<()> {
    for device in common::devices()? {
        let basic = Augment { pad: 4, flip: true, seed: 1, ..Augment::default() };
        let mixing = Mixing { mixup: None, cutmix: None, seed: 1, counter: 0 };
        let whole = |change: fn(&mut Augmentation)| {
            let mut wanted = Augmentation { basic, ..Augmentation::default() };
            change(&mut wanted);
            of_whole_images(&device, wanted)
        };
        let works: Vec<(&str, Work)> = vec![
            ("step of SGD", step(&device, Box::new(Plain {}))?),
            ("step of SAM", step(&device, Box::new(Sam::new(0.05)))?),
            ("no augmentation", in_one_pass(&device, Augment::default(), None)?),
            ("flips and crops", in_one_pass(&device, basic, None)?),
            ("and Cutout", in_one_pass(&device, Augment { cutout: 16, ..basic }, None)?),
            ("and erasing", in_one_pass(&device, Augment { erasing: 1.0, ..basic }, None)?),
            ("and mixup", in_one_pass(&device, basic, Some(Mixing { mixup: Some(0.2), ..mixing }))?),
            ("and CutMix", in_one_pass(&device, basic, Some(Mixing { cutmix: Some(1.0), ..mixing }))?),
            ("resized crops", whole(|wanted| wanted.resized_crop = Some(0.08))?),
            (
                "jitter without hue",
                whole(|wanted| {
                    wanted.jitter = Jitter { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.0 };
                })?,
            ),
            (
                "jitter",
                whole(|wanted| {
                    wanted.jitter = Jitter { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1 };
                })?,
            ),
            ("AutoAugment", whole(|wanted| wanted.policy = Some(Policy::auto_augment_cifar10(32, 32)))?),
            ("RandAugment 2,9", whole(|wanted| wanted.policy = Policy::rand_augment(32, 32, 2, 9).ok())?),
        ];
        measure(&device, works)?;
    }
    Ok(())
}

fn measure(device: &Device, mut works: Vec<(&str, Work)>) -> Result<()> {
    let mut least = vec![f64::INFINITY; works.len()];
    for _ in 0..ROUNDS {
        for ((_, work), least) in works.iter_mut().zip(&mut least) {
            let begin = Instant::now();
            work()?;
            *least = least.min(begin.elapsed().as_secs_f64());
        }
    }
    println!("{}: {BATCH} images of 32x32, beyond flips and crops", device.name());
    println!("{:<20} {:>10} {:>12} {:>12}", "", "ms", "of SGD, %", "of SAM, %");
    for ((name, _), time) in works.iter().zip(&least) {
        // The steps above have no assembly of a batch.
        let [sgd, sam] = [0, 1].map(|place| 100.0 * (time - least[3]) / (least[place] + least[3]));
        println!("{name:<20} {:>10.3} {sgd:>12.2} {sam:>12.2}", 1e3 * time);
    }
    Ok(())
}
