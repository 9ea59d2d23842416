// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the device tells the oracle, and what the oracle may ask of the device.

use std::fmt;

use vgpu_spec::handle::Handle;

/// What was still held by somebody who let go. All zero when clean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leak {
    /// Table pages granted and not returned.
    pub table_pages: u32,
    /// Data pages of VRAM granted and not returned.
    pub data_pages: u32,
    /// Queues not destroyed.
    pub queues: u32,
    /// Faults neither replayed nor cancelled.
    pub faults: u32,
    /// One of the pages left, or no handle.
    pub page: Handle,
    /// An address that page belongs to, where the tables tell.
    pub va: Option<u64>,
}

impl Leak {
    /// Nothing is left.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.table_pages == 0 && self.data_pages == 0 && self.queues == 0 && self.faults == 0
    }
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = false;
        for (count, one, many) in [
            (self.table_pages, "table page", "table pages"),
            (self.data_pages, "data page", "data pages"),
            (self.queues, "queue", "queues"),
            (self.faults, "fault", "faults"),
        ] {
            if count > 0 {
                let comma = if rest { ", " } else { "" };
                write!(f, "{comma}{count} {}", if count == 1 { one } else { many })?;
                rest = true;
            }
        }
        if !rest {
            f.write_str("nothing")?;
        }
        if self.page != Handle::NONE {
            write!(f, " (first: {})", self.page)?;
        }
        Ok(())
    }
}

/// Why the device cannot use a ring or buffer that the driver has given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// Address or size of the command ring make no sense.
    CommandArea,
    /// CMD_TAIL is ahead by more than the ring holds.
    CommandTail,
    /// The command ring, or the word where CMD_DONE goes, is not memory.
    CommandMemory,
    /// Address or size of the fault buffer make no sense.
    FaultArea,
    /// The fault buffer, or the word where FAULT_PUT goes, is not memory.
    FaultMemory,
    /// The doorbell is ahead by more than the queue holds.
    QueueTail,
    /// The queue's ring, its completions or its fence are not memory.
    QueueMemory,
}

impl Unusable {
    /// What has been memory may be so no longer, when the device is taken away.
    pub(super) fn is_memory(self) -> bool {
        matches!(self, Self::CommandMemory | Self::FaultMemory | Self::QueueMemory)
    }

    /// All of them, by number.
    pub(super) const ALL: [Self; 7] = [
        Self::CommandArea,
        Self::CommandTail,
        Self::CommandMemory,
        Self::FaultArea,
        Self::FaultMemory,
        Self::QueueTail,
        Self::QueueMemory,
    ];
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CommandArea => "address or size of the command ring make no sense",
            Self::CommandTail => "CMD_TAIL is ahead by more than the command ring holds",
            Self::CommandMemory => "the command ring, or the word where CMD_DONE goes, is not memory",
            Self::FaultArea => "address or size of the fault buffer make no sense",
            Self::FaultMemory => "the fault buffer, or the word where FAULT_PUT goes, is not memory",
            Self::QueueTail => "the doorbell is ahead by more than the queue holds",
            Self::QueueMemory => "the queue's ring, completions or fence are not memory",
        })
    }
}

/// Something that happened on the device.
///
/// The device calls [`super::Oracle::event`] with it when it has happened, and before the guest can learn of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// Free -> Bound.
    ContextBound {
        /// The new context.
        ctx: Handle,
        /// The driver's own tag.
        tag: u64,
    },
    /// Bound -> Released: RELEASE has been carried out and drained.
    ContextReleased {
        /// The context.
        ctx: Handle,
    },
    /// RELEASE of a context that had been released.
    ReleaseAgain {
        /// The context.
        ctx: Handle,
    },
    /// Released -> Free.
    ContextUnbound {
        /// The context; from now on its handle is stale.
        ctx: Handle,
        /// What it still held.
        leak: Leak,
    },
    /// A command, doorbell or leaf named a handle that is not live.
    BadHandle {
        /// Which operation.
        op: &'static str,
        /// The handle.
        handle: Handle,
        /// It has been issued once, and is stale; else it was never given out.
        issued_before: bool,
        /// The live context in whose name it was used, if there is one.
        by: Option<Handle>,
        /// An address it came with.
        va: Option<u64>,
    },
    /// A valid leaf was written.
    LeafSet {
        /// Owner of the table page.
        ctx: Handle,
        /// The address it maps, if its table is linked.
        va: Option<u64>,
        /// The entry.
        pte: u64,
    },
    /// Valid leaves were cleared.
    LeafCleared {
        /// Owner of the table page.
        ctx: Handle,
        /// The first address, if the table is linked.
        va: Option<u64>,
        /// How many.
        count: u32,
    },
    /// A page of VRAM was granted.
    DataGranted {
        /// The context that has it now.
        ctx: Handle,
        /// The page.
        page: Handle,
    },
    /// A page of VRAM was returned, or its context was unbound with it.
    DataReturned {
        /// The context that had it.
        ctx: Handle,
        /// The page; its handle is stale now.
        page: Handle,
    },
    /// INVALIDATE was taken from the ring.
    Invalidate {
        /// The context.
        ctx: Handle,
        /// First address.
        start: u64,
        /// Last address, inclusive.
        last: u64,
    },
    /// INVALIDATE has dropped the entries and drained.
    InvalidateDone {
        /// The context.
        ctx: Handle,
        /// First address.
        start: u64,
        /// Last address, inclusive.
        last: u64,
    },
    /// An access faulted and is parked.
    FaultRaised {
        /// The fault.
        fault: Handle,
        /// The context.
        ctx: Handle,
        /// The address.
        va: u64,
        /// `ACCESS_*` bits.
        access: u32,
        /// How often the same access has faulted before, in a row: it was replayed each time, and nothing was done in between.
        again: u32,
    },
    /// The driver had it tried again.
    FaultReplayed {
        /// The fault; its handle is stale now.
        fault: Handle,
        /// The context.
        ctx: Handle,
        /// The address.
        va: u64,
    },
    /// The driver had it fail.
    FaultCancelled {
        /// The fault; its handle is stale now.
        fault: Handle,
        /// The context.
        ctx: Handle,
        /// The address.
        va: u64,
    },
    /// Its context was killed, released or unbound, or its queue destroyed.
    FaultDropped {
        /// The fault; its handle is stale now.
        fault: Handle,
        /// The context.
        ctx: Handle,
        /// The address.
        va: u64,
    },
    /// A job came to its end.
    JobDone {
        /// The context.
        ctx: Handle,
        /// The queue.
        queue: Handle,
        /// A `JOB_` constant.
        status: u32,
    },
    /// A ring or buffer cannot be used, and the device has stopped to use it (ERROR says so to the driver).
    Unusable {
        /// Whose queue it is, or no handle: the device's own.
        ctx: Handle,
        /// The queue, or no handle.
        queue: Handle,
        /// What is wrong.
        why: Unusable,
    },
    /// The driver gives memory back that the device was given as a ring or buffer, and has still.
    ///
    /// The oracle finds this out itself, by asking ([`Inspect::rings`]).
    RingFreed {
        /// What of the device it is.
        ring: RingView,
        /// First address of what is given back.
        start: u64,
        /// Last address, inclusive.
        last: u64,
    },
    /// CTRL_ENABLE was cleared.
    Disabled {
        /// What all contexts together still held.
        leak: Leak,
        /// Contexts not Free.
        contexts_live: u32,
    },
    /// The function was reset: no handle is live.
    Reset,
}

