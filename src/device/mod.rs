//! Devices: memory, launches, timing and graphs, the same for the CPU and for CUDA.
//!
//! A [`Device`] is a cheap handle. Work runs in the order of the calls (one stream), so a kernel sees what the previous
//! one wrote. A GPU may run two independent passes at the same time, with the same results. On the CPU a launch has
//! finished when the call returns. On a GPU, [`Device::synchronize`], [`Buffer::read`] and [`Event::elapsed_since`]
//! wait.

pub(crate) mod arguments;
mod buffer;
pub(crate) mod constants;
mod cores;
mod cuda;
mod error;
mod host;
mod registry;
#[cfg(test)]
pub(crate) mod selftest;

use std::fmt;
use std::sync::Arc;

pub(crate) use buffer::check_length;
pub use buffer::{Buffer, Disjoint, Slice, SliceMut};
pub use error::{Error, Result};
pub use host::{BlockOrder, HostOptions, ThreadPool};
pub(crate) use registry::{Kernel, id};

use arguments::Arguments;
use cuda::CudaDevice;
use host::HostDevice;

/// A type that device memory can hold: plain data for which every pattern of bits is valid.
pub trait Element: bytemuck::Pod + Send + Sync {}
impl<T: bytemuck::Pod + Send + Sync> Element for T {}

/// A type in which activations are stored: `f32`, [`Tf32`], [`Bf16x3`], [`Bf16x6`], `half::f16` and `half::bf16` on
/// every device, `f64` on the CPU only.
pub trait Compute: Element + fmt::Debug + PartialOrd {
    /// The type of sums and of master weights.
    type Master: Scalar;
    /// The type's name, such as `bf16`.
    const NAME: &'static str;
    /// Whether the type is smaller than its master.
    const NARROW: bool = size_of::<Self>() < size_of::<Self::Master>();
    /// Whether a GPU multiplies this type on its tensor cores.
    const TENSOR_CORES: bool;
    /// The bf16 numbers whose sum stands for a factor of a convolution's product; 0 if the factor itself is multiplied.
    const PIECES: usize = 0;
    /// Whether the exponent range is so small that gradients need a loss scale.
    const SCALES_LOSS: bool;
    /// Rounds a double to this type.
    fn from_f64(value: f64) -> Self;
    /// Converts to double, exactly.
    fn to_f64(self) -> f64;
    #[doc(hidden)]
    fn choose<A>(kernels: ComputeKernels<A>) -> Kernel<A>;
}

/// The floating-point type of weights and of an optimizer's vectors: `f32` on every device, `f64` on the CPU only,
/// where it makes gradient checks precise.
pub trait Scalar: Compute<Master = Self> + Default + Into<f64> {}

/// The versions of one kernel for the different types.
#[doc(hidden)]
pub struct ComputeKernels<A> {
    pub(crate) f32: Kernel<A>,
    pub(crate) f64: Kernel<A>,
    pub(crate) f16: Kernel<A>,
    pub(crate) bf16: Kernel<A>,
}

impl<A> Clone for ComputeKernels<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for ComputeKernels<A> {}

impl Compute for f32 {
    type Master = f32;
    const NAME: &'static str = "f32";
    const TENSOR_CORES: bool = false;
    const SCALES_LOSS: bool = false;
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn choose<A>(kernels: ComputeKernels<A>) -> Kernel<A> {
        kernels.f32
    }
}

impl Compute for f64 {
    type Master = f64;
    const NAME: &'static str = "f64";
    const TENSOR_CORES: bool = false;
    const SCALES_LOSS: bool = false;
    fn from_f64(value: f64) -> Self {
        value
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn choose<A>(kernels: ComputeKernels<A>) -> Kernel<A> {
        kernels.f64
    }
}

impl Compute for half::f16 {
    type Master = f32;
    const NAME: &'static str = "f16";
    const TENSOR_CORES: bool = true;
    const SCALES_LOSS: bool = true;
    fn from_f64(value: f64) -> Self {
        half::f16::from_f32(round_to_odd(value))
    }
    fn to_f64(self) -> f64 {
        half::f16::to_f64(self)
    }
    fn choose<A>(kernels: ComputeKernels<A>) -> Kernel<A> {
        kernels.f16
    }
}

impl Compute for half::bf16 {
    type Master = f32;
    const NAME: &'static str = "bf16";
    const TENSOR_CORES: bool = true;
    const PIECES: usize = 1;
    const SCALES_LOSS: bool = false;
    fn from_f64(value: f64) -> Self {
        half::bf16::from_f32(round_to_odd(value))
    }
    fn to_f64(self) -> f64 {
        half::bf16::to_f64(self)
    }
    fn choose<A>(kernels: ComputeKernels<A>) -> Kernel<A> {
        kernels.bf16
    }
}

/// Rounds to odd: the last bit of the result is set if the conversion is inexact. Rounding the result to 16 bits then
/// gives the same number as rounding the value itself. (`half`'s own conversions read only 20 bits of the mantissa.)
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || value.is_nan() {
        return nearest;
    }
    let below = nearest.to_bits() - u32::from(back.abs() > value.abs());
    f32::from_bits(below | 1)
}

