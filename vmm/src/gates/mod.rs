// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scenarios: which of the guest's tasks waits where until what has happened, so that a race is certain.
//!
//! [`script`] is what a scenario says, in TOML or built in Rust. [`engine`] follows it: it hears of everything the guest's tasks
//! and the witness report, inside the register access that reports it, and opens doors. Without a script ([`order`]) it chooses
//! among those that wait. [`diagram`] draws what happened.

pub mod diagram;
pub mod engine;
pub mod order;
pub mod script;

#[cfg(test)]
mod engine_test;

use crate::failure::{Failure, Result};
use script::Scenario;

/// The scenarios of the testbench, as they are written.
const BUILT_IN: &[(&str, &str)] = &[
    ("fault-under-invalidate", include_str!("scenarios/fault-under-invalidate.toml")),
    ("invalidate-under-fault", include_str!("scenarios/invalidate-under-fault.toml")),
    ("release-unregister-race", include_str!("scenarios/release-unregister-race.toml")),
    ("mirrors-sem-deadlock", include_str!("scenarios/mirrors-sem-deadlock.toml")),
    ("mirrors-sem-no-writer", include_str!("scenarios/mirrors-sem-no-writer.toml")),
    ("mirrors-sem-narrow", include_str!("scenarios/mirrors-sem-narrow.toml")),
    ("release-waits-for-invalidate", include_str!("scenarios/release-waits-for-invalidate.toml")),
    (
        "release-waits-for-invalidate-writer",
        include_str!("scenarios/release-waits-for-invalidate-writer.toml"),
    ),
    ("unregister-in-release", include_str!("scenarios/unregister-in-release.toml")),
    ("release-once", include_str!("scenarios/release-once.toml")),
    ("range-outlives-release", include_str!("scenarios/range-outlives-release.toml")),
    ("range-holds-mm", include_str!("scenarios/range-holds-mm.toml")),
    ("reclaim-under-invalidate", include_str!("scenarios/reclaim-under-invalidate.toml")),
    ("reclaim-under-release", include_str!("scenarios/reclaim-under-release.toml")),
];

/// The names of all scenarios.
pub fn names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

/// A scenario of the testbench; none if there is none of that name.
///
/// # Errors
/// If it is not well written, which a test excludes.
pub fn built_in(name: &str) -> Result<Option<Scenario>> {
    let found = BUILT_IN.iter().find(|(known, _)| *known == name);
    found
        .map(|(name, text)| Scenario::parse(text).map_err(|why| Failure::usage(format!("{name}: {why}"))))
        .transpose()
}

/// All scenarios.
///
/// # Errors
/// As [`built_in`].
pub fn all() -> Result<Vec<Scenario>> {
    let mut scenarios = Vec::new();
    for name in names() {
        scenarios.extend(built_in(name)?);
    }
    Ok(scenarios)
}

/// A scenario from a file.
///
/// # Errors
/// If it cannot be read, or says what makes no sense.
pub fn from_file(path: &std::path::Path) -> Result<Scenario> {
    let wrong = |why: String| Failure::usage(format!("--scenario {}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    if text.len() > script::MAX_BYTES {
        return Err(wrong(format!("it is longer than {} bytes", script::MAX_BYTES)));
    }
    Scenario::parse(&text).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_scenarios_are_well_written_and_have_their_own_name() {
        for (scenario, name) in all().unwrap().iter().zip(names()) {
            assert_eq!(scenario.name, name);
            assert!(!guest_protocol::WORKLOADS.iter().any(|workload| workload.name == name), "{name}");
            scenario.compile(&[]).unwrap();
        }
        assert!(built_in("no-such-thing").unwrap().is_none());
    }
}
