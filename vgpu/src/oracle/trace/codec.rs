// SPDX-License-Identifier: MIT OR Apache-2.0
//! Inputs as bytes.
//!
//! A tag, then the fields: numbers as LEB128, addresses and entries as page and rest, handles as index and generation, so that
//! most events take 10 to 20 bytes. What is read back is checked like everything that comes from a file.

use vgpu_spec::command;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::witness::{self, Record};

use super::super::doubt::{Cause, Doubt, Outcome};
use super::super::event::{ContextView, DeviceEvent, Leak, RangeView, RingUse, RingView, Unusable};
use super::super::input::Input;
use super::super::mirror::{Mismatch, Verdict};
use super::super::moments::Moment;
use super::super::private::{Place, Sight};
use super::super::range::Range;
use super::super::rule::Rule;
use super::super::violation::Violation;
use crate::cpu::{self, Page};

/// Bytes of a text kept at most; a longer one is cut.
const MAX_TEXT: usize = 4096;
/// Last events of a violation found elsewhere kept at most; each is cut at a quarter of [`MAX_TEXT`].
const MAX_LINES: usize = 40;

/// Flags beside a tag.
const TOLD: u8 = 0x40;
const ATTENDED: u8 = 0x80;

const BOUND: u8 = 1;
const RELEASED: u8 = 2;
const RELEASED_AGAIN: u8 = 3;
const UNBOUND: u8 = 4;
const BAD_HANDLE: u8 = 5;
const LEAF_SET: u8 = 6;
const LEAF_SET_UNLINKED: u8 = 7;
const LEAF_CLEARED: u8 = 8;
const INVALIDATE: u8 = 9;
const INVALIDATE_DONE: u8 = 10;
const FAULT_RAISED: u8 = 11;
const FAULT_REPLAYED: u8 = 12;
const FAULT_CANCELLED: u8 = 13;
const FAULT_DROPPED: u8 = 14;
const JOB_DONE: u8 = 15;
const DISABLED: u8 = 16;
const RESET: u8 = 17;
const DATA_RETURNED: u8 = 18;
const DATA_GRANTED: u8 = 19;
const UNUSABLE: u8 = 20;
const RING_FREED: u8 = 21;
const WITNESS: u8 = 24;
const ASSOCIATE: u8 = 25;
const BAD_RECORD: u8 = 26;
const ENDED: u8 = 27;
const OVER: u8 = 28;
const VIEW: u8 = 29;
const RANGE_VIEW: u8 = 30;
const EXCESS: u8 = 31;
const ACCESS: u8 = 32;
const MISMATCH: u8 = 33;
const DOUBTED: u8 = 34;
const PARKED: u8 = 35;
const REPORT: u8 = 36;
const GAP: u8 = 37;
const PRIVATE: u8 = 38;
const OUTLIVED: u8 = 39;

/// Names of operations that are no commands.
const OTHER_OPERATIONS: [&str; 4] = ["DOORBELL", "walk", "leaf", "command"];

