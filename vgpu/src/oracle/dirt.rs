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
//! The witness answers in the place of the question, after the start of the invalidation was judged, so the answers are fetched
//! when the next invalidation starts, or when it asks for more.

use std::collections::{BTreeMap, HashMap};

use vgpu_spec::handle::Handle;
use vgpu_spec::range as spec;
use vgpu_spec::witness::{
    QUESTION_WORDS, QUESTIONS_ANSWERED, QUESTIONS_MORE, QUESTIONS_MOST, QUESTIONS_STAYS,
};

use super::event::Written;
use super::range::{Demand, Range};

/// Pages remembered for those that have ended or lost their rights, in all address spaces.
const OWED_MOST: usize = 1 << 16;
/// Invalidations whose answers are waited for.
const ASKING_MOST: usize = 1024;

/// A page that `ctx` has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) ctx: Handle,
    pub(super) va: u64,
    pub(super) frame: u64,
}

impl Mark {
    pub(super) fn new(ctx: Handle, Written { va, frame }: Written) -> Self {
        Self { ctx, va, frame }
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
    /// In the order of the questions, until they are answered.
    asked: Vec<Mark>,
    /// What there was no room for.
    left: Vec<Mark>,
}

/// What is put into the place of an invalidation's questions.
pub(super) type Words = [u64; QUESTION_WORDS as usize];

/// See the module's text. Not locked: the oracle has it behind a lock of its own.
#[derive(Default)]
pub(super) struct Dirt {
    /// By address space and page.
    owed: HashMap<u64, BTreeMap<u64, Mark>>,
    count: usize,
    /// By slot of the invalidation.
    asking: HashMap<u32, Asking>,
}

impl Dirt {
    /// Nobody was told of this one, and it may still be dropped as clean.
    pub(super) fn owe(&mut self, mm: u64, mark: Mark) {
        if self.count < OWED_MOST && self.owed.entry(mm).or_default().insert(mark.va, mark).is_none() {
            self.count += 1;
        }
    }

    /// Takes what is owed in the invalidation's range.
    pub(super) fn take(&mut self, mm: u64, range: &Range, taken: &mut Vec<Mark>) {
        let Some(book) = self.owed.get_mut(&mm) else { return };
        let first = range.start & !0xfff;
        let from = taken.len();
        taken.extend(book.range(first..=range.last).map(|(_, &mark)| mark));
        for mark in &taken[from..] {
            book.remove(&mark.va);
        }
        self.count -= taken.len() - from;
        if book.is_empty() {
            self.owed.remove(&mm);
        }
    }

    /// The pages of a range go: what was asked about them before, and not answered, is not owed any more.
    pub(super) fn gone(&mut self, mm: u64, range: &Range) {
        for asking in self.asking.values_mut().filter(|asking| asking.mm == mm && asking.stays) {
            // The questions keep their places.
            for mark in &mut asking.asked {
                if range.covers(mark.va, mark.va | 0xfff) {
                    mark.ctx = Handle::NONE;
                }
            }
            asking.left.retain(|mark| !range.covers(mark.va, mark.va | 0xfff));
        }
    }

    /// Has the witness asked about `marks`, of whose pages the CPU's entries are clean; what to write to the place of the
    /// invalidation's questions.
    pub(super) fn ask(&mut self, mm: u64, range: &Range, marks: Vec<Mark>) -> Option<Words> {
        self.asking.remove(&range.slot);
        if marks.is_empty() || self.asking.len() >= ASKING_MOST {
            return None;
        }
        let stays = range.fate() == Fate::Stays;
        let asking = Asking { mm, number: range.number, stays, asked: Vec::new(), left: marks };
        self.asking.insert(range.slot, asking);
        self.more(range.slot, range.number)
    }

    /// The next questions about an invalidation, if there are any.
    pub(super) fn more(&mut self, slot: u32, number: u64) -> Option<Words> {
        let asking = self.asking.get_mut(&slot).filter(|asking| asking.number == number)?;
        if asking.left.is_empty() || !asking.asked.is_empty() {
            return None;
        }
        let some = asking.left.len().min(QUESTIONS_MOST);
        asking.asked = asking.left.drain(..some).collect();
        let mut words = [0; QUESTION_WORDS as usize];
        words[0] = some as u64
            | if asking.stays { QUESTIONS_STAYS } else { 0 }
            | if asking.left.is_empty() { 0 } else { QUESTIONS_MORE };
        for (place, mark) in words[1..].chunks_exact_mut(3).zip(&asking.asked) {
            place.copy_from_slice(&[mark.va, mark.frame, mark.ctx.0]);
        }
        Some(words)
    }

