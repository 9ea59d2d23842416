// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that the workloads map, change and take away under the device's hands.
//!
//! Nothing in here is ever seen as a Rust reference: words are read and written through relaxed atomics by address, since the
//! device writes them at any time, and a range may be gone. Touching a word that the workload itself has taken away ends the
//! process with a signal, which the workload's parent reports; it is never undefined behaviour of the language, for no object
//! of Rust's lives there.
#![allow(unsafe_code)] // mmap and its kin, and words by address: the subject of this program

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{self, MRemapFlags, MapFlags, MmapAdvise, ProtFlags};

/// Advice by number, of linux/mman.h.
pub(crate) mod advice {
    /// The page is not needed soon (5.4).
    pub(crate) const COLD: i32 = 20;
    /// Reclaim it (5.4).
    pub(crate) const PAGEOUT: i32 = 21;
    /// Make a huge page of it now (6.1).
    pub(crate) const COLLAPSE: i32 = 25;
    /// Its frame is broken.
    pub(crate) const HWPOISON: i32 = 100;
    /// Its frame is to be given up, its contents moved.
    pub(crate) const SOFT_OFFLINE: i32 = 101;
}

/// Bytes of a small page.
pub(crate) const PAGE: usize = 4096;
/// Bytes of a huge page.
pub(crate) const HUGE: usize = 2 << 20;
/// Words of a small page.
pub(crate) const PAGE_WORDS: u64 = (PAGE / 8) as u64;
/// The driver maps present pages within an aligned window of this size around a fault, so blocks of this size and alignment
/// cost one fault.
pub(crate) const WINDOW: usize = 64 * PAGE;

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prot {
    /// Nothing.
    None,
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}

impl Prot {
    fn flags(self) -> ProtFlags {
        match self {
            Self::None => ProtFlags::PROT_NONE,
            Self::Read => ProtFlags::PROT_READ,
            Self::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        }
    }
}

/// What stands behind a mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Backing<'a> {
    /// Zeros, private.
    Anonymous,
    /// Zeros, shared with children.
    AnonymousShared,
    /// A file from this offset, private.
    FilePrivate(BorrowedFd<'a>, i64),
    /// A file from this offset, shared.
    FileShared(BorrowedFd<'a>, i64),
    /// Zeros, private, of the pool of huge pages.
    HugePool,
}

/// Words in arithmetic progression, the pattern that FILL writes and CHECK expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    /// The first word.
    pub(crate) first: u64,
    /// What each word adds to the one before.
    pub(crate) step: u64,
}

impl Pattern {
    /// All zeros.
    pub(crate) const ZERO: Self = Self { first: 0, step: 0 };

    /// The word at byte `offset`.
    pub(crate) fn word(self, offset: usize) -> u64 {
        self.first.wrapping_add((offset as u64 / 8).wrapping_mul(self.step))
    }

    /// The same pattern, seen from byte `offset` on.
    pub(crate) fn from(self, offset: usize) -> Self {
        Self { first: self.word(offset), step: self.step }
    }
}

fn pointer(address: usize) -> Result<NonNull<c_void>, Errno> {
    NonNull::new(address as *mut c_void).ok_or(Errno::EINVAL)
}

fn map_at(
    address: usize,
    bytes: usize,
    prot: Prot,
    extra: MapFlags,
    backing: Backing<'_>,
) -> Result<usize, Errno> {
    let length = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
    let wanted = NonZeroUsize::new(address);
    let prot = prot.flags();
    // SAFETY: without MAP_FIXED nothing that exists changes; the callers below pass it only for ranges that a `Mapping` owns.
    let at = unsafe {
        match backing {
            Backing::Anonymous => mman::mmap_anonymous(wanted, length, prot, extra | MapFlags::MAP_PRIVATE),
            Backing::AnonymousShared => {
                mman::mmap_anonymous(wanted, length, prot, extra | MapFlags::MAP_SHARED)
            }
            Backing::HugePool => {
                let extra = extra | MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB;
                mman::mmap_anonymous(wanted, length, prot, extra)
            }
            Backing::FilePrivate(file, offset) => {
                mman::mmap(wanted, length, prot, extra | MapFlags::MAP_PRIVATE, file, offset)
            }
            Backing::FileShared(file, offset) => {
                mman::mmap(wanted, length, prot, extra | MapFlags::MAP_SHARED, file, offset)
            }
        }
    }?;
    Ok(at.as_ptr() as usize)
}

/// A range of addresses that the workload owns, whatever is mapped in it at the moment. Unmapped as a whole when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: usize,
    bytes: usize,
}

impl Mapping {
    /// Maps `bytes`, readable and writable, at a multiple of `align`.
    pub(crate) fn new(bytes: usize, align: usize, backing: Backing<'_>) -> Result<Self, Errno> {
        let range = Self::reserve(bytes, align)?;
        range.renew(0, bytes, Prot::Write, backing)?;
        Ok(range)
    }