/// Types that store a float and differ from `f32` in how a convolution multiplies it.
macro_rules! floats {
    ($($(#[$doc:meta])* $name:ident: $text:literal, $tensor_cores:literal, $pieces:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
        #[repr(transparent)]
        pub struct $name(pub f32);

        // SAFETY: a float; all bits zero is a valid value.
        unsafe impl bytemuck::Zeroable for $name {}
        // SAFETY: a float; it has no padding, and every pattern of bits is valid.
        unsafe impl bytemuck::Pod for $name {}

        impl Compute for $name {
            type Master = f32;
            const NAME: &'static str = $text;
            const TENSOR_CORES: bool = $tensor_cores;
            const PIECES: usize = $pieces;
            const SCALES_LOSS: bool = false;
            fn from_f64(value: f64) -> Self {
                Self(value as f32)
            }
            fn to_f64(self) -> f64 {
                f64::from(self.0)
            }
            fn choose<A>(kernels: ComputeKernels<A>) -> Kernel<A> {
                kernels.f32
            }
        }
    )*};
}

floats! {
    /// A float that a GPU's tensor cores round to TF32 (10 bits of fraction) when a convolution multiplies it. All
    /// other arithmetic, and all arithmetic on the CPU, is that of `f32`.
    Tf32: "tf32", true, 0;
    /// A float that a convolution multiplies as the sum of two bf16 numbers, which together hold 16 bits: three
    /// products of bf16, summed in f32. The product of the two small parts is left out. All other arithmetic is that of
    /// `f32`.
    Bf16x3: "bf16x3", true, 2;
    /// A float that a convolution multiplies as the sum of three bf16 numbers, which together hold all its 24 bits: six
    /// products of bf16, summed in f32. The products below the last bit are left out. All other arithmetic is that of
    /// `f32`.
    Bf16x6: "bf16x6", true, 3;
}

impl Scalar for f32 {}
impl Scalar for f64 {}

/// Why an operation fails inside [`Device::both`].
const ONE_OF_TWO: &str = "not allowed while two streams run concurrently: only launches, copies and clears are";

/// The shape of a launch: blocks, threads per block (at most 256 in all), and bytes of dynamic shared memory per block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared: usize,
}

impl Launch {
    /// A one-dimensional launch without shared memory.
    pub fn new(grid: u32, block: u32) -> Self {
        Self { grid: [grid, 1, 1], block: [block, 1, 1], shared: 0 }
    }

    /// The same launch with dynamic shared memory.
    pub fn with_shared(self, bytes: usize) -> Self {
        Self { shared: bytes, ..self }
    }
}

/// A device: the CPU or one GPU. A clone is another handle of the same device.
#[derive(Clone)]
pub struct Device(Inner);

#[derive(Clone)]
enum Inner {
    Host(Arc<HostDevice>),
    Cuda(Arc<CudaDevice>),
}

impl Device {
    /// The CPU with every core it has.
    pub fn host() -> Self {
        Self::host_with(HostOptions::default())
    }

    /// The CPU with chosen threads, order of blocks and launch shapes.
    pub fn host_with(options: HostOptions) -> Self {
        Self(Inner::Host(Arc::new(HostDevice::new(options, None))))
    }

