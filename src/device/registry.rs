//! The kernels this binary holds: their names, their host entry points, and the GPU's fatbins; written by `build.rs`.

use std::ffi::{CStr, c_void};

/// A compiled kernel of the host: called once per thread, with the kernel's argument struct.
pub(crate) type Entry = unsafe extern "C" fn(args: *const c_void);

/// Which kernel; the index into the registry's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KernelId(pub(crate) usize);

impl KernelId {
    /// The name it was registered under.
    pub(crate) fn name(self) -> &'static CStr {
        NAMES[self.0]
    }

    /// Its name for messages.
    pub(crate) fn to_name(self) -> String {
        self.name().to_string_lossy().into_owned()
    }
}

include!(concat!(env!("OUT_DIR"), "/registry.rs"));
include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
