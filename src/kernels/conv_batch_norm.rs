//! What a convolution on tensor cores and batch normalisation do for each other.
//!
//! - A forward convolution leaves the moments of its output's tiles ([`moments_len`]). Batch norm combines them instead
//!   of reading the activations once more.
//! - An input gradient masks its result by the activation behind batch norm and leaves sums over its rows, from which
//!   the last block makes dgamma and dbeta. For this it reads what batch norm [normalised](Normalized) and a
//!   [`Workspace`].
//!
//! Both modules use this one, and neither uses the other.

use super::{Check, check_length};
use crate::device::arguments::{BatchNormRows, BatchNormSumsArgs, Upstream};
use crate::device::constants::{MASK_NONE, MASK_OUTPUT, MASK_RECOMPUTE, MOMENT_ROWS};
use crate::device::{Buffer, Compute, Device, Result, Slice, SliceMut};

/// What followed the normalisation in the forward. The backward finds there where the activation passed.
#[derive(Clone, Copy)]
pub enum Activation<'a, S: Compute> {
    /// No relu.
    Identity,
    /// A relu. The mask is read from its output `y`, `[rows, channels]`.
    Relu {
        /// The forward's output.
        y: Slice<'a, S>,
    },
    /// A relu, and no residual. The mask is computed again from `x` by the forward's own expression, which gives the
    /// same bits and saves reading `y`.
    ReluRecomputed {
        /// Shift, `[channels]`.
        beta: Slice<'a, S::Master>,
    },
}

/// A forward pass of batch norm, as its tangent and a convolution's input gradient read it. The shapes are the
/// forward's.
#[derive(Clone, Copy)]
pub struct Normalized<'a, S: Compute> {
    /// Its input.
    pub x: Slice<'a, S>,
    /// Scale.
    pub gamma: Slice<'a, S::Master>,
    /// The mean that it saved.
    pub mean: Slice<'a, S::Master>,
    /// The `1 / √(var + eps)` that it saved.
    pub inv_std: Slice<'a, S::Master>,
    /// What followed the normalisation.
    pub activation: Activation<'a, S>,
}

impl<S: Compute> Normalized<'_, S> {
    /// Checks the arguments. Returns them as the kernels take them, without the gradient, and the mask's number.
    pub(super) fn upstream(&self, check: Check<'_>, rows: usize, channels: usize) -> Result<(Upstream, u32)> {
        check_extents(check, rows, channels)?;
        check.argument("x", self.x, rows * channels)?;
        check.argument("gamma", self.gamma, channels)?;
        check.argument("mean", self.mean, channels)?;
        check.argument("inv_std", self.inv_std, channels)?;
        let (mask, y, beta) = match self.activation {
            Activation::Identity => (MASK_NONE, 0, 0),
            Activation::Relu { y } => {
                check.argument("y", y, rows * channels)?;
                (MASK_OUTPUT, y.address(), 0)
            }
            Activation::ReluRecomputed { beta } => {
                check.argument("beta", beta, channels)?;
                (MASK_RECOMPUTE, 0, beta.address())
            }
        };
        let upstream = Upstream {
            x: self.x.address(),
            y,
            dy: 0,
            gamma: self.gamma.address(),
            beta,
            mean: self.mean.address(),
            inv_std: self.inv_std.address(),
        };
        Ok((upstream, mask))
    }
}

/// Fails for extents that the kernels cannot count.
pub(super) fn check_extents(check: Check<'_>, rows: usize, channels: usize) -> Result<()> {
    let fits = channels > 0 && channels < 1 << 22 && rows.checked_mul(channels).is_some();
    if fits { Ok(()) } else { check.refuse(format!("{rows} rows of {channels} channels cannot be normalised")) }
}

/// Elements of the moments of `[rows, channels]`: mean and squared deviations of every channel in every tile.
pub(super) fn moments_len(rows: usize, channels: usize) -> usize {
    2 * channels * rows.div_ceil(MOMENT_ROWS)
}

/// The room that a launch needs for sums over rows: two sums for each channel in every block of rows.
pub(super) struct SumsRoom {
    pub channels: usize,
    pub row_blocks: usize,
    /// Blocks side by side, each of which combines its own channels.
    pub column_blocks: usize,
}

