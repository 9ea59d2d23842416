// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory as a device sees it: what its DMA can reach.
//!
//! The machine maps pieces of files (the guest's RAM) at bus addresses. A transfer takes a [`Snapshot`], which keeps the
//! pieces it saw mapped until it is dropped, so that an unmap in the middle of a transfer is harmless.

use std::fs::File;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory as _, VolatileSlice};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Pages of the host: bus addresses, sizes and file offsets of a mapping are multiples of it.
const PAGE: u64 = 4096;

/// Why memory could not be mapped or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Nothing is mapped there, or not all of it.
    #[error("{bytes} bytes at bus address {address:#x} are not guest memory")]
    Unmapped {
        /// First byte asked for.
        address: u64,
        /// How many were asked for.
        bytes: u64,
    },
    /// It is mapped, but the device must not write it.
    #[error("bus address {0:#x} is read-only")]
    ReadOnly(u64),
    /// An atomic access that is not naturally aligned.
    #[error("bus address {0:#x} is not aligned")]
    Unaligned(u64),
    /// A mapping of no bytes, around the end of the address space, or not of whole pages.
    #[error("{bytes:#x} bytes at {start:#x} cannot be mapped")]
    BadRange {
        /// Bus address.
        start: u64,
        /// Bytes.
        bytes: u64,
    },
    /// Something is mapped there already.
    #[error("{bytes:#x} bytes at {start:#x} overlap a mapping")]
    Overlap {
        /// Bus address.
        start: u64,
        /// Bytes.
        bytes: u64,
    },
    /// The file is shorter than the mapping: touching the rest would end the process.
    #[error("the file holds {file_bytes:#x} bytes and {wanted:#x} are to be mapped")]
    ShortFile {
        /// Size of the file.
        file_bytes: u64,
        /// End of the mapping in the file.
        wanted: u64,
    },
    /// The host refused.
    #[error("mapping guest memory: {0}")]
    Host(#[source] std::io::Error),
}

/// One mapped piece of a file.
#[derive(Debug)]
pub struct Region {
    start: u64,
    bytes: u64,
    writable: bool,
    map: MmapRegion<()>,
}

impl Region {
    /// Maps `bytes` of `file` from `offset` on; `start` is what its first byte is called.
    pub fn new(
        start: u64,
        bytes: u64,
        file: &File,
        offset: u64,
        writable: bool,
    ) -> Result<Self, MemoryError> {
        let bad = MemoryError::BadRange { start, bytes };
        let (Some(_), Some(wanted)) = (start.checked_add(bytes), offset.checked_add(bytes)) else {
            return Err(bad);
        };
        if bytes == 0 || (start | bytes | offset) % PAGE != 0 || start.checked_add(bytes - 1).is_none() {
            return Err(bad);
        }
        let Ok(length) = usize::try_from(bytes) else { return Err(bad) };
        let file_bytes = file.metadata().map_err(MemoryError::Host)?.len();
        if file_bytes < wanted {
            return Err(MemoryError::ShortFile { file_bytes, wanted });
        }
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let file = file.try_clone().map_err(MemoryError::Host)?;
        let map = MmapRegion::build(
            Some(FileOffset::new(file, offset)),
            length,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|error| MemoryError::Host(std::io::Error::other(error)))?;
        Ok(Self { start, bytes, writable, map })
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn last(&self) -> u64 {
        self.start + (self.bytes - 1)
    }

    /// The bytes from `address` on, at most `bytes` of them and not beyond the region's end.
    #[inline]
    pub fn slice_up_to(
        &self,
        address: u64,
        bytes: u64,
        write: bool,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        let unmapped = MemoryError::Unmapped { address, bytes };
        let Some(offset) = address.checked_sub(self.start).filter(|offset| *offset < self.bytes) else {
            return Err(unmapped);
        };
        if write && !self.writable {
            return Err(MemoryError::ReadOnly(address));
        }
        let count = bytes.min(self.bytes - offset);
        self.map.get_slice(offset as usize, count as usize).map_err(|_| unmapped)
    }

    /// The word at `address`, for atomic use.
    #[inline]
    pub fn atomic_u64(&self, address: u64, write: bool) -> Result<&AtomicU64, MemoryError> {
        let unmapped = MemoryError::Unmapped { address, bytes: 8 };
        if address % 8 != 0 {
            return Err(MemoryError::Unaligned(address));
        }
        if write && !self.writable {
            return Err(MemoryError::ReadOnly(address));
        }
        let Some(offset) = address.checked_sub(self.start) else { return Err(unmapped) };
        self.map.get_atomic_ref(offset as usize).map_err(|_| unmapped)
    }
}

type Regions = Vec<Arc<Region>>;

/// All the memory a function's DMA reaches, in order of bus address.
#[derive(Debug, Default)]
pub struct SystemMemory {
    regions: ArcSwap<Regions>,
    /// Held while the list is replaced, so that two changes do not lose each other.
    change: Mutex<()>,
}

impl SystemMemory {
    /// No memory yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `bytes` of `file`, from `offset` on, at bus address `start`.
    pub fn map(
        &self,
        start: u64,
        bytes: u64,
        file: &File,
        offset: u64,
        writable: bool,
    ) -> Result<(), MemoryError> {
        let region = Arc::new(Region::new(start, bytes, file, offset, writable)?);
        let _change = self.change.lock();
        let mut regions = Regions::clone(&self.regions.load());
        let at = regions.partition_point(|other| other.start < start);
        let before = at.checked_sub(1).and_then(|i| regions.get(i));
        if before.is_some_and(|other| other.last() >= start)
            || regions.get(at).is_some_and(|other| other.start <= region.last())
        {
            return Err(MemoryError::Overlap { start, bytes });
        }
        regions.insert(at, region);
        self.regions.store(Arc::new(regions));
        Ok(())
    }

