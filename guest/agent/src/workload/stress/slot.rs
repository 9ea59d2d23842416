// SPDX-License-Identifier: MIT OR Apache-2.0
//! One thread's part of the arena, and the model of it.

mod boundary;

use nix::sys::mman::MmapAdvise;

use super::helper::Helper;
use crate::client::{Context, Done, Job};
use crate::memory::{Backing, HUGE, Mapping, PAGE, Pattern, Prot};
use crate::outcome::{Checked, Doing};
use crate::process::Child;
use crate::rng::Rng;
use crate::uffd::Uffd;

/// Bytes that a slot of small pages uses.
const SMALL: usize = 128 * PAGE;
/// The most pages that one operation covers; pages that are not present cost a fault each.
const REACH: usize = 8;

/// What the model knows of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    /// `None`: not mapped.
    prot: Option<Prot>,
    pattern: Pattern,
    /// Its frame was broken, and whoever comes to it is stopped.
    broken: bool,
}

impl Page {
    const FRESH: Self = Self { prot: Some(Prot::Write), pattern: Pattern::ZERO, broken: false };
    const GONE: Self = Self { prot: None, pattern: Pattern::ZERO, broken: false };

    fn readable(self) -> bool {
        !self.broken && matches!(self.prot, Some(Prot::Read | Prot::Write))
    }

    fn writable(self) -> bool {
        !self.broken && self.prot == Some(Prot::Write)
    }
}

/// What a round's operations are.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mix {
    /// Those of the boundary that cost more, and more of them all.
    pub(super) all: bool,
    /// Many pages are alike, and may be merged.
    pub(super) alike: bool,
    /// Frames break.
    pub(super) poison: bool,
    /// The process will be killed for its memory, and has no children that might be killed in its place.
    pub(super) doomed: bool,
}

/// What the slots of a round share.
#[derive(Clone, Copy)]
pub(super) struct Tools<'a> {
    pub(super) map: &'a Mapping,
    pub(super) context: &'a Context,
    pub(super) mix: Mix,
    pub(super) helper: Option<&'a Helper>,
    /// How many the machine has.
    pub(super) nodes: usize,
}

/// A thread's slot.
pub(super) struct Slot<'a> {
    map: &'a Mapping,
    context: &'a Context,
    tools: Tools<'a>,
    /// For ranges that are protected now and then.
    uffd: Option<Uffd>,
    /// Offset in the arena.
    base: usize,
    huge: bool,
    queue: u32,
    pages: Vec<Page>,
    rng: Rng,
}

/// First page and number of pages.
type Range = (usize, usize);

impl<'a> Slot<'a> {
    /// Bytes that slot `index` uses: every other one is for huge pages.
    pub(super) fn bytes(index: usize) -> usize {
        if index % 2 == 0 { SMALL } else { HUGE }
    }

    /// Slot `index` of an arena that is all fresh.
    pub(super) fn new(tools: Tools<'a>, index: usize, rng: Rng) -> Self {
        let huge = Self::bytes(index) == HUGE;
        let slot = Self {
            map: tools.map,
            context: tools.context,
            tools,
            uffd: Uffd::new().ok(),
            base: index * HUGE,
            huge,
            queue: (index % 2) as u32,
            pages: vec![Page::FRESH; Self::bytes(index) / PAGE],
            rng,
        };
        slot.advise_size(0, HUGE);
        slot
    }

