// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an entry says.
//!
//! Bits as in the kernel's arch/x86/include/asm/pgtable_types.h and pgtable_64.h, 6.1 to 7.x; which number a sort of swap entry
//! has depends on the kernel's configuration, so the witness reports them.

/// Present.
const P: u64 = 1 << 0;
/// Writable.
const RW: u64 = 1 << 1;
/// Written by a CPU.
const DIRTY: u64 = 1 << 6;
/// A leaf above the lowest level.
const PS: u64 = 1 << 7;
/// Not present: PROT_NONE. (Present: global.)
const PROTNONE: u64 = 1 << 8;
/// Soft-dirty, where the kernel keeps it.
const SOFT_DIRTY: u64 = 1 << 11;
/// The dirty bit of an entry that is not writable, where the kernel has shadow stacks (6.6).
const SAVED_DIRTY: u64 = 1 << 58;
/// Type of a swap entry: bits 59-63. Its offset: bits 14-58, inverted.
const SWAP_TYPE: u32 = 59;
const SWAP_OFFSET: u32 = 14;
/// The first bit of the offset, where the kernel counts before it shifts the type in.
const SWAP_FIRST: u8 = 9;
/// Of a swap entry's offset, what is a page frame number where it is one: an address has 52 bits at most.
const SWAP_PFN: u64 = (1 << 40) - 1;

/// What a kernel's entries look like, as far as it is not the same everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Levels of the tables: 4 or 5.
    pub levels: u8,
    /// The bits of an entry that are an address.
    pub address: u64,
    /// What a type of swap entry means, by its number.
    pub swap: [Kind; 32],
}

/// What a sort of entry says of its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    None,
    /// The page is there.
    Present,
    /// It is there, and neither read nor written (PROT_NONE, NUMA hinting).
    ProtNone,
    /// It is being moved; the CPU waits.
    Migration,
    /// It is being moved, and was writable.
    MigrationWrite,
    /// It is in a device's memory.
    DevicePrivate,
    /// It is in a device's memory, and was writable.
    DevicePrivateWrite,
    /// It is there, for a device's atomics alone.
    DeviceExclusive,
    /// It is in swap, or is none of the others.
    Swap,
    /// A huge page that is being split: for a moment it is not present.
    Unsettled,
    /// A table is not in the guest's memory.
    Unreadable,
}

/// What the CPU has for one 4 KiB page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// What sort of entry.
    pub kind: Kind,
    /// Address of the page, where the entry names one; else 0. Of device-private memory, the address of its `struct page`'s frame.
    pub frame: u64,
    /// A CPU may write, all levels together.
    pub write: bool,
    /// A CPU has written.
    pub dirty: bool,
    /// Its soft-dirty bit is clear: where the kernel keeps such bits, that may be why it is not writable.
    pub soft_clean: bool,
    /// The entry as it stands.
    pub raw: u64,
    /// log2 of what the entry maps: 12, 21 or 30.
    pub shift: u32,
}

impl Page {
    pub(super) fn unreadable() -> Self {
        Self { kind: Kind::Unreadable, ..Self::none(12) }
    }
    pub(super) fn none(shift: u32) -> Self {
        Self { kind: Kind::None, frame: 0, write: false, dirty: false, soft_clean: false, raw: 0, shift }
    }
}

/// What stands at one level.
pub(super) enum Found {
    Table(u64),
    Leaf(Page),
}

