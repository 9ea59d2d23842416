// SPDX-License-Identifier: MIT OR Apache-2.0
//! The last events of device and witness, in one order.
//!
//! A ring allocated once; entries are plain copies and become text only when a violation is made.

use std::fmt::Write as _;

use parking_lot::Mutex;
use vgpu_spec::handle::Handle;
use vgpu_spec::{gate, job, pte, witness};

use super::event::DeviceEvent;
use super::range::Range;
use crate::gates::GateRecord;

/// Entries kept.
const ENTRIES: usize = 64 * 1024;
/// Entries given to a violation.
pub(super) const LAST: usize = 20;

#[derive(Clone, Copy)]
pub(super) enum What {
    Device(DeviceEvent),
    Witness(witness::Record),
    /// An access that broke a rule; others are not kept.
    Access {
        ctx: Handle,
        va: u64,
        frame: u64,
        access: u32,
    },
}

#[derive(Clone, Copy)]
struct Entry {
    sequence: u64,
    heartbeat: u64,
    what: What,
}

#[derive(Default)]
struct Ring {
    entries: Vec<Entry>,
    next: u64,
    heartbeat: u64,
}

/// The ring.
pub(super) struct Trace(Mutex<Ring>);

impl Trace {
    pub(super) fn new(enabled: bool) -> Self {
        let entries = Vec::with_capacity(if enabled { ENTRIES } else { 0 });
        Self(Mutex::new(Ring { entries, ..Ring::default() }))
    }

    /// Adds an event: its place in the global order.
    pub(super) fn push(&self, what: What) {
        let mut ring = self.0.lock();
        let entry = Entry { sequence: ring.next, heartbeat: ring.heartbeat, what };
        if ring.entries.len() < ENTRIES {
            ring.entries.push(entry);
        } else {
            let at = (ring.next % ENTRIES as u64) as usize;
            ring.entries[at] = entry;
        }
        ring.next += 1;
    }

    pub(super) fn heartbeat(&self) {
        self.0.lock().heartbeat += 1;
    }

    pub(super) fn len(&self) -> u64 {
        self.0.lock().next
    }

    /// The last events on the context, its address space and, where given, the page; oldest first.
    pub(super) fn last(&self, ctx: Option<Handle>, mm: Option<u64>, va: Option<u64>) -> Vec<String> {
        let mut found: Vec<Entry> = Vec::with_capacity(LAST);
        {
            let ring = self.0.lock();
            let split = if ring.entries.len() < ENTRIES { 0 } else { (ring.next % ENTRIES as u64) as usize };
            let (newer, older) = (&ring.entries[..split], &ring.entries[split..]);
            for entry in newer.iter().rev().chain(older.iter().rev()) {
                if concerns(&entry.what, ctx, mm, va) {
                    found.push(*entry);
                    if found.len() == LAST {
                        break;
                    }
                }
            }
        }
        found.iter().rev().map(render).collect()
    }
}

fn on_page(va: Option<u64>, start: u64, last: u64) -> bool {
    va.is_none_or(|va| start >> pte::PAGE_SHIFT <= va >> pte::PAGE_SHIFT && va <= last)
}

/// Last address that a leaf at `va` maps.
pub(super) fn leaf_last(va: u64, entry: u64) -> u64 {
    let shift = if entry & pte::HUGE != 0 { pte::HUGE_SHIFT } else { pte::PAGE_SHIFT };
    va | ((1 << shift) - 1)
}

fn concerns(what: &What, ctx: Option<Handle>, mm: Option<u64>, va: Option<u64>) -> bool {
    use DeviceEvent as E;
    let event = match what {
        // Where a scenario holds tasks that is a part of every story.
        What::Witness(record) if GateRecord::is_kind(record.kind) => return record.kind != gate::ROLE,
        What::Witness(record) => {
            let place = match record.kind {
                witness::RANGE_START | witness::RANGE_END => on_page(va, record.arg[0], record.arg[1]),
                _ => true,
            };
            return (mm == Some(record.mm) || ctx.is_none() && mm.is_none()) && place;
        }
        What::Access { ctx: of, va: at, .. } => return ctx.is_none_or(|c| c == *of) && on_page(va, *at, *at),
        What::Device(event) => event,
    };
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
        E::JobDone { ctx, .. } | E::DataReturned { ctx, .. } => (ctx, va.is_none()),
        E::Disabled { .. } | E::Reset => return true,
    };
    ctx.is_none_or(|ctx| ctx == of) && place
}

