// SPDX-License-Identifier: MIT OR Apache-2.0
//! Translation caches.
//!
//! Each engine has a [`Tlb`] per context slot. It is sticky: an entry stays until it is told to go, so a driver that forgets
//! to tell it is found out. In front of it, private to the engine's thread, [`Micro`] keeps a few translations of one context;
//! it is thrown away when the context's invalidation sequence has moved.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use vgpu_spec::handle::Handle;
use vgpu_spec::pte::{self, HUGE_SHIFT, PAGE_SHIFT, leaf_address, leaf_shift};

use crate::oracle::Written;

/// Entries of either size in one TLB, whatever the configuration says: a driver that links its tables ever elsewhere and never
/// invalidates must not use up the host's memory. 1 GiB in 4 KiB leaves.
const ENTRIES_MAX: usize = 1 << 18;

/// Written pages remembered in one TLB.
const WRITTEN_MAX: usize = 1 << 14;

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
    fn write_u32(&mut self, n: u32) {
        self.write_u64(n.into());
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

/// Translations of one size, by page number.
#[derive(Debug, Default)]
struct Entries {
    map: HashMap<u64, u64, PageHash>,
    /// Who goes next when there is no more room. Chosen in batches: a map finds one entry by looking through all its buckets from
    /// the first on, and whoever took that one each time would throw away what came last.
    doomed: Vec<u64>,
    /// How many batches there were.
    batches: usize,
}

impl Entries {
    /// One of this many is chosen at a time, if there are many.
    const SHARE: usize = 16;

    fn insert(&mut self, key: u64, raw: u64, limit: usize) {
        while self.map.len() >= limit && !self.map.contains_key(&key) {
            match self.doomed.pop() {
                // It may be gone already.
                Some(victim) => drop(self.map.remove(&victim)),
                None => self.choose(),
            }
        }
        self.map.insert(key, raw);
    }

    /// From all over the map, and others the next time: those that came last and those that came first have the same chance.
    #[cold]
    fn choose(&mut self) {
        let step = (self.map.len() / 64).clamp(1, Self::SHARE);
        self.doomed.extend(self.map.keys().skip(self.batches % step).step_by(step));
        self.batches += 1;
    }

    fn drop_range(&mut self, first: u64, last: u64) -> u64 {
        let before = self.map.len();
        if last - first < before as u64 {
            for key in first..=last {
                self.map.remove(&key);
            }
        } else {
            self.map.retain(|&key, _| key < first || key > last);
        }
        (before - self.map.len()) as u64
    }
}

/// The translations that one engine holds of one context.
#[derive(Debug, Default)]
pub(crate) struct Tlb {
    small: Entries,
    huge: Entries,
    /// Pages of 4 KiB that the engine has written, for the oracle: page number and frame. No translation.
    written: HashMap<u64, u64, PageHash>,
}

impl Tlb {
    #[inline]
    pub(crate) fn lookup(&self, va: u64) -> Option<u64> {
        if let Some(&raw) = self.small.map.get(&(va >> PAGE_SHIFT)) {
            return Some(raw);
        }
        if self.huge.map.is_empty() {
            return None;
        }
        self.huge.map.get(&(va >> HUGE_SHIFT)).copied()
    }

    /// Keeps a leaf; `limit` bounds the entries of either size.
    pub(crate) fn insert(&mut self, va: u64, raw: u64, limit: Option<usize>) {
        let shift = leaf_shift(raw);
        let entries = if shift == HUGE_SHIFT { &mut self.huge } else { &mut self.small };
        entries.insert(va >> shift, raw, limit.unwrap_or(ENTRIES_MAX).clamp(1, ENTRIES_MAX));
    }

    /// Drops what lies in or overlaps `[start, last]`; how many entries that was.
    pub(crate) fn invalidate(&mut self, start: u64, last: u64) -> u64 {
        if start == 0 && last >= (1 << pte::VA_BITS) - 1 {
            let dropped = self.len();
            self.small.map.clear();
            self.huge.map.clear();
            return dropped;
        }
        self.small.drop_range(start >> PAGE_SHIFT, last >> PAGE_SHIFT)
            + self.huge.drop_range(start >> HUGE_SHIFT, last >> HUGE_SHIFT)
    }

    /// Calls `found` with address and entry of each translation that touches `[start, last]`, until it says no.
    pub(crate) fn each_in(&self, start: u64, last: u64, found: &mut dyn FnMut(u64, u64) -> bool) {
        let last = last.min((1 << pte::VA_BITS) - 1);
        if start > last {
            return;
        }
        for (entries, shift) in [(&self.small.map, PAGE_SHIFT), (&self.huge.map, HUGE_SHIFT)] {
            let (first, last) = (start >> shift, last >> shift);
            if last - first < entries.len() as u64 {
                for key in first..=last {
                    if let Some(&raw) = entries.get(&key) {
                        if !found(key << shift, raw) {
                            return;
                        }
                    }
                }
            } else {
                for (&key, &raw) in entries.iter().filter(|&(&key, _)| key >= first && key <= last) {
                    if !found(key << shift, raw) {
                        return;
                    }
                }
            }
        }
    }

    /// Remembers that the pages of `[va, va + bytes)`, which lie in the leaf `raw`, are being written; only so many.
    #[inline]
    pub(crate) fn wrote(&mut self, va: u64, bytes: u64, raw: u64) {
        for page in va >> PAGE_SHIFT..=(va + bytes.saturating_sub(1)) >> PAGE_SHIFT {
            if raw & pte::VRAM != 0 {
                // What was written of the system's page is in the device's by now.
                self.written.remove(&page);
            } else if self.written.len() < WRITTEN_MAX || self.written.contains_key(&page) {
                self.written.insert(page, leaf_address(raw, page << PAGE_SHIFT));
            }
        }
    }

    /// Takes out the pages written that touch `[start, last]`.
    pub(crate) fn take_written(&mut self, start: u64, last: u64, taken: &mut Vec<Written>) {
        let (first, last) = (start >> PAGE_SHIFT, last >> PAGE_SHIFT);
        if last - first < self.written.len() as u64 {
            taken.extend((first..=last).filter_map(|page| {
                self.written.remove(&page).map(|frame| Written { va: page << PAGE_SHIFT, frame })
            }));
        } else {
            self.written.retain(|&page, &mut frame| {
                let inside = first <= page && page <= last;
                if inside {
                    taken.push(Written { va: page << PAGE_SHIFT, frame });
                }
                !inside
            });
        }
    }

    /// The context is another's now.
    pub(crate) fn forget_written(&mut self) {
        self.written.clear();
    }

    pub(crate) fn len(&self) -> u64 {
        (self.small.map.len() + self.huge.map.len()) as u64
    }

    /// Address and entry of the lowest translation.
    pub(crate) fn first(&self) -> Option<(u64, u64)> {
        let small = self.small.map.iter().min().map(|(&key, &raw)| (key << PAGE_SHIFT, raw));
        let huge = self.huge.map.iter().min().map(|(&key, &raw)| (key << HUGE_SHIFT, raw));
        small.into_iter().chain(huge).min()
    }
}

const MICRO: usize = 64;

/// A few translations of one context, used by one engine without a lock.
///
/// Only that engine writes it. Others read it ([`Micro::find`]) to see which translations the step at hand can still use.
#[derive(Debug)]
pub(crate) struct Micro {
    ctx: AtomicU64,
    sequence: AtomicU64,
    /// (page number + 1, leaf).
    entries: [(AtomicU64, AtomicU64); MICRO],
}

impl Micro {
    pub(crate) fn new() -> Self {
        Self {
            ctx: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            entries: [const { (AtomicU64::new(0), AtomicU64::new(0)) }; MICRO],
        }
    }

    /// To be called in each step, after the step was published and the sequence read.
    #[inline]
    pub(crate) fn begin(&self, ctx: Handle, sequence: u64) {
        if self.ctx.load(Relaxed) != ctx.0 || self.sequence.load(Relaxed) != sequence {
            self.ctx.store(ctx.0, Relaxed);
            self.sequence.store(sequence, Relaxed);
            self.entries.iter().for_each(|entry| entry.0.store(0, Release));
        }
    }
    #[inline]
    pub(crate) fn get(&self, va: u64) -> Option<u64> {
        let page = va >> PAGE_SHIFT;
        let (tag, raw) = &self.entries[page as usize % MICRO];
        (tag.load(Relaxed) == page + 1).then(|| raw.load(Relaxed))
    }
    #[inline]
    pub(crate) fn put(&self, va: u64, raw: u64) {
        let page = va >> PAGE_SHIFT;
        let entry = &self.entries[page as usize % MICRO];
        entry.0.store(0, Release);
        entry.1.store(raw, Release);
        entry.0.store(page + 1, Release);
    }

    /// Address and leaf of a translation that `wanted` accepts. For other threads than the engine's.
    pub(crate) fn find(&self, wanted: impl Fn(u64, u64) -> bool) -> Option<(u64, u64)> {
        self.entries.iter().find_map(|(tag, raw)| {
            let page = tag.load(Acquire);
            let leaf = raw.load(Acquire);
            let whole = page != 0 && tag.load(Acquire) == page;
            let va = page.wrapping_sub(1) << PAGE_SHIFT;
            (whole && wanted(va, leaf)).then_some((va, leaf))
        })
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
        let touching = |tlb: &Tlb, start, last| {
            let mut found = vec![];
            tlb.each_in(start, last, &mut |va, _| {
                found.push(va);
                true
            });
            found.sort_unstable();
            found
        };
        assert_eq!(touching(&tlb, 0x5800, 0x7000), [0x5000, 0x6000, 0x7000]);
        assert_eq!(touching(&tlb, 0x6_2000, (4 << 21) + 5), [0x6_2000, 0x6_3000, 4 << 21]);
        assert_eq!(touching(&tlb, 0, u64::MAX).len(), 101);
        tlb.wrote(0x5008, 1, VALID | 0x1_5000);
        tlb.wrote(0x9008, 8, VALID | 0x9000);
        // Of two pages a part, and of the one between them all.
        tlb.wrote((4 << 21) + 0x5ff8, 0x1010, VALID | HUGE | 2 << 21);
        let written = |tlb: &mut Tlb, start, last| {
            let mut taken = vec![];
            tlb.take_written(start, last, &mut taken);
            taken.sort_unstable_by_key(|written| written.va);
            taken.iter().map(|written| (written.va, written.frame)).collect::<Vec<_>>()
        };
        assert_eq!(written(&mut tlb, 0x5fff, 0x8fff), [(0x5000, 0x1_5000)]);
        assert!(written(&mut tlb, 0x5000, 0x5fff).is_empty());
        let huge = |offset: u64| ((4 << 21) + offset, (2 << 21) + offset);
        assert_eq!(written(&mut tlb, (4 << 21) + 0x6123, u64::MAX), [huge(0x6000), huge(0x7000)]);
        assert_eq!(written(&mut tlb, 0x9fff, (4 << 21) + 0x5000), [(0x9000, 0x9000), huge(0x5000)]);
        tlb.wrote(0x9008, 8, VALID | 0x9000);
        tlb.forget_written();
        assert!(written(&mut tlb, 0, u64::MAX).is_empty());
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

    /// A full TLB must go on being one, for who works on a few pages of many, and at a price that does not grow with it.
    #[test]
    fn what_is_in_use_stays_in_a_full_one() {
        let mut tlb = Tlb::default();
        let limit = Some(4096);
        let mut misses = 0;
        let mut touch = |tlb: &mut Tlb, page: u64| {
            if tlb.lookup(page << 12).is_none() {
                misses += 1;
                tlb.insert(page << 12, VALID | page << 12, limit);
            }
        };
        (0..100_000).for_each(|page| touch(&mut tlb, page));
        assert_eq!(tlb.len(), 4096);
        for _ in 0..100 {
            (0..64).for_each(|page| touch(&mut tlb, page * 1000));
        }
        assert_eq!(tlb.len(), 4096);
        assert!(misses < 100_000 + 64 * 4, "{misses}");
    }

    #[test]
    fn the_micro_cache_forgets_when_the_sequence_moves() {
        let micro = Micro::new();
        micro.begin(Handle(5), 1);
        micro.put(0x1000, 7);
        assert_eq!(micro.get(0x1fff), Some(7));
        assert_eq!(micro.get(0x1000 + (MICRO as u64) * 0x1000), None);
        micro.begin(Handle(5), 1);
        assert_eq!(micro.get(0x1000), Some(7));
        assert_eq!(micro.find(|va, _| va == 0x1000), Some((0x1000, 7)));
        assert_eq!(micro.find(|va, _| va == 0x2000), None);
        micro.begin(Handle(5), 2);
        assert_eq!(micro.get(0x1000), None);
        assert_eq!(micro.find(|_, _| true), None);
    }
}
