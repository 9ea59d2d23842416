// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the judging is a function of: events of the device, records of the witness, and the answers to every question that the
//! oracle has asked, of the device, of guest memory and of the CPU's page tables.
//!
//! [`super::Oracle`] asks and waits; [`State::apply`] only takes what was said. So the inputs, in the order in which they were
//! judged, are all that is needed to come to the same verdict once more: they are what a trace holds.

use vgpu_spec::handle::Handle;
use vgpu_spec::witness::{self, Record};

use super::doubt::{Doubt, Outcome};
use super::event::{ContextView, DeviceEvent, RangeView};
use super::mirror::{Mirrors, Mismatch};
use super::moments::Moment;
use super::private::{Place, Sight};
use super::range::Range;
use super::state::{Finding, State, Watched};
use super::violation::Violation;
use crate::cpu::{Format, Page};

/// One of them.
#[derive(Clone, Debug)]
pub(super) enum Input {
    /// Something happened on the device.
    Device {
        event: DeviceEvent,
        /// The state is to know it; others are there for reports only.
        told: bool,
        /// It is a leaf of a context whose table changes are looked at.
        attended: bool,
    },
    /// The witness reports; not ASSOCIATE.
    Witness(Record),
    /// ASSOCIATE; whether the device has that context.
    Associate { record: Record, live: bool },
    /// A record that could not be read.
    BadRecord,
    /// An address space's id ends, after its contexts have been looked at.
    Ended { mm: u64 },
    /// An invalidation was found to have come to its end.
    Over { mm: u64, slot: u32, number: u64 },
    /// What the device has for a context at a moment of its address space's end.
    View { mm: u64, moment: Moment, ctx: Handle, view: Option<ContextView> },
    /// What the device has in a range whose invalidation's start has returned. Of each sort the first counts.
    RangeView { mm: u64, range: Range, ctx: Handle, view: RangeView },
    /// At the end of a change of rights a translation allows more than the CPU's.
    Excess { mm: u64, range: Range, ctx: Handle, va: u64, leaf: u64, in_tlb: bool, page: Page },
    /// An access of a watched context.
    Access { ctx: Handle, va: u64, frame: u64, access: u32 },
    /// A translation and the CPU's tables did not agree.
    Mismatch(Mismatch),
    /// A translation in doubt was looked at.
    Doubted { ctx: Handle, doubt: Doubt, outcome: Outcome },
    /// A leaf of VRAM was set where the CPU has a device-private entry.
    Private { ctx: Handle, va: u64, vram: u64, frame: u64 },
    /// A page of VRAM was given back: whether the CPU's tables still name it.
    Outlived { ctx: Handle, page: Handle, place: Place, sight: Sight, still: bool },
    /// Whether a context with overdue faults still has some parked.
    Parked { ctx: Handle, parked: bool },
    /// A violation found elsewhere.
    Report(Box<Violation>),
    /// Why the run proves nothing, if nothing was found; at its end.
    Gap(String),
}

/// What is to be asked next.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Contexts that the device is to be asked about.
    pub(super) contexts: Vec<Handle>,
    /// Where the page tables are that the context is to be held against from now on.
    pub(super) root: Option<u64>,
    /// Places that the CPU's tables are to be looked at, with the top tables.
    pub(super) places: Vec<(Place, u64)>,
    /// Something is remembered of an input that may be one of very many.
    pub(super) changed: bool,
}

impl Asked {
    fn about(contexts: Vec<Handle>) -> Self {
        Self { contexts, ..Self::default() }
    }
}

impl Input {
    /// There may be very many of the same: those count that change something or find something new.
    pub(super) fn repeats(&self) -> bool {
        matches!(self, Self::Access { .. } | Self::Mismatch(_) | Self::Excess { .. } | Self::Private { .. })
    }
}

