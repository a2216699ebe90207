//! Tests of the host device: it runs CUDA's device language with CUDA's semantics, in any order and on any number of
//! threads, and reports kernels that break the rules. The kernels, and descriptions of their results, are in
//! `kernels/host/selftest.cu`.
//!
//! Expected values are computed here from CUDA's definitions, not from the runtime's code. Outputs are NaN before each
//! run.

use std::fmt::Debug;
use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use half::{bf16, f16};

use super::arguments::{
    Arguments, AsyncArgs, AtomicsArgs, BitsArgs, BlockSumArgs, ExitedSyncwarpArgs, FaultArgs, GridStrideArgs, HalfArgs,
    HalfWarpsArgs, LdmatrixArgs, MathArgs, MmaArgs, OutsideMaskArgs, PositionArgs, RaceArgs, RoundArgs, ShuffleArgs,
    StackOverflowArgs, SyncCountArgs, UninitialisedArgs, VoteArgs, WarpReduceArgs,
};
use super::{BlockOrder, Buffer, Device, Element, Error, HostOptions, Kernel, Launch, Result, id};

const FULL: u32 = u32::MAX;

fn device(threads: usize, order: BlockOrder) -> Device {
    Device::host_with(HostOptions { threads, order, ..HostOptions::default() })
}

/// Runs a test on devices with different numbers of threads and orders of blocks, which are printed if the test fails.
fn in_every_order(test: impl Fn(&Device)) {
    use BlockOrder::{Backwards, Forwards, Random};
    let orders =
        [(1, Forwards), (2, Forwards), (3, Forwards), (1, Backwards), (2, Backwards), (1, Random(1)), (2, Random(77))];
    for (threads, order) in orders {
        println!("{threads} threads, {order:?}");
        test(&device(threads, order));
    }
}

/// Launches a self-test kernel.
fn launch<A: Arguments>(device: &Device, kernel: Kernel<A>, shape: Launch, args: A) -> Result<()> {
    // SAFETY: every test hands over buffers as long as the comment at the kernel's struct says for the shape.
    unsafe { device.launch(kernel, shape, &args) }
}

/// The arguments of a kernel that computes an output from an input, and may take the number of elements of the input.
trait MapArgs: Arguments {
    fn at(input: u64, output: u64, n: u64) -> Self;

    fn new<I: Element, O: Element>(input: &Buffer<I>, output: &mut Buffer<O>) -> Self {
        Self::at(input.view().address(), output.view_mut().address(), input.len() as u64)
    }
}

macro_rules! map_args {
    ($($name:ident $($n:ident)?),*) => {
        $(impl MapArgs for $name {
            fn at(input: u64, output: u64, _n: u64) -> Self {
                Self { input, output, $($n: _n)? }
            }
        })*
    };
}

map_args!(
    AsyncArgs, BitsArgs n, BlockSumArgs n, ExitedSyncwarpArgs, GridStrideArgs n, HalfWarpsArgs, LdmatrixArgs,
    MathArgs n, MmaArgs, OutsideMaskArgs, RaceArgs, RoundArgs n, SyncCountArgs, VoteArgs, WarpReduceArgs
);

/// The output of a kernel with [`MapArgs`], of `outputs` elements.
fn map<A: MapArgs, I: Element, O: Element>(
    device: &Device,
    kernel: Kernel<A>,
    shape: Launch,
    input: &[I],
    outputs: usize,
) -> Result<Vec<O>> {
    let input = device.upload(input)?;
    let mut output = device.poisoned(outputs)?;
    launch(device, kernel, shape, A::new(&input, &mut output))?;
    output.to_vec()
}

