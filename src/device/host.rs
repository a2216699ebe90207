//! The CPU as a device: memory, a team of threads, and launches through the SIMT runtime (`kernels/host/`).
//!
//! A launch spreads its blocks over the team. The team is our own, rather than a general thread pool, because a
//! training step must not allocate: handing a job to a general pool from outside allocates queue segments now and then.
//! A program with threads of its own can lend them instead, so that two teams do not compete for the cores.

use std::alloc::{self, Layout};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::arguments::{PolderFault, PolderLaunch};
use super::constants::{NO_FAULT, ORDER_BACKWARDS, ORDER_FORWARDS, ORDER_RANDOM};
use super::registry::{HOST, KernelId};
use super::{Error, Launch, Result, cores};

/// The order in which the host runs the blocks of a launch and the threads of a block. A correct kernel gives the same
/// bits in every order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BlockOrder {
    /// In increasing order. Blocks are spread over the cores.
    #[default]
    Forwards,
    /// In decreasing order, on one thread.
    Backwards,
    /// In a random order with this seed, on one thread.
    Random(u64),
}

/// How the CPU acts as a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostOptions {
    /// Threads that run blocks: 0 for one per core, and at most [`HostOptions::MOST_THREADS`].
    pub threads: usize,
    /// The order of blocks and threads.
    pub order: BlockOrder,
    /// Launch kernels in a GPU's shapes (many threads per block) instead of the CPU's. This is slow; it is for tests.
    pub emulate_gpu: bool,
}

impl HostOptions {
    /// The most threads that a device starts.
    pub const MOST_THREADS: usize = 1024;
}

/// Threads of the caller, on which a device runs its kernels; see [`Device::host_on`](super::Device::host_on). It calls
/// the function on some of its threads, at the same time, and returns when every call has returned.
pub type ThreadPool = Arc<dyn Fn(&(dyn Fn() + Sync)) + Send + Sync>;

/// The CPU.
pub(super) struct HostDevice {
    options: HostOptions,
    instruction_set: usize,
    team: Team,
    /// Whether a graph is being captured. Most operations check this before they take the lock.
    recording: AtomicBool,
    /// Whether work runs that a GPU would run on two streams concurrently. It counts for all threads, as `recording`
    /// does.
    paired: AtomicBool,
    graphs: Mutex<Graphs>,
}

/// The state of a device's graphs.
#[derive(Default)]
struct Graphs {
    /// The recording of the active capture, if there is one.
    recorded: Option<Vec<RecordedOperation>>,
    /// The number of graphs, including one that is being captured.
    alive: usize,
    /// Memory that was dropped while there were graphs, which may still use it. It is freed with the last graph.
    held: Vec<Block>,
}

/// One recorded operation of a graph.
pub(super) enum RecordedOperation {
    /// A kernel with the bytes of its argument struct, in 16-byte words for alignment.
    Launch(KernelId, Launch, Vec<u128>),
    /// Source, destination, bytes.
    Copy(u64, u64, usize),
    /// Destination, bytes.
    Clear(u64, usize),
    /// Destination and the bytes to write there.
    Write(u64, Vec<u8>),
}

unsafe extern "C" {
    fn polder_host_run(launch: *const PolderLaunch, first: u64, last: u64, fault: *mut PolderFault) -> i32;
    fn polder_host_matrix_units() -> i32;
}

/// The processor's name, as Linux tells it.
pub(super) fn processor() -> Option<&'static str> {
    static NAME: OnceLock<Option<String>> = OnceLock::new();
    let read = || {
        let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        let name = text.lines().find_map(|line| line.strip_prefix("model name")?.trim_start().strip_prefix(':'))?;
        let name: String = name.chars().filter(|character| !character.is_control()).collect();
        Some(name.trim().to_string()).filter(|name| !name.is_empty())
    };
    NAME.get_or_init(read).as_deref()
}

impl HostDevice {
    pub(super) fn new(options: HostOptions, pool: Option<ThreadPool>) -> Self {
        let threads = if options.threads == 0 { cores::count() } else { options.threads };
        let threads = threads.min(HostOptions::MOST_THREADS);
        Self {
            options: HostOptions { threads, ..options },
            // The oldest has a GPU's launch shapes.
            instruction_set: if options.emulate_gpu { 0 } else { newest_instruction_set() },
            team: Team::new(threads, pool),
            recording: AtomicBool::new(false),
            paired: AtomicBool::new(false),
            graphs: Mutex::default(),
        }
    }

