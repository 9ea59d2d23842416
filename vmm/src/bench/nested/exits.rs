// SPDX-License-Identifier: MIT OR Apache-2.0
//! How often guests left their processors, by the kernel's own count: what does not depend on how busy the host is.
//!
//! Source: `struct kvm_stats_desc` of `arch/x86/kvm/x86.c`, in debugfs. The files there add up over the machines that exist, and
//! here there is one at a time.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::failure::{Failure, Result};

const DEBUGFS: &str = "/sys/kernel/debug";
/// The counters: a figure's name, and the file.
pub(super) const COUNTERS: [(&str, &str); 4] = [
    ("exits", "exits"),
    ("exits-device", "mmio_exits"),
    ("exits-port", "io_exits"),
    ("exits-interrupt", "irq_exits"),
];

/// Makes the counters visible, in the outer guest.
pub(super) fn show() -> Result<()> {
    mount(Some("debugfs"), DEBUGFS, Some("debugfs"), MsFlags::empty(), None::<&str>)
        .map_err(|error| Failure::environment(format!("cannot mount {DEBUGFS}: {error}")))
}

/// What the counters say now, in their order.
pub(super) fn count() -> Result<Vec<f64>> {
    COUNTERS.iter().map(|(_, file)| read(&Path::new(DEBUGFS).join("kvm").join(file))).collect()
}

fn read(path: &Path) -> Result<f64> {
    fs::read_to_string(path)
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .map(|count| count as f64)
        .ok_or_else(|| Failure::environment(format!("{} is no counter", path.display())))
}
