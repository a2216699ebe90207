//! A CUDA GPU as a device: the driver (found at run time), memory, copies, launches, events and graphs.
//!
//! A device has one stream, so work runs in the order of the calls. A second one, the side stream, runs the second of
//! two pieces of work concurrently ([`CudaDevice::both`]). Host memory reaches the GPU through a small page-locked area
//! ([`Staging`]): a write copies into it and returns, so that the caller can reuse its slice and the CPU runs ahead of
//! the GPU.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute};
use cudarc::driver::{self, CudaContext, CudaFunction, CudaModule, CudaStream};
use cudarc::nvrtc::Ptx;

use super::arguments::FillArgs;
use super::registry::{CUDA_VERSION, FATBINS, HOST_ONLY, KernelId, NAMES, id};
use super::{Error, Launch, Result};

/// The oldest driver, numbered as by `cuDriverGetVersion`. Timing needs `cuEventElapsedTime_v2`, which is new in CUDA
/// 12.8. Machine code needs a driver for the major version of the nvcc that made it.
const OLDEST_DRIVER: i32 = if CUDA_VERSION > 12_080 { CUDA_VERSION / 1000 * 1000 } else { 12_080 };

/// Why there is no GPU to use.
#[derive(Debug, Clone)]
pub(super) enum NoGpu {
    /// There is no driver, it finds no GPU, or this binary has no kernels for one.
    Absent(String),
    /// There is one, but something is wrong with it.
    Broken(String),
}

impl NoGpu {
    /// In one line.
    pub(super) fn reason(self) -> String {
        match self {
            Self::Absent(reason) | Self::Broken(reason) => reason,
        }
    }
}

/// The number of GPUs, at least one.
pub(super) fn count() -> std::result::Result<usize, NoGpu> {
    let found = driver_version().and_then(|_| {
        match result::device::get_count().map_err(|error| NoGpu::Broken(describe(error)))? {
            count if count <= 0 => Err(NoGpu::Absent("the CUDA driver finds no GPU".into())),
            count => Ok(count as usize),
        }
    });
    if FATBINS.is_empty() {
        let also = found.err().map(|why| format!("; {}", why.reason())).unwrap_or_default();
        return Err(NoGpu::Absent(format!("this binary was built without nvcc, so it has no GPU kernels{also}")));
    }
    found
}

/// Loads and initialises the driver once. Returns its CUDA version, such as 13000, or the reason why there is none.
fn driver_version() -> std::result::Result<i32, NoGpu> {
    static VERSION: OnceLock<std::result::Result<i32, NoGpu>> = OnceLock::new();
    let start = || {
        // It must come first: every other call panics if the library is absent.
        if !driver_is_present() {
            return Err(NoGpu::Absent("the CUDA driver library (libcuda) was not found".into()));
        }
        let mut version = 0;
        // SAFETY: `version` is an int to write to; the call needs no initialisation.
        let asked = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
        asked.map_err(|error| NoGpu::Broken(describe(error)))?;
        match result::init() {
            Ok(()) if version < OLDEST_DRIVER => {
                let (found, needed) = (version_name(version), version_name(OLDEST_DRIVER));
                let reason = format!("the CUDA driver is too old: it is for CUDA {found}, {needed} is needed");
                Err(NoGpu::Broken(reason))
            }
            Ok(()) => Ok(version),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
                Err(NoGpu::Absent("the CUDA driver finds no GPU".into()))
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_STUB_LIBRARY)) => {
                Err(NoGpu::Absent("the CUDA driver library is a toolkit's, for linking only".into()))
            }
            Err(error) => Err(NoGpu::Broken(format!("the CUDA driver cannot start: {}", describe(error)))),
        }
    };
    VERSION.get_or_init(start).clone()
}

/// Whether the driver's library can be loaded, by the names under which cudarc looks for it. Where another crate has
/// linked it, it is there already.
fn driver_is_present() -> bool {
    let names = if cfg!(windows) { &["nvcuda.dll"][..] } else { &["libcuda.so", "libcuda.so.1"] };
    // SAFETY: this loads libcuda and runs its initialisers, which we trust as we trust the driver.
    names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok())
}

/// `13.0` for 13000.
fn version_name(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The driver's text for an error, and the error's name, for searching.
fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// Turns a driver's error into ours. `call` names the operation.
fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| match is_of_earlier_kernel(error) {
        true => Error::Lost { message: describe(error) },
        false => Error::Cuda { call, message: describe(error) },
    }
}

/// Whether a kernel that was launched before the call has failed. The context cannot be used any more then.
fn is_of_earlier_kernel(error: DriverError) -> bool {
    use sys::CUresult::*;
    matches!(
        error.0,
        CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
    )
}

