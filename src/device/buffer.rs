//! Typed device memory. A [`Buffer`] owns it, [`Slice`] and [`SliceMut`] borrow a part, and [`Disjoint`] lends several
//! parts of one buffer that must not overlap.

use std::marker::PhantomData;
use std::ops::Range;

use super::host::HostMemory;
use super::{Device, Element, Error, Inner, Result, cuda::CudaMemory};

/// Device memory for `len` elements of `T`. Dropping it frees it, on a GPU in the order of the stream.
/// [`Buffer::from_raw`] takes memory of another library instead, which stays its owner.
pub struct Buffer<T: Element> {
    device: Device,
    memory: Memory,
    len: usize,
    element: PhantomData<T>,
}

enum Memory {
    Host(HostMemory),
    Cuda(CudaMemory),
    /// An address in memory of another library.
    Foreign(u64),
}

impl<T: Element> Buffer<T> {
    /// `len` elements at `address` that another library allocated and frees, for code that wants a buffer, such as
    /// [`Optimizer::with_memory`](crate::optim::Optimizer::with_memory). Nothing is copied, and dropping it does
    /// nothing. An address that is a multiple of 16 lets kernels read four floats at once.
    ///
    /// # Errors
    /// As [`Slice::from_raw`].
    ///
    /// # Safety
    /// For as long as the buffer exists, and on a GPU until the work that was given it has finished:
    /// - the memory is allocated and initialised, and every element lies on `device`;
    /// - nobody else reads or writes it, except work that the device's stream already orders with the work here.
    pub unsafe fn from_raw(device: &Device, address: u64, len: usize) -> Result<Self> {
        check_raw::<T>("Buffer::from_raw", address, len)?;
        Ok(Self { device: device.clone(), memory: Memory::Foreign(address), len, element: PhantomData })
    }

    /// Memory in which every byte is `byte`.
    pub(super) fn filled(device: &Device, len: usize, byte: u8) -> Result<Self> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .ok_or_else(|| Error::OutOfMemory { device: device.name(), bytes: usize::MAX })?;
        let memory = match &device.0 {
            Inner::Host(host) => Memory::Host(HostMemory::filled(host, bytes, byte)?),
            Inner::Cuda(cuda) => Memory::Cuda(CudaMemory::filled(cuda, bytes, byte)?),
        };
        Ok(Self { device: device.clone(), memory, len, element: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn address(&self) -> u64 {
        match &self.memory {
            Memory::Host(memory) => memory.address(),
            Memory::Cuda(memory) => memory.address(),
            Memory::Foreign(address) => *address,
        }
    }

    /// The whole buffer, for reading.
    pub fn view(&self) -> Slice<'_, T> {
        Slice { device: &self.device, address: self.address(), len: self.len, borrow: PhantomData }
    }

    /// The whole buffer, for writing.
    pub fn view_mut(&mut self) -> SliceMut<'_, T> {
        SliceMut { device: &self.device, address: self.address(), len: self.len, borrow: PhantomData }
    }

    /// A part, for reading.
    ///
    /// # Errors
    /// [`Error::Range`] where it ends outside.
    pub fn slice(&self, range: Range<usize>) -> Result<Slice<'_, T>> {
        self.view().slice(range)
    }

    /// A part, for writing.
    ///
    /// # Errors
    /// [`Error::Range`] where it ends outside.
    pub fn slice_mut(&mut self, range: Range<usize>) -> Result<SliceMut<'_, T>> {
        check_range("Buffer::slice_mut", &range, self.len)?;
        let address = self.address() + (range.start * size_of::<T>()) as u64;
        Ok(SliceMut { device: &self.device, address, len: range.len(), borrow: PhantomData })
    }

    /// Borrows the whole buffer so that several parts of it can be read and written by one operation.
    pub fn disjoint(&mut self) -> Disjoint<'_, T> {
        Disjoint::new(&self.device, self.address(), self.len)
    }

    /// Copies `values` from the host to the buffer, in the order of the device's work.
    ///
    /// # Errors
    /// [`Error::Length`] unless `values` has the buffer's length.
    pub fn write(&mut self, values: &[T]) -> Result<()> {
        self.view_mut().write(values)
    }

    /// Waits for the device and copies the buffer to the host.
    ///
    /// # Errors
    /// [`Error::Length`] unless `values` has the buffer's length; errors of earlier work on the device.
    pub fn read(&self, values: &mut [T]) -> Result<()> {
        self.view().read(values)
    }

    /// [`Buffer::read`] into a new vector.
    ///
    /// # Errors
    /// Those of earlier work on the device; [`Error::Argument`] while a graph is captured.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        self.view().to_vec()
    }

    /// Copies another buffer of the same device and length: reads and writes `len` elements.
    ///
    /// # Errors
    /// [`Error::Length`] and [`Error::OtherDevice`].
    pub fn copy_from(&mut self, source: &Buffer<T>) -> Result<()> {
        self.view_mut().copy_from(source.view())
    }

    /// Sets every byte to zero.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver fails.
    pub fn clear(&mut self) -> Result<()> {
        self.view_mut().clear()
    }
}

