// SPDX-License-Identifier: MIT OR Apache-2.0
//! Inputs as text, and what they are about.

use std::fmt::{self, Write as _};

use vgpu_spec::handle::Handle;
use vgpu_spec::{gate, job, pte, witness};

use super::super::doubt::Outcome;
use super::super::event::{ContextView, DeviceEvent, RangeView};
use super::super::input::Input;
use super::super::mirror::Verdict;
use super::super::moments::Moment;
use super::super::private::Place;
use super::super::range::Range;
use super::leaf_last;
use crate::cpu::Page;
use crate::gates::GateRecord;

fn on_page(va: Option<u64>, start: u64, last: u64) -> bool {
    va.is_none_or(|va| start >> pte::PAGE_SHIFT <= va >> pte::PAGE_SHIFT && va <= last)
}

/// Whether an input is about the context, its address space and, where given, the page.
pub(super) fn concerns(input: &Input, ctx: Option<Handle>, mm: Option<u64>, va: Option<u64>) -> bool {
    let on = |of: Handle| ctx.is_none_or(|ctx| ctx == of);
    match input {
        Input::Device { event, .. } => device_concerns(event, ctx, va),
        // Where a scenario holds tasks that is a part of every story.
        Input::Witness(record) if GateRecord::is_kind(record.kind) => record.kind != gate::ROLE,
        Input::Witness(record) | Input::Associate { record, .. } => {
            let place = match record.kind {
                witness::RANGE_START | witness::RANGE_END | witness::STABLE_BEGIN | witness::STABLE_END => {
                    on_page(va, record.arg[0], record.arg[1])
                }
                witness::HEARTBEAT | witness::MESSAGE => false,
                _ => true,
            };
            (mm == Some(record.mm) || ctx.is_none() && mm.is_none()) && place
        }
        // Books, not news: the answer says nothing that the events do not.
        Input::BadRecord
        | Input::Ended { .. }
        | Input::Over { .. }
        | Input::Parked { .. }
        | Input::Gap(_) => false,
        Input::View { ctx: of, .. } => on(*of),
        Input::RangeView { ctx: of, range, view, .. } => {
            let left = !view.leaves.is_empty() || !view.tlb_entries.is_empty() || view.in_flight.is_some();
            on(*of) && left && on_page(va, range.start, range.last)
        }
        Input::Access { ctx: of, va: at, .. } => on(*of) && on_page(va, *at, *at),
        Input::Excess { ctx: of, va: at, leaf, .. } => on(*of) && on_page(va, *at, leaf_last(*at, *leaf)),
        Input::Mismatch(m) => on(m.ctx) && on_page(va, m.va, m.va),
        Input::Doubted { ctx: of, doubt, .. } => {
            on(*of) && on_page(va, doubt.va, leaf_last(doubt.va, doubt.leaf))
        }
        Input::Private { ctx: of, va: at, .. } => on(*of) && on_page(va, *at, *at),
        Input::Outlived { ctx: of, place, .. } => on(*of) && on_page(va, place.va, place.va),
        Input::Report(violation) => violation.context.is_some_and(|of| on(Handle(of))),
    }
}

