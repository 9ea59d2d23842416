// SPDX-License-Identifier: MIT OR Apache-2.0
//! Device-private memory: pages of VRAM that the CPU's tables name by frames of no memory.
//!
//! Which frame stands for which page is the driver's secret. It is learned when a leaf of VRAM is set where the CPU has a
//! device-private entry. When the page is given back, that entry must not name the frame any more.
//!
//! But it may for a moment: zap_pte_range() puts the page, which may free it and so have the driver give it back, before it clears
//! the entry (zap_nonpresent_ptes() in mm/memory.c). So it is looked at again: when the page comes or goes once more, at each
//! heartbeat, and when the address space is released. Only an entry that has named the frame at each look is wrong. It cannot be
//! a new one meanwhile: whoever zaps holds the lock of that table, so nothing is migrated there before the old entry is cleared,
//! and then the grant of the page for it finds it cleared.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::handle::Handle;
use vgpu_spec::pte;

use super::input::Input;
use super::state::{Finding, State};
use super::{Oracle, Rule};
use crate::cpu::{Kind, Page, Space};

/// Pages of VRAM remembered at most, and places of one.
const PAGES_MOST: usize = 1 << 16;
const PLACES_MOST: usize = 8;

/// Pages given back whose entries are looked at again at most.
const OUTLIVING_MOST: usize = 64;
/// Heartbeats for which an entry must have named a page given back.
const BEATS: u32 = 3;

/// When it is looked at whether the CPU's tables name a page that was given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// It is just given back.
    Returned,
    /// It is granted or given back once more.
    Again,
    /// A heartbeat.
    Beat,
    /// The address space is released, its tables are as they were.
    Last,
}

/// Where a page of VRAM was seen to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) mm: u64,
    pub(super) va: u64,
    /// The frame that the CPU's entry named.
    pub(super) frame: u64,
}

/// A page of VRAM that was given back, and the CPU's tables still named it at each look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outliving {
    ctx: Handle,
    pub(super) page: Handle,
    pub(super) place: Place,
    beats: u32,
}

#[derive(Default)]
pub(super) struct Private {
    /// By index of the page of VRAM.
    places: BTreeMap<u64, Vec<Place>>,
    outliving: Vec<Outliving>,
}

fn is_private(page: &Page) -> bool {
    matches!(page.kind, Kind::DevicePrivate | Kind::DevicePrivateWrite)
}

impl State {
    /// A leaf of VRAM was set where the CPU has a device-private entry. Whether that was not known.
    pub(super) fn learn(&mut self, ctx: Handle, va: u64, vram: u64, frame: u64) -> bool {
        let Some(mm) = self.mm_of(ctx) else { return false };
        let place = Place { mm, va: va >> pte::PAGE_SHIFT << pte::PAGE_SHIFT, frame };
        let index = vram >> pte::PAGE_SHIFT;
        if self.private.places.len() >= PAGES_MOST && !self.private.places.contains_key(&index) {
            return false;
        }
        let places = self.private.places.entry(index).or_default();
        let new = !places.contains(&place);
        if new {
            if places.len() == PLACES_MOST {
                places.remove(0);
            }
            places.push(place);
        }
        new
    }

    /// A page of VRAM is given back: where it was mapped, in living address spaces, and those spaces' top tables.
    pub(super) fn given_back(&mut self, page: Handle) -> Vec<(Place, u64)> {
        let places = self.private.places.remove(&page.index().into()).unwrap_or_default();
        let living = |place: Place| {
            let mm = self.mms.get(&place.mm).filter(|mm| !mm.released && mm.root != 0)?;
            Some((place, mm.root))
        };
        places.into_iter().filter_map(living).collect()
    }

