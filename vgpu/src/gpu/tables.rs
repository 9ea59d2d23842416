// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page tables: their pages, where in a tree they hang, and the walk.
//!
//! Walks take no lock. A walk checks at each step, before and after it reads the entry, that the page belongs to the context it
//! walks for: nothing a driver writes leads into another context's tables.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use parking_lot::Mutex;
use vgpu_spec::fault::{REASON_ABSENT, REASON_MALFORMED, REASON_NO_ROOT};
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte::{
    self, ATOMIC, ENTRIES, Entry, HUGE, PAGE_SHIFT, ROOT_LEVEL, VALID, VRAM, WRITE, decode,
};

use super::pages::Pages;

/// Tables whose leaves are told of when a directory entry links or unlinks a filled tree.
const TELL_TABLES: u32 = 64;
/// The same for all the entries of one command: a driver may link the same tree in every one of them.
const TELL_TABLES_COMMAND: u32 = 1024;

/// How much may still be told of in a command: tables.
#[derive(Debug)]
pub(crate) struct Budget(u32);

impl Default for Budget {
    fn default() -> Self {
        Self(TELL_TABLES_COMMAND)
    }
}

impl Budget {
    /// Does something with as much of it as one entry may take.
    fn entry<T>(&mut self, what: impl FnOnce(&mut u32) -> T) -> T {
        let share = self.0.min(TELL_TABLES);
        let mut left = share;
        let done = what(&mut left);
        self.0 -= share - left;
        done
    }
}

/// What a change of a table did to the context's leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A valid leaf stands there now; `replaced`: in place of another.
    Set { va: Option<u64>, raw: u64, replaced: bool },
    /// Valid leaves next to each other went.
    Cleared { va: Option<u64>, count: u32, shift: u32 },
}

/// Where a table page hangs.
#[derive(Clone, Copy, Debug)]
struct Link {
    level: u8,
    va: u64,
    /// The table it hangs in and the entry there; `None` for a root.
    parent: Option<(u32, usize)>,
}

/// Why a walk found no leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WalkFault {
    pub(crate) reason: u32,
    /// A table page that is not the context's.
    pub(crate) foreign: Option<u32>,
}

impl WalkFault {
    fn new(reason: u32) -> Self {
        Self { reason, foreign: None }
    }
}

/// All table pages of VRAM.
#[derive(Debug)]
pub(crate) struct Tables {
    entries: Box<[AtomicU64]>,
    /// By table page. Held while entries are written, so that links and entries agree.
    links: Mutex<Box<[Option<Link>]>>,
    pub(crate) pages: Pages,
}

impl Tables {
    pub(crate) fn new(count: u32) -> Self {
        Self {
            entries: (0..count as usize * ENTRIES).map(|_| AtomicU64::new(0)).collect(),
            links: Mutex::new(vec![None; count as usize].into_boxed_slice()),
            pages: Pages::new(Kind::TablePage, count),
        }
    }

    #[inline]
    fn entry(&self, page: u32, index: usize) -> Option<&AtomicU64> {
        self.entries.get(page as usize * ENTRIES + index)
    }

    /// An entry as it stands, of any page; 0 where there is none.
    pub(crate) fn read(&self, page: u32, index: usize) -> u64 {
        self.entry(page, index).map_or(0, |entry| entry.load(SeqCst))
    }

    /// Clears a page that is about to be granted.
    pub(crate) fn wipe(&self, page: u32) {
        self.links.lock()[page as usize] = None;
        for index in 0..ENTRIES {
            if let Some(entry) = self.entry(page, index) {
                entry.store(0, SeqCst);
            }
        }
    }

    /// Forgets where everything hangs. What the pages hold stays, as it would in memory, until they are granted.
    pub(crate) fn reset(&self) {
        let Self { entries: _, links, pages } = self;
        links.lock().fill(None);
        for page in 0..pages.len() {
            pages.take_back(page);
        }
    }

    /// Level and first address of a page, if it hangs in its context's tree.
    pub(crate) fn position(&self, page: u32) -> Option<(u8, u64)> {
        position(&self.links.lock(), page)
    }

