//! The methods: one file each, and the list of them.

mod asam;
mod cr_sam;
mod friendly_sam;
mod gam;
mod gnr;
mod gsam;
mod look_sam;
mod msam;
mod plain;
mod r_sam;
mod random_sam;
mod sa_sam;
mod sam;
mod sampa;
mod sassha;
mod wsam;

use super::Entry;

/// Exports the types of each file and makes the list of entries. A line is `file: types => entries;`.
macro_rules! methods {
    ($($file:ident: $($export:ident),+ => $($entry:ident),+;)+) => {
        $(pub use $file::{$($export),+};)+

        /// Every method by name. Files of settings, the program and the table in `docs/methods.md` follow this list.
        pub const METHODS: &[Entry] = &[$($($file::$entry),+),+];
    };
}

methods! {
    plain: Plain => SGD, ADAMW, MUON;
    sam: Sam, Norm, Perturbed => ENTRY;
    asam: Asam => ENTRY;
    random_sam: RandomSam => ENTRY;
    r_sam: RSam => ENTRY;
    gsam: Gsam => ENTRY;
    look_sam: LookSam => ENTRY;
    friendly_sam: FriendlySam => ENTRY;
    msam: Msam => ENTRY;
    wsam: Wsam, Sharpness => ENTRY;
    cr_sam: CrSam, Along, Form => ENTRY;
    gnr: Gnr, Hvp, Oracle => ENTRY;
    gam: Gam => ENTRY;
    sa_sam: SaSam => SA_SAM, SA_SGD;
    sassha: Sassha => ENTRY;
    sampa: Sampa => ENTRY;
}
