// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the witness module reports.
//!
//! A CPU fills its own 64-byte slot with interrupts off, then writes the slot's number to EVENT. That write returns only when
//! the host has read and judged the record.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A record as it lies in guest memory, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// One of the constants below.
    pub kind: u32,
    /// CPU that reports.
    pub cpu: u32,
    /// Address-space id, from 1 up and never reused, or 0.
    pub mm: u64,
    /// By kind.
    pub arg: [u64; 4],
    /// Thread id of the task.
    pub pid: u32,
    /// Thread-group id of the task.
    pub tgid: u32,
    /// Guest time (ktime_get_ns), for people.
    pub time_ns: u64,
}

/// Size of a record in bytes.
pub const RECORD_BYTES: usize = size_of::<Record>();
/// Longest message in bytes.
pub const MAX_MESSAGE: u64 = 64 * 1024;

/// Words of the questions about one invalidation: their number, then three each.
pub const QUESTION_WORDS: u64 = 128;
/// Questions about one invalidation at most.
pub const QUESTIONS_MOST: usize = 42;
/// With the number of questions: the pages stay where they are, so a clean one is no loss yet, and is answered in place only.
pub const QUESTIONS_STAYS: u64 = 1 << 62;
/// In place of the number of questions: they are answered, and bit `n` says that the page of question `n` is clean.
pub const QUESTIONS_ANSWERED: u64 = 1 << 63;

crate::constants! {
    /// The module is loaded: arg0 its interface version, arg1 LINUX_VERSION_CODE, arg2 number of CPUs, arg3 1 = fprobe, 2 = kretprobe.
    HELLO: u32 = 1;
    /// A tenth of a second of guest time went by for an ordinary thread: arg0 count, arg1 probes missed so far, arg2 tasks in uninterruptible sleep if known.
    HEARTBEAT: u32 = 2;
    /// An address space is mirrored for the first time: arg0 1 = list notifier, 2 = interval notifier, arg1 physical address of its top page table (mm->pgd).
    MM_BEGIN: u32 = 3;
    /// __mmu_notifier_release has returned for it.
    MM_RELEASED: u32 = 4;
    /// After that, the start of exit's own full-range UNMAP has returned.
    MM_UNMAPPED: u32 = 5;
    /// Its subscriptions are destroyed: the id ends.
    MM_END: u32 = 6;
    /// The running task's address space is mirrored by context handle arg0.
    ASSOCIATE: u32 = 7;
    /// A message of the guest's agent: arg0 bus address, arg1 bytes.
    MESSAGE: u32 = 8;
    /// The module is being unloaded: arg0 probes missed in all.
    BYE: u32 = 9;
    /// A notifier was inserted for it by the running task: arg0 1 = list, 2 = interval.
    NOTIFIER_ADDED: u32 = 10;
    /// A notifier was removed from it: arg0 1 = list, 2 = interval.
    NOTIFIER_REMOVED: u32 = 11;
    /// The module is about to be unloaded, and for a second no task has used it; yet it has not been released.
    MM_STRANDED: u32 = 12;
    /// How the kernel writes its page tables, once, after HELLO: arg0 bits 0-7 paging levels (4 or 5), 8-15 bits of a frame number in a swap offset, 16-23 bits of a swap type, 24-31 lowest bit of a swap offset, arg1 frame mask of an entry (PTE_PFN_MASK), arg2 and arg3 eight types each, a byte each from the lowest, 0xff = not in this kernel: arg2 migration read, migration read exclusive, migration write, device private read, device private write, device exclusive (newer kernels), device exclusive read, device exclusive write (older ones); arg3 hwpoison, marker, swapin error, first number that is no swap file.
    CPU_FORMAT: u32 = 13;
    /// memremap_pages has returned a range of device-private memory: arg0 its first frame number, arg1 its last, arg2 a number that names its owner.
    DEVICE_PRIVATE_ADDED: u32 = 14;
    /// memunmap_pages was called for it, and waits until none of its pages is in use: arguments as in DEVICE_PRIVATE_ADDED.
    DEVICE_PRIVATE_REMOVED: u32 = 15;
    /// The driver gives coherent memory of the device's back (dma_free_attrs is entered): arg0 its bus address, arg1 bytes.
    DMA_FREED: u32 = 16;
    /// The driver has let go of the device, and has not taken back all that it mapped for it (dma_map_page, dma_map_phys): arg0 how many times more it mapped than unmapped.
    DMA_LEFT: u32 = 17;
    /// The start of an invalidation has returned 0 for an address space that a context mirrors: arg0 first address, arg1 last address, arg2 event | flags | slot << 32 (both in the next section), arg3 its number, never reused.
    RANGE_START: u32 = 20;
    /// The end of an invalidation has been entered, of event PROTECTION_VMA only: arguments as in RANGE_START.
    RANGE_END: u32 = 21;
    /// Where it stands whether an invalidation has come to its end: arg0 bus address of an array of u64, arg1 how many, arg2 bus address of as many questions of QUESTION_WORDS u64 each. An invalidation's slot holds its number until its end is entered. While a RANGE_START is judged the host may write questions to its slot's place: how many (with QUESTIONS_STAYS), then for each an address, the page's physical address, a context's handle. The answer (QUESTIONS_ANSWERED) is written over how many there are, and stays there until the next start in the slot is judged.
    RANGE_SLOTS: u32 = 22;
    /// Answer to a question: arg0 address, arg1 physical address, arg2 context's handle, as in the question, arg3 the invalidation's number. The page is not dirty, and dropping it loses what is in it.
    PAGE_CLEAN: u32 = 23;
    /// The running task declares a range of its address space stable: arg0 first address, arg1 last (inclusive). Until its end it stays mapped and can be read and written.
    STABLE_BEGIN: u32 = 30;
    /// The declaration of arg0 to arg1 ends: arg2 1 = it was kept, 0 = it is taken back.
    STABLE_END: u32 = 31;
}