fn render(entry: &Entry) -> String {
    let mut text = format!("#{} beat {} ", entry.sequence, entry.heartbeat);
    // Writing to a String cannot fail.
    let _ = match &entry.what {
        What::Device(event) => device(&mut text, event),
        What::Witness(record) => witness(&mut text, record),
        What::Access { ctx, va, frame, access } => {
            write!(text, "device: {ctx} accesses {va:#x} ({}) at {frame:#x}", rights(*access))
        }
    };
    text
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
impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(va) => write!(f, "{va:#x}"),
            None => f.write_str("an unlinked table"),
        }
    }
}

fn device(out: &mut String, event: &DeviceEvent) -> std::fmt::Result {
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
        E::LeafSet { ctx, va, pte } => write!(out, "{ctx} leaf set at {}: {pte:#x}", At(va)),
        E::LeafCleared { ctx, va, count } => write!(out, "{ctx} {count} leaves cleared from {}", At(va)),
        E::DataReturned { ctx, page } => write!(out, "{ctx} gave {page} back"),
        E::Invalidate { ctx, start, last } => write!(out, "{ctx} invalidate {start:#x}-{last:#x} begins"),
        E::InvalidateDone { ctx, start, last } => write!(out, "{ctx} invalidate {start:#x}-{last:#x} done"),
        E::FaultRaised { fault, ctx, va, access } => {
            write!(out, "{ctx} {fault} raised at {va:#x} ({})", rights(access))
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

fn witness(out: &mut String, record: &witness::Record) -> std::fmt::Result {
    let kind = |arg| if arg == 1 { "list" } else { "interval" };
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
        witness::NOTIFIER_ADDED => write!(out, "address space {mm} gets a {} notifier", kind(arg)),
        witness::NOTIFIER_REMOVED => write!(out, "address space {mm} loses a {} notifier", kind(arg)),
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
        witness::CPU_FORMAT => write!(out, "{} levels of page tables", arg & 0xff),
        witness::DEVICE_PRIVATE_ADDED => {
            write!(out, "frames {arg:#x} to {:#x} are device-private memory", record.arg[1])
        }
        witness::DEVICE_PRIVATE_REMOVED => {
            write!(out, "frames {arg:#x} to {:#x} are no device-private memory any more", record.arg[1])
        }
        other => write!(out, "record {other}"),
    }?;
    write!(out, " (task {}/{}, cpu {})", record.tgid, record.pid, record.cpu)
}

#[cfg(test)]
mod tests {
    use vgpu_spec::handle::Kind;

    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_and_filters() {
        let trace = Trace::new(true);
        let (a, b) = (Handle::new(Kind::Context, 1, 1), Handle::new(Kind::Context, 2, 1));
        trace.push(What::Device(DeviceEvent::ContextBound { ctx: a, tag: 7 }));
        for i in 0..ENTRIES as u64 + 100 {
            let ctx = if i % 2 == 0 { a } else { b };
            trace.push(What::Device(DeviceEvent::LeafSet { ctx, va: Some(i << 12), pte: 1 | i << 12 }));
        }
        trace.push(What::Witness(witness::Record {
            kind: witness::MM_RELEASED,
            mm: 3,
            ..Default::default()
        }));
        assert_eq!(trace.len(), ENTRIES as u64 + 102);
        let all = trace.last(Some(a), Some(3), None);
        assert_eq!(all.len(), LAST);
        assert!(all[LAST - 1].contains("release has returned for address space 3"));
        assert!(all[0].contains("context 1#1"));
        let page = trace.last(Some(a), Some(3), Some(0x10_0008_u64));
        assert_eq!(page.len(), 2, "{page:?}");
        assert!(page[0].contains("leaf set at 0x100000"), "{page:?}");
        assert!(trace.last(Some(a), None, Some(0x10_1000)).is_empty(), "that page is the other context's");
    }

    #[test]
    fn every_event_has_a_text() {
        let ctx = Handle::new(Kind::Context, 1, 1);
        let text = render(&Entry {
            sequence: 5,
            heartbeat: 2,
            what: What::Device(DeviceEvent::JobDone {
                ctx,
                queue: Handle::new(Kind::Queue, 0, 1),
                status: 3,
            }),
        });
        assert_eq!(text, "#5 beat 2 device: context 1#1 job of queue 0#1 done, JOB_KILLED");
        let bad = DeviceEvent::BadHandle {
            op: "INVALIDATE",
            handle: ctx,
            issued_before: true,
            by: None,
            va: Some(0x1000),
        };
        let text = render(&Entry { sequence: 0, heartbeat: 0, what: What::Device(bad) });
        assert_eq!(text, "#0 beat 0 device: INVALIDATE named context 1#1, stale, address 0x1000");
    }
}
