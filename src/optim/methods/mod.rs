//! The methods: one file each, and the list of them.

mod asam;
mod cr_sam;
mod friendly_sam;
mod gam;
mod gnr;
mod gsam;
mod look_sam;
mod plain;
mod r_sam;
mod random_sam;
mod sa_sam;
mod sam;

pub use asam::Asam;
pub use cr_sam::{CrSam, Form};
pub use friendly_sam::FriendlySam;
pub use gam::Gam;
pub use gnr::{Gnr, Hvp, Oracle};
pub use gsam::Gsam;
pub use look_sam::LookSam;
pub use plain::Plain;
pub use r_sam::RSam;
pub use random_sam::RandomSam;
pub use sa_sam::{SaSam, SaSgd};
pub use sam::{Norm, Sam};

use super::Entry;

/// Every method by name. The command line, `config.toml` and the table in `docs/methods.md` follow this list.
pub const METHODS: &[Entry] = &[
    plain::SGD,
    plain::ADAMW,
    sam::ENTRY,
    asam::ENTRY,
    random_sam::ENTRY,
    r_sam::ENTRY,
    gsam::ENTRY,
    look_sam::ENTRY,
    friendly_sam::ENTRY,
    cr_sam::ENTRY,
    gnr::ENTRY,
    gam::ENTRY,
    sa_sam::SA_SAM,
    sa_sam::SA_SGD,
];