    /// Makes `page` a root, or leaves the context without one.
    pub(crate) fn set_root(
        &self,
        ctx: Handle,
        old: Option<u32>,
        new: Option<u32>,
        tell: &mut dyn FnMut(Change),
    ) {
        if old == new {
            return;
        }
        let mut links = self.links.lock();
        let mut budget = Budget::default();
        if let Some(page) = old {
            self.detach(&mut links, ctx, page, &mut budget, tell);
        }
        if let Some(page) = new {
            let link = Link { level: ROOT_LEVEL, va: 0, parent: None };
            budget.entry(|budget| self.attach(&mut links, ctx, page, link, budget, tell));
        }
    }

    /// Writes one entry of a page of `ctx`.
    pub(crate) fn write(
        &self,
        ctx: Handle,
        page: u32,
        (index, raw): (usize, u64),
        budget: &mut Budget,
        tell: &mut dyn FnMut(Change),
    ) {
        let mut links = self.links.lock();
        self.write_locked(&mut links, ctx, page, (index, raw), budget, tell);
    }

    /// Writes a part of an entry, as the window does: the bits of `mask`.
    pub(crate) fn write_masked(
        &self,
        ctx: Handle,
        page: u32,
        index: usize,
        (raw, mask): (u64, u64),
        tell: &mut dyn FnMut(Change),
    ) {
        let mut links = self.links.lock();
        let raw = self.read(page, index) & !mask | raw & mask;
        self.write_locked(&mut links, ctx, page, (index, raw), &mut Budget::default(), tell);
    }

    /// Clears `count` entries from `first` on; tells of neighbouring leaves at once.
    pub(crate) fn clear(
        &self,
        ctx: Handle,
        page: u32,
        first: usize,
        count: usize,
        tell: &mut dyn FnMut(Change),
    ) {
        let mut links = self.links.lock();
        let (mut run, mut budget) = (Run::default(), Budget::default());
        for index in first..(first + count).min(ENTRIES) {
            self.write_locked(&mut links, ctx, page, (index, 0), &mut budget, &mut |change| {
                run.add(change, tell)
            });
        }
        run.end(tell);
    }

    /// Takes a page out of its tree, before it is returned.
    pub(crate) fn unlink(&self, ctx: Handle, page: u32, tell: &mut dyn FnMut(Change)) {
        let mut links = self.links.lock();
        self.detach(&mut links, ctx, page, &mut Budget::default(), tell);
    }

    /// Takes a page out of its tree and tells nobody: its context ends.
    pub(crate) fn forget(&self, page: u32) {
        if let Some(slot) = self.links.lock().get_mut(page as usize) {
            *slot = None;
        }
    }

    fn write_locked(
        &self,
        links: &mut [Option<Link>],
        ctx: Handle,
        page: u32,
        (index, raw): (usize, u64),
        budget: &mut Budget,
        tell: &mut dyn FnMut(Change),
    ) {
        let Some(entry) = self.entry(page, index) else { return };
        let at = position(links, page);
        let old = entry.swap(raw, SeqCst);
        let level = at.map(|at| at.0);
        let (before, after) = (classify(old, level), classify(raw, level));
        let va = at.map(|(level, va)| va + ((index as u64) << shift(level)));
        if let (Entry::Table(child), false) = (before, before == after) {
            let hangs_here = |link: &Link| link.parent == Some((page, index));
            if links.get(child as usize).copied().flatten().as_ref().is_some_and(hangs_here) {
                self.detach(links, ctx, child, budget, tell);
            }
        }
        match (before, after) {
            (_, Entry::Leaf(_)) => tell(Change::Set { va, raw, replaced: matches!(before, Entry::Leaf(_)) }),
            (Entry::Leaf(leaf), _) => tell(Change::Cleared { va, count: 1, shift: leaf.shift }),
            _ => {}
        }
        if let (Entry::Table(child), Some((level, _)), Some(va)) = (after, at, va) {
            if before != after && level > 0 {
                let link = Link { level: level - 1, va, parent: Some((page, index)) };
                budget.entry(|budget| self.attach(links, ctx, child, link, budget, tell));
            }
        }
    }

