//! The last stage of a network's gradient: `kernels/gradient.cu`, and the end of a weight gradient on tensor cores.
//!
//! The kernel that writes a gradient for the last time also finishes it: it divides by the loss scale, checks that the
//! elements are finite, and sums their squares. So neither the check of a gradient nor its norm needs a pass of its
//! own.
//!
//! Who finishes a gradient depends on how it is computed:
//!
//! - A gradient that a convolution on tensor cores computes in one part is finished by the convolution
//!   ([`conv::finished_weight_gradient`](super::conv::finished_weight_gradient)).
//! - Large parts are summed and finished by a launch of their own right after the convolution, while the cache still
//!   holds them.
//! - Small parts of all layers are summed and finished by one launch at the end, whose last block computes the norm.
//!   This launch also finishes gradients that are already complete: those of other layers, which are small, and those
//!   of convolutions without tensor cores that are not split.
//!
//! For N elements in K parts, a launch reads 4 K N bytes and writes 4 N. A complete gradient is read, and written only
//! to divide by a scale. Squares are summed in double precision, in an order that depends only on the places and the
//! device.

use std::ops::Range;

use super::{Check, check_length, pick};
use crate::device::arguments::{FinishArgs, GradientPiece, GradientPiecesArgs};
use crate::device::constants::{BLOCK_THREADS, PIECE_ELEMENTS};
use crate::device::{Buffer, Device, Error, Launch, Result, Scalar, Slice, SliceMut, id};
use crate::kernels::precision;

/// A block reads elements of `1 << doublings` parts at a time.
fn doublings(splits: usize) -> u32 {
    splits.clamp(1, 8).ilog2()
}

/// The number of elements that a block sums at a time, for a gradient in `splits` parts.
fn stretch(splits: usize) -> usize {
    PIECE_ELEMENTS >> doublings(splits)
}

/// The location of a gradient before its last stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfinished {
    /// Its parts, one after the other in one vector; `None` if it is complete.
    pub parts: Option<Range<usize>>,
    /// Its place in the vector of gradients.
    pub place: Range<usize>,
}

/// A stage, which finishes some of a network's gradients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// A launch that finishes these.
    Launch(Vec<Unfinished>),
    /// A convolution that leaves this number of sums of squares:
    /// [`ConvShape::finished_squares`](super::conv::ConvShape::finished_squares).
    Convolution(usize),
}

impl Stage {
    /// The gradients that a launch finishes.
    fn launched(&self) -> &[Unfinished] {
        match self {
            Self::Launch(gradients) => gradients,
            Self::Convolution(_) => &[],
        }
    }
}

/// What the last stage of a gradient does besides writing it.
pub struct Finish<'a> {
    /// The state of [`precision`] with the scale to divide by.
    pub scale: Option<Slice<'a, f64>>,
    /// One element, which is set to 1 if an element of the gradient is infinite or NaN.
    pub flag: SliceMut<'a, u32>,
    /// Receives the sums of squares; `None` if no norm is wanted.
    pub squares: Option<SliceMut<'a, f64>>,
}

impl Finish<'_> {
    /// Checks the arguments for a launch that leaves `squares` sums.
    pub(super) fn args<T: Scalar>(&mut self, check: Check<'_>, squares: usize) -> Result<FinishArgs> {
        if let Some(scale) = self.scale {
            precision::check_scale::<T>(check, scale)?;
        }
        check.argument("flag", self.flag.view(), 1)?;
        if let Some(found) = &self.squares {
            check.argument("squares", found.view(), squares)?;
        }
        Ok(FinishArgs {
            scale: self.scale.map_or(0, |scale| scale.address()),
            flag: self.flag.address(),
            squares: self.squares.as_mut().map_or(0, |squares| squares.address()),
        })
    }
}

/// # Safety
/// The addresses in the arguments must be valid for all that the kernel reads and writes.
unsafe fn launch<T: Scalar>(device: &Device, blocks: usize, args: &GradientPiecesArgs) -> Result<()> {
    let shape = Launch {
        grid: [blocks as u32, 1, 1],
        block: [BLOCK_THREADS as u32, 1, 1],
        shared: PIECE_ELEMENTS * size_of::<T>(),
    };
    // SAFETY: the caller guarantees the addresses.
    unsafe { device.launch(pick::<T, _>(id::GRADIENT_PIECES_F32, id::GRADIENT_PIECES_F64), shape, args) }
}

