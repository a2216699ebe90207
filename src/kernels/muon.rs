//! Muon's step for the matrices among the weights: `kernels/muon.cu`.
//!
//! Muon is Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Decoupled weight decay and
//! the factor `0.2 sqrt(max(rows, columns))`, which gives an update the root mean square of AdamW's, are Liu et al.
//! 2025, "Muon is Scalable for LLM Training".

use std::ops::Range;

use super::vector::{Combination, Rate};
use super::{Check, pick};
use crate::arena::{ALIGNMENT, Matrix};
use crate::device::arguments::{MuonGramArgs, MuonMatrix, MuonMomentumArgs, MuonSquareArgs, MuonTile, MuonUpdateArgs};
use crate::device::constants::{BLOCK_THREADS, MUON_COPY_TILE, MUON_CPU_TILE, MUON_GPU_TILE, MUON_WORK};
use crate::device::{Buffer, Device, Error, Launch, Result, Scalar, Slice, SliceMut, id};

/// Newton–Schulz steps of one update.
const STEPS: usize = 5;

/// The coefficients of a step `aX + bX(XᵀX) + cX(XᵀX)²`.
const A: f64 = 3.4445;
const B: f64 = -4.7750;
const C: f64 = 2.0315;

/// The five squares of a matrix: its Gram matrix G, the polynomial P of it, P G, and two for the product of all P.
const G: usize = 0;
const P: usize = 1;
const PG: usize = 2;
const FIRST: usize = 3;
const SECOND: usize = 4;

/// One step of Muon.
#[derive(Clone, Copy)]
pub struct MuonStep<'a> {
    /// Learning rate η.
    pub lr: Rate<'a>,
    /// Momentum μ.
    pub momentum: f64,
    /// Decoupled weight decay λ: the weights are multiplied by `1 − ηλ`.
    pub weight_decay: f64,
    /// Matrices that begin at this element or behind it are not decayed.
    pub decay_len: usize,
}

/// The matrices of a vector of weights, and the memory that their update needs.
pub struct Muon<T: Scalar> {
    device: Device,
    matrices: Vec<Matrix>,
    table: Buffer<MuonMatrix>,
    /// Tiles of the matrices as they are copied, of the upper triangles of their squares, and of the matrices as they
    /// are updated. Of each, the tiles of one matrix follow those of the one before.
    copied: Tiles,
    squared: Tiles,
    updated: Tiles,
    /// The matrices to be orthogonalised, and their transposes.
    x: [Buffer<T>; 2],
    /// Five squares of each.
    squares: [Buffer<T>; 5],
    /// A sum of squares of each copied tile.
    partials: Buffer<f64>,
}

/// Tiles of all matrices, on the device.
struct Tiles {
    list: Buffer<MuonTile>,
    /// The first tile of each matrix, and the end.
    first: Vec<usize>,
}

impl Tiles {
    /// `tiles` lists those of one matrix: first rows and columns.
    fn new(device: &Device, matrices: &[Matrix], tiles: impl Fn(&Matrix) -> Vec<[u32; 2]>) -> Result<Self> {
        let (mut list, mut first) = (Vec::new(), vec![0]);
        for (index, matrix) in matrices.iter().enumerate() {
            let tile = |[row, column]: [u32; 2]| MuonTile { matrix: index as u32, row, column };
            list.extend(tiles(matrix).into_iter().map(tile));
            first.push(list.len());
        }
        Ok(Self { list: device.upload(&list)?, first })
    }

    /// The address of the tiles of some matrices, and their number.
    fn of(&self, matrices: &Range<usize>) -> Result<(u64, u32)> {
        let tiles = self.first[matrices.start]..self.first[matrices.end];
        Ok((self.list.slice(tiles.clone())?.address(), tiles.len() as u32))
    }
}

/// First rows and columns of the tiles of a product.
fn tiles([rows, columns]: [usize; 2], size: usize) -> Vec<[u32; 2]> {
    let starts = |n: usize| (0..n as u32).step_by(size);
    starts(rows).flat_map(|row| starts(columns).map(move |column| [row, column])).collect()
}

