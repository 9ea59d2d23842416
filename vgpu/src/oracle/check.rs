// SPDX-License-Identifier: MIT OR Apache-2.0
//! Judging a trace once more, without a device or a guest.

use std::sync::Arc;

use super::input::Input;
use super::trace::{DEFAULT_BYTES, TraceError, TraceFile};
use super::{Oracle, OracleConfig, OracleCounters, Violation};

/// What a trace says.
#[derive(Debug)]
pub struct Checked {
    /// What was broken. How often is not in a trace: of the same violation the first is kept.
    pub violations: Vec<Violation>,
    /// What was counted.
    pub counters: OracleCounters,
    /// Events judged.
    pub events: u64,
    /// Why the run proves nothing, if nothing was found, by its own word.
    pub gaps: Vec<String>,
}

/// Judges a trace. If its oldest events gave way to newer ones ([`TraceFile::missing`]), only what can be judged without them is.
///
/// # Errors
/// If something in the file makes no sense.
pub fn check(file: &TraceFile<'_>) -> Result<Checked, TraceError> {
    let config = OracleConfig {
        enabled: true,
        fault_heartbeats: file.header.fault_heartbeats,
        max_violations: usize::try_from(file.header.max_violations).unwrap_or(usize::MAX),
        // Those that engines ask for without a lock; there are none.
        contexts: 0,
        coherent_atomics: file.header.coherent_atomics,
        // Enough for the last events that a report is given, which are searched for among so many.
        trace_bytes: file.bytes().min(DEFAULT_BYTES),
    };
    let oracle = Oracle::new(config);
    if file.missing() > 0 {
        oracle.state.lock().came_late();
        oracle.trace.begin_at(file.missing(), file.first_beat());
    }
    let (mut gaps, mut events) = (Vec::new(), 0);
    file.each(|input| {
        events += 1;
        if let Input::Gap(gap) = &input {
            gaps.push(gap.clone());
        }
        oracle.replay(input);
    })?;
    Ok(Checked { violations: oracle.violations(), counters: oracle.counters(), events, gaps })
}

#[cfg(test)]
pub(super) fn replay_for_test(oracle: &Arc<Oracle>, input: Input) {
    oracle.replay(input);
}

impl Oracle {
    /// Takes an input that was judged before.
    fn replay(self: &Arc<Self>, input: Input) {
        match input {
            Input::Report(violation) => self.report(*violation),
            Input::Device { told: false, attended: false, .. } | Input::Gap(_) => self.trace.push(&input),
            input => drop(self.judge(&input)),
        }
    }
}