fn device_concerns(event: &DeviceEvent, ctx: Option<Handle>, va: Option<u64>) -> bool {
    use DeviceEvent as E;
    let (of, place) = match *event {
        E::ContextBound { ctx, .. }
        | E::ContextReleased { ctx }
        | E::ReleaseAgain { ctx }
        | E::ContextUnbound { ctx, .. } => (ctx, true),
        E::BadHandle { handle, by, .. } => (by.unwrap_or(handle), true),
        E::LeafSet { ctx, va: Some(at), pte } => (ctx, on_page(va, at, leaf_last(at, pte))),
        // A 2 MiB leaf is cleared without telling its size: what lies within one counts as cleared.
        E::LeafCleared { ctx, va: Some(at), count } => {
            let bytes = (u64::from(count) << pte::PAGE_SHIFT).max(1 << pte::HUGE_SHIFT);
            (ctx, on_page(va, at, at.saturating_add(bytes - 1)))
        }
        E::LeafSet { ctx, va: None, .. } | E::LeafCleared { ctx, va: None, .. } => (ctx, va.is_none()),
        E::Invalidate { ctx, start, last } | E::InvalidateDone { ctx, start, last } => {
            (ctx, on_page(va, start, last))
        }
        E::FaultRaised { ctx, va: at, .. }
        | E::FaultReplayed { ctx, va: at, .. }
        | E::FaultCancelled { ctx, va: at, .. }
        | E::FaultDropped { ctx, va: at, .. } => (ctx, on_page(va, at, at)),
        E::JobDone { ctx, .. } | E::DataReturned { ctx, .. } | E::DataGranted { ctx, .. } => {
            (ctx, va.is_none())
        }
        E::Unusable { ctx, .. } if ctx != Handle::NONE => (ctx, true),
        E::RingFreed { ring, .. } if ring.ctx != Handle::NONE => (ring.ctx, true),
        E::Unusable { .. } | E::RingFreed { .. } | E::Disabled { .. } | E::Reset => return true,
    };
    ctx.is_none_or(|ctx| ctx == of) && place
}

/// One line: whose word it is, and what it says.
pub(super) fn render(input: &Input) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = line(&mut text, input);
    text
}

fn line(text: &mut String, input: &Input) -> fmt::Result {
    match input {
        Input::Device { event, .. } => device(text, event),
        Input::Witness(record) | Input::Associate { record, .. } => witness(text, record),
        Input::BadRecord => text.write_str("witness: a record that cannot be read"),
        Input::Ended { mm } => write!(text, "oracle: address space {mm} is forgotten"),
        Input::Over { mm, number, .. } => {
            write!(text, "oracle: invalidation {number} of address space {mm} is over")
        }
        Input::View { moment, ctx, view, .. } => {
            let when = match moment {
                Moment::Released => "release",
                Moment::Unmapped => "exit's UNMAP",
                Moment::End => "the end",
            };
            write!(text, "oracle: looks at {ctx} after {when}: ")?;
            context_view(text, view.as_ref())
        }
        Input::RangeView { ctx, range, view, .. } => {
            write!(text, "oracle: looks at {ctx} after the start of {range}: ")?;
            range_view(text, view)
        }
        Input::Excess { ctx, va, leaf, in_tlb, page, .. } => {
            let what = if *in_tlb { "TLB entry" } else { "leaf" };
            write!(
                text,
                "oracle: {ctx} has a {what} {} for {va:#x}, but the CPU has {}",
                Entry(*leaf),
                Cpu(page)
            )
        }
        Input::Access { ctx, va, frame, access } => {
            write!(text, "device: {ctx} accesses {va:#x} ({}) at {frame:#x}", rights(*access))
        }
        Input::Mismatch(m) => {
            let (ctx, va, leaf, cpu) = (m.ctx, m.va, Entry(m.leaf), Cpu(&m.page));
            let what = if m.unused { "set for" } else { "used at" };
            write!(text, "device: {ctx} leaf {leaf} {what} {va:#x} ({})", rights(m.access))?;
            write!(text, ", but the CPU has {cpu}{}", worth(&m.verdict))
        }
        Input::Doubted { ctx, doubt, outcome } => {
            write!(text, "oracle: looks again at {ctx} leaf {} for {:#x}: ", Entry(doubt.leaf), doubt.va)?;
            match outcome {
                Outcome::Settled => text.write_str("settled"),
                Outcome::Lasting => write!(text, "still there, after {} heartbeats", doubt.beats + 1),
                Outcome::Past => text.write_str("gone, and the CPU still has nothing"),
                Outcome::Never => text.write_str("the place goes, and the CPU still has nothing"),
                Outcome::Wrong(_, page) => write!(text, "the CPU has {}", Cpu(page)),
            }
        }
        Input::Private { ctx, va, vram, frame } => {
            write!(
                text,
                "oracle: {ctx} VRAM page {vram:#x} is the device-private frame {frame:#x} of {va:#x}"
            )
        }
        Input::Outlived { page, place, still, .. } => {
            let has = if *still { "still has" } else { "has no more" };
            let Place { va, frame, .. } = place;
            write!(text, "oracle: the CPU {has} {page} at {va:#x} (device-private frame {frame:#x})")
        }
        Input::Parked { ctx, parked } => {
            let parked = if *parked { "are still parked" } else { "have been answered" };
            write!(text, "oracle: overdue faults of {ctx} {parked}")
        }
        Input::Report(violation) => write!(text, "outside: {}: {}", violation.rule, violation.summary),
        Input::Gap(gap) => write!(text, "outside: {gap}"),
    }
}