impl<T: Scalar> Muon<T> {
    /// Makes room for the update of these matrices, in ascending order of their places in a vector of `len` weights:
    /// two copies of them, five squares of the smaller side of each, and a few numbers for each tile.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there are matrices, each behind the one before and none empty; [`Error::Range`] for
    /// one outside of the vector; those of the allocation.
    pub fn new(device: &Device, len: usize, matrices: &[Matrix]) -> Result<Self> {
        const OPERATION: &str = "Muon::new";
        let check = Check { operation: OPERATION, device };
        if matrices.is_empty() {
            return check.refuse("Muon needs to know the matrices among the weights, and there are none".into());
        }
        let (mut table, mut end, mut scratch, mut square, mut partials) = (Vec::new(), 0, 0, 0, 0);
        for matrix in matrices {
            let Matrix { offset, rows, columns } = *matrix;
            // A size that does not fit is beyond every vector.
            let elements = rows.checked_mul(columns).filter(|n| *n <= len).unwrap_or(usize::MAX);
            if elements == 0 || offset < end {
                let reason = "an empty matrix, or one that is not behind the one before, which ends at";
                return check.refuse(format!("{rows} x {columns} at {offset}: {reason} {end}"));
            }
            let place = offset..offset.saturating_add(elements);
            if place.end > len || rows.max(columns) > i32::MAX as usize {
                let reason = format!("does not lie in {len} weights");
                return Err(Error::Range { operation: OPERATION, start: place.start, end: place.end, reason });
            }
            let copied = tiles([rows, columns], MUON_COPY_TILE).len() as u32;
            table.push(MuonMatrix {
                place: offset as u64,
                scratch: scratch as u64,
                square: square as u64,
                rows: rows as u32,
                columns: columns as u32,
                first_partial: partials,
                partials: copied,
            });
            end = place.end;
            scratch += elements.next_multiple_of(ALIGNMENT);
            square += rows.min(columns).pow(2).next_multiple_of(ALIGNMENT);
            partials += copied;
        }
        let tile = if device.is_simt() { MUON_GPU_TILE } else { MUON_CPU_TILE };
        let upper = |matrix: &Matrix| {
            let mut all = tiles([matrix.rows.min(matrix.columns); 2], tile);
            all.retain(|[row, column]| row <= column);
            all
        };
        let zeros = |len| device.zeros(len);
        Ok(Self {
            device: device.clone(),
            matrices: matrices.to_vec(),
            table: device.upload(&table)?,
            copied: Tiles::new(device, matrices, |matrix| tiles([matrix.rows, matrix.columns], MUON_COPY_TILE))?,
            squared: Tiles::new(device, matrices, upper)?,
            updated: Tiles::new(device, matrices, |matrix| tiles([matrix.rows, matrix.columns], tile))?,
            x: [zeros(scratch)?, zeros(scratch)?],
            squares: [zeros(square)?, zeros(square)?, zeros(square)?, zeros(square)?, zeros(square)?],
            partials: device.zeros(partials as usize)?,
        })
    }

    /// The matrices.
    pub fn matrices(&self) -> &[Matrix] {
        &self.matrices
    }