    /// Takes away every region wholly inside the range; an error if there is none or if one sticks out of it.
    pub fn unmap(&self, start: u64, bytes: u64) -> Result<(), MemoryError> {
        let unmapped = MemoryError::Unmapped { address: start, bytes };
        let Some(last) = bytes.checked_sub(1).and_then(|more| start.checked_add(more)) else {
            return Err(MemoryError::BadRange { start, bytes });
        };
        let _change = self.change.lock();
        let mut regions = Regions::clone(&self.regions.load());
        let before = regions.len();
        if regions
            .iter()
            .any(|r| r.start <= last && r.last() >= start && (r.start < start || r.last() > last))
        {
            return Err(unmapped);
        }
        regions.retain(|r| r.start < start || r.last() > last);
        if regions.len() == before {
            return Err(unmapped);
        }
        self.regions.store(Arc::new(regions));
        Ok(())
    }

    /// Takes everything away.
    pub fn clear(&self) {
        let _change = self.change.lock();
        self.regions.store(Arc::new(Regions::new()));
    }

    /// What is mapped now, held alive until the snapshot is dropped.
    #[inline]
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { regions: self.regions.load() }
    }
}

/// The memory as it was mapped at one moment.
pub struct Snapshot {
    regions: Guard<Arc<Regions>>,
}

impl Snapshot {
    #[inline]
    fn region(&self, address: u64) -> Option<&Region> {
        let regions = self.regions.deref();
        let at = regions.partition_point(|region| region.start <= address);
        let region = regions.get(at.checked_sub(1)?)?;
        (address <= region.last()).then_some(region)
    }

    /// The bytes from `address` on in one region: at most `bytes`, at least one.
    #[inline]
    pub fn slice_up_to(
        &self,
        address: u64,
        bytes: u64,
        write: bool,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        match self.region(address) {
            Some(region) => region.slice_up_to(address, bytes, write),
            None => Err(MemoryError::Unmapped { address, bytes }),
        }
    }

    /// Whether all of the range is mapped (and writable, if `write`).
    pub fn check(&self, address: u64, bytes: u64, write: bool) -> Result<(), MemoryError> {
        self.each(address, bytes, write, |_, _| ())
    }