/// What will come of a mismatch, where that is not plain.
fn worth(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Absent => "; to be looked at again",
        Verdict::Moving => "; the page is being moved",
        Verdict::Good | Verdict::Wrong(_) => "",
    }
}

/// An entry of the device's tables.
struct Entry(u64);

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |bit: u64, name: char| if self.0 & bit != 0 { name } else { '-' };
        let vram = if self.0 & pte::VRAM != 0 { "VRAM " } else { "" };
        let size = if self.0 & pte::HUGE != 0 { " 2M" } else { "" };
        let (write, atomic) = (bit(pte::WRITE, 'w'), bit(pte::ATOMIC, 'a'));
        write!(f, "[{vram}{:#x} r{write}{atomic}{size}]", self.0 & pte::ADDRESS)
    }
}

/// What the CPU has.
struct Cpu<'p>(&'p Page);

impl fmt::Display for Cpu<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use crate::cpu::Kind as K;
        let Page { kind, frame, write, raw, .. } = *self.0;
        let write = if write { "rw" } else { "r-" };
        match kind {
            K::None => f.write_str("nothing there"),
            K::Present => write!(f, "[{frame:#x} {write}] (entry {raw:#x})"),
            K::ProtNone => write!(f, "[{frame:#x} --] (PROT_NONE, entry {raw:#x})"),
            K::Migration | K::MigrationWrite => write!(f, "a migration entry for {frame:#x} ({raw:#x})"),
            K::DevicePrivate | K::DevicePrivateWrite => write!(f, "a device-private entry ({raw:#x})"),
            K::DeviceExclusive => write!(f, "a device-exclusive entry for {frame:#x} ({raw:#x})"),
            K::Swap => write!(f, "a swap entry ({raw:#x})"),
            K::Unsettled => write!(f, "a huge page that is being split ({raw:#x})"),
            K::Unreadable => f.write_str("tables that cannot be read"),
        }
    }
}

fn list(text: &mut String, parts: &[Option<String>], nothing: &str) -> fmt::Result {
    let parts: Vec<&str> = parts.iter().flatten().map(String::as_str).collect();
    if parts.is_empty() { text.write_str(nothing) } else { text.write_str(&parts.join(", ")) }
}

fn context_view(text: &mut String, view: Option<&ContextView>) -> fmt::Result {
    let Some(view) = view else { return text.write_str("it is gone") };
    let first =
        |at: Option<(u64, u64)>| at.map_or(String::new(), |(va, e)| format!(" (first {va:#x} {})", Entry(e)));
    let parts = [
        view.released.then(|| "released".to_owned()),
        view.queueless.then(|| "without a queue".to_owned()),
        (view.live_leaves > 0).then(|| format!("{} leaves{}", view.live_leaves, first(view.first_leaf))),
        (view.tlb_entries > 0).then(|| format!("{} TLB entries{}", view.tlb_entries, first(view.first_tlb))),
        view.in_flight.map(|va| format!("an access at {va:#x} in flight")),
        (view.parked_faults > 0).then(|| format!("{} faults parked", view.parked_faults)),
    ];
    list(text, &parts, "nothing is left")
}

