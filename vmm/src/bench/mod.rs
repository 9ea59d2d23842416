// SPDX-License-Identifier: MIT OR Apache-2.0
//! `bench`: measurements, as ratios in one run where that is possible.

use std::sync::Arc;

use crate::event::EventSink;
use crate::failure::{Failure, Result};

/// Runs the benchmarks of these names, or all.
pub fn run(names: &[String], _json: bool, _events: Arc<dyn EventSink>) -> Result<u8> {
    match names.first() {
        Some(name) => Err(Failure::usage(format!("there is no benchmark `{name}`"))),
        None => Err(Failure::usage("`bench` is not in this version")),
    }
}
