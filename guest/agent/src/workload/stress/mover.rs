// SPDX-License-Identifier: MIT OR Apache-2.0
//! What moves the memory of the whole system, or of this process, while the slots work: one of them a round.

use crate::client::Context;
use crate::kernel::{Settings, only_in_a_guest, vmstat, write};
use crate::outcome::Checked;
use crate::rng::Rng;
use crate::workload::boundary::compaction::COMPACT;
use crate::workload::boundary::damon::{ACTIONS, Monitor, alone};
use crate::workload::boundary::soft_dirty::{CLEAR_ACCESSED, CLEAR_SOFT_DIRTY};
use crate::workload::boundary::swap::Swap;
use crate::workload::boundary::uprobes::Text;
use crate::workload::boundary::{Narrow, khugepaged, ksm, numa};

/// Milliseconds between two rounds of a thread of the kernel's, which has a processor to itself otherwise.
const PACE_MS: u64 = 10;
/// What the group may have: more than it needs.
const GROUP: usize = 128 << 20;

/// Who moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mover {
    /// khugepaged makes huge pages of small ones.
    Khugepaged,
    /// It makes larger ones of these sizes.
    Mthp(&'static str),
    /// ksmd merges pages that are alike.
    Ksm,
    /// DAMON, with a scheme of chance.
    Damon,
    /// The process's pages are write-protected again and again.
    ClearRefs,
    /// Pages make room for larger ones.
    Compaction,
    /// Memory of the process's group is reclaimed to swap space.
    Reclaim,
    /// The same, and the swap space is taken away and comes back.
    Swapoff,
    /// The scheduler wants to know who uses which page.
    Hinting,
    /// Breakpoints come and go in text that the process has mapped.
    Uprobes,
}

/// All of them.
pub(super) const ALL: [Mover; 11] = [
    Mover::Khugepaged,
    Mover::Mthp("hugepages-64kB"),
    Mover::Mthp("hugepages-512kB"),
    Mover::Ksm,
    Mover::Damon,
    Mover::ClearRefs,
    Mover::Compaction,
    Mover::Reclaim,
    Mover::Swapoff,
    Mover::Hinting,
    Mover::Uprobes,
];

impl Mover {
    /// What it is called in reports.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Khugepaged => "khugepaged",
            Self::Mthp("hugepages-64kB") => "khugepaged-64k",
            Self::Mthp(_) => "khugepaged-512k",
            Self::Ksm => "ksm",
            Self::Damon => "damon",
            Self::ClearRefs => "clear-refs",
            Self::Compaction => "compaction",
            Self::Reclaim => "reclaim",
            Self::Swapoff => "swapoff",
            Self::Hinting => "numa-hinting",
            Self::Uprobes => "uprobes",
        }
    }

    /// What it counts in, by the kernel.
    fn count(self) -> u64 {
        match self {
            Self::Khugepaged | Self::Mthp(_) => khugepaged::collapsed(),
            Self::Compaction => vmstat("compact_migrate_scanned"),
            Self::Reclaim | Self::Swapoff => vmstat("pswpout"),
            Self::Hinting => vmstat("numa_pte_updates"),
            Self::Ksm | Self::Damon | Self::ClearRefs | Self::Uprobes => 0,
        }
    }
}

/// The process is a member of a group whose memory can be reclaimed.
struct Member(Narrow);

impl Drop for Member {
    fn drop(&mut self) {
        // Who cannot leave stays, and is in nobody's way.
        let _ = self.0.leave();
    }
}

/// A mover that is switched on, until this is dropped: what was changed is as before then. The parts go in this order.
pub(super) struct AtWork {
    pub(super) mover: Mover,
    monitor: Option<Monitor>,
    action: &'static str,
    text: Option<Text>,
    _settings: Settings,
    group: Option<Member>,
    swap: Option<Swap>,
    before: u64,
    /// How often it was prodded, and the most that was seen of what has no counter.
    acts: u64,
    most: u64,
}

