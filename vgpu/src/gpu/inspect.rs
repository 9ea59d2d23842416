// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device as the oracle questions it. Takes the TLBs' and the fault table's locks, one at a time, and no other.

use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::handle::Handle;

use super::context::State;
use super::device::Device;
use crate::oracle::ContextView;

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
}
