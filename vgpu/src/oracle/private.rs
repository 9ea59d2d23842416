// SPDX-License-Identifier: MIT OR Apache-2.0
//! Device-private memory: pages of VRAM that the CPU's tables name by frames of no memory.
//!
//! Which frame stands for which page is the driver's secret. It is learned when a leaf of VRAM is set where the CPU has a
//! device-private entry. When the page is given back, that entry must not name the frame any more.

use std::collections::BTreeMap;

use vgpu_spec::handle::Handle;
use vgpu_spec::pte;

use super::input::Input;
use super::state::{Finding, State};
use super::{Oracle, Rule};
use crate::cpu::{Kind, Page, Space};

/// Pages of VRAM remembered at most, and places of one.
const PAGES_MOST: usize = 1 << 16;
const PLACES_MOST: usize = 8;

/// Where a page of VRAM was seen to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) mm: u64,
    pub(super) va: u64,
    /// The frame that the CPU's entry named.
    pub(super) frame: u64,
}

/// By index of the page of VRAM.
#[derive(Default)]
pub(super) struct Private(BTreeMap<u64, Vec<Place>>);

fn is_private(page: &Page) -> bool {
    matches!(page.kind, Kind::DevicePrivate | Kind::DevicePrivateWrite)
}

impl State {
    /// A leaf of VRAM was set where the CPU has a device-private entry. Whether that was not known.
    pub(super) fn learn(&mut self, ctx: Handle, va: u64, vram: u64, frame: u64) -> bool {
        let Some(mm) = self.mm_of(ctx) else { return false };
        let place = Place { mm, va: va >> pte::PAGE_SHIFT << pte::PAGE_SHIFT, frame };
        let index = vram >> pte::PAGE_SHIFT;
        if self.private.0.len() >= PAGES_MOST && !self.private.0.contains_key(&index) {
            return false;
        }
        let places = self.private.0.entry(index).or_default();
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
        let places = self.private.0.remove(&page.index().into()).unwrap_or_default();
        let living = |place: Place| {
            let mm = self.mms.get(&place.mm).filter(|mm| !mm.released && mm.root != 0)?;
            Some((place, mm.root))
        };
        places.into_iter().filter_map(living).collect()
    }

    pub(super) fn outlived(&self, ctx: Handle, page: Handle, place: Place) -> Option<Finding> {
        // Its tables may have been freed while they were walked.
        self.mms.get(&place.mm).filter(|mm| !mm.released)?;
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
                self.judge(&Input::Outlived { ctx, page, place });
            }
        }
    }
}