    /// Reads bytes; on an error `data` may hold the first part.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.each(address, data.len() as u64, false, |at, slice| {
            slice.copy_to(&mut data[at..at + slice.len()]);
        })
    }

    /// Writes bytes; on an error the first part may have been written.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.each(address, data.len() as u64, true, |at, slice| slice.copy_from(&data[at..at + slice.len()]))
    }

    /// Copies an object out of the memory.
    pub fn read_object<T: FromBytes + IntoBytes>(&self, address: u64) -> Result<T, MemoryError> {
        let mut object = T::new_zeroed();
        self.read(address, object.as_mut_bytes())?;
        Ok(object)
    }

    /// Copies an object into the memory.
    pub fn write_object<T: IntoBytes + Immutable>(
        &self,
        address: u64,
        object: &T,
    ) -> Result<(), MemoryError> {
        self.write(address, object.as_bytes())
    }

    /// The word at `address`, for atomic use.
    #[inline]
    pub fn atomic_u64(&self, address: u64, write: bool) -> Result<&AtomicU64, MemoryError> {
        let region = self.region(address).ok_or(MemoryError::Unmapped { address, bytes: 8 })?;
        region.atomic_u64(address, write)
    }

    /// Stores a naturally aligned u32, after everything stored before.
    pub fn store_u32(&self, address: u64, value: u32) -> Result<(), MemoryError> {
        if address % 4 != 0 {
            return Err(MemoryError::Unaligned(address));
        }
        let slice = self.slice_up_to(address, 4, true)?;
        let word: &AtomicU32 =
            slice.get_atomic_ref(0).map_err(|_| MemoryError::Unmapped { address, bytes: 4 })?;
        word.store(value, Ordering::Release);
        Ok(())
    }

    /// Loads a naturally aligned u32, before everything loaded after.
    pub fn load_u32(&self, address: u64) -> Result<u32, MemoryError> {
        if address % 4 != 0 {
            return Err(MemoryError::Unaligned(address));
        }
        let slice = self.slice_up_to(address, 4, false)?;
        let word: &AtomicU32 =
            slice.get_atomic_ref(0).map_err(|_| MemoryError::Unmapped { address, bytes: 4 })?;
        Ok(word.load(Ordering::Acquire))
    }

    /// Stores a naturally aligned u64, after everything stored before.
    pub fn store_u64(&self, address: u64, value: u64) -> Result<(), MemoryError> {
        self.atomic_u64(address, true)?.store(value, Ordering::Release);
        Ok(())
    }

    fn each(
        &self,
        address: u64,
        bytes: u64,
        write: bool,
        mut piece: impl FnMut(usize, VolatileSlice<'_>),
    ) -> Result<(), MemoryError> {
        let unmapped = MemoryError::Unmapped { address, bytes };
        if bytes > 0 && address.checked_add(bytes - 1).is_none() {
            return Err(unmapped);
        }
        let mut done = 0;
        while done < bytes {
            let slice = self.slice_up_to(address + done, bytes - done, write)?;
            let length = slice.len() as u64;
            piece(done as usize, slice);
            done += length;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::anonymous_file;

    fn memory() -> (SystemMemory, File) {
        let file = anonymous_file(0x10_000);
        (SystemMemory::new(), file)
    }

    #[test]
    fn mappings_do_not_overlap_and_are_whole_pages() {
        let (memory, file) = memory();
        memory.map(0x2000, 0x2000, &file, 0, true).unwrap();
        for (start, bytes) in [(0x1000, 0x2000), (0x3000, 0x1000), (0x2000, 0x2000), (0, 0x10_000)] {
            assert!(matches!(memory.map(start, bytes, &file, 0, true), Err(MemoryError::Overlap { .. })));
        }
        for (start, bytes) in [(0, 0), (1, 0x1000), (0, 0x1001), (u64::MAX - 0xfff, 0x2000)] {
            assert!(matches!(memory.map(start, bytes, &file, 0, true), Err(MemoryError::BadRange { .. })));
        }
        assert!(matches!(memory.map(0, 0x2000, &file, 0xf000, true), Err(MemoryError::ShortFile { .. })));
        memory.map(0x4000, 0x1000, &file, 0x2000, true).unwrap();
        memory.map(0, 0x2000, &file, 0x3000, true).unwrap();
    }

    #[test]
    fn transfers_cross_regions_and_stop_at_holes() {
        let (memory, file) = memory();
        memory.map(0x2000, 0x1000, &file, 0x4000, true).unwrap();
        memory.map(0x3000, 0x1000, &file, 0, true).unwrap();
        let snapshot = memory.snapshot();
        let data: Vec<u8> = (0..0x1800).map(|i| i as u8).collect();
        snapshot.write(0x2400, &data).unwrap();
        let mut back = vec![0; data.len()];
        snapshot.read(0x2400, &mut back).unwrap();
        assert_eq!(back, data);
        assert!(snapshot.write(0x3ff8, &[0; 16]).is_err());
        assert!(snapshot.read(u64::MAX - 3, &mut [0; 8]).is_err());
        assert!(snapshot.check(0x1fff, 1, false).is_err());
        snapshot.check(0x2000, 0x2000, true).unwrap();
    }

    #[test]
    fn read_only_regions_are_not_written() {
        let (memory, file) = memory();
        memory.map(0, 0x1000, &file, 0, false).unwrap();
        let snapshot = memory.snapshot();
        assert!(matches!(snapshot.write(8, &[1]), Err(MemoryError::ReadOnly(8))));
        assert!(matches!(snapshot.store_u64(8, 1), Err(MemoryError::ReadOnly(8))));
        assert!(matches!(snapshot.atomic_u64(4, false), Err(MemoryError::Unaligned(4))));
        assert_eq!(snapshot.load_u32(4).unwrap(), 0);
    }

    #[test]
    fn a_snapshot_outlives_an_unmap() {
        let (memory, file) = memory();
        memory.map(0, 0x1000, &file, 0, true).unwrap();
        memory.map(0x1000, 0x1000, &file, 0x1000, true).unwrap();
        let snapshot = memory.snapshot();
        assert!(memory.unmap(0, 0x800).is_err());
        memory.unmap(0, 0x2000).unwrap();
        assert!(memory.unmap(0, 0x2000).is_err());
        snapshot.store_u64(0x1000, 7).unwrap();
        assert_eq!(snapshot.read_object::<u64>(0x1000).unwrap(), 7);
        assert!(memory.snapshot().read_object::<u64>(0x1000).is_err());
    }
}