fn check_range(operation: &'static str, range: &Range<usize>, len: usize) -> Result<()> {
    if range.start <= range.end && range.end <= len {
        return Ok(());
    }
    let reason = format!("does not lie in a buffer of {len} elements");
    Err(Error::Range { operation, start: range.start, end: range.end, reason })
}

/// Whether `len` elements of U lie within `found` elements of T.
fn check_cast<T: Element, U: Element>(operation: &'static str, found: usize, len: usize) -> Result<()> {
    let fits = len.checked_mul(size_of::<U>()).is_some_and(|bytes| bytes <= found * size_of::<T>());
    let message = || format!("{len} elements of {} bytes in {found} of {}", size_of::<U>(), size_of::<T>());
    if fits && align_of::<U>() <= align_of::<T>() {
        Ok(())
    } else {
        Err(Error::Argument { operation, message: message() })
    }
}

/// Fails unless an argument's length is the expected one.
pub(crate) fn check_length(
    operation: &'static str,
    argument: &'static str,
    found: usize,
    expected: usize,
) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { operation, argument, found, expected }) }
}

/// Checks the address and the length of foreign memory.
fn check_raw<T: Element>(operation: &'static str, address: u64, len: usize) -> Result<()> {
    let fits = len
        .checked_mul(size_of::<T>())
        .filter(|&bytes| bytes <= isize::MAX as usize)
        .is_some_and(|bytes| address.checked_add(bytes as u64).is_some());
    let reason = match address {
        _ if !fits => "it is too long",
        0 if len > 0 => "the address is null",
        address if !address.is_multiple_of(align_of::<T>() as u64) => "the address is not aligned to its type",
        _ => return Ok(()),
    };
    Err(Error::Argument { operation, message: format!("{len} elements at {address:#x}: {reason}") })
}

/// A part of a buffer, borrowed for reading. [`Slice::from_raw`] borrows memory of another library.
#[derive(Clone, Copy)]
pub struct Slice<'a, T: Element> {
    device: &'a Device,
    address: u64,
    len: usize,
    borrow: PhantomData<&'a T>,
}

