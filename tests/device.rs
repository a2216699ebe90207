//! Behaviour that all devices share: memory, views, copies, events and graphs, on the CPU and on the GPU that
//! `POLDER_TEST_DEVICE` names.

mod common;

use common::{Random, devices};
use polder::device::{Buffer, Device, Error, Result, Slice, SliceMut, ThreadPool, available};
use polder::kernels::vector::{self, Reduction, fill};

/// Runs `test` on every device, and prints the device on which it failed.
fn on_every_device(test: impl Fn(&Device)) {
    for (name, device) in devices() {
        eprintln!("device: {name}");
        test(&device);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn uploads_come_back_whole() {
    // The parts of the GPU's staging memory meet at 4 MiB and 8 MiB.
    const MIB: usize = 1 << 20;
    let sizes = [0, 1, 3, 63, 64, 65, 1_000_003, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 8 * MIB + 7, 13 * MIB + 5];
    on_every_device(|device| {
        let mut random = Random(1);
        for size in sizes {
            let bytes: Vec<u8> = (0..size).map(|_| random.bits() as u8).collect();
            let buffer = device.upload(&bytes).unwrap();
            assert_eq!(buffer.len(), size);
            assert!(buffer.to_vec().unwrap() == bytes, "{size} bytes came back changed");
        }
        let values: Vec<f32> = random.vector(1_234_567);
        assert_eq!(bits(&device.upload(&values).unwrap().to_vec().unwrap()), bits(&values));
    });
}

#[test]
fn new_memory_is_zero_or_poisoned() {
    on_every_device(|device| {
        for len in [0, 1, 31, 100_001] {
            assert!(device.zeros::<u64>(len).unwrap().to_vec().unwrap().iter().all(|&word| word == 0));
            let poisoned = device.poisoned::<f32>(len).unwrap().to_vec().unwrap();
            assert!(poisoned.iter().all(|value| value.is_nan()), "{len} elements: not all are NaN");
        }
    });
}

#[test]
fn a_source_is_free_when_write_returns() {
    on_every_device(|device| {
        let (steps, len) = (40, 300_001);
        let mut history = device.poisoned::<u32>(steps * len).unwrap();
        let mut buffer = device.poisoned::<u32>(len).unwrap();
        let mut source = vec![0u32; len];
        for step in 0..steps {
            for (index, value) in source.iter_mut().enumerate() {
                *value = (step * 1_000_003 + index * 7) as u32;
            }
            buffer.write(&source).unwrap();
            source.fill(u32::MAX);
            let mut part = history.slice_mut(step * len..(step + 1) * len).unwrap();
            part.copy_from(buffer.view()).unwrap();
        }
        for (step, part) in history.to_vec().unwrap().chunks(len).enumerate() {
            let wrong = part.iter().enumerate().position(|(i, &value)| value != (step * 1_000_003 + i * 7) as u32);
            assert_eq!(wrong, None, "step {step}");
        }
    });
}

#[test]
fn many_small_writes_arrive_in_order() {
    on_every_device(|device| {
        // More than the GPU's staging memory holds, so that it is reused.
        let (cells, writes) = (257, 150_000);
        let mut buffer = device.poisoned::<u32>(cells).unwrap();
        let mut expected = vec![u32::MAX; cells];
        for number in 0..writes {
            let cell = number * 31 % cells;
            expected[cell] = number as u32;
            buffer.slice_mut(cell..cell + 1).unwrap().write(&[number as u32]).unwrap();
        }
        assert_eq!(buffer.to_vec().unwrap(), expected);
    });
}

#[test]
fn a_kernel_fills_its_part_alone() {
    on_every_device(|device| {
        for (len, start, end) in [(1, 0, 1), (7, 2, 5), (1031, 1, 1030), (70_001, 333, 69_998), (5, 3, 3)] {
            let mut buffer = device.poisoned::<f32>(len).unwrap();
            fill(buffer.slice_mut(start..end).unwrap(), 2.5).unwrap();
            for (index, value) in buffer.to_vec().unwrap().into_iter().enumerate() {
                if (start..end).contains(&index) {
                    assert_eq!(value, 2.5, "element {index} of {start}..{end}");
                } else {
                    assert!(value.is_nan(), "element {index}, outside {start}..{end}, is {value}");
                }
            }
        }
    });
}

#[test]
fn copy_and_clear_touch_their_part_alone() {
    on_every_device(|device| {
        let values: Vec<u16> = (1..=1001).collect();
        let source = device.upload(&values).unwrap();
        let mut target = device.poisoned::<u16>(1001).unwrap();
        let mut part = target.slice_mut(5..105).unwrap();
        part.copy_from(source.slice(400..500).unwrap()).unwrap();
        target.slice_mut(50..53).unwrap().clear().unwrap();
        let mut expected = vec![u16::MAX; 1001];
        expected[5..105].copy_from_slice(&values[400..500]);
        expected[50..53].fill(0);
        assert_eq!(target.to_vec().unwrap(), expected);

        target.copy_from(&source).unwrap();
        assert_eq!(target.to_vec().unwrap(), values);
        target.clear().unwrap();
        assert_eq!(target.to_vec().unwrap(), vec![0; 1001]);
    });
}

#[test]
fn lengths_and_ranges_are_checked() {
    on_every_device(|device| {
        let mut buffer = device.upload(&[1.0f32, 2.0, 3.0]).unwrap();
        let length = |found| Error::Length { operation: "SliceMut::write", argument: "values", found, expected: 3 };
        assert_eq!(buffer.write(&[1.0, 2.0]).unwrap_err(), length(2));
        assert_eq!(buffer.write(&[0.0; 4]).unwrap_err(), length(4));
        assert!(matches!(buffer.read(&mut [0.0; 2]), Err(Error::Length { found: 2, expected: 3, .. })));
        let longer = device.zeros::<f32>(4).unwrap();
        assert!(matches!(buffer.copy_from(&longer), Err(Error::Length { found: 4, expected: 3, .. })));

        assert!(buffer.slice(1..4).is_err());
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 2..1;
        assert!(matches!(buffer.slice(reversed).map(|_| ()), Err(Error::Range { start: 2, end: 1, .. })));
        assert!(buffer.slice_mut(3..4).is_err());
        assert!(buffer.view_mut().slice_mut(0..4).is_err());
        // A part of a part counts from the outer part's beginning and may not end beyond it.
        let part = buffer.slice(1..3).unwrap();
        assert_eq!(part.slice(1..2).unwrap().to_vec().unwrap(), [3.0]);
        assert!(part.slice(1..3).is_err());
        assert_eq!(buffer.to_vec().unwrap(), [1.0, 2.0, 3.0], "a refused call changed the buffer");
    });
}

#[test]
fn disjoint_parts_are_kept_apart() {
    on_every_device(|device| {
        let mut buffer = device.upload(&[0u32, 1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
        {
            let mut parts = buffer.disjoint();
            let source = parts.read(0..4).unwrap();
            let again = parts.read(2..6).unwrap();
            let mut target = parts.write(6..10).unwrap();
            for overlap in [3..7, 6..10, 9..10, 0..10] {
                assert!(parts.read(overlap.clone()).is_err(), "{overlap:?} overlaps what is written");
                assert!(parts.write(overlap.clone()).is_err(), "{overlap:?} overlaps what is written");
            }
            assert!(parts.write(5..6).is_err(), "overlaps what is read");
            assert!(parts.read(9..11).is_err(), "ends outside");
            assert!(parts.write(6..6).is_ok(), "an empty part overlaps nothing");
            target.copy_from(source).unwrap();
            assert_eq!(again.to_vec().unwrap(), [2, 3, 4, 5]);
        }
        assert_eq!(buffer.to_vec().unwrap(), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]);

        let mut parts = buffer.disjoint();
        for _ in 0..polder::device::Disjoint::<u32>::PARTS {
            parts.read(0..1).unwrap();
        }
        assert!(matches!(parts.read(0..1), Err(Error::Range { .. })), "one part too many");
    });
}

#[test]
fn buffers_of_two_devices_do_not_mix() {
    on_every_device(|device| {
        let other = Device::host();
        assert!(device.clone() == *device && other != *device);
        let theirs = other.upload(&[1u8, 2, 3]).unwrap();
        let mut ours = device.upload(&[4u8, 5, 6]).unwrap();
        assert!(matches!(ours.copy_from(&theirs), Err(Error::OtherDevice { argument: "source", .. })));
        assert_eq!(ours.to_vec().unwrap(), [4, 5, 6]);
    });
}

#[test]
fn more_memory_than_there_is_is_an_error() {
    on_every_device(|device| {
        let refused = |len| device.zeros::<f32>(len).map(|_| ()).unwrap_err();
        assert!(matches!(refused(usize::MAX), Error::OutOfMemory { .. }));
        assert!(matches!(refused(usize::MAX / 8 + 2), Error::OutOfMemory { .. }));
    });
}

/// All operations of a graph (a launch, a copy, a fill and a write), with inputs that change between replays.
#[test]
fn a_graph_does_its_work_at_each_replay() {
    on_every_device(|device| {
        let mut input = device.upload(&[1.0f32, 2.0, 3.0]).unwrap();
        let mut output = device.poisoned::<f32>(12).unwrap();
        let mut written = vec![9.0f32, 8.0, 7.0];
        let graph = device.capture(|| {
            let mut parts = output.disjoint();
            fill(parts.write(0..3)?, 4.0)?;
            parts.write(3..6)?.copy_from(input.view())?;
            parts.write(6..9)?.clear()?;
            parts.write(9..12)?.write(&written)
        });
        let graph = graph.unwrap();
        written.fill(f32::NAN);
        drop(written);
        assert_eq!(graph.operations(), 4);
        assert!(output.to_vec().unwrap().iter().all(|value| value.is_nan()), "capturing did the work");

        for values in [[1.0f32, 2.0, 3.0], [-5.0, 0.5, 1e9]] {
            input.write(&values).unwrap();
            output.write(&[f32::NAN; 12]).unwrap();
            graph.replay().unwrap();
            let [a, b, c] = values;
            assert_eq!(output.to_vec().unwrap(), [4.0, 4.0, 4.0, a, b, c, 0.0, 0.0, 0.0, 9.0, 8.0, 7.0]);
        }
    });
}

#[test]
fn a_timed_replay_does_the_work_and_times_each_operation() {
    on_every_device(|device| {
        let mut output = device.poisoned::<f32>(6).unwrap();
        let graph = device.capture(|| {
            let mut parts = output.disjoint();
            fill(parts.write(0..3)?, 4.0)?;
            parts.write(3..6)?.clear()
        });
        match graph.unwrap().replay_timed() {
            Ok(seconds) => {
                assert!(device.is_host());
                assert_eq!(seconds.len(), 2);
                assert_eq!(output.to_vec().unwrap(), [4.0, 4.0, 4.0, 0.0, 0.0, 0.0]);
            }
            Err(Error::Argument { operation, .. }) => {
                assert!(!device.is_host() && operation == "RecordedGraph::replay_timed");
            }
            Err(other) => panic!("{other}"),
        }
    });
}

/// The sizes around which a CPU takes pages from the system.
#[test]
fn buffers_of_any_size_are_zero_aligned_and_writable_to_the_last_byte() {
    on_every_device(|device| {
        for len in [1, (4 << 20) - 1, 4 << 20, (6 << 20) + 5] {
            // The second buffer may have the memory of the first.
            for _ in 0..2 {
                let mut buffer = device.zeros::<u8>(len).unwrap();
                assert_eq!(buffer.view().address() % 256, 0);
                assert!(buffer.to_vec().unwrap().iter().all(|&byte| byte == 0), "{len} bytes");
                buffer.write(&vec![7; len]).unwrap();
                assert!(buffer.to_vec().unwrap().iter().all(|&byte| byte == 7), "{len} bytes");
            }
        }
    });
}

/// Replays are ordered with one another and with all other work: a graph that copies `buffer[i]` to `buffer[i + 1]`
/// moves a value one place further at each replay.
#[test]
fn replays_keep_their_order() {
    on_every_device(|device| {
        let len = 1000;
        let mut line = device.zeros::<u32>(2 * len).unwrap();
        let graph = device.capture(|| {
            let mut parts = line.disjoint();
            parts.write(len + 1..2 * len)?.copy_from(parts.read(0..len - 1)?)?;
            let mut parts = line.disjoint();
            parts.write(0..len)?.copy_from(parts.read(len..2 * len)?)
        });
        let graph = graph.unwrap();
        for value in 1..=20 {
            line.slice_mut(0..1).unwrap().write(&[value]).unwrap();
            graph.replay().unwrap();
        }
        drop(graph);
        let moved = line.slice(1..21).unwrap().to_vec().unwrap();
        assert_eq!(moved, (1..=20).rev().collect::<Vec<u32>>());
    });
}

#[test]
fn an_empty_graph_does_nothing() {
    on_every_device(|device| {
        let graph = device.capture(|| Ok(())).unwrap();
        assert_eq!(graph.operations(), 0);
        graph.replay().unwrap();
        device.synchronize().unwrap();
    });
}

#[test]
fn work_that_cannot_be_recorded_fails_and_leaves_the_device_usable() {
    on_every_device(|device| {
        let mut buffer = device.upload(&[1.0f32, 2.0]).unwrap();
        let graph = device.capture(|| fill(buffer.view_mut(), 0.0)).unwrap();
        type Work<'a> = Box<dyn FnOnce() -> Result<()> + 'a>;
        let refused: [(&str, Work); 6] = [
            ("read", Box::new(|| buffer.to_vec().map(|_| ()))),
            ("allocate", Box::new(|| device.zeros::<f32>(1).map(|_| ()))),
            ("event", Box::new(|| device.event().map(|_| ()))),
            ("synchronize", Box::new(|| device.synchronize())),
            ("replay", Box::new(|| graph.replay())),
            ("capture", Box::new(|| device.capture(|| Ok(())).map(|_| ()))),
        ];
        for (name, work) in refused {
            match device.capture(work).map(|_| ()) {
                Err(Error::Argument { operation, .. }) => assert_eq!(operation, name),
                other => panic!("{name} inside a capture: {other:?}"),
            }
        }
        assert_eq!(buffer.to_vec().unwrap(), [1.0, 2.0]);

        // Operations that a failed capture recorded before its error are discarded.
        let failure = Error::Argument { operation: "test", message: "stop".into() };
        let stopped = device.capture(|| fill(buffer.view_mut(), 5.0).and(Err(failure.clone()))).map(|_| ());
        assert_eq!(stopped.unwrap_err(), failure);
        let second = device.capture(|| buffer.slice_mut(0..1)?.clear()).unwrap();
        assert_eq!(second.operations(), 1);
        second.replay().unwrap();
        assert_eq!(buffer.to_vec().unwrap(), [0.0, 2.0]);
    });
}

#[test]
fn a_panic_inside_a_capture_leaves_the_device_usable() {
    on_every_device(|device| {
        let mut buffer = device.upload(&[1u32, 2]).unwrap();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = device.capture(|| {
                buffer.clear()?;
                panic!("on purpose")
            });
        }));
        assert!(panicked.is_err());
        assert_eq!(buffer.to_vec().unwrap(), [1, 2]);
        buffer.clear().unwrap();
        assert_eq!(buffer.to_vec().unwrap(), [0, 0]);
    });
}

