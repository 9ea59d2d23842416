// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory: the RAM's file, its mappings in this process, and KVM's slots.
//!
//! The slot numbers' lock is a leaf: nothing else is locked while it is held.

use std::fs::File;
use std::sync::Arc;

use parking_lot::Mutex;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
};

use super::host::Host;
use super::layout::{Layout, PAGE};
use crate::failure::{Failure, Result};
use crate::runner::device::memfd;

/// Slots for RAM; those of BARs come behind them.
const RAM_SLOTS: u32 = 2;
/// Slots at most, far fewer than KVM has.
const SLOTS: u32 = 64;

/// The RAM.
pub(super) struct GuestRam {
    /// The file with all of it.
    pub(super) file: File,
    /// Where it is mapped here.
    pub(super) map: GuestMemoryMmap<()>,
}

impl GuestRam {
    /// Makes the RAM of a layout, all zeros. Pages come into being when they are touched.
    pub(super) fn new(layout: &Layout) -> Result<Self> {
        let file = memfd("hmm-testbench-ram", layout.ram_bytes())?;
        let fail = |error: &dyn std::fmt::Display| {
            Failure::environment(format!("cannot map {} bytes of guest memory: {error}", layout.ram_bytes()))
        };
        let mut pieces = Vec::new();
        for piece in &layout.ram {
            let bytes = usize::try_from(piece.at.bytes()).map_err(|error| fail(&error))?;
            let file = file.try_clone().map_err(|error| fail(&error))?;
            pieces.push((GuestAddress(piece.at.start), bytes, Some(FileOffset::new(file, piece.offset))));
        }
        let map = GuestMemoryMmap::from_ranges_with_files(pieces).map_err(|error| fail(&error))?;
        Ok(Self { file, map })
    }
}

/// KVM's memory slots.
pub(super) struct Slots {
    host: Arc<dyn Host>,
    free: Mutex<Vec<u32>>,
}

impl Slots {
    pub(super) fn new(host: Arc<dyn Host>) -> Arc<Self> {
        Arc::new(Self { host, free: Mutex::new((RAM_SLOTS..SLOTS).rev().collect()) })
    }

    /// Shows the guest its RAM.
    pub(super) fn add_ram(&self, ram: &GuestRam) -> Result<()> {
        for (slot, region) in (0..RAM_SLOTS).zip(ram.map.iter()) {
            self.host
                .show(slot, region.start_addr().0, region)
                .map_err(|error| Failure::environment(format!("KVM refuses the guest's memory: {error}")))?;
        }
        Ok(())
    }
}

/// A BAR whose file the guest reaches directly, where the guest wants it.
pub(super) struct MappedBar {
    slots: Arc<Slots>,
    slot: u32,
    map: MmapRegion<()>,
    /// Guest address at which it is now.
    at: Mutex<Option<u64>>,
}

impl MappedBar {
    /// Maps `bytes` of `file` here; the guest does not see them yet.
    pub(super) fn new(slots: &Arc<Slots>, file: &File, bytes: u64) -> std::io::Result<Self> {
        let length = usize::try_from(bytes).map_err(std::io::Error::other)?;
        if bytes == 0 || bytes % PAGE != 0 || file.metadata()?.len() < bytes {
            return Err(std::io::Error::other(format!("a file of {bytes:#x} bytes cannot be a BAR")));
        }
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), length)
            .map_err(std::io::Error::other)?;
        Self::of(slots, map)
    }

    /// For memory that is mapped here already, whole pages of it.
    pub(super) fn of(slots: &Arc<Slots>, map: MmapRegion<()>) -> std::io::Result<Self> {
        let slot = slots.free.lock().pop();
        let slot = slot.ok_or_else(|| std::io::Error::other("no memory slot of KVM is left for a BAR"))?;
        Ok(Self { slots: Arc::clone(slots), slot, map, at: Mutex::new(None) })
    }

    /// Whether it is there, or nowhere if that is wanted.
    pub(super) fn is_at(&self, wanted: Option<u64>) -> bool {
        *self.at.lock() == wanted
    }

    /// Shows it to the guest at `wanted`, or not at all. Says whether the guest sees what it wants.
    pub(super) fn place(&self, wanted: Option<u64>) -> bool {
        let mut at = self.at.lock();
        if *at == wanted {
            return true;
        }
        if let Some(old) = at.take() {
            // KVM moves a slot only by taking it away. This does not fail for a slot that exists.
            if self.slots.host.hide(self.slot, old).is_err() {
                *at = Some(old);
                return false;
            }
        }
        let Some(start) = wanted else { return true };
        let done = self.slots.host.show(self.slot, start, &self.map).is_ok();
        *at = done.then_some(start);
        done
    }
}

impl Drop for MappedBar {
    fn drop(&mut self) {
        // A slot that KVM does not give back is not used again.
        if self.place(None) {
            self.slots.free.lock().push(self.slot);
        }
    }
}