/// Random bits (splitmix64).
fn random_u64(count: usize, seed: u64) -> Vec<u64> {
    let mix = |i: u64| {
        let mut x = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    (1..=count as u64).map(mix).collect()
}

fn random_u32(count: usize, seed: u64) -> Vec<u32> {
    random_u64(count, seed).iter().map(|&bits| (bits >> 32) as u32).collect()
}

/// Random numbers in [-1, 1).
pub(crate) fn random_f32(count: usize, seed: u64) -> Vec<f32> {
    random_u32(count, seed).iter().map(|&bits| (bits >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Like `assert_eq`, but prints only the first difference.
#[track_caller]
fn assert_same<T: PartialEq + Debug>(found: &[T], expected: &[T], context: impl Debug) {
    assert_eq!(found.len(), expected.len(), "{context:?}");
    if let Some(i) = (0..found.len()).find(|&i| found[i] != expected[i]) {
        panic!("{context:?}: element {i} is {:?}, expected {:?}", found[i], expected[i]);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

// ---- The grid ------------------------------------------------------------------------------------------------------

#[test]
fn positions() {
    let shapes = [
        ([3, 2, 2], [5, 3, 2]),
        ([7, 1, 1], [256, 1, 1]),
        ([2, 3, 5], [1, 1, 1]),
        ([1, 1, 3], [1, 1, 33]),
        ([1, 2, 1], [32, 16, 2]),
        ([40, 1, 1], [1, 1, 1]),
    ];
    in_every_order(|device| {
        for (grid, block) in shapes {
            let mut expected = Vec::new();
            let places = |[x, y, z]: [u32; 3]| {
                (0..z).flat_map(move |z| (0..y).flat_map(move |y| (0..x).map(move |x| [x, y, z])))
            };
            for block_index in places(grid) {
                for thread in places(block) {
                    expected.extend([thread, block_index, block, grid].concat());
                }
            }
            let mut out: Buffer<u32> = device.poisoned(expected.len()).unwrap();
            let shape = Launch { grid, block, shared: 0 };
            launch(device, id::SELFTEST_POSITION, shape, PositionArgs { output: out.view_mut().address() }).unwrap();
            assert_same(&out.to_vec().unwrap(), &expected, shape);
        }
    });
}

#[test]
fn grid_stride() {
    let shapes = [
        Launch::new(7, 256),
        Launch::new(3, 33),
        Launch::new(64, 1),
        Launch::new(5, 1),
        Launch::new(1, 1),
        Launch { grid: [2, 2, 1], block: [8, 4, 2], shared: 0 },
    ];
    in_every_order(|device| {
        for n in [0, 1, 31, 1000, 5003] {
            let x = random_f32(n, 1);
            let expected: Vec<f32> = x.iter().map(|x| 2.0 * x).collect();
            for shape in shapes {
                let out: Vec<f32> = map(device, id::SELFTEST_GRID_STRIDE, shape, &x, n).unwrap();
                assert_same(&out, &expected, (n, shape));
            }
        }
    });
}

#[test]
fn an_empty_grid_does_nothing() {
    in_every_order(|device| {
        for grid in [[0, 1, 1], [3, 0, 1], [2, 2, 0]] {
            for block in [1, 64] {
                let shape = Launch { grid, block: [block, 1, 1], shared: 0 };
                let out: Vec<u32> = map(device, id::SELFTEST_GRID_STRIDE, shape, &[1.0f32; 9], 9).unwrap();
                assert_eq!(out, [u32::MAX; 9], "{shape:?}");
            }
        }
    });
}

#[test]
fn a_block_has_1_to_1024_threads() {
    in_every_order(|device| {
        for block in [[1025, 1, 1], [32, 33, 1], [2, 2, 257], [u32::MAX; 3], [0, 1, 1], [64, 0, 1]] {
            let shape = Launch { grid: [2, 1, 1], block, shared: 0 };
            let error = map::<_, f32, f32>(device, id::SELFTEST_GRID_STRIDE, shape, &[1.0; 9], 9).unwrap_err();
            assert!(error.to_string().contains("selftest_grid_stride"), "{error}");
            assert!(error.to_string().contains("1 to 1024 threads"), "{error}");
        }
    });
}

// ---- Warps ---------------------------------------------------------------------------------------------------------

/// The lane that `lane` reads by index, up, down and xor, as the PTX manual defines `shfl.sync`. Only five bits of the
/// parameter count. A lane that would read outside of its segment reads itself (with xor, only past the end).
fn shuffle_sources(lane: u32, parameter: u32, width: u32) -> [u32; 4] {
    let parameter = parameter % 32;
    let segment = lane / width;
    let own_if = |outside: bool, source: u32| if outside { lane } else { source };
    [
        segment * width + parameter % width,
        own_if(parameter > lane % width, lane.wrapping_sub(parameter)),
        own_if(lane % width + parameter >= width, lane + parameter),
        own_if((lane ^ parameter) / width > segment, lane ^ parameter),
    ]
}

/// Shuffles move any bits, so the bits of floating-point numbers are random too, NaNs included.
fn check_shuffle<T: Element + PartialEq + Debug>(device: &Device, kernels: &[Kernel<ShuffleArgs>], values: &[T]) {
    let n = values.len();
    let input = device.upload(values).unwrap();
    // Warps are made of 32 threads in the order x, y, z.
    let shape = Launch { grid: [n as u32 / 64, 1, 1], block: [8, 4, 2], shared: 0 };
    for (&kernel, width) in kernels.iter().flat_map(|kernel| [1, 2, 4, 8, 16, 32].map(|width| (kernel, width))) {
        for parameter in [0, 1, 2, 5, 8, 15, 16, 31, 32, 35, FULL] {
            let sources = |i: usize| shuffle_sources(i as u32 % 32, parameter, width);
            let expected: Vec<T> = (0..4)
                .flat_map(|kind| (0..n).map(move |i| i / 32 * 32 + sources(i)[kind] as usize))
                .map(|source| values[source])
                .collect();
            let mut output: Buffer<T> = device.poisoned(4 * n).unwrap();
            let args =
                ShuffleArgs { input: input.view().address(), output: output.view_mut().address(), parameter, width };
            launch(device, kernel, shape, args).unwrap();
            assert_same(&output.to_vec().unwrap(), &expected, (kernel.id.name(), parameter, width));
        }
    }
}

#[test]
fn shuffles() {
    let values = random_u64(192, 3);
    let words: Vec<u32> = values.iter().map(|&bits| bits as u32).collect();
    let halves: Vec<u16> = values.iter().map(|&bits| bits as u16).collect();
    in_every_order(|device| {
        check_shuffle(device, &[id::SELFTEST_SHUFFLE_U64, id::SELFTEST_SHUFFLE_F64], &values);
        check_shuffle(device, &[id::SELFTEST_SHUFFLE_I32, id::SELFTEST_SHUFFLE_F32], &words);
        check_shuffle(device, &[id::SELFTEST_SHUFFLE_F16, id::SELFTEST_SHUFFLE_BF16], &halves);
    });
}

#[test]
fn half_warps_take_ways_of_their_own() {
    let values = random_u32(256, 4);
    let shuffled: Vec<u32> = (0..256)
        .map(|i| match i % 32 {
            0..16 => values[i ^ 1],
            31 => values[i],
            _ => values[i + 1],
        })
        .collect();
    let expected: Vec<u32> = (0..256)
        .flat_map(|i| [shuffled[i], (0..32).map(|lane| (shuffled[i / 32 * 32 + lane] & 1) << lane).sum()])
        .collect();
    in_every_order(|device| {
        for block in [32, 128, 256] {
            let shape = Launch::new(256 / block, block);
            let out: Vec<u32> = map(device, id::SELFTEST_HALF_WARPS, shape, &values, 512).unwrap();
            assert_same(&out, &expected, shape);
        }
    });
}

#[test]
fn a_shuffle_from_outside_the_mask_is_nan() {
    let values = random_f32(192, 5);
    in_every_order(|device| {
        let out: Vec<f32> = map(device, id::SELFTEST_OUTSIDE_MASK, Launch::new(3, 64), &values, 192).unwrap();
        for (i, &out) in out.iter().enumerate() {
            match i % 32 {
                0..8 => assert_eq!(out, values[i + 8], "{i}"),
                8..16 => assert!(out.is_nan(), "{i}: {out}"),
                _ => assert_eq!(out, 0.0, "{i}"),
            }
        }
    });
}

#[test]
fn votes() {
    let mut values = random_u32(256, 6);
    values[..32].iter_mut().for_each(|value| *value |= 1);
    values[32..64].iter_mut().for_each(|value| *value &= !1);
    let expected: Vec<u32> = (0..256)
        .flat_map(|i| {
            let warp = &values[i / 32 * 32..][..32];
            let ballot = (0..32).filter(|&lane| warp[lane] % 2 == 1).map(|lane| 1 << lane).sum();
            let (any, all) = (warp.iter().any(|value| value % 2 == 1), warp.iter().all(|value| value % 2 == 1));
            [ballot, u32::from(any), u32::from(all), 1]
        })
        .collect();
    in_every_order(|device| {
        for block in [32, 64, 256] {
            let shape = Launch::new(256 / block, block);
            let out: Vec<u32> = map(device, id::SELFTEST_VOTE, shape, &values, 4 * 256).unwrap();
            assert_same(&out, &expected, shape);
        }
    });
}

#[test]
fn warp_reductions() {
    let mut values = random_u32(256, 7);
    values[70] = i32::MIN as u32;
    values[80] = i32::MAX as u32;
    let expected: Vec<u32> = (0..256)
        .flat_map(|i| {
            let warp = &values[i / 32 * 32..][..32];
            let signed = || warp.iter().map(|&value| value as i32);
            let sum = warp.iter().fold(0u32, |sum, &value| sum.wrapping_add(value));
            let (least, most) = (signed().min().unwrap() as u32, signed().max().unwrap() as u32);
            let (low, high) = (*warp.iter().min().unwrap(), *warp.iter().max().unwrap());
            let and = warp.iter().fold(u32::MAX, |a, b| a & b);
            let or = warp.iter().fold(0, |a, b| a | b);
            let xor = warp.iter().fold(0, |a, b| a ^ b);
            [sum, least, most, sum, low, high, and, or, xor]
        })
        .collect();
    in_every_order(|device| {
        let out: Vec<u32> = map(device, id::SELFTEST_WARP_REDUCE, Launch::new(2, 128), &values, 9 * 256).unwrap();
        assert_same(&out, &expected, "2 blocks of 128");
    });
}

#[test]
fn syncwarp_does_not_wait_for_lanes_that_have_exited() {
    let values = random_u32(256, 8);
    let expected: Vec<u32> = (0..256).map(|i| if i % 32 < 16 { values[i ^ 1] } else { u32::MAX }).collect();
    in_every_order(|device| {
        for block in [32, 64, 256] {
            let shape = Launch::new(256 / block, block);
            let out: Vec<u32> = map(device, id::SELFTEST_EXITED_SYNCWARP, shape, &values, 256).unwrap();
            assert_same(&out, &expected, shape);
        }
    });
}

// ---- Tensor cores --------------------------------------------------------------------------------------------------

/// Element i of a lane's fragments as the PTX manual places it, with `packed` elements in a register: (row, depth) in
/// a, (depth, column) in b, (row, column) in c.
fn place_in_a(lane: usize, i: usize, packed: usize) -> (usize, usize) {
    let (group, member, register) = (lane / 4, lane % 4, i / packed);
    (group + 8 * (register % 2), member * packed + i % packed + 4 * packed * (register / 2))
}

fn place_in_b(lane: usize, i: usize, packed: usize) -> (usize, usize) {
    (lane % 4 * packed + i % packed + 4 * packed * (i / packed), lane / 4)
}

fn place_in_c(lane: usize, i: usize) -> (usize, usize) {
    (lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2)
}

/// Products of fragments of random numbers in one type, which is given by the bits of a number and a function that
/// reads them.
fn check_mma(kernel: Kernel<MmaArgs>, packed: usize, bits_of: impl Fn(f32) -> u32, read: impl Fn(u32) -> f64) {
    const WARPS: usize = 6;
    let depth = 8 * packed;
    let numbers = random_f32(WARPS * (16 * depth + depth * 8 + 16 * 8), 16);
    let mut input = vec![0u32; WARPS * 32 * 10];
    let mut expected = vec![0f32; WARPS * 32 * 4];
    for (warp, numbers) in numbers.chunks(numbers.len() / WARPS).enumerate() {
        let (a, rest) = numbers.split_at(16 * depth);
        let (b, c) = rest.split_at(depth * 8);
        for lane in 0..32 {
            let registers = &mut input[(warp * 32 + lane) * 10..][..10];
            for i in 0..4 * packed {
                let (row, k) = place_in_a(lane, i, packed);
                registers[i / packed] |= bits_of(a[row * depth + k]) << (i % packed * 16);
            }
            for i in 0..2 * packed {
                let (k, column) = place_in_b(lane, i, packed);
                registers[4 + i / packed] |= bits_of(b[k * 8 + column]) << (i % packed * 16);
            }
            for i in 0..4 {
                let (row, column) = place_in_c(lane, i);
                let rounded = |x: f32| read(bits_of(x));
                let terms = (0..depth).map(|k| rounded(a[row * depth + k]) * rounded(b[k * 8 + column]));
                let start = c[row * 8 + column];
                registers[6 + i] = start.to_bits();
                expected[(warp * 32 + lane) * 4 + i] = (f64::from(start) + terms.sum::<f64>()) as f32;
            }
        }
    }
    in_every_order(|device| {
        for warps in [1, 2, 6] {
            let shape = Launch::new((WARPS / warps) as u32, 32 * warps as u32);
            let out: Vec<f32> = map(device, kernel, shape, &input, expected.len()).unwrap();
            assert_same(&bits(&out), &bits(&expected), (kernel.id.name(), shape));
        }
    });
}

/// x to 10 bits of fraction, ties away from zero: exact in double.
pub(crate) fn tf32(x: f32) -> f32 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = (x.to_bits() >> 23 & 0xff).max(1) as i32 - 127;
    let unit = 2f64.powi(exponent - 10);
    ((f64::from(x) / unit).round() * unit) as f32
}

#[test]
fn tensor_cores_multiply() {
    let f16_bits = |x: f32| u32::from(f16::from_f32(x).to_bits());
    let bf16_bits = |x: f32| u32::from(bf16::from_f32(x).to_bits());
    check_mma(id::SELFTEST_MMA_F16, 2, f16_bits, |bits| f16::from_bits(bits as u16).into());
    check_mma(id::SELFTEST_MMA_BF16, 2, bf16_bits, |bits| bf16::from_bits(bits as u16).into());
    check_mma(id::SELFTEST_MMA_TF32, 1, |x| tf32(x).to_bits(), |bits| f32::from_bits(bits).into());
}

/// If one element is not a TF32 number, in row 5 at depth 6 of a, the whole row of the product is NaN.
#[test]
fn what_is_not_rounded_to_tf32_is_nan() {
    in_every_order(|device| {
        let mut input = vec![0u32; 320];
        let lane = (0..32).find(|&lane| place_in_a(lane, 2, 1) == (5, 6)).unwrap();
        input[lane * 10 + 2] = 1.0f32.to_bits() + 1;
        let out: Vec<f32> = map(device, id::SELFTEST_MMA_TF32, Launch::new(1, 32), &input, 128).unwrap();
        for (i, value) in out.iter().enumerate() {
            assert_eq!(value.is_nan(), place_in_c(i / 4, i % 4).0 == 5, "{i}");
        }
    });
}

#[test]
fn rounds_to_tf32() {
    let mut values: Vec<f32> = random_u32(20_000, 17).iter().map(|&bits| f32::from_bits(bits)).collect();
    for bits in random_u32(2_000, 18) {
        let (exact, tie) = (bits & !0x1fff, (bits & !0x1fff) | 0x1000);
        values.extend([exact, exact | 1, tie - 1, tie, tie + 1].map(f32::from_bits));
    }
    values.extend([0.0, -0.0, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-45]);
    in_every_order(|device| {
        let out: Vec<u32> = map(device, id::SELFTEST_ROUND_TO_TF32, Launch::new(4, 64), &values, values.len()).unwrap();
        for (&x, &found) in values.iter().zip(&out) {
            if x.is_nan() {
                assert!(f32::from_bits(found).is_nan(), "{:#x}", x.to_bits());
            } else {
                assert_eq!(found, tf32(x).to_bits(), "{x:e}");
            }
        }
    });
}

#[test]
fn matrices_are_loaded_by_rows_and_by_columns() {
    let numbers: Vec<u16> = random_u32(192 * 8, 19).iter().map(|&bits| bits as u16).collect();
    for (kernel, transposed) in [(id::SELFTEST_LDMATRIX, false), (id::SELFTEST_LDMATRIX_TRANSPOSED, true)] {
        let element = |warp: usize, matrix: usize, row: usize, column: usize| {
            numbers[((warp * 4 + matrix) * 8 + row) * 8 + column]
        };
        let expected: Vec<u16> = (0..192 * 8)
            .map(|i| {
                let (thread, matrix, half) = (i / 8, i / 2 % 4, i % 2);
                let (warp, group, first) = (thread / 32, thread % 32 / 4, thread % 4 * 2);
                let (row, column) = if transposed { (first + half, group) } else { (group, first + half) };
                element(warp, matrix, row, column)
            })
            .collect();
        in_every_order(|device| {
            for block in [32, 64, 192] {
                let shape = Launch::new(192 / block, block);
                let out: Vec<u16> = map(device, kernel, shape, &numbers, 192 * 8).unwrap();
                assert_same(&out, &expected, (kernel.id.name(), shape));
            }
        });
    }
}

#[test]
fn asynchronous_copies_are_there_once_they_are_waited_for() {
    const NAN: [u32; 4] = [u32::MAX; 4];
    let values: Vec<[u32; 4]> =
        random_u32(4 * 192, 20).chunks(4).map(|chunk| chunk.try_into().expect("four")).collect();
    let expected: Vec<[u32; 4]> = (0..192)
        .flat_map(|i| [NAN, values[i], NAN, if i % 2 == 0 { values[i] } else { [0; 4] }, values[i ^ 1]])
        .collect();
    in_every_order(|device| {
        for block in [32, 192] {
            let shape = Launch::new(192 / block, block);
            let out: Vec<[u32; 4]> = map(device, id::SELFTEST_ASYNC_COPIES, shape, &values, 5 * 192).unwrap();
            assert_same(&out, &expected, shape);
        }
    });
}

// ---- Blocks --------------------------------------------------------------------------------------------------------

#[test]
fn barriers_that_count() {
    in_every_order(|device| {
        for block in [1, 7, 32, 100, 256] {
            // All, none, all but one, one, and some. Negative and even numbers are true too.
            let mut values = vec![-2; 5 * block];
            values[block..2 * block].fill(0);
            values[2 * block + block / 2] = 0;
            values[3 * block..4 * block].fill(0);
            values[4 * block - 1] = i32::MIN;
            for (value, random) in values[4 * block..].iter_mut().zip(random_u32(block, 9)) {
                *value = (random % 3) as i32;
            }
            let expected: Vec<i32> = (0..5 * block)
                .flat_map(|i| {
                    let count = values[i / block * block..][..block].iter().filter(|&&value| value != 0).count();
                    [count as i32, i32::from(count == block), i32::from(count > 0)]
                })
                .collect();
            let shape = Launch::new(5, block as u32);
            let out: Vec<i32> = map(device, id::SELFTEST_SYNC_COUNT, shape, &values, 15 * block).unwrap();
            assert_same(&out, &expected, shape);
        }
    });
}

/// s[t] += s[t + width / 2] for the lower half, repeatedly: the order in which the kernels add.
fn tree_sum(values: &[f32], width: usize) -> f32 {
    let mut sums = vec![0.0; width];
    sums[..values.len()].copy_from_slice(values);
    while sums.len() > 1 {
        let upper = sums.split_off(sums.len() / 2);
        sums.iter_mut().zip(upper).for_each(|(sum, other)| *sum += other);
    }
    sums[0]
}

fn block_sum(device: &Device, kernel: Kernel<BlockSumArgs>, shape: Launch, values: &[f32]) -> Vec<u32> {
    bits(&map(device, kernel, shape, values, shape.grid[0] as usize).unwrap())
}

#[test]
fn block_sums() {
    let values = random_f32(1500, 10);
    in_every_order(|device| {
        let expected: Vec<f32> = values.chunks(256).map(|chunk| tree_sum(chunk, 256)).collect();
        let sums = block_sum(device, id::SELFTEST_BLOCK_SUM_STATIC, Launch::new(6, 256), &values);
        assert_eq!(sums, bits(&expected));

        for block in [1, 2, 8, 64, 256, 1024] {
            let expected: Vec<f32> = values.chunks(block).map(|chunk| tree_sum(chunk, block)).collect();
            let shape = Launch::new(expected.len() as u32, block as u32).with_shared(4 * block);
            let sums = block_sum(device, id::SELFTEST_BLOCK_SUM_DYNAMIC, shape, &values);
            assert_eq!(sums, bits(&expected), "{block} threads");
        }

        for block in [32, 64, 96, 256] {
            let by_warps = |chunk: &[f32]| {
                let warps: Vec<f32> = chunk.chunks(32).map(|warp| tree_sum(warp, 32)).collect();
                tree_sum(&warps, 8)
            };
            let expected: Vec<f32> = values.chunks(block).map(by_warps).collect();
            let shape = Launch::new(expected.len() as u32, block as u32);
            let sums = block_sum(device, id::SELFTEST_BLOCK_SUM_SHUFFLE, shape, &values);
            assert_eq!(sums, bits(&expected), "{block} threads");
        }
    });
}

#[test]
fn uninitialised_shared_memory_is_nan() {
    in_every_order(|device| {
        for block in [2, 33, 256, 1024] {
            let shape = Launch::new(5, block).with_shared(4 * block as usize);
            let mut out = device.zeros::<f32>(5 * block as usize).unwrap();
            launch(device, id::SELFTEST_UNINITIALISED, shape, UninitialisedArgs { output: out.view_mut().address() })
                .unwrap();
            assert!(out.to_vec().unwrap().iter().all(|value| value.is_nan()), "{block} threads");
        }
    });
}

#[test]
fn a_race_shows_in_the_orders() {
    let values: Vec<u32> = (1..=512).collect();
    let run = |threads, order| -> Vec<u32> {
        map(&device(threads, order), id::SELFTEST_RACE, Launch::new(2, 256), &values, 512).unwrap()
    };
    // Forwards, only the last thread of a block finds that its neighbour, the first, has written; backwards, all the
    // others do.
    let last = |i: usize| i % 256 == 255;
    let forwards: Vec<u32> = (0..512).map(|i| if last(i) { 2 * values[i - 255] } else { 0 }).collect();
    let backwards: Vec<u32> = (0..512).map(|i| if last(i) { 0 } else { 2 * values[i + 1] }).collect();
    for threads in [1, 2, 3] {
        assert_same(&run(threads, BlockOrder::Forwards), &forwards, (threads, "forwards"));
        assert_same(&run(threads, BlockOrder::Backwards), &backwards, (threads, "backwards"));
    }
    let random = run(1, BlockOrder::Random(5));
    assert_same(&random, &run(2, BlockOrder::Random(5)), "the same seed");
    for other in [run(1, BlockOrder::Random(6)), forwards, backwards] {
        assert!(random != other);
    }
    // Each block has its own order.
    let seen = |block: &[u32]| -> Vec<bool> { block.iter().map(|&value| value != 0).collect() };
    assert!(seen(&random[..256]) != seen(&random[256..]));
}

#[test]
fn atomics() {
    in_every_order(|device| {
        for shape in [Launch::new(20, 256), Launch::new(5003, 1), Launch::new(9, 33)] {
            let n = u64::from(shape.grid[0] * shape.block[0]);
            let sum = n * (n - 1) / 2;
            let mut i32s = device.upload(&[11i32, 7, -5, 100, 13]).unwrap();
            let mut u32s = device.upload(&[3u32, FULL, 0, 0xa5a5_a5a5, 17, 1000]).unwrap();
            let mut u64s = device.upload(&[19u64, 2]).unwrap();
            let (mut f32, mut f64) = (device.upload(&[0.5f32]).unwrap(), device.upload(&[0.25f64]).unwrap());
            let args = AtomicsArgs {
                i32: i32s.view_mut().address(),
                u32: u32s.view_mut().address(),
                u64: u64s.view_mut().address(),
                f32: f32.view_mut().address(),
                f64: f64.view_mut().address(),
            };
            launch(device, id::SELFTEST_ATOMICS, shape, args).unwrap();

            let last = n as i32 - 1;
            assert_eq!(i32s.to_vec().unwrap(), [11 + sum as i32, -last, last, 100 - n as i32, 13 + n as i32]);
            let u32s = u32s.to_vec().unwrap();
            // Every exchange returns a value that another one stored, except for the first one and the final content.
            let exchanged = 17 + 1000 + (sum + n) as u32 - u32s[5];
            assert!((1..=n as u32).contains(&u32s[5]), "{}", u32s[5]);
            let xor = (0..n as u32).fold(0xa5a5_a5a5, |xor, i| xor ^ i);
            assert_eq!(u32s[..5], [3 + n as u32, 0, FULL, xor, exchanged]);
            assert_eq!(u64s.to_vec().unwrap(), [19 + (n << 32) + sum, n - 1]);
            assert_eq!(f32.to_vec().unwrap(), [0.5 + n as f32]);
            assert_eq!(f64.to_vec().unwrap(), [0.25 + sum as f64]);
        }
    });
}

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

/// All values of both types, the ties between neighbours, the numbers next to each of these, and random bits.
fn values_to_round() -> Vec<f32> {
    let mut values: Vec<f32> = random_u32(20_000, 11).iter().map(|&bits| f32::from_bits(bits)).collect();
    for pattern in 0..=u16::MAX {
        let half = f16::from_bits(pattern).to_f32();
        let next = f16::from_bits(pattern.wrapping_add(1)).to_f32();
        let tie = f32::midpoint(half, next);
        // The upper half of a float's bits is a bfloat16; a tie has a single bit set below.
        let bfloat = u32::from(pattern) << 16;
        for bits in [half.to_bits(), tie.to_bits(), bfloat, bfloat | 0x8000] {
            values.extend([bits.wrapping_sub(1), bits, bits.wrapping_add(1)].map(f32::from_bits));
        }
    }
    values.extend([65504.0, 65519.99, 65520.0, 65536.0, f32::MAX, f32::MIN_POSITIVE, -0.0]);
    values
}

struct Halves {
    f16: Vec<u16>,
    bf16: Vec<u16>,
    from_f16: Vec<f32>,
    from_bf16: Vec<f32>,
}

fn convert(device: &Device, shape: Launch, values: &[f32]) -> Halves {
    let (n, input) = (values.len(), device.upload(values).unwrap());
    let mut halves = [device.poisoned::<u16>(n).unwrap(), device.poisoned(n).unwrap()];
    let mut back = [device.poisoned::<f32>(n).unwrap(), device.poisoned(n).unwrap()];
    let args = HalfArgs {
        input: input.view().address(),
        f16: halves[0].view_mut().address(),
        bf16: halves[1].view_mut().address(),
        from_f16: back[0].view_mut().address(),
        from_bf16: back[1].view_mut().address(),
        n: n as u64,
    };
    launch(device, id::SELFTEST_HALF_CONVERSIONS, shape, args).unwrap();
    let [f16, bf16] = halves.map(|half| half.to_vec().unwrap());
    let [from_f16, from_bf16] = back.map(|back| back.to_vec().unwrap());
    Halves { f16, bf16, from_f16, from_bf16 }
}

#[test]
fn half_conversions() {
    let values = values_to_round();
    in_every_order(|device| {
        // One thread per block, so that the conversions are vectorised, and many.
        for shape in [Launch::new(64, 1), Launch::new(4, 256)] {
            let halves = convert(device, shape, &values);
            for (i, &x) in values.iter().enumerate() {
                let (half, bfloat) = (halves.f16[i], halves.bf16[i]);
                let (from_half, from_bfloat) = (halves.from_f16[i], halves.from_bf16[i]);
                if x.is_nan() {
                    assert_eq!([half, bfloat], [0x7fff; 2], "{:#x}", x.to_bits());
                    assert!(from_half.is_nan() && from_bfloat.is_nan(), "{:#x}", x.to_bits());
                } else {
                    let (expected, expected_bfloat) = (f16::from_f32(x), bf16::from_f32(x));
                    assert_eq!(half, expected.to_bits(), "{x:e} as f16");
                    assert_eq!(bfloat, expected_bfloat.to_bits(), "{x:e} as bf16");
                    assert_eq!(from_half.to_bits(), expected.to_f32().to_bits(), "{x:e} from f16");
                    assert_eq!(from_bfloat.to_bits(), expected_bfloat.to_f32().to_bits(), "{x:e} from bf16");
                }
            }
        }
    });
}

/// Numbers of every size, those at which sin(pi x) and cos(pi x) are simple, and the special ones.
fn arguments() -> Vec<f32> {
    let mut arguments: Vec<f32> = (-40..=40).map(|i| i as f32 * 0.25).collect();
    arguments.extend(random_f32(1000, 12).iter().enumerate().map(|(i, x)| x * ((i % 40) as f32 - 20.0).exp2()));
    for near in [0.5f32, 1.0, 1.5, 2.0, 1000.0, 1e6, 8_388_608.0, 1e30, 1e-40] {
        arguments.extend([near, -near, near.next_up(), near.next_down()]);
    }
    arguments.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE]);
    arguments
}

/// The distance of `found` from `expected` in units of the last place of `expected` as an f32.
fn ulps(found: f32, expected: f64) -> f64 {
    let rounded = expected.abs() as f32;
    if f64::from(found) == expected || (found.is_nan() && expected.is_nan()) || found == expected as f32 {
        return 0.0;
    }
    (f64::from(found) - expected).abs() / (f64::from(rounded.next_up()) - f64::from(rounded))
}

/// sin(pi x) with an exact reduction of x to [-1/2, 1/2].
fn sin_pi(x: f64) -> f64 {
    let x = x % 2.0;
    let x = if x.abs() > 1.0 { x - 2.0 * x.signum() } else { x };
    (std::f64::consts::PI * if x.abs() > 0.5 { x.signum() - x } else { x }).sin()
}

#[test]
fn math() {
    let arguments = arguments();
    let n = arguments.len();
    in_every_order(|device| {
        for shape in [Launch::new(16, 1), Launch::new(3, 64)] {
            let out: Vec<f32> = map(device, id::SELFTEST_MATH, shape, &arguments, 10 * n).unwrap();
            for (&x, out) in arguments.iter().zip(out.chunks(10)) {
                let wide = f64::from(x);
                // The largest errors that CUDA's manual allows: 2 ulp for rsqrtf, 1 ulp for sinpif and cospif.
                assert!(ulps(out[0], wide.sqrt().recip()) <= 2.0, "rsqrt({x:e}) = {:e}", out[0]);
                assert!(ulps(out[1], sin_pi(wide)) <= 1.0, "sinpi({x:e}) = {:e}", out[1]);
                // cos(pi x) = sin(pi (1/2 - |x|)), with |x| reduced first so that the difference is exact.
                assert!(ulps(out[2], sin_pi(0.5 - (wide % 2.0).abs())) <= 1.0, "cospi({x:e}) = {:e}", out[2]);
                let exact = [x.min(0.5), x.max(0.5), x, x, x.mul_add(x, 1.0)];
                let flags = [x.is_finite(), x.is_nan()].map(|flag| f32::from(u8::from(flag)));
                for (i, expected) in exact.into_iter().chain(flags).enumerate() {
                    let found = out[3 + i];
                    assert!(found == expected || (found.is_nan() && expected.is_nan()), "{i}, {x:e}: {found:e}");
                }
            }
        }
    });
}

#[test]
fn bit_operations() {
    let mut values = random_u32(1000, 13);
    values.extend((0..32).flat_map(|bit| [1 << bit, (1 << bit) - 1, !(1 << bit)]));
    values.extend([0x7f80_0001, 0xffc0_0000, u32::MAX]);
    let expected: Vec<u32> = values
        .iter()
        .flat_map(|&x| {
            let first_set = if x == 0 { 0 } else { x.trailing_zeros() + 1 };
            let high = (u64::from(x) * 0x9e37_79b9) >> 32;
            [x.count_ones(), x.leading_zeros(), first_set, high as u32, x]
        })
        .collect();
    in_every_order(|device| {
        for shape in [Launch::new(16, 1), Launch::new(3, 64)] {
            let out: Vec<u32> = map(device, id::SELFTEST_BITS, shape, &values, expected.len()).unwrap();
            assert_same(&out, &expected, shape);
        }
    });
}

// ---- Faults --------------------------------------------------------------------------------------------------------

/// Runs the kernel that breaks rule number `which` in one block. Returns the result and the output.
fn run_fault(device: &Device, shape: Launch, block: u64, which: u32) -> (Result<()>, Vec<u32>) {
    let blocks: u32 = shape.grid.iter().product();
    let mut out = device.zeros::<u32>((blocks * shape.block[0]) as usize).unwrap();
    let args = FaultArgs { output: out.view_mut().address(), block, which };
    let result = launch(device, id::SELFTEST_FAULT, shape, args);
    (result, out.to_vec().unwrap())
}

/// The message for each broken rule, and the threads of which one must be named.
#[rustfmt::skip]
const FAULTS: [(u32, u32, &[u32], &str); 11] = [
    // The number, the threads in a block, the threads that may be named, and the message.
    (1, 64, &[0], "40 of 64 threads wait at __syncthreads, which the others never reach: 24 exited, 0 wait elsewhere"),
    (2, 64, &[0], "32 of 64 threads wait at __syncthreads, which the others never reach: 0 exited, \
                   32 wait elsewhere, one at __syncthreads_count"),
    (3, 64, &[16], "32 of 64 threads wait at __syncthreads, which the others never reach: 0 exited, \
                    32 wait elsewhere, one at __shfl_sync"),
    (4, 31, &[0],
        "__shfl_xor_sync with mask 0xffffffff names lane 31, which the block does not have: it has 31 threads"),
    (4, 63, &[32],
        "__shfl_xor_sync with mask 0xffffffff names lane 31, which the block does not have: it has 63 threads"),
    (4, 1, &[0], "__shfl_xor_sync with mask 0xffffffff names lane 1, which the block does not have: it has 1 thread"),
    (5, 64, &[0], "__ballot_sync with mask 0xffffffff waits for lane 5, which has exited"),
    (6, 64, &[3, 35], "__shfl_sync with mask 0x000000f7, which lacks its caller, lane 3"),
    (7, 64, &[1], "__shfl_sync with mask 0xffffffff waits for lane 0, which has exited"),
    (8, 64, &[0], "__shfl_down_sync with mask 0xffffffff waits for lane 1, \
                   which waits at __shfl_up_sync with mask 0xffffffff"),
    (9, 64, &[], "__shfl_sync with a width that is not 1, 2, 4, 8, 16 or 32"),
];

#[test]
fn faults_are_named_and_leave_the_device_usable() {
    let values = random_f32(768, 14);
    let sums = bits(&values.chunks(256).map(|chunk| tree_sum(chunk, 256)).collect::<Vec<_>>());
    in_every_order(|device| {
        for (which, threads, named, expected) in FAULTS {
            let shape = Launch { grid: [2, 3, 2], block: [threads, 1, 1], shared: 0 };
            let (result, out) = run_fault(device, shape, 7, which);
            let Err(Error::Fault { kernel, block, thread, message }) = result else { panic!("{which}: {result:?}") };
            assert_eq!(kernel, "selftest_fault");
            assert_eq!(block, [1, 0, 1], "wrong {which}");
            assert_eq!(message, expected, "wrong {which}");
            assert!(named.is_empty() || named.contains(&thread[0]), "wrong {which}: {thread:?}");
            assert!(thread[0] < threads && thread[1..] == [0, 0], "wrong {which}: {thread:?}");
            // No thread that waits in vain, or broke a rule, reaches the end.
            assert_eq!(out[(7 * threads + thread[0]) as usize], 0, "wrong {which}");

            let (result, out) = run_fault(device, shape, 7, 0);
            assert!(result == Ok(()) && out.iter().all(|&done| done == 1), "after wrong {which}: {result:?}");
            let again = block_sum(device, id::SELFTEST_BLOCK_SUM_STATIC, Launch::new(3, 256), &values);
            assert_eq!(again, sums, "after wrong {which}");
        }
    });
}

#[test]
fn a_fault_stops_the_launch() {
    // On one thread, the blocks before the fault are done, and none after it.
    let blocks_done = |device: &Device, blocks: u32, block: u64| -> Vec<bool> {
        let (result, out) = run_fault(device, Launch::new(blocks, 64), block, 9);
        assert!(matches!(result, Err(Error::Fault { .. })), "{result:?}");
        out.chunks(64).map(|block| block.iter().all(|&done| done == 1)).collect()
    };
    let done = blocks_done(&device(1, BlockOrder::Forwards), 200, 60);
    assert_eq!(done, (0..200).map(|block| block < 60).collect::<Vec<_>>());
    let done = blocks_done(&device(1, BlockOrder::Backwards), 200, 60);
    assert_eq!(done, (0..200).map(|block| block > 60).collect::<Vec<_>>());
    // On several threads, the others finish the chunks that they have begun. How many these are depends on the system:
    // it may even delay the thread with the fault until the others have done everything, but not every time.
    for threads in [2, 3] {
        let device = device(threads, BlockOrder::Forwards);
        let stops = (0..20).any(|_| blocks_done(&device, 20_000, 0).iter().filter(|&&done| done).count() < 19_999);
        assert!(stops, "{threads} threads");
    }
}

// ---- Several callers -----------------------------------------------------------------------------------------------

/// Fails if `work` does not return in time, instead of hanging for ever.
fn within(limit: Duration, work: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let worker = std::thread::spawn(move || {
        work();
        let _ = sender.send(());
    });
    match receiver.recv_timeout(limit) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("not done after {limit:?}"),
        _ => worker.join().unwrap(),
    }
}

#[test]
fn several_threads_launch_at_once() {
    within(Duration::from_secs(120), || {
        in_every_order(|device| {
            std::thread::scope(|scope| {
                for caller in 0..4u32 {
                    scope.spawn(move || {
                        for repetition in 0..10 {
                            let values = random_f32(2000, u64::from(100 * caller + repetition));
                            let doubled: Vec<f32> = values.iter().map(|x| 2.0 * x).collect();
                            let shape = Launch::new(24 + caller, 1 + caller % 2 * 32);
                            let out: Vec<f32> = map(device, id::SELFTEST_GRID_STRIDE, shape, &values, 2000).unwrap();
                            assert_same(&out, &doubled, shape);
                            let sums: Vec<f32> = values.chunks(256).map(|chunk| tree_sum(chunk, 256)).collect();
                            let shape = Launch::new(8, 256);
                            let out = block_sum(device, id::SELFTEST_BLOCK_SUM_STATIC, shape, &values);
                            assert_eq!(out, bits(&sums));
                        }
                    });
                }
            });
        });
    });
}

#[test]
fn no_wake_up_is_lost() {
    // Small launches from two callers, sometimes immediately, sometimes after a pause in which the team's threads fall
    // asleep.
    for threads in [2, 3] {
        within(Duration::from_secs(60), move || {
            let device = device(threads, BlockOrder::Forwards);
            let end = Instant::now() + Duration::from_millis(300);
            std::thread::scope(|scope| {
                for caller in 0..2 {
                    let device = &device;
                    scope.spawn(move || {
                        let input = device.upload(&[caller as f32 + 1.0; 64]).unwrap();
                        let mut output = device.poisoned::<f32>(64).unwrap();
                        let args = GridStrideArgs::new(&input, &mut output);
                        for random in random_u64(1 << 20, caller) {
                            if Instant::now() > end {
                                return;
                            }
                            output.clear().unwrap();
                            launch(device, id::SELFTEST_GRID_STRIDE, Launch::new(64, 1), args).unwrap();
                            assert_eq!(output.to_vec().unwrap(), [2.0 * (caller as f32 + 1.0); 64]);
                            if random % 4 == 0 {
                                std::thread::sleep(Duration::from_micros(random >> 32 & 0xff));
                            }
                        }
                    });
                }
            });
        });
    }
}

#[test]
fn devices_come_and_go() {
    // A team may be told to stop before its threads have begun, while they spin, or while they sleep.
    within(Duration::from_secs(60), || {
        for repetition in 0..60 {
            let device = device(3, BlockOrder::Forwards);
            if repetition % 2 == 0 {
                let out: Vec<f32> =
                    map(&device, id::SELFTEST_GRID_STRIDE, Launch::new(64, 1), &[1.5f32; 64], 64).unwrap();
                assert_eq!(out, [3.0; 64]);
            }
            std::thread::sleep(Duration::from_micros(repetition % 3 * 150));
        }
    });
}

// ---- Graphs --------------------------------------------------------------------------------------------------------

#[test]
fn a_graph_is_recorded_and_replayed() {
    in_every_order(|device| {
        let mut x = device.upload(&[1.0f32; 100]).unwrap();
        let mut doubled = device.poisoned::<f32>(100).unwrap();
        let mut copy = device.poisoned::<f32>(100).unwrap();
        let mut written = device.poisoned::<u32>(3).unwrap();
        let mut cleared = device.poisoned::<u32>(5).unwrap();
        let graph = device
            .capture(|| {
                // The recording owns the numbers to write: these here are dropped.
                let mut numbers = vec![7u32, 8, 9];
                written.write(&numbers)?;
                numbers.fill(0);
                cleared.slice_mut(1..4)?.clear()?;
                launch(device, id::SELFTEST_GRID_STRIDE, Launch::new(4, 32), GridStrideArgs::new(&x, &mut doubled))?;
                copy.copy_from(&doubled)
            })
            .unwrap();
        assert_eq!(graph.operations(), 4);
        assert!(doubled.to_vec().unwrap().iter().chain(&copy.to_vec().unwrap()).all(|value| value.is_nan()));
        assert_eq!((written.to_vec().unwrap(), cleared.to_vec().unwrap()), (vec![u32::MAX; 3], vec![u32::MAX; 5]));

        // Each replay reads the memory at the addresses.
        for value in [3.0, -0.5] {
            x.write(&[value; 100]).unwrap();
            written.clear().unwrap();
            cleared.write(&[1; 5]).unwrap();
            graph.replay().unwrap();
            assert_eq!(doubled.to_vec().unwrap(), [2.0 * value; 100]);
            assert_eq!(copy.to_vec().unwrap(), [2.0 * value; 100]);
            assert_eq!(written.to_vec().unwrap(), [7, 8, 9]);
            assert_eq!(cleared.to_vec().unwrap(), [1, 0, 0, 0, 1]);
        }
    });
}

#[test]
fn what_a_graph_cannot_record_is_refused() {
    let device = device(2, BlockOrder::Forwards);
    let buffer = device.upload(&[1.0f32; 8]).unwrap();
    let empty = device.capture(|| Ok(())).unwrap();
    assert_eq!(empty.operations(), 0);
    empty.replay().unwrap();
    let refused: [(&str, &dyn Fn() -> Result<()>); 6] = [
        ("read", &|| buffer.to_vec().map(drop)),
        ("allocate", &|| device.zeros::<f32>(1).map(drop)),
        ("synchronize", &|| device.synchronize()),
        ("event", &|| device.event().map(drop)),
        ("capture", &|| device.capture(|| Ok(())).map(drop)),
        ("replay", &|| empty.replay()),
    ];
    for (name, work) in refused {
        let error = device.capture(work).err();
        let named = matches!(&error, Some(Error::Argument { operation, .. }) if *operation == name);
        assert!(named, "{name}: {error:?}");
        assert_eq!(work(), Ok(()), "{name} after the capture");
    }
}

#[test]
fn a_capture_that_fails_leaves_nothing_behind() {
    let device = device(2, BlockOrder::Forwards);
    let input = device.upload(&[1.5f32; 64]).unwrap();
    let mut output = device.poisoned::<f32>(64).unwrap();
    let args = GridStrideArgs::new(&input, &mut output);
    let record = || launch(&device, id::SELFTEST_GRID_STRIDE, Launch::new(2, 32), args);
    let failure = || Error::Argument { operation: "test", message: "on purpose".into() };
    let failed = device.capture(|| record().and(Err(failure())));
    assert_eq!(failed.err(), Some(failure()));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        device.capture(|| record().map(|()| panic!("on purpose")))
    }));
    assert!(panicked.is_err());

    assert!(output.to_vec().unwrap().iter().all(|value| value.is_nan()));
    let graph = device.capture(record).unwrap();
    assert_eq!(graph.operations(), 1);
    record().unwrap();
    assert_eq!(output.to_vec().unwrap(), [3.0; 64]);
}