impl SumsRoom {
    fn sums_len(&self) -> usize {
        2 * self.channels * self.row_blocks
    }

    /// In every column of blocks, a ticket for each group of row blocks, and one for all groups.
    fn tickets_len(&self, device: &Device) -> usize {
        self.column_blocks * (self.row_blocks.div_ceil(group_blocks(device)) + 1)
    }
}

/// Row blocks whose sums the last of them combines. A CPU that emulates a GPU launches few blocks, so its groups are
/// small.
pub(super) fn group_blocks(device: &Device) -> usize {
    if device.is_host() && device.is_simt() { 2 } else { 32 }
}

/// The memory that sums over rows need: each block's sums, and the tickets by which the last block knows that it is the
/// last. One workspace serves any number of calls, one after the other, for all the shapes that it was made for.
pub struct Workspace {
    sums: Buffer<f64>,
    /// Zero between launches.
    tickets: Buffer<u32>,
}

/// Addresses in a workspace.
#[derive(Clone, Copy)]
pub(super) struct SumsAddresses {
    /// Of every block's sums of dz.
    pub dz: u64,
    /// Of every block's sums of dz (x − mean).
    pub dz_x: u64,
    pub tickets: u64,
}

impl Workspace {
    /// Room for each of these launches.
    pub(super) fn with_rooms(device: &Device, rooms: impl IntoIterator<Item = SumsRoom>) -> Result<Self> {
        Self { sums: device.poisoned(0)?, tickets: device.zeros(0)? }.extended(rooms)
    }

    /// The same with room for each of these launches too.
    pub(super) fn extended(self, rooms: impl IntoIterator<Item = SumsRoom>) -> Result<Self> {
        let device = self.sums.device();
        let (mut sums, mut tickets) = (self.sums.len(), self.tickets.len());
        for room in rooms {
            sums = sums.max(room.sums_len());
            tickets = tickets.max(room.tickets_len(device));
        }
        if sums == self.sums.len() && tickets == self.tickets.len() {
            return Ok(self);
        }
        Ok(Self { sums: device.poisoned(sums)?, tickets: device.zeros(tickets)? })
    }

    pub(super) fn device(&self) -> &Device {
        self.sums.device()
    }

    /// The addresses for a launch that needs this room, checked.
    pub(super) fn sums(&mut self, check: Check<'_>, room: &SumsRoom) -> Result<SumsAddresses> {
        check.device("workspace", self.sums.device())?;
        let needed = [room.sums_len(), room.tickets_len(check.device)];
        for (found, needed) in [self.sums.len(), self.tickets.len()].into_iter().zip(needed) {
            if found < needed {
                check_length(check.operation, "workspace", found, needed)?;
            }
        }
        let dz = self.sums.view_mut().address();
        let dz_x = dz + (needed[0] / 2 * size_of::<f64>()) as u64;
        Ok(SumsAddresses { dz, dz_x, tickets: self.tickets.view_mut().address() })
    }
}

/// The arguments by which an input gradient of `rows` rows leaves dz, dgamma and dbeta of the batch norm that made its
/// input, checked.
pub(super) fn sums_args<S: Compute>(
    check: Check<'_>,
    rows: usize,
    room: &SumsRoom,
    normalized: Normalized<'_, S>,
    mut dgamma: SliceMut<'_, S::Master>,
    mut dbeta: SliceMut<'_, S::Master>,
    workspace: &mut Workspace,
) -> Result<BatchNormSumsArgs> {
    let (upstream, mask) = normalized.upstream(check, rows, room.channels)?;
    check.argument("dgamma", dgamma.view(), room.channels)?;
    check.argument("dbeta", dbeta.view(), room.channels)?;
    let SumsAddresses { dz, dz_x, tickets } = workspace.sums(check, room)?;
    if !(upstream.x | upstream.y).is_multiple_of(16) {
        return check.refuse("batch norm's input or output does not begin at a multiple of 16 bytes".into());
    }
    Ok(BatchNormSumsArgs {
        upstream,
        dz,
        dz_x,
        rows: BatchNormRows { rows: rows as u64, channels: room.channels as u32, ..BatchNormRows::default() },
        mask,
        dgamma: dgamma.address(),
        dbeta: dbeta.address(),
        tickets,
        group: group_blocks(check.device) as u32,
        ..BatchNormSumsArgs::default()
    })
}