/// Writes the sum of the `splits` vectors in `parts`, one after the other, to `out`, or adds it.
pub(super) fn sum_parts<T: Scalar>(
    mut parts: SliceMut<'_, T>,
    splits: usize,
    mut out: SliceMut<'_, T>,
    accumulate: bool,
) -> Result<()> {
    let (n, device) = (out.len(), out.device().clone());
    assert!(parts.len() >= splits * n, "sums of every part");
    let pieces = n.div_ceil(stretch(splits));
    let args = GradientPiecesArgs {
        parts: parts.address(),
        out: out.address(),
        alone: GradientPiece {
            n: n as u64,
            splits: splits as u64,
            doublings: doublings(splits).into(),
            ..GradientPiece::default()
        },
        pieces: pieces as u64,
        accumulate: accumulate.into(),
        ..GradientPiecesArgs::default()
    };
    // SAFETY: both slices are as long as the kernel reads and writes.
    unsafe { launch::<T>(&device, pieces, &args) }
}

/// A stage's pieces, and the sums of squares that it leaves.
#[derive(Clone)]
struct Extent {
    pieces: Range<usize>,
    squares: Range<usize>,
    /// The minimum lengths of the vectors of parts and of gradients.
    parts_len: usize,
    out_len: usize,
    /// Whether it is a launch; otherwise it is a convolution.
    launched: bool,
}

/// The last stages of a network's gradient, in order. The last of them is a launch. For each gradient, every stage runs
/// once, and either all or none are called with a norm: otherwise the norm would include squares of another gradient.
///
/// Without a norm, gradients that are computed concurrently may share the stages.
pub struct GradientStages {
    table: Buffer<GradientPiece>,
    stages: Vec<Extent>,
    squares: Buffer<f64>,
    ticket: Buffer<u32>,
}