    /// One step for the matrices that begin in `place`. `w`, `m` and the gradients are whole vectors. With `g = Σ c_i
    /// g_i`: `m = μ m + (1 − μ) g`, `u = μ m + (1 − μ) g`, X is u over its norm (at least 1e-7) after five
    /// Newton–Schulz steps, and `w = (1 − ηλ) w − 0.2 η sqrt(max(rows, columns)) X`. Nothing that lasts is written if
    /// `skip[0]` is not zero.
    ///
    /// It takes 17 launches, however many matrices there are. Traffic: 36 B per element of the matrices with one
    /// gradient, 4 B more with each further one, and what the products read again. With sides k ≤ n, a matrix takes
    /// 3nk² + 17k³ operations (n k² for the upper triangle of its Gram matrix, k³ for that of each of 17 squares, 2nk²
    /// for the last product), where five steps as they are written take 20nk² + 10k³.
    ///
    /// # Errors
    /// [`Error::Length`] unless `m` and the gradients are as long as `w`, which is at least as long as the matrices,
    /// and `skip` holds one number; [`Error::OtherDevice`] unless all live on one device; [`Error::Argument`] for an
    /// empty combination.
    pub fn step(
        &mut self,
        place: Range<usize>,
        w: SliceMut<'_, T>,
        m: SliceMut<'_, T>,
        gradients: Combination<'_, T>,
        step: MuonStep<'_>,
        skip: Slice<'_, u32>,
    ) -> Result<()> {
        let device = self.device.clone();
        let check = Check { operation: "Muon::step", device: &device };
        check.device("w", w.device())?;
        check.argument("m", m.view(), w.len())?;
        check.argument("skip", skip, 1)?;
        if self.matrices.last().is_some_and(|last| last.range().end > w.len()) {
            return check.refuse(format!("{} weights are too few for the matrices", w.len()));
        }
        let of = |end: usize| self.matrices.partition_point(|matrix| matrix.offset < end);
        let matrices = of(place.start)..of(place.end);
        if matrices.is_empty() {
            return Ok(());
        }
        self.average(check, &matrices, w.len(), m, gradients, step.momentum, skip)?;
        let product = self.orthogonalise(&matrices, skip)?;
        self.update(check, &matrices, w, product, step, skip)
    }

    /// The momentum, and the matrices to be orthogonalised.
    fn average(
        &mut self,
        check: Check<'_>,
        matrices: &Range<usize>,
        len: usize,
        mut m: SliceMut<'_, T>,
        gradients: Combination<'_, T>,
        momentum: f64,
        skip: Slice<'_, u32>,
    ) -> Result<()> {
        let (combination, count) = gradients.args(check, len)?;
        let (tiles, blocks) = self.copied.of(matrices)?;
        let [x, transposed] = &mut self.x;
        let first = self.copied.first[matrices.start];
        let args = MuonMomentumArgs {
            matrices: self.table.view().address(),
            tiles,
            combination,
            m: m.address(),
            x: x.view_mut().address(),
            transposed: transposed.view_mut().address(),
            partials: self.partials.slice_mut(first..first + blocks as usize)?.address(),
            skip: skip.address(),
            momentum,
        };
        let kernel = match count {
            1 => pick::<T, _>(id::MUON_MOMENTUM1_F32, id::MUON_MOMENTUM1_F64),
            2 => pick::<T, _>(id::MUON_MOMENTUM2_F32, id::MUON_MOMENTUM2_F64),
            3 => pick::<T, _>(id::MUON_MOMENTUM3_F32, id::MUON_MOMENTUM3_F64),
            _ => pick::<T, _>(id::MUON_MOMENTUM4_F32, id::MUON_MOMENTUM4_F64),
        };
        let threads = if self.device.is_simt() { BLOCK_THREADS as u32 } else { 1 };
        // SAFETY: the matrices lie in m and in each of `count` gradients, and there is room for their copies and for a
        // sum of each tile.
        unsafe { self.device.launch(kernel, Launch::new(blocks, threads), &args) }
    }

    /// The shape of a launch that multiplies tiles.
    fn products(&self, blocks: u32) -> Launch {
        if self.device.is_simt() {
            Launch::new(blocks, BLOCK_THREADS as u32)
        } else {
            Launch::new(blocks, 1).with_shared(MUON_WORK * size_of::<T>())
        }
    }

