// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parked accesses and the fault buffer.
//!
//! A queue has at most one access parked, so a fault's index is its queue's.

use std::sync::atomic::Ordering::SeqCst;

use parking_lot::Mutex;
use vgpu_spec::fault::{FAULT_BYTES, FaultEntry};
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::regs::gpu::{
    FAULT_GET, FAULT_OVERFLOW, FAULT_PUT, FAULT_PUT_WB_LO, FAULT_STATUS, VECTOR_FAULT,
};

use super::device::Device;
use super::registers::Registers;
use crate::oracle::Unusable;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No fault.
    Free,
    /// The handle is made; the oracle is being told.
    Raising,
    /// Waits for the driver.
    Parked { recorded: bool },
    /// The driver has answered and the engine has not yet seen it.
    Answered(Answer),
}

/// What the driver wants done with a parked access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Try again.
    Replay,
    /// End its job.
    Cancel,
}

/// What an engine finds when it comes back to a queue with a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parked {
    /// Nothing to be done yet.
    Waiting,
    /// Go on; the fault is gone.
    Replay,
    /// End the job; the fault is gone.
    Cancel,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    generation: u32,
    state: State,
    entry: FaultEntry,
}

struct Inner {
    slots: Box<[Slot]>,
    /// The buffer: bus address and log2 of its entries.
    buffer: Option<(u64, u32)>,
    /// How many are parked and not in the buffer.
    unrecorded: usize,
    /// How often a fault found the buffer full since the device was made.
    overflows: u64,
}

/// Every fault of the device.
pub(crate) struct Faults {
    inner: Mutex<Inner>,
}

impl Faults {
    pub(crate) fn new(queues: u32) -> Self {
        let slot = Slot { generation: 0, state: State::Free, entry: FaultEntry::default() };
        let slots = vec![slot; queues as usize].into_boxed_slice();
        Self { inner: Mutex::new(Inner { slots, buffer: None, unrecorded: 0, overflows: 0 }) }
    }

    /// Takes a new buffer (or none), empty: what is parked will be recorded in it.
    pub(crate) fn set_buffer(&self, buffer: Option<(u64, u32)>, registers: &Registers) {
        let mut inner = self.inner.lock();
        inner.buffer = buffer;
        registers.set(FAULT_PUT, 0);
        registers.set(FAULT_GET, 0);
        let mut unrecorded = 0;
        for slot in &mut inner.slots {
            if let State::Parked { recorded } = &mut slot.state {
                *recorded = false;
                unrecorded += 1;
            }
        }
        inner.unrecorded = unrecorded;
    }

    /// Makes a fault of queue `index`; it is parked by [`Self::park`], when the oracle knows of it.
    pub(crate) fn raise(&self, index: u32, mut entry: FaultEntry) -> Handle {
        let mut inner = self.inner.lock();
        let slot = &mut inner.slots[index as usize];
        // After four billion faults of one queue an old handle would look new; no run gets there.
        slot.generation = slot.generation.checked_add(1).unwrap_or(1);
        let handle = Handle::new(Kind::Fault, index, slot.generation);
        entry.fault = handle.0;
        slot.entry = entry;
        slot.state = State::Raising;
        handle
    }

    /// From now on the driver may answer. If the interrupt is held back, which is only done if wanted and if there is no other fault
    /// (whose interrupt would tell of this one), and for one fault at a time: true, and it is for the caller to raise.
    pub(crate) fn park(&self, index: u32, device: &Device, hold_back: bool) -> bool {
        let mut inner = self.inner.lock();
        let slot = &mut inner.slots[index as usize];
        if slot.state != State::Raising {
            return false;
        }
        slot.state = State::Parked { recorded: false };
        inner.unrecorded += 1;
        if !inner.record(index, device) {
            return false;
        }
        let parked = |slot: &&Slot| matches!(slot.state, State::Raising | State::Parked { .. });
        let held_back = hold_back
            && inner.slots.iter().filter(parked).count() == 1
            && !device.holding_back.swap(true, SeqCst);
        if !held_back {
            device.interrupts.raise(VECTOR_FAULT, &device.registers);
        }
        held_back
    }

    /// Records what could not be recorded before.
    pub(crate) fn pump(&self, device: &Device) {
        let mut inner = self.inner.lock();
        if inner.unrecorded == 0 {
            return;
        }
        for index in 0..inner.slots.len() as u32 {
            if inner.slots[index as usize].state == (State::Parked { recorded: false }) {
                if !inner.record(index, device) {
                    break;
                }
                device.interrupts.raise(VECTOR_FAULT, &device.registers);
            }
        }
    }

    /// Answers one fault of `ctx`; `None` if there is no such fault. `answered` is called under the lock.
    pub(crate) fn answer(
        &self,
        ctx: Handle,
        fault: Handle,
        answer: Answer,
        answered: &mut dyn FnMut(u32, &FaultEntry),
    ) -> bool {
        let mut inner = self.inner.lock();
        let index = fault.index();
        match inner.slots.get(index as usize) {
            Some(slot) if slot.entry.fault == fault.0 && slot.entry.ctx == ctx.0 => {
                inner.answer(index, answer, answered)
            }
            _ => false,
        }
    }