impl GradientStages {
    /// Allocates memory and tables for these stages.
    ///
    /// # Errors
    /// [`Error::Length`] if the length of parts is not a multiple of their gradient's, [`Error::Argument`] if two
    /// gradients overlap or the last stage is not a launch; errors of the allocation.
    pub fn new(device: &Device, stages: &[Stage]) -> Result<Self> {
        const OPERATION: &str = "GradientStages::new";
        let refused = |message: String| Err(Error::Argument { operation: OPERATION, message });
        if !matches!(stages.last(), Some(Stage::Launch(_))) {
            return refused("the last stage must be a launch".into());
        }
        let mut sorted: Vec<&Range<usize>> = stages.iter().flat_map(Stage::launched).map(|one| &one.place).collect();
        sorted.sort_by_key(|place| place.start);
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return refused(format!("two gradients overlap: {:?} and {:?}", pair[0], pair[1]));
        }
        let most_blocks = device.elementwise(usize::MAX, 1).grid[0] as usize;
        let (mut table, mut places, mut squares_len) = (Vec::new(), Vec::new(), 0);
        for stage in stages {
            let first = table.len();
            let (mut parts_len, mut out_len) = (0, 0);
            let squares = match stage {
                Stage::Convolution(squares) => *squares,
                Stage::Launch(gradients) => {
                    for Unfinished { parts, place } in gradients {
                        let n = place.len();
                        if let Some(parts) = parts
                            && (n == 0 || parts.is_empty() || !parts.len().is_multiple_of(n))
                        {
                            let expected = parts.len().div_ceil(n.max(1)).max(1) * n;
                            check_length(OPERATION, "parts", parts.len(), expected)?;
                        }
                        let parts = parts.clone().unwrap_or_default();
                        (parts_len, out_len) = (parts_len.max(parts.end), out_len.max(place.end));
                        let splits = parts.len() / n.max(1);
                        table.extend((0..n).step_by(stretch(splits)).map(|first| GradientPiece {
                            parts: parts.start as u64,
                            out: place.start as u64,
                            n: n as u64,
                            splits: splits as u64,
                            first: first as u64,
                            doublings: doublings(splits).into(),
                        }));
                    }
                    (table.len() - first).clamp(1, most_blocks)
                }
            };
            let squares = squares_len..squares_len + squares;
            squares_len = squares.end;
            let launched = matches!(stage, Stage::Launch(_));
            places.push(Extent { pieces: first..table.len(), squares, parts_len, out_len, launched });
        }
        Ok(Self {
            table: device.upload(&table)?,
            stages: places,
            squares: device.zeros(squares_len)?,
            ticket: device.zeros(1)?,
        })
    }

    /// The arguments for a convolution that is stage number `stage`. `norm`: whether the norm is wanted at the end.
    ///
    /// # Errors
    /// [`Error::Argument`] unless this stage exists and is a convolution.
    pub fn finish<'a>(
        &'a mut self,
        stage: usize,
        scale: Option<Slice<'a, f64>>,
        flag: SliceMut<'a, u32>,
        norm: bool,
    ) -> Result<Finish<'a>> {
        let place = self.place("GradientStages::finish", stage, false)?.squares.clone();
        let squares = if norm { Some(self.squares.slice_mut(place)?) } else { None };
        Ok(Finish { scale, flag, squares })
    }

    /// Launches stage number `stage`: it writes the sums of `parts` to their places in `out`. Complete gradients change
    /// only by the scale. `norm`: whether the norm is wanted at the end.
    ///
    /// # Errors
    /// [`Error::Argument`] unless this stage exists and is a launch, [`Error::Length`] for vectors too short for its
    /// places, [`Error::OtherDevice`] for vectors of another device.
    pub fn launch<T: Scalar>(
        &mut self,
        stage: usize,
        parts: Slice<'_, T>,
        out: SliceMut<'_, T>,
        scale: Option<Slice<'_, f64>>,
        flag: SliceMut<'_, u32>,
        norm: bool,
    ) -> Result<()> {
        let norm = if norm { NormStage::Later } else { NormStage::None };
        self.run("GradientStages::launch", stage, parts, out, scale, flag, norm)
    }

    /// Launches the last stage. If `norm` (one element) is given, it receives the norm of all finished gradients.
    ///
    /// # Errors
    /// As those of [`GradientStages::launch`].
    pub fn end<T: Scalar>(
        &mut self,
        parts: Slice<'_, T>,
        out: SliceMut<'_, T>,
        scale: Option<Slice<'_, f64>>,
        flag: SliceMut<'_, u32>,
        norm: Option<SliceMut<'_, f64>>,
    ) -> Result<()> {
        let norm = norm.map_or(NormStage::None, NormStage::Now);
        self.run("GradientStages::end", self.stages.len() - 1, parts, out, scale, flag, norm)
    }

    fn place(&self, operation: &'static str, stage: usize, launched: bool) -> Result<&Extent> {
        let found = self.stages.get(stage).filter(|place| place.launched == launched);
        found.ok_or_else(|| {
            let what = if launched { "launch" } else { "convolution" };
            Error::Argument { operation, message: format!("stage {stage} of {} is not a {what}", self.stages.len()) }
        })
    }

    fn run<T: Scalar>(
        &mut self,
        operation: &'static str,
        stage: usize,
        parts: Slice<'_, T>,
        mut out: SliceMut<'_, T>,
        scale: Option<Slice<'_, f64>>,
        flag: SliceMut<'_, u32>,
        norm: NormStage<'_>,
    ) -> Result<()> {
        let device = self.table.device().clone();
        let Extent { pieces, squares, parts_len, out_len, .. } = self.place(operation, stage, true)?.clone();
        for (name, found, needed) in [("parts", parts.len(), parts_len), ("out", out.len(), out_len)] {
            if found < needed {
                check_length(operation, name, found, needed)?;
            }
        }
        let check = Check { operation, device: &device };
        check.device("parts", parts.device())?;
        check.device("out", out.device())?;
        let (blocks, table) = (squares.len(), self.table.slice(pieces.clone())?.address());
        let mut args = GradientPiecesArgs {
            parts: parts.address(),
            out: out.address(),
            table,
            pieces: pieces.len() as u64,
            all_squares: self.squares.view().address(),
            all_squares_count: self.squares.len() as u64,
            ticket: self.ticket.view_mut().address(),
            ..GradientPiecesArgs::default()
        };
        let squares = if matches!(norm, NormStage::None) { None } else { Some(self.squares.slice_mut(squares)?) };
        args.finish = Finish { scale, flag, squares }.args::<T>(check, blocks)?;
        if let NormStage::Now(mut norm) = norm {
            check.argument("norm", norm.view(), 1)?;
            args.norm = norm.address();
        }
        // SAFETY: the places of the pieces lie in the two vectors and do not overlap. There is a sum of squares for
        // every block, and all of them were initialised.
        unsafe { launch::<T>(&device, blocks, &args) }
    }
}

/// What a launch does for the norm.
enum NormStage<'a> {
    /// Nothing.
    None,
    /// It leaves sums of squares.
    Later,
    /// It leaves sums of squares, and its last block writes the norm.
    Now(SliceMut<'a, f64>),
}
