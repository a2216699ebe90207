//! candle: its layers, on its CPU device.

use std::collections::BTreeMap;

use candle_core::{D, Device, Tensor, Var};
use candle_nn::{BatchNorm, Conv2d, Conv2dConfig, Linear, Module, ModuleT, Optimizer, SGD};

use crate::{Batch, Outcome, RATE, SIZE, Side, Tensors, blocks};

struct Block {
    convolutions: [Conv2d; 2],
    norms: [BatchNorm; 2],
    stride: usize,
    /// Channels that the shortcut adds.
    added: usize,
}

pub struct Candle {
    variables: BTreeMap<String, Var>,
    stem: (Conv2d, BatchNorm),
    blocks: Vec<Block>,
    head: Linear,
    optimizer: SGD,
    images: Tensor,
    labels: Tensor,
}

impl Candle {
    pub fn new(batch: &Batch, start: &Tensors) -> Outcome<Self> {
        let device = Device::Cpu;
        let mut variables = BTreeMap::new();
        for (name, (shape, values)) in start {
            variables.insert(name.clone(), Var::from_slice(values, shape.as_slice(), &device)?);
        }
        let tensor = |name: String| variables[&name].as_tensor().clone();
        let convolution = |name: String, stride: usize| {
            Conv2d::new(tensor(name), None, Conv2dConfig { padding: 1, stride, ..Conv2dConfig::default() })
        };
        let norm = |name: String, channels: usize| {
            let (mean, variance) = (
                Tensor::zeros(channels, candle_core::DType::F32, &device)?,
                Tensor::ones(channels, candle_core::DType::F32, &device)?,
            );
            BatchNorm::new(
                channels,
                mean,
                variance,
                tensor(format!("{name}.weight")),
                tensor(format!("{name}.bias")),
                1e-5,
            )
        };
        let mut made = Vec::new();
        for (name, inputs, width, stride) in blocks() {
            made.push(Block {
                convolutions: [
                    convolution(format!("{name}.conv1.weight"), stride),
                    convolution(format!("{name}.conv2.weight"), 1),
                ],
                norms: [norm(format!("{name}.bn1"), width)?, norm(format!("{name}.bn2"), width)?],
                stride,
                added: width - inputs,
            });
        }
        let stem = (convolution("conv1.weight".into(), 1), norm("bn1".into(), 16)?);
        let head = Linear::new(tensor("fc.weight".into()), Some(tensor("fc.bias".into())));
        let optimizer = SGD::new(variables.values().cloned().collect(), RATE)?;
        let count = batch.labels.len();
        let images = Tensor::from_vec(batch.channels_first(), (count, 3, SIZE, SIZE), &device)?;
        let labels = Tensor::from_vec(batch.labels.clone(), count, &device)?;
        Ok(Self { variables, stem, blocks: made, head, optimizer, images, labels })
    }

    fn loss(&self) -> candle_core::Result<Tensor> {
        let mut x = self.stem.1.forward_t(&self.stem.0.forward(&self.images)?, true)?.relu()?;
        for block in &self.blocks {
            let y = block.norms[0].forward_t(&block.convolutions[0].forward(&x)?, true)?.relu()?;
            let y = block.norms[1].forward_t(&block.convolutions[1].forward(&y)?, true)?;
            if block.stride == 2 {
                // Every second pixel; new channels are zero, half of them before and half after.
                let even = Tensor::arange_step(0u32, x.dim(2)? as u32, 2, x.device())?;
                x = x.index_select(&even, 2)?.index_select(&even, 3)?;
                x = x.pad_with_zeros(1, block.added / 2, block.added - block.added / 2)?;
            }
            x = (y + x)?.relu()?;
        }
        let logits = self.head.forward(&x.mean(D::Minus1)?.mean(D::Minus1)?)?;
        candle_nn::loss::cross_entropy(&logits, &self.labels)
    }
}

impl Side for Candle {
    fn name(&self) -> String {
        if cfg!(feature = "mkl") { "candle 0.11 with MKL" } else { "candle 0.11" }.into()
    }

    fn gradient(&mut self) -> Outcome<(f64, Tensors)> {
        let loss = self.loss()?;
        let gradients = loss.backward()?;
        let mut all = Tensors::new();
        for (name, variable) in &self.variables {
            let gradient = gradients.get(variable).ok_or_else(|| format!("no gradient of {name}"))?;
            all.insert(name.clone(), (gradient.dims().to_vec(), gradient.flatten_all()?.to_vec1()?));
        }
        Ok((f64::from(loss.to_scalar::<f32>()?), all))
    }

    fn step(&mut self) -> Outcome<()> {
        let loss = self.loss()?;
        Ok(self.optimizer.backward_step(&loss)?)
    }
}