    /// Works on it, and checks all of it in the end.
    pub(super) fn work(&mut self, steps: usize) -> Checked {
        let others = if self.tools.mix.all { 24 } else { 8 };
        for step in 0..steps {
            let range = self.some_pages();
            if self.tools.mix.poison && self.rng.once_in(30) {
                self.break_page(range.0).doing(&format!("step {step}"))?;
            }
            match self.rng.below(64 + others) {
                0..=15 => self.device_fill(range),
                16..=27 => self.device_check(range),
                28..=31 => self.device_copy(),
                32..=36 => self.cpu_fill(range.0),
                37..=40 => self.cpu_check(range.0),
                41..=45 => self.drop_data(range),
                46..=48 => self.unmap(range),
                49..=53 => self.renew(range),
                54..=58 => self.protect(range),
                59..=61 => self.move_page(),
                62 => self.renew_all(),
                63 if self.tools.mix.doomed => Ok(()),
                63 => Child::spawn(|_| Ok(()))?.join().doing("fork"),
                _ => self.shake(range),
            }
            .map_err(|failure| failure.at(&format!("step {step}, pages {range:?}")))?;
        }
        (0..self.pages.len()).try_for_each(|page| self.cpu_check(page)).doing("in the end")?;
        let mut page = 0;
        while page < self.pages.len() {
            let run = self.run_from(page, 64);
            self.check_run((page, run)).doing("in the end")?;
            page += run;
        }
        Ok(())
    }

    fn at(&self, page: usize) -> usize {
        self.base + page * PAGE
    }

    fn address(&self, page: usize) -> u64 {
        self.map.at(self.at(page))
    }

    fn some_pages(&mut self) -> Range {
        let first = self.rng.index(self.pages.len());
        (first, 1 + self.rng.index(REACH.min(self.pages.len() - first)))
    }

    /// Sizes of pages for a part of the slot; kernels without huge pages have no such advice, which is as well.
    fn advise_size(&self, offset: usize, bytes: usize) {
        let advice = if self.huge { MmapAdvise::MADV_HUGEPAGE } else { MmapAdvise::MADV_NOHUGEPAGE };
        let _ = self.map.advise(self.base + offset, bytes, advice);
        if self.tools.mix.alike {
            let _ = self.map.advise(self.base + offset, bytes, MmapAdvise::MADV_MERGEABLE);
        }
    }

    fn some_pattern(&mut self) -> Pattern {
        if self.tools.mix.alike && self.rng.once_in(2) {
            return Pattern { first: self.rng.below(4), step: 0 };
        }
        Pattern { first: self.rng.next(), step: self.rng.next() | 1 }
    }

    fn job(&self, job: Job) -> Checked<Done> {
        self.context.run(job.queue(self.queue))
    }

    /// Whether the device was refused a page for the sake of a broken one further on: what follows a missing page is faulted in
    /// with it by hmm_range_fault(), asked for or not, and a driver that looks around its fault need not try once more alone.
    fn refused(&self, done: Done, page: usize) -> bool {
        done.has_faulted_at(self.address(page)) && self.pages[page + 1..].iter().any(|page| page.broken)
    }

    /// The device writes; what it may not write stops it at that page.
    fn device_fill(&mut self, (first, count): Range) -> Checked {
        let pattern = self.some_pattern();
        let done = self.job(Job::fill(self.address(first), count * PAGE, pattern))?;
        for index in 0..count {
            if !self.pages[first + index].writable() {
                return done.faulted_at(self.address(first + index)).doing("device fill");
            }
            if self.refused(done, first + index) {
                return Ok(());
            }
            self.pages[first + index].pattern = pattern.from(index * PAGE);
        }
        done.ok().doing("device fill").map(drop)
    }

    /// Pages from `page` on, `most` at the most, that are alike: one pattern that goes on and is readable, or not readable.
    fn run_from(&self, page: usize, most: usize) -> usize {
        let first = self.pages[page];
        let next = |index: usize, page: &Page| {
            let at = index * PAGE;
            page.readable() == first.readable()
                && (!page.readable() || page.pattern == first.pattern.from(at))
        };
        let end = self.pages.len().min(page + most);
        self.pages[page..end].iter().enumerate().take_while(|(index, page)| next(*index, page)).count()
    }

    fn device_check(&mut self, (first, count): Range) -> Checked {
        let run = self.run_from(first, count);
        self.check_run((first, run))
    }

    /// The device reads pages that are alike.
    fn check_run(&mut self, (first, count): Range) -> Checked {
        if !self.pages[first].readable() {
            let done = self.job(Job::check(self.address(first), count * PAGE, Pattern::ZERO))?;
            return done.faulted_at(self.address(first)).doing("device check");
        }
        let pattern = self.pages[first].pattern;
        let done = self.job(Job::check(self.address(first), count * PAGE, pattern))?;
        if (first..first + count).any(|page| self.refused(done, page)) {
            return Ok(());
        }
        self.context.checked(done, self.address(first), pattern)
    }

