// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the device has written, and whether anybody was told.
//!
//! The device remembers the pages that it has written, context by context. They are asked about when an invalidation takes them
//! away; and what nobody can answer for then is remembered here, by address space:
//!
//! - An invalidation that takes rights and leaves the page where it is (PROTECTION_PAGE: fork, write-back) is no end. What is
//!   dirty then is settled: who cleans it has the range invalidated again. What is clean is owed until the page goes.
//! - A context that has ended is asked nothing any more. What it wrote is owed by who let go of its pages.
//!
//! The witness answers after the start of the invalidation was judged. That a page that goes is clean it reports; of one that stays
//! it writes it to the place of the questions, from where it is fetched when the next start is judged. An answer counts for nothing
//! if the page was invalidated once more in between: whoever was told then may have let it be cleaned.

use std::collections::{BTreeMap, HashMap};

use vgpu_spec::handle::Handle;
use vgpu_spec::range as spec;
use vgpu_spec::witness::{QUESTION_WORDS, QUESTIONS_ANSWERED, QUESTIONS_MOST, QUESTIONS_STAYS};

use super::event::Written;
use super::range::{Demand, Range};

/// Pages remembered for those that have ended or lost their rights, in all address spaces.
const OWED_MOST: usize = 1 << 16;
/// Invalidations whose answers are waited for.
const ASKING_MOST: usize = 1024;

/// A page that `ctx` has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark {
    pub(super) va: u64,
    pub(super) frame: u64,
    pub(super) ctx: Handle,
}

impl Mark {
    pub(super) fn new(ctx: Handle, Written { va, frame }: Written) -> Self {
        Self { va, frame, ctx }
    }
}

/// What an invalidation means for the pages in its range that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// They lose rights and are where they were.
    Stays,
    /// They go: whoever does not say now that they are dirty has lost it.
    Goes,
    /// They go, and whose doing that is answers for it: the driver's own migration, exit.
    Settled,
    /// Nothing happens to them.
    Untouched,
}

impl Range {
    pub(super) fn fate(&self) -> Fate {
        match (self.event, self.demand()) {
            (spec::PROTECTION_PAGE, _) => Fate::Stays,
            (spec::PROTECTION_VMA | spec::SOFT_DIRTY, _) => Fate::Untouched,
            (_, Demand::Gone) => Fate::Goes,
            _ => Fate::Settled,
        }
    }
}

/// Questions about one invalidation.
struct Asking {
    mm: u64,
    number: u64,
    stays: bool,
    /// The questions are put. Before, what stands in their place is of an earlier invalidation.
    put: bool,
    /// In the order of the questions, once they are put; `None` for one whose answer counts for nothing any more.
    asked: Vec<Option<Mark>>,
}

/// What is put into the place of an invalidation's questions.
pub(super) type Words = [u64; QUESTION_WORDS as usize];

/// See the module's text. Not locked: the oracle has it behind a lock of its own.
#[derive(Default)]
pub(super) struct Dirt {
    /// By address space, and in it by page and frame: whose.
    owed: HashMap<u64, BTreeMap<(u64, u64), Handle>>,
    count: usize,
    /// By slot of the invalidation.
    asking: HashMap<u32, Asking>,
    /// Moments that the witness has missed: among them may be the one at which a page was cleaned.
    missed: u64,
}

impl Dirt {
    /// Nobody was told of this one, and it may still be dropped as clean.
    pub(super) fn owe(&mut self, mm: u64, Mark { va, frame, ctx }: Mark) {
        if self.count < OWED_MOST && self.owed.entry(mm).or_default().insert((va, frame), ctx).is_none() {
            self.count += 1;
        }
    }

    /// An invalidation is judged, in whose range `marks` were written. What was asked about its range before counts for nothing. Adds what
    /// is owed in it to the marks, and holds them until they are asked about ([`Dirt::ask`]), or are struck out as well.
    pub(super) fn begin(&mut self, mm: u64, range: &Range, marks: &mut Vec<Mark>) {
        for asking in self.asking.values_mut().filter(|asking| asking.mm == mm) {
            for asked in &mut asking.asked {
                *asked = asked.take_if(|mark| !range.covers(mark.va, mark.va | 0xfff));
            }
        }
        self.asking.remove(&range.slot);
        if let Some(book) = self.owed.get_mut(&mm) {
            let from = marks.len();
            let inside = book.range((range.start & !0xfff, 0)..=(range.last, u64::MAX));
            marks.extend(inside.map(|(&(va, frame), &ctx)| Mark { va, frame, ctx }));
            for mark in &marks[from..] {
                book.remove(&(mark.va, mark.frame));
            }
            self.count -= marks.len() - from;
            if book.is_empty() {
                self.owed.remove(&mm);
            }
        }
        // By several engines or contexts: one word is enough.
        marks.sort_unstable();
        marks.dedup_by_key(|mark| (mark.va, mark.frame));
        let stays = range.fate() == Fate::Stays;
        let asked = marks.iter().copied().map(Some).collect();
        if !marks.is_empty() && range.fate() != Fate::Settled && self.asking.len() < ASKING_MOST {
            self.asking.insert(range.slot, Asking { mm, number: range.number, stays, put: false, asked });
        }
    }