/// Appends an input to `out`, which should have room for 128 bytes.
pub(super) fn encode(input: &Input, out: &mut Vec<u8>) {
    let mut out = Writer(out);
    match input {
        Input::Device { event, told, attended } => {
            let flags = if *told { TOLD } else { 0 } | if *attended { ATTENDED } else { 0 };
            device(&mut out, event, flags);
        }
        Input::Witness(record) => {
            out.byte(WITNESS);
            out.record(record);
        }
        Input::Associate { record, live } => {
            out.byte(ASSOCIATE | if *live { TOLD } else { 0 });
            out.record(record);
        }
        Input::BadRecord => out.byte(BAD_RECORD),
        Input::Ended { mm } => {
            out.byte(ENDED);
            out.number(*mm);
        }
        Input::Over { mm, slot, number } => {
            out.byte(OVER);
            out.numbers([*mm, u64::from(*slot), *number]);
        }
        Input::View { mm, moment, ctx, view } => {
            out.byte(VIEW | if view.is_some() { TOLD } else { 0 });
            out.byte(match moment {
                Moment::Released => 0,
                Moment::Unmapped => 1,
                Moment::End => 2,
            });
            out.number(*mm);
            out.handle(Kind::Context, *ctx);
            if let Some(view) = view {
                out.view(view);
            }
        }
        Input::RangeView { mm, range, ctx, view } => {
            out.byte(RANGE_VIEW);
            out.number(*mm);
            out.range(range);
            out.handle(Kind::Context, *ctx);
            let entries = [view.leaves.first().copied(), view.tlb_entries.first().copied(), view.in_flight];
            out.flags(
                [view.released, view.queueless, view.busy].into_iter().chain(entries.map(|e| e.is_some())),
            );
            for (va, entry) in entries.into_iter().flatten() {
                out.address(va);
                out.address(entry);
            }
        }
        Input::Excess { mm, range, ctx, va, leaf, in_tlb, page } => {
            out.byte(EXCESS | if *in_tlb { TOLD } else { 0 });
            out.number(*mm);
            out.range(range);
            out.handle(Kind::Context, *ctx);
            out.addresses([*va, *leaf]);
            out.page(page);
        }
        Input::Access { ctx, va, frame, access } => {
            out.byte(ACCESS);
            out.handle(Kind::Context, *ctx);
            out.addresses([*va, *frame]);
            out.number((*access).into());
        }
        Input::Mismatch(Mismatch { ctx, va, leaf, access, unused, page, verdict }) => {
            out.byte(MISMATCH | if *unused { TOLD } else { 0 });
            out.handle(Kind::Context, *ctx);
            out.addresses([*va, *leaf]);
            out.number((*access).into());
            out.page(page);
            match verdict {
                Verdict::Good => out.byte(0),
                Verdict::Absent => out.byte(1),
                Verdict::Moving => out.byte(2),
                Verdict::Wrong(rule) => {
                    out.byte(3);
                    out.text(rule.name());
                }
            }
        }
        Input::Doubted { ctx, doubt, outcome } => {
            out.byte(DOUBTED);
            out.handle(Kind::Context, *ctx);
            out.addresses([doubt.va, doubt.leaf]);
            out.number(doubt.beats.into());
            match outcome {
                Outcome::Settled => out.byte(0),
                Outcome::Lasting => out.byte(1),
                Outcome::Past => out.byte(3),
                Outcome::Never => out.byte(4),
                Outcome::Wrong(rule, page) => {
                    out.byte(2);
                    out.text(rule.name());
                    out.page(page);
                }
            }
        }
        Input::Private { ctx, va, vram, frame } => {
            out.byte(PRIVATE);
            out.handle(Kind::Context, *ctx);
            out.addresses([*va, *vram, *frame]);
        }
        Input::Outlived { ctx, page, place, sight, still } => {
            out.byte(OUTLIVED | if *still { TOLD } else { 0 });
            out.byte(match sight {
                Sight::Returned => 0,
                Sight::Again => 1,
                Sight::Beat => 2,
                Sight::Last => 3,
            });
            out.handle(Kind::Context, *ctx);
            out.handle(Kind::DataPage, *page);
            out.number(place.mm);
            out.addresses([place.va, place.frame]);
        }
        Input::Parked { ctx, parked } => {
            out.byte(PARKED | if *parked { TOLD } else { 0 });
            out.handle(Kind::Context, *ctx);
        }
        Input::Report(violation) => {
            out.byte(REPORT);
            out.text(violation.rule.name());
            out.maybe(violation.context, Writer::number);
            out.maybe(violation.address, Writer::address);
            out.maybe(violation.frame, Writer::address);
            out.text(&violation.summary);
            let lines = violation.events.len().min(MAX_LINES);
            out.byte(lines as u8);
            violation.events.iter().take(lines).for_each(|line| out.text_cut(line, MAX_TEXT / 4));
        }
        Input::Gap(text) => {
            out.byte(GAP);
            out.text(text);
        }
    }
}