/// What a piece of the guest's memory is to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingUse {
    /// The command ring, or the word where CMD_DONE goes.
    Commands,
    /// The fault buffer, or the word where FAULT_PUT goes.
    Faults,
    /// A queue's ring, completions or fence.
    Queue,
}

impl RingUse {
    /// All of them, by number.
    pub(super) const ALL: [Self; 3] = [Self::Commands, Self::Faults, Self::Queue];
}

/// A ring or buffer that the device reads or writes of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingView {
    /// What it is.
    pub used: RingUse,
    /// Whose queue it is, or no handle: the device's own.
    pub ctx: Handle,
    /// The queue, or no handle.
    pub queue: Handle,
}

impl fmt::Display for RingView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.used {
            RingUse::Commands => f.write_str("the command ring"),
            RingUse::Faults => f.write_str("the fault buffer"),
            RingUse::Queue => write!(f, "{} of {}", self.queue, self.ctx),
        }
    }
}

/// What the device has for a context at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextView {
    /// It is Released: nothing is translated for it any more.
    pub released: bool,
    /// It has no queue: nothing can be translated for it until it is given one.
    pub queueless: bool,
    /// Valid leaves that a walk can reach; 0 if released or without a root.
    pub live_leaves: u64,
    /// The first of them: address and entry.
    pub first_leaf: Option<(u64, u64)>,
    /// Entries in TLBs.
    pub tlb_entries: u64,
    /// The first of them: address and entry.
    pub first_tlb: Option<(u64, u64)>,
    /// Address of an access that holds a translation now.
    pub in_flight: Option<u64>,
    /// Accesses parked on a fault.
    pub parked_faults: u32,
}

/// What the device has of a context's translations that touch a range, at one moment. Each is address and entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeView {
    /// The context is Released: nothing is translated for it any more.
    pub released: bool,
    /// It has no queue: nothing can be translated for it until it is given one.
    pub queueless: bool,
    /// A job of it is at work or waits.
    pub busy: bool,
    /// Valid leaves that a walk can reach; none if released.
    pub leaves: Vec<(u64, u64)>,
    /// Entries in TLBs.
    pub tlb_entries: Vec<(u64, u64)>,
    /// A translation that an access under way now has and may still use.
    pub in_flight: Option<(u64, u64)>,
}

/// A page of 4 KiB that the device has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its address in the context.
    pub va: u64,
    /// Where it was written, by the leaf.
    pub frame: u64,
}

/// The device, as the oracle may question it.
///
/// Called from [`super::Oracle::witness`] only, with none of the oracle's locks held (but [`Self::take_written`]); never from inside
/// [`super::Oracle::event`], since the device may hold its own there.
pub trait Inspect: Send + Sync {
    /// The state of a context, or `None` if the handle is not live.
    fn context(&self, ctx: Handle) -> Option<ContextView>;

    /// A context's translations that touch `[range.0, range.1]`, only such that allow writes if `write_only`, of each sort at
    /// most `most`; `None` if the handle is not live.
    fn range(&self, ctx: Handle, range: (u64, u64), write_only: bool, most: usize) -> Option<RangeView>;

    /// The rings and buffers that touch `[range.0, range.1]` of the bus's addresses, and that the device may read or write without
    /// being told anything else.
    fn rings(&self, range: (u64, u64)) -> Vec<RingView>;

    /// Pages of a context in `[range.0, range.1]` that the device has written since it was asked last. Only steps that were
    /// compared ([`super::Oracle::compare`]) count. Takes no locks but those of TLBs.
    fn take_written(&self, ctx: Handle, range: (u64, u64)) -> Vec<Written>;
}