    /// Has the witness asked about those of `marks`, of whose pages the CPU's entries are clean, that still count; if there are too many,
    /// about some from all over the range: what to write to the place of the invalidation's questions, before anybody else has the lock.
    pub(super) fn ask(&mut self, range: &Range, marks: &[Mark]) -> Option<Words> {
        let asking = self.asking.get_mut(&range.slot).filter(|asking| asking.number == range.number)?;
        asking.asked.retain(|asked| asked.is_some_and(|asked| marks.binary_search(&asked).is_ok()));
        if let Some(more) = asking.asked.len().checked_sub(QUESTIONS_MOST).filter(|more| *more > 0) {
            let last = more + QUESTIONS_MOST - 1;
            asking.asked =
                (0..QUESTIONS_MOST).map(|i| asking.asked[i * last / (QUESTIONS_MOST - 1)]).collect();
        }
        asking.put = true;
        if asking.asked.is_empty() {
            self.asking.remove(&range.slot);
            return None;
        }
        let mut words = [0; QUESTION_WORDS as usize];
        words[0] = asking.asked.len() as u64 | if asking.stays { QUESTIONS_STAYS } else { 0 };
        for (place, mark) in words[1..].chunks_exact_mut(3).zip(asking.asked.iter().flatten()) {
            place.copy_from_slice(&[mark.va, mark.frame, mark.ctx.0]);
        }
        Some(words)
    }

    /// Fetches the answers that have come: `read` reads the first word of a slot's place. What is clean and stays is owed.
    pub(super) fn fetch(&mut self, read: impl Fn(u32) -> Option<u64>) {
        let mut clean = Vec::new();
        self.asking.retain(|&slot, asking| {
            let answer = asking.put.then(|| read(slot)).flatten();
            let Some(answer) = answer.filter(|answer| answer & QUESTIONS_ANSWERED != 0) else { return true };
            let asked = asking.asked.drain(..).enumerate();
            if asking.stays {
                let owed = asked.filter(|(i, _)| answer >> i & 1 != 0);
                clean.extend(owed.filter_map(|(_, mark)| Some((asking.mm, mark?))));
            }
            false
        });
        clean.into_iter().for_each(|(mm, mark)| self.owe(mm, mark));
    }

    /// Whether the answer that a page is clean is one to a question that still counts. It counts once.
    pub(super) fn answered(&mut self, mm: u64, number: u64, mark: Mark) -> bool {
        let its =
            |asking: &&mut Asking| asking.mm == mm && asking.number == number && asking.put && !asking.stays;
        let Some(asking) = self.asking.values_mut().find(its) else { return false };
        asking.asked.iter_mut().any(|asked| asked.take_if(|asked| *asked == mark).is_some())
    }

    /// The address space ends.
    pub(super) fn forget(&mut self, mm: u64) {
        self.count -= self.owed.remove(&mm).map_or(0, |book| book.len());
        self.asking.retain(|_, asking| asking.mm != mm);
    }

