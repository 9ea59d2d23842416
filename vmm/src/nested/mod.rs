// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--nested`: a run with KVM on a host that has none.
//!
//! QEMU's translator emulates an AMD processor's virtualisation (SVM). So this process ("outside") boots an *outer guest* under it,
//! whose PID 1 is this very program again ("inside"). Inside loads KVM, makes the run that was asked for, and reports over a line
//! of frames. The parts (kernel, the inner guest's files, QEMU if it is wanted) travel in the outer guest's first file system:
//! nothing is provisioned inside, and there is no network.
//!
//! | who | where | what |
//! |---|---|---|
//! | [`outside`] | this host | gathers the parts, boots the outer guest, watches it, passes events and results on |
//! | [`image`] | this host | the outer guest's files |
//! | [`inside`] | PID 1 of the outer guest | loads KVM, makes the run, sends what happens, switches off |
//! | [`carried`] | this host | with `--vfio gpu`: the run itself, its functions handed over to the machine inside |
//! | [`frame`] | between them | a virtio-serial port with bounded frames |
//!
//! Why it is set up as it is: `docs/decisions/0007-nested.md`.

pub(crate) mod carried;
pub mod frame;
pub mod image;
pub mod inside;
pub mod outside;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::runner::RunConfig;
use crate::runner::watch::Limits;

/// The hidden command that makes this program the outer guest's PID 1.
pub const COMMAND: &str = "nested-inside";
/// Name of the line's port.
pub const PORT: &str = "hmm-testbench.line";

/// Why a nested run's accelerator is what it is.
pub const ACCEL_REASON: &str = "KVM on an SVM that QEMU's translator emulates (--nested)";

/// Where things lie in the outer guest.
pub(crate) mod place {
    pub(crate) const ORDER: &str = "/testbench/order.json";
    pub(crate) const KERNEL: &str = "/testbench/kernel";
    pub(crate) const INITRAMFS: &str = "/testbench/initramfs";
    pub(crate) const MODULES: &str = "/testbench/modules";
    pub(crate) const QEMU: &str = "/testbench/qemu";
}

/// What the inside is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Errand {
    /// To make the run, or to carry it.
    Run,
    /// To measure: `bench nested`.
    Measure,
}

/// What the inside is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// What it is for.
    pub errand: Errand,
    /// The run. Its paths are absolute and mean the outside's files: they are for replay commands only.
    pub config: RunConfig,
    /// The kernel as it was asked for.
    pub kernel_name: String,
    /// Its release.
    pub kernel_release: String,
    /// Modules to load, in order: paths in the outer guest, each plain or compressed as the outer guest's kernel takes it.
    pub modules: Vec<PathBuf>,
    /// The QEMU in the outer guest, for `--machine qemu`.
    pub qemu: Option<InsideQemu>,
}

/// A QEMU in the outer guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InsideQemu {
    /// Its loader.
    pub program: PathBuf,
    /// What goes before all other arguments.
    pub args: Vec<String>,
    /// Version number.
    pub version: String,
}

/// How long things may take inside. The host's seconds count as many of the guest's only where the processor is real: an emulated
/// one runs its guest's guest several times slower, and everything that waits in host time has to wait longer.
#[must_use]
pub fn limits(plain: Limits) -> Limits {
    const SLOWER: u32 = 3;
    Limits { hang_heartbeats: plain.hang_heartbeats * u64::from(SLOWER), ..plain.slower(SLOWER) }
}