impl<'a, T: Element> Slice<'a, T> {
    /// Borrows `len` elements at `address` that this library does not own: a GPU's address
    /// ([`Device::adopt`]), or on the CPU that of a host pointer (`pointer.expose_provenance() as u64`). Nothing is
    /// copied. An address that is a multiple of 16 lets kernels read four floats at once.
    ///
    /// # Errors
    /// [`Error::Argument`] for a null address, one that is not aligned to `T`, and a length that no memory has.
    ///
    /// # Safety
    /// For as long as the slice and its copies exist, and on a GPU until the work that was given them has finished:
    /// - the memory is allocated and initialised, and every element lies on `device`;
    /// - nobody writes to it, except work that the device's stream already orders with the work here.
    pub unsafe fn from_raw(device: &'a Device, address: u64, len: usize) -> Result<Self> {
        check_raw::<T>("Slice::from_raw", address, len)?;
        Ok(Self { device, address, len, borrow: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device it lives on.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The address of its first element, for code outside this library: on a GPU a `CUdeviceptr`, on the CPU that of a
    /// host pointer (`std::ptr::with_exposed_provenance`). It may be read as long as the slice may be.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// A part of this part.
    ///
    /// # Errors
    /// [`Error::Range`] where it ends outside.
    pub fn slice(self, range: Range<usize>) -> Result<Slice<'a, T>> {
        check_range("Slice::slice", &range, self.len)?;
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Ok(Slice { address, len: range.len(), ..self })
    }

    /// The first `len` elements of the same memory as another type, whose alignment must not be larger.
    pub(crate) fn cast<U: Element>(self, len: usize) -> Result<Slice<'a, U>> {
        check_cast::<T, U>("Slice::cast", self.len, len)?;
        Ok(Slice { device: self.device, address: self.address, len, borrow: PhantomData })
    }

    /// Waits for the device and copies to the host.
    ///
    /// # Errors
    /// [`Error::Length`] unless `values` has this length; errors of earlier work on the device.
    pub fn read(&self, values: &mut [T]) -> Result<()> {
        check_length("Slice::read", "values", values.len(), self.len)?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        match &self.device.0 {
            // SAFETY: the slice borrows `len` elements of live memory, and `values` is as long.
            Inner::Host(host) => unsafe { host.read(self.address, bytes) },
            // SAFETY: as above.
            Inner::Cuda(cuda) => unsafe { cuda.read(self.address, bytes) },
        }
    }

    /// [`Slice::read`] into a new vector.
    ///
    /// # Errors
    /// Those of earlier work on the device; [`Error::Argument`] while a graph is captured.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.len];
        self.read(&mut values)?;
        Ok(values)
    }
}

/// A part of a buffer, borrowed for writing. [`SliceMut::from_raw`] borrows memory of another library.
pub struct SliceMut<'a, T: Element> {
    device: &'a Device,
    address: u64,
    len: usize,
    borrow: PhantomData<&'a mut T>,
}

impl<'a, T: Element> SliceMut<'a, T> {
    /// Borrows `len` elements at `address` to write to, as [`Slice::from_raw`] does to read.
    ///
    /// # Errors
    /// As [`Slice::from_raw`].
    ///
    /// # Safety
    /// For as long as the slice exists, and on a GPU until the work that was given it has finished:
    /// - the memory is allocated, and every element lies on `device`;
    /// - no other slice overlaps it, and nobody else reads or writes it, except work that the device's stream already
    ///   orders with the work here.
    pub unsafe fn from_raw(device: &'a Device, address: u64, len: usize) -> Result<Self> {
        check_raw::<T>("SliceMut::from_raw", address, len)?;
        Ok(Self { device, address, len, borrow: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device it lives on.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The address of its first element, as [`Slice::address`], to read and to write.
    pub fn address(&mut self) -> u64 {
        self.address
    }

    /// Borrows this part so that several parts of it can be read and written by one operation.
    pub fn disjoint(&mut self) -> Disjoint<'_, T> {
        Disjoint::new(self.device, self.address, self.len)
    }

    /// The same part, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_, T> {
        SliceMut { device: self.device, address: self.address, len: self.len, borrow: PhantomData }
    }

    /// The same part, for reading.
    pub fn view(&self) -> Slice<'_, T> {
        Slice { device: self.device, address: self.address, len: self.len, borrow: PhantomData }
    }