    /// Newton–Schulz steps of the Gram matrices. Returns the index of the squares whose products with the matrices are
    /// orthogonal.
    fn orthogonalise(&mut self, matrices: &Range<usize>, skip: Slice<'_, u32>) -> Result<usize> {
        self.gram(matrices, skip)?;
        // The first P is the product so far.
        let (mut product, mut next) = (FIRST, SECOND);
        for step in 0..STEPS {
            let polynomial = if step == 0 { product } else { P };
            let last = step + 1 == STEPS;
            self.square(matrices, skip, &[([G, G], polynomial)], (C, B, A))?;
            let both = [([polynomial, G], PG), ([product, P], next)];
            let wanted = if step == 0 { 0..1 } else { usize::from(last)..2 };
            self.square(matrices, skip, &both[wanted], (1.0, 0.0, 0.0))?;
            if step > 0 {
                std::mem::swap(&mut product, &mut next);
            }
            if !last {
                self.square(matrices, skip, &[([PG, polynomial], G)], (1.0, 0.0, 0.0))?;
            }
        }
        Ok(product)
    }

    /// The Gram matrices of the smaller sides.
    fn gram(&mut self, matrices: &Range<usize>, skip: Slice<'_, u32>) -> Result<()> {
        let (tiles, blocks) = self.squared.of(matrices)?;
        let args = MuonGramArgs {
            matrices: self.table.view().address(),
            tiles,
            x: self.x[0].view().address(),
            transposed: self.x[1].view().address(),
            out: self.squares[G].view_mut().address(),
            partials: self.partials.view().address(),
            skip: skip.address(),
        };
        let kernel = pick::<T, _>(id::MUON_GRAM_F32, id::MUON_GRAM_F64);
        // SAFETY: the tables were made for these buffers.
        unsafe { self.device.launch(kernel, self.products(blocks), &args) }
    }

    /// One or two products of squares, `left · right` each to another square, times `product`, plus `added` G, plus
    /// `identity` on the diagonal.
    fn square(
        &mut self,
        matrices: &Range<usize>,
        skip: Slice<'_, u32>,
        products: &[([usize; 2], usize)],
        (product, added, identity): (f64, f64, f64),
    ) -> Result<()> {
        let (tiles, blocks) = self.squared.of(matrices)?;
        let squares = &mut self.squares;
        let mut args = MuonSquareArgs {
            matrices: self.table.view().address(),
            tiles,
            left: [0; 2],
            right: [0; 2],
            out: [0; 2],
            addend: squares[G].view().address(),
            skip: skip.address(),
            product,
            added,
            identity,
        };
        for (index, ([left, right], out)) in products.iter().enumerate() {
            args.left[index] = squares[*left].view().address();
            args.right[index] = squares[*right].view().address();
            args.out[index] = squares[*out].view_mut().address();
        }
        let kernel = pick::<T, _>(id::MUON_SQUARE_F32, id::MUON_SQUARE_F64);
        let shape = self.products(blocks);
        let shape = Launch { grid: [blocks, products.len() as u32, 1], ..shape };
        // SAFETY: the tables were made for these buffers, and no product is written over what another block reads.
        unsafe { self.device.launch(kernel, shape, &args) }
    }

    /// The update with the orthogonal matrices.
    fn update(
        &mut self,
        check: Check<'_>,
        matrices: &Range<usize>,
        mut w: SliceMut<'_, T>,
        square: usize,
        step: MuonStep<'_>,
        skip: Slice<'_, u32>,
    ) -> Result<()> {
        let (lr_on_device, lr) = step.lr.args(check)?;
        let (tiles, blocks) = self.updated.of(matrices)?;
        let args = MuonUpdateArgs {
            matrices: self.table.view().address(),
            tiles,
            x: self.x[0].view().address(),
            transposed: self.x[1].view().address(),
            square: self.squares[square].view().address(),
            w: w.address(),
            partials: self.partials.view().address(),
            skip: skip.address(),
            lr_on_device,
            decay_len: step.decay_len as u64,
            lr,
            weight_decay: step.weight_decay,
        };
        let kernel = pick::<T, _>(id::MUON_UPDATE_F32, id::MUON_UPDATE_F64);
        // SAFETY: the tables were made for these buffers, and the matrices lie in w.
        unsafe { self.device.launch(kernel, self.products(blocks), &args) }
    }
}
