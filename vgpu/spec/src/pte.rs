// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page-table entries of the GMMU.
//!
//! Four levels of 512 entries of 64 bits, little endian, in table pages of VRAM: level 3 is the root, level 0 holds 4 KiB
//! leaves, level 1 may hold 2 MiB leaves. An address has 48 bits; bits 48-63 must be zero.

/// Bits of an address that the GMMU translates.
pub const VA_BITS: u32 = 48;
/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// log2 of the size of a leaf at level 1.
pub const HUGE_SHIFT: u32 = 21;
/// Entries a table.
pub const ENTRIES: usize = 512;
/// Level of the root.
pub const ROOT_LEVEL: u8 = 3;

crate::constants! {
    /// The entry is in use; all other bits are ignored while it is clear.
    VALID: u64 = 1 << 0;
    /// Leaf: writes are allowed.
    WRITE: u64 = 1 << 1;
    /// Leaf: atomics are allowed.
    ATOMIC: u64 = 1 << 2;
    /// Level 1 only: this is a 2 MiB leaf.
    HUGE: u64 = 1 << 3;
    /// Leaf: the address is an offset in VRAM, and not a bus address.
    VRAM: u64 = 1 << 4;
    /// Leaf: address bits 12-51. Directory: table page index << 12. A 2 MiB leaf's address is 2 MiB aligned.
    ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// What an entry says at its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not valid.
    Absent,
    /// The next level's table page, by index.
    Table(u32),
    /// A translation.
    Leaf(Leaf),
    /// Valid, but reserved bits are set or the address does not fit.
    Malformed,
}

/// A decoded leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Bus address or VRAM offset of the first byte.
    pub address: u64,
    /// [`PAGE_SHIFT`] or [`HUGE_SHIFT`].
    pub shift: u32,
    /// The address is a VRAM offset.
    pub vram: bool,
    /// Writes are allowed.
    pub write: bool,
    /// Atomics are allowed.
    pub atomic: bool,
}

/// Decodes an entry found at `level` (0 to 3).
#[must_use]
pub fn decode(raw: u64, level: u8) -> Entry {
    if raw & VALID == 0 {
        return Entry::Absent;
    }
    let known = VALID | WRITE | ATOMIC | HUGE | VRAM | ADDRESS;
    if raw & !known != 0 {
        return Entry::Malformed;
    }
    let address = raw & ADDRESS;
    let huge = raw & HUGE != 0;
    let leaf = Leaf {
        address,
        shift: if huge { HUGE_SHIFT } else { PAGE_SHIFT },
        vram: raw & VRAM != 0,
        write: raw & WRITE != 0,
        atomic: raw & ATOMIC != 0,
    };
    match level {
        0 if !huge => Entry::Leaf(leaf),
        1 if huge && address & ((1 << HUGE_SHIFT) - 1) == 0 => Entry::Leaf(leaf),
        1..=3 if raw & (WRITE | ATOMIC | HUGE | VRAM) == 0 => match u32::try_from(address >> PAGE_SHIFT) {
            Ok(index) if index <= crate::handle::Handle::MAX_INDEX => Entry::Table(index),
            _ => Entry::Malformed,
        },
        _ => Entry::Malformed,
    }
}

/// log2 of what a leaf maps.
#[inline]
#[must_use]
pub const fn leaf_shift(raw: u64) -> u32 {
    if raw & HUGE != 0 { HUGE_SHIFT } else { PAGE_SHIFT }
}

/// What a leaf makes of `va`: bus address or VRAM offset.
#[inline]
#[must_use]
pub const fn leaf_address(raw: u64, va: u64) -> u64 {
    (raw & ADDRESS) | (va & ((1 << leaf_shift(raw)) - 1))
}

/// Index of `va` in a table of `level`.
#[must_use]
pub fn index(va: u64, level: u8) -> usize {
    (va >> (PAGE_SHIFT + 9 * u32::from(level.min(ROOT_LEVEL)))) as usize & (ENTRIES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_and_tables_are_told_apart() {
        assert_eq!(decode(0, 0), Entry::Absent);
        assert_eq!(decode(WRITE, 0), Entry::Absent);
        assert_eq!(decode(VALID | 5 << 12, 3), Entry::Table(5));
        assert!(matches!(
            decode(VALID | WRITE | 5 << 12, 0),
            Entry::Leaf(Leaf { address: 0x5000, write: true, .. })
        ));
        assert_eq!(decode(VALID | WRITE | 5 << 12, 2), Entry::Malformed);
        assert_eq!(decode(VALID | HUGE, 0), Entry::Malformed);
        assert_eq!(decode(VALID | HUGE | 1 << 12, 1), Entry::Malformed);
        assert!(matches!(decode(VALID | HUGE | 1 << 21, 1), Entry::Leaf(Leaf { shift: HUGE_SHIFT, .. })));
        assert_eq!(decode(VALID | 1 << 63, 0), Entry::Malformed);
    }
}
