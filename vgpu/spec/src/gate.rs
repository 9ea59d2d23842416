// SPDX-License-Identifier: MIT OR Apache-2.0
//! Gates: named points where a task of the guest waits until the host lets it go on.
//!
//! A task that comes to a gate takes a *slot*, reports [`REACHED`] with it, and polls the slot's register (`GATE` of
//! [`crate::regs::witness`]) until it reads one. What stops there, and what is only recorded, the scenario says.
//!
//! In the records below arg1 and arg2 hold the *role* of the task, 16 bytes, the first in the lowest byte, filled up with zeros.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How many tasks can wait at gates at once.
pub const SLOTS: usize = 64;
/// How many gates and watched functions a scenario can have.
pub const SITES: usize = 64;
/// Bytes of a role's name; the last is zero.
pub const ROLE_BYTES: usize = 16;
/// Bytes of a place's name; the last is zero.
pub const PLACE_BYTES: usize = 72;
/// In arg0 of [`REACHED`]: the task does not wait, and has no slot.
pub const NO_SLOT: u64 = 0xffff;

/// [`Site::flags`]: only recorded, nobody waits.
pub const SITE_RECORD: u32 = 1 << 0;
/// [`Site::flags`]: not a gate but a function that is watched for tasks asleep in it.
pub const SITE_WATCH: u32 = 1 << 1;
/// [`Site::flags`]: opened in the guest (`HMM_WITNESS_GATE_OPEN`); the host is told, and not asked.
pub const SITE_LOCAL: u32 = 1 << 2;

crate::constants! {
    /// A repetition of a scenario begins: arg0 its number, arg1 a bit for each site that there is, arg2 a bit for each that the guest itself opens.
    ARMED: u32 = 0x40;
    /// It has ended: arg0 its number.
    DISARMED: u32 = 0x41;
    /// A task has come to a gate: arg0 site in bits 0-15, slot in bits 16-31, bit 32: it spins, bit 33: it does not wait; arg3 the function's first argument, or what it returns.
    REACHED: u32 = 0x42;
    /// A task goes on: arg0 site in bits 0-15, slot in bits 16-31, why in bits 32-39 (PASS_*).
    PASSED: u32 = 0x43;
    /// A task has been asleep in a watched function for two looks: arg0 site, arg3 its thread id.
    BLOCKED: u32 = 0x44;
    /// A task that was reported as blocked has left the function: arg0 site, arg3 its thread id.
    LEFT: u32 = 0x45;
    /// A task has a role, or none any more: arg3 its thread id, arg0 bit 0: it has ended.
    ROLE: u32 = 0x46;
    /// In PASSED: the host let it go on.
    PASS_OPENED: u32 = 0;
    /// In PASSED: it waited for as many heartbeats as a gate may stay closed.
    PASS_LIMIT: u32 = 1;
    /// In PASSED: it could not sleep there, and had spun for a millisecond.
    PASS_SPUN: u32 = 2;
    /// In PASSED: it could not sleep there, and no CPU would have been left to open the gate.
    PASS_NO_CPU: u32 = 3;
    /// In PASSED: the repetition has ended.
    PASS_OVER: u32 = 4;
    /// In PASSED: the guest itself opened the gate.
    PASS_LOCAL: u32 = 5;
}

/// The kinds of records above, as far as they are records.
pub const RECORDS: &[u32] = &[ARMED, DISARMED, REACHED, PASSED, BLOCKED, LEFT, ROLE];

/// `HMM_WITNESS_GATE_ADD` (nr 2, write): a place becomes a site. ENOENT: there is no such function, or it cannot be traced; EOPNOTSUPP: this kernel
/// has no direct calls from ftrace; EEXIST: there is one of this sort already; ENOSPC; EPERM: only init and its workloads may.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Site {
    /// In: its number, below [`SITES`].
    pub id: u32,
    /// In: SITE_*.
    pub flags: u32,
    /// In: `entry:FUNCTION`, `return:FUNCTION`, `offset:FUNCTION+0xN`, `user:NAME`.
    pub place: [u8; PLACE_BYTES],
    /// In: role of a task that has none when it comes here, or empty; with SITE_LOCAL: the only role whose tasks are held here.
    pub gives: [u8; ROLE_BYTES],
}

/// `HMM_WITNESS_GATE_ARM` (nr 3, write): a repetition begins.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Arm {
    /// In: its number.
    pub iteration: u64,
    /// In: heartbeats after which a gate lets go by itself.
    pub limit: u32,
    /// In: must be zero.
    pub reserved: u32,
}

/// `HMM_WITNESS_GATE_DISARM` (nr 4): the repetition has ended, everybody goes on.
pub const NR_DISARM: u8 = 4;
/// `HMM_WITNESS_GATE_CLEAR` (nr 5): all sites are taken away. EBUSY: a task does not leave a function that was being watched.
pub const NR_CLEAR: u8 = 5;

/// `HMM_WITNESS_ROLE` (nr 6, write): the calling thread has this role from now on; empty: none.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Role {
    /// In: its name.
    pub name: [u8; ROLE_BYTES],
}

/// `HMM_WITNESS_GATE_POINT` (nr 7, write): a gate in user space, `user:NAME`; passes at once if no such site is armed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Point {
    /// In: its name.
    pub name: [u8; 32],
}

/// `HMM_WITNESS_GATE_LOCAL` (nr 8, read+write): looks at a site that is opened in the guest, and opens or closes it.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Local {
    /// In: the site.
    pub id: u32,
    /// In: 0 look, 1 open, 2 close, 3 let one task through.
    pub what: u32,
    /// Out: tasks that wait there.
    pub waiting: u32,
    /// Out: tasks that have come there since it was armed.
    pub reached: u32,
}
