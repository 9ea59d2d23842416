// SPDX-License-Identifier: MIT OR Apache-2.0
//! The register table of the GPU's BAR0 and of the witness's BAR0.
//!
//! Registers are 32 bits wide and naturally aligned; an access of another width or alignment reads zero, writes nothing and
//! is counted. 64-bit values are pairs `_LO`, `_HI`; they take effect when the register that names them is next used.

/// Who may write a register, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes are ignored.
    ReadOnly,
    /// The bits of the mask can be written.
    ReadWrite(u32),
    /// Writing one to a bit of the mask clears it.
    WriteOneToClear(u32),
    /// Reads as zero; a write acts.
    WriteOnly,
}

/// One register, or an array of them.
#[derive(Clone, Copy, Debug)]
pub struct Register {
    /// Name as in the C header, without prefix.
    pub name: &'static str,
    /// Byte offset in the BAR.
    pub offset: u32,
    /// How many there are; 1 for a single register. Elements are 4 bytes apart.
    pub count: u32,
    /// Access rights.
    pub access: Access,
    /// Value after reset.
    pub reset: u32,
    /// What it is, one line.
    pub doc: &'static str,
}

macro_rules! registers {
    ($(#[doc = $ldoc:literal])+ $list:ident;
     $($(#[doc = $doc:literal])+ $name:ident @ $offset:literal $([$count:literal])?: $access:expr $(, reset $reset:expr)?;)+) => {
        $($(#[doc = $doc])+ pub const $name: u32 = $offset;)+
        $(#[doc = $ldoc])+
        pub const $list: &[Register] = &[$(Register {
            name: stringify!($name),
            offset: $offset,
            count: 1 $(* $count)?,
            access: $access,
            reset: 0 $(+ $reset)?,
            doc: concat!($($doc),+),
        }),+];
    };
}

use Access::{ReadOnly, ReadWrite, WriteOneToClear, WriteOnly};
const ALL: u32 = u32::MAX;

/// The GPU's registers (BAR0).
pub mod gpu {
    use super::*;

    /// Size of BAR0 in bytes.
    pub const BAR_BYTES: u64 = 0x1_0000;
    /// Offset in BAR0 of the window to the table page that `WINDOW_PAGE` selects; 4 KiB, accessed in 4 or 8 bytes.
    pub const WINDOW: u32 = 0x8000;
    /// Value of `ID`: "HMMG" read as little endian.
    pub const ID_VALUE: u32 = 0x474d_4d48;
    /// Value of `VERSION`: this programming interface.
    pub const VERSION_VALUE: u32 = 1;
    /// `CTRL`: commands, faults and engines run.
    pub const CTRL_ENABLE: u32 = 1 << 0;
    /// `CTRL`: resets the function; reads as zero.
    pub const CTRL_RESET: u32 = 1 << 1;
    /// `FAULT_STATUS`: a fault found the buffer full. Once it is cleared the device records those faults anew.
    pub const FAULT_OVERFLOW: u32 = 1 << 0;
    /// `ERROR`: the command ring is not usable (bad address, bad size or bad index).
    pub const ERROR_CMD_RING: u32 = 1 << 0;
    /// `ERROR`: the fault buffer is not usable.
    pub const ERROR_FAULT_BUFFER: u32 = 1 << 1;
    /// `ERROR`: a queue's ring or completion ring is not usable, or its doorbell is ahead by more than the ring holds.
    pub const ERROR_QUEUE: u32 = 1 << 2;
    /// `ERROR`: a doorbell named a queue that does not exist (any more).
    pub const ERROR_DOORBELL: u32 = 1 << 3;
    /// `CAPS`: device atomics on system memory are coherent with the CPU's.
    pub const CAP_COHERENT_ATOMICS: u32 = 1 << 0;

    /// Interrupt vector of the fault buffer (a new entry, or an overflow).
    pub const VECTOR_FAULT: u32 = 0;
    /// Interrupt vector of job completions.
    pub const VECTOR_COMPLETION: u32 = 1;
    /// Interrupt vector of errors and of the INTERRUPT command.
    pub const VECTOR_EVENT: u32 = 2;
    /// How many vectors there are. With fewer (MSI), vector `n` arrives as `n % count`.
    pub const VECTORS: u32 = 3;

    /// Number of queue doorbells, and so the largest number of queues.
    pub const MAX_QUEUES: u32 = 256;

    registers! {
        /// Every register of the GPU's BAR0, in order of offset.
        REGISTERS;
        /// Identification, "HMMG".
        ID @ 0x000: ReadOnly, reset ID_VALUE;
        /// Version of the programming interface.
        VERSION @ 0x004: ReadOnly, reset VERSION_VALUE;
        /// Capability bits (CAP_*).
        CAPS @ 0x008: ReadOnly;
        /// Number of contexts.
        CONTEXTS @ 0x00c: ReadOnly;
        /// Number of engines.
        ENGINES @ 0x010: ReadOnly;
        /// Number of queues.
        QUEUES @ 0x014: ReadOnly;
        /// Number of 4 KiB table pages.
        TABLE_PAGES @ 0x018: ReadOnly;
        /// Number of 4 KiB data pages of VRAM (BAR2).
        DATA_PAGES @ 0x01c: ReadOnly;
        /// Control: CTRL_ENABLE, CTRL_RESET.
        CTRL @ 0x020: ReadWrite(CTRL_ENABLE | CTRL_RESET);
        /// Interrupt causes pending, bit = vector; a bit stays until it is cleared.
        IRQ_STATUS @ 0x028: WriteOneToClear(0x7);
        /// Interrupt causes that may raise a message, bit = vector.
        IRQ_ENABLE @ 0x02c: ReadWrite(0x7);
        /// What went wrong (ERROR_*).
        ERROR @ 0x030: WriteOneToClear(0xf);
        /// Command ring: bus address, low half. 64-byte aligned.
        CMD_BASE_LO @ 0x040: ReadWrite(ALL);
        /// Command ring: bus address, high half.
        CMD_BASE_HI @ 0x044: ReadWrite(ALL);
        /// Command ring: log2 of the number of 64-byte commands, 4 to 16. Writing it starts the ring at index 0.
        CMD_SIZE @ 0x048: ReadWrite(0x1f);
        /// Command ring doorbell: the index (not wrapped, modulo 2^32) behind the last command written. A command has its place until it has completed.
        CMD_TAIL @ 0x04c: ReadWrite(ALL);
        /// The index behind the last command taken from the ring.
        CMD_HEAD @ 0x050: ReadOnly;
        /// Bus address, low half, of the u32 where the device writes the index behind the last *completed* command. In order.
        CMD_DONE_LO @ 0x058: ReadWrite(ALL);
        /// High half of it. 0:0 turns the write-back off.
        CMD_DONE_HI @ 0x05c: ReadWrite(ALL);
        /// Fault buffer: bus address, low half. 64-byte aligned.
        FAULT_BASE_LO @ 0x080: ReadWrite(ALL);
        /// Fault buffer: bus address, high half.
        FAULT_BASE_HI @ 0x084: ReadWrite(ALL);
        /// Fault buffer: log2 of the number of 64-byte entries, 2 to 12. Writing it empties the buffer.
        FAULT_SIZE @ 0x088: ReadWrite(0x1f);
        /// The index (not wrapped) behind the last entry the device wrote.
        FAULT_PUT @ 0x08c: ReadOnly;
        /// The index behind the last entry the driver has consumed.
        FAULT_GET @ 0x090: ReadWrite(ALL);
        /// FAULT_OVERFLOW.
        FAULT_STATUS @ 0x094: WriteOneToClear(0x1);
        /// Bus address, low half, of the u32 where the device writes FAULT_PUT. 0:0 turns it off.
        FAULT_PUT_WB_LO @ 0x098: ReadWrite(ALL);
        /// High half of it.
        FAULT_PUT_WB_HI @ 0x09c: ReadWrite(ALL);
        /// Table page (its index) that the window shows. Debugging only: slow.
        WINDOW_PAGE @ 0x0a0: ReadWrite(0xff_ffff);
        /// How many register accesses were refused (offset, width, alignment, read-only).
        BAD_ACCESSES @ 0x0a4: ReadOnly;
        /// Queue doorbells, by queue index: bits 0-15 the index behind the last job written, modulo 2^16 (a job has its place until it has completed); bits 16-31 the low half of the queue handle's generation.
        QUEUE_DOORBELL @ 0x1000[256]: WriteOnly;
    }
}

/// The witness's registers (BAR0).
pub mod witness {
    use super::*;

    /// Size of BAR0 in bytes.
    pub const BAR_BYTES: u64 = 0x1000;
    /// Value of `ID`: "HMMW".
    pub const ID_VALUE: u32 = 0x574d_4d48;
    /// Value of `VERSION`.
    pub const VERSION_VALUE: u32 = 1;
    /// Largest number of record slots.
    pub const MAX_SLOTS: u32 = 512;
    /// `REQUEST`: dump the stacks of blocked tasks to the console (sysrq w).
    pub const REQUEST_BLOCKED_TASKS: u32 = 1 << 0;
    /// `REQUEST`: dump the stacks of all CPUs that are not idle (sysrq l), and of tasks that could run, to the console.
    pub const REQUEST_ALL_CPUS: u32 = 1 << 1;
    /// `REQUEST`: crash the guest, so that it ends (sysrq c).
    pub const REQUEST_PANIC: u32 = 1 << 2;

    registers! {
        /// Every register of the witness's BAR0, in order of offset.
        REGISTERS;
        /// Identification, "HMMW".
        ID @ 0x000: ReadOnly, reset ID_VALUE;
        /// Version of the programming interface.
        VERSION @ 0x004: ReadOnly, reset VERSION_VALUE;
        /// Record slots: bus address, low half. 64-byte aligned.
        RECORDS_LO @ 0x008: ReadWrite(ALL);
        /// Record slots: bus address, high half.
        RECORDS_HI @ 0x00c: ReadWrite(ALL);
        /// Number of 64-byte record slots, one a CPU.
        SLOTS @ 0x010: ReadWrite(0x3ff);
        /// A write of n: slot n holds a record. The write returns to the CPU only after the record has been judged.
        EVENT @ 0x014: WriteOnly;
        /// What the host asks of the guest (REQUEST_*); read at each heartbeat, cleared by reading.
        REQUEST @ 0x018: ReadOnly;
        /// How many records were refused.
        BAD_RECORDS @ 0x01c: ReadOnly;
        /// Gate slots: 1 when the task that waits in the slot may go on.
        GATE @ 0x100[64]: ReadOnly;
    }
}
