// SPDX-License-Identifier: MIT OR Apache-2.0
//! Accesses that are replayed again and again, and never made possible.
//!
//! The device counts how often an access has faulted in a row ([`DeviceEvent::FaultRaised`](super::DeviceEvent)), so nothing is
//! counted here: only when it began is remembered, for each queue.

use std::collections::BTreeMap;

use vgpu_spec::handle::Handle;

use super::Rule;
use super::range::Range;
use super::state::{After, Finding, Mm, State};

/// Replays in a row that a driver may need for one access. It has its time for them as well.
pub(super) const REPLAYS: u32 = 1000;
/// Queues remembered at most, more than any device has; the handles of a trace may be made up.
const MOST_QUEUES: usize = 1024;

/// An access that has faulted and is not known to have got on.
struct Stuck {
    ctx: Handle,
    va: u64,
    /// How often it had faulted before the first time that counts.
    from: u32,
    /// When that was.
    heartbeat: u64,
    reported: bool,
}

/// Of each queue the access that faulted last, by the queue's index, which is a fault's too.
#[derive(Default)]
pub(super) struct Livelocks(BTreeMap<u32, Stuck>);

impl Livelocks {
    /// What was known of a context's accesses is worth nothing any more.
    pub(super) fn forget(&mut self, ctx: Handle) {
        self.0.retain(|_, stuck| stuck.ctx != ctx);
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    fn begin(&mut self, index: u32, stuck: Stuck) {
        if self.0.len() >= MOST_QUEUES && !self.0.contains_key(&index) {
            self.0.pop_first();
        }
        self.0.insert(index, stuck);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl State {
    /// An access has faulted, and `again` times before without having got on.
    pub(super) fn faulted_again(
        &mut self,
        fault: Handle,
        (ctx, va): (Handle, u64),
        again: u32,
        found: &mut Vec<Finding>,
    ) {
        let (index, now) = (fault.index(), self.heartbeats);
        let anew = Stuck { ctx, va, from: again, heartbeat: now, reported: false };
        let known = self.livelocks.0.get(&index).filter(|stuck| {
            // Of a copy's two places one may have become possible, and the other not: that is another access.
            again > stuck.from && (stuck.ctx, stuck.va) == (ctx, va)
        });
        let Some(&Stuck { from, heartbeat, reported, .. }) = known else {
            self.livelocks.begin(index, anew);
            return;
        };
        let (replays, beats) = (again - from, now.saturating_sub(heartbeat));
        if reported || replays < REPLAYS || beats <= self.fault_heartbeats {
            return;
        }
        let Some(context) = self.contexts.get(&ctx.0) else { return };
        let mm = context.mm;
        // After release that is another rule's; and who came late may not have seen a release, or an invalidation begin, unless it
        // has seen the address space do so.
        if !matches!(context.after, After::Alive) || self.late && mm.is_none() {
            return;
        }
        let closed = |mm: &Mm| mm.active.iter().any(|range| range.covers(va, va));
        if mm.map_or_else(|| self.mms.values().any(closed), |id| self.mms.get(&id).is_some_and(closed)) {
            // Nothing may be mapped there now: a replay is all that a driver can do that does not want to wait.
            self.livelocks.begin(index, anew);
            return;
        }
        self.livelocks.begin(index, Stuck { from, heartbeat, reported: true, ..anew });
        let times = replays.saturating_add(1);
        let text = format!(
            "an access of {ctx} at {va:#x} has faulted {times} times in a row within {beats} heartbeats, and was replayed each time"
        );
        found.push(self.finding(Rule::HangLivelock, ctx, Some(va), text));
    }

    /// An invalidation of an address space has started: what the driver had made possible there it had to take back, and accesses
    /// that fault once more do so rightly.
    pub(super) fn accesses_disturbed(&mut self, id: u64, range: &Range) {
        let Self { livelocks, contexts, .. } = self;
        let mm = |ctx: Handle| contexts.get(&ctx.0).and_then(|context| context.mm);
        livelocks
            .0
            .retain(|_, stuck| !range.covers(stuck.va, stuck.va) || mm(stuck.ctx).is_some_and(|mm| mm != id));
    }
}