    /// Fetches the answers that have come: `read` reads the first word of a slot's place. What is clean and stays is owed.
    pub(super) fn fetch(&mut self, read: impl Fn(u32) -> Option<u64>) {
        let mut clean = Vec::new();
        self.asking.retain(|&slot, asking| {
            let Some(answer) = read(slot).filter(|answer| answer & QUESTIONS_ANSWERED != 0) else {
                return true;
            };
            let mm = asking.mm;
            let asked = asking.asked.drain(..).enumerate();
            let owed = asked.filter(|(i, mark)| answer >> i & 1 != 0 && mark.ctx != Handle::NONE);
            if asking.stays {
                clean.extend(owed.map(|(_, mark)| (mm, mark)));
            }
            !asking.left.is_empty()
        });
        clean.into_iter().for_each(|(mm, mark)| self.owe(mm, mark));
    }

    /// The address space ends.
    pub(super) fn forget(&mut self, mm: u64) {
        self.count -= self.owed.remove(&mm).map_or(0, |book| book.len());
        self.asking.retain(|_, asking| asking.mm != mm);
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
        Mark { ctx: Handle::new(Kind::Context, 1, 2), va: page << 12, frame: 0x10_0000 + (page << 12) }
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

    fn owed(dirt: &Dirt) -> Vec<u64> {
        let mut pages: Vec<u64> =
            dirt.owed.values().flat_map(|book| book.keys().map(|va| va >> 12)).collect();
        pages.sort_unstable();
        assert_eq!(pages.len(), dirt.count);
        pages
    }

    #[test]
    fn what_stays_is_owed_until_it_goes() {
        let mut dirt = Dirt::default();
        let fork = range(spec::PROTECTION_PAGE, 3, 0..=9);
        let words = dirt.ask(1, &fork, vec![mark(1), mark(2), mark(3)]).unwrap();
        assert_eq!(words[0], 3 | QUESTIONS_STAYS);
        assert_eq!(words[4..7], [0x2000, 0x10_2000, mark(2).ctx.0]);
        dirt.fetch(|_| Some(words[0]));
        assert!(owed(&dirt).is_empty(), "no answer yet");
        // The first and the last are clean.
        dirt.fetch(|slot| (slot == 3).then_some(QUESTIONS_ANSWERED | 0b101));
        assert_eq!(owed(&dirt), [1, 3]);
        let mut taken = Vec::new();
        dirt.take(2, &fork, &mut taken);
        dirt.take(1, &range(spec::CLEAR, 0, 2..=3), &mut taken);
        assert_eq!(taken, [mark(3)]);
        assert_eq!(owed(&dirt), [1]);
        dirt.forget(1);
        assert!(owed(&dirt).is_empty());
    }

    #[test]
    fn an_answer_to_what_has_gone_counts_for_nothing() {
        let mut dirt = Dirt::default();
        dirt.ask(1, &range(spec::PROTECTION_PAGE, 3, 0..=9), vec![mark(1), mark(2)]).unwrap();
        dirt.gone(1, &range(spec::CLEAR, 4, 1..=1));
        dirt.gone(2, &range(spec::CLEAR, 4, 2..=2));
        dirt.fetch(|_| Some(QUESTIONS_ANSWERED | 0b11));
        assert_eq!(owed(&dirt), [2]);
        // And what goes is asked about once.
        dirt.ask(1, &range(spec::CLEAR, 4, 0..=9), vec![mark(4)]).unwrap();
        dirt.fetch(|_| Some(QUESTIONS_ANSWERED | 1));
        assert_eq!(owed(&dirt), [2]);
        assert!(dirt.asking.is_empty());
    }

    #[test]
    fn more_than_there_is_room_for_is_asked_in_turns() {
        let mut dirt = Dirt::default();
        let fork = range(spec::PROTECTION_PAGE, 0, 0..=99);
        let words = dirt.ask(1, &fork, (0..25).map(mark).collect()).unwrap();
        assert_eq!(words[0], 10 | QUESTIONS_STAYS | QUESTIONS_MORE);
        let mut turns = 0;
        loop {
            dirt.fetch(|_| Some(QUESTIONS_ANSWERED | 0x3ff));
            turns += 1;
            assert!(dirt.more(0, 1).is_none(), "of an earlier invalidation");
            let Some(words) = dirt.more(0, 100) else { break };
            assert_eq!(words[0] & QUESTIONS_MORE != 0, turns == 1);
        }
        assert_eq!((turns, owed(&dirt).len()), (3, 25));
    }

    #[test]
    fn only_so_many_are_remembered() {
        let mut dirt = Dirt::default();
        for page in 0..OWED_MOST as u64 + 10 {
            dirt.owe(page & 3, mark(page));
        }
        dirt.owe(0, mark(0));
        assert_eq!(dirt.count, OWED_MOST);
        for slot in 0..ASKING_MOST as u32 + 10 {
            dirt.ask(1, &range(spec::CLEAR, slot, 0..=1), vec![mark(0)]);
        }
        assert_eq!(dirt.asking.len(), ASKING_MOST);
        dirt.clear();
        assert!(owed(&dirt).is_empty());
    }
}
