// SPDX-License-Identifier: MIT OR Apache-2.0
//! The whole device, driven as a driver drives it.

mod commands;
mod faults;
mod hostile;
mod jobs;
mod races;
mod random;
mod registers;

use super::GpuConfig;
use crate::testing::Rig;

/// A small device with 64 MiB of guest memory.
fn rig() -> Rig {
    let config = GpuConfig { contexts: 8, queues: 8, table_pages: 64, ..GpuConfig::default() };
    Rig::new(config, 64 << 20)
}