fn range_view(text: &mut String, view: &RangeView) -> fmt::Result {
    let at = |(va, entry): (u64, u64)| format!("{va:#x} {}", Entry(entry));
    let parts = [
        view.released.then(|| "released".to_owned()),
        view.queueless.then(|| "without a queue".to_owned()),
        view.busy.then(|| "at work".to_owned()),
        view.leaves.first().map(|&leaf| format!("leaf {}", at(leaf))),
        view.tlb_entries.first().map(|&entry| format!("TLB entry {}", at(entry))),
        view.in_flight.map(|entry| format!("in flight {}", at(entry))),
    ];
    list(text, &parts, "nothing is left")
}

fn rights(access: u32) -> &'static str {
    use vgpu_spec::fault::{ACCESS_ATOMIC, ACCESS_WRITE};
    match (access & ACCESS_ATOMIC != 0, access & ACCESS_WRITE != 0) {
        (true, _) => "atomic",
        (_, true) => "write",
        _ => "read",
    }
}

struct At(Option<u64>);
impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(va) => write!(f, "{va:#x}"),
            None => f.write_str("an unlinked table"),
        }
    }
}

fn device(out: &mut String, event: &DeviceEvent) -> fmt::Result {
    use DeviceEvent as E;
    out.push_str("device: ");
    match *event {
        E::ContextBound { ctx, tag } => write!(out, "{ctx} bound, tag {tag:#x}"),
        E::ContextReleased { ctx } => write!(out, "{ctx} released and drained"),
        E::ReleaseAgain { ctx } => write!(out, "{ctx} released again"),
        E::ContextUnbound { ctx, leak } => write!(out, "{ctx} unbound, left behind: {leak}"),
        E::BadHandle { op, handle, issued_before, by, va } => {
            by.map_or(Ok(()), |ctx| write!(out, "{ctx} "))?;
            write!(out, "{op} named {handle}, {}", if issued_before { "stale" } else { "never given out" })?;
            va.map_or(Ok(()), |va| write!(out, ", address {va:#x}"))
        }
        E::LeafSet { ctx, va, pte } => write!(out, "{ctx} leaf set at {}: {}", At(va), Entry(pte)),
        E::LeafCleared { ctx, va, count } => write!(out, "{ctx} {count} leaves cleared from {}", At(va)),
        E::DataGranted { ctx, page } => write!(out, "{ctx} was granted {page}"),
        E::DataReturned { ctx, page } => write!(out, "{ctx} gave {page} back"),
        E::Invalidate { ctx, start, last } => write!(out, "{ctx} invalidate {start:#x}-{last:#x} begins"),
        E::InvalidateDone { ctx, start, last } => write!(out, "{ctx} invalidate {start:#x}-{last:#x} done"),
        E::FaultRaised { fault, ctx, va, access, again } => {
            write!(out, "{ctx} {fault} raised at {va:#x} ({})", rights(access))?;
            if again > 0 { write!(out, ", again after {again} in a row") } else { Ok(()) }
        }
        E::FaultReplayed { fault, ctx, va } => write!(out, "{ctx} {fault} at {va:#x} replayed"),
        E::FaultCancelled { fault, ctx, va } => write!(out, "{ctx} {fault} at {va:#x} cancelled"),
        E::FaultDropped { fault, ctx, va } => write!(out, "{ctx} {fault} at {va:#x} dropped"),
        E::JobDone { ctx, queue, status } => {
            let name = job::CONSTANTS
                .iter()
                .find(|(name, value, _)| name.starts_with("JOB_") && *value == u64::from(status))
                .map_or("?", |(name, ..)| *name);
            write!(out, "{ctx} job of {queue} done, {name}")
        }
        E::Unusable { ctx, queue, why } if ctx != Handle::NONE => write!(out, "{ctx} {queue} stopped: {why}"),
        E::Unusable { why, .. } => write!(out, "stopped: {why}"),
        E::RingFreed { ring, start, last } => write!(out, "memory {start:#x}-{last:#x} of {ring} is freed"),
        E::Disabled { leak, contexts_live } => {
            write!(out, "disabled with {contexts_live} contexts live, left behind: {leak}")
        }
        E::Reset => write!(out, "reset"),
    }
}

