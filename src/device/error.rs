//! Errors of devices. Each names the kernel, the buffer or the call.

/// An error of a device, or of the arguments of a kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A kernel broke a rule of the programming model. The host device detects this and stops the launch.
    #[error("kernel {kernel}: block {block:?}, thread {thread:?}: {message}")]
    Fault {
        /// The kernel's registered name.
        kernel: String,
        /// The block's x, y, z index.
        block: [u32; 3],
        /// The thread's x, y, z index in its block.
        thread: [u32; 3],
        /// What the thread did.
        message: String,
    },
    /// A launch that the device refused.
    #[error("kernel {kernel}: {message}")]
    Launch {
        /// The kernel's registered name.
        kernel: String,
        /// The device's reason.
        message: String,
    },
    /// A call to the CUDA driver failed.
    #[error("CUDA: {call}: {message}")]
    Cuda {
        /// The operation.
        call: &'static str,
        /// The driver's reason.
        message: String,
    },
    /// A kernel on a GPU failed. Whichever call comes next reports it, and from then on the driver refuses all work of
    /// the process.
    #[error("a kernel that ran earlier on the GPU failed: {message}; restart the program to use the GPU again")]
    Lost {
        /// The driver's reason.
        message: String,
    },
    /// The caller asked to stop.
    #[error("stopped before the end")]
    Stopped,
    /// The requested device is not available.
    #[error("no device {device}: {reason}")]
    Unavailable {
        /// The device as the user named it.
        device: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// Memory could not be allocated.
    #[error("out of memory on {device}: {bytes} bytes requested")]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// The requested size.
        bytes: usize,
    },
    /// An argument has the wrong number of elements.
    #[error("{operation}: `{argument}` has {found} elements, expected {expected}")]
    Length {
        /// The function that was called.
        operation: &'static str,
        /// The argument's name.
        argument: &'static str,
        /// Its length.
        found: usize,
        /// The length that the other arguments imply.
        expected: usize,
    },
    /// A range outside a buffer, or one that overlaps a range already borrowed for writing.
    #[error("{operation}: range {start}..{end} {reason}")]
    Range {
        /// The function that was called.
        operation: &'static str,
        /// First element.
        start: usize,
        /// One past the last element.
        end: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// Arguments that no kernel can work with, such as a stride of zero.
    #[error("{operation}: {message}")]
    Argument {
        /// The function that was called.
        operation: &'static str,
        /// What is wrong.
        message: String,
    },
    /// A loss, or a number derived from it, is not finite.
    #[error("{operation}: the loss or its derivatives at these weights are not finite")]
    NotFinite {
        /// The function that was called.
        operation: &'static str,
    },
    /// The gradient is zero, and so has no direction.
    #[error("{operation}: the gradient is zero")]
    ZeroGradient {
        /// The function that was called.
        operation: &'static str,
    },
    /// Two buffers of one operation live on different devices.
    #[error("{operation}: `{argument}` lives on another device")]
    OtherDevice {
        /// The function that was called.
        operation: &'static str,
        /// The argument's name.
        argument: &'static str,
    },
}

/// The result of a device's operation.
pub type Result<T> = std::result::Result<T, Error>;
