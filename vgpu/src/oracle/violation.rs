// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the oracle hands out: violations and counters.

use serde::{Deserialize, Serialize};
use vgpu_spec::handle::Handle;

use super::Rule;

/// A rule that was broken.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Violation {
    /// Which; serialises as its name.
    pub rule: Rule,
    /// Handle of the context, as a number.
    pub context: Option<u64>,
    /// The same, for people.
    pub context_name: Option<String>,
    /// Address on the device.
    pub address: Option<u64>,
    /// Frame: bus address, or offset in VRAM.
    pub frame: Option<u64>,
    /// One sentence.
    pub summary: String,
    /// The last events on that context and page from both sides, oldest first.
    pub events: Vec<String>,
    /// The command that finds it again; filled in by the runner.
    pub replay: Option<String>,
    /// Why it is accepted, if it is; filled in by the runner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
    /// How often it was seen.
    pub count: u64,
}

impl Violation {
    /// A violation without place or events; for those that are found outside the device.
    pub fn new(rule: Rule, summary: impl Into<String>) -> Self {
        Self {
            rule,
            context: None,
            context_name: None,
            address: None,
            frame: None,
            summary: summary.into(),
            events: Vec::new(),
            replay: None,
            allowed: None,
            count: 1,
        }
    }

    /// Names the context.
    #[must_use]
    pub fn on(mut self, ctx: Handle) -> Self {
        self.context = Some(ctx.0);
        self.context_name = Some(ctx.to_string());
        self
    }

    /// Names the address and, where known, the frame.
    #[must_use]
    pub fn at(mut self, address: Option<u64>, frame: Option<u64>) -> Self {
        self.address = address;
        self.frame = frame;
        self
    }
}

/// How much the oracle has seen. A run that saw nothing is no clean run.
#[derive(Serialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OracleCounters {
    /// Contexts bound.
    pub contexts: u64,
    /// Address spaces that had a context.
    pub address_spaces: u64,
    /// Address spaces whose release has returned.
    pub releases: u64,
    /// Contexts unbound.
    pub unregisters: u64,
    /// Guest heartbeats.
    pub heartbeats: u64,
    /// Probes the witness missed, by its own count.
    pub probes_missed: u64,
    /// Contexts of which nobody said, and nothing else told, whose they were: the release rules did not judge them.
    pub unassociated_contexts: u64,
    /// Records of the witness.
    pub witness_records: u64,
    /// Records that made no sense.
    pub bad_records: u64,
    /// Associations refused: the context is not live, or is another address space's.
    pub bad_associations: u64,
    /// Answers to faults that had been answered already: legal, see docs/rules.
    pub stale_answers: u64,
    /// Times that the witness began: once, or there was a time when nobody watched.
    pub witness_starts: u64,
    /// Contexts that were live when the function was reset: what became of them was not judged.
    pub contexts_lost: u64,
    /// Starts of invalidations after which the device was looked at.
    pub ranges_judged: u64,
    /// Steps of engines, and leaves set, that were held against the CPU's page tables.
    pub steps_compared: u64,
    /// Events, of device and witness.
    pub events: u64,
    /// Violations not kept, the list being full.
    pub suppressed: u64,
}
