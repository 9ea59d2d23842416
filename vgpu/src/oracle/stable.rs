// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges that the workload has declared stable: a fault of the device in one must not be made fatal.
//!
//! A process may be dying, and then every driver cancels its faults. So nothing is judged before the workload has ended its
//! promise and said that it was kept: then the process was alive, and the range as promised, all the time.

use std::collections::BTreeMap;

use vgpu_spec::fault::ACCESS_ATOMIC;
use vgpu_spec::handle::Handle;
use vgpu_spec::witness::{self, Record};

use super::Rule;
use super::event::DeviceEvent;
use super::state::{Finding, State};

/// Promises remembered at once; a guest that gives more is not held to the others.
const MOST_RANGES: usize = 1024;
/// Faults that are followed at once.
const MOST_FAULTS: usize = 4096;
/// Cancelled ones kept for a promise: of each context one is reported.
const MOST_CANCELLED: usize = 64;

/// A promise.
struct Promise {
    mm: u64,
    start: u64,
    last: u64,
    /// Context and address of faults that were raised and cancelled in it.
    cancelled: Vec<(Handle, u64)>,
}

/// All promises, and the faults that were raised under one.
#[derive(Default)]
pub(super) struct Stable {
    promises: Vec<Promise>,
    /// By handle of the fault, its context and address.
    raised: BTreeMap<u64, (Handle, u64)>,
}

impl Stable {
    fn holds(&self, mm: u64, va: u64) -> bool {
        self.promises.iter().any(|promise| promise.covers(mm, va))
    }

    /// An address space has been released: what its faults came to was right.
    pub(super) fn released(&mut self, mm: u64) {
        self.promises.retain(|promise| promise.mm != mm);
    }
}

impl Promise {
    fn covers(&self, mm: u64, va: u64) -> bool {
        self.mm == mm && (self.start..=self.last).contains(&va)
    }
}

impl State {
    /// A device event that may concern a promise. Costs a comparison while there is none.
    pub(super) fn stable_event(&mut self, event: &DeviceEvent) {
        use DeviceEvent as E;
        if self.stable.promises.is_empty() && self.stable.raised.is_empty() {
            return;
        }
        match *event {
            // Atomics are the platform's to refuse.
            E::FaultRaised { fault, ctx, va, access, .. } if access & ACCESS_ATOMIC == 0 => {
                let promised = self.mm_of(ctx).is_some_and(|mm| self.stable.holds(mm, va));
                if promised && self.stable.raised.len() < MOST_FAULTS {
                    self.stable.raised.insert(fault.0, (ctx, va));
                }
            }
            E::FaultReplayed { fault, .. } | E::FaultDropped { fault, .. } => {
                self.stable.raised.remove(&fault.0);
            }
            E::FaultCancelled { fault, .. } => {
                let Some((ctx, va)) = self.stable.raised.remove(&fault.0) else { return };
                let Some(mm) = self.mm_of(ctx) else { return };
                for promise in self.stable.promises.iter_mut().filter(|promise| promise.covers(mm, va)) {
                    if promise.cancelled.len() < MOST_CANCELLED {
                        promise.cancelled.push((ctx, va));
                    }
                }
            }
            E::ContextUnbound { ctx, .. } => self.stable.raised.retain(|_, (of, _)| *of != ctx),
            E::Reset => self.stable.raised.clear(),
            _ => {}
        }
    }

    /// The workload gives a promise or ends one.
    pub(super) fn stable_record(&mut self, record: &Record, found: &mut Vec<Finding>) {
        let (mm, [start, last, kept, _]) = (record.mm, record.arg);
        if start > last || !self.alive.contains(&mm) {
            // A state that came late has not seen every address space begin.
            self.bad_records += u64::from(start > last || !self.late);
            return;
        }
        if record.kind == witness::STABLE_BEGIN {
            if self.stable.promises.len() < MOST_RANGES {
                self.stable.promises.push(Promise { mm, start, last, cancelled: Vec::new() });
            }
            return;
        }
        // The last one that was given like this: promises nest.
        let same = |promise: &Promise| (promise.mm, promise.start, promise.last) == (mm, start, last);
        let Some(at) = self.stable.promises.iter().rposition(same) else {
            // One too many to be remembered, or given before the witness was loaded anew.
            return;
        };
        let promise = self.stable.promises.swap_remove(at);
        if kept == 0 {
            return;
        }
        for (ctx, va) in promise.cancelled {
            let text = format!(
                "a fault of {ctx} at {va:#x} was cancelled, though {} had declared {start:#x}-{last:#x} stable all the time",
                self.mm_name(Some(mm))
            );
            let mut finding = self.finding(Rule::FaultSpuriousFatal, ctx, Some(va), text);
            finding.mm = Some(mm);
            found.push(finding);
        }
    }
}