impl AtWork {
    /// Switches it on; before the memory is mapped that it is to move, so that this is the group's. Skipped where the kernel lacks
    /// something.
    pub(super) fn new(mover: Mover, rng: &mut Rng) -> Checked<Self> {
        only_in_a_guest()?;
        let action = ACTIONS[rng.index(ACTIONS.len())];
        let zeros = rng.once_in(2);
        let mut settings = Settings::default();
        let (mut group, mut swap, mut text) = (None, None, None);
        match mover {
            Mover::Khugepaged => khugepaged::eager(&mut settings, PACE_MS, None)?,
            Mover::Mthp(size) => khugepaged::eager(&mut settings, PACE_MS, Some(size))?,
            Mover::Ksm => ksm::eager(&mut settings, 4 * PACE_MS, zeros)?,
            Mover::Damon => {
                alone(&mut settings)?;
                // A kernel without DAMON is found out before anything is made for it.
                crate::kernel::read("/sys/kernel/mm/damon/admin/kdamonds/nr_kdamonds")?;
                swap = Some(Swap::new()?);
            }
            Mover::Hinting => {
                if numa::last_node()? == 0 {
                    return Err(numa::one_node());
                }
                numa::eager(&mut settings)?;
            }
            Mover::Reclaim | Mover::Swapoff => {
                swap = Some(Swap::new()?);
                let narrow = Narrow::new(GROUP)?;
                narrow.join()?;
                group = Some(Member(narrow));
            }
            Mover::Uprobes => text = Some(Text::new()?),
            Mover::ClearRefs | Mover::Compaction => {}
        }
        Ok(Self {
            mover,
            monitor: None,
            action,
            text,
            _settings: settings,
            group,
            swap,
            before: mover.count(),
            acts: 0,
            most: 0,
        })
    }

    /// The memory is there.
    pub(super) fn begin(&mut self) -> Checked {
        if self.mover == Mover::Damon {
            self.monitor = Some(Monitor::start(self.action)?);
        }
        Ok(())
    }

    /// Prods it, where it does not go by itself. Maps nothing: what the kernel put into a hole of a slot would be reached there.
    pub(super) fn prod(&mut self, context: &Context, rng: &mut Rng) -> Checked {
        self.acts += 1;
        match self.mover {
            Mover::Khugepaged | Mover::Mthp(_) | Mover::Hinting => {}
            Mover::Ksm => self.most = self.most.max(ksm::shared()?),
            Mover::Damon => {
                if let Some(monitor) = &self.monitor {
                    self.most = self.most.max(monitor.tried()?);
                }
            }
            Mover::ClearRefs => {
                let what = [CLEAR_SOFT_DIRTY, CLEAR_SOFT_DIRTY, CLEAR_ACCESSED][rng.index(3)];
                write("/proc/self/clear_refs", what)?;
            }
            Mover::Compaction => write(COMPACT, "1")?,
            Mover::Reclaim | Mover::Swapoff => {
                if let Some(Member(group)) = &self.group {
                    group.reclaim((1 + rng.index(8)) << 18)?;
                }
                if let Some(swap) =
                    self.swap.as_ref().filter(|_| self.mover == Mover::Swapoff && rng.once_in(2))
                {
                    swap.cycle()?;
                }
            }
            Mover::Uprobes => {
                if let Some(text) = &self.text {
                    text.probe(context, rng)?;
                }
            }
        }
        Ok(())
    }

    /// How long it is left to itself between two prods.
    pub(super) fn pause(&self, rng: &mut Rng) -> std::time::Duration {
        let (least, more) = match self.mover {
            Mover::Compaction | Mover::Swapoff => (20, 60),
            Mover::ClearRefs | Mover::Reclaim | Mover::Uprobes => (5, 30),
            _ => (20, 20),
        };
        std::time::Duration::from_millis(least + rng.below(more))
    }

    /// What it did.
    pub(super) fn told(&self) -> String {
        let grown = self.mover.count().saturating_sub(self.before);
        match self.mover {
            Mover::Khugepaged | Mover::Mthp(_) => format!("{grown} pages made large"),
            Mover::Ksm => format!("{} pages shared at a time", self.most),
            Mover::Damon => format!("{}, tried {} times", self.action, self.most),
            Mover::ClearRefs => format!("{} times", self.acts),
            Mover::Compaction => format!("{} times, {grown} pages looked at", self.acts),
            Mover::Reclaim | Mover::Swapoff => format!("{grown} pages swapped out"),
            Mover::Hinting => format!("{grown} entries without rights"),
            Mover::Uprobes => format!("{} probes", self.acts),
        }
    }
}
