// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walking them.

use std::sync::atomic::Ordering::Acquire;

use super::entry::{Found, Page};
use super::{Format, Kind};
use crate::memory::Snapshot;

/// Times that a walk is made again at most.
const ATTEMPTS: u32 = 8;

/// One address space's tables.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Guest-physical address of the top table.
    pub root: u64,
    /// What its entries look like.
    pub format: Format,
}

/// The lowest table that a walk came through last, for the next one in the same 2 MiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hint {
    /// Which 2 MiB, plus one; 0 for none.
    region: u64,
    table: u64,
    write: bool,
}

impl Space {
    /// What the CPU has for `va` now, by the table that `hint` names if it is of the same 2 MiB. Good for as long as nobody minds
    /// that the table itself may have been replaced since: within a step, before its pages are walked once more.
    #[inline]
    #[must_use]
    pub fn walk_near(&self, memory: &Snapshot, va: u64, hint: &mut Hint) -> Page {
        if hint.region != (va >> 21) + 1 {
            return self.walk_down(memory, va, hint);
        }
        let Ok(entry) = memory.atomic_u64(hint.table + ((va >> 12) & 0x1ff) * 8, false) else {
            return Page::unreadable();
        };
        match self.format.decode(entry.load(Acquire), 0, va, hint.write) {
            Found::Leaf(page) => page,
            Found::Table(_) => Page::unreadable(),
        }
    }

    /// What the CPU has for `va` now. Never fails: a table outside of memory is [`Kind::Unreadable`].
    ///
    /// At most five reads of guest memory; no allocation, no lock.
    #[inline]
    #[must_use]
    pub fn walk(&self, memory: &Snapshot, va: u64) -> Page {
        self.walk_down(memory, va, &mut Hint::default())
    }

    fn walk_down(&self, memory: &Snapshot, va: u64, hint: &mut Hint) -> Page {
        let mut table = self.root & self.format.address;
        let mut write = true;
        let mut level = self.format.levels.clamp(4, 5) - 1;
        loop {
            let at = table + ((va >> (12 + 9 * u32::from(level))) & 0x1ff) * 8;
            let Ok(entry) = memory.atomic_u64(at, false) else { return Page::unreadable() };
            let raw = entry.load(Acquire);
            match self.format.decode(raw, level, va, write) {
                Found::Leaf(page) => {
                    // A leaf further up has no table below it that could serve the next walk.
                    *hint = if level == 0 {
                        Hint { region: (va >> 21) + 1, table, write }
                    } else {
                        Hint::default()
                    };
                    return page;
                }
                // `decode` never finds a table at the lowest level.
                Found::Table(next) => {
                    write &= raw & 2 != 0;
                    table = next;
                    level = level.saturating_sub(1);
                }
            }
        }
    }

    /// The same, walked until two walks in a row agree. [`Kind::Unsettled`] if none do.
    #[must_use]
    pub fn settled(&self, memory: &Snapshot, va: u64) -> Page {
        let mut page = self.walk(memory, va);
        for _ in 0..ATTEMPTS {
            // Long enough for another processor to finish the change of an entry that it is in.
            for _ in 0..200 {
                std::hint::spin_loop();
            }
            let again = self.walk(memory, va);
            if again == page {
                return page;
            }
            page = again;
        }
        Page { kind: Kind::Unsettled, ..page }
    }
}

#[cfg(test)]
mod tests {
    use super::super::entry::tests::{format, swap_entry};
    use super::*;
    use crate::memory::SystemMemory;
    use crate::testing::anonymous_file;

    const VA: u64 = 0x7f12_3456_7000;

    fn memory() -> SystemMemory {
        let memory = SystemMemory::new();
        memory.map(0x10_0000, 0x10_000, &anonymous_file(0x10_000), 0, true).unwrap();
        memory
    }

    fn put(memory: &SystemMemory, table: u64, level: u32, raw: u64) {
        memory.snapshot().store_u64(table + ((VA >> (12 + 9 * level)) & 0x1ff) * 8, raw).unwrap();
    }

