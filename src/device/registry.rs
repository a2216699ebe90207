//! The kernels this binary holds, as `build.rs` writes them: their names, their host entry points, and the GPU's
//! fatbins.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;

use super::arguments::Arguments;

/// A compiled kernel of the host. It is called once per thread, with the kernel's argument struct.
pub(crate) type HostEntry = unsafe extern "C" fn(args: *const c_void);

/// A kernel: its index into the registry's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct KernelId(pub(crate) usize);

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

/// A kernel that takes an argument struct `A`.
pub struct Kernel<A> {
    pub(crate) id: KernelId,
    args: PhantomData<fn(&A)>,
}

impl<A> Kernel<A> {
    pub(super) const fn new(id: usize) -> Self {
        Self { id: KernelId(id), args: PhantomData }
    }
}

impl<A: Arguments> Kernel<A> {
    /// The kernel of this name, for constants: there, a name that does not exist ends the build.
    ///
    /// # Panics
    /// If no kernel of this name takes an `A`.
    pub(crate) const fn named(name: &str) -> Self {
        let mut id = 0;
        while id < NAMES.len() {
            if is_equal(NAMES[id].to_bytes(), name.as_bytes()) {
                assert!(is_equal(ARGUMENTS[id].as_bytes(), A::NAME.as_bytes()), "the kernel takes another struct");
                return Self::new(id);
            }
            id += 1;
        }
        panic!("no kernel has this name")
    }
}

const fn is_equal(a: &[u8], b: &[u8]) -> bool {
    let mut index = 0;
    while index < a.len() && index < b.len() && a[index] == b[index] {
        index += 1;
    }
    index == a.len() && index == b.len()
}

impl<A> Clone for Kernel<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A> Copy for Kernel<A> {}

include!(concat!(env!("OUT_DIR"), "/registry.rs"));
include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
