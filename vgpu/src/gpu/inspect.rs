// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device as the oracle questions it. Takes the TLBs' and the fault table's locks, one at a time, and no other.

use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::handle::Handle;
use vgpu_spec::job::{COMPLETION_BYTES, JOB_BYTES};
use vgpu_spec::pte;
use vgpu_spec::regs::gpu::{CMD_BASE_LO, CMD_DONE_LO, CMD_SIZE, FAULT_BASE_LO, FAULT_PUT_WB_LO, FAULT_SIZE};

use super::bar::{Area, COMMANDS, FAULTS};
use super::context::State;
use super::device::Device;
use crate::oracle::{ContextView, RangeView, RingUse, RingView, Written};

impl Device {
    /// What the device has for a context now.
    pub(crate) fn view(&self, ctx: Handle) -> Option<ContextView> {
        let context = self.contexts.get(ctx.index() as usize)?;
        let released = context.state_of(ctx)? == State::Released;
        let mut view = ContextView {
            released,
            // Counts go before the jobs of a destroyed queue have ended: an access of them is still seen in flight.
            queueless: context.queues.load(SeqCst) == 0,
            parked_faults: self.faults.parked(Some(ctx)),
            ..ContextView::default()
        };
        if !released {
            let root = context.root.load(SeqCst);
            // No tree of distinct tables is larger; one that a driver has tied in knots is cut off.
            (view.live_leaves, view.first_leaf) = self.tables.leaves(ctx, root, self.tables.pages.len());
        }
        for engine in &self.engines {
            let tlb = engine.tlbs[ctx.index() as usize].lock();
            view.tlb_entries += tlb.len();
            view.first_tlb = view.first_tlb.into_iter().chain(tlb.first()).min();
            drop(tlb);
            view.in_flight = view.in_flight.or_else(|| engine.in_flight.address(ctx));
        }
        Some(view)
    }

    /// What the device has of a context's translations that touch a range: of each sort at most `most`, only such that allow
    /// writes if `write_only`.
    pub(crate) fn range_view(
        &self,
        ctx: Handle,
        (start, last): (u64, u64),
        write_only: bool,
        most: usize,
    ) -> Option<RangeView> {
        let context = self.contexts.get(ctx.index() as usize)?;
        let released = context.state_of(ctx)? == State::Released;
        let mut view = RangeView {
            released,
            queueless: context.queues.load(SeqCst) == 0,
            busy: self.is_busy(ctx),
            ..RangeView::default()
        };
        let counts = |raw: u64| !write_only || raw & (pte::WRITE | pte::ATOMIC) != 0;
        let collect = |list: &mut Vec<(u64, u64)>, va, raw| {
            if counts(raw) && list.len() < most {
                list.push((va, raw));
            }
            list.len() < most
        };
        if !released {
            let root = context.root.load(SeqCst);
            let leaves = &mut view.leaves;
            self.tables.each_in(ctx, root, (start, last), self.tables.pages.len(), &mut |va, raw| {
                collect(leaves, va, raw)
            });
        }
        for engine in &self.engines {
            let entries = &mut view.tlb_entries;
            engine.tlbs[ctx.index() as usize]
                .lock()
                .each_in(start, last, &mut |va, raw| collect(entries, va, raw));
            view.in_flight = view.in_flight.or_else(|| {
                let slot = &engine.in_flight;
                let epoch = slot.overlapping(ctx, (start, last))?;
                // Only a step that accesses has thrown away what another one left in the cache.
                slot.address(ctx)?;
                // A translation that the step at hand has, and may still use.
                let touches = |va: u64| va | 0xfff >= start && va <= last;
                let found = engine.micro.find(|va, raw| touches(va) && counts(raw) && slot.may_touch(va))?;
                (slot.is_of(ctx) && !slot.is_past(epoch)).then_some(found)
            });
        }
        Some(view)
    }

    /// The rings and buffers that touch a range of the bus's addresses, and that are read or written whenever something happens.
    ///
    /// What a Released context has is left alone once its jobs have ended.
    pub(crate) fn rings(&self, (start, last): (u64, u64)) -> Vec<RingView> {
        let mut found = Vec::new();
        if !self.powered() {
            return found;
        }
        let touches =
            |base: u64, bytes: u64| bytes > 0 && base <= last && start <= base.saturating_add(bytes - 1);
        let none = Handle::NONE;
        let mut own = |used, area: Area, size, base, word| {
            let (base, log2) = (self.registers.pair(base), self.registers.get(size));
            // What was refused is no ring.
            if !area.makes_sense(base, log2) {
                return;
            }
            let word = self.registers.pair(word);
            if touches(base, (area.entry as u64) << log2) || word != 0 && touches(word, 4) {
                found.push(RingView { used, ctx: none, queue: none });
            }
        };
        own(RingUse::Commands, COMMANDS, CMD_SIZE, CMD_BASE_LO, CMD_DONE_LO);
        own(RingUse::Faults, FAULTS, FAULT_SIZE, FAULT_BASE_LO, FAULT_PUT_WB_LO);
        for queue in &self.queues {
            let Some(setup) = *queue.memory.lock() else { continue };
            let context = self.contexts.get(setup.ctx.index() as usize);
            let released =
                context.is_some_and(|context| context.state_of(setup.ctx) == Some(State::Released));
            let quiet = released && queue.killed.load(SeqCst) == queue.kill.load(SeqCst);
            let fence = setup.fence != 0 && touches(setup.fence, 8);
            let ring = touches(setup.ring, (JOB_BYTES as u64) << setup.log2);
            if !quiet
                && (fence || ring || touches(setup.completions, (COMPLETION_BYTES as u64) << setup.log2))
            {
                found.push(RingView { used: RingUse::Queue, ctx: setup.ctx, queue: setup.handle });
            }
        }
        found
    }

    /// Pages of a context in a range that were written since this was asked last.
    pub(crate) fn take_written(&self, ctx: Handle, (start, last): (u64, u64)) -> Vec<Written> {
        let mut taken = Vec::new();
        let live =
            self.contexts.get(ctx.index() as usize).is_some_and(|context| context.state_of(ctx).is_some());
        if live {
            for engine in &self.engines {
                engine.tlbs[ctx.index() as usize].lock().take_written(start, last, &mut taken);
            }
        }
        taken
    }

    /// Whether the context has a job at work or waiting.
    fn is_busy(&self, ctx: Handle) -> bool {
        self.queues.iter().filter(|queue| queue.ctx() == ctx).any(|queue| match queue.run.try_lock() {
            Some(run) => run.work.is_some() || queue.waiting(&run) != Some(0),
            // An engine has it.
            None => true,
        })
    }
}
