// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the witness module reports.
//!
//! A CPU fills its own 64-byte slot with interrupts off, then writes the slot's number to EVENT. That write returns only when
//! the host has read and judged the record.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A record as it lies in guest memory, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// One of the constants below.
    pub kind: u32,
    /// CPU that reports.
    pub cpu: u32,
    /// Address-space id, from 1 up and never reused, or 0.
    pub mm: u64,
    /// By kind.
    pub arg: [u64; 4],
    /// Thread id of the task.
    pub pid: u32,
    /// Thread-group id of the task.
    pub tgid: u32,
    /// Guest time (ktime_get_ns), for people.
    pub time_ns: u64,
}

/// Size of a record in bytes.
pub const RECORD_BYTES: usize = size_of::<Record>();
/// Longest message in bytes.
pub const MAX_MESSAGE: u64 = 64 * 1024;

crate::constants! {
    /// The module is loaded: arg0 its interface version, arg1 LINUX_VERSION_CODE, arg2 number of CPUs, arg3 1 = fprobe, 2 = kretprobe.
    HELLO: u32 = 1;
    /// A tenth of a second of guest time went by for an ordinary thread: arg0 count, arg1 probes missed so far, arg2 tasks in uninterruptible sleep if known.
    HEARTBEAT: u32 = 2;
    /// An address space is mirrored for the first time: arg0 1 = list notifier, 2 = interval notifier, arg1 physical address of its top page table (mm->pgd).
    MM_BEGIN: u32 = 3;
    /// __mmu_notifier_release has returned for it.
    MM_RELEASED: u32 = 4;
    /// After that, the start of exit's own full-range UNMAP has returned.
    MM_UNMAPPED: u32 = 5;
    /// Its subscriptions are destroyed: the id ends.
    MM_END: u32 = 6;
    /// The running task's address space is mirrored by context handle arg0.
    ASSOCIATE: u32 = 7;
    /// A message of the guest's agent: arg0 bus address, arg1 bytes.
    MESSAGE: u32 = 8;
    /// The module is being unloaded: arg0 probes missed in all.
    BYE: u32 = 9;
    /// A notifier was inserted for it by the running task: arg0 1 = list, 2 = interval.
    NOTIFIER_ADDED: u32 = 10;
    /// A notifier was removed from it: arg0 1 = list, 2 = interval.
    NOTIFIER_REMOVED: u32 = 11;
    /// The module is about to be unloaded, and for a second no task has used it; yet it has not been released.
    MM_STRANDED: u32 = 12;
}
