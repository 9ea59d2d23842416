// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ioctls of the reference driver (`/dev/hmm_vgpu`) and of the witness (`/dev/hmm_witness`), as Rust sees them.
//!
//! The C side is guest/include/hmm_vgpu_uapi.h. Each size is part of its ioctl's number, so a layout of another size is refused.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Path of the driver's character device.
pub const DRIVER_DEVICE: &str = "/dev/hmm_vgpu";
/// Path of the witness's character device.
pub const WITNESS_DEVICE: &str = "/dev/hmm_witness";
/// The driver's ioctl type byte.
pub const DRIVER_MAGIC: u8 = b'v';
/// The witness's ioctl type byte.
pub const WITNESS_MAGIC: u8 = b'w';

/// Queues of a context.
pub const QUEUES: u32 = 2;
/// How many of a queue's newest jobs can be asked about.
pub const RESULTS: u64 = 256;
/// [`Query::state`]: the context is bound.
pub const STATE_BOUND: u32 = 1;

/// `HMM_VGPU_BIND` (nr 1, read+write): binds the file to the caller's address space. Once a file. EBUSY if bound, ENOSPC if no context is free.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Bind {
    /// In: must be zero.
    pub flags: u64,
    /// Out: context handle.
    pub ctx: u64,
}

/// `HMM_VGPU_SUBMIT` (nr 2, read+write): queues one job. EPERM if the caller's address space is not the bound one, EAGAIN if the queue is full, ESRCH if the address space has been released.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Submit {
    /// In: job op, see [`crate::job`].
    pub op: u16,
    /// In: job flags.
    pub flags: u16,
    /// In: which of the context's queues, 0 or 1.
    pub queue: u32,
    /// In: destination.
    pub dst: u64,
    /// In: source.
    pub src: u64,
    /// In: length.
    pub len: u64,
    /// In: operands.
    pub operand: [u64; 3],
    /// Out: fence to wait for; ascending in each queue from 1.
    pub fence: u64,
}

/// `HMM_VGPU_WAIT` (nr 3, read+write): waits for a fence. ETIME on timeout, EINTR on a signal. Results are kept for the last 256 jobs of a queue.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Wait {
    /// In: fence.
    pub fence: u64,
    /// In: how long at the most, ns; 0 only asks.
    pub timeout_ns: u64,
    /// In: which queue.
    pub queue: u32,
    /// Out: JOB_ status.
    pub status: u32,
    /// Out: result.
    pub result: u64,
    /// Out: address.
    pub address: u64,
}

/// `HMM_VGPU_QUERY` (nr 4, read): what the driver counts for this file's context.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Query {
    /// Context handle, or 0.
    pub ctx: u64,
    /// 0 unbound, 1 bound, 2 released.
    pub state: u32,
    /// Number of queues a context has.
    pub queues: u32,
    /// Faults served (mapped and replayed).
    pub faults_served: u64,
    /// Faults cancelled.
    pub faults_cancelled: u64,
    /// Times a fault was tried again because an invalidation came in between.
    pub fault_retries: u64,
    /// Invalidate callbacks.
    pub invalidations: u64,
    /// Pages mapped at the moment, in 4 KiB.
    pub mapped_pages: u64,
    /// 2 MiB leaves written so far.
    pub huge_maps: u64,
    /// Pages of VRAM the context has at the moment.
    pub device_pages: u64,
    /// Pages that a CPU's access has brought back from there.
    pub cpu_faults: u64,
}

/// What memory is filled with whose contents were lost with the device.
pub const POISON: u8 = 0xd7;

/// `HMM_VGPU_MIGRATE_TO_DEVICE` (nr 6) and `_TO_SYSTEM` (nr 7), read+write: migrates a range of the caller's addresses. What cannot
/// be migrated, or finds no room, stays. EOPNOTSUPP where the kernel has no device-private memory.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Migrate {
    /// In: first address, a multiple of the page size.
    pub addr: u64,
    /// In: bytes, likewise.
    pub len: u64,
    /// In: must be zero.
    pub flags: u64,
    /// Out: pages migrated.
    pub migrated: u64,
}

/// `HMM_VGPU_UNBIND` (nr 5, no argument): unregisters the context, as close does. ENXIO if not bound.
pub const NR_UNBIND: u8 = 5;

/// Policies of the driver's mirror layer, as [`Layer::policy`] has them.
pub mod policy {
    /// The driver's backend is another.
    pub const NONE: u64 = 0;
    /// Release drops the semaphore around each callback.
    pub const DROP_LOCK: u64 = 1;
    /// Release holds it for reading.
    pub const READ_HELD: u64 = 2;
    /// The list is walked under SRCU.
    pub const SRCU: u64 = 3;
    /// The same, and unregister does not wait.
    pub const SRCU_NOWAIT: u64 = 4;
}

/// `HMM_VGPU_LAYER` (nr 32, read): what the mirror layer has counted since the driver was loaded; all zero on another backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Layer {
    /// One of [`policy`].
    pub policy: u64,
    /// Mirrors registered.
    pub registered: u64,
    /// Mirrors unregistered.
    pub unregistered: u64,
    /// Release callbacks called.
    pub releases: u64,
    /// Of these, not the first of their mirror.
    pub releases_again: u64,
    /// Invalidations refused because they must not sleep.
    pub refused: u64,
}

/// What [`Act::op`] may be.
pub mod act {
    /// Migrate the page at `addr` to another page, the device lock held around all of it.
    pub const MIGRATE_WIDE: u32 = 1;
    /// The same, the device lock held for the device's mapping only.
    pub const MIGRATE_NARROW: u32 = 2;
    /// At release, wait for work that unmaps the file `fd` everywhere.
    pub const RELEASE_WAITS: u32 = 3;
    /// At release, unregister the mirror from within its callback.
    pub const RELEASE_UNREGISTERS: u32 = 4;
    /// Let the address space's users go while a fault's range is registered.
    pub const RANGE_UNHELD: u32 = 5;
}

/// `HMM_VGPU_ACT` (nr 33, write): has the driver do what a scenario is about. ENOTTY if its backend cannot, ENXIO if not bound,
/// EPERM from another address space, EBUSY if the page could not be migrated.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Act {
    /// One of [`act`].
    pub op: u32,
    /// By op.
    pub fd: i32,
    /// By op.
    pub addr: u64,
}

/// `HMM_WITNESS_STABLE_BEGIN` (nr 16, write) and `HMM_WITNESS_STABLE_END` (nr 17, write): until the end the caller's range stays mapped and can be read and written, so that no fault of the device in it may be fatal. EINVAL if it ends before it begins, ESRCH as for ASSOCIATE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stable {
    /// First address.
    pub start: u64,
    /// Last address, inclusive.
    pub last: u64,
    /// At the end: 1 if the promise was kept, so that what was found counts; 0 if it is taken back.
    pub kept: u64,
}

/// `HMM_WITNESS_ASSOCIATE` (nr 1, write): the caller's address space is mirrored by this context. ESRCH if the witness has seen no notifier for it.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Associate {
    /// Context handle.
    pub ctx: u64,
}
