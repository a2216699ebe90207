//! polder from C and C++: devices, vector kernels, every optimizer with a callback as its objective, and curvature.
//!
//! The header is `include/polder.h`. All memory of vectors belongs to the caller and is borrowed for the length of a
//! call (on a GPU, until the work of the call has finished).
//!
//! Rules for all functions:
//! - They return a [`polder_status`]; [`polder_last_error`] has the reason in words.
//! - NULL, wrong lengths and unknown names are answered with a status. So is a panic inside, which never leaves a
//!   function.
//! - Every object may be used from any thread. If two threads use one object at the same time, one of them may be
//!   answered with `POLDER_STATUS_BUSY`.
#![allow(non_camel_case_types)] // names of C
#![allow(rustdoc::broken_intra_doc_links)] // norm[0] is a number in C
#![warn(missing_docs)]

mod curvature;
mod device;
mod error;
mod objective;
mod optimizer;
mod vector;

pub use curvature::*;
pub use device::*;
pub use error::{polder_last_error, polder_status, polder_version};
pub use objective::polder_objective;
pub use optimizer::*;
pub use vector::*;
