//! Statuses, the text of a thread's last error, and the boundary that no panic crosses.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use polder::device::Error;
use polder::optim::SnapshotError;
use polder::settings::SettingError;

/// What a function answers.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum polder_status {
    /// Done.
    Ok = 0,
    /// An argument that cannot be used: NULL, a length, an address, a name, a value.
    Argument = 1,
    /// The device is not there, or it failed.
    Device = 2,
    /// Memory could not be allocated.
    Memory = 3,
    /// A loss or a gradient is not finite, where a measurement needs it to be.
    NotFinite = 4,
    /// A callback returned another number than 0.
    Callback = 5,
    /// The object is in use: by another thread, or by the call whose callback made this one.
    Busy = 6,
    /// A fault of this library.
    Panic = 7,
}

/// A status with its reason.
#[derive(Debug)]
pub(crate) struct Failure {
    pub status: polder_status,
    pub reason: String,
}

impl Failure {
    pub fn argument(reason: impl Into<String>) -> Self {
        Self { status: polder_status::Argument, reason: reason.into() }
    }

    pub fn null(argument: &str) -> Self {
        Self::argument(format!("`{argument}` is NULL"))
    }

    pub fn busy(object: &str) -> Self {
        Self { status: polder_status::Busy, reason: format!("the {object} is in use") }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::OutOfMemory { .. } => polder_status::Memory,
            Error::NotFinite { .. } | Error::ZeroGradient { .. } => polder_status::NotFinite,
            Error::Length { .. } | Error::Range { .. } | Error::Argument { .. } | Error::OtherDevice { .. } => {
                polder_status::Argument
            }
            _ => polder_status::Device,
        };
        Self { status, reason: error.to_string() }
    }
}

impl From<SnapshotError> for Failure {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Device(error) => error.into(),
            refused => Self::argument(format!("`state`: {refused}")),
        }
    }
}

impl From<SettingError> for Failure {
    fn from(error: SettingError) -> Self {
        Self::argument(error.to_string())
    }
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function. A failure or a panic becomes a status, and its reason the thread's last error.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> polder_status {
    // Objects are unwind-safe: what a panic may have left half done is behind a lock, which it poisons.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return polder_status::Ok,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure { status: polder_status::Panic, reason: panic_text(&*panic) },
    };
    // C strings end at the first zero byte.
    let text = CString::new(failure.reason.replace('\0', " ")).unwrap_or_default();
    LAST.with(|last| last.replace(text));
    failure.status
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a fault of polder: {}", text.unwrap_or_else(|| "unknown".into()))
}

/// The reason of the calling thread's newest status other than `POLDER_STATUS_OK`, in one line of UTF-8; empty if there
/// was none. It is valid until the thread's next call that fails.
#[unsafe(no_mangle)]
pub extern "C" fn polder_last_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// The version of the library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn polder_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}

/// The text of an argument.
///
/// # Safety
/// `text` is NULL or ends with a zero byte.
pub(crate) unsafe fn text<'a>(argument: &str, text: *const c_char) -> Result<&'a str> {
    if text.is_null() {
        return Err(Failure::null(argument));
    }
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| Failure::argument(format!("`{argument}` is not UTF-8")))
}

/// The object behind a handle.
///
/// # Safety
/// `handle` is NULL or a live object of this library.
pub(crate) unsafe fn object<'a, T>(argument: &str, handle: *const T) -> Result<&'a T> {
    // SAFETY: the caller's.
    unsafe { handle.as_ref() }.ok_or_else(|| Failure::null(argument))
}

/// Writes a result.
///
/// # Safety
/// `out` is NULL or valid for one value to be written.
pub(crate) unsafe fn give<T>(argument: &str, out: *mut T, value: T) -> Result<()> {
    if out.is_null() {
        return Err(Failure::null(argument));
    }
    // SAFETY: the caller's.
    unsafe { out.write(value) };
    Ok(())
}