    pub(super) fn has_matrix_units(&self) -> bool {
        HOST[self.instruction_set].0 == MATRIX_UNITS
    }

    pub(super) fn emulate_gpu(&self) -> bool {
        self.options.emulate_gpu
    }

    pub(super) fn description(&self) -> String {
        let threads = self.options.threads;
        let plural = if threads == 1 { "" } else { "s" };
        let shapes = if self.options.emulate_gpu { ", GPU launch shapes" } else { "" };
        let chip = processor().map_or(String::new(), |name| format!("{name}, "));
        format!("{chip}{threads} thread{plural}, {} kernels{shapes}", HOST[self.instruction_set].0)
    }

    /// # Safety
    /// As [`super::Device::launch`].
    pub(super) unsafe fn launch<A: Copy>(&self, kernel: KernelId, shape: Launch, args: &A) -> Result<()> {
        let operation = || {
            let mut words = vec![0u128; size_of::<A>().div_ceil(16)];
            // SAFETY: `words` has room for the struct, which is plain data (`Copy`), and the two do not overlap.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (&raw const *args).cast::<u8>(),
                    words.as_mut_ptr().cast(),
                    size_of::<A>(),
                );
            }
            RecordedOperation::Launch(kernel, shape, words)
        };
        if self.is_recorded(operation) {
            return Ok(());
        }
        // SAFETY: the caller's.
        unsafe { self.run(kernel, shape, (&raw const *args).cast()) }
    }

    /// # Safety
    /// `args` points to the kernel's argument struct, as [`super::Device::launch`] asks.
    unsafe fn run(&self, kernel: KernelId, shape: Launch, args: *const c_void) -> Result<()> {
        let (order, seed) = match self.options.order {
            BlockOrder::Forwards => (ORDER_FORWARDS, 0),
            BlockOrder::Backwards => (ORDER_BACKWARDS, 0),
            BlockOrder::Random(seed) => (ORDER_RANDOM, seed),
        };
        let launch = PolderLaunch {
            entry: HOST[self.instruction_set].1[kernel.0] as usize as u64,
            name: kernel.name().as_ptr().expose_provenance() as u64,
            args: args.expose_provenance() as u64,
            grid: shape.grid,
            block: shape.block,
            shared_bytes: shape.shared as u64,
            order,
            reserved: 0,
            seed,
        };
        let blocks: u64 = shape.grid.iter().map(|&extent| u64::from(extent)).product();
        // Several chunks for each thread balance blocks of unequal cost. The other orders apply to the whole grid, as
        // one chunk.
        let chunk =
            if order == ORDER_FORWARDS { (blocks / (self.options.threads as u64 * 8)).max(1) } else { blocks.max(1) };
        let first_fault: Mutex<Option<PolderFault>> = Mutex::new(None);
        self.team.run(blocks, chunk, &|first, last| {
            let mut fault = PolderFault { kind: NO_FAULT, block: [0; 3], thread: [0; 3], message: [0; 236] };
            // SAFETY: the launch description lives until `run` returns, and the caller guarantees the arguments.
            let status = unsafe { polder_host_run(&launch, first, last, &mut fault) };
            if status == 0 {
                return true;
            }
            first_fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
            false
        });
        match first_fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(fault) => {
                let length = fault.message.iter().position(|&byte| byte == 0).unwrap_or(fault.message.len());
                let message = String::from_utf8_lossy(&fault.message[..length]).into_owned();
                Err(Error::Fault { kernel: kernel.to_name(), block: fault.block, thread: fault.thread, message })
            }
        }
    }

    /// # Safety
    /// `address` is the start of live device memory at least as long as `bytes`.
    pub(super) unsafe fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.refuse_recording("read", "a graph cannot read back to the host")?;
        let _turn = self.team.turn();
        // SAFETY: the caller's; host memory of the program and of the device never overlap.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// # Safety
    /// `address` is the start of live device memory, borrowed exclusively, at least as long as `bytes`.
    pub(super) unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.refuse_paired("write")?;
        if !self.is_recorded(|| RecordedOperation::Write(address, bytes.to_vec())) {
            // SAFETY: the caller's.
            unsafe { self.write_now(address, bytes) };
        }
        Ok(())
    }

    /// # Safety
    /// As [`HostDevice::write`].
    unsafe fn write_now(&self, address: u64, bytes: &[u8]) {
        let _turn = self.team.turn();
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
    }

    /// # Safety
    /// Both addresses are live device memory of at least `bytes`, and the two parts do not overlap.
    pub(super) unsafe fn copy(&self, source: u64, destination: u64, bytes: usize) -> Result<()> {
        if !self.is_recorded(|| RecordedOperation::Copy(source, destination, bytes)) {
            // SAFETY: the caller's.
            unsafe { self.copy_now(source, destination, bytes) };
        }
        Ok(())
    }

    /// # Safety
    /// As [`HostDevice::copy`].
    unsafe fn copy_now(&self, source: u64, destination: u64, bytes: usize) {
        let _turn = self.team.turn();
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(source as *const u8, destination as *mut u8, bytes) };
    }

    /// # Safety
    /// `address` is the start of live device memory, borrowed exclusively, of at least `bytes`.
    pub(super) unsafe fn clear(&self, address: u64, bytes: usize) -> Result<()> {
        if !self.is_recorded(|| RecordedOperation::Clear(address, bytes)) {
            // SAFETY: the caller's.
            unsafe { self.clear_now(address, bytes) };
        }
        Ok(())
    }

    /// # Safety
    /// As [`HostDevice::clear`].
    unsafe fn clear_now(&self, address: u64, bytes: usize) {
        let _turn = self.team.turn();
        // SAFETY: the caller's.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
    }

    /// Records the operation if a graph is being captured; returns whether it did.
    fn is_recorded(&self, operation: impl FnOnce() -> RecordedOperation) -> bool {
        if !self.recording.load(Ordering::Relaxed) {
            return false;
        }
        match &mut self.lock().recorded {
            Some(recorded) => recorded.push(operation()),
            None => return false,
        }
        true
    }

    /// Fails while a graph is being captured, for operations that a GPU cannot record.
    pub(super) fn refuse_recording(&self, operation: &'static str, message: &str) -> Result<()> {
        if self.recording.load(Ordering::Relaxed) {
            return Err(Error::Argument { operation, message: message.into() });
        }
        self.refuse_paired(operation)
    }

    fn refuse_paired(&self, operation: &'static str) -> Result<()> {
        match self.paired.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Error::Argument { operation, message: super::ONE_OF_TWO.into() }),
        }
    }

    pub(super) fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// Runs one piece of work after the other, in the chosen order, with the restrictions of a GPU.
    pub(super) fn both(&self, mut work: impl FnMut(usize) -> Result<()>) -> Result<()> {
        struct Paired<'a>(&'a AtomicBool);
        impl Drop for Paired<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Relaxed);
            }
        }
        self.refuse_paired("both")?;
        self.paired.store(true, Ordering::Relaxed);
        let _paired = Paired(&self.paired);
        let order = if self.options.order == BlockOrder::Backwards { [1, 0] } else { [0, 1] };
        order.into_iter().try_for_each(&mut work)
    }

    fn lock(&self) -> MutexGuard<'_, Graphs> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn capture(this: &Arc<Self>, work: impl FnOnce() -> Result<()>) -> Result<HostGraph> {
        {
            let mut graphs = this.lock();
            if graphs.recorded.is_some() {
                return Err(Error::Argument { operation: "capture", message: "a graph cannot capture another".into() });
            }
            graphs.recorded = Some(Vec::new());
            graphs.alive += 1;
            this.recording.store(true, Ordering::Relaxed);
        }
        // The recording ends and the graph is dropped also if the work fails or panics.
        let mut graph = HostGraph { recorded: Vec::new(), device: this.clone() };
        let capture = Capture(this);
        work()?;
        graph.recorded = capture.end();
        std::mem::forget(capture);
        Ok(graph)
    }
}