#[test]
fn a_buffer_may_be_dropped_during_a_capture() {
    on_every_device(|device| {
        let mut kept = device.upload(&[1u32, 2, 3]).unwrap();
        let mut dropped: Option<Buffer<u32>> = Some(device.upload(&[4u32, 5, 6]).unwrap());
        let graph = device.capture(|| {
            drop(dropped.take());
            kept.clear()
        });
        let graph = graph.unwrap();
        assert_eq!(graph.operations(), 1, "freeing memory became part of the graph");
        for _ in 0..3 {
            kept.write(&[1, 2, 3]).unwrap();
            graph.replay().unwrap();
            assert_eq!(kept.to_vec().unwrap(), [0, 0, 0]);
        }
    });
}

/// A graph keeps the memory that it uses: a replay after its buffer was dropped does not write to another buffer.
#[test]
fn a_buffer_may_be_dropped_before_a_replay() {
    on_every_device(|device| {
        let len = 100_000;
        let mut dropped = device.upload(&vec![7u32; len]).unwrap();
        let graphs = [device.capture(|| dropped.clear()).unwrap(), device.capture(|| dropped.clear()).unwrap()];
        drop(dropped);
        // Otherwise the allocators would reuse the same memory.
        let others: Vec<Buffer<u32>> = (0..8).map(|_| device.upload(&vec![9u32; len]).unwrap()).collect();
        for graph in graphs {
            graph.replay().unwrap();
        }
        for other in &others {
            assert!(other.to_vec().unwrap().iter().all(|&value| value == 9));
        }
    });
}

