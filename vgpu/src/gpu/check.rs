// SPDX-License-Identifier: MIT OR Apache-2.0
//! For tests and fuzz targets: what must hold of the device, and what is live in it.

use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::handle::{Handle, Kind};

use super::context::State;
use super::{Gpu, queue};

impl Gpu {
    /// The handle last given out for an index, wrapped to what exists; none for faults.
    #[doc(hidden)]
    #[must_use]
    pub fn last_handle(&self, kind: Kind, index: u32) -> Handle {
        let device = &self.device;
        match kind {
            Kind::Context => device.contexts[index as usize % device.contexts.len()].now().0,
            Kind::Queue => device.queues[index as usize % device.queues.len()].now().0,
            Kind::TablePage => device.tables.pages.handle(index % device.tables.pages.len()),
            Kind::DataPage => device.data.handle(index % device.data.len()),
            Kind::Fault => Handle::NONE,
        }
    }

    /// What a queue's doorbell was last rung with.
    #[doc(hidden)]
    #[must_use]
    pub fn last_doorbell(&self, index: u32) -> u32 {
        self.device.queues[index as usize % self.device.queues.len()].doorbell.load(SeqCst)
    }

    /// Checks what must hold whenever no command is at work.
    ///
    /// # Panics
    /// If it does not.
    #[doc(hidden)]
    pub fn assert_consistent(&self) {
        let device = &self.device;
        let _core = device.core.lock();
        for context in &device.contexts {
            let (ctx, state) = context.now();
            let tables = device.tables.pages.owned_by(ctx).count() as u32;
            let data = device.data.owned_by(ctx).count() as u32;
            if matches!(state, State::Bound | State::Released) {
                assert_eq!(tables, context.table_pages.load(SeqCst));
                assert_eq!(data, context.data_pages.load(SeqCst));
                let live = |q: &&queue::Queue| q.ctx() == ctx && q.now().1 == queue::State::Live;
                assert_eq!(device.queues.iter().filter(live).count() as u32, context.queues.load(SeqCst));
            } else {
                assert_eq!((tables, data), (0, 0), "{ctx} has pages though it is {state:?}");
            }
            if state != State::Bound {
                for engine in &device.engines {
                    assert_eq!(engine.tlbs[ctx.index() as usize].lock().len(), 0, "{ctx} is {state:?}");
                }
            }
        }
        for page in device.tables.pages.owned() {
            let owner = device.tables.pages.owner(page);
            assert!(device.contexts[owner.index() as usize].state_of(owner).is_some());
        }
    }
}