fn device(out: &mut Writer<'_>, event: &DeviceEvent, flags: u8) {
    use DeviceEvent as E;
    let mut about = |tag: u8, ctx: Handle, addresses: &[u64]| {
        out.byte(tag | flags);
        out.handle(Kind::Context, ctx);
        addresses.iter().for_each(|&address| out.address(address));
    };
    match *event {
        E::ContextBound { ctx, tag } => {
            about(BOUND, ctx, &[]);
            out.number(tag);
        }
        E::ContextReleased { ctx } => about(RELEASED, ctx, &[]),
        E::ReleaseAgain { ctx } => about(RELEASED_AGAIN, ctx, &[]),
        E::ContextUnbound { ctx, leak } => {
            about(UNBOUND, ctx, &[]);
            out.leak(&leak);
        }
        E::BadHandle { op, handle, issued_before, by, va } => {
            out.byte(BAD_HANDLE | flags);
            out.number(handle.0);
            out.byte(u8::from(issued_before));
            out.maybe(by.map(|by| by.0), Writer::number);
            out.maybe(va, Writer::address);
            out.text(op);
        }
        E::LeafSet { ctx, va: Some(va), pte } => about(LEAF_SET, ctx, &[va, pte]),
        E::LeafSet { ctx, va: None, pte } => about(LEAF_SET_UNLINKED, ctx, &[pte]),
        E::LeafCleared { ctx, va, count } => {
            about(LEAF_CLEARED, ctx, &[]);
            out.number(count.into());
            out.maybe(va, Writer::address);
        }
        E::DataReturned { ctx, page } => {
            about(DATA_RETURNED, ctx, &[]);
            out.handle(Kind::DataPage, page);
        }
        E::DataGranted { ctx, page } => {
            about(DATA_GRANTED, ctx, &[]);
            out.handle(Kind::DataPage, page);
        }
        E::Invalidate { ctx, start, last } => {
            about(INVALIDATE, ctx, &[start]);
            out.number(last.wrapping_sub(start));
        }
        E::InvalidateDone { ctx, start, last } => {
            about(INVALIDATE_DONE, ctx, &[start]);
            out.number(last.wrapping_sub(start));
        }
        E::FaultRaised { fault, ctx, va, access, again } => {
            about(FAULT_RAISED, ctx, &[va]);
            out.handle(Kind::Fault, fault);
            out.numbers([access, again].map(u64::from));
        }
        E::FaultReplayed { fault, ctx, va } => {
            about(FAULT_REPLAYED, ctx, &[va]);
            out.handle(Kind::Fault, fault);
        }
        E::FaultCancelled { fault, ctx, va } => {
            about(FAULT_CANCELLED, ctx, &[va]);
            out.handle(Kind::Fault, fault);
        }
        E::FaultDropped { fault, ctx, va } => {
            about(FAULT_DROPPED, ctx, &[va]);
            out.handle(Kind::Fault, fault);
        }
        E::JobDone { ctx, queue, status } => {
            about(JOB_DONE, ctx, &[]);
            out.handle(Kind::Queue, queue);
            out.number(status.into());
        }
        E::Unusable { ctx, queue, why } => {
            about(UNUSABLE, ctx, &[]);
            out.handle(Kind::Queue, queue);
            out.byte(why as u8);
        }
        E::RingFreed { ring: RingView { used, ctx, queue }, start, last } => {
            about(RING_FREED, ctx, &[start]);
            out.number(last.wrapping_sub(start));
            out.handle(Kind::Queue, queue);
            out.byte(used as u8);
        }
        E::Disabled { leak, contexts_live } => {
            out.byte(DISABLED | flags);
            out.number(contexts_live.into());
            out.leak(&leak);
        }
        E::Reset => out.byte(RESET | flags),
    }
}

struct Writer<'v>(&'v mut Vec<u8>);