#[test]
fn a_graph_may_be_dropped_right_after_its_replay() {
    on_every_device(|device| {
        let len = 500_000;
        let mut buffer = device.poisoned::<u32>(len).unwrap();
        for number in 0..10u32 {
            let graph = device.capture(|| buffer.write(&vec![number; len])).unwrap();
            graph.replay().unwrap();
            drop(graph);
            assert!(buffer.to_vec().unwrap().iter().all(|&value| value == number));
        }
    });
}

#[test]
fn events_measure_what_lies_between_them() {
    on_every_device(|device| {
        let mut buffer = device.zeros::<f32>(3_000_001).unwrap();
        device.synchronize().unwrap();
        let clock = std::time::Instant::now();
        let before = device.event().unwrap();
        for _ in 0..10 {
            fill(buffer.view_mut(), 1.0).unwrap();
        }
        let middle = device.event().unwrap();
        fill(buffer.view_mut(), 2.0).unwrap();
        let after = device.event().unwrap();
        let (ten, all) = (middle.elapsed_since(&before).unwrap(), after.elapsed_since(&before).unwrap());
        let wall = clock.elapsed().as_secs_f64();
        // A GPU's events count in steps of half a microsecond.
        assert!(ten > 0.0 && ten <= all + 1e-6 && all <= wall + 1e-6, "{ten} s, {all} s, by the clock {wall} s");
        // 12 MB written eleven times cannot be faster than 20 TB/s.
        assert!(all > 6e-6, "{all} s");
    });
}