    /// Whether the CPU's entry still names a page that was given back.
    pub(super) fn outlived(
        &mut self,
        (ctx, page, place): (Handle, Handle, Place),
        sight: Sight,
        still: bool,
    ) -> Option<Finding> {
        // Its tables may have been freed while they were walked.
        let mm = self.mms.get(&place.mm).filter(|mm| !mm.released)?;
        // A reaper may be at it while the address space is released.
        let reaped = mm.active.iter().any(|range| range.start <= place.va && place.va <= range.last);
        let list = &mut self.private.outliving;
        let at = list.iter().position(|other| (other.page, other.place) == (page, place));
        match (sight, at) {
            (Sight::Returned, None) if still => {
                if list.len() >= OUTLIVING_MOST {
                    list.remove(0);
                }
                list.push(Outliving { ctx, page, place, beats: 0 });
                return None;
            }
            (Sight::Returned, _) | (_, None) => return None,
            (_, Some(at)) if !still || sight == Sight::Last && reaped => {
                list.swap_remove(at);
                return None;
            }
            (Sight::Again, Some(_)) => return None,
            (Sight::Beat, Some(at)) => {
                list[at].beats += 1;
                if list[at].beats < BEATS {
                    return None;
                }
                list.swap_remove(at);
            }
            (Sight::Last, Some(at)) => drop(list.swap_remove(at)),
        }
        let mm = self.mm_name(Some(place.mm));
        let summary = format!(
            "{page} was given back by {ctx}, but {mm} still has it at {:#x} (device-private frame {:#x})",
            place.va, place.frame
        );
        Some(Finding {
            rule: Rule::DevicePageOutlivesOwner,
            ctx: Some(ctx),
            mm: Some(place.mm),
            va: Some(place.va),
            frame: Some(place.frame),
            summary,
        })
    }

    /// Those to look at again, with the top tables of their address spaces.
    fn outliving(&self, which: impl Fn(&Outliving) -> bool) -> Vec<(Outliving, u64)> {
        let all = self.private.outliving.iter().filter(|one| which(one));
        all.filter_map(|one| Some((*one, self.mms.get(&one.place.mm).filter(|mm| !mm.released)?.root)))
            .collect()
    }

    /// An address space is released.
    pub(super) fn outliving_end(&mut self, id: u64) {
        self.private.outliving.retain(|one| one.place.mm != id);
    }
}

impl Oracle {
    /// A leaf of VRAM agrees with the CPU's entry.
    #[cold]
    pub(super) fn learn_private(&self, ctx: Handle, va: u64, vram: u64, page: &Page) {
        if is_private(page) {
            self.judge(&Input::Private { ctx, va, vram, frame: page.frame });
        }
    }

    /// A page of VRAM was given back, or its context ended with it.
    #[cold]
    pub(super) fn data_returned(&self, ctx: Handle, page: Handle, input: &Input) {
        let places = self.judge(input).places;
        if places.is_empty() {
            return;
        }
        let Some((format, memory)) = self.tables() else { return };
        for (place, root) in places {
            let now = Space { root, format }.settled(&memory, place.va);
            if is_private(&now) && now.frame == place.frame {
                self.judge(&Input::Outlived { ctx, page, place, sight: Sight::Returned, still: true });
                // After it is on the list, so that who finds the list empty takes nothing back.
                self.outliving.store(true, SeqCst);
            }
        }
    }

    /// Looks again at the CPU's entries that named pages given back.
    #[inline]
    pub(super) fn look_at_outliving(&self, sight: Sight, which: impl Fn(&Outliving) -> bool) {
        if self.outliving.load(SeqCst) {
            self.look_at_outliving_of(sight, which);
        }
    }

    #[cold]
    fn look_at_outliving_of(&self, sight: Sight, which: impl Fn(&Outliving) -> bool) {
        let list = {
            let state = self.state.lock();
            // Set anew by who adds one, after that: see `data_returned`.
            self.outliving.store(!state.private.outliving.is_empty(), SeqCst);
            state.outliving(which)
        };
        let Some((format, memory)) = self.tables() else { return };
        for (Outliving { ctx, page, place, .. }, root) in list {
            let now = Space { root, format }.settled(&memory, place.va);
            let still = is_private(&now) && now.frame == place.frame;
            let input = Input::Outlived { ctx, page, place, sight, still };
            self.judge_settled(&input, |_| Some(place.mm));
        }
    }
}