impl Writer<'_> {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }
    fn address(&mut self, address: u64) {
        self.number(address >> 12);
        self.number(address & 0xfff);
    }
    fn numbers<const N: usize>(&mut self, numbers: [u64; N]) {
        numbers.into_iter().for_each(|number| self.number(number));
    }
    fn addresses<const N: usize>(&mut self, addresses: [u64; N]) {
        addresses.into_iter().for_each(|address| self.address(address));
    }
    /// One that is mostly of this kind.
    fn handle(&mut self, kind: Kind, handle: Handle) {
        self.number((handle.0 & 0xffff_ffff) ^ (kind as u64) << 24);
        self.number(handle.0 >> 32);
    }
    fn maybe(&mut self, value: Option<u64>, write: impl Fn(&mut Self, u64)) {
        self.byte(u8::from(value.is_some()));
        if let Some(value) = value {
            write(self, value);
        }
    }
    fn flags(&mut self, flags: impl Iterator<Item = bool>) {
        self.byte(flags.enumerate().fold(0, |byte, (at, flag)| byte | u8::from(flag) << at));
    }
    fn text(&mut self, text: &str) {
        self.text_cut(text, MAX_TEXT);
    }
    fn text_cut(&mut self, text: &str, most: usize) {
        let mut end = text.len().min(most);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.number(end as u64);
        self.0.extend_from_slice(&text.as_bytes()[..end]);
    }
    fn leak(&mut self, leak: &Leak) {
        let Leak { table_pages, data_pages, queues, faults, page, va } = *leak;
        self.numbers([table_pages, data_pages, queues, faults].map(u64::from));
        self.number(page.0);
        self.maybe(va, Self::address);
    }
    fn record(&mut self, record: &Record) {
        let Record { kind, cpu, mm, arg, pid, tgid, time_ns } = *record;
        self.numbers([u64::from(kind), cpu.into(), mm, pid.into(), tgid.into(), time_ns]);
        let args = arg.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
        self.byte(args as u8);
        arg.iter().take(args).for_each(|&word| self.address(word));
    }
    fn range(&mut self, range: &Range) {
        let Range { start, last, event, owned, leaving, slot, number } = *range;
        self.address(start);
        self.number(last.wrapping_sub(start));
        self.numbers([event.into(), u64::from(owned) | u64::from(leaving) << 1, slot.into()]);
        self.number(number);
    }
    fn page(&mut self, page: &Page) {
        let Page { kind, frame, write, dirty, soft_clean, raw, shift } = *page;
        self.byte(kind_number(kind));
        self.flags([write, dirty, soft_clean].into_iter());
        self.byte(shift as u8);
        self.addresses([frame, raw]);
    }
    fn view(&mut self, view: &ContextView) {
        let ContextView {
            released,
            queueless,
            live_leaves,
            first_leaf,
            tlb_entries,
            first_tlb,
            in_flight,
            parked_faults,
        } = *view;
        let there = [first_leaf.is_some(), first_tlb.is_some(), in_flight.is_some()];
        self.flags([released, queueless].into_iter().chain(there));
        self.numbers([live_leaves, tlb_entries, parked_faults.into()]);
        for (va, entry) in [first_leaf, first_tlb].into_iter().flatten() {
            self.address(va);
            self.address(entry);
        }
        in_flight.into_iter().for_each(|va| self.address(va));
    }
}

fn kind_number(kind: cpu::Kind) -> u8 {
    use cpu::Kind as K;
    match kind {
        K::None => 0,
        K::Present => 1,
        K::ProtNone => 2,
        K::Migration => 3,
        K::MigrationWrite => 4,
        K::DevicePrivate => 5,
        K::DevicePrivateWrite => 6,
        K::DeviceExclusive => 7,
        K::Swap => 8,
        K::Unsettled => 9,
        K::Unreadable => 10,
    }
}

fn kind_of(number: u8) -> Option<cpu::Kind> {
    use cpu::Kind as K;
    const KINDS: [K; 11] = [
        K::None,
        K::Present,
        K::ProtNone,
        K::Migration,
        K::MigrationWrite,
        K::DevicePrivate,
        K::DevicePrivateWrite,
        K::DeviceExclusive,
        K::Swap,
        K::Unsettled,
        K::Unreadable,
    ];
    KINDS.get(usize::from(number)).copied()
}

