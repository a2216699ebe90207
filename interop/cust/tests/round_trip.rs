//! Memory and streams of cust, used by polder, read back by cust. They need a GPU, or the stand-in for its driver:
//! `run.sh`.

use cust::memory::{AsyncCopyDestination, LockedBuffer};
use cust::prelude::*;
use polder::device::{Error, SliceMut};
use polder::kernels::vector::{self, Reduction};
use polder::objective::{Domain, Objective, Pass};
use polder::optim::{Base, Optimizer, Sam, Settings};
use polder_cust::{adopt, slice, slice_at, slice_mut, slice_mut_at};

/// Not a multiple of four, so that the last elements are handled on their own.
const N: usize = 4099;

fn numbers(start: usize) -> Vec<f32> {
    (0..N).map(|k| ((k * 37 + start * 11) % 101) as f32 / 50.0 - 1.0).collect()
}

/// A context, a stream and the GPU's device.
fn start() -> (Context, Stream, Device) {
    let context = cust::quick_init().unwrap();
    let stream = Stream::new(StreamFlags::DEFAULT, None).unwrap();
    (context, stream, Device::get_device(0).unwrap())
}

/// cust's copies before and after polder's work are on the same stream, and nothing waits between them.
#[test]
fn axpy_and_perturb_work_in_place_on_the_stream() {
    let (_context, stream, gpu) = start();
    let (w, g) = (numbers(1), numbers(2));
    let [w_host, g_host] = [&w, &g].map(|values| LockedBuffer::from_slice(values).unwrap());
    let [mut w_found, mut plus_found] = [0, 1].map(|_| LockedBuffer::new(&0.0f32, N).unwrap());
    let [mut w_gpu, mut g_gpu, mut plus] = [0, 1, 2].map(|_| DeviceBuffer::from_slice(&[0.0f32; N]).unwrap());
    // SAFETY: the stream outlives the device. All work on the buffers is on it, and the host waits for it at the end.
    unsafe {
        let device = adopt(&gpu, &stream).unwrap();
        let (mut reduction, mut norm) = (Reduction::new(&device).unwrap(), device.zeros::<f64>(1).unwrap());
        w_gpu.async_copy_from(&w_host, &stream).unwrap();
        g_gpu.async_copy_from(&g_host, &stream).unwrap();
        vector::axpy(0.5, slice(&device, &g_gpu).unwrap(), slice_mut(&device, &mut w_gpu).unwrap()).unwrap();
        vector::l2_norm(slice(&device, &g_gpu).unwrap(), &mut reduction, norm.view_mut()).unwrap();
        let (from, along) = (slice(&device, &w_gpu).unwrap(), slice(&device, &g_gpu).unwrap());
        let to = slice_mut(&device, &mut plus).unwrap();
        vector::perturb(from, along, norm.view(), 0.1, to, None).unwrap();
        w_gpu.async_copy_to(&mut w_found, &stream).unwrap();
        plus.async_copy_to(&mut plus_found, &stream).unwrap();
        stream.synchronize().unwrap();
    }

    let norm = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    for k in 0..N {
        let expected = f64::from(w[k]) + 0.5 * f64::from(g[k]);
        assert!((f64::from(w_found[k]) - expected).abs() < 1e-6, "w[{k}]: {} {expected}", w_found[k]);
        let expected = expected + 0.1 * f64::from(g[k]) / norm;
        assert!((f64::from(plus_found[k]) - expected).abs() < 1e-6, "plus[{k}]: {} {expected}", plus_found[k]);
        assert_ne!((w_found[k], plus_found[k]), (w[k], 0.0));
    }
}

/// A part of a buffer by its pointer: what lies around it stays.
#[test]
fn pointers_with_a_length() {
    let (_context, stream, gpu) = start();
    let mut y = DeviceBuffer::from_slice(&[1.0f32; 64]).unwrap();
    let x = DeviceBuffer::from_slice(&[2.0f32; 64]).unwrap();
    // SAFETY: as above; the parts lie inside the buffers.
    unsafe {
        let device = adopt(&gpu, &stream).unwrap();
        let to = slice_mut_at(&device, y.as_device_ptr().add(3), 20).unwrap();
        vector::axpy(10.0, slice_at(&device, x.as_device_ptr().add(40), 20).unwrap(), to).unwrap();
        let null = slice_at::<f32>(&device, DevicePointer::null(), 1);
        assert!(matches!(null.err(), Some(Error::Argument { .. })));
        let short =
            vector::axpy(1.0, slice(&device, &x).unwrap(), slice_mut_at(&device, y.as_device_ptr(), 3).unwrap());
        assert!(matches!(short, Err(Error::Length { .. })));
        assert!(slice_mut(&device, &mut y).unwrap().len() == 64);
    }
    stream.synchronize().unwrap();
    let found = y.as_host_vec().unwrap();
    let expected = |k: usize| if (3..23).contains(&k) { 21.0 } else { 1.0 };
    assert!(found.iter().enumerate().all(|(k, y)| *y == expected(k)), "{found:?}");
}

/// ½‖w − target‖², by polder's kernels on memory of cust.
struct Bowl<'a> {
    target: &'a DeviceBuffer<f32>,
}

impl Objective<f32> for Bowl<'_> {
    fn domain(&self) -> Domain<'_> {
        Domain::of_len(N)
    }

    fn pass(&mut self, pass: Pass<'_, f32>) -> polder::device::Result<()> {
        let Pass::Gradient { weights, mut gradient, mut loss, .. } = pass else { return pass.split(self) };
        loss.clear()?;
        gradient.copy_from(weights)?;
        // SAFETY: as above; nobody writes to the target.
        vector::axpy(-1.0, unsafe { slice(weights.device(), self.target) }?, gradient)
    }
}

/// The gradient at `w + ρ (w − target)/‖w − target‖` points at the target too, so the weights come close to it.
#[test]
fn an_optimizer_trains_weights_of_cust() {
    let (_context, stream, gpu) = start();
    let target = DeviceBuffer::from_slice(&numbers(3)).unwrap();
    let mut w = DeviceBuffer::from_slice(&numbers(4)).unwrap();
    // SAFETY: as above.
    unsafe {
        let device = adopt(&gpu, &stream).unwrap();
        let mut optimizer = Optimizer::new(&device, N, Settings::new(Sam::new(0.05), Base::sgd(0.0))).unwrap();
        for _ in 0..8 {
            let weights: SliceMut<'_, f32> = slice_mut(&device, &mut w).unwrap();
            optimizer.step(&mut Bowl { target: &target }, weights, 0.5).unwrap();
        }
        assert_eq!(optimizer.telemetry().unwrap().skipped, 0);
    }
    stream.synchronize().unwrap();
    let (found, target) = (w.as_host_vec().unwrap(), numbers(3));
    let farthest = |w: &[f32]| w.iter().zip(&target).map(|(w, t)| (w - t).abs()).fold(0.0, f32::max);
    assert!(farthest(&numbers(4)) > 0.5);
    assert!(farthest(&found) < 0.02, "{}", farthest(&found));
}
