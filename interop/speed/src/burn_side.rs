//! burn: its layers, on its `flex` backend.

use burn::module::{Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, PaddingConfig2d};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, ModuleOptimizer, SgdConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};

use crate::{Batch, MOMENTUM, Outcome, RATE, SIZE, Side, Tensors, blocks};

#[derive(Module, Debug)]
struct Block {
    conv1: Conv2d,
    bn1: BatchNorm,
    conv2: Conv2d,
    bn2: BatchNorm,
    stride: usize,
    added: usize,
}

#[derive(Module, Debug)]
struct ResNet {
    conv1: Conv2d,
    bn1: BatchNorm,
    blocks: Vec<Block>,
    head: Linear,
}

fn parameter<const D: usize>(start: &Tensors, name: &str, device: &Device) -> Param<Tensor<D>> {
    let (shape, values) = &start[name];
    Param::from_tensor(Tensor::from_data(TensorData::new(values.clone(), shape.clone()), device))
}

fn convolution(start: &Tensors, name: &str, channels: [usize; 2], stride: usize, device: &Device) -> Conv2d {
    let config = Conv2dConfig::new(channels, [3, 3])
        .with_stride([stride, stride])
        .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
        .with_bias(false);
    Conv2d { weight: parameter(start, &format!("{name}.weight"), device), ..config.init(device) }
}

fn norm(start: &Tensors, name: &str, channels: usize, device: &Device) -> BatchNorm {
    BatchNorm {
        gamma: parameter(start, &format!("{name}.weight"), device),
        beta: parameter(start, &format!("{name}.bias"), device),
        ..BatchNormConfig::new(channels).init(device)
    }
}

impl ResNet {
    fn new(start: &Tensors, device: &Device) -> Self {
        let block = |(name, inputs, width, stride): (String, usize, usize, usize)| Block {
            conv1: convolution(start, &format!("{name}.conv1"), [inputs, width], stride, device),
            bn1: norm(start, &format!("{name}.bn1"), width, device),
            conv2: convolution(start, &format!("{name}.conv2"), [width, width], 1, device),
            bn2: norm(start, &format!("{name}.bn2"), width, device),
            stride,
            added: width - inputs,
        };
        // burn's linear layers hold [inputs, outputs].
        // A parameter may not come from an operation that could be differentiated.
        let weight = parameter::<2>(start, "fc.weight", device).val().transpose().detach();
        let head = Linear { weight: Param::from_tensor(weight), bias: Some(parameter(start, "fc.bias", device)) };
        Self {
            conv1: convolution(start, "conv1", [3, 16], 1, device),
            bn1: norm(start, "bn1", 16, device),
            blocks: blocks().into_iter().map(block).collect(),
            head,
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let mut x = relu(self.bn1.forward(self.conv1.forward(images)));
        for block in &self.blocks {
            let y = relu(block.bn1.forward(block.conv1.forward(x.clone())));
            let y = block.bn2.forward(block.conv2.forward(y));
            if block.stride == 2 {
                // Every second pixel; new channels are zero, half of them before and half after.
                let [batch, _, height, width] = x.dims();
                let device = x.device();
                let even = Tensor::<1, Int>::arange_step(0..height as i64, 2, &device);
                x = x.select(2, even.clone()).select(3, even);
                let zeros = |channels| Tensor::<4>::zeros([batch, channels, height / 2, width / 2], &device);
                x = Tensor::cat(vec![zeros(block.added / 2), x, zeros(block.added - block.added / 2)], 1);
            }
            x = relu(y + x);
        }
        let [batch, channels, ..] = x.dims();
        self.head.forward(x.mean_dim(3).mean_dim(2).reshape([batch, channels]))
    }
}

pub struct Burn {
    network: Option<ResNet>,
    optimizer: ModuleOptimizer,
    criterion: CrossEntropyLoss,
    images: Tensor<4>,
    labels: Tensor<1, Int>,
}

impl Burn {
    pub fn new(batch: &Batch, start: &Tensors) -> Self {
        let device = Device::flex().autodiff();
        let count = batch.labels.len();
        let labels: Vec<i64> = batch.labels.iter().map(|&label| i64::from(label)).collect();
        Self {
            network: Some(ResNet::new(start, &device)),
            optimizer: SgdConfig::new()
                .with_momentum(Some(MomentumConfig { momentum: MOMENTUM, dampening: 0.0, nesterov: false }))
                .init(),
            criterion: CrossEntropyLossConfig::new().init(&device),
            images: Tensor::from_data(TensorData::new(batch.channels_first(), [count, 3, SIZE, SIZE]), &device),
            labels: Tensor::from_data(TensorData::new(labels, [count]), &device),
        }
    }

    fn backward(&self, network: &ResNet) -> (Tensor<1>, Gradients) {
        let loss = self.criterion.forward(network.forward(self.images.clone()), self.labels.clone());
        let gradients = loss.backward();
        (loss, gradients)
    }
}

/// The gradient of a parameter as numbers.
fn slope<const D: usize>(param: &Param<Tensor<D>>, gradients: &Gradients, turned: bool) -> (Vec<usize>, Vec<f32>) {
    let gradient = param.val().grad(gradients).expect("every parameter has a gradient");
    let gradient = if turned { gradient.transpose() } else { gradient };
    (gradient.dims().to_vec(), gradient.to_data().iter::<f32>().collect())
}

impl Side for Burn {
    fn name(&self) -> String {
        "burn 0.22, flex".into()
    }

    fn gradient(&mut self) -> Outcome<(f64, Tensors)> {
        let network = self.network.as_ref().expect("a network between steps");
        let (loss, gradients) = self.backward(network);
        let mut all = Tensors::new();
        let mut insert = |name: String, slope| {
            all.insert(name, slope);
        };
        let mut layer = |name: String, number: &str, conv: &Conv2d, bn: &BatchNorm| {
            insert(format!("{name}conv{number}.weight"), slope(&conv.weight, &gradients, false));
            insert(format!("{name}bn{number}.weight"), slope(&bn.gamma, &gradients, false));
            insert(format!("{name}bn{number}.bias"), slope(&bn.beta, &gradients, false));
        };
        layer(String::new(), "1", &network.conv1, &network.bn1);
        for ((name, ..), block) in blocks().into_iter().zip(&network.blocks) {
            layer(format!("{name}."), "1", &block.conv1, &block.bn1);
            layer(format!("{name}."), "2", &block.conv2, &block.bn2);
        }
        let head = &network.head;
        insert("fc.weight".into(), slope(&head.weight, &gradients, true));
        insert("fc.bias".into(), slope(head.bias.as_ref().expect("a bias"), &gradients, false));
        Ok((f64::from(loss.into_scalar::<f32>()), all))
    }

    fn step(&mut self) -> Outcome<()> {
        let network = self.network.take().expect("a network between steps");
        let (_, gradients) = self.backward(&network);
        let gradients = GradientsParams::from_grads(gradients, &network);
        self.network = Some(self.optimizer.step(RATE, network, gradients));
        Ok(())
    }
}