    /// Anonymous memory of small pages only.
    pub(crate) fn small(bytes: usize) -> Result<Self, Errno> {
        let range = Self::new(bytes, WINDOW, Backing::Anonymous)?;
        // Best effort: a kernel without huge pages has no such advice.
        let _ = range.advise(0, bytes, MmapAdvise::MADV_NOHUGEPAGE);
        Ok(range)
    }

    /// Anonymous memory that becomes huge pages where the kernel has them.
    pub(crate) fn huge(bytes: usize) -> Result<Self, Errno> {
        let range = Self::new(bytes, HUGE, Backing::Anonymous)?;
        let _ = range.advise(0, bytes, MmapAdvise::MADV_HUGEPAGE);
        Ok(range)
    }

    /// Anonymous memory at the end of the address space, behind the stack; EEXIST if something is there.
    pub(crate) fn last(bytes: usize) -> Result<Self, Errno> {
        /// Where it ends: the last page of the lower half is never mapped.
        const END: usize = (1 << 47) - PAGE;
        let start = END.checked_sub(bytes).ok_or(Errno::EINVAL)?;
        map_at(start, bytes, Prot::Write, MapFlags::MAP_FIXED_NOREPLACE, Backing::Anonymous)?;
        Ok(Self { start, bytes })
    }

    /// Takes a range of addresses without access.
    pub(crate) fn reserve(bytes: usize, align: usize) -> Result<Self, Errno> {
        let align = align.max(PAGE);
        let start = map_at(0, bytes + align, Prot::None, MapFlags::MAP_NORESERVE, Backing::Anonymous)?;
        let aligned = start.next_multiple_of(align);
        let whole = Self { start, bytes: bytes + align };
        whole.unmap(0, aligned - start)?;
        whole.unmap(aligned - start + bytes, start + align - aligned)?;
        std::mem::forget(whole);
        Ok(Self { start: aligned, bytes })
    }

    /// The address of byte `offset`.
    pub(crate) fn at(&self, offset: usize) -> u64 {
        (self.start + offset) as u64
    }

    /// Its length.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of a part, which must lie inside.
    fn part(&self, offset: usize, bytes: usize) -> Result<usize, Errno> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.start + offset),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Puts a new mapping in place of a part, whatever was there.
    pub(crate) fn renew(
        &self,
        offset: usize,
        bytes: usize,
        prot: Prot,
        backing: Backing<'_>,
    ) -> Result<(), Errno> {
        let at = self.part(offset, bytes)?;
        map_at(at, bytes, prot, MapFlags::MAP_FIXED, backing).map(drop)
    }

    /// Puts a new mapping into a hole; EEXIST if somebody else's mapping has come to lie there.
    pub(crate) fn refill(&self, offset: usize, bytes: usize, backing: Backing<'_>) -> Result<(), Errno> {
        let at = self.part(offset, bytes)?;
        map_at(at, bytes, Prot::Write, MapFlags::MAP_FIXED_NOREPLACE, backing).map(drop)
    }

    /// Takes a part away.
    pub(crate) fn unmap(&self, offset: usize, bytes: usize) -> Result<(), Errno> {
        let at = self.part(offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the part lies in a range this value owns, and no Rust object lives there (see the module's head).
        unsafe { mman::munmap(pointer(at)?, bytes) }
    }

    /// Changes what a part allows.
    pub(crate) fn protect(&self, offset: usize, bytes: usize, prot: Prot) -> Result<(), Errno> {
        let at = self.part(offset, bytes)?;
        // SAFETY: as for `unmap`.
        unsafe { mman::mprotect(pointer(at)?, bytes, prot.flags()) }
    }

    /// madvise on a part.
    pub(crate) fn advise(&self, offset: usize, bytes: usize, advice: MmapAdvise) -> Result<(), Errno> {
        let at = self.part(offset, bytes)?;
        // SAFETY: as for `unmap`.
        unsafe { mman::madvise(pointer(at)?, bytes, advice) }
    }

    /// madvise with advice that not every kernel, or C library, has a name for. EINVAL is what one says that does not know it.
    pub(crate) fn advise_by_number(&self, offset: usize, bytes: usize, advice: i32) -> Result<(), Errno> {
        let at = self.part(offset, bytes)?;
        // SAFETY: as for `unmap`.
        Errno::result(unsafe { nix::libc::madvise(at as *mut c_void, bytes, advice) }).map(drop)
    }

    /// Writes a part of a shared file mapping back, and waits for it.
    pub(crate) fn write_back(&self, offset: usize, bytes: usize) -> Result<(), Errno> {
        let at = self.part(offset, bytes)?;
        // SAFETY: as for `unmap`; it changes no memory.
        unsafe { mman::msync(pointer(at)?, bytes, mman::MsFlags::MS_SYNC) }
    }

    /// Moves a part's pages over a part of `target`, and leaves the mapping here with none: MREMAP_DONTUNMAP.
    pub(crate) fn move_pages_to(
        &self,
        offset: usize,
        bytes: usize,
        target: &Self,
        to: usize,
    ) -> Result<(), Errno> {
        let from = self.part(offset, bytes)?;
        let to = target.part(to, bytes)?;
        let flags = nix::libc::MREMAP_MAYMOVE | nix::libc::MREMAP_FIXED | nix::libc::MREMAP_DONTUNMAP;
        // SAFETY: both parts lie in ranges that `Mapping`s own, where no Rust object lives.
        let at = unsafe { nix::libc::mremap(from as *mut c_void, bytes, bytes, flags, to as *mut c_void) };
        if at == nix::libc::MAP_FAILED { Err(Errno::last()) } else { Ok(()) }
    }

    /// Moves a part over a part of `target` of the same length, and leaves a hole here.
    pub(crate) fn move_to(&self, offset: usize, bytes: usize, target: &Self, to: usize) -> Result<(), Errno> {
        let from = pointer(self.part(offset, bytes)?)?;
        let to = pointer(target.part(to, bytes)?)?;
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: both parts lie in ranges that `Mapping`s own, where no Rust object lives.
        unsafe { mman::mremap(from, bytes, bytes, flags, Some(to)) }.map(drop)
    }

    fn cell(&self, offset: usize) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset < self.bytes, "offset {offset:#x} outside of a mapping");
        // SAFETY: aligned, and inside a range that lives as long as `self`. Should the word not be mapped, the access ends the
        // process by a signal.
        unsafe { AtomicU64::from_ptr((self.start + offset) as *mut u64) }
    }

    /// Reads a word.
    pub(crate) fn load(&self, offset: usize) -> u64 {
        self.cell(offset).load(Ordering::Relaxed)
    }

    /// Writes a word.
    pub(crate) fn store(&self, offset: usize, word: u64) {
        self.cell(offset).store(word, Ordering::Relaxed);
    }

    /// Adds to a word, atomically, with the CPU.
    pub(crate) fn add(&self, offset: usize, amount: u64) -> u64 {
        self.cell(offset).fetch_add(amount, Ordering::SeqCst)
    }

    /// Writes a pattern to a part.
    pub(crate) fn fill(&self, offset: usize, bytes: usize, pattern: Pattern) {
        for at in (0..bytes).step_by(8) {
            self.store(offset + at, pattern.word(at));
        }
    }

    /// Compares a part with a pattern: offset of the first word that differs, and what is there.
    pub(crate) fn differs(&self, offset: usize, bytes: usize, pattern: Pattern) -> Option<(usize, u64)> {
        (0..bytes)
            .step_by(8)
            .map(|at| (at, self.load(offset + at)))
            .find(|&(at, found)| found != pattern.word(at))
            .map(|(at, found)| (offset + at, found))
    }

    /// Writes one word to each page of a part, so that the kernel gives it pages.
    pub(crate) fn touch(&self, offset: usize, bytes: usize) {
        for at in (0..bytes).step_by(PAGE) {
            self.store(offset + at, (offset + at) as u64);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Cannot fail for a range that was mapped once, short of the limit on mappings; then it stays.
        let _ = self.unmap(0, self.bytes);
    }
}

