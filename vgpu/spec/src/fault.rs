// SPDX-License-Identifier: MIT OR Apache-2.0
//! The replayable fault buffer.
//!
//! A ring of 64-byte entries in guest memory. The device writes an entry, then FAULT_PUT (register and write-back), then
//! raises VECTOR_FAULT. When FAULT_PUT - FAULT_GET equals the size it sets FAULT_OVERFLOW instead; the access stays parked and
//! its entry is written once the flag has been cleared and there is room.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A fault as it lies in guest memory, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FaultEntry {
    /// Fault handle, for REPLAY and CANCEL.
    pub fault: u64,
    /// Context handle.
    pub ctx: u64,
    /// Address of the access.
    pub va: u64,
    /// ACCESS_* bits.
    pub access: u32,
    /// A REASON_ constant.
    pub reason: u32,
    /// Queue handle.
    pub queue: u64,
    /// The job's fence.
    pub fence: u64,
    /// Bytes the access wants from `va` on; a hint for fault-around, at least 8.
    pub bytes: u64,
    /// How often this access has faulted before.
    pub retries: u32,
    /// Zero.
    pub reserved: u32,
}

/// Size of an entry in bytes.
pub const FAULT_BYTES: usize = size_of::<FaultEntry>();

crate::constants! {
    /// The access reads.
    ACCESS_READ: u32 = 1 << 0;
    /// The access writes.
    ACCESS_WRITE: u32 = 1 << 1;
    /// The access is atomic.
    ACCESS_ATOMIC: u32 = 1 << 2;
    /// Nothing is mapped there.
    REASON_ABSENT: u32 = 1;
    /// The leaf lacks the right.
    REASON_RIGHTS: u32 = 2;
    /// An entry on the way is malformed or leads to a page that is not the context's.
    REASON_MALFORMED: u32 = 3;
    /// The context has no root.
    REASON_NO_ROOT: u32 = 4;
}