/// A record of the witness in words, without who reports it.
#[must_use]
pub fn describe(record: &witness::Record) -> String {
    let mut text = String::new();
    let _ = witness(&mut text, record);
    let text = text.strip_prefix("witness: ").unwrap_or(&text);
    text.rsplit_once(" (task ").map_or(text, |(words, _)| words).to_owned()
}

fn witness(out: &mut String, record: &witness::Record) -> fmt::Result {
    let kind = |arg| if arg == 1 { "a list" } else { "an interval" };
    let (mm, arg) = (record.mm, record.arg[0]);
    out.push_str("witness: ");
    if let Some(gate) = GateRecord::read(record) {
        write!(out, "{gate}")?;
        return write!(out, " (task {}/{}, cpu {})", record.tgid, record.pid, record.cpu);
    }
    match record.kind {
        witness::HELLO => write!(out, "loaded"),
        witness::MM_BEGIN => write!(out, "address space {mm} begins, {} notifier", kind(arg)),
        witness::MM_RELEASED => write!(out, "release has returned for address space {mm}"),
        witness::MM_UNMAPPED => write!(out, "exit's full-range UNMAP has returned for address space {mm}"),
        witness::MM_STRANDED => write!(out, "address space {mm} has no task left, and is not released"),
        witness::MM_END => write!(out, "address space {mm} ends"),
        witness::ASSOCIATE => write!(out, "address space {mm} is mirrored by {}", Handle(arg)),
        witness::NOTIFIER_ADDED => write!(out, "address space {mm} gets {} notifier", kind(arg)),
        witness::NOTIFIER_REMOVED => write!(out, "address space {mm} loses {} notifier", kind(arg)),
        witness::BYE => write!(out, "unloaded"),
        witness::RANGE_SLOTS => write!(out, "reports invalidations"),
        witness::PAGE_CLEAN => {
            write!(out, "page {:#x} at {arg:#x} of address space {mm} is clean", record.arg[1])
        }
        witness::RANGE_START => match Range::read(record) {
            Some(range) => write!(out, "start of {range} has returned for address space {mm}"),
            None => write!(out, "invalidation that makes no sense"),
        },
        witness::RANGE_END => match Range::read(record) {
            Some(range) => write!(out, "end of {range} is entered for address space {mm}"),
            None => write!(out, "invalidation that makes no sense"),
        },
        witness::STABLE_BEGIN => {
            write!(out, "address space {mm} declares {arg:#x}-{:#x} stable", record.arg[1])
        }
        witness::STABLE_END => {
            let how = if record.arg[2] == 0 { ", taken back" } else { "" };
            write!(out, "address space {mm} no longer declares {arg:#x}-{:#x} stable{how}", record.arg[1])
        }
        witness::CPU_FORMAT => write!(out, "{} levels of page tables", arg & 0xff),
        witness::DEVICE_PRIVATE_ADDED => {
            write!(out, "frames {arg:#x} to {:#x} are device-private memory", record.arg[1])
        }
        witness::DEVICE_PRIVATE_REMOVED => {
            write!(out, "frames {arg:#x} to {:#x} are no device-private memory any more", record.arg[1])
        }
        witness::DMA_FREED => write!(out, "frees memory of the device's, {arg:#x}, {} bytes", record.arg[1]),
        witness::DMA_LEFT => write!(out, "the driver leaves {arg} pieces of memory mapped for the device"),
        other => write!(out, "record {other}"),
    }?;
    write!(out, " (task {}/{}, cpu {})", record.tgid, record.pid, record.cpu)
}