    /// Answers every fault of `ctx`.
    pub(crate) fn answer_all(&self, ctx: Handle, answer: Answer, answered: &mut dyn FnMut(u32, &FaultEntry)) {
        let mut inner = self.inner.lock();
        for index in 0..inner.slots.len() as u32 {
            if inner.slots[index as usize].entry.ctx == ctx.0 {
                inner.answer(index, answer, answered);
            }
        }
    }

    /// Whether the handle was given out at some time and is not live now.
    pub(crate) fn issued_before(&self, fault: Handle) -> bool {
        let inner = self.inner.lock();
        let Some(slot) = inner.slots.get(fault.index() as usize) else { return false };
        let live = fault.generation() == slot.generation && matches!(slot.state, State::Parked { .. });
        fault.kind() == Some(Kind::Fault) && (1..=slot.generation).contains(&fault.generation()) && !live
    }

    /// What the engine that runs queue `index` has to do about its fault.
    pub(crate) fn look(&self, index: u32) -> Parked {
        let mut inner = self.inner.lock();
        let slot = &mut inner.slots[index as usize];
        match slot.state {
            State::Raising | State::Parked { .. } => Parked::Waiting,
            State::Answered(Answer::Cancel) => {
                slot.state = State::Free;
                Parked::Cancel
            }
            State::Free | State::Answered(Answer::Replay) => {
                slot.state = State::Free;
                Parked::Replay
            }
        }
    }

    /// Takes the fault of queue `index` away; the entry, if the driver had not answered it.
    pub(crate) fn withdraw(&self, index: u32) -> Option<FaultEntry> {
        let mut inner = self.inner.lock();
        let slot = &mut inner.slots[index as usize];
        let state = std::mem::replace(&mut slot.state, State::Free);
        let entry = slot.entry;
        match state {
            State::Parked { recorded } => {
                inner.unrecorded -= usize::from(!recorded);
                Some(entry)
            }
            State::Raising => Some(entry),
            State::Free | State::Answered(_) => None,
        }
    }

    /// How many accesses are parked, of one context or of all.
    pub(crate) fn parked(&self, ctx: Option<Handle>) -> u32 {
        let inner = self.inner.lock();
        let parked = |slot: &&Slot| {
            matches!(slot.state, State::Parked { .. } | State::Raising)
                && ctx.is_none_or(|ctx| slot.entry.ctx == ctx.0)
        };
        inner.slots.iter().filter(parked).count() as u32
    }

    /// How often a fault found the buffer full.
    pub(crate) fn overflows(&self) -> u64 {
        self.inner.lock().overflows
    }

    /// Forgets every fault and the buffer; generations go on.
    pub(crate) fn reset(&self) {
        let mut inner = self.inner.lock();
        let Inner { slots, buffer, unrecorded, overflows: _ } = &mut *inner;
        for slot in slots.iter_mut() {
            let Slot { generation: _, state, entry } = slot;
            *state = State::Free;
            *entry = FaultEntry::default();
        }
        *buffer = None;
        *unrecorded = 0;
    }
}

impl Inner {
    fn answer(&mut self, index: u32, answer: Answer, answered: &mut dyn FnMut(u32, &FaultEntry)) -> bool {
        let slot = &mut self.slots[index as usize];
        let State::Parked { recorded } = slot.state else { return false };
        slot.state = State::Answered(answer);
        self.unrecorded -= usize::from(!recorded);
        answered(index, &slot.entry);
        true
    }

    /// Writes a parked fault to the buffer. If it did, the interrupt is due, and the next one may be tried.
    fn record(&mut self, index: u32, device: &Device) -> bool {
        let Device { registers, memory, interrupts, .. } = device;
        let Some((base, log2)) = self.buffer else { return false };
        if registers.get(FAULT_STATUS) & FAULT_OVERFLOW != 0 {
            return false;
        }
        let put = registers.get(FAULT_PUT);
        // A GET that is ahead of PUT makes a difference near 2^32: full, as any other nonsense.
        if put.wrapping_sub(registers.get(FAULT_GET)) >= 1 << log2 {
            self.overflows += 1;
            registers.set_bits(FAULT_STATUS, FAULT_OVERFLOW);
            interrupts.raise(VECTOR_FAULT, registers);
            return false;
        }
        let slot = &mut self.slots[index as usize];
        let at = base + u64::from(put & ((1 << log2) - 1)) * FAULT_BYTES as u64;
        let put = put.wrapping_add(1);
        let snapshot = memory.snapshot();
        let written = snapshot.write_object(at, &slot.entry).and_then(|()| {
            std::sync::atomic::fence(SeqCst);
            match registers.pair(FAULT_PUT_WB_LO) {
                0 => Ok(()),
                address => snapshot.store_u32(address, put),
            }
        });
        if written.is_err() {
            self.buffer = None;
            device.unusable(Unusable::FaultMemory, None);
            return false;
        }
        slot.state = State::Parked { recorded: true };
        self.unrecorded -= 1;
        registers.set(FAULT_PUT, put);
        true
    }
}