/// A GPU with its stream and its kernels.
pub(super) struct CudaDevice {
    ordinal: usize,
    chip: String,
    description: String,
    context: Arc<CudaContext>,
    pool: Pool,
    stream: Arc<CudaStream>,
    /// For the second of two pieces of work. After each such pair the first stream waits for this one.
    side: Arc<CudaStream>,
    /// For the first stream and the side stream: whether the last operation is not a kernel of that stream. It may be
    /// work of the other stream, a copy, a graph, or the beginning of a capture. Locked while an operation is enqueued.
    after_non_kernel: [Mutex<bool>; 2],
    /// Indexed by [`KernelId`]; `None` for a kernel that exists on the CPU only.
    kernels: Vec<Option<LoadedKernel>>,
    state: Mutex<DeviceState>,
}

thread_local! {
    /// The device whose side stream receives this thread's work.
    static ON_SIDE: Cell<*const CudaDevice> = const { Cell::new(ptr::null()) };
}

/// Work on the side stream. When it is dropped, also after an error or a panic, this thread's work returns to the first
/// stream, and that stream waits for the side stream. This is necessary because memory is freed in the order of the
/// first stream, and because a capture must not end with an unjoined branch.
struct Branch<'a> {
    device: &'a CudaDevice,
    joined: bool,
}

impl<'a> Branch<'a> {
    fn begin(device: &'a CudaDevice) -> Result<Self> {
        device.enqueue_non_kernel(1, || device.side.join(&device.stream)).map_err(failed("forking the side stream"))?;
        Ok(Self { device, joined: false })
    }

    fn end(mut self) -> Result<()> {
        self.joined = true;
        self.device.join_side()
    }
}

impl Drop for Branch<'_> {
    fn drop(&mut self) {
        ON_SIDE.set(ptr::null());
        if !self.joined {
            // Report the error or the panic that ended the work, not this one.
            let _ = self.device.join_side();
        }
    }
}

/// The mutable state of a device.
struct DeviceState {
    staging: Staging,
    /// The memory that the graph being captured must own; `None` when no capture is active.
    recording: Option<Recording>,
    /// Memory of dropped graphs, which a replay may still be reading. It is freed after the next synchronisation.
    retired: Vec<Pinned>,
    /// The number of graphs, including one that is being captured.
    graphs: usize,
    /// Device memory that was dropped while there were graphs, which may still use it. It is freed with the last graph.
    held: Vec<sys::CUdeviceptr>,
}

/// Host memory of a graph that is being captured.
#[derive(Default)]
struct Recording {
    /// The bytes of recorded writes.
    written: Vec<Pinned>,
}

impl DeviceState {
    /// Fails while a graph is being captured.
    fn refuse_recording(&self, operation: &'static str, message: &str) -> Result<()> {
        match self.recording {
            None => Ok(()),
            Some(_) => Err(Error::Argument { operation, message: message.into() }),
        }
    }
}

/// A kernel's function on this GPU.
struct LoadedKernel {
    function: CudaFunction,
    /// The largest dynamic shared memory that it may currently be launched with.
    shared_limit: AtomicUsize,
    /// Whether it may be launched before the previous kernel is done. Such a kernel waits at its beginning.
    early: bool,
}

/// The first virtual architecture for which kernels wait at their beginning for the previous one (`polder_begin` in
/// `kernels/include/polder.cuh`).
const WAITS_FROM: i32 = 90;

/// Whether kernels may be launched early. `POLDER_EARLY_LAUNCH=0` forbids it, to measure the gain or to work around a
/// faulty driver.
fn early_launch() -> bool {
    std::env::var("POLDER_EARLY_LAUNCH").map_or(true, |value| value != "0")
}

impl CudaDevice {
    pub(super) fn new(ordinal: usize) -> Result<Arc<Self>> {
        let mut device = Arc::new(Self::find(ordinal, None)?);
        match Self::try_early_launch(&device) {
            Err(refused @ (Error::Cuda { .. } | Error::Launch { .. })) => {
                let found = Arc::get_mut(&mut device).expect("the memory and the graph of the try are dropped");
                found.kernels.iter_mut().flatten().for_each(|kernel| kernel.early = false);
                found.description += &format!("; kernels are not launched early ({refused})");
                Ok(device)
            }
            tried => tried.map(|()| device),
        }
    }

    /// # Safety
    /// As [`super::Device::adopt`].
    pub(super) unsafe fn adopt(ordinal: usize, stream: *mut c_void) -> Result<Arc<Self>> {
        Ok(Arc::new(Self::find(ordinal, Some(stream.cast()))?))
    }