    /// Tables at 1 MiB, each a page behind the one above it.
    fn space(memory: &SystemMemory, levels: u8) -> Space {
        for level in (1..u32::from(levels)).rev() {
            let table = 0x10_0000 + 0x1000 * u64::from(u32::from(levels) - 1 - level);
            put(memory, table, level, (table + 0x1000) | 0x67);
        }
        Space { root: 0x10_0000, format: Format { levels, ..format() } }
    }

    #[test]
    fn four_and_five_levels() {
        for levels in [4, 5] {
            let memory = memory();
            let space = space(&memory, levels);
            let last = 0x10_0000 + 0x1000 * (u64::from(levels) - 1);
            assert_eq!(space.walk(&memory.snapshot(), VA).kind, Kind::None);
            put(&memory, last, 0, 0x7777_7067);
            let page = space.walk(&memory.snapshot(), VA + 0x123);
            assert_eq!(
                (page.kind, page.frame, page.write, page.shift),
                (Kind::Present, 0x7777_7000, true, 12)
            );
            assert_eq!(space.walk(&memory.snapshot(), VA + 0x1000).kind, Kind::None);
            assert_eq!(space.settled(&memory.snapshot(), VA), page);
            let mut hint = Hint::default();
            for _ in 0..2 {
                assert_eq!(space.walk_near(&memory.snapshot(), VA, &mut hint), page);
                assert_eq!(space.walk_near(&memory.snapshot(), VA + 0x1000, &mut hint).kind, Kind::None);
            }
            assert_eq!(space.walk_near(&memory.snapshot(), VA + (1 << 21), &mut hint).kind, Kind::None);
            assert_eq!(space.walk_near(&memory.snapshot(), VA, &mut hint), page);
            put(&memory, last, 0, swap_entry(28, 0x7777));
            assert_eq!(space.walk(&memory.snapshot(), VA).kind, Kind::Migration);
        }
    }

    #[test]
    fn rights_are_those_of_all_levels() {
        let memory = memory();
        let space = space(&memory, 4);
        put(&memory, 0x10_3000, 0, 0x7777_7067);
        put(&memory, 0x10_2000, 1, 0x10_3000 | 0x65);
        assert!(!space.walk(&memory.snapshot(), VA).write);
    }

    #[test]
    fn large_leaves_end_the_walk() {
        let memory = memory();
        let space = space(&memory, 4);
        put(&memory, 0x10_2000, 1, 0x4000_00e7);
        let page = space.walk(&memory.snapshot(), VA);
        assert_eq!((page.frame, page.shift), (0x4000_0000 | VA & 0x1f_f000, 21));
        put(&memory, 0x10_1000, 2, 0x8000_00e7);
        assert_eq!(space.walk(&memory.snapshot(), VA).shift, 30);
    }

    #[test]
    fn tables_outside_of_memory_and_loops_end() {
        let memory = memory();
        let space = space(&memory, 4);
        put(&memory, 0x10_1000, 2, 0x0fff_ffff_f067);
        assert_eq!(space.walk(&memory.snapshot(), VA).kind, Kind::Unreadable);
        let nowhere = Space { root: u64::MAX, ..space };
        assert_eq!(nowhere.walk(&memory.snapshot(), VA).kind, Kind::Unreadable);
        // A table that leads to itself is followed as often as there are levels.
        put(&memory, 0x10_0000, 3, 0x10_0067);
        put(&memory, 0x10_0000, 2, 0x10_0067);
        put(&memory, 0x10_0000, 1, 0x10_0067);
        let _ = space.walk(&memory.snapshot(), VA);
    }

    proptest::proptest! {
        #[test]
        fn any_memory_is_harmless(words in proptest::collection::vec(proptest::prelude::any::<u64>(), 64), va in proptest::prelude::any::<u64>()) {
            let memory = memory();
            for (i, word) in words.iter().enumerate() {
                // Half of them lead back into the memory, so that walks go deep.
                let word = if i % 2 == 0 { *word } else { 0x10_0000 | word & 0xffff };
                memory.snapshot().store_u64(0x10_0000 + 8 * (word % 0x2000), word).unwrap();
            }
            let space = Space { root: 0x10_0000, format: format() };
            let _ = space.settled(&memory.snapshot(), va);
        }
    }
}
