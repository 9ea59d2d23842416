// SPDX-License-Identifier: MIT OR Apache-2.0
//! BAR0: what register accesses do.
//!
//! Handlers store values and wake threads; they run under the machine's locks.

use std::ops::RangeInclusive;
use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::command::COMMAND_BYTES;
use vgpu_spec::fault::FAULT_BYTES;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::pte::ENTRIES;
use vgpu_spec::regs::gpu::{
    BAD_ACCESSES, CMD_BASE_LO, CMD_HEAD, CMD_SIZE, CMD_TAIL, CTRL, CTRL_ENABLE, CTRL_RESET, ERROR_DOORBELL,
    FAULT_BASE_LO, FAULT_GET, FAULT_SIZE, FAULT_STATUS, IRQ_ENABLE, IRQ_STATUS, WINDOW, WINDOW_PAGE,
};

use super::command::Ring;
use super::context::State;
use super::counters::count;
use super::device::Device;
use super::queue;
use super::registers::{Written, doorbell};
use crate::function::Effects;
use crate::oracle::Unusable;

/// What a ring or buffer of guest memory that two registers name has to be.
pub(super) struct Area {
    /// Bytes of an entry, of which its base is a multiple.
    pub(super) entry: usize,
    /// Log2 of how many there may be.
    sizes: RangeInclusive<u32>,
}

/// The command ring.
pub(super) const COMMANDS: Area = Area { entry: COMMAND_BYTES, sizes: 4..=16 };
/// The fault buffer.
pub(super) const FAULTS: Area = Area { entry: FAULT_BYTES, sizes: 2..=12 };

impl Area {
    /// Whether the device takes what the registers say for one, if there is memory.
    pub(super) fn makes_sense(&self, base: u64, log2: u32) -> bool {
        self.sizes.contains(&log2) && base % self.entry as u64 == 0
    }
}

/// An access to BAR0.
enum Place {
    Register(u32),
    Doorbell(u32),
    /// Index of a table entry and the bits of it.
    Window {
        index: usize,
        shift: u32,
    },
}

fn place(offset: u64, length: usize) -> Option<Place> {
    let offset = u32::try_from(offset).ok()?;
    if let Some(inside) = offset.checked_sub(WINDOW).filter(|inside| *inside < (ENTRIES * 8) as u32) {
        let aligned = matches!(length, 4 | 8) && inside as usize % length == 0;
        return aligned.then_some(Place::Window { index: inside as usize / 8, shift: inside % 8 * 8 });
    }
    if length != 4 {
        return None;
    }
    Some(doorbell(offset).map_or(Place::Register(offset), Place::Doorbell))
}

impl Device {
    /// A read of BAR0.
    pub(crate) fn register_read(&self, offset: u64, data: &mut [u8]) {
        let value = match place(offset, data.len()) {
            Some(Place::Register(offset)) => self.registers.guest_read(offset).map(u64::from),
            Some(Place::Doorbell(_)) => Some(0),
            Some(Place::Window { index, shift }) => {
                Some(self.tables.read(self.registers.get(WINDOW_PAGE), index) >> shift)
            }
            None => None,
        };
        let value = value.unwrap_or_else(|| self.bad_access());
        for (byte, from) in data.iter_mut().zip(value.to_le_bytes().into_iter().chain(std::iter::repeat(0))) {
            *byte = from;
        }
    }

    /// A write to BAR0.
    pub(crate) fn register_write(&self, offset: u64, data: &[u8]) -> Effects {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u64::from_le_bytes(bytes);
        let mut effects = Effects::default();
        match place(offset, data.len()) {
            Some(Place::Register(offset)) => match self.registers.guest_write(offset, value as u32) {
                Some(written) => effects = self.act(offset, value as u32, written),
                None => drop(self.bad_access()),
            },
            Some(Place::Doorbell(index)) => self.ring_doorbell(index, value as u32),
            Some(Place::Window { index, shift }) => {
                let mask = if data.len() == 8 { u64::MAX } else { u64::from(u32::MAX) << shift };
                self.window_write(index, value << shift, mask);
            }
            None => drop(self.bad_access()),
        }
        effects
    }

    fn bad_access(&self) -> u64 {
        count(&self.counters.bad_accesses, 1);
        let seen = self.registers.get(BAD_ACCESSES);
        self.registers.set(BAD_ACCESSES, seen.saturating_add(1));
        0
    }