    /// So many moments have been missed in all. If that is more than before, nothing that is known is worth anything: true.
    pub(super) fn missed(&mut self, missed: u64) -> bool {
        let more = missed > self.missed;
        if more {
            *self = Self { missed, ..Self::default() };
        }
        more
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.owed.is_empty() && self.asking.is_empty() && self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use vgpu_spec::handle::Kind;

    use super::*;

    fn mark(page: u64) -> Mark {
        Mark { va: page << 12, frame: 0x10_0000 + (page << 12), ctx: Handle::new(Kind::Context, 1, 2) }
    }

    fn range(event: u32, slot: u32, pages: std::ops::RangeInclusive<u64>) -> Range {
        Range {
            start: pages.start() << 12,
            last: (pages.end() << 12) | 0xfff,
            event,
            owned: false,
            leaving: false,
            slot,
            number: 100 + u64::from(slot),
        }
    }

    /// An invalidation in whose range pages were written.
    fn started(dirt: &mut Dirt, mm: u64, range: &Range, written: &[u64]) -> Option<Words> {
        let mut marks = written.iter().copied().map(mark).collect();
        dirt.begin(mm, range, &mut marks);
        dirt.ask(range, &marks)
    }

    fn owed(dirt: &Dirt) -> Vec<u64> {
        let keys = dirt.owed.values().flat_map(|book| book.keys());
        let mut pages: Vec<u64> = keys.map(|(va, _)| va >> 12).collect();
        pages.sort_unstable();
        assert_eq!(pages.len(), dirt.count);
        pages
    }

    #[test]
    fn what_stays_is_owed_until_it_goes() {
        let mut dirt = Dirt::default();
        let fork = range(spec::PROTECTION_PAGE, 3, 0..=9);
        let words = started(&mut dirt, 1, &fork, &[2, 1, 3, 2]).unwrap();
        assert_eq!(words[0], 3 | QUESTIONS_STAYS);
        assert_eq!(words[4..7], [0x2000, 0x10_2000, mark(2).ctx.0]);
        dirt.fetch(|_| Some(words[0]));
        assert!(owed(&dirt).is_empty(), "no answer yet");
        assert!(!dirt.answered(1, 103, mark(1)), "it is no loss yet");
        // The first and the last are clean.
        dirt.fetch(|slot| (slot == 3).then_some(QUESTIONS_ANSWERED | 0b101));
        assert_eq!(owed(&dirt), [1, 3]);
        let mut taken = Vec::new();
        dirt.begin(2, &fork, &mut taken);
        assert!(taken.is_empty());
        dirt.begin(1, &range(spec::CLEAR, 0, 2..=3), &mut taken);
        assert_eq!(taken, [mark(3)]);
        assert_eq!(owed(&dirt), [1]);
        dirt.forget(1);
        assert!(dirt.is_empty());
    }

    #[test]
    fn an_answer_about_what_was_invalidated_since_counts_for_nothing() {
        let mut dirt = Dirt::default();
        started(&mut dirt, 1, &range(spec::PROTECTION_PAGE, 3, 0..=9), &[1, 2]).unwrap();
        started(&mut dirt, 1, &range(spec::CLEAR, 5, 20..=29), &[23, 24, 25]).unwrap();
        let goes = range(spec::CLEAR, 6, 30..=39);
        let mut late = vec![mark(33), mark(34)];
        dirt.begin(1, &goes, &mut late);
        for (mm, pages) in [(1, 1..=1), (1, 23..=23), (2, 0..=99), (1, 33..=33)] {
            assert!(started(&mut dirt, mm, &range(spec::CLEAR, 4, pages), &[]).is_none());
        }
        // What stands there is still the answer to others.
        dirt.fetch(|slot| (slot == 6).then_some(QUESTIONS_ANSWERED | 1));
        assert!(!dirt.answered(1, 106, mark(34)));
        assert_eq!(dirt.ask(&goes, &late).unwrap()[..2], [1, 34 << 12], "between the look and the question");
        assert!(!dirt.answered(1, 105, mark(23)));
        assert!(!dirt.answered(2, 105, mark(24)) && !dirt.answered(1, 104, mark(24)));
        assert!(dirt.answered(1, 105, mark(24)));
        assert!(!dirt.answered(1, 105, mark(24)), "twice");
        dirt.fetch(|_| Some(QUESTIONS_ANSWERED | 0b11));
        assert_eq!(owed(&dirt), [2], "what goes is owed by nobody");
        assert!(dirt.asking.is_empty());
    }

    #[test]
    fn what_the_driver_moves_or_the_cpu_has_written_is_settled() {
        let mut dirt = Dirt::default();
        dirt.owe(1, mark(1));
        let mut own = range(spec::MIGRATE, 1, 0..=9);
        own.owned = true;
        assert!(started(&mut dirt, 1, &own, &[2]).is_none());
        assert!(dirt.is_empty());
        let mut marks = vec![mark(1), mark(2)];
        let fork = range(spec::PROTECTION_PAGE, 1, 0..=9);
        dirt.begin(1, &fork, &mut marks);
        assert!(dirt.ask(&fork, &[]).is_none());
        assert!(dirt.is_empty());
    }

    #[test]
    fn only_so_many_are_remembered() {
        let mut dirt = Dirt::default();
        for page in 0..OWED_MOST as u64 + 10 {
            dirt.owe(page & 3, mark(page));
        }
        dirt.owe(0, mark(0));
        assert_eq!(dirt.count, OWED_MOST);
        let written: Vec<_> = (1 << 20..(1 << 20) + 100).collect();
        for slot in 0..ASKING_MOST as u32 + 10 {
            let range = range(spec::CLEAR, slot, written[0]..=written[99]);
            let words = started(&mut dirt, u64::from(slot), &range, &written);
            assert_eq!(words.is_some(), slot < ASKING_MOST as u32);
            if let Some(words) = words {
                let asked = words[1..].chunks_exact(3).map(|question| question[0] >> 12);
                let asked: Vec<_> = asked.map(|page| page - written[0]).collect();
                assert_eq!((words[0], asked.len()), (42, 42));
                assert_eq!((asked[0], asked[1], asked[41]), (0, 2, 99));
            }
        }
        assert!(!dirt.missed(0));
        assert!(dirt.missed(2) && dirt.is_empty());
        assert!(!dirt.missed(2));
    }
}
