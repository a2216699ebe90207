//! The state of an optimizer as bytes, for programs that write checkpoints of their own.
//!
//! A snapshot is a sequence of entries, each with its length in bytes before it: the header (method, base, type, number
//! of weights), then the vectors and numbers of [`State`] as they lie in memory. A magic number and a version come
//! first, a checksum last. Numbers have the byte order of the machine. On one with the other order, the version is
//! unknown.

use super::{Optimizer, State};
use crate::device::{self, Buffer, Element, Error, Scalar};

/// The first bytes of a snapshot.
const MAGIC: &[u8; 8] = b"polderOS";

/// The version of the format.
const VERSION: u64 = 1;

/// Why a snapshot was refused. The optimizer is as it was, unless its device failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Bytes that do not begin as a snapshot does.
    #[error("not the state of an optimizer")]
    Foreign,
    /// A version that this version of polder does not know.
    #[error("a state of version {found}, expected {VERSION}")]
    Version {
        /// The version of the bytes.
        found: u64,
    },
    /// The state of another optimizer.
    #[error("the state has {what} {found}, the optimizer has {expected}")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// The snapshot's.
        found: String,
        /// The optimizer's.
        expected: String,
    },
    /// Some bytes are missing, or there are too many.
    #[error("the state has {found} bytes, expected {expected}")]
    Length {
        /// Number of bytes.
        found: usize,
        /// Number of bytes of this optimizer's state.
        expected: usize,
    },
    /// The bytes are not those that were written.
    #[error("the state is damaged: its checksum differs")]
    Damaged,
    /// The device failed. The optimizer may have taken over a part of the state.
    #[error(transparent)]
    Device(#[from] Error),
}

impl<T: Scalar> Optimizer<T> {
    /// The number of bytes of [`Optimizer::snapshot`]. It does not change from step to step.
    pub fn snapshot_len(&self, method: &str) -> usize {
        let State { momentum, second_moment, memory, scalars, counters, .. } = &self.state;
        let vectors = [bytes(momentum), bytes(second_moment), bytes(memory), bytes(scalars), bytes(counters)];
        let header: usize = self.header(method).iter().map(|(_, text)| 8 + text.len()).sum();
        // The magic number, the version, the factor of rho, the attempts and the checksum.
        header + vectors.iter().map(|bytes| 8 + bytes).sum::<usize>() + 5 * 8
    }