    /// Records two kernels, of which the second is launched early, and replays them. Recorded steps need this, and a
    /// driver may refuse it.
    fn try_early_launch(this: &Arc<Self>) -> Result<()> {
        let kernel = id::FILL_F32;
        if !this.kernels[kernel.id.0].as_ref().is_some_and(|kernel| kernel.early) {
            return Ok(());
        }
        let memory = CudaMemory::filled(this, size_of::<f32>(), 0)?;
        let args = FillArgs { out: memory.address(), n: 1, value: 1.0 };
        // SAFETY: the memory is one float.
        let launch = || unsafe { this.launch(kernel.id, Launch::new(1, 32), &args) };
        let graph = Self::capture(this, || launch().and_then(|()| launch()))?;
        graph.replay()?;
        this.synchronize()
    }

    /// A GPU, with a stream of its own or with one whose owner vouches for it.
    fn find(ordinal: usize, adopted: Option<sys::CUstream>) -> Result<Self> {
        let unavailable = |reason| Error::Unavailable { device: format!("cuda:{ordinal}"), reason };
        let count = count().map_err(|why| unavailable(why.reason()))?;
        if ordinal >= count {
            let reason = if count == 1 { "there is one GPU, cuda:0".into() } else { format!("there are {count} GPUs") };
            return Err(unavailable(reason));
        }
        Self::open(ordinal, adopted).map_err(unavailable)
    }