    fn act(&self, offset: u32, value: u32, written: Written) -> Effects {
        match offset {
            CTRL => {
                if value & CTRL_RESET != 0 {
                    self.reset();
                } else if (written.before ^ written.after) & CTRL_ENABLE != 0 {
                    if written.after & CTRL_ENABLE != 0 { self.power_changed() } else { self.disabled() }
                }
            }
            CMD_SIZE => self.set_up_ring(written.after),
            FAULT_SIZE => self.set_up_faults(written.after),
            CMD_TAIL | FAULT_GET | FAULT_STATUS => self.signal.notify(),
            IRQ_ENABLE => {
                // Causes that came while they were not enabled.
                let newly = written.after & !written.before;
                let interrupts = newly & self.registers.get(IRQ_STATUS);
                count(&self.interrupts.raised, interrupts.count_ones().into());
                return Effects { interrupts };
            }
            _ => {}
        }
        Effects::default()
    }

    /// A ring or buffer of guest memory that begins at `base`; `None` is no usable one.
    /// What is wrong with it is told apart, for memory may have gone.
    fn area(
        &self,
        base: u64,
        log2: u32,
        area: &Area,
        [makes_no_sense, is_no_memory]: [Unusable; 2],
    ) -> Option<Ring> {
        let why = if !area.makes_sense(base, log2) {
            makes_no_sense
        } else if self.memory.snapshot().check(base, (area.entry as u64) << log2, true).is_err() {
            is_no_memory
        } else {
            return Some(Ring { base, log2 });
        };
        // It is taken away so.
        if log2 != 0 {
            self.unusable(why, None);
        }
        None
    }

    fn set_up_ring(&self, log2: u32) {
        let whys = [Unusable::CommandArea, Unusable::CommandMemory];
        let ring = self.area(self.registers.pair(CMD_BASE_LO), log2, &COMMANDS, whys);
        let mut request = self.ring_request.lock();
        self.registers.set(CMD_HEAD, 0);
        self.registers.set(CMD_TAIL, 0);
        *request = Some(ring);
        drop(request);
        self.signal.notify();
    }

    fn set_up_faults(&self, log2: u32) {
        let whys = [Unusable::FaultArea, Unusable::FaultMemory];
        let area = self.area(self.registers.pair(FAULT_BASE_LO), log2, &FAULTS, whys);
        self.faults.set_buffer(area.map(|area| (area.base, area.log2)), &self.registers);
        self.signal.notify();
    }

    fn ring_doorbell(&self, index: u32, value: u32) {
        let low = value >> 16;
        let Some(queue) = self.queues.get(index as usize) else {
            return self.bad_doorbell(Handle::new(Kind::Queue, index, low), false);
        };
        let (handle, state) = queue.now();
        let last = handle.generation();
        if state == queue::State::Live && last & 0xffff == low {
            queue.doorbell.store(value, SeqCst);
            self.sched.schedule(index);
            return;
        }
        // The newest generation that ends like this and is not live.
        let newest = (last & !0xffff | low, last);
        let named = if newest.0 > newest.1 { newest.0.checked_sub(0x1_0000) } else { Some(newest.0) };
        match named {
            Some(generation) if generation > 0 => {
                self.bad_doorbell(Handle::new(Kind::Queue, index, generation), true);
            }
            _ => self.bad_doorbell(Handle::new(Kind::Queue, index, low), false),
        }
    }

    fn bad_doorbell(&self, handle: Handle, issued_before: bool) {
        self.bad_handle("DOORBELL", handle, issued_before, None, None);
        self.interrupts.error(ERROR_DOORBELL, &self.registers);
    }

    /// The debugging window: as WRITE_PTE by the owner of the page, whoever writes.
    fn window_write(&self, index: usize, raw: u64, mask: u64) {
        let page = self.registers.get(WINDOW_PAGE);
        let ctx = self.tables.pages.owner(page);
        let context = self.contexts.get(ctx.index() as usize);
        match context {
            Some(context) if ctx != Handle::NONE && context.state_of(ctx) == Some(State::Bound) => {
                self.tables.write_masked(ctx, page, index, (raw, mask), &mut |change| {
                    self.table_changed(context, ctx, change);
                });
            }
            _ => drop(self.bad_access()),
        }
    }
}

/// VRAM for a machine that does not map BAR2.
impl Device {
    /// A read of BAR2; what is beyond its end reads as ones.
    pub(crate) fn vram_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Ok(slice) = self.vram.slice_up_to(offset, data.len() as u64, false) {
            slice.copy_to(data);
        }
    }

    /// A write to BAR2.
    pub(crate) fn vram_write(&self, offset: u64, data: &[u8]) {
        if let Ok(slice) = self.vram.slice_up_to(offset, data.len() as u64, true) {
            slice.copy_from(data);
        }
    }
}
