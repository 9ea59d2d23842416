// SPDX-License-Identifier: MIT OR Apache-2.0
//! Jobs: what an engine does with a context's memory.
//!
//! A queue is a ring of 64-byte jobs in guest memory, taken in order. A job that faults is parked with its queue and begins
//! again where it stopped once the fault is replayed; other queues go on. Job `n` (not wrapped) is answered by completion
//! `n` modulo the ring's size; then the fence is written, then VECTOR_COMPLETION raised unless FLAG_NO_IRQ.
//!
//! All addresses and lengths are multiples of 8 and words are u64. The word at byte offset `o` of a pattern
//! (FILL, CHECK) is `operand0 + (o / 8) * operand1`, wrapping.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A job as it lies in guest memory, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Job {
    /// One of the `OP_` constants.
    pub op: u16,
    /// `FLAG_` bits.
    pub flags: u16,
    /// Must be zero.
    pub reserved: u32,
    /// Written to the queue's fence when the job is done.
    pub fence: u64,
    /// Destination address.
    pub dst: u64,
    /// Source address.
    pub src: u64,
    /// Bytes, or number of accesses.
    pub len: u64,
    /// Operands, by job.
    pub operand: [u64; 3],
}

/// A completion as it lies in guest memory, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Completion {
    /// The job's fence.
    pub fence: u64,
    /// `JOB_` constant; written last. The driver zeroes it before it reuses the entry.
    pub status: u32,
    /// Low half of the job's index plus one, never 0 by itself a proof: `status` is.
    pub sequence: u32,
    /// By job: mismatches, sum of what was read, ...
    pub result: u64,
    /// By job and status: address of the first mismatch, or the address that faulted.
    pub address: u64,
}

/// Size of a job in bytes.
pub const JOB_BYTES: usize = size_of::<Job>();
/// Size of a completion in bytes.
pub const COMPLETION_BYTES: usize = size_of::<Completion>();
/// Largest `len` of a job, in bytes or accesses.
pub const MAX_LEN: u64 = 1 << 32;

crate::constants! {
    /// Only writes its fence.
    OP_NOP: u16 = 1;
    /// Writes the pattern (operand0, operand1) to dst, len bytes.
    OP_FILL: u16 = 2;
    /// Copies len bytes from src to dst; the ranges must not overlap.
    OP_COPY: u16 = 3;
    /// Compares src, len bytes, with the pattern (operand0, operand1). Result: words that differ; address: the first.
    OP_CHECK: u16 = 4;
    /// Compares src with dst, len bytes. Result: words that differ; address: the first, in src.
    OP_COMPARE: u16 = 5;
    /// Adds operand0 atomically to the word at dst + i * operand1, for i < len (accesses). Result: sum of the old values.
    OP_ATOMIC_ADD: u16 = 6;
    /// Accesses the word at dst + i * operand1, for i < len: writes operand0 + i with FLAG_WRITE, else reads. Result: sum of what was read.
    OP_STRIDED: u16 = 7;
    /// Accesses len words of [dst, dst + operand1) in the order of a generator seeded by operand0: xors operand2 ^ index into it with FLAG_WRITE, else reads. Result: sum of what was read.
    OP_RANDOM: u16 = 8;

    /// STRIDED, RANDOM: write.
    FLAG_WRITE: u16 = 1 << 0;
    /// No interrupt when it is done.
    FLAG_NO_IRQ: u16 = 1 << 1;

    /// Completion: done.
    JOB_OK: u32 = 1;
    /// Completion: its fault was cancelled; address says where.
    JOB_FAULT: u32 = 2;
    /// Completion: ended by CTX_KILL, CTX_RELEASE, QUEUE_DESTROY or a reset. Its interrupt may come after that command has completed.
    JOB_KILLED: u32 = 3;
    /// Completion: the job was not well formed.
    JOB_BAD: u32 = 4;
    /// Completion: a translation led outside guest memory and VRAM, or the engine has failed. What was to be written may be written in part or not at all.
    JOB_BUS_ERROR: u32 = 5;
}

/// Index of access `i` of an OP_RANDOM job over `words` words: a splitmix64 step of `seed + i`, modulo `words`.
///
/// Shared with the workloads, which replay it on their model.
#[must_use]
pub fn random_index(seed: u64, i: u64, words: u64) -> u64 {
    let mut z = seed.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % words.max(1)
}