    /// The CPU with the threads of the caller, about `threads` of them. A program that has a team of threads for its
    /// own work lends it, so that the two do not wait for each other. The calling thread does what the pool leaves
    /// over. The bits do not depend on the threads.
    pub fn host_on(threads: usize, pool: ThreadPool) -> Self {
        let options = HostOptions { threads, ..HostOptions::default() };
        Self(Inner::Host(Arc::new(HostDevice::new(options, Some(pool)))))
    }

    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is no CUDA driver or no such GPU, or if this binary was built without nvcc.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self(Inner::Cuda(CudaDevice::new(ordinal)?)))
    }

    /// GPU number `ordinal`, with its work on a stream of the caller: the one that the caller's own kernels run on. So
    /// work here follows the work that is already on the stream, and later work there follows the work here, without
    /// waiting. Memory of the caller is borrowed with [`Slice::from_raw`]. On the CPU a call has finished when it
    /// returns, so [`Device::host_with`] needs nothing but the number of threads.
    ///
    /// The GPU's settings stay as they are: the memory pool keeps its release threshold, and no kernel is launched
    /// before the one in front of it has ended, because that may be the caller's.
    ///
    /// # Errors
    /// As [`Device::cuda`].
    ///
    /// # Safety
    /// - `stream` is a `CUstream` (or `cudaStream_t`) of the GPU's primary context, or null for its default stream.
    /// - It stays alive until the device, its clones and everything made from them (buffers, events, graphs) is
    ///   dropped.
    /// - While its owner captures it as a graph, nothing here may allocate, free, read back or wait.
    pub unsafe fn adopt(ordinal: usize, stream: *mut std::ffi::c_void) -> Result<Self> {
        // SAFETY: the caller's.
        Ok(Self(Inner::Cuda(unsafe { CudaDevice::adopt(ordinal, stream) }?)))
    }

    /// The first GPU. The CPU with these options if there is no CUDA driver or no GPU, or if this binary was built
    /// without nvcc; [`no_gpu`] tells which.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for a GPU that is there and cannot be used: a driver that is too old, a GPU that another
    /// process has reserved, kernels that it cannot load.
    pub fn auto(options: HostOptions) -> Result<Self> {
        match cuda::count() {
            Err(cuda::NoGpu::Absent(_)) => Ok(Self::host_with(options)),
            _ => Self::cuda(0),
        }
    }

    /// The device of that name: `cpu`, `cuda`, `cuda:N`, or `auto` (as [`Device::auto`] with the default options).
    ///
    /// # Errors
    /// [`Error::Unavailable`] for an unknown name, an absent device, or a GPU that cannot be used.
    pub fn from_name(name: &str) -> Result<Self> {
        let unknown =
            || Error::Unavailable { device: name.into(), reason: "expected auto, cpu, cuda or cuda:N".into() };
        match name {
            "cpu" => Ok(Self::host()),
            "auto" => Self::auto(HostOptions::default()),
            "cuda" => Self::cuda(0),
            _ => Self::cuda(name.strip_prefix("cuda:").ok_or_else(unknown)?.parse().map_err(|_| unknown())?),
        }
    }

    /// `cpu` or `cuda:N`.
    pub fn name(&self) -> String {
        match &self.0 {
            Inner::Host(_) => "cpu".into(),
            Inner::Cuda(cuda) => format!("cuda:{}", cuda.ordinal()),
        }
    }

    /// The device's number in this process: 0 for the CPU.
    pub(crate) fn number(&self) -> usize {
        match &self.0 {
            Inner::Host(_) => 0,
            Inner::Cuda(cuda) => 1 + cuda.ordinal(),
        }
    }

    /// The name of the GPU or of the processor; `cpu` where the system does not tell it.
    pub fn chip(&self) -> &str {
        match &self.0 {
            Inner::Host(_) => host::processor().unwrap_or("cpu"),
            Inner::Cuda(cuda) => cuda.chip(),
        }
    }

    /// A line for people: the chip, with its threads and instruction set, or its memory and multiprocessors.
    pub fn description(&self) -> String {
        match &self.0 {
            Inner::Host(host) => host.description(),
            Inner::Cuda(cuda) => cuda.description(),
        }
    }

    /// Whether this is the CPU.
    pub fn is_host(&self) -> bool {
        matches!(self.0, Inner::Host(_))
    }

    /// Whether this is a CPU with matrix units (AMX) that kernels use. They compute convolutions in [`Bf16x3`],
    /// [`Bf16x6`] and bf16. On another CPU the first two have the same bits, by vector code that is several times
    /// slower than f32, and bf16 is computed as f32.
    pub fn has_matrix_units(&self) -> bool {
        matches!(&self.0, Inner::Host(host) if host.has_matrix_units())
    }

    /// Whether kernels are launched with many threads per block: on a GPU, and on a CPU that emulates one.
    pub(crate) fn is_simt(&self) -> bool {
        match &self.0 {
            Inner::Host(host) => host.emulate_gpu(),
            Inner::Cuda(_) => true,
        }
    }

    /// The launch shape of a kernel over `n` elements in packs of `pack`. Neither depends on the number of cores or
    /// multiprocessors, so that sums have the same bits on all of them. On the CPU a block is one chunk. On a GPU there
    /// are at most as many blocks as fill 128 multiprocessors.
    pub(crate) fn elementwise(&self, n: usize, pack: usize) -> Launch {
        if self.is_simt() {
            let threads = n.div_ceil(pack).max(1);
            let full = match &self.0 {
                Inner::Host(_) => 4,
                Inner::Cuda(_) => 128 * 8,
            };
            return Launch::new(
                threads.div_ceil(constants::BLOCK_THREADS).min(full) as u32,
                constants::BLOCK_THREADS as u32,
            );
        }
        Launch::new((n / 16384).clamp(1, 64) as u32, 1)
    }

    /// Device memory for `len` elements, every byte zero.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Argument`] while a graph is captured.
    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::filled(self, len, 0)
    }

    /// Device memory for `len` elements, every byte 0xFF: a NaN in every floating-point type, which makes reads of
    /// unwritten memory visible.
    ///
    /// # Errors
    /// As [`Device::zeros`].
    pub fn poisoned<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        Buffer::filled(self, len, 0xFF)
    }

    /// A copy of `values` in device memory.
    ///
    /// # Errors
    /// As [`Device::zeros`].
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = Buffer::filled(self, values.len(), 0)?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// Waits until all work so far has finished.
    ///
    /// # Errors
    /// Those of the work, if any of it failed; [`Error::Argument`] while a graph is captured.
    pub fn synchronize(&self) -> Result<()> {
        match &self.0 {
            Inner::Host(host) => host.refuse_recording("synchronize", "a graph cannot wait for itself"),
            Inner::Cuda(cuda) => cuda.synchronize(),
        }
    }

    /// A point in the device's work, for timing.
    ///
    /// # Errors
    /// [`Error::Argument`] while a graph is captured.
    pub fn event(&self) -> Result<Event> {
        match &self.0 {
            Inner::Host(host) => {
                host.refuse_recording("event", "a graph cannot be timed from inside")?;
                Ok(Event(EventInner::Host(std::time::Instant::now())))
            }
            Inner::Cuda(cuda) => Ok(Event(EventInner::Cuda(cuda.event()?))),
        }
    }

    /// Records the operations of `work`, without running them, for [`RecordedGraph::replay`]. The numbers and addresses
    /// that it passes are fixed in the recording; memory at the addresses is read at each replay.
    ///
    /// # Errors
    /// Those of `work`. Inside `work`, allocating, reading back, waiting, timing, and capturing or replaying a graph
    /// fail. Other threads should not use the device meanwhile: their operations would be recorded too.
    ///
    /// A buffer that is dropped while the device has a graph keeps its memory until the last graph is dropped, because
    /// a replay may still use it.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<RecordedGraph> {
        match &self.0 {
            Inner::Host(host) => Ok(RecordedGraph(RecordedGraphInner::Host(HostDevice::capture(host, work)?))),
            Inner::Cuda(cuda) => Ok(RecordedGraph(RecordedGraphInner::Cuda(CudaDevice::capture(cuda, work)?))),
        }
    }

    /// Calls `work(0)` and `work(1)`, whose launches, copies and fills a GPU runs concurrently. Neither may use memory
    /// that the other writes, except through atomics. Later work waits for both. Inside, allocating, writing from the
    /// host, reading back, waiting and timing fail, and no buffer may be dropped. On the CPU, the order of blocks
    /// decides which runs first.
    pub(crate) fn both(&self, work: impl FnMut(usize) -> Result<()>) -> Result<()> {
        match &self.0 {
            Inner::Host(host) => host.both(work),
            Inner::Cuda(cuda) => cuda.both(work),
        }
    }

    /// Whether a graph is being captured.
    pub(crate) fn is_recording(&self) -> bool {
        match &self.0 {
            Inner::Host(host) => host.is_recording(),
            Inner::Cuda(cuda) => cuda.is_recording(),
        }
    }

    /// Whether dropped memory is kept because a graph on a GPU may still use it.
    pub(crate) fn holds_memory(&self) -> bool {
        match &self.0 {
            Inner::Host(_) => false,
            Inner::Cuda(cuda) => cuda.has_graphs(),
        }
    }

    /// Whether a GPU has this much memory free; always true on the CPU.
    pub(crate) fn has_free(&self, bytes: usize) -> Result<bool> {
        match &self.0 {
            Inner::Host(_) => Ok(true),
            Inner::Cuda(cuda) => Ok(cuda.free_bytes()? >= bytes),
        }
    }

    /// Launches a kernel with its one argument struct.
    ///
    /// # Safety
    /// Every address in `args` must be valid on this device for all that the kernel reads and writes at this shape.
    pub(crate) unsafe fn launch<A: Arguments>(&self, kernel: Kernel<A>, shape: Launch, args: &A) -> Result<()> {
        match &self.0 {
            // SAFETY: the caller vouches for the arguments.
            Inner::Host(host) => unsafe { host.launch(kernel.id, shape, args) },
            // SAFETY: as above.
            Inner::Cuda(cuda) => unsafe { cuda.launch(kernel.id, shape, args) },
        }
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Inner::Host(a), Inner::Host(b)) => Arc::ptr_eq(a, b),
            (Inner::Cuda(a), Inner::Cuda(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name())
    }
}