    /// Waits for the device and writes down all that the steps that follow depend on: [`State`] and the factor of
    /// [`Optimizer::scale_rho`]. The weights, which belong to the caller, and the settings are not part of it. `method`
    /// is a name of the method, such as that of its [`Entry`](super::Entry); [`Optimizer::restore`] expects the same.
    ///
    /// ```
    /// use polder::Device;
    /// use polder::optim::{Base, Optimizer, Sam, Settings};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let make = || Optimizer::<f32>::new(&Device::host(), 10, Settings::new(Sam::new(0.05), Base::sgd(0.9)));
    /// let snapshot = make()?.snapshot("sam")?;
    /// let mut resumed = make()?;
    /// resumed.restore("sam", &snapshot)?;
    /// assert!(resumed.restore("cr-sam", &snapshot).is_err());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// What failed on the device.
    pub fn snapshot(&self, method: &str) -> device::Result<Vec<u8>> {
        let State { momentum, second_moment, memory, scalars, counters, attempts } = &self.state;
        let mut out = Vec::with_capacity(self.snapshot_len(method));
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_ne_bytes());
        for (_, text) in self.header(method) {
            put(&mut out, text.as_bytes());
        }
        out.extend_from_slice(&self.rho_factor.to_ne_bytes());
        out.extend_from_slice(&attempts.to_ne_bytes());
        for vector in [momentum, second_moment, memory] {
            put(&mut out, bytemuck::cast_slice(&vector.to_vec()?));
        }
        put(&mut out, bytemuck::cast_slice(&scalars.to_vec()?));
        put(&mut out, bytemuck::cast_slice(&counters.to_vec()?));
        let sum = checksum(&out);
        out.extend_from_slice(&sum.to_ne_bytes());
        Ok(out)
    }

    /// Takes over the state of an optimizer with the same method, base, type and number of weights. Its next steps then
    /// have the same bits as those of that optimizer, if weights and settings are the same too. What
    /// [`Optimizer::telemetry`] tells of the newest step is not part of the state.
    ///
    /// # Errors
    /// [`SnapshotError`]. All but a failure of the device leave the optimizer as it was.
    pub fn restore(&mut self, method: &str, snapshot: &[u8]) -> Result<(), SnapshotError> {
        let expected = self.snapshot_len(method);
        let mut reader = Reader { rest: snapshot, length: SnapshotError::Length { found: snapshot.len(), expected } };
        if !snapshot.starts_with(MAGIC) {
            return Err(SnapshotError::Foreign);
        }
        reader.take(MAGIC.len())?;
        let found = reader.number()?;
        if found != VERSION {
            return Err(SnapshotError::Version { found });
        }
        for (what, expected) in self.header(method) {
            let found = reader.entry()?;
            if found != expected.as_bytes() {
                let found = String::from_utf8_lossy(found).into_owned();
                return Err(SnapshotError::Mismatch { what, found, expected });
            }
        }
        if snapshot.len() != expected {
            return Err(reader.length);
        }
        let (content, sum) = snapshot.split_at(expected - 8);
        if checksum(content).to_ne_bytes() != sum {
            return Err(SnapshotError::Damaged);
        }
        let (rho_factor, attempts) = (f64::from_bits(reader.number()?), reader.number()?);
        let State { momentum, second_moment, memory, scalars, counters, .. } = &self.state;
        let vectors = [
            reader.vector("momentum", bytes(momentum))?,
            reader.vector("a second moment", bytes(second_moment))?,
            reader.vector("a memory", bytes(memory))?,
            reader.vector("scalars", bytes(scalars))?,
            reader.vector("counters", bytes(counters))?,
        ];
        self.state.momentum.write(&aligned(vectors[0]))?;
        self.state.second_moment.write(&aligned(vectors[1]))?;
        self.state.memory.write(&aligned(vectors[2]))?;
        self.state.scalars.write(&aligned(vectors[3]))?;
        self.state.counters.write(&aligned(vectors[4]))?;
        self.state.attempts = attempts;
        self.rho_factor = rho_factor;
        Ok(())
    }

    /// What two optimizers must share, by name.
    fn header(&self, method: &str) -> [(&'static str, String); 4] {
        [
            ("the method", method.into()),
            ("the base", self.settings.base.name().into()),
            ("the type", T::NAME.into()),
            ("the number of weights", self.len.to_string()),
        ]
    }
}

fn bytes<E: Element>(buffer: &Buffer<E>) -> usize {
    buffer.len() * size_of::<E>()
}

/// The numbers in bytes that may lie at any address.
fn aligned<E: Element>(bytes: &[u8]) -> Vec<E> {
    let mut numbers = vec![E::zeroed(); bytes.len() / size_of::<E>()];
    bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(bytes);
    numbers
}

/// Writes an entry.
fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_ne_bytes());
    out.extend_from_slice(bytes);
}

/// FNV-1a over words of eight bytes: it notices every change within a single word.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The bytes that have not been read yet.
struct Reader<'a> {
    rest: &'a [u8],
    /// The answer where bytes are missing.
    length: SnapshotError,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], SnapshotError> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or_else(|| self.length.clone())?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u64, SnapshotError> {
        let mut number = [0; 8];
        number.copy_from_slice(self.take(8)?);
        Ok(u64::from_ne_bytes(number))
    }

    fn entry(&mut self) -> Result<&'a [u8], SnapshotError> {
        let n = self.number()?;
        self.take(usize::try_from(n).unwrap_or(usize::MAX))
    }

    /// An entry of so many bytes.
    fn vector(&mut self, what: &'static str, expected: usize) -> Result<&'a [u8], SnapshotError> {
        let found = self.entry()?;
        if found.len() == expected {
            return Ok(found);
        }
        let [found, expected] = [found.len(), expected].map(|n| format!("of {n} bytes"));
        Err(SnapshotError::Mismatch { what, found, expected })
    }
}