/// Whether a record is a heartbeat, by its first bytes.
pub(super) fn is_heartbeat(record: &[u8]) -> bool {
    matches!(record, [WITNESS, kind, ..] if u32::from(*kind) == witness::HEARTBEAT)
}

/// The input that these bytes are, all of them; `None` if they are none.
pub(super) fn decode(bytes: &[u8]) -> Option<Input> {
    let mut from = Reader(bytes);
    let tag = from.byte()?;
    let (told, attended) = (tag & TOLD != 0, tag & ATTENDED != 0);
    let input = match tag & 0x3f {
        tag @ BOUND..=RING_FREED => Input::Device { event: from.event(tag)?, told, attended },
        WITNESS => Input::Witness(from.record()?),
        ASSOCIATE => Input::Associate { record: from.record()?, live: told },
        BAD_RECORD => Input::BadRecord,
        ENDED => Input::Ended { mm: from.number()? },
        OVER => Input::Over { mm: from.number()?, slot: from.small()?, number: from.number()? },
        VIEW => {
            let moment = match from.byte()? {
                0 => Moment::Released,
                1 => Moment::Unmapped,
                2 => Moment::End,
                _ => return None,
            };
            let (mm, ctx) = (from.number()?, from.handle(Kind::Context)?);
            let view = if told { Some(from.view()?) } else { None };
            Input::View { mm, moment, ctx, view }
        }
        RANGE_VIEW => from.range_view()?,
        EXCESS => Input::Excess {
            mm: from.number()?,
            range: from.range()?,
            ctx: from.handle(Kind::Context)?,
            va: from.address()?,
            leaf: from.address()?,
            in_tlb: told,
            page: from.page()?,
        },
        ACCESS => Input::Access {
            ctx: from.handle(Kind::Context)?,
            va: from.address()?,
            frame: from.address()?,
            access: from.small()?,
        },
        MISMATCH => {
            let (ctx, va) = (from.handle(Kind::Context)?, from.address()?);
            let (leaf, access, page) = (from.address()?, from.small()?, from.page()?);
            let verdict = match from.byte()? {
                0 => Verdict::Good,
                1 => Verdict::Absent,
                2 => Verdict::Moving,
                3 => Verdict::Wrong(from.rule()?),
                _ => return None,
            };
            Input::Mismatch(Mismatch { ctx, va, leaf, access, unused: told, page, verdict })
        }
        DOUBTED => {
            let ctx = from.handle(Kind::Context)?;
            let (va, leaf, beats) = (from.address()?, from.address()?, from.small()?);
            let outcome = match from.byte()? {
                0 => Outcome::Settled,
                1 => Outcome::Lasting,
                2 => Outcome::Wrong(from.rule()?, from.page()?),
                3 => Outcome::Past,
                4 => Outcome::Never,
                _ => return None,
            };
            // It is found by its place; why it is in doubt the state knows itself.
            Input::Doubted { ctx, doubt: Doubt { beats, ..Doubt::new(va, leaf, Cause::Absent) }, outcome }
        }
        PRIVATE => Input::Private {
            ctx: from.handle(Kind::Context)?,
            va: from.address()?,
            vram: from.address()?,
            frame: from.address()?,
        },
        OUTLIVED => Input::Outlived {
            sight: match from.byte()? {
                0 => Sight::Returned,
                1 => Sight::Again,
                2 => Sight::Beat,
                3 => Sight::Last,
                _ => return None,
            },
            still: told,
            ctx: from.handle(Kind::Context)?,
            page: from.handle(Kind::DataPage)?,
            place: Place { mm: from.number()?, va: from.address()?, frame: from.address()? },
        },
        PARKED => Input::Parked { ctx: from.handle(Kind::Context)?, parked: told },
        REPORT => Input::Report(Box::new(from.violation()?)),
        GAP => Input::Gap(from.text()?),
        _ => return None,
    };
    from.0.is_empty().then_some(input)
}