impl Format {
    /// What the witness says of the kernel (CPU_FORMAT); `None` if it is nothing that x86-64 has.
    #[must_use]
    pub fn from_record(arg: [u64; 4]) -> Option<Self> {
        let [layout, address, first, second] = arg;
        let byte = |word: u64, at: u32| (word >> (8 * at)) as u8;
        let levels = byte(layout, 0);
        let as_here = byte(layout, 2) == 64 - SWAP_TYPE as u8 && byte(layout, 3) == SWAP_FIRST;
        if !(4..=5).contains(&levels) || !as_here || address & 0xfff != 0 || address >> 52 != 0 {
            return None;
        }
        let mut swap = [Kind::Swap; 32];
        let kinds = [
            Kind::Migration,
            Kind::Migration,
            Kind::MigrationWrite,
            Kind::DevicePrivate,
            Kind::DevicePrivateWrite,
            Kind::DeviceExclusive,
            Kind::DeviceExclusive,
            Kind::DeviceExclusive,
        ];
        for (at, kind) in (0..).zip(kinds) {
            // Those that the kernel does not have are 0xff.
            if let Some(place) = swap.get_mut(usize::from(byte(first, at))) {
                *place = kind;
            }
        }
        // Lost to an error, and no page: the numbers are told so that they are not taken for one of the above.
        for at in 0..3 {
            if let Some(place) = swap.get_mut(usize::from(byte(second, at))) {
                *place = Kind::Swap;
            }
        }
        Some(Self { levels, address, swap })
    }

    /// Decodes the entry for `va` at `level` (0 is the lowest); `write` if all levels above allow writes.
    #[inline]
    pub(super) fn decode(&self, raw: u64, level: u8, va: u64, write: bool) -> Found {
        let shift = 12 + 9 * u32::from(level);
        if raw & P != 0 && level > 0 && (raw & PS == 0 || level > 2) {
            return Found::Table(raw & self.address);
        }
        if raw & P != 0 {
            return Found::Leaf(Page {
                kind: Kind::Present,
                frame: frame(raw & self.address, shift, va),
                write: write && raw & RW != 0,
                dirty: raw & (DIRTY | SAVED_DIRTY) != 0,
                soft_clean: raw & SOFT_DIRTY == 0,
                raw,
                shift,
            });
        }
        Found::Leaf(self.absent(raw, level, shift, va))
    }

    #[cold]
    fn absent(&self, raw: u64, level: u8, shift: u32, va: u64) -> Page {
        if raw == 0 {
            return Page::none(shift);
        }
        let named = |kind, frame| Page { kind, frame, raw, ..Page::none(shift) };
        // Entries that are not present have their address inverted, so that the processor does not speculate on it (L1TF).
        if raw & PROTNONE != 0 {
            let dirty = raw & (DIRTY | SAVED_DIRTY) != 0;
            return Page { dirty, ..named(Kind::ProtNone, frame(!raw & self.address, shift, va)) };
        }
        if level > 0 && raw & PS != 0 {
            return named(Kind::Unsettled, 0);
        }
        let kind = self.swap[(raw >> SWAP_TYPE) as usize];
        let pfn = (!raw << 5 >> SWAP_OFFSET) & SWAP_PFN;
        match kind {
            Kind::Migration | Kind::DevicePrivate | Kind::DeviceExclusive => {
                named(kind, frame(pfn << 12, shift, va))
            }
            Kind::MigrationWrite | Kind::DevicePrivateWrite => {
                Page { write: true, ..named(kind, frame(pfn << 12, shift, va)) }
            }
            _ => named(Kind::Swap, 0),
        }
    }
}

