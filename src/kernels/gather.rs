//! The gradient of another framework, whose tensors lie anywhere, gathered into one vector: `kernels/gather.cu`.

use std::ops::Range;

use super::vector::Reduction;
use super::{Check, check_length, pick};
use crate::device::arguments::{FinishArgs, GatherArgs, GatherPiece};
use crate::device::constants::{BLOCK_THREADS, GATHER_ELEMENTS, GATHER_STAYS, STREAM_BYTES};
use crate::device::{Buffer, Device, Error, Launch, Result, Scalar, Slice, SliceMut, id};

/// Gathers tensors into one vector, in one pass that also divides by a loss scale, checks for finite values and
/// computes the norm. It keeps the table of places on the device: if the tensors lie where they lay in the call before,
/// nothing is written to it.
pub struct Gather {
    table: Buffer<GatherPiece>,
    /// What the table holds.
    pieces: Vec<GatherPiece>,
    /// Room for the next table.
    next: Vec<GatherPiece>,
}

/// What comes to a place in the vector.
#[derive(Clone, Copy)]
pub enum Source<'a, T: Scalar> {
    /// Zeros.
    Zeros,
    /// A tensor.
    Tensor(Slice<'a, T>),
    /// Nothing. This tensor belongs there, but stays where it lies: it is only checked and counts for the norm.
    Stays(Slice<'a, T>),
}

impl Gather {
    /// An empty table.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { table: device.zeros(0)?, pieces: Vec::new(), next: Vec::new() })
    }

    /// Copies each source to its place in `out`; elements between the places stay as they are. A tensor that already
    /// lies at its place is only read. With a `scale` (one element), every element is divided by it; the result is
    /// exact if the scale is a power of two. `flag[0]` becomes 1 if an element is infinite or NaN. `norm` (one element)
    /// receives the L2 norm of all sources, summed in double precision.
    ///
    /// The order of the sum depends only on the places and the device. Traffic: 8 B per element; 4 B for tensors that
    /// stay or lie at their place. The first call with new addresses also writes 24 B per 8,192 elements to the device.
    ///
    /// # Errors
    /// [`Error::Length`] unless each tensor is as long as its place and `scale`, `flag` and `norm` hold one number,
    /// [`Error::Range`] for a place outside of `out`, [`Error::Argument`] unless the places are in order and apart, and
    /// for a tensor that stays and a scale, [`Error::OtherDevice`] unless all live on the reduction's device.
    pub fn run<'a, T: Scalar>(
        &mut self,
        sources: impl IntoIterator<Item = (Source<'a, T>, Range<usize>)>,
        scale: Option<Slice<'_, f64>>,
        mut out: SliceMut<'_, T>,
        mut flag: SliceMut<'_, u32>,
        reduction: &mut Reduction,
        norm: Option<SliceMut<'_, f64>>,
    ) -> Result<()> {
        const OPERATION: &str = "Gather::run";
        let (device, partials) = reduction.parts();
        let check = Check { operation: OPERATION, device: &device };
        check.device("out", out.device())?;
        check.argument("flag", flag.view(), 1)?;
        if let Some(scale) = scale {
            check.argument("scale", scale, 1)?;
        }
        self.next.clear();
        let mut end = 0;
        for (source, place) in sources {
            if place.start < end || place.end < place.start {
                return check.refuse(format!("the place {place:?} is not behind the one before, which ends at {end}"));
            }
            if place.end > out.len() {
                let reason = format!("does not lie in a vector of {} elements", out.len());
                return Err(Error::Range { operation: OPERATION, start: place.start, end: place.end, reason });
            }
            let (tensor, stays) = match source {
                Source::Zeros => (None, false),
                Source::Tensor(tensor) => (Some(tensor), false),
                Source::Stays(tensor) => (Some(tensor), true),
            };
            if stays && scale.is_some() {
                return check.refuse(format!("the tensor of the place {place:?} stays, so it cannot be scaled"));
            }
            if let Some(tensor) = tensor {
                check.device("source", tensor.device())?;
                check_length(OPERATION, "source", tensor.len(), place.len())?;
            }
            self.next.extend(place.clone().step_by(GATHER_ELEMENTS).map(|first| GatherPiece {
                from: tensor.map_or(0, |tensor| tensor.address() + ((first - place.start) * size_of::<T>()) as u64),
                to: if stays { GATHER_STAYS } else { first } as u64,
                n: GATHER_ELEMENTS.min(place.end - first) as u64,
            }));
            end = place.end;
        }
        self.store_table(&device)?;
        let args = GatherArgs {
            table: self.table.view().address(),
            out: out.address(),
            partials,
            pieces: self.pieces.len() as u64,
            streamed: (out.len() * size_of::<T>() > STREAM_BYTES).into(),
            squared: norm.is_some().into(),
            finish: FinishArgs { scale: scale.map_or(0, |scale| scale.address()), flag: flag.address(), squares: 0 },
        };
        let most = device.elementwise(end, 1).grid[0] as usize;
        let blocks = self.pieces.len().clamp(1, most) as u32;
        let shape = Launch::new(blocks, if device.is_simt() { BLOCK_THREADS as u32 } else { 1 });
        // SAFETY: every piece lies in its source and in `out`, the places do not overlap, and there is room for a
        // partial sum of each block that `elementwise` can launch.
        unsafe { device.launch(pick::<T, _>(id::GATHER_F32, id::GATHER_F64), shape, &args)? };
        match norm {
            Some(norm) => reduction.finish_norm(OPERATION, shape, norm),
            None => Ok(()),
        }
    }

    /// Writes the next table to the device, unless it is the one there.
    fn store_table(&mut self, device: &Device) -> Result<()> {
        if bytemuck::cast_slice::<_, u8>(&self.next) == bytemuck::cast_slice::<_, u8>(&self.pieces) {
            return Ok(());
        }
        if self.table.len() < self.next.len() {
            self.table = device.zeros(self.next.len())?;
        }
        // A failure leaves a table that nothing matches.
        self.pieces.clear();
        self.table.slice_mut(0..self.next.len())?.write(&self.next)?;
        std::mem::swap(&mut self.pieces, &mut self.next);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new table is written where an address has changed, and only there.
    #[test]
    fn the_table_follows_the_addresses() {
        let device = Device::host();
        let mut gather = Gather::new(&device).unwrap();
        let mut reduction = Reduction::new(&device).unwrap();
        let (mut out, mut flag) = (device.zeros::<f32>(4).unwrap(), device.zeros(1).unwrap());
        for (number, value) in [1.0f32, 2.0, 3.0].into_iter().enumerate() {
            let source = device.upload(&[value; 3]).unwrap();
            for _ in 0..2 {
                let sources = [(Source::Tensor(source.view()), 0..3), (Source::Zeros, 3..4)];
                gather.run(sources, None, out.view_mut(), flag.view_mut(), &mut reduction, None).unwrap();
                assert_eq!(out.to_vec().unwrap(), [value, value, value, 0.0], "source {number}");
            }
        }
    }
}