/// Reads the word at `address` of this process without a signal if it is not there.
pub(crate) fn peek(address: u64) -> Option<u64> {
    use nix::sys::uio::{RemoteIoVec, process_vm_readv};
    let mut word = [0; 8];
    let remote = RemoteIoVec { base: usize::try_from(address).ok()?, len: 8 };
    let read = process_vm_readv(nix::unistd::gettid(), &mut [std::io::IoSliceMut::new(&mut word)], &[remote]);
    matches!(read, Ok(8)).then(|| u64::from_ne_bytes(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_filled_found_and_taken_away() {
        let map = Mapping::small(4 * PAGE).unwrap();
        assert_eq!(map.at(0) % WINDOW as u64, 0);
        let pattern = Pattern { first: 7, step: 3 };
        map.fill(PAGE, PAGE, pattern);
        assert_eq!(map.differs(PAGE, PAGE, pattern), None);
        assert_eq!(map.differs(PAGE + 8, 8, pattern.from(8)), None);
        map.store(PAGE + 16, 0);
        assert_eq!(map.differs(PAGE, PAGE, pattern), Some((PAGE + 16, 0)));
        assert_eq!(peek(map.at(PAGE)), Some(7));
        map.unmap(PAGE, PAGE).unwrap();
        assert_eq!(peek(map.at(PAGE)), None);
        map.refill(PAGE, PAGE, Backing::Anonymous).unwrap();
        assert_eq!(map.load(PAGE), 0);
        assert_eq!(map.refill(PAGE, PAGE, Backing::Anonymous), Err(Errno::EEXIST));
        assert_eq!(map.unmap(0, 5 * PAGE), Err(Errno::EINVAL));
    }

    #[test]
    fn a_moved_part_keeps_its_data() {
        let (from, to) = (Mapping::small(2 * PAGE).unwrap(), Mapping::reserve(PAGE, PAGE).unwrap());
        from.store(PAGE, 5);
        from.move_to(PAGE, PAGE, &to, 0).unwrap();
        assert_eq!((to.load(0), peek(from.at(PAGE))), (5, None));
    }
}