    fn device_copy(&mut self) -> Checked {
        let (from, to) = (self.rng.index(self.pages.len()), self.rng.index(self.pages.len()));
        if from == to {
            return Ok(());
        }
        let done = self.job(Job::copy(self.address(to), self.address(from), PAGE))?;
        if self.pages[from].readable() && self.pages[to].writable() {
            if self.refused(done, from) || self.refused(done, to) {
                return Ok(());
            }
            self.pages[to].pattern = self.pages[from].pattern;
            done.ok().doing("device copy").map(drop)
        } else if self.pages[from].readable() {
            done.faulted_at(self.address(to)).doing("device copy")
        } else if self.pages[to].writable() {
            done.faulted_at(self.address(from)).doing("device copy")
        } else {
            // Either may be looked at first.
            let from = done.faulted_at(self.address(from));
            from.or_else(|_| done.faulted_at(self.address(to))).doing("device copy")
        }
    }

    fn cpu_fill(&mut self, page: usize) -> Checked {
        if self.pages[page].writable() {
            let pattern = self.some_pattern();
            self.map.fill(self.at(page), PAGE, pattern);
            self.pages[page].pattern = pattern;
        }
        Ok(())
    }

    fn cpu_check(&mut self, page: usize) -> Checked {
        if !self.pages[page].readable() {
            return Ok(());
        }
        self.context.cpu_check(self.map, self.at(page), PAGE, self.pages[page].pattern)
    }

    /// Pages of the range up to the first that is gone: madvise and mprotect refuse holes.
    fn mapped(&self, (first, count): Range) -> usize {
        self.pages[first..first + count].iter().take_while(|page| page.prot.is_some()).count()
    }

    fn drop_data(&mut self, (first, count): Range) -> Checked {
        let count = self.mapped((first, count));
        if count > 0 {
            let advice = MmapAdvise::MADV_DONTNEED;
            self.map.advise(self.at(first), count * PAGE, advice).doing("madvise")?;
            self.pages[first..first + count].iter_mut().for_each(|page| {
                page.pattern = Pattern::ZERO;
                page.broken = false;
            });
        }
        Ok(())
    }

    fn unmap(&mut self, (first, count): Range) -> Checked {
        self.map.unmap(self.at(first), count * PAGE).doing("munmap")?;
        self.pages[first..first + count].fill(Page::GONE);
        Ok(())
    }

    fn renew(&mut self, (first, count): Range) -> Checked {
        let bytes = count * PAGE;
        self.map.renew(self.at(first), bytes, Prot::Write, Backing::Anonymous).doing("mmap")?;
        self.advise_size(first * PAGE, bytes);
        self.pages[first..first + count].fill(Page::FRESH);
        Ok(())
    }

    /// A new mapping for the whole slot, so that there are huge pages again, written by the device at once.
    fn renew_all(&mut self) -> Checked {
        self.renew((0, self.pages.len()))?;
        if self.huge {
            self.device_fill((0, self.pages.len()))?;
        }
        Ok(())
    }

    fn protect(&mut self, (first, count): Range) -> Checked {
        let count = self.mapped((first, count));
        if count > 0 {
            let prot = [Prot::None, Prot::Read, Prot::Write, Prot::Write][self.rng.index(4)];
            self.map.protect(self.at(first), count * PAGE, prot).doing("mprotect")?;
            self.pages[first..first + count].iter_mut().for_each(|page| page.prot = Some(prot));
        }
        Ok(())
    }

    /// mremap of one page over another.
    fn move_page(&mut self) -> Checked {
        let (from, to) = (self.rng.index(self.pages.len()), self.rng.index(self.pages.len()));
        if from == to || self.pages[from].prot.is_none() {
            return Ok(());
        }
        self.map.move_to(self.at(from), PAGE, self.map, self.at(to)).doing("mremap")?;
        self.pages[to] = self.pages[from];
        self.pages[from] = Page::GONE;
        Ok(())
    }
}