    /// A directory entry (or the root) leads to `page` now: what was filled in before becomes reachable.
    fn attach(
        &self,
        links: &mut [Option<Link>],
        ctx: Handle,
        page: u32,
        link: Link,
        budget: &mut u32,
        tell: &mut dyn FnMut(Change),
    ) {
        if self.pages.owner(page) != ctx || *budget == 0 {
            return;
        }
        let Some(slot) = links.get_mut(page as usize) else { return };
        *budget -= 1;
        *slot = Some(link);
        for index in 0..ENTRIES {
            let raw = self.read(page, index);
            let va = link.va + ((index as u64) << shift(link.level));
            match decode(raw, link.level) {
                Entry::Leaf(_) => tell(Change::Set { va: Some(va), raw, replaced: false }),
                Entry::Table(child) if link.level > 0 => {
                    let below = Link { level: link.level - 1, va, parent: Some((page, index)) };
                    self.attach(links, ctx, child, below, budget, tell);
                }
                _ => {}
            }
        }
    }

    /// Nothing leads to `page` any more: its leaves are gone, as far as a walk is concerned. Tables below keep their links,
    /// which count for nothing without this one.
    fn detach(
        &self,
        links: &mut [Option<Link>],
        ctx: Handle,
        page: u32,
        budget: &mut Budget,
        tell: &mut dyn FnMut(Change),
    ) {
        let at = position(links, page);
        let mut run = Run::default();
        if let Some((level, va)) = at {
            let gone = &mut |va, _, shift| run.add(Change::Cleared { va: Some(va), count: 1, shift }, tell);
            budget.entry(|budget| self.each_leaf(ctx, page, (level, va), budget, gone));
        }
        run.end(tell);
        if let Some(slot) = links.get_mut(page as usize) {
            *slot = None;
        }
    }

    /// Every leaf that a walk through `page` can reach, looking at `budget` tables at most: address, entry, log2 of its size.
    fn each_leaf(
        &self,
        ctx: Handle,
        page: u32,
        (level, va): (u8, u64),
        budget: &mut u32,
        leaf: &mut dyn FnMut(u64, u64, u32),
    ) {
        if self.pages.owner(page) != ctx || *budget == 0 {
            return;
        }
        *budget -= 1;
        for index in 0..ENTRIES {
            let raw = self.read(page, index);
            let va = va + ((index as u64) << shift(level));
            match decode(raw, level) {
                Entry::Leaf(found) => leaf(va, raw, found.shift),
                Entry::Table(child) if level > 0 => {
                    self.each_leaf(ctx, child, (level - 1, va), budget, leaf);
                }
                _ => {}
            }
        }
    }

    /// Address and entry of each valid leaf that a walk from the root can reach and that touches `[start, last]`, until `leaf`
    /// says no or `budget` tables have been looked at.
    pub(crate) fn each_in(
        &self,
        ctx: Handle,
        root: u64,
        range: (u64, u64),
        mut budget: u32,
        leaf: &mut dyn FnMut(u64, u64) -> bool,
    ) {
        let last = range.1.min((1 << pte::VA_BITS) - 1);
        if let (Some(root), true) = (root.checked_sub(1), range.0 <= last) {
            self.each_below(ctx, root as u32, (ROOT_LEVEL, 0), (range.0, last), &mut budget, leaf);
        }
    }

    fn each_below(
        &self,
        ctx: Handle,
        page: u32,
        (level, base): (u8, u64),
        (start, last): (u64, u64),
        budget: &mut u32,
        leaf: &mut dyn FnMut(u64, u64) -> bool,
    ) -> bool {
        if self.pages.owner(page) != ctx || *budget == 0 {
            return true;
        }
        *budget -= 1;
        let end = base | ((1 << (shift(level) + 9)) - 1);
        let (start, last) = (start.max(base), last.min(end));
        for index in pte::index(start, level)..=pte::index(last, level) {
            let raw = self.read(page, index);
            let va = base + ((index as u64) << shift(level));
            let more = match decode(raw, level) {
                Entry::Leaf(_) => leaf(va, raw),
                Entry::Table(child) if level > 0 => {
                    self.each_below(ctx, child, (level - 1, va), (start, last), budget, leaf)
                }
                _ => true,
            };
            if !more {
                return false;
            }
        }
        true
    }