/// Work on two streams, also on the GPU that `POLDER_TEST_DEVICE` names: both results are complete when they are read,
/// and an error in one leaves the device usable.
#[test]
fn two_pieces_of_work_are_done_at_once() {
    let check = |device: &Device| {
        let ones = device.upload(&[1u32; 1000]).unwrap();
        let mut out = [(); 2].map(|()| device.poisoned::<u32>(1000).unwrap());
        let mut order = Vec::new();
        let mut both = |failing: Option<usize>| {
            order.clear();
            device.both(|index| {
                order.push(index);
                let [cleared, copied] = &mut out;
                match index {
                    0 => cleared.clear()?,
                    _ => copied.copy_from(&ones)?,
                }
                match failing == Some(index) {
                    true => Err(Error::Argument { operation: "test", message: "on purpose".into() }),
                    false => Ok(()),
                }
            })
        };
        assert_eq!(both(None), Ok(()));
        for failing in 0..2 {
            assert!(matches!(both(Some(failing)), Err(Error::Argument { operation: "test", .. })));
        }
        assert_eq!(device.capture(|| both(None)).unwrap().replay(), Ok(()));
        let found = out.each_ref().map(|buffer| buffer.to_vec().unwrap());
        assert_eq!(found, [vec![0; 1000], vec![1; 1000]]);
        order.sort();
        assert_eq!(order, [0, 1]);

        let mut written = device.zeros::<u32>(4).unwrap();
        let mut refused: [(&str, &mut dyn FnMut() -> Result<()>); 6] = [
            ("read", &mut || ones.to_vec().map(drop)),
            ("write", &mut || written.write(&[1; 4])),
            ("allocate", &mut || device.zeros::<f32>(1).map(drop)),
            ("synchronize", &mut || device.synchronize()),
            ("event", &mut || device.event().map(drop)),
            ("both", &mut || device.both(|_| Ok(()))),
        ];
        for (name, work) in &mut refused {
            let error = device.both(|index| if index == 1 { work() } else { Ok(()) }).err();
            let named = matches!(&error, Some(Error::Argument { operation, .. }) if operation == name);
            assert!(named, "{name}: {error:?}");
            assert_eq!(work(), Ok(()), "{name} afterwards");
        }
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            device.both(|index| if index == 1 { panic!("on purpose") } else { Ok(()) })
        }));
        assert!(panicked.is_err());
        assert_eq!(ones.to_vec().unwrap(), [1; 1000]);
    };
    in_every_order(check);
    if let Ok(name) = std::env::var("POLDER_TEST_DEVICE") {
        check(&Device::from_name(&name).unwrap());
    }
}