impl State {
    /// Takes what was said, and judges it.
    pub(super) fn apply(
        &mut self,
        input: &Input,
        watched: &Watched,
        mirrors: &Mirrors,
        found: &mut Vec<Finding>,
    ) -> Asked {
        match input {
            Input::Device { event, told, attended } => {
                if let (true, &DeviceEvent::LeafSet { ctx, va: Some(va), pte }) = (attended, event) {
                    self.leaf_attended((ctx, va, pte), mirrors, found);
                }
                if *told {
                    self.device(event, watched, found);
                }
                if let DeviceEvent::DataReturned { page, .. } = *event {
                    return Asked { places: self.given_back(page), ..Asked::default() };
                }
            }
            Input::Witness(record) => return self.record(record, watched, mirrors, found),
            Input::Associate { record, live } => {
                let root = self.associate(record.mm, Handle(record.arg[0]), *live, watched);
                return Asked { root, ..Asked::default() };
            }
            Input::BadRecord => self.bad_records += 1,
            Input::Ended { mm } => self.end(*mm),
            Input::Over { mm, slot, number } => self.range_over(*mm, *slot, *number),
            Input::View { mm, moment, ctx, view } => {
                if self.may_judge(*mm, *ctx) {
                    self.looked(*mm, *moment, *ctx, *view, found);
                }
            }
            Input::RangeView { mm, range, ctx, view } => {
                if self.may_judge(*mm, *ctx) {
                    self.range_looked(*mm, range, *ctx, view, found);
                }
            }
            Input::Excess { mm, range, ctx, va, leaf, in_tlb, page } => {
                if self.may_judge(*mm, *ctx) {
                    found.extend(self.range_excess(*mm, range, (*ctx, *va, *leaf), *in_tlb, page));
                }
            }
            Input::Access { ctx, va, frame, .. } => {
                return Asked { changed: self.access(*ctx, *va, *frame, found), ..Asked::default() };
            }
            Input::Mismatch(mismatch) => {
                return Asked { changed: self.mismatch(mismatch, mirrors, found), ..Asked::default() };
            }
            Input::Doubted { ctx, doubt, outcome } => self.doubted(*ctx, doubt, *outcome, found),
            Input::Private { ctx, va, vram, frame } => {
                return Asked { changed: self.learn(*ctx, *va, *vram, *frame), ..Asked::default() };
            }
            Input::Outlived { ctx, page, place, sight, still } => {
                found.extend(self.outlived((*ctx, *page, *place), *sight, *still));
            }
            Input::Parked { ctx, parked } => self.looked_for_faults(*ctx, *parked, found),
            Input::Report(_) | Input::Gap(_) => {}
        }
        Asked::default()
    }

    /// A state that came late may not know whose a context is that was asked about.
    fn may_judge(&self, mm: u64, ctx: Handle) -> bool {
        !self.late || self.mm_of(ctx) == Some(mm)
    }

    fn record(
        &mut self,
        record: &Record,
        watched: &Watched,
        mirrors: &Mirrors,
        found: &mut Vec<Finding>,
    ) -> Asked {
        let mm = record.mm;
        match record.kind {
            witness::HELLO => self.hello(),
            witness::CPU_FORMAT => {
                self.bad_records += u64::from(Format::from_record(record.arg).is_none());
            }
            witness::RANGE_START => match Range::read(record) {
                Some(range) => return Asked::about(self.range_started(mm, range, mirrors)),
                None => self.bad_records += 1,
            },
            witness::RANGE_END => match Range::read(record) {
                Some(_) => return Asked::about(self.range_ends(mm)),
                None => self.bad_records += 1,
            },
            witness::HEARTBEAT => return Asked::about(self.heartbeat(record.arg[1])),
            witness::MM_BEGIN => self.begin(mm, record.tgid, record.arg[1], watched),
            witness::NOTIFIER_ADDED => self.notifier(mm, 1, watched),
            witness::NOTIFIER_REMOVED => self.notifier(mm, -1, watched),
            witness::PAGE_CLEAN => {
                let [va, frame, ctx, _] = record.arg;
                found.extend(self.dirty_lost(mm, Handle(ctx), va, frame));
            }
            witness::MM_STRANDED => self.stranded(mm, found),
            witness::DMA_LEFT => self.left_mapped(record.arg[0], found),
            witness::STABLE_BEGIN | witness::STABLE_END => self.stable_record(record, found),
            witness::BYE => self.bye(record.arg[0], found),
            // Which frames are device-private is for the walk of the CPU's tables to know.
            witness::RANGE_SLOTS
            | witness::MESSAGE
            | witness::DMA_FREED
            | witness::DEVICE_PRIVATE_ADDED
            | witness::DEVICE_PRIVATE_REMOVED => {}
            // Gates are for whoever conducts the scenario; here they have their place in the order of events.
            kind if vgpu_spec::gate::RECORDS.contains(&kind) => {}
            kind => match Moment::of(kind) {
                Some(moment) => return Asked::about(self.moment(mm, moment, watched)),
                None => self.bad_records += 1,
            },
        }
        Asked::default()
    }
}