    /// Finds the leaf of `va`.
    pub(crate) fn walk(&self, ctx: Handle, root: u64, va: u64) -> Result<u64, WalkFault> {
        let Some(root) = root.checked_sub(1) else { return Err(WalkFault::new(REASON_NO_ROOT)) };
        let mut page = root as u32;
        for level in (0..=ROOT_LEVEL).rev() {
            let foreign = Err(WalkFault { reason: REASON_MALFORMED, foreign: Some(page) });
            if self.pages.owner(page) != ctx {
                return foreign;
            }
            let raw = self.read(page, pte::index(va, level));
            if self.pages.owner(page) != ctx {
                return foreign;
            }
            match decode(raw, level) {
                Entry::Absent => return Err(WalkFault::new(REASON_ABSENT)),
                Entry::Malformed => return Err(WalkFault::new(REASON_MALFORMED)),
                Entry::Leaf(_) => return Ok(raw),
                Entry::Table(next) => page = next,
            }
        }
        Err(WalkFault::new(REASON_MALFORMED))
    }

    /// How many valid leaves a walk from the root can reach, and the first of them, looking at `budget` tables at most.
    pub(crate) fn leaves(&self, ctx: Handle, root: u64, mut budget: u32) -> (u64, Option<(u64, u64)>) {
        let mut found = (0, None);
        if let Some(root) = root.checked_sub(1) {
            self.each_leaf(ctx, root as u32, (ROOT_LEVEL, 0), &mut budget, &mut |va, raw, _| {
                found.0 += 1;
                found.1.get_or_insert((va, raw));
            });
        }
        found
    }
}

fn shift(level: u8) -> u32 {
    PAGE_SHIFT + 9 * u32::from(level)
}

/// Follows the links up to a root.
fn position(links: &[Option<Link>], page: u32) -> Option<(u8, u64)> {
    let link = (*links.get(page as usize)?)?;
    let mut at = link;
    while let Some((parent, _)) = at.parent {
        let above = (*links.get(parent as usize)?)?;
        if above.level != at.level + 1 {
            return None;
        }
        at = above;
    }
    (at.level == ROOT_LEVEL).then_some((link.level, link.va))
}

/// Decodes; in a page that hangs nowhere, whatever has a leaf's bits is taken for a leaf.
fn classify(raw: u64, level: Option<u8>) -> Entry {
    match level {
        Some(level) => decode(raw, level),
        None if raw & VALID != 0 && raw & (WRITE | ATOMIC | HUGE | VRAM) != 0 => {
            decode(raw, u8::from(raw & HUGE != 0))
        }
        None => Entry::Absent,
    }
}

/// Joins neighbouring `Cleared` changes.
#[derive(Default)]
struct Run(Option<(Option<u64>, u32, u32)>);