    /// Opens the GPU, or returns the reason why that fails.
    fn open(ordinal: usize, adopted: Option<sys::CUstream>) -> std::result::Result<Self, String> {
        let version = version_name(driver_version().map_err(NoGpu::reason)?);
        let context = CudaContext::new(ordinal).map_err(describe)?;
        if !context.has_async_alloc() {
            return Err("it has no stream-ordered memory pools".into());
        }
        // SAFETY: event tracking is for `CudaSlice`, which is never used here.
        unsafe { context.disable_event_tracking() };
        let stream = match adopted {
            // SAFETY: the stream's owner vouches for it.
            Some(stream) => unsafe { context.wrap_borrowed_stream(stream) },
            None => context.new_stream().map_err(describe)?,
        };
        let side = context.new_stream().map_err(describe)?;
        // Whoever lends a stream lends the memory of the process, too.
        let pool = if adopted.is_none() { Pool::new(&context) } else { Pool::of_process(&context) };
        let pool = pool.map_err(describe)?;
        let staging = Staging::new(&context).map_err(describe)?;

        let (major, minor) = context.compute_capability().map_err(describe)?;
        // A foreign kernel may be in front of any launch. It is not known whether it may still be running then.
        let may_be_early = adopted.is_none() && early_launch();
        let kernels = load_kernels(&context, may_be_early).map_err(|reason| {
            format!("compute capability {major}.{minor} with a driver for CUDA {version}: {reason}")
        })?;

        let multiprocessors =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).map_err(describe)?;
        let name = context.name().map_err(describe)?;
        let memory = context.total_mem().map_err(describe)? as f64 / (1u64 << 30) as f64;
        let description = format!(
            "{name}, {memory:.1} GiB, {multiprocessors} multiprocessors, compute capability {major}.{minor}, driver \
             for CUDA {version}"
        );
        Ok(Self {
            ordinal,
            chip: name,
            description,
            context,
            pool,
            stream,
            side,
            after_non_kernel: [true, true].map(Mutex::new),
            kernels,
            state: Mutex::new(DeviceState {
                staging,
                recording: None,
                retired: Vec::new(),
                graphs: 0,
                held: Vec::new(),
            }),
        })
    }

    pub(super) fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub(super) fn chip(&self) -> &str {
        &self.chip
    }

    pub(super) fn description(&self) -> String {
        self.description.clone()
    }

    fn lock(&self) -> MutexGuard<'_, DeviceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the context current in the calling thread, as every call below needs. Also returns an error that a
    /// destructor could not return.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("using the GPU"))
    }

    /// The stream that receives the calling thread's work.
    fn current(&self) -> &CudaStream {
        if self.is_on_side() { &self.side } else { &self.stream }
    }

    fn is_on_side(&self) -> bool {
        ptr::eq(ON_SIDE.get(), self)
    }

    /// Locks the order in which operations are enqueued on a stream.
    fn order(&self, stream: usize) -> MutexGuard<'_, bool> {
        self.after_non_kernel[stream].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enqueues an operation that is not a kernel on the first stream (0) or the side stream (1). The next kernel is
    /// then not launched early.
    fn enqueue_non_kernel<R>(&self, stream: usize, enqueue: impl FnOnce() -> R) -> R {
        let mut after_non_kernel = self.order(stream);
        *after_non_kernel = true;
        enqueue()
    }

    /// Fails on the side stream, for operations that need the order of the first stream.
    fn refuse_side(&self, operation: &'static str) -> Result<()> {
        match self.is_on_side() {
            false => Ok(()),
            true => Err(Error::Argument { operation, message: super::ONE_OF_TWO.into() }),
        }
    }

    fn join_side(&self) -> Result<()> {
        // First: otherwise an error that a destructor kept would be returned instead of the result of the join.
        let kept = self.bind();
        let joined =
            self.enqueue_non_kernel(0, || self.stream.join(&self.side)).map_err(failed("joining the side stream"));
        if joined.is_err() {
            // Memory that the side stream still uses must not be freed. (In a capture this fails, but the capture is
            // broken anyway.)
            let _ = self.side.synchronize();
        }
        kept.and(joined)
    }

    /// Whether a graph is being captured.
    pub(super) fn is_recording(&self) -> bool {
        self.lock().recording.is_some()
    }

    /// Whether there is a graph, or one is being captured. If so, dropped memory is kept.
    pub(super) fn has_graphs(&self) -> bool {
        self.lock().graphs > 0
    }

    /// Bytes of unused memory: free memory, and memory that the pool keeps for reuse.
    pub(super) fn free_bytes(&self) -> Result<usize> {
        self.bind()?;
        let asked = || -> std::result::Result<usize, DriverError> {
            let (untaken, _) = result::mem_get_info()?;
            let [reserved, used] = [
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
            ]
            .map(|attribute| {
                let mut bytes = 0u64;
                // SAFETY: the pool is alive, and both attributes are 64-bit integers.
                unsafe { result::mem_pool::get_attribute(self.pool.handle, attribute, (&raw mut bytes).cast())? };
                Ok(bytes as usize)
            });
            Ok(untaken + reserved?.saturating_sub(used?))
        };
        asked().map_err(failed("asking for free memory"))
    }

    /// Calls `work(0)`, then `work(1)` on the side stream, which begins at the same point. Later work waits for both.
    pub(super) fn both(&self, mut work: impl FnMut(usize) -> Result<()>) -> Result<()> {
        self.refuse_side("both")?;
        self.bind()?;
        let branch = Branch::begin(self)?;
        work(0)?;
        ON_SIDE.set(self);
        work(1)?;
        branch.end()
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.refuse_side("synchronize")?;
        let retired = {
            let mut state = self.lock();
            state.refuse_recording("synchronize", "a graph cannot wait for itself")?;
            std::mem::take(&mut state.retired)
        };
        let done = self.stream.synchronize().map_err(failed("waiting for the GPU"));
        drop(retired);
        done
    }

    pub(super) fn event(&self) -> Result<CudaEvent> {
        self.refuse_side("event")?;
        self.lock().refuse_recording("event", "a graph cannot be timed from inside")?;
        let event = self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT));
        Ok(CudaEvent(event.map_err(failed("recording an event"))?))
    }

    /// # Safety
    /// As [`super::Device::launch`].
    pub(super) unsafe fn launch<A: Copy>(&self, kernel: KernelId, shape: Launch, args: &A) -> Result<()> {
        let refused = |message| Error::Launch { kernel: kernel.to_name(), message };
        let Some(LoadedKernel { function, shared_limit, early }) = &self.kernels[kernel.0] else {
            return Err(refused("exists on the CPU only (double precision)".into()));
        };
        if shape.grid.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        if shape.shared > shared_limit.load(Ordering::Relaxed) {
            self.raise_shared_limit(function, shared_limit, shape.shared).map_err(refused)?;
        }
        let mut parameters = [(&raw const *args).cast_mut().cast::<c_void>()];
        let (grid, block) = (shape.grid, shape.block);
        // Programmatic dependent launch: blocks may start before the previous kernel is done, and wait for it.
        let mut order = self.order(usize::from(self.is_on_side()));
        let early = *early && !*order;
        let mut serialization = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: Default::default(),
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: shape.shared as u32,
            hStream: self.current().cu_stream(),
            attrs: &raw mut serialization,
            numAttrs: early.into(),
        };
        // SAFETY: the function belongs to a module that `self.kernels` keeps loaded. It takes one parameter, of the
        // type of `args`. The driver copies it, and the attribute, before the call returns. The caller guarantees that
        // the addresses in it are valid. A kernel that is launched early waits before it accesses memory.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function.cu_function(), parameters.as_mut_ptr(), ptr::null_mut())
        };
        match launched.result() {
            Ok(()) => {
                *order = false;
                Ok(())
            }
            Err(error) if is_of_earlier_kernel(error) => Err(failed("launching a kernel")(error)),
            Err(error) => {
                let Launch { grid, block, shared } = shape;
                let asked = format!("grid {grid:?}, block {block:?}, {shared} bytes of shared memory");
                Err(refused(format!("{}; {asked}", describe(error))))
            }
        }
    }

    /// Raises the limit of a kernel's dynamic shared memory. It is never lowered: another thread may be launching the
    /// kernel.
    #[cold]
    fn raise_shared_limit(
        &self,
        function: &CudaFunction,
        limit: &AtomicUsize,
        bytes: usize,
    ) -> std::result::Result<(), String> {
        let _one_at_a_time = self.lock();
        if bytes <= limit.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        let refused = |error| format!("{bytes} bytes of shared memory per block are refused: {}", describe(error));
        function.set_attribute(attribute, value).map_err(refused)?;
        limit.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Waits for all earlier work. Returns errors of earlier operations that only show now.
    ///
    /// # Safety
    /// `address` is the start of live device memory at least as long as `bytes`.
    pub(super) unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.refuse_side("read")?;
        let failed = failed("copying to the host");
        let mut state = self.lock();
        state.refuse_recording("read", "a graph cannot read back to the host")?;
        self.bind()?;
        let mut done = 0;
        while done < bytes.len() {
            let (place, length) = state.staging.take(&self.stream, bytes.len() - done).map_err(&failed)?;
            let source = address + done as u64;
            // SAFETY: `place` is `length` bytes of page-locked memory that no pending copy uses; the caller guarantees
            // the source.
            let copy = || unsafe { sys::cuMemcpyDtoHAsync_v2(place.cast(), source, length, self.stream.cu_stream()) };
            self.enqueue_non_kernel(0, copy).result().map_err(&failed)?;
            self.stream.synchronize().map_err(&failed)?;
            // SAFETY: the GPU has finished writing `place`; the destination is the next `length` bytes of `bytes`.
            unsafe { ptr::copy_nonoverlapping(place, bytes[done..].as_mut_ptr(), length) };
            done += length;
        }
        Ok(())
    }

    /// Returns before the GPU has the bytes. In a capture, the graph keeps a copy of them for its replays.
    ///
    /// # Safety
    /// `address` is the start of live device memory, borrowed exclusively, at least as long as `bytes`.
    pub(super) unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.refuse_side("write")?;
        let failed = failed("copying from the host");
        let mut state = self.lock();
        self.bind()?;
        let DeviceState { staging, recording, .. } = &mut *state;
        let mut done = 0;
        while done < bytes.len() {
            let (place, length) = match recording {
                None => staging.take(&self.stream, bytes.len() - done).map_err(&failed)?,
                Some(Recording { written, .. }) => {
                    let copy = Pinned::new(&self.context, bytes.len()).map_err(&failed)?;
                    let place = copy.address;
                    written.push(copy);
                    (place, bytes.len())
                }
            };
            // SAFETY: `place` is `length` bytes of page-locked memory that no pending copy uses, and does not overlap
            // `bytes`.
            unsafe { ptr::copy_nonoverlapping(bytes[done..].as_ptr(), place, length) };
            let destination = address + done as u64;
            // SAFETY: the bytes stay at `place` until the GPU has read them: staging memory is reused only after that,
            // and a graph owns its memory. The caller guarantees the destination.
            let copy =
                || unsafe { sys::cuMemcpyHtoDAsync_v2(destination, place.cast(), length, self.stream.cu_stream()) };
            self.enqueue_non_kernel(0, copy).result().map_err(&failed)?;
            done += length;
        }
        Ok(())
    }

    /// # Safety
    /// Both addresses are live device memory of at least `bytes`, and the two parts do not overlap.
    pub(super) unsafe fn copy(&self, source: u64, destination: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's; all memory of this device is used in the order of its streams.
        let copy = || unsafe { result::memcpy_dtod_async(destination, source, bytes, self.current().cu_stream()) };
        self.enqueue_non_kernel(usize::from(self.is_on_side()), copy).map_err(failed("copying on the GPU"))
    }

    /// # Safety
    /// `address` is the start of live device memory, borrowed exclusively, of at least `bytes`.
    pub(super) unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.fill(address, 0, bytes) }
    }

    /// # Safety
    /// `address` is the start of live device memory, borrowed exclusively, of at least `bytes`.
    unsafe fn fill(&self, address: u64, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's; any byte is valid in device memory, whose types are plain bits.
        let fill = || unsafe { result::memset_d8_async(address, byte, bytes, self.current().cu_stream()) };
        self.enqueue_non_kernel(usize::from(self.is_on_side()), fill).map_err(failed("filling memory on the GPU"))
    }

    /// Allocates uninitialised memory. The pool keeps freed memory for reuse. If too little is left, that memory is
    /// returned to the system and the allocation is tried again.
    fn allocate(&self, bytes: usize) -> Result<sys::CUdeviceptr> {
        self.refuse_side("allocate")?;
        let state = self.lock();
        state.refuse_recording("allocate", "a graph cannot allocate memory")?;
        self.bind()?;
        // SAFETY: the stream is ours and alive; the memory is filled before it is read.
        let allocate = || unsafe { result::mem_pool::alloc_async(self.pool.handle, bytes, self.stream.cu_stream()) };
        let allocated = match allocate() {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                self.stream.synchronize().map_err(failed("waiting for the GPU"))?;
                // SAFETY: the pool is alive; only unused memory leaves it.
                let trimmed = unsafe { result::mem_pool::trim_to(self.pool.handle, 0) };
                trimmed.map_err(failed("returning unused memory"))?;
                allocate()
            }
            other => other,
        };
        allocated.map_err(|error| match error {
            DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                Error::OutOfMemory { device: format!("cuda:{}", self.ordinal), bytes }
            }
            other => failed("allocating memory")(other),
        })
    }

    /// Frees device memory in the order of the stream. Destructors call this: an error is kept for the next call that
    /// can return one.
    fn free(&self, address: sys::CUdeviceptr) {
        debug_assert!(!self.is_on_side(), "the work on the other stream may be using it");
        // Locked until the memory is freed, so that no capture begins in between.
        let mut state = self.lock();
        match state.graphs {
            0 => self.free_in_order(address),
            _ => state.held.push(address),
        }
    }

    /// Removes a dropped graph, or one whose capture failed, from the count.
    fn forget_graph(&self, state: &mut DeviceState) {
        state.graphs -= 1;
        if state.graphs == 0 {
            state.held.drain(..).for_each(|address| self.free_in_order(address));
        }
    }

    fn free_in_order(&self, address: sys::CUdeviceptr) {
        // SAFETY: `allocate` returned the address on this stream, and the `CudaMemory` that owned it frees it once.
        // This stream has waited for uses on the side stream.
        let free = || unsafe { result::free_async(address, self.stream.cu_stream()) };
        self.context.record_err(self.context.bind_to_thread().and_then(|()| free()));
    }

    pub(super) fn capture(this: &Arc<Self>, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        let capture = Capture::begin(this)?;
        work()?;
        capture.finish()
    }

    /// Ends a capture. Returns the graph, or none if the capture was invalid, and the memory that the graph must own.
    fn end_capture(&self) -> (Result<Option<driver::CudaGraph>>, Recording) {
        let mut state = self.lock();
        // First: otherwise an error that a destructor kept would be returned instead of the result of the capture.
        let kept = self.bind();
        let ended = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(failed("capturing a graph"));
        let graph = kept.and(ended);
        // The launches since the beginning are in the graph: the last operation of the stream is not one of them.
        (0..2).for_each(|stream| self.enqueue_non_kernel(stream, || ()));
        (graph, state.recording.take().unwrap_or_default())
    }
}

