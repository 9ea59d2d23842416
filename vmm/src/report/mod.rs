// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports: consumers of stage events and of the results.

pub mod github;
pub mod human;
pub mod jsonl;
pub mod junit;
pub mod out;
pub mod results;

use crate::event::EventSink;
use crate::failure::Failure;
use results::Results;

/// Shows a run while it goes on, and its end.
pub trait Reporter: EventSink {
    /// The run is over.
    fn results(&self, results: &Results);
    /// The command could not do what was asked.
    fn failure(&self, failure: &Failure);
}