/// An active capture. Dropping it ends it and discards the recording.
struct Capture<'a>(&'a HostDevice);

impl Capture<'_> {
    fn end(&self) -> Vec<RecordedOperation> {
        let mut graphs = self.0.lock();
        self.0.recording.store(false, Ordering::Relaxed);
        graphs.recorded.take().unwrap_or_default()
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Captured work.
pub(super) struct HostGraph {
    recorded: Vec<RecordedOperation>,
    device: Arc<HostDevice>,
}

impl HostGraph {
    /// Calls `done` after each operation.
    pub(super) fn replay(&self, mut done: impl FnMut()) -> Result<()> {
        let device = &self.device;
        device.refuse_recording("replay", "a graph cannot replay another")?;
        for operation in &self.recorded {
            // SAFETY: each operation was checked when it was recorded, and memory that was dropped since is kept for
            // the graph.
            unsafe {
                match operation {
                    RecordedOperation::Launch(kernel, shape, words) => {
                        device.run(*kernel, *shape, words.as_ptr().cast())?
                    }
                    RecordedOperation::Copy(source, destination, bytes) => {
                        device.copy_now(*source, *destination, *bytes)
                    }
                    RecordedOperation::Clear(address, bytes) => device.clear_now(*address, *bytes),
                    RecordedOperation::Write(address, bytes) => device.write_now(*address, bytes),
                }
            }
            done();
        }
        Ok(())
    }

    pub(super) fn operations(&self) -> usize {
        self.recorded.len()
    }

    pub(super) fn list(&self) -> Vec<String> {
        let name = |operation: &RecordedOperation| match operation {
            RecordedOperation::Launch(kernel, ..) => kernel.to_name(),
            RecordedOperation::Copy(..) => "copy".into(),
            RecordedOperation::Clear(..) => "clear".into(),
            RecordedOperation::Write(..) => "write".into(),
        };
        self.recorded.iter().map(name).collect()
    }
}

impl Drop for HostGraph {
    fn drop(&mut self) {
        let mut graphs = self.device.lock();
        graphs.alive -= 1;
        if graphs.alive == 0 {
            graphs.held.clear();
        }
    }
}

/// The instruction set with matrix units.
const MATRIX_UNITS: &str = "amx";

/// The index in [`HOST`] of the newest instruction set that this CPU has. `POLDER_ISA` may name an older one, for
/// tests; an unknown name, or one that the CPU lacks, is ignored.
fn newest_instruction_set() -> usize {
    #[cfg(target_arch = "x86_64")]
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    #[cfg(target_arch = "x86_64")]
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let usable = |name: &str| match name {
        "baseline" => true,
        #[cfg(target_arch = "x86_64")]
        "avx2" => avx2,
        #[cfg(target_arch = "x86_64")]
        "avx512" => avx512,
        // SAFETY: it asks the processor and the operating system, and takes no arguments.
        #[cfg(target_arch = "x86_64")]
        MATRIX_UNITS => avx512 && is_x86_feature_detected!("avx512bf16") && unsafe { polder_host_matrix_units() } != 0,
        _ => false,
    };
    let wanted = std::env::var("POLDER_ISA").ok();
    let named = HOST.iter().position(|(name, _)| wanted.as_deref() == Some(name) && usable(name));
    named.or_else(|| HOST.iter().rposition(|(name, _)| usable(name))).unwrap_or(0)
}

/// Host memory, aligned as the widest vectors and a GPU require.
pub(super) struct HostMemory {
    /// Present until it is dropped.
    block: Option<Block>,
    device: Arc<HostDevice>,
}

/// Allocated bytes.
struct Block {
    address: *mut u8,
    layout: Layout,
    /// Whether the pages come from the system directly, and not from the allocator.
    #[cfg(target_os = "linux")]
    mapped: bool,
}

// SAFETY: it owns its memory; the typed wrappers around it enforce Rust's borrowing rules.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    const ALIGNMENT: usize = 256;
    /// The size of a huge page, and the alignment of memory that spans several of them. Without huge pages, streams
    /// over large vectors are bound by address translation.
    const HUGE_PAGE: usize = 2 << 20;

    /// Bytes that are all zero; none if there is no memory.
    fn zeros(bytes: usize) -> Option<Self> {
        let huge = bytes >= 2 * Self::HUGE_PAGE;
        #[cfg(target_os = "linux")]
        if huge {
            return Self::mapped(bytes);
        }
        let alignment = if huge { Self::HUGE_PAGE } else { Self::ALIGNMENT };
        let layout = Layout::from_size_align(bytes.max(1), alignment).ok()?;
        // SAFETY: the layout's size is not zero.
        let address = unsafe { alloc::alloc_zeroed(layout) };
        (!address.is_null()).then_some(Self {
            address,
            layout,
            #[cfg(target_os = "linux")]
            mapped: false,
        })
    }

    /// Huge pages of the system, which are zero. None is touched here: the system clears a page when a thread uses it
    /// first, on that thread's NUMA node, and it never clears one that is not used.
    #[cfg(target_os = "linux")]
    fn mapped(bytes: usize) -> Option<Self> {
        let len = bytes.checked_next_multiple_of(Self::HUGE_PAGE)?;
        let layout = Layout::from_size_align(len, Self::HUGE_PAGE).ok()?;
        let room = len.checked_add(Self::HUGE_PAGE)?;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the system's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), room, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let before = start.align_offset(Self::HUGE_PAGE);
        // SAFETY: both ends are parts of the new mapping, in whole pages, which nothing uses. The rest stays.
        unsafe {
            let address = start.byte_add(before);
            if before > 0 {
                libc::munmap(start, before);
            }
            if before < Self::HUGE_PAGE {
                libc::munmap(address.byte_add(len), Self::HUGE_PAGE - before);
            }
            // Advice about our own memory: if the system refuses, nothing changes.
            libc::madvise(address, len, libc::MADV_HUGEPAGE);
            Some(Self { address: address.cast(), layout, mapped: true })
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if self.mapped {
            // SAFETY: what is left of the mapping, which nothing uses any more.
            unsafe { libc::munmap(self.address.cast(), self.layout.size()) };
            return;
        }
        // SAFETY: allocated with this layout, and freed once.
        unsafe { alloc::dealloc(self.address, self.layout) };
    }
}

impl HostMemory {
    pub(super) fn filled(device: &Arc<HostDevice>, bytes: usize, byte: u8) -> Result<Self> {
        device.refuse_recording("allocate", "a graph cannot allocate memory")?;
        let block = Block::zeros(bytes).ok_or_else(|| Error::OutOfMemory { device: "cpu".into(), bytes })?;
        if byte != 0 {
            // SAFETY: the block has so many writable bytes.
            unsafe { std::ptr::write_bytes(block.address, byte, block.layout.size()) };
        }
        Ok(Self { block: Some(block), device: device.clone() })
    }

    pub(super) fn address(&self) -> u64 {
        self.block.as_ref().map_or(0, |block| block.address as u64)
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let mut graphs = self.device.lock();
        if graphs.alive > 0 {
            graphs.held.extend(self.block.take());
        }
    }
}

/// Threads that share one job at a time. The caller is one of them.
struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Threads of the caller instead of workers.
    pool: Option<ThreadPool>,
    /// Held during a job: callers from several threads wait for one another.
    caller: Mutex<()>,
}

