// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the device counts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

/// The device's counters since it was made; a reset of the function keeps them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GpuCounters {
    /// Translations used: one per operand and step, or per element.
    pub accesses: u64,
    /// Distinct (context, leaf) pairs that were translated.
    pub distinct_pages: u64,
    /// Translations not found in a TLB.
    pub tlb_misses: u64,
    /// Page-table walks, those that ended in a fault included.
    pub walks: u64,
    /// INVALIDATE commands over something the device had.
    pub invalidations: u64,
    /// Faults raised.
    pub faults: u64,
    /// Times that a fault found the fault buffer full.
    pub fault_overflows: u64,
    /// Contexts bound.
    pub contexts: u64,
    /// Bytes read and written by jobs.
    pub bytes_moved: u64,
    /// Jobs completed, whatever their status.
    pub jobs: u64,
    /// Of these, begun and cut off: their queue or context was taken away while they ran or waited for a fault.
    pub jobs_cut_off: u64,
    /// Commands taken from the ring.
    pub commands: u64,
    /// Register accesses refused.
    pub bad_accesses: u64,
    /// Handles that were not live.
    pub bad_handles: u64,
    /// Interrupts raised.
    pub interrupts: u64,
}

/// What each engine counts for itself, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct EngineCounters {
    pub(crate) accesses: AtomicU64,
    pub(crate) tlb_misses: AtomicU64,
    pub(crate) walks: AtomicU64,
    pub(crate) bytes_moved: AtomicU64,
}

/// What is counted by whoever does it.
#[derive(Debug, Default)]
pub(crate) struct DeviceCounters {
    /// Of contexts that are gone.
    pub(crate) distinct_pages: AtomicU64,
    pub(crate) invalidations: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) contexts: AtomicU64,
    pub(crate) jobs: AtomicU64,
    pub(crate) jobs_cut_off: AtomicU64,
    pub(crate) commands: AtomicU64,
    pub(crate) bad_accesses: AtomicU64,
    pub(crate) bad_handles: AtomicU64,
}

/// Adds to a counter.
#[inline]
pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}