impl Drop for CudaDevice {
    /// Waits, so that no kernel runs when its module is unloaded, and no copy when the staging memory is freed.
    fn drop(&mut self) {
        self.context.record_err(self.side.synchronize());
        self.context.record_err(self.stream.synchronize());
    }
}

/// Where device memory comes from.
struct Pool {
    handle: sys::CUmemoryPool,
    context: Arc<CudaContext>,
    is_own: bool,
}

// SAFETY: every thread may use the pool; its handle is only passed on to the driver.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// A pool of our own, which keeps freed memory. The process's pool returns it to the system at every
    /// synchronization, and each later allocation pays for mapping it again. If that one kept ours, others in the
    /// process could not get it.
    fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        // SAFETY: zeros are valid: they leave out every option.
        let mut properties: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        properties.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        // Headers differ in what they call the number behind the type.
        // SAFETY: a location is two 32-bit numbers, in every version.
        unsafe { (&raw mut properties.location).cast::<i32>().add(1).write(context.cu_device()) };
        // SAFETY: the properties are valid.
        let handle = unsafe { result::mem_pool::create(&raw const properties) }?;
        let pool = Self { handle, context: context.clone(), is_own: true };
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is alive, and the attribute's value is a 64-bit integer, read during the call.
        unsafe { result::mem_pool::set_attribute(handle, attribute, (&raw mut threshold).cast()) }?;
        Ok(pool)
    }

    /// The process's pool, as its owner has set it.
    fn of_process(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        // SAFETY: the device is the context's own.
        let handle = unsafe { result::device::get_default_mem_pool(context.cu_device()) }?;
        Ok(Self { handle, context: context.clone(), is_own: false })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.is_own {
            // SAFETY: the device has waited for its streams, so all memory of the pool has been freed.
            let destroy = || unsafe { result::mem_pool::destroy(self.handle) };
            self.context.record_err(self.context.bind_to_thread().and_then(|()| destroy()));
        }
    }
}

