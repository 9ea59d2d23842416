// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations in which the kernel, or another process, moves, replaces, protects or takes pages. The data stay as the model has
//! them, or become what it says.
//!
//! What this kernel lacks, or this process may not do, is left out; the chance drawn is the same either way.

use nix::errno::Errno;
use nix::sys::mman::MmapAdvise;

use super::super::helper::Act;
use super::{Page, REACH, Range, Slot};
use crate::client::Job;
use crate::kernel::{move_pages, only_in_a_guest, prefer_node, write};
use crate::memory::{HUGE, PAGE, Pattern, advice, peek};
use crate::outcome::{Checked, Doing, Failure, require};
use crate::uffd::Mode;
use crate::workload::boundary::soft_dirty::{CLEAR_ACCESSED, CLEAR_SOFT_DIRTY};

/// Operations that cost little, which come first below, and all of them.
const CHEAP: u64 = 9;
const ALL: u64 = 18;

/// It worked, or failed in a way that leaves everything as it was.
fn allowing(result: Result<(), Errno>, errors: &[Errno], what: &str) -> Checked {
    match result {
        Err(errno) if errors.contains(&errno) => Ok(()),
        other => other.doing(what),
    }
}

impl Slot<'_> {
    /// One of them.
    pub(super) fn shake(&mut self, range: Range) -> Checked {
        match self.rng.below(if self.tools.mix.all { ALL } else { CHEAP }) {
            0 => self.advise(range, advice::COLD),
            1 => self.mergeable(range),
            2 => self.free_and_write(range),
            3 => self.clear_references(),
            4 => self.write_protected(range),
            5 => self.written_by_another(range.0),
            6 => self.poked(range.0),
            7 => self.advised_by_another(range),
            8 => self.move_page_data(),
            9..=11 => self.advise(range, advice::PAGEOUT),
            12..=13 => self.advised_by_another(range),
            14 => self.collapse(),
            15 => self.soft_offline(range.0),
            _ => self.send_to_node(range),
        }
    }

    /// Reclaim is told what to think of pages. It touches no data.
    fn advise(&self, range: Range, advice: i32) -> Checked {
        let count = self.mapped(range);
        if count == 0 {
            return Ok(());
        }
        let result = self.map.advise_by_number(self.at(range.0), count * PAGE, advice);
        allowing(result, &[Errno::EINVAL], "madvise for reclaim")
    }

    /// ksmd may have pages or may not.
    fn mergeable(&mut self, range: Range) -> Checked {
        let advice = [MmapAdvise::MADV_MERGEABLE, MmapAdvise::MADV_UNMERGEABLE][self.rng.index(2)];
        let count = self.mapped(range);
        if count == 0 {
            return Ok(());
        }
        allowing(
            self.map.advise(self.at(range.0), count * PAGE, advice),
            &[Errno::EINVAL],
            "madvise for ksmd",
        )
    }

    /// Pages that the device, or who is asked, may write.
    fn writable_run(&self, (first, count): Range) -> usize {
        self.pages[first..first + count].iter().take_while(|page| page.writable()).count()
    }

    /// MADV_FREE: the data may go at any time, until the device writes again; what it writes must stay.
    fn free_and_write(&mut self, (first, count): Range) -> Checked {
        let count = self.writable_run((first, count));
        if count == 0 {
            return Ok(());
        }
        self.map.advise(self.at(first), count * PAGE, MmapAdvise::MADV_FREE).doing("MADV_FREE")?;
        self.device_fill((first, count))?;
        if self.tools.mix.all {
            self.advise((first, count), advice::PAGEOUT)?;
        }
        Ok(())
    }

    /// All of the process's pages are write-protected, or lose their accessed bits.
    fn clear_references(&mut self) -> Checked {
        let what = [CLEAR_SOFT_DIRTY, CLEAR_ACCESSED][self.rng.index(2)];
        match write("/proc/self/clear_refs", what) {
            Err(Failure::Skip(_)) => Ok(()),
            other => other,
        }
    }

    /// userfaultfd protects pages: the device reads them and does not write to them, unless this thread lets it.
    fn write_protected(&mut self, (first, count): Range) -> Checked {
        let pattern = self.some_pattern();
        let count = self.writable_run((first, count));
        // ksmd's page comes without the protection of that which it replaces; and which fault a broken page was meant by is open.
        let mix = self.tools.mix;
        let Some(uffd) = self.uffd.take_if(|_| count > 0 && !mix.alike && !mix.poison) else { return Ok(()) };
        // Only pages that are there are protected. Each is written, for the zero page loses its protection when it is migrated, which a
        // driver may do by itself: the kernel puts a page that may be written in its place.
        for page in first..first + count {
            self.cpu_check(page)?;
            self.map.store(self.at(page), self.pages[page].pattern.word(0));
        }
        let (at, bytes) = (self.at(first), count * PAGE);
        uffd.register(self.map, at, bytes, Mode::WriteProtect)?;
        uffd.protect(self.map, at, bytes, true)?;
        let mut served = [false; REACH];
        let job = Job::fill(self.address(first), bytes, pattern).queue(self.queue);
        let done = self.context.wait_and(self.context.submit(job)?, || {
            // A driver that waits for whoever serves is served.
            while let Some(fault) = uffd.fault()? {
                let page = fault.address.wrapping_sub(self.address(first)) as usize / PAGE;
                if let Some(served) = served[..count].get_mut(page) {
                    *served = true;
                    uffd.protect(self.map, at + page * PAGE, PAGE, false)?;
                }
            }
            Ok(())
        })?;
        let written = served[..count].iter().take_while(|&&served| served).count();
        for index in 0..written {
            self.pages[first + index].pattern = pattern.from(index * PAGE);
        }
        if written == count {
            done.ok().doing("a fill of pages that were unprotected")?;
        } else {
            done.faulted_at(self.address(first + written))
                .doing("a fill of pages that userfaultfd protects")?;
            self.check_run((first + written, 1)).doing("protected by userfaultfd")?;
            self.cpu_check(first + written).doing("protected by userfaultfd")?;
        }
        uffd.protect(self.map, at, bytes, false)?;
        uffd.unregister(self.map, at, bytes)?;
        self.uffd = Some(uffd);
        Ok(())
    }

    /// Another process writes a page, within its rights or whatever they are.
    fn written_by_another(&mut self, page: usize) -> Checked {
        let pattern = self.some_pattern();
        let force = self.rng.once_in(2);
        let Page { prot, broken, .. } = self.pages[page];
        let writable = self.pages[page].writable();
        let Some(helper) = self.tools.helper.filter(|_| prot.is_some() && !broken && (force || writable))
        else {
            return Ok(());
        };
        let act = if force { Act::Write(pattern) } else { Act::WriteVector(pattern) };
        match helper.ask(act, self.address(page))? {
            Ok(PAGE) => self.pages[page].pattern = pattern,
            Ok(bytes) => {
                return Err(Failure::wrong(format!("another process wrote {bytes} bytes of a page")));
            }
            // A kernel may keep to the rights here too, and a host may forbid it all.
            Err(_) if !writable => {}
            Err(Errno::EPERM) => {}
            Err(errno) => return Err(errno).doing("a write by another process"),
        }
        Ok(())
    }

    /// A debugger changes a word and changes it back. It may, whatever the page's rights are, and breaks its sharing.
    fn poked(&mut self, page: usize) -> Checked {
        let (offset, word) = (self.rng.index(PAGE / 8) * 8, self.rng.next());
        let before = self.pages[page].pattern.word(offset);
        let Some(helper) = self.tools.helper.filter(|_| self.pages[page].readable()) else { return Ok(()) };
        let address = self.address(page) + offset as u64;
        match helper.ask(Act::Poke(word), address)? {
            Err(Errno::EPERM) => return Ok(()),
            other => other.doing("ptrace")?,
        };
        let found = self.map.load(self.at(page) + offset);
        if found != word {
            return Err(Failure::cpu(self.context.handle(), address, word, found).at("a debugger wrote"));
        }
        // That word differs now, and no other does.
        let job = Job::check(self.address(page), PAGE, self.pages[page].pattern);
        let done = self.job(job)?;
        let refused = self.refused(done, page);
        let done = if refused { done } else { done.ok().doing("device check")? };
        if !refused && word != before && (done.result, done.address) != (1, address) {
            let found = peek(address).unwrap_or_default();
            let failure = Failure::device(
                self.context.handle(),
                address,
                word,
                if done.result == 0 { before } else { found },
            );
            return Err(
                failure.at(&format!("a debugger wrote one word, the device finds {} new", done.result))
            );
        }
        helper.ask(Act::Poke(before), address)?.doing("ptrace")?;
        self.check_run((page, 1)).doing("a debugger wrote it back")
    }

    /// Another process advises on the range.
    fn advised_by_another(&mut self, range: Range) -> Checked {
        const WILLNEED: i32 = 3;
        let cheap = [advice::COLD, WILLNEED];
        let all = [advice::COLD, WILLNEED, advice::PAGEOUT, advice::PAGEOUT];
        let advice = if self.tools.mix.all { all[self.rng.index(4)] } else { cheap[self.rng.index(2)] };
        let count = self.mapped(range);
        let Some(helper) = self.tools.helper.filter(|_| count > 0) else { return Ok(()) };
        let bytes = count * PAGE;
        match helper.ask(Act::Advise(bytes, advice), self.address(range.0))? {
            Ok(done) => require(done <= bytes, || format!("{done} of {bytes} bytes were advised")),
            other => allowing(
                other.map(drop),
                &[Errno::EINVAL, Errno::EPERM, Errno::ENOSYS, Errno::EAGAIN, Errno::EBUSY],
                "process_madvise",
            ),
        }
    }

    /// mremap with MREMAP_DONTUNMAP: the page goes, its mapping stays, empty.
    fn move_page_data(&mut self) -> Checked {
        let (from, to) = (self.rng.index(self.pages.len()), self.rng.index(self.pages.len()));
        if from == to || self.pages[from].prot.is_none() {
            return Ok(());
        }
        match self.map.move_pages_to(self.at(from), PAGE, self.map, self.at(to)) {
            Err(Errno::EINVAL) => return Ok(()),
            other => other.doing("mremap")?,
        }
        self.pages[to] = self.pages[from];
        self.pages[from] = Page { pattern: Pattern::ZERO, broken: false, ..self.pages[from] };
        Ok(())
    }

    /// Small pages become a huge one, now.
    fn collapse(&self) -> Checked {
        if !self.huge {
            return Ok(());
        }
        // No such page to be had, not all of it mapped alike, or somebody holds one of the small ones.
        let result = self.map.advise_by_number(self.base, HUGE, advice::COLLAPSE);
        allowing(result, &[Errno::EINVAL, Errno::ENOMEM, Errno::EAGAIN, Errno::EBUSY], "MADV_COLLAPSE")
    }

    /// A frame is given up, what is in it moves.
    fn soft_offline(&self, page: usize) -> Checked {
        if !self.pages[page].readable() || only_in_a_guest().is_err() {
            return Ok(());
        }
        let result = self.map.advise_by_number(self.at(page), PAGE, advice::SOFT_OFFLINE);
        let busy = [
            Errno::EINVAL,
            Errno::EBUSY,
            Errno::EAGAIN,
            Errno::EIO,
            Errno::ENOMEM,
            Errno::EOPNOTSUPP,
            Errno::EPERM,
            // The zero page, to some kernels.
            Errno::ENOTRECOVERABLE,
        ];
        allowing(result, &busy, "MADV_SOFT_OFFLINE")
    }

    /// Pages go to another node.
    fn send_to_node(&mut self, range: Range) -> Checked {
        let (node, policy) = (self.rng.index(self.tools.nodes.max(1)) as i32, self.rng.once_in(2));
        let count = self.mapped(range);
        if self.tools.nodes < 2 || count == 0 {
            return Ok(());
        }
        if policy {
            return prefer_node(self.address(range.0), count * PAGE, node).doing("mbind");
        }
        let pages: Vec<u64> = (range.0..range.0 + count).map(|page| self.address(page)).collect();
        move_pages(&pages, node).doing("move_pages").map(drop)
    }

    /// A frame is broken: nobody reaches the page any more, until there is another in its place.
    pub(super) fn break_page(&mut self, page: usize) -> Checked {
        if !self.pages[page].writable() {
            return Ok(());
        }
        // Never the zero page.
        self.cpu_fill(page)?;
        match self.map.advise_by_number(self.at(page), PAGE, advice::HWPOISON) {
            Ok(()) => {
                self.pages[page].broken = true;
                let done = self.job(Job::check(self.address(page), PAGE, Pattern::ZERO))?;
                done.faulted_at(self.address(page)).doing("a broken page")
            }
            // Somebody held it at that moment. What state it was left in, nobody says.
            Err(Errno::EBUSY | Errno::EAGAIN | Errno::EIO | Errno::EOPNOTSUPP | Errno::ENOTRECOVERABLE) => {
                self.renew((page, 1))
            }
            Err(errno) => Err(errno).doing("MADV_HWPOISON"),
        }
    }
}
