// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one trait behind which a machine sees a PCI function.

use std::fs::File;
use std::sync::Arc;

use parking_lot::RwLock;

/// Something outside the device that the machine has to do after an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the machine has to carry the effects out"]
pub struct Effects {
    /// Interrupt vectors to raise, bit = vector.
    pub interrupts: u32,
}

/// How a base address register's region is reached.
#[derive(Debug)]
pub enum Backing<'a> {
    /// Every access calls the function.
    Trapped,
    /// The guest may map the file, from offset 0, directly.
    Mapped(&'a File),
    /// The machine's own interrupt table (MSI-X): the function never sees it.
    InterruptTable,
}

/// A base address register.
#[derive(Debug)]
pub struct Bar<'a> {
    /// Its number, 0 to 5; all are 64 bits wide and take two.
    pub index: u8,
    /// Bytes, a power of two.
    pub size: u64,
    /// Prefetchable.
    pub prefetchable: bool,
    /// How it is reached.
    pub backing: Backing<'a>,
}

/// Raises interrupts for a function's own threads. Implemented by the machine.
///
/// May be called from any thread, with device locks held: it must not call back into the function and must not block.
pub trait InterruptSink: Send + Sync {
    /// Raises `vector`; ignored if the guest has not enabled it.
    fn raise(&self, vector: u16);
}

/// A sink that is attached later, so that a device can exist before its machine. Until then interrupts are dropped; the
/// device keeps their cause bits.
#[derive(Default)]
pub struct InterruptSwitch {
    sink: RwLock<Option<Arc<dyn InterruptSink>>>,
}

impl InterruptSwitch {
    /// Not attached to anything.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends interrupts to `sink` from now on.
    pub fn attach(&self, sink: Arc<dyn InterruptSink>) {
        *self.sink.write() = Some(sink);
    }
}

impl InterruptSink for InterruptSwitch {
    fn raise(&self, vector: u16) {
        if let Some(sink) = &*self.sink.read() {
            sink.raise(vector);
        }
    }
}

/// A PCI function, whatever machine it sits in.
///
/// None of these calls blocks on the guest, on an engine or on a fault: on QEMU they run under its big lock. What a guest does
/// wrong is a value (all ones, an ignored write, a counter), never a panic.
pub trait Function: Send + Sync {
    /// Its BARs.
    fn bars(&self) -> Vec<Bar<'_>>;
    /// Interrupt vectors it uses.
    fn vectors(&self) -> u16;
    /// Whether it offers MSI-X (MSI is always offered).
    fn has_msix(&self) -> bool;
    /// Reads configuration space; `offset + data.len()` beyond 4096 reads all ones.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, offset: u16, data: &[u8]) -> Effects;
    /// Reads a trapped BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes a trapped BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effects;
    /// Function-level reset, and reset of the machine.
    fn reset(&self) -> Effects;
}
