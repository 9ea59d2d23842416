// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command ring: page-table updates, grants, invalidations, faults' answers, contexts and queues.
//!
//! A command is 64 bytes in guest memory. The device takes commands in order and never waits for an engine, a fault or the
//! guest while it does; RELEASE, KILL, INVALIDATE and QUEUE_DESTROY *complete* only when the accesses they concern have drained.
//! The device writes `status` and `result` into the slot, then the index behind the last completed command to CMD_DONE.
//! Completion is reported in ring order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A command as it lies in guest memory, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Command {
    /// One of the `OP_` constants.
    pub op: u16,
    /// Must be zero.
    pub flags: u16,
    /// Written by the device: a `STATUS_` constant.
    pub status: u32,
    /// Context handle, or 0 where the command has none.
    pub ctx: u64,
    /// Arguments, by command.
    pub arg: [u64; 5],
    /// Written by the device: the handle made, or zero.
    pub result: u64,
}

/// Size of a command in bytes.
pub const COMMAND_BYTES: usize = size_of::<Command>();

crate::constants! {
    /// Nothing.
    OP_NOP: u16 = 1;
    /// Binds a free context: arg0 a tag of the driver's own (a PASID). Result: context handle. Free -> Bound.
    OP_CTX_BIND: u16 = 2;
    /// Sets the context's root: arg0 table page handle, or 0 for none.
    OP_CTX_SET_ROOT: u16 = 3;
    /// Stops the context for good: jobs end with JOB_KILLED, faults are cancelled, its TLB entries go, nothing is translated any more. Bound -> Released. Completes when its accesses have drained.
    OP_CTX_RELEASE: u16 = 4;
    /// Ends the context's jobs with JOB_KILLED and cancels its faults; it stays Bound. Completes when drained.
    OP_CTX_KILL: u16 = 5;
    /// Frees the context. Released -> Free. Everything granted must have been returned and every queue destroyed.
    OP_CTX_UNBIND: u16 = 6;
    /// Grants a VRAM page to the context: arg0 PAGE_TABLE or PAGE_DATA, arg1 its index. A table page is cleared. Result: page handle.
    OP_GRANT: u16 = 7;
    /// Returns a VRAM page: arg0 page handle.
    OP_RETURN: u16 = 8;
    /// Writes table entries: arg0 table page handle, arg1 first | count << 16, arg2 bus address of `count` u64, 8-byte aligned.
    OP_WRITE_PTES: u16 = 9;
    /// Writes one table entry: arg0 table page handle, arg1 index, arg2 the entry.
    OP_WRITE_PTE: u16 = 10;
    /// Clears table entries: arg0 table page handle, arg1 first | count << 16.
    OP_CLEAR_PTES: u16 = 11;
    /// Drops the TLB entries of [arg0, arg1] (arg1 inclusive). Completes when accesses in flight on them have drained.
    OP_INVALIDATE: u16 = 12;
    /// Makes a queue: arg0 bus address of its ring, arg1 log2 of its entries (2 to 10), arg2 bus address of its completion ring, arg3 bus address of its u64 fence or 0. Result: queue handle.
    OP_QUEUE_CREATE: u16 = 13;
    /// Destroys a queue: arg0 queue handle. Jobs not done end with JOB_KILLED. Completes when drained.
    OP_QUEUE_DESTROY: u16 = 14;
    /// Lets a parked access try again: arg0 fault handle, or 0 for all of the context.
    OP_FAULT_REPLAY: u16 = 15;
    /// Ends the job of a parked access with JOB_FAULT: arg0 fault handle, or 0 for all of the context.
    OP_FAULT_CANCEL: u16 = 16;
    /// Raises VECTOR_EVENT when every command before it has completed.
    OP_INTERRUPT: u16 = 17;

    /// `OP_CTX_BIND` arg0: the context is the driver's own, for copies say, and mirrors no address space.
    TAG_NONE: u64 = 0;

    /// `OP_GRANT` arg0: a page for page tables.
    PAGE_TABLE: u16 = 1;
    /// `OP_GRANT` arg0: a data page of BAR2.
    PAGE_DATA: u16 = 2;

    /// Not done yet.
    STATUS_PENDING: u32 = 0;
    /// Done.
    STATUS_OK: u32 = 1;
    /// No such command, or reserved fields set.
    STATUS_BAD_COMMAND: u32 = 2;
    /// A handle is stale or made up.
    STATUS_BAD_HANDLE: u32 = 3;
    /// An argument is out of range.
    STATUS_BAD_ARGUMENT: u32 = 4;
    /// The context or page is not in the state the command needs.
    STATUS_BAD_STATE: u32 = 5;
    /// Nothing free.
    STATUS_NO_SPACE: u32 = 6;
    /// A bus address is not guest memory.
    STATUS_BAD_ADDRESS: u32 = 7;
}
