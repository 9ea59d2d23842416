// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parts of the fixed command line that this version does not have. They are refused by name, never ignored.

use clap::Args;

use super::{FormatName, RunArgs};
use crate::failure::{Failure, Result};

/// Options of `run` that are known and refused.
#[derive(Debug, Default, Args)]
pub struct LaterOptions {
    /// (not in this version)
    #[arg(long, hide = true, value_name = "SPEC")]
    pub inject: Vec<String>,
}

/// Refuses what this version does not have.
pub fn refuse(run: &RunArgs) -> Result<()> {
    let later = &run.later;
    let refused = [
        (run.format == FormatName::Ktap, "--format ktap", "--format human or jsonl"),
        (run.format == FormatName::Junit, "--format junit", "--out DIR, which gets a junit.xml"),
        (!later.inject.is_empty(), "--inject", ""),
    ];
    match refused.iter().find(|(given, ..)| *given) {
        None => Ok(()),
        Some((_, option, instead)) => {
            let failure = not_in_this_version(option);
            Err(if instead.is_empty() { failure } else { failure.remedy(format!("it has {instead}")) })
        }
    }
}

/// The failure for a part that is not there.
#[must_use]
pub fn not_in_this_version(what: &str) -> Failure {
    Failure::usage(format!("{what} is not in this version"))
}