struct Shared {
    /// The number of the newest job. Workers wait until it increases.
    generation: AtomicU64,
    next: AtomicU64,
    blocks: AtomicU64,
    chunk: AtomicU64,
    /// Set by a chunk that failed, so that the others stop early.
    failed: AtomicBool,
    /// The number of workers that are working on the newest job.
    busy: AtomicUsize,
    stop: AtomicBool,
    job: Mutex<Option<Job>>,
    wake: Condvar,
}

/// The newest job's function, without its lifetime. [`Team::run`] returns only when no worker uses it any more.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(u64, u64) -> bool + Sync));

// SAFETY: the pointer is to a `Sync` closure that outlives the job.
unsafe impl Send for Job {}

/// How long an idle thread spins before it sleeps: longer than the gap between two launches of a training step, but
/// short enough to free the core when the step is over.
const SPIN: Duration = Duration::from_micros(100);

impl Team {
    /// Waits until no other thread uses the device: a replay writes to memory that they may be reading.
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.caller.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new(threads: usize, pool: Option<ThreadPool>) -> Self {
        let shared = Arc::new(Shared {
            generation: AtomicU64::new(0),
            next: AtomicU64::new(0),
            blocks: AtomicU64::new(0),
            chunk: AtomicU64::new(1),
            failed: AtomicBool::new(false),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            job: Mutex::new(None),
            wake: Condvar::new(),
        });
        let own = if pool.is_some() { 1 } else { threads };
        let workers = (1..own)
            .filter_map(|index| {
                let shared = shared.clone();
                // If a thread cannot be started, the others do its work.
                std::thread::Builder::new().name(format!("polder-{index}")).spawn(move || shared.work()).ok()
            })
            .collect();
        Self { shared, workers, pool, caller: Mutex::new(()) }
    }