/// How x86-64 writes an entry that is not present and not zero, by `arch/x86/include/asm/pgtable_64.h` of 6.1, 6.12 and 7.3,
/// which agree; a page-middle entry is written like a last-level one. [`CPU_FORMAT`] gives the numbers.
///
/// | bits | |
/// |---|---|
/// | 0 | not present |
/// | 8 | PROT_NONE: set, it is no swap entry but a mapping without any right, see below |
/// | 1, 2, 3 | soft dirty, userfaultfd write-protect, anonymous page exclusive: not part of the offset |
/// | 9-58 | the offset, *inverted* |
/// | 59-63 | the type |
///
/// So `type = entry >> 59` and `offset = !entry << 5 >> 14`. In migration, device-private, device-exclusive and hwpoison
/// entries the low "frame number" bits of the offset are the page's frame number; what lies above them (young and dirty
/// of a migration entry) is to be masked out. A device-private frame number is of a page in no memory: of a range the
/// driver has taken with `memremap_pages`. An exclusive one is of the system page that stays where it was. A type below "first
/// number that is no swap file" is a swap slot.
///
/// Not present and bit 8 set, on a page-middle entry also with bit 7: the page is mapped, with no right for anybody
/// (PROT_NONE, NUMA hinting), and the bits of the frame mask are inverted (`arch/x86/include/asm/pgtable-invert.h`), as they are
/// for every entry that is not present and not zero.
pub mod swap_entry {
    /// Type of an entry, given how many bits a type has.
    #[must_use]
    pub const fn kind(entry: u64, type_bits: u32) -> u64 {
        if type_bits == 0 || type_bits > 63 { 0 } else { entry >> (64 - type_bits) }
    }

    /// Offset of an entry, given how many bits a type has and where the offset begins.
    #[must_use]
    pub const fn offset(entry: u64, type_bits: u32, first_bit: u32) -> u64 {
        match (!entry).checked_shl(type_bits) {
            Some(high) => match high.checked_shr(type_bits.saturating_add(first_bit)) {
                Some(offset) => offset,
                None => 0,
            },
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::swap_entry::{kind, offset};

    #[test]
    fn swap_entries_are_read_back() {
        // As the kernel's __swp_entry() writes them.
        let write = |kind: u64, offset: u64| !offset << 14 >> 5 | kind << 59;
        for (type_, off) in [(0, 0), (31, 0), (0, (1 << 50) - 1), (27, 0x3_ffff_ffff), (31, 0x1234_5678_9abc)]
        {
            let entry = write(type_, off);
            assert_eq!((kind(entry, 5), offset(entry, 5, 9)), (type_, off));
            assert_eq!(entry & 0x1ff, 0, "flags are apart");
            assert_eq!(offset(entry | 0xe, 5, 9), off);
        }
        // What a guest may report.
        for bits in [0, 63, 64, 255, u32::MAX] {
            let _ = (kind(u64::MAX, bits), offset(u64::MAX, bits, bits));
        }
    }
}