/// Loads every fatbin and looks up every kernel, so that launches need not.
fn load_kernels(
    context: &Arc<CudaContext>,
    may_be_early: bool,
) -> std::result::Result<Vec<Option<LoadedKernel>>, String> {
    let mut modules: Vec<Arc<CudaModule>> = Vec::with_capacity(FATBINS.len());
    for &(name, image) in FATBINS {
        // The driver requires images aligned to 8 bytes. A heap block of this size is aligned; the embedded bytes may
        // not be.
        let module = context.load_module(Ptx::from_binary(image.to_vec()));
        modules
            .push(module.map_err(|error| format!("the kernels of {name}.cu cannot be loaded: {}", describe(error)))?);
    }
    let find = |id: KernelId| {
        let name = id.to_name();
        let found = modules
            .iter()
            .map(|module| module.load_function(&name))
            .find(|found| !matches!(found, Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND))));
        let function = match found {
            Some(found) => found.map_err(|error| format!("kernel {name}: {}", describe(error)))?,
            None => return Err(format!("kernel {name} is in no fatbin of this binary")),
        };
        let ask = |attribute| {
            function.get_attribute(attribute).map_err(|error| format!("kernel {name}: {}", describe(error)))
        };
        let limit = ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)?;
        let early = may_be_early && ask(FunctionAttribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)? >= WAITS_FROM;
        Ok(LoadedKernel { function, shared_limit: AtomicUsize::new(usize::try_from(limit).unwrap_or(0)), early })
    };
    let ids = (0..NAMES.len()).map(KernelId);
    ids.map(|id| if HOST_ONLY[id.0] { Ok(None) } else { find(id).map(Some) }).collect()
}