/// The 4 KiB page of `va` in what begins at `base` and has `1 << shift` bytes.
#[inline]
fn frame(base: u64, shift: u32, va: u64) -> u64 {
    let inside = (1 << shift) - 1;
    (base & !inside) | (va & inside & !0xfff)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// As Debian's 7.3 has it.
    pub(in crate::cpu) fn format() -> Format {
        let mut swap = [Kind::Swap; 32];
        swap[25] = Kind::DeviceExclusive;
        swap[26] = Kind::DevicePrivate;
        swap[27] = Kind::DevicePrivateWrite;
        swap[28] = Kind::Migration;
        swap[30] = Kind::MigrationWrite;
        Format { levels: 4, address: 0x000f_ffff_ffff_f000, swap }
    }

    fn leaf(raw: u64, level: u8, va: u64) -> Page {
        match format().decode(raw, level, va, true) {
            Found::Leaf(page) => page,
            Found::Table(at) => panic!("a table at {at:#x}"),
        }
    }

    /// As the kernel's `__swp_entry` makes one.
    pub(in crate::cpu) fn swap_entry(kind: u64, offset: u64) -> u64 {
        (!offset << SWAP_OFFSET >> 5) | kind << SWAP_TYPE
    }

    #[test]
    fn the_witness_says_what_the_numbers_are() {
        let layout = 4 | 40 << 8 | 5 << 16 | 9 << 24;
        let first = u64::from_le_bytes([28, 29, 30, 26, 27, 25, 0xff, 0xff]);
        let arg = [layout, 0x000f_ffff_ffff_f000, first, 0xffff_ffff_ff1f_ff18];
        let mut expected = format();
        expected.swap[29] = Kind::Migration;
        assert_eq!(Format::from_record(arg), Some(expected));
        for (at, bad) in
            [(0, layout & !0xff | 3), (0, layout + (1 << 16)), (0, 0), (1, u64::MAX), (1, 1 << 52)]
        {
            let mut arg = arg;
            arg[at] = bad;
            assert_eq!(Format::from_record(arg), None, "{at} {bad:#x}");
        }
    }

    #[test]
    fn present_entries() {
        let page = leaf(0x8000_0001_2345_6867, 0, 0x7f00_0000_1abc);
        assert_eq!(
            (page.kind, page.frame, page.write, page.dirty),
            (Kind::Present, 0x1_2345_6000, true, true)
        );
        assert!(!page.soft_clean);
        assert!(leaf(0x1_2345_6067, 0, 0).soft_clean);
        assert!(!leaf(0x1_2345_6065, 0, 0).write);
        let huge = leaf(0x4060_00e7, 1, 0x7f00_0012_3456);
        assert_eq!((huge.frame, huge.shift), (0x4072_3000, 21));
        // A huge entry's PAT bit, bit 12, is no part of its address.
        assert_eq!(leaf(0x4060_10e7, 1, 0).frame, 0x4060_0000);
        assert_eq!(leaf(0x8000_00e7, 2, 0x1234_5678).frame, 0x9234_5000);
        assert!(matches!(format().decode(0x1234_5067, 1, 0, true), Found::Table(0x1234_5000)));
        assert!(matches!(format().decode(0x1234_50e7, 3, 0, true), Found::Table(0x1234_5000)));
    }

    #[test]
    fn entries_that_are_not_present() {
        assert_eq!(leaf(0, 0, 0).kind, Kind::None);
        let prot_none = (!0x1_2345_6000_u64 & 0x000f_ffff_ffff_f000) | PROTNONE | DIRTY;
        let page = leaf(prot_none, 0, 0);
        assert_eq!(
            (page.kind, page.frame, page.write, page.dirty),
            (Kind::ProtNone, 0x1_2345_6000, false, true)
        );
        for (number, kind, write) in [
            (28, Kind::Migration, false),
            (30, Kind::MigrationWrite, true),
            (26, Kind::DevicePrivate, false),
            (27, Kind::DevicePrivateWrite, true),
            (25, Kind::DeviceExclusive, false),
        ] {
            // Above the frame's number the kernel keeps the young and dirty bits.
            let raw = swap_entry(number, 0x12_3456 | 1 << 40);
            assert_eq!(raw & (P | PROTNONE), 0);
            let page = leaf(raw, 0, 0x5000);
            assert_eq!((page.kind, page.frame, page.write), (kind, 0x1_2345_6000, write), "{number}");
        }
        assert_eq!(leaf(swap_entry(3, 77), 0, 0).kind, Kind::Swap);
        assert_eq!(leaf(swap_entry(28, 0x400), 1, 0x7f00_0000_3000).frame, 0x40_3000);
        assert_eq!(leaf(PS | RW | 0x1000, 1, 0).kind, Kind::Unsettled);
    }
}