struct Reader<'b>(&'b [u8]);

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }
    fn number(&mut self) -> Option<u64> {
        let mut number = 0_u64;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return None;
            }
            number |= part << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }
    fn small(&mut self) -> Option<u32> {
        self.number()?.try_into().ok()
    }
    fn address(&mut self) -> Option<u64> {
        let (page, rest) = (self.number()?, self.number()?);
        (page >> 52 == 0 && rest < 0x1000).then_some(page << 12 | rest)
    }
    fn handle(&mut self, kind: Kind) -> Option<Handle> {
        let (low, high) = (self.small()?, self.small()?);
        Some(Handle(u64::from(high) << 32 | u64::from(low) ^ (kind as u64) << 24))
    }
    fn maybe(&mut self, read: impl Fn(&mut Self) -> Option<u64>) -> Option<Option<u64>> {
        match self.byte()? {
            0 => Some(None),
            1 => Some(Some(read(self)?)),
            _ => None,
        }
    }
    fn flags<const N: usize>(&mut self) -> Option<[bool; N]> {
        let byte = self.byte()?;
        (u32::from(byte) >> N == 0).then(|| std::array::from_fn(|at| byte >> at & 1 != 0))
    }
    fn text(&mut self) -> Option<String> {
        let length = usize::try_from(self.number()?).ok().filter(|&length| length <= MAX_TEXT)?;
        let (text, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(std::str::from_utf8(text).ok()?.to_owned())
    }
    fn rule(&mut self) -> Option<Rule> {
        Rule::from_name(&self.text()?)
    }
    fn entry(&mut self, there: bool) -> Option<Option<(u64, u64)>> {
        if !there {
            return Some(None);
        }
        Some(Some((self.address()?, self.address()?)))
    }
    fn leak(&mut self) -> Option<Leak> {
        Some(Leak {
            table_pages: self.small()?,
            data_pages: self.small()?,
            queues: self.small()?,
            faults: self.small()?,
            page: Handle(self.number()?),
            va: self.maybe(Self::address)?,
        })
    }
    fn record(&mut self) -> Option<Record> {
        let mut record = Record {
            kind: self.small()?,
            cpu: self.small()?,
            mm: self.number()?,
            pid: self.small()?,
            tgid: self.small()?,
            time_ns: self.number()?,
            ..Record::default()
        };
        let args = usize::from(self.byte()?);
        for word in record.arg.get_mut(..args)? {
            *word = self.address()?;
        }
        Some(record)
    }
    fn range(&mut self) -> Option<Range> {
        let start = self.address()?;
        let (last, event, flags) = (start.wrapping_add(self.number()?), self.small()?, self.number()?);
        Some(Range {
            start,
            last,
            event,
            owned: flags & 1 != 0,
            leaving: flags & 2 != 0,
            slot: self.small()?,
            number: self.number()?,
        })
    }
    fn page(&mut self) -> Option<Page> {
        let kind = kind_of(self.byte()?)?;
        let [write, dirty, soft_clean] = self.flags()?;
        let shift = self.byte()?.into();
        Some(Page { kind, frame: self.address()?, write, dirty, soft_clean, raw: self.address()?, shift })
    }
    fn view(&mut self) -> Option<ContextView> {
        let [released, queueless, leaf, tlb, flight] = self.flags()?;
        let (live_leaves, tlb_entries, parked_faults) = (self.number()?, self.number()?, self.small()?);
        Some(ContextView {
            released,
            queueless,
            live_leaves,
            first_leaf: self.entry(leaf)?,
            tlb_entries,
            first_tlb: self.entry(tlb)?,
            in_flight: if flight { Some(self.address()?) } else { None },
            parked_faults,
        })
    }
    fn range_view(&mut self) -> Option<Input> {
        let (mm, range) = (self.number()?, self.range()?);
        let ctx = self.handle(Kind::Context)?;
        let [released, queueless, busy, leaf, tlb, flight] = self.flags()?;
        let view = RangeView {
            released,
            queueless,
            busy,
            leaves: self.entry(leaf)?.into_iter().collect(),
            tlb_entries: self.entry(tlb)?.into_iter().collect(),
            in_flight: self.entry(flight)?,
        };
        Some(Input::RangeView { mm, range, ctx, view })
    }
    fn violation(&mut self) -> Option<Violation> {
        let rule = self.rule()?;
        let context = self.maybe(Self::number)?;
        let (address, frame) = (self.maybe(Self::address)?, self.maybe(Self::address)?);
        let mut violation = Violation::new(rule, self.text()?).at(address, frame);
        if let Some(ctx) = context {
            violation = violation.on(Handle(ctx));
        }
        for _ in 0..self.byte()? {
            violation.events.push(self.text()?);
        }
        Some(violation)
    }
    fn event(&mut self, tag: u8) -> Option<DeviceEvent> {
        use DeviceEvent as E;
        let ctx = match tag {
            BAD_HANDLE | DISABLED | RESET => Handle::NONE,
            _ => self.handle(Kind::Context)?,
        };
        Some(match tag {
            BOUND => E::ContextBound { ctx, tag: self.number()? },
            RELEASED => E::ContextReleased { ctx },
            RELEASED_AGAIN => E::ReleaseAgain { ctx },
            UNBOUND => E::ContextUnbound { ctx, leak: self.leak()? },
            BAD_HANDLE => E::BadHandle {
                handle: Handle(self.number()?),
                issued_before: self.byte()? != 0,
                by: self.maybe(Self::number)?.map(Handle),
                va: self.maybe(Self::address)?,
                op: operation(&self.text()?),
            },
            LEAF_SET => E::LeafSet { ctx, va: Some(self.address()?), pte: self.address()? },
            LEAF_SET_UNLINKED => E::LeafSet { ctx, va: None, pte: self.address()? },
            LEAF_CLEARED => E::LeafCleared { ctx, count: self.small()?, va: self.maybe(Self::address)? },
            DATA_RETURNED => E::DataReturned { ctx, page: self.handle(Kind::DataPage)? },
            DATA_GRANTED => E::DataGranted { ctx, page: self.handle(Kind::DataPage)? },
            INVALIDATE | INVALIDATE_DONE => {
                let start = self.address()?;
                let last = start.wrapping_add(self.number()?);
                if tag == INVALIDATE {
                    E::Invalidate { ctx, start, last }
                } else {
                    E::InvalidateDone { ctx, start, last }
                }
            }
            FAULT_RAISED => {
                let (va, fault) = (self.address()?, self.handle(Kind::Fault)?);
                E::FaultRaised { fault, ctx, va, access: self.small()?, again: self.small()? }
            }
            FAULT_REPLAYED | FAULT_CANCELLED | FAULT_DROPPED => {
                let (va, fault) = (self.address()?, self.handle(Kind::Fault)?);
                match tag {
                    FAULT_REPLAYED => E::FaultReplayed { fault, ctx, va },
                    FAULT_CANCELLED => E::FaultCancelled { fault, ctx, va },
                    _ => E::FaultDropped { fault, ctx, va },
                }
            }
            JOB_DONE => E::JobDone { ctx, queue: self.handle(Kind::Queue)?, status: self.small()? },
            UNUSABLE => E::Unusable {
                ctx,
                queue: self.handle(Kind::Queue)?,
                why: *Unusable::ALL.get(usize::from(self.byte()?))?,
            },
            RING_FREED => {
                let start = self.address()?;
                let last = start.wrapping_add(self.number()?);
                let queue = self.handle(Kind::Queue)?;
                let used = *RingUse::ALL.get(usize::from(self.byte()?))?;
                E::RingFreed { ring: RingView { used, ctx, queue }, start, last }
            }
            DISABLED => E::Disabled { contexts_live: self.small()?, leak: self.leak()? },
            RESET => E::Reset,
            _ => return None,
        })
    }
}

/// The name of an operation, as the device has it.
fn operation(name: &str) -> &'static str {
    let commands = command::CONSTANTS.iter().filter_map(|(constant, ..)| constant.strip_prefix("OP_"));
    commands.chain(OTHER_OPERATIONS).find(|known| *known == name).unwrap_or("operation")
}