#[test]
fn a_fault_ends_a_replay() {
    let device = device(2, BlockOrder::Forwards);
    let mut out = device.zeros::<u32>(128).unwrap();
    let mut after = device.poisoned::<u32>(1).unwrap();
    let args = FaultArgs { output: out.view_mut().address(), block: 1, which: 5 };
    let graph = device.capture(|| {
        launch(&device, id::SELFTEST_FAULT, Launch::new(2, 64), args)?;
        after.clear()
    });
    let graph = graph.unwrap();
    let error = graph.replay().unwrap_err();
    assert!(matches!(error, Error::Fault { block: [1, 0, 0], .. }), "{error}");
    assert_eq!(after.to_vec().unwrap(), [u32::MAX]);
}

// ---- Separate processes --------------------------------------------------------------------------------------------

/// Tells a test that it runs in a separate process, and which part it runs.
const PART: &str = "POLDER_SELFTEST_PART";

/// Runs one test of this binary in a separate process, which is killed after a minute. Returns its standard output and
/// error.
fn run_alone(test: &str, variables: &[(&str, &str)]) -> (ExitStatus, String, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([&format!("device::selftest::{test}"), "--exact", "--nocapture", "--test-threads=1"])
        .envs(variables.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    // Its output fits into the pipes' buffers, so it never waits for a reader.
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > end => {
                child.kill().unwrap();
                panic!("{test} {variables:?} was not done after a minute");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let (mut output, mut error) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
    (status, output, error)
}

fn descend(device: &Device, shape: Launch, depth: u32) -> Vec<u32> {
    let mut out = device.poisoned::<u32>((shape.grid[0] * shape.block[0]) as usize).unwrap();
    launch(device, id::SELFTEST_STACK_OVERFLOW, shape, StackOverflowArgs { output: out.view_mut().address(), depth })
        .unwrap();
    out.to_vec().unwrap()
}

#[test]
fn a_stack_overflow_ends_the_process_and_says_where() {
    let orders = [("forwards", BlockOrder::Forwards), ("backwards", BlockOrder::Backwards)];
    if let Ok(part) = std::env::var(PART) {
        let (_, order) = orders.into_iter().find(|(name, _)| *name == part).unwrap();
        descend(&device(1, order), Launch::new(3, 40), 100_000);
        panic!("{part}: the launch came back");
    }
    in_every_order(|device| {
        assert_eq!(descend(device, Launch::new(3, 40), 60), [60; 120]);
        // A block of one thread uses the stack of the OS thread.
        assert_eq!(descend(device, Launch::new(3, 1), 400), [400; 3]);
    });
    for ((part, _), place) in orders.into_iter().zip(["block (0,0,0) thread (0,0,0)", "block (2,0,0) thread (39,0,0)"])
    {
        let (status, output, error) = run_alone("a_stack_overflow_ends_the_process_and_says_where", &[(PART, part)]);
        assert_eq!(status.code(), Some(134), "{output}\n{error}");
        let line = format!("polder: kernel selftest_stack_overflow: {place}: stack overflow of a fiber");
        assert!(error.lines().any(|found| found.starts_with(&line)), "{error}");
    }
}

#[test]
fn instruction_sets_agree() {
    let device = device(2, BlockOrder::Forwards);
    let arguments = arguments();
    let halves = convert(&device, Launch::new(64, 1), &values_to_round());
    let math: Vec<u32> = map(&device, id::SELFTEST_MATH, Launch::new(16, 1), &arguments, 10 * arguments.len()).unwrap();
    let sums = block_sum(&device, id::SELFTEST_BLOCK_SUM_SHUFFLE, Launch::new(6, 256), &random_f32(1500, 15));
    // NaNs may differ in sign and payload, which are not guaranteed.
    let quiet = |bits: u32| if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits };
    let back = halves.from_f16.iter().chain(&halves.from_bf16).map(|x| x.to_bits());
    let all = back.chain(math).chain(sums).map(quiet).chain(halves.f16.iter().chain(&halves.bf16).map(|&x| x.into()));
    let digest = all.fold(0xcbf2_9ce4_8422_2325u64, |digest, bits| {
        (digest ^ u64::from(bits)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
    });
    let line = format!("digest {digest:016x}");
    if std::env::var_os(PART).is_some() {
        println!("\n{line}\n{}", device.description());
        return;
    }
    if super::registry::HOST.len() == 1 {
        println!("skipped: built for one instruction set");
        return;
    }
    let oldest = super::registry::HOST[0].0;
    let (status, output, error) = run_alone("instruction_sets_agree", &[(PART, "digest"), ("POLDER_ISA", oldest)]);
    assert!(status.success(), "{output}\n{error}");
    assert!(output.contains(&format!("{oldest} kernels")), "{output}");
    assert!(output.lines().any(|found| found == line), "here {line}, there {output}");
}
