// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests that boot a guest. One machine at a time: the hosts have two cores.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod bare;
mod broken;
mod clean;
mod gates;
mod hang;
mod lost;
mod mutants;
mod nested;
mod paths;
mod seed;
mod support;
mod vfio;
