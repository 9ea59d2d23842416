// SPDX-License-Identifier: MIT OR Apache-2.0
//! The native machine: a small VMM on KVM, with the functions in this process.

use super::{Machine, MachineConfig};
use crate::failure::{Failure, Result};

/// What the native machine is told beside what every machine is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmOptions {
    /// The host's virtualisation is QEMU's emulated SVM: features that it gets wrong are hidden from the guest. Also found out
    /// by itself, where the host's hypervisor says who it is.
    pub emulated_svm: bool,
    /// The machine's threads give up the system calls that they do not need.
    pub seccomp: bool,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self { emulated_svm: false, seccomp: true }
    }
}

/// Starts a guest.
///
/// # Errors
/// If KVM is not usable, or the kernel or the configuration is not one that this machine can start.
pub fn start(_options: KvmOptions, config: MachineConfig) -> Result<Box<dyn Machine>> {
    Err(Failure::environment(format!(
        "the native machine cannot start {} yet: only its interface is here",
        config.kernel.display()
    )))
}