    /// A part of this part.
    ///
    /// # Errors
    /// [`Error::Range`] where it ends outside.
    pub fn slice_mut(&mut self, range: Range<usize>) -> Result<SliceMut<'_, T>> {
        check_range("SliceMut::slice_mut", &range, self.len)?;
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Ok(SliceMut { device: self.device, address, len: range.len(), borrow: PhantomData })
    }

    /// As [`Slice::cast`].
    pub(crate) fn cast<U: Element>(self, len: usize) -> Result<SliceMut<'a, U>> {
        check_cast::<T, U>("SliceMut::cast", self.len, len)?;
        Ok(SliceMut { device: self.device, address: self.address, len, borrow: PhantomData })
    }

    /// Copies `values` from the host, in the order of the device's work.
    ///
    /// # Errors
    /// [`Error::Length`] unless `values` has this length.
    pub fn write(&mut self, values: &[T]) -> Result<()> {
        check_length("SliceMut::write", "values", values.len(), self.len)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        match &self.device.0 {
            // SAFETY: the slice borrows `len` elements of live memory exclusively, and `values` is as long.
            Inner::Host(host) => unsafe { host.write(self.address, bytes) },
            // SAFETY: as above.
            Inner::Cuda(cuda) => unsafe { cuda.write(self.address, bytes) },
        }
    }

    /// Copies `source`, of the same device and length.
    ///
    /// # Errors
    /// [`Error::Length`] and [`Error::OtherDevice`].
    pub fn copy_from(&mut self, source: Slice<'_, T>) -> Result<()> {
        check_length("SliceMut::copy_from", "source", source.len, self.len)?;
        if self.device != source.device {
            return Err(Error::OtherDevice { operation: "SliceMut::copy_from", argument: "source" });
        }
        let bytes = self.len * size_of::<T>();
        match &self.device.0 {
            // SAFETY: both slices borrow `len` elements of live memory, and the borrows keep them apart.
            Inner::Host(host) => unsafe { host.copy(source.address, self.address, bytes) },
            // SAFETY: as above.
            Inner::Cuda(cuda) => unsafe { cuda.copy(source.address, self.address, bytes) },
        }
    }

    /// Sets every byte to zero.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver fails.
    pub fn clear(&mut self) -> Result<()> {
        let bytes = self.len * size_of::<T>();
        match &self.device.0 {
            // SAFETY: the slice borrows `len` elements of live memory exclusively.
            Inner::Host(host) => unsafe { host.clear(self.address, bytes) },
            // SAFETY: as above.
            Inner::Cuda(cuda) => unsafe { cuda.clear(self.address, bytes) },
        }
    }
}

/// [`Disjoint::PARTS`], as the length of an array: that cannot be a constant of a generic type.
const PARTS: usize = 16;

/// Lends parts of one buffer to one operation, some to read and some to write. It refuses a part that overlaps one that
/// is written. It allocates no memory.
pub struct Disjoint<'a, T: Element> {
    device: &'a Device,
    address: u64,
    len: usize,
    taken: [(usize, usize, bool); PARTS],
    count: usize,
    borrow: PhantomData<&'a mut T>,
}

impl<'a, T: Element> Disjoint<'a, T> {
    /// The most parts that one operation can borrow.
    pub const PARTS: usize = PARTS;

    fn new(device: &'a Device, address: u64, len: usize) -> Self {
        Self { device, address, len, taken: [(0, 0, false); PARTS], count: 0, borrow: PhantomData }
    }

    fn take(&mut self, range: &Range<usize>, writes: bool) -> Result<u64> {
        check_range("Disjoint", range, self.len)?;
        let refused = |reason: &str| {
            let (start, end) = (range.start, range.end);
            Err(Error::Range { operation: "Disjoint", start, end, reason: reason.into() })
        };
        if self.count == Self::PARTS {
            return refused("is one part too many");
        }
        let overlaps = |&(start, end, written): &(usize, usize, bool)| {
            (writes || written) && start < range.end && range.start < end
        };
        if self.taken[..self.count].iter().any(overlaps) {
            return refused("overlaps a part that the same operation writes");
        }
        self.taken[self.count] = (range.start, range.end, writes);
        self.count += 1;
        Ok(self.address + (range.start * size_of::<T>()) as u64)
    }

    /// A part to read.
    ///
    /// # Errors
    /// [`Error::Range`] where it ends outside or overlaps a part that is written.
    pub fn read(&mut self, range: Range<usize>) -> Result<Slice<'a, T>> {
        let address = self.take(&range, false)?;
        Ok(Slice { device: self.device, address, len: range.len(), borrow: PhantomData })
    }

    /// A part to write.
    ///
    /// # Errors
    /// [`Error::Range`] where it ends outside or overlaps any other part.
    pub fn write(&mut self, range: Range<usize>) -> Result<SliceMut<'a, T>> {
        let address = self.take(&range, true)?;
        Ok(SliceMut { device: self.device, address, len: range.len(), borrow: PhantomData })
    }
}