/// A point in a device's work. On the CPU, where work is done when a call returns, it has passed.
pub struct Event(EventInner);

enum EventInner {
    Host(std::time::Instant),
    Cuda(cuda::CudaEvent),
}

impl Event {
    /// Waits until the work before this point is done.
    ///
    /// # Errors
    /// Those of the work.
    pub fn wait(&self) -> Result<()> {
        match &self.0 {
            EventInner::Host(_) => Ok(()),
            EventInner::Cuda(event) => event.wait(),
        }
    }

    /// Seconds of device time from `earlier` to this point; waits for both.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] for an event of another device; those of the device's work.
    pub fn elapsed_since(&self, earlier: &Event) -> Result<f64> {
        match (&self.0, &earlier.0) {
            (EventInner::Host(end), EventInner::Host(start)) => Ok((*end - *start).as_secs_f64()),
            (EventInner::Cuda(end), EventInner::Cuda(start)) => end.elapsed_since(start),
            _ => Err(Error::OtherDevice { operation: "Event::elapsed_since", argument: "earlier" }),
        }
    }
}

/// Recorded work, replayed with one call.
pub struct RecordedGraph(RecordedGraphInner);

enum RecordedGraphInner {
    Host(host::HostGraph),
    Cuda(cuda::CudaGraph),
}

