// SPDX-License-Identifier: MIT OR Apache-2.0
//! Translation caches.
//!
//! Each engine has a [`Tlb`] per context slot. It is sticky: an entry stays until it is told to go, so a driver that forgets
//! to tell it is found out. In front of it, private to the engine's thread, [`Micro`] keeps a few translations of one context;
//! it is thrown away when the context's invalidation sequence has moved.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use vgpu_spec::handle::Handle;
use vgpu_spec::pte::{self, HUGE_SHIFT, PAGE_SHIFT};

/// Entries of either size in one TLB, whatever the configuration says: a driver that links its tables ever elsewhere and never
/// invalidates must not use up the host's memory. 1 GiB in 4 KiB leaves.
const ENTRIES_MAX: usize = 1 << 18;

/// Mixes page numbers, which differ in their low bits. The keys come from the driver, but a chosen collision only slows the
/// context of the one who chose it.
#[derive(Default)]
pub(crate) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, n: u64) {
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

pub(crate) type PageHash = BuildHasherDefault<PageHasher>;
type Entries = HashMap<u64, u64, PageHash>;

/// A page table's leaf size.
#[inline]
pub(crate) fn leaf_shift(raw: u64) -> u32 {
    if raw & pte::HUGE != 0 { HUGE_SHIFT } else { PAGE_SHIFT }
}

/// What the leaf makes of `va`: bus address or VRAM offset.
#[inline]
pub(crate) fn leaf_address(raw: u64, va: u64) -> u64 {
    (raw & pte::ADDRESS) | (va & ((1 << leaf_shift(raw)) - 1))
}

/// The translations that one engine holds of one context.
#[derive(Debug, Default)]
pub(crate) struct Tlb {
    small: Entries,
    huge: Entries,
}

impl Tlb {
    #[inline]
    pub(crate) fn lookup(&self, va: u64) -> Option<u64> {
        if let Some(&raw) = self.small.get(&(va >> PAGE_SHIFT)) {
            return Some(raw);
        }
        if self.huge.is_empty() {
            return None;
        }
        self.huge.get(&(va >> HUGE_SHIFT)).copied()
    }

    /// Keeps a leaf; `limit` bounds the entries of either size.
    pub(crate) fn insert(&mut self, va: u64, raw: u64, limit: Option<usize>) {
        let shift = leaf_shift(raw);
        let entries = if shift == HUGE_SHIFT { &mut self.huge } else { &mut self.small };
        let key = va >> shift;
        if entries.len() >= limit.unwrap_or(ENTRIES_MAX).min(ENTRIES_MAX) && !entries.contains_key(&key) {
            // Any will do: the map's own order has nothing to do with addresses.
            if let Some(victim) = entries.keys().next().copied() {
                entries.remove(&victim);
            }
        }
        entries.insert(key, raw);
    }

    /// Drops what lies in or overlaps `[start, last]`; how many entries that was.
    pub(crate) fn invalidate(&mut self, start: u64, last: u64) -> u64 {
        if start == 0 && last >= (1 << pte::VA_BITS) - 1 {
            let dropped = self.len();
            self.small.clear();
            self.huge.clear();
            return dropped;
        }
        drop_range(&mut self.small, start >> PAGE_SHIFT, last >> PAGE_SHIFT)
            + drop_range(&mut self.huge, start >> HUGE_SHIFT, last >> HUGE_SHIFT)
    }

    pub(crate) fn len(&self) -> u64 {
        (self.small.len() + self.huge.len()) as u64
    }

    /// Address and entry of the lowest translation.
    pub(crate) fn first(&self) -> Option<(u64, u64)> {
        let small = self.small.iter().min().map(|(&key, &raw)| (key << PAGE_SHIFT, raw));
        let huge = self.huge.iter().min().map(|(&key, &raw)| (key << HUGE_SHIFT, raw));
        small.into_iter().chain(huge).min()
    }
}

fn drop_range(entries: &mut Entries, first: u64, last: u64) -> u64 {
    let before = entries.len();
    if last - first < before as u64 {
        for key in first..=last {
            entries.remove(&key);
        }
    } else {
        entries.retain(|&key, _| key < first || key > last);
    }
    (before - entries.len()) as u64
}

const MICRO: usize = 64;

/// A few translations of one context, used without a lock.
pub(crate) struct Micro {
    ctx: Handle,
    sequence: u64,
    /// (page number + 1, leaf).
    entries: [(u64, u64); MICRO],
}

impl Micro {
    pub(crate) fn new() -> Self {
        Self { ctx: Handle::NONE, sequence: 0, entries: [(0, 0); MICRO] }
    }

    /// To be called in each step, after the step was published and the sequence read.
    #[inline]
    pub(crate) fn begin(&mut self, ctx: Handle, sequence: u64) {
        if self.ctx != ctx || self.sequence != sequence {
            *self = Self { ctx, sequence, entries: [(0, 0); MICRO] };
        }
    }
    #[inline]
    pub(crate) fn get(&self, va: u64) -> Option<u64> {
        let page = va >> PAGE_SHIFT;
        let (tag, raw) = self.entries[page as usize % MICRO];
        (tag == page + 1).then_some(raw)
    }
    #[inline]
    pub(crate) fn put(&mut self, va: u64, raw: u64) {
        let page = va >> PAGE_SHIFT;
        self.entries[page as usize % MICRO] = (page + 1, raw);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vgpu_spec::pte::{HUGE, VALID};

    #[test]
    fn ranges_drop_what_they_touch_and_nothing_else() {
        let mut tlb = Tlb::default();
        for page in 0..100_u64 {
            tlb.insert(page << 12, VALID | page << 12, None);
        }
        tlb.insert(4 << 21, VALID | HUGE | 2 << 21, None);
        assert_eq!(tlb.invalidate(0x5800, 0x7000), 3);
        assert_eq!(tlb.lookup(0x4fff), Some(VALID | 0x4000));
        assert_eq!(tlb.lookup(0x5000), None);
        assert_eq!(tlb.lookup(0x8000), Some(VALID | 0x8000));
        assert_eq!(tlb.invalidate((4 << 21) + 0x3000, (4 << 21) + 0x3fff), 1);
        assert_eq!(tlb.first(), Some((0, VALID)));
        assert_eq!(tlb.invalidate(0, u64::MAX), 97);
        assert_eq!(tlb.len(), 0);
    }

    #[test]
    fn a_limit_bounds_it_and_keeps_the_newest() {
        let mut tlb = Tlb::default();
        for page in 0..100_u64 {
            tlb.insert(page << 12, VALID | page << 12, Some(8));
            assert_eq!(tlb.lookup(page << 12), Some(VALID | page << 12));
        }
        assert_eq!(tlb.len(), 8);
    }

    #[test]
    fn the_micro_cache_forgets_when_the_sequence_moves() {
        let mut micro = Micro::new();
        micro.begin(Handle(5), 1);
        micro.put(0x1000, 7);
        assert_eq!(micro.get(0x1fff), Some(7));
        assert_eq!(micro.get(0x1000 + (MICRO as u64) * 0x1000), None);
        micro.begin(Handle(5), 1);
        assert_eq!(micro.get(0x1000), Some(7));
        micro.begin(Handle(5), 2);
        assert_eq!(micro.get(0x1000), None);
    }
}
