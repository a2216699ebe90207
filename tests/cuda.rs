//! Behaviour of GPUs only. The tests use `cuda:0` and are skipped if there is none, unless `POLDER_TEST_DEVICE` names a
//! GPU: then its absence is a failure. `device.rs` has the behaviour that all devices share.

use std::sync::Arc;

use polder::device::{Device, Error, Slice, SliceMut, available};
use polder::kernels::vector::fill;

/// `cuda:0`, or `None` if it may be absent.
fn gpu() -> Option<Device> {
    match Device::cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let wanted = std::env::var("POLDER_TEST_DEVICE").is_ok_and(|name| name.starts_with("cuda"));
            assert!(!wanted, "POLDER_TEST_DEVICE asks for a GPU, but: {error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Without a driver, without a GPU or without nvcc at build time, nothing panics, and one line gives the reason.
#[test]
fn absence_is_an_error_and_auto_falls_back() {
    match Device::cuda(0) {
        Ok(device) => {
            assert_eq!(device.name(), "cuda:0");
            assert!(!device.is_host());
            assert_eq!(Device::from_name("auto").unwrap().name(), "cuda:0");
            assert!(available().iter().any(|(name, description)| name == "cuda:0" && description.is_ok()));
        }
        Err(Error::Unavailable { device, reason }) => {
            assert_eq!(device, "cuda:0");
            assert!(!reason.is_empty() && !reason.contains('\n'), "{reason:?}");
            assert!(Device::from_name("cuda").is_err());
            assert!(Device::from_name("auto").unwrap().is_host());
            let devices = available();
            assert!(devices.iter().any(|(name, why)| name.starts_with("cuda") && why.is_err()), "{devices:?}");
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_number_without_a_gpu_is_an_error() {
    for ordinal in [4096, usize::MAX] {
        let Err(Error::Unavailable { device, reason }) = Device::cuda(ordinal) else { panic!("cuda:{ordinal} exists") };
        assert_eq!(device, format!("cuda:{ordinal}"));
        assert!(!reason.is_empty() && !reason.contains('\n'), "{reason:?}");
    }
}

#[test]
fn the_description_names_the_chip_and_its_limits() {
    let Some(device) = gpu() else { return };
    let description = device.description();
    println!("{description}");
    for part in ["GiB", "multiprocessors", "compute capability", "driver for CUDA"] {
        assert!(description.contains(part), "{description}");
    }
}

#[test]
fn double_precision_is_refused() {
    let Some(device) = gpu() else { return };
    let mut doubles = device.upload(&[1.0f64, 2.0]).unwrap();
    match fill(doubles.view_mut(), 3.0) {
        Err(Error::Launch { kernel, message }) => {
            assert_eq!(kernel, "fill_f64");
            assert_eq!(message, "exists on the CPU only (double precision)");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(doubles.to_vec().unwrap(), [1.0, 2.0]);
}

#[test]
fn running_out_of_memory_is_an_error_and_leaves_the_device_usable() {
    let Some(device) = gpu() else { return };
    let bytes = 1usize << 45;
    let refused = device.zeros::<u8>(bytes).map(|_| ()).unwrap_err();
    assert_eq!(refused, Error::OutOfMemory { device: "cuda:0".into(), bytes });
    assert_eq!(device.upload(&[1u8, 2]).unwrap().to_vec().unwrap(), [1, 2]);
}

/// Freed memory is reused by the next buffer while the GPU may still be working on the old contents.
#[test]
fn memory_is_reused_in_order() {
    let Some(device) = gpu() else { return };
    let len = 1_000_003;
    let mut results = device.poisoned::<f32>(50).unwrap();
    for number in 0..50 {
        let mut buffer = device.poisoned::<f32>(len).unwrap();
        for _ in 0..5 {
            fill(buffer.view_mut(), number as f64).unwrap();
        }
        let mut result = results.slice_mut(number..number + 1).unwrap();
        result.copy_from(buffer.slice(len - 1..len).unwrap()).unwrap();
    }
    assert_eq!(results.to_vec().unwrap(), (0..50).map(|number| number as f32).collect::<Vec<_>>());
}

/// The driver uses the context of the calling thread: a device made on one thread works on others.
#[test]
fn threads_share_a_device() {
    let Some(device) = gpu() else { return };
    let threads: Vec<_> = (0..4u32)
        .map(|thread| {
            let device = device.clone();
            std::thread::spawn(move || {
                for round in 0..20 {
                    let values: Vec<u32> = (0..200_000).map(|index| index * 4 + thread + round).collect();
                    let mut copy = device.poisoned::<u32>(values.len()).unwrap();
                    copy.copy_from(&device.upload(&values).unwrap()).unwrap();
                    assert!(copy.to_vec().unwrap() == values, "thread {thread}, round {round}");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_buffer_keeps_its_device_alive() {
    let Some(device) = gpu() else { return };
    let device = Arc::new(device);
    let buffer = device.upload(&[1.5f32, -2.5]).unwrap();
    drop(device);
    assert_eq!(buffer.to_vec().unwrap(), [1.5, -2.5]);
}

/// Work of another library on its stream, ours, and again that library's, in this order without waiting.
#[test]
fn a_stream_and_memory_of_another_library_are_borrowed() {
    use cudarc::driver::{CudaContext, result};
    const N: usize = 1000;
    if gpu().is_none() {
        return;
    }
    let context = CudaContext::new(0).unwrap();
    let own = context.new_stream().unwrap();
    for stream in [own, context.default_stream()] {
        let raw = stream.cu_stream();
        // SAFETY: the stream is alive to the end of the test.
        let device = unsafe { Device::adopt(0, raw.cast()) }.unwrap();
        // SAFETY: the memory is used in the order of the stream that it is allocated on, and freed last.
        let address = unsafe { result::malloc_async(raw, 4 * N) }.unwrap();
        // SAFETY: as above.
        unsafe { result::memset_d8_async(address, 0xFF, 4 * N, raw) }.unwrap();
        // SAFETY: `N` floats, which nobody else uses but in the order of the stream. The first is left out.
        let mut values = unsafe { SliceMut::<f32>::from_raw(&device, address + 4, N - 1) }.unwrap();
        fill(values.reborrow(), 1.5).unwrap();
        fill(values.slice_mut(2..5).unwrap(), -2.0).unwrap();
        // SAFETY: as above.
        unsafe { result::memset_d8_async(address + 8, 0, 4, raw) }.unwrap();
        let mut expected = vec![1.5; N - 1];
        expected[1..5].copy_from_slice(&[0.0, -2.0, -2.0, -2.0]);
        assert_eq!(values.view().to_vec().unwrap(), expected);
        // SAFETY: as above.
        let all = unsafe { Slice::<u32>::from_raw(&device, address, N) }.unwrap();
        assert_eq!(all.slice(0..1).unwrap().to_vec().unwrap(), [u32::MAX]);
        // What was lent outlives the device.
        drop(device);
        assert!(context.is_event_tracking());
        // SAFETY: freed once, after its last use.
        unsafe { result::free_async(address, raw) }.unwrap();
        stream.synchronize().unwrap();
    }
}

#[test]
fn two_handles_of_one_gpu_are_two_devices() {
    let (Some(one), Some(other)) = (gpu(), gpu()) else { return };
    assert!(one != other);
    let theirs = other.upload(&[1u8]).unwrap();
    let mut ours = one.upload(&[2u8]).unwrap();
    assert!(matches!(ours.copy_from(&theirs), Err(Error::OtherDevice { .. })));
    let (start, end) = (one.event().unwrap(), Device::host().event().unwrap());
    assert!(matches!(end.elapsed_since(&start), Err(Error::OtherDevice { .. })));
}