impl RecordedGraph {
    /// Runs the recorded work, in order with all other work on the device.
    ///
    /// # Errors
    /// Those of the work; [`Error::Argument`] while another graph is captured.
    pub fn replay(&self) -> Result<()> {
        match &self.0 {
            RecordedGraphInner::Host(graph) => graph.replay(|| {}),
            RecordedGraphInner::Cuda(graph) => graph.replay(),
        }
    }

    /// Runs the recorded work like [`replay`](Self::replay), and returns the seconds that each operation took, in the
    /// order of [`list`](Self::list).
    ///
    /// # Errors
    /// Those of [`replay`](Self::replay); [`Error::Argument`] for a GPU's graph, whose operations overlap.
    pub fn replay_timed(&self) -> Result<Vec<f64>> {
        match &self.0 {
            RecordedGraphInner::Host(graph) => {
                let mut seconds = Vec::with_capacity(graph.operations());
                let mut last = std::time::Instant::now();
                graph.replay(|| {
                    let now = std::time::Instant::now();
                    seconds.push((now - last).as_secs_f64());
                    last = now;
                })?;
                Ok(seconds)
            }
            RecordedGraphInner::Cuda(_) => {
                let message = "the operations of a GPU's graph overlap".into();
                Err(Error::Argument { operation: "RecordedGraph::replay_timed", message })
            }
        }
    }

    /// How many operations (launches, copies, fills) one replay performs.
    pub fn operations(&self) -> usize {
        match &self.0 {
            RecordedGraphInner::Host(graph) => graph.operations(),
            RecordedGraphInner::Cuda(graph) => graph.operations(),
        }
    }

    /// The operations of one replay, in order: names of kernels, `copy`, `clear` and `write`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a GPU's graph: the driver keeps no names. A CPU that emulates a GPU records the same
    /// operations.
    pub fn list(&self) -> Result<Vec<String>> {
        match &self.0 {
            RecordedGraphInner::Host(graph) => Ok(graph.list()),
            RecordedGraphInner::Cuda(_) => {
                let message = "a GPU's graph does not keep the names of its kernels".into();
                Err(Error::Argument { operation: "RecordedGraph::list", message })
            }
        }
    }
}

/// The devices that this binary could use here: `(name, description or the reason why it cannot)`.
pub fn available() -> Vec<(String, std::result::Result<String, String>)> {
    let mut devices = vec![("cpu".to_string(), Ok(Device::host().description()))];
    match cuda::count() {
        Ok(count) => {
            for ordinal in 0..count {
                let described = Device::cuda(ordinal).map(|device| device.description()).map_err(|e| e.to_string());
                devices.push((format!("cuda:{ordinal}"), described));
            }
        }
        Err(why) => devices.push(("cuda".into(), Err(why.reason()))),
    }
    devices
}

/// Why there is no GPU to use, in one line; `None` if there is one.
pub fn no_gpu() -> Option<String> {
    cuda::count().err().map(cuda::NoGpu::reason)
}
