// SPDX-License-Identifier: MIT OR Apache-2.0
//! The oracle: judges, from the device's side, how a driver keeps the device's view of an address space.
//!
//! It is fed by the device ([`Oracle::event`], [`Oracle::access`]) and by the guest's witness module ([`Oracle::witness`]).
//! The rules and their reasons are in docs/rules.md.
//!
//! Locks: `state`, `trace` and `sinks` are each held for moments and never while another is taken, except `state` before
//! `trace`. None is held while the device is asked ([`Inspect`]) or a sink is called, so the device may call in with its own
//! locks held.

mod event;
mod rule;
mod violation;

pub use event::{ContextView, DeviceEvent, Inspect, Leak};
pub use rule::Rule;
pub use violation::{OracleCounters, Violation};

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use vgpu_spec::handle::Handle;
use vgpu_spec::witness::Record;

/// How the oracle judges.
#[derive(Clone, Copy, Debug)]
pub struct OracleConfig {
    /// Judge; else only the counters are kept.
    pub enabled: bool,
    /// Guest heartbeats (a tenth of a second each) within which a fault must be answered.
    pub fault_heartbeats: u64,
    /// Violations kept at most.
    pub max_violations: usize,
    /// Contexts that the device has.
    pub contexts: u32,
}

impl Default for OracleConfig {
    fn default() -> Self {
        Self { enabled: true, fault_heartbeats: 100, max_violations: 100, contexts: 64 }
    }
}

/// Called with each violation, the first time it is seen.
pub type ViolationSink = Box<dyn Fn(&Violation) + Send + Sync>;

/// Judges the device's and the witness's events.
pub struct Oracle {
    config: OracleConfig,
    /// By context index: the handle of the context if its accesses have to be looked at, else 0.
    watched: Box<[AtomicU64]>,
    events: AtomicU64,
    violations: Mutex<Vec<Violation>>,
    device: Mutex<Option<Weak<dyn Inspect>>>,
    sinks: Mutex<Vec<Arc<dyn Fn(&Violation) + Send + Sync>>>,
}

impl Oracle {
    /// An oracle that has seen nothing.
    #[must_use]
    pub fn new(config: OracleConfig) -> Arc<Self> {
        Arc::new(Self {
            config,
            watched: (0..config.contexts).map(|_| AtomicU64::new(0)).collect(),
            events: AtomicU64::new(0),
            violations: Mutex::new(Vec::new()),
            device: Mutex::new(None),
            sinks: Mutex::new(Vec::new()),
        })
    }

    /// Tells it which device to ask.
    pub fn attach(&self, device: Weak<dyn Inspect>) {
        *self.device.lock() = Some(device);
    }

    /// Something happened on the device.
    pub fn event(&self, event: DeviceEvent) {
        self.events.fetch_add(1, SeqCst);
        let _ = event;
    }

    /// An access is about to touch memory: its translation is done and counts as in flight.
    #[inline]
    pub fn access(&self, ctx: Handle, va: u64, frame: u64, access: u32) {
        if let Some(watched) = self.watched.get(ctx.index() as usize) {
            if watched.load(SeqCst) == ctx.0 {
                self.access_watched(ctx, va, frame, access);
            }
        }
    }

    #[cold]
    fn access_watched(&self, _ctx: Handle, _va: u64, _frame: u64, _access: u32) {}

    /// The witness reports. Returns when the record has been judged.
    pub fn witness(&self, record: &Record) {
        self.events.fetch_add(1, SeqCst);
        let _ = record;
    }

    /// Takes a violation found elsewhere: by the console's reader, a workload or a watchdog.
    pub fn report(&self, violation: Violation) {
        let mut kept = self.violations.lock();
        if kept.len() < self.config.max_violations {
            kept.push(violation.clone());
            drop(kept);
            let sinks = self.sinks.lock().clone();
            for sink in &sinks {
                sink(&violation);
            }
        }
    }

    /// Calls `sink` with each violation from now on. It may be called on a device's thread: it must not block or call the device.
    pub fn on_violation(&self, sink: ViolationSink) {
        self.sinks.lock().push(Arc::from(sink));
    }

    /// What was broken so far.
    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        self.violations.lock().clone()
    }

    /// What was seen so far.
    #[must_use]
    pub fn counters(&self) -> OracleCounters {
        OracleCounters { events: self.events.load(SeqCst), ..OracleCounters::default() }
    }
}