/// Page-locked host memory, from and to which the GPU copies while the CPU continues. It is accessed only through its
/// address, because the GPU writes to it too.
struct Pinned {
    context: Arc<CudaContext>,
    address: *mut u8,
}

// SAFETY: it owns its memory, which every thread may use.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Uninitialised memory of `bytes` (more than zero).
    fn new(context: &Arc<CudaContext>, bytes: usize) -> std::result::Result<Self, DriverError> {
        context.bind_to_thread()?;
        // SAFETY: the memory is written before it is read.
        let address = unsafe { result::malloc_host(bytes, 0) }?;
        Ok(Self { context: context.clone(), address: address.cast() })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: `malloc_host` returned it, and it is freed once; its owner drops it only when no copy uses it any
        // more.
        let free = || unsafe { result::free_host(self.address.cast()) };
        self.context.record_err(self.context.bind_to_thread().and_then(|()| free()));
    }
}

/// Page-locked memory in two halves, handed out from front to back: while the GPU still reads one half, the other is
/// filled. Small writes share a half, so that many of them can be on their way without waiting.
struct Staging {
    halves: [Half; 2],
    current: usize,
    /// Bytes handed out of the current half.
    used: usize,
}

struct Half {
    memory: Pinned,
    /// Recorded when the half was left: once it has passed, nothing uses the half any more.
    left: driver::CudaEvent,
}

impl Staging {
    /// Bytes of one half: so many that the time of a transfer is much longer than its latency.
    const HALF: usize = 4 << 20;
    /// Pieces start at cache lines.
    const ALIGNMENT: usize = 64;

    fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        let half = || Ok(Half { memory: Pinned::new(context, Self::HALF)?, left: context.new_event(None)? });
        Ok(Self { halves: [half()?, half()?], current: 0, used: 0 })
    }

    /// The next piece: its address, and its length, at most `bytes`. The caller may use it until the work that is
    /// enqueued before the next call is done.
    fn take(&mut self, stream: &CudaStream, bytes: usize) -> std::result::Result<(*mut u8, usize), DriverError> {
        if self.used == Self::HALF {
            self.halves[self.current].left.record(stream)?;
            self.halves[1 - self.current].left.synchronize()?;
            self.current = 1 - self.current;
            self.used = 0;
        }
        let length = bytes.min(Self::HALF - self.used);
        // SAFETY: `used` is less than the half's size.
        let place = unsafe { self.halves[self.current].memory.address.add(self.used) };
        self.used += length.next_multiple_of(Self::ALIGNMENT);
        Ok((place, length))
    }
}

/// Device memory. Dropping it frees it in the order of the stream.
pub(super) struct CudaMemory {
    device: Arc<CudaDevice>,
    address: sys::CUdeviceptr,
}

impl CudaMemory {
    pub(super) fn filled(device: &Arc<CudaDevice>, bytes: usize, byte: u8) -> Result<Self> {
        let address = device.allocate(bytes.max(1))?;
        let memory = Self { device: device.clone(), address };
        // SAFETY: the memory is new and `bytes` long.
        unsafe { device.fill(address, byte, bytes) }?;
        Ok(memory)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        self.device.free(self.address);
    }
}

/// A point in the stream.
pub(super) struct CudaEvent(driver::CudaEvent);