impl Run {
    fn add(&mut self, change: Change, tell: &mut dyn FnMut(Change)) {
        let Change::Cleared { va, count, shift } = change else {
            return tell(change);
        };
        if let Some((start, so_far, run_shift)) = &mut self.0 {
            let next = start.map(|start| start + (u64::from(*so_far) << *run_shift));
            if next == va && *run_shift == shift {
                *so_far += count;
                return;
            }
        }
        self.end(tell);
        self.0 = Some((va, count, shift));
    }
    fn end(&mut self, tell: &mut dyn FnMut(Change)) {
        if let Some((va, count, shift)) = self.0.take() {
            tell(Change::Cleared { va, count, shift });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Handle = Handle(1 << 32 | 1 << 24);
    const B: Handle = Handle(1 << 32 | 1 << 24 | 1);

    /// Root 0 -> 1 -> 2 -> 3 for `A`, unlinked.
    fn tables() -> Tables {
        let tables = Tables::new(8);
        for page in 0..4 {
            tables.pages.grant(page, A);
        }
        tables.pages.grant(4, B);
        tables
    }
    fn link(tables: &Tables, told: &mut Vec<Change>) {
        tables.set_root(A, None, Some(0), &mut |c| told.push(c));
        for page in 0..3 {
            tables.write(A, page, (1, VALID | u64::from(page + 1) << 12), &mut Budget::default(), &mut |c| {
                told.push(c)
            });
        }
    }
    const VA: u64 = 1 << 39 | 1 << 30 | 1 << 21;

    #[test]
    fn leaves_are_told_with_their_address_whatever_the_order() {
        let leaf = VALID | WRITE | 0x5000;
        let set = Change::Set { va: Some(VA + 0x7000), raw: leaf, replaced: false };
        let tables1 = tables();
        let mut told = vec![];
        link(&tables1, &mut told);
        tables1.write(A, 3, (7, leaf), &mut Budget::default(), &mut |c| told.push(c));
        assert_eq!(told, [set]);

        let tables2 = tables();
        let mut told = vec![];
        tables2.write(A, 3, (7, leaf), &mut Budget::default(), &mut |c| told.push(c));
        assert_eq!(told, [Change::Set { va: None, raw: leaf, replaced: false }]);
        told.clear();
        link(&tables2, &mut told);
        assert_eq!(told, [set]);
        assert_eq!(tables2.walk(A, 1, VA + 0x7abc), Ok(leaf));
        let within = |start, last| {
            let mut found = vec![];
            tables2.each_in(A, 1, (start, last), 100, &mut |va, raw| {
                found.push((va, raw));
                true
            });
            found
        };
        assert_eq!(within(VA + 0x7fff, VA + 0x7fff), [(VA + 0x7000, leaf)]);
        assert_eq!(within(0, u64::MAX), [(VA + 0x7000, leaf)]);
        assert_eq!(within(0, VA + 0x6fff), []);
        assert_eq!(within(VA + 0x8000, u64::MAX), []);
        told.clear();
        tables2.write(A, 1, (1, 0), &mut Budget::default(), &mut |c| told.push(c));
        assert_eq!(told, [Change::Cleared { va: Some(VA + 0x7000), count: 1, shift: 12 }]);
        assert_eq!(tables2.position(3), None);
        assert_eq!(tables2.walk(A, 1, VA + 0x7abc), Err(WalkFault::new(REASON_ABSENT)));
    }

    #[test]
    fn neighbours_are_cleared_as_one() {
        let tables = tables();
        let mut told = vec![];
        link(&tables, &mut told);
        for index in [3, 4, 5, 9] {
            tables.write(A, 3, (index, VALID | 0x5000), &mut Budget::default(), &mut |_| ());
        }
        tables.clear(A, 3, 0, 512, &mut |c| told.push(c));
        assert_eq!(
            told,
            [
                Change::Cleared { va: Some(VA + 0x3000), count: 3, shift: 12 },
                Change::Cleared { va: Some(VA + 0x9000), count: 1, shift: 12 }
            ]
        );
        assert_eq!(tables.leaves(A, 1, 100), (0, None));
    }

    #[test]
    fn a_walk_stays_in_its_context() {
        let tables = tables();
        link(&tables, &mut vec![]);
        assert_eq!(tables.walk(A, 0, VA), Err(WalkFault::new(REASON_NO_ROOT)));
        assert_eq!(tables.walk(A, 1, VA), Err(WalkFault::new(REASON_ABSENT)));
        let foreign = |page| Err(WalkFault { reason: REASON_MALFORMED, foreign: Some(page) });
        assert_eq!(tables.walk(B, 1, VA), foreign(0));
        tables.write(A, 2, (1, VALID | 4 << 12), &mut Budget::default(), &mut |_| ());
        assert_eq!(tables.walk(A, 1, VA), foreign(4));
        tables.write(A, 2, (1, VALID | 0xff_ffff << 12), &mut Budget::default(), &mut |_| ());
        assert_eq!(tables.walk(A, 1, VA), foreign(0xff_ffff));
        tables.write(A, 2, (1, VALID | 1 << 60), &mut Budget::default(), &mut |_| ());
        assert_eq!(tables.walk(A, 1, VA), Err(WalkFault::new(REASON_MALFORMED)));
    }

    #[test]
    fn loops_end() {
        let tables = tables();
        tables.set_root(A, None, Some(0), &mut |_| ());
        for index in 0..ENTRIES {
            tables.write(A, 0, (index, VALID), &mut Budget::default(), &mut |_| ());
        }
        // At level 0 the same bits are a leaf.
        assert_eq!(tables.walk(A, 1, 0), Ok(VALID));
        let (count, _) = tables.leaves(A, 1, 50);
        assert!(count <= 50 * 512);
        tables.unlink(A, 0, &mut |_| ());
    }
}
