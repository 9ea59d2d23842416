// SPDX-License-Identifier: MIT OR Apache-2.0
//! Machines: what shows PCI functions to a guest. A machine is a trait, so that the runner does not know which one it drives.

pub mod kvm;
pub mod probe;
pub mod qemu;
#[doc(hidden)]
pub mod small;
mod terminal;
pub mod vfio_user;

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vgpu::function::{Function, InterruptSwitch};
use vgpu::memory::SystemMemory;

use crate::failure::{Failure, Result};

/// How the guest's instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// By the host's virtualisation.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// A PCI function and what connects it to the machine.
#[derive(Clone)]
pub struct FunctionSlot {
    /// Unique in the machine; letters, digits and hyphens.
    pub name: &'static str,
    /// The function.
    pub function: Arc<dyn Function>,
    /// Guest memory as this function sees it: filled and emptied by the machine, so never shared between functions.
    pub memory: Arc<SystemMemory>,
    /// Where the machine attaches itself for the function's interrupts.
    pub interrupts: Arc<InterruptSwitch>,
}

/// Takes a console's bytes as they come.
pub type ConsoleSink = Box<dyn FnMut(&[u8]) + Send>;

/// What to start.
pub struct MachineConfig {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial file system, as an anonymous file.
    pub initramfs: File,
    /// The kernel's command line.
    pub cmdline: String,
    /// Processors.
    pub cpus: u32,
    /// Guest memory; rounded up to whole pages.
    pub memory_bytes: u64,
    /// NUMA nodes; see [`node_bytes`] for what each needs.
    pub nodes: u32,
    /// Who runs the instructions.
    pub accel: Accel,
    /// The functions, in the order of their PCI slots.
    pub functions: Vec<FunctionSlot>,
    /// Takes the console's bytes as they come, on a thread of the machine. The guest waits while it does not return.
    pub console: ConsoleSink,
    /// Puts the console on this terminal as well.
    pub interactive: bool,
}

/// The memory of each node in order, if so much can be shared out among so many.
///
/// Linux takes no nodes whose borders lie within one of its sections of memory, 128 MiB on x86-64 (`numa_register_memblks()`
/// in the kernel's mm/numa_memblks.c), and each must have something. The last node has what is left.
#[must_use]
pub fn node_bytes(memory_bytes: u64, nodes: u32) -> Option<Vec<u64>> {
    const SECTION: u64 = 128 << 20;
    let each = match nodes {
        0 => return None,
        1 => memory_bytes,
        _ => memory_bytes / u64::from(nodes) / SECTION * SECTION,
    };
    let others = each * u64::from(nodes - 1);
    (each > 0).then(|| (1..nodes).map(|_| each).chain([memory_bytes - others]).collect())
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineExit {
    /// The guest switched it off.
    PoweredOff,
    /// Anything else: the guest reset itself, the machine crashed or was killed.
    Died {
        /// What happened, in a few words.
        status: String,
        /// The last that the machine itself (not the guest) said.
        stderr_tail: String,
    },
}

/// A started machine. Dropping it ends it.
pub trait Machine: Send {
    /// Waits until the machine has ended, all of its console has been delivered and its functions are disconnected; `None` if
    /// that takes longer than `timeout`. What the machine's threads deliver to may be full until the caller empties it, so who
    /// does both waits for moments only, and again.
    fn wait(&mut self, timeout: Duration) -> Option<MachineExit>;
    /// Ends it at once. It is gone, and reaped, when this returns.
    fn kill(&mut self);
    /// Sends every processor a non-maskable interrupt, so that a hung guest shows its stacks.
    fn nmi(&mut self) -> Result<()>;
    /// Takes a function away at once, as pulling a card out does: nobody in the guest is asked, and who looks finds nothing there.
    /// It reaches neither memory nor processors any more when this returns, and has lost its state.
    ///
    /// # Errors
    /// If there is no such function in the machine, or the machine's functions stay where they are.
    fn unplug(&mut self, function: &str) -> Result<()> {
        Err(Failure::usage(format!("{function} cannot be pulled out of this machine")))
    }
    /// Puts it back, as after power-on. The guest is told that something has changed, as it is after [`Self::unplug`].
    ///
    /// # Errors
    /// As [`Self::unplug`], or if it is there.
    fn plug(&mut self, function: &str) -> Result<()> {
        Err(Failure::usage(format!("{function} cannot be put into this machine")))
    }
    /// The process it runs in, if it is one of its own.
    fn pid(&self) -> Option<u32>;
}

/// Waits until `over`, which is after the machine's end and before its last words are delivered: for `timeout`, or for the moment
/// that they usually take.
fn last_words(timeout: Duration, over: impl Fn() -> bool) -> bool {
    const MOMENT: Duration = Duration::from_millis(20);
    let begin = Instant::now();
    loop {
        if over() {
            return true;
        }
        if begin.elapsed() >= timeout.max(MOMENT) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_share_the_memory_and_begin_at_sections() {
        const M: u64 = 1 << 20;
        assert_eq!(node_bytes(300 * M, 1), Some(vec![300 * M]));
        assert_eq!(node_bytes(1024 * M, 2), Some(vec![512 * M; 2]));
        assert_eq!(node_bytes(1000 * M, 3), Some(vec![256 * M, 256 * M, 488 * M]));
        assert_eq!((node_bytes(256 * M, 4), node_bytes(256 * M, 0)), (None, None));
    }
}