#[test]
fn devices_are_found_by_name() {
    assert_eq!(Device::from_name("cpu").unwrap().name(), "cpu");
    assert!(Device::host().is_host());
    for name in ["", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda0", "cuda:1:2"] {
        let Err(Error::Unavailable { device, reason }) = Device::from_name(name) else {
            panic!("{name:?} is a device")
        };
        assert_eq!(device, name);
        assert_eq!(reason, "expected auto, cpu, cuda or cuda:N");
    }
    let devices = available();
    assert_eq!(devices[0].0, "cpu");
    assert!(devices[0].1.as_ref().is_ok_and(|description| description.contains("thread")));
    assert!(devices.len() > 1, "nothing is said about GPUs");
}

#[test]
fn foreign_addresses_are_checked() {
    let device = Device::host();
    let values = [1.0f32, 2.0, 3.0];
    let address = values.as_ptr().expose_provenance() as u64;
    // SAFETY: three live numbers; the refused slices are never made.
    unsafe {
        assert_eq!(Slice::<f32>::from_raw(&device, address, 3).unwrap().to_vec().unwrap(), values);
        assert!(Slice::<f32>::from_raw(&device, 0, 0).unwrap().to_vec().unwrap().is_empty());
        let refused = |address, len| Slice::<f32>::from_raw(&device, address, len).err().unwrap().to_string();
        assert!(refused(0, 1).ends_with("the address is null"));
        assert!(refused(address + 2, 1).ends_with("the address is not aligned to its type"));
        for (address, len) in [(address, usize::MAX), (address, usize::MAX / 4), (u64::MAX - 3, 8)] {
            assert!(refused(address, len).ends_with("it is too long"), "{address:#x} {len}");
            assert!(SliceMut::<f32>::from_raw(&device, address, len).is_err());
        }
    }
}

/// Threads of the caller: several at the same time, one after the other, and none at all.
#[test]
fn the_threads_of_a_caller_give_the_bits_of_a_team() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    let n = 1_000_003;
    let norm_on = |device: &Device| {
        let x: Buffer<f32> = device.upload(&Random(3).vector::<f32>(n)).unwrap();
        let mut norm = device.zeros(1).unwrap();
        vector::l2_norm(x.view(), &mut Reduction::new(device).unwrap(), norm.view_mut()).unwrap();
        norm.to_vec().unwrap()[0].to_bits()
    };
    let expected = norm_on(&Device::host());
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    let at_once: ThreadPool = Arc::new(move |work| {
        counter.fetch_add(1, Ordering::Relaxed);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(work);
            }
        });
    });
    let in_turn: ThreadPool = Arc::new(|work| (0..3).for_each(|_| work()));
    let never: ThreadPool = Arc::new(|_| ());
    for pool in [at_once, in_turn, never] {
        assert_eq!(norm_on(&Device::host_on(3, pool)), expected);
    }
    assert!(calls.load(Ordering::Relaxed) > 0, "the pool was not used");
}