    /// Calls `function(first, last)` for chunks that cover [0, blocks), on all threads, and returns when all are done.
    /// After a call that returns false, no further chunk is started.
    fn run(&self, blocks: u64, chunk: u64, function: &(dyn Fn(u64, u64) -> bool + Sync)) {
        let _turn = self.turn();
        if blocks <= chunk || (self.workers.is_empty() && self.pool.is_none()) {
            let mut first = 0;
            while first < blocks && function(first, (first + chunk).min(blocks)) {
                first += chunk;
            }
            return;
        }
        let shared = &*self.shared;
        shared.next.store(0, Ordering::Relaxed);
        shared.blocks.store(blocks, Ordering::Relaxed);
        shared.chunk.store(chunk, Ordering::Relaxed);
        shared.failed.store(false, Ordering::Relaxed);
        if let Some(pool) = &self.pool {
            pool(&|| shared.claim(function));
            // What the pool has left over.
            shared.claim(function);
            return;
        }
        {
            let mut job = shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: only the lifetime changes, and this function waits below until no worker uses the pointer any
            // more.
            *job = Some(Job(unsafe {
                std::mem::transmute::<
                    *const (dyn Fn(u64, u64) -> bool + Sync + '_),
                    *const (dyn Fn(u64, u64) -> bool + Sync + 'static),
                >(function)
            }));
            shared.generation.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        shared.claim(function);
        // From here on no worker can join. There is no need to wait for one that has not woken up.
        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = None;
        while shared.busy.load(Ordering::Acquire) > 0 {
            std::hint::spin_loop();
        }
    }
}

impl Shared {
    /// Works on chunks until none is left.
    fn claim(&self, function: &(dyn Fn(u64, u64) -> bool + Sync)) {
        let (blocks, chunk) = (self.blocks.load(Ordering::Relaxed), self.chunk.load(Ordering::Relaxed));
        while !self.failed.load(Ordering::Relaxed) {
            let first = self.next.fetch_add(chunk, Ordering::Relaxed);
            if first >= blocks {
                return;
            }
            if !function(first, (first + chunk).min(blocks)) {
                self.failed.store(true, Ordering::Relaxed);
            }
        }
    }

    /// The loop of a worker: wait for a new job (spin first, then sleep), help with it, report it done.
    fn work(&self) {
        let mut seen = 0;
        loop {
            let spinning = Instant::now();
            while self.generation.load(Ordering::Acquire) == seen && spinning.elapsed() < SPIN {
                std::hint::spin_loop();
            }
            let mut job = self.job.lock().unwrap_or_else(PoisonError::into_inner);
            while self.generation.load(Ordering::Acquire) == seen && !self.stop.load(Ordering::Acquire) {
                job = self.wake.wait(job).unwrap_or_else(PoisonError::into_inner);
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            seen = self.generation.load(Ordering::Acquire);
            // If there is no job, the others have already done it.
            let Some(Job(function)) = *job else { continue };
            self.busy.fetch_add(1, Ordering::Relaxed);
            drop(job);
            // SAFETY: `busy` counts this worker since before `Team::run` took the job away, and `Team::run` keeps the
            // closure alive until `busy` is zero. This worker is subtracted below.
            self.claim(unsafe { &*function });
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        {
            let _job = self.shared.job.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.stop.store(true, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has already reported it.
            let _ = worker.join();
        }
    }
}