impl CudaEvent {
    pub(super) fn wait(&self) -> Result<()> {
        self.0.synchronize().map_err(failed("waiting for an event"))
    }

    /// Seconds, to about half a microsecond.
    pub(super) fn elapsed_since(&self, earlier: &CudaEvent) -> Result<f64> {
        if self.0.context() != earlier.0.context() {
            return Err(Error::OtherDevice { operation: "Event::elapsed_since", argument: "earlier" });
        }
        let milliseconds = earlier.0.elapsed_ms(&self.0).map_err(failed("timing"))?;
        Ok(f64::from(milliseconds) * 1e-3)
    }
}

/// An active capture. If it is dropped before [`Capture::finish`] (because the work failed or panicked), it ends the
/// capture and discards the recording, so that the stream can be used again.
struct Capture<'a> {
    device: &'a Arc<CudaDevice>,
    active: bool,
}

impl<'a> Capture<'a> {
    fn begin(device: &'a Arc<CudaDevice>) -> Result<Self> {
        let mut state = device.lock();
        state.refuse_recording("capture", "a graph cannot capture another")?;
        // Relaxed: recorded writes allocate page-locked memory during the capture, which stricter modes forbid.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        device.enqueue_non_kernel(0, || device.stream.begin_capture(mode)).map_err(failed("capturing a graph"))?;
        state.recording = Some(Recording::default());
        state.graphs += 1;
        Ok(Self { device, active: true })
    }

    fn finish(mut self) -> Result<CudaGraph> {
        self.active = false;
        let (graph, recording) = self.device.end_capture();
        let broken = || Error::Cuda { call: "capturing a graph", message: "the work cannot be captured".into() };
        let graph = graph.and_then(|graph| graph.ok_or_else(broken)).inspect_err(|_| {
            self.device.forget_graph(&mut self.device.lock());
        })?;
        let mut graph = CudaGraph { device: self.device.clone(), graph, operations: 0, written: recording.written };
        // SAFETY: the graph is alive; without an array to fill, the call only counts the nodes.
        unsafe { sys::cuGraphGetNodes(graph.graph.cu_graph(), ptr::null_mut(), &mut graph.operations) }
            .result()
            .map_err(failed("counting a graph's nodes"))?;
        Ok(graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.active {
            // Report the error that ended the work, not one of ending the capture.
            drop(self.device.end_capture());
            self.device.forget_graph(&mut self.device.lock());
        }
    }
}

/// Captured work.
pub(super) struct CudaGraph {
    graph: driver::CudaGraph,
    operations: usize,
    /// The bytes of recorded writes, read by every replay.
    written: Vec<Pinned>,
    /// Dropped last, because it keeps the captured kernels loaded.
    device: Arc<CudaDevice>,
}

// SAFETY: any thread may use a graph, but only one at a time. Replays hold the device's lock, and a graph that is
// dropped has no other users.
unsafe impl Send for CudaGraph {}
// SAFETY: as above.
unsafe impl Sync for CudaGraph {}

impl CudaGraph {
    pub(super) fn replay(&self) -> Result<()> {
        let state = self.device.lock();
        state.refuse_recording("replay", "a graph cannot replay another")?;
        self.device.enqueue_non_kernel(0, || self.graph.launch()).map_err(failed("replaying a graph"))
    }

    pub(super) fn operations(&self) -> usize {
        self.operations
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        self.device.context.record_err(self.device.context.bind_to_thread());
        // The driver lets a running replay finish, but its memory must not be freed before.
        let mut state = self.device.lock();
        state.retired.append(&mut self.written);
        self.device.forget_graph(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use crate::device::arguments::FillArgs;
    use crate::device::{Device, Error, Launch, id};
    use crate::kernels::vector::fill;

    /// The driver in tests/driver ends the process if a kernel behind a copy is launched early.
    #[test]
    fn a_refused_launch_does_not_count_as_a_kernel() {
        let name = std::env::var("POLDER_TEST_DEVICE").unwrap_or_default();
        if !name.starts_with("cuda") {
            return eprintln!("skipped: POLDER_TEST_DEVICE names no GPU");
        }
        let device = Device::from_name(&name).unwrap();
        let mut values = device.upload(&[0.0f32; 4]).unwrap();
        let args = FillArgs { out: values.view_mut().address(), n: 4, value: 1.0 };
        let too_high = Launch { grid: [1, 70_000, 1], ..Launch::new(1, 32) };
        // SAFETY: the memory is four floats.
        let refused = unsafe { device.launch(id::FILL_F32, too_high, &args) };
        assert!(matches!(refused, Err(Error::Launch { .. })), "{refused:?}");
        fill(values.view_mut(), 2.0).unwrap();
        assert_eq!(values.to_vec().unwrap(), [2.0; 4]);
    }
}
