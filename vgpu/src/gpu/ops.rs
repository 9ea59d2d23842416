// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each command does.

use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::command::*;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::job::{COMPLETION_BYTES, JOB_BYTES};
use vgpu_spec::pte::{ENTRIES, VA_BITS};
use zerocopy::IntoBytes as _;

use super::command::{Drain, Finish, Outcome};
use super::context::{Context, State};
use super::counters::count;
use super::device::Device;
use super::fault::Answer;
use super::inflight::Range;
use super::pages::{GrantError, Pages};
use super::queue::{self, Setup};
use super::tables::Budget;
use crate::oracle::{DeviceEvent, Leak};

/// Everything a context can address.
pub(super) const ALL: Range = (0, u64::MAX);
/// Smallest and largest log2 of a queue's size.
const QUEUE_LOG2: std::ops::RangeInclusive<u64> = 2..=10;

/// A command's effect, or the status it fails with.
type Effect = Result<Outcome, u32>;

/// A context that a command names.
struct Named<'d> {
    context: &'d Context,
    ctx: Handle,
    state: State,
}

impl Named<'_> {
    fn bound(self) -> Result<Self, u32> {
        if self.state == State::Bound { Ok(self) } else { Err(STATUS_BAD_STATE) }
    }
}

fn op_name(op: u16) -> &'static str {
    CONSTANTS
        .iter()
        .find(|(name, value, _)| name.starts_with("OP_") && *value == u64::from(op))
        .map_or("command", |(name, ..)| &name["OP_".len()..])
}

impl Device {
    /// Carries a command out. Called with the core's lock held.
    pub(crate) fn execute(&self, command: &Command) -> Outcome {
        if command.flags != 0 {
            return Outcome::status(STATUS_BAD_COMMAND);
        }
        let effect = match command.op {
            OP_NOP => Ok(Outcome::ok(0)),
            OP_INTERRUPT => Ok(Outcome::after(Drain::new(Finish::Interrupt))),
            OP_CTX_BIND => self.bind(command.arg[0]),
            OP_CTX_SET_ROOT..=OP_FAULT_CANCEL => self.context_command(command),
            _ => Err(STATUS_BAD_COMMAND),
        };
        effect.unwrap_or_else(Outcome::status)
    }

    fn bind(&self, tag: u64) -> Effect {
        for context in &self.contexts {
            if let Some(ctx) = context.bind() {
                count(&self.counters.contexts, 1);
                for engine in &self.engines {
                    engine.tlbs[ctx.index() as usize].lock().forget_written();
                }
                self.oracle.event(DeviceEvent::ContextBound { ctx, tag });
                return Ok(Outcome::ok(ctx.0));
            }
        }
        Err(STATUS_NO_SPACE)
    }

    fn context_command(&self, command: &Command) -> Effect {
        let op = op_name(command.op);
        let [arg0, arg1, arg2, arg3, _] = command.arg;
        let va = (command.op == OP_INVALIDATE).then_some(arg0);
        let named = self.named(op, Handle(command.ctx), va)?;
        match command.op {
            OP_CTX_SET_ROOT => self.set_root(op, &named, Handle(arg0)),
            OP_CTX_RELEASE => self.release(&named),
            OP_CTX_KILL => self.kill(&named.bound()?),
            OP_CTX_UNBIND => self.unbind(&named),
            OP_GRANT => self.grant(&named.bound()?, arg0, arg1),
            OP_RETURN => self.give_back(op, &named, Handle(arg0)),
            OP_WRITE_PTES => self.write_ptes(op, &named.bound()?, Handle(arg0), arg1, arg2),
            OP_WRITE_PTE => self.write_pte(op, &named.bound()?, Handle(arg0), arg1, arg2),
            OP_CLEAR_PTES => self.clear_ptes(op, &named, Handle(arg0), arg1),
            OP_INVALIDATE => self.invalidate(&named, arg0, arg1),
            OP_QUEUE_CREATE => self.create_queue(&named.bound()?, arg0, arg1, arg2, arg3),
            OP_QUEUE_DESTROY => self.destroy_queue(op, &named, Handle(arg0)),
            OP_FAULT_REPLAY => self.answer(op, &named.bound()?, Handle(arg0), Answer::Replay),
            _ => self.answer(op, &named, Handle(arg0), Answer::Cancel),
        }
    }

    /// The context that a command names, which is one for an address if it has one.
    fn named(&self, op: &'static str, ctx: Handle, va: Option<u64>) -> Result<Named<'_>, u32> {
        let context = self.contexts.get(ctx.index() as usize);
        if let Some(context) = context {
            if let Some(state) = context.state_of(ctx) {
                return Ok(Named { context, ctx, state });
            }
        }
        self.bad_handle(op, ctx, context.is_some_and(|context| context.issued_before(ctx)), None, va);
        Err(STATUS_BAD_HANDLE)
    }

    fn page(&self, op: &'static str, pages: &Pages, named: &Named<'_>, page: Handle) -> Result<u32, u32> {
        pages.check(page, named.ctx).ok_or_else(|| {
            self.bad_handle(op, page, pages.issued_before(page), Some(named.ctx), None);
            STATUS_BAD_HANDLE
        })
    }

    fn set_root(&self, op: &'static str, named: &Named<'_>, page: Handle) -> Effect {
        let new = if page == Handle::NONE {
            None
        } else if named.state != State::Bound {
            return Err(STATUS_BAD_STATE);
        } else {
            Some(self.page(op, &self.tables.pages, named, page)?)
        };
        let old = (named.context.root.load(SeqCst) as u32).checked_sub(1);
        named.context.root.store(new.map_or(0, |page| u64::from(page) + 1), SeqCst);
        self.tables.set_root(named.ctx, old, new, &mut |change| {
            self.table_changed(named.context, named.ctx, change);
        });
        Ok(Outcome::ok(0))
    }

    /// The queues of a context that are not free.
    fn queues_of(&self, ctx: Handle) -> impl Iterator<Item = u32> + '_ {
        let its = move |queue: &queue::Queue| queue.ctx() == ctx && queue.now().1 != queue::State::Free;
        (0..self.queues.len() as u32).filter(move |&index| its(&self.queues[index as usize]))
    }

    fn end_jobs(&self, ctx: Handle, drain: Drain) -> Drain {
        self.queues_of(ctx).fold(drain, |drain, queue| drain.kill(self, queue))
    }

    fn release(&self, named: &Named<'_>) -> Effect {
        let ctx = named.ctx;
        if named.state == State::Released {
            self.oracle.event(DeviceEvent::ReleaseAgain { ctx });
            return Err(STATUS_BAD_STATE);
        }
        named.context.set_state(State::Released);
        self.flush_tlbs(named.context, ctx.index(), ALL.0, ALL.1);
        let drain = self.end_jobs(ctx, Drain::new(Finish::Released(ctx)));
        Ok(Outcome::after(drain.steps(self, ctx, ALL)))
    }

    fn kill(&self, named: &Named<'_>) -> Effect {
        let drain = self.end_jobs(named.ctx, Drain::new(Finish::Nothing));
        Ok(Outcome::after(drain.steps(self, named.ctx, ALL)))
    }

    fn unbind(&self, named: &Named<'_>) -> Effect {
        if named.state != State::Released {
            return Err(STATUS_BAD_STATE);
        }
        let (context, ctx) = (named.context, named.ctx);
        let mut leak = Leak {
            table_pages: context.table_pages.load(SeqCst),
            data_pages: context.data_pages.load(SeqCst),
            ..Leak::default()
        };
        // The scans are for drivers that leak; one that does not pays nothing.
        if leak.data_pages > 0 {
            for page in self.data.owned_by(ctx) {
                leak.page = self.data.handle(page);
                self.data.take_back(page);
                self.oracle.event(DeviceEvent::DataReturned { ctx, page: leak.page });
            }
        }
        if leak.table_pages > 0 {
            for page in self.tables.pages.owned_by(ctx) {
                leak.page = self.tables.pages.handle(page);
                leak.va = leak.va.or(self.tables.position(page).map(|at| at.1));
            }
            for page in self.tables.pages.owned_by(ctx) {
                self.tables.forget(page);
                self.tables.pages.take_back(page);
            }
        }
        let mut left = Vec::new();
        for index in self.queues_of(ctx) {
            let queue = &self.queues[index as usize];
            if queue.now().1 == queue::State::Live {
                leak.queues += 1;
                queue.close();
                left.push(index);
            }
        }
        context.set_state(State::Closing);
        self.flush_tlbs(context, ctx.index(), ALL.0, ALL.1);
        let mut drain = Drain::new(Finish::Unbound { ctx, leak }).then_free(left);
        drain = self.end_jobs(ctx, drain);
        Ok(Outcome::after(drain.steps(self, ctx, ALL)))
    }

    fn grant(&self, named: &Named<'_>, kind: u64, index: u64) -> Effect {
        let (pages, held) = match kind {
            kind if kind == u64::from(PAGE_TABLE) => (&self.tables.pages, &named.context.table_pages),
            kind if kind == u64::from(PAGE_DATA) => (&self.data, &named.context.data_pages),
            _ => return Err(STATUS_BAD_ARGUMENT),
        };
        let index = pages.grantable(index).map_err(|error| match error {
            GrantError::Range => STATUS_BAD_ARGUMENT,
            GrantError::Owned => STATUS_BAD_STATE,
            GrantError::WornOut => STATUS_NO_SPACE,
        })?;
        if kind == u64::from(PAGE_TABLE) {
            self.tables.wipe(index);
        }
        held.fetch_add(1, SeqCst);
        let page = pages.grant(index, named.ctx);
        if page.kind() == Some(Kind::DataPage) {
            self.oracle.event(DeviceEvent::DataGranted { ctx: named.ctx, page });
        }
        Ok(Outcome::ok(page.0))
    }

    fn give_back(&self, op: &'static str, named: &Named<'_>, page: Handle) -> Effect {
        if page.kind() == Some(Kind::DataPage) {
            let index = self.page(op, &self.data, named, page)?;
            self.data.take_back(index);
            named.context.data_pages.fetch_sub(1, SeqCst);
            self.oracle.event(DeviceEvent::DataReturned { ctx: named.ctx, page });
        } else {
            let index = self.page(op, &self.tables.pages, named, page)?;
            self.tables.unlink(named.ctx, index, &mut |change| {
                self.table_changed(named.context, named.ctx, change);
            });
            self.tables.pages.take_back(index);
            named.context.table_pages.fetch_sub(1, SeqCst);
        }
        Ok(Outcome::ok(0))
    }

    fn write_ptes(&self, op: &'static str, named: &Named<'_>, page: Handle, range: u64, from: u64) -> Effect {
        let index = self.page(op, &self.tables.pages, named, page)?;
        let (first, count) = entries(range)?;
        if from % 8 != 0 {
            return Err(STATUS_BAD_ARGUMENT);
        }
        let mut raw = [0_u64; ENTRIES];
        let raw = &mut raw[..count];
        self.memory.snapshot().read(from, raw.as_mut_bytes()).map_err(|_| STATUS_BAD_ADDRESS)?;
        let mut budget = Budget::default();
        for (i, &raw) in raw.iter().enumerate() {
            self.tables.write(named.ctx, index, (first + i, raw), &mut budget, &mut |change| {
                self.table_changed(named.context, named.ctx, change);
            });
        }
        Ok(Outcome::ok(0))
    }

    fn write_pte(&self, op: &'static str, named: &Named<'_>, page: Handle, at: u64, raw: u64) -> Effect {
        let index = self.page(op, &self.tables.pages, named, page)?;
        if at >= ENTRIES as u64 {
            return Err(STATUS_BAD_ARGUMENT);
        }
        self.tables.write(named.ctx, index, (at as usize, raw), &mut Budget::default(), &mut |change| {
            self.table_changed(named.context, named.ctx, change);
        });
        Ok(Outcome::ok(0))
    }

    fn clear_ptes(&self, op: &'static str, named: &Named<'_>, page: Handle, range: u64) -> Effect {
        let index = self.page(op, &self.tables.pages, named, page)?;
        let (first, count) = entries(range)?;
        self.tables.clear(named.ctx, index, first, count, &mut |change| {
            self.table_changed(named.context, named.ctx, change);
        });
        Ok(Outcome::ok(0))
    }

    fn invalidate(&self, named: &Named<'_>, start: u64, last: u64) -> Effect {
        if start > last {
            return Err(STATUS_BAD_ARGUMENT);
        }
        let (context, ctx) = (named.context, named.ctx);
        self.oracle.event(DeviceEvent::Invalidate { ctx, start, last });
        let top = last.min((1 << VA_BITS) - 1);
        if start <= top {
            let dropped = self.flush_tlbs(context, ctx.index(), start, top);
            if context.take_cleared(start, top) || dropped > 0 {
                count(&self.counters.invalidations, 1);
            }
        }
        let drain = Drain::new(Finish::Invalidated { ctx, start, last });
        Ok(Outcome::after(drain.steps(self, ctx, (start, last))))
    }

    fn create_queue(&self, named: &Named<'_>, ring: u64, log2: u64, completions: u64, fence: u64) -> Effect {
        if !QUEUE_LOG2.contains(&log2)
            || ring % JOB_BYTES as u64 != 0
            || completions % COMPLETION_BYTES as u64 != 0
            || fence % 8 != 0
        {
            return Err(STATUS_BAD_ARGUMENT);
        }
        let snapshot = self.memory.snapshot();
        let fits = snapshot
            .check(ring, (JOB_BYTES as u64) << log2, false)
            .and_then(|()| snapshot.check(completions, (COMPLETION_BYTES as u64) << log2, true))
            .and_then(|()| snapshot.check(fence, if fence == 0 { 0 } else { 8 }, true));
        fits.map_err(|_| STATUS_BAD_ADDRESS)?;
        let (queue, handle) = self
            .queues
            .iter()
            .find_map(|queue| Some((queue, queue.next_handle()?)))
            .ok_or(STATUS_NO_SPACE)?;
        queue.create(Setup { handle, ctx: named.ctx, ring, log2: log2 as u32, completions, fence });
        named.context.queues.fetch_add(1, SeqCst);
        Ok(Outcome::ok(handle.0))
    }

    fn destroy_queue(&self, op: &'static str, named: &Named<'_>, handle: Handle) -> Effect {
        let index = handle.index();
        let queue = self.queues.get(index as usize);
        match queue {
            Some(queue) if queue.is_live(handle) && queue.ctx() == named.ctx => {
                queue.close();
                named.context.queues.fetch_sub(1, SeqCst);
                Ok(Outcome::after(Drain::new(Finish::Nothing).then_free(vec![index]).kill(self, index)))
            }
            _ => {
                let issued = queue.is_some_and(|queue| queue.issued_before(handle));
                self.bad_handle(op, handle, issued, Some(named.ctx), None);
                Err(STATUS_BAD_HANDLE)
            }
        }
    }

    fn answer(&self, op: &'static str, named: &Named<'_>, fault: Handle, answer: Answer) -> Effect {
        let ctx = named.ctx;
        let mut wake = Vec::new();
        let mut answered = |queue: u32, entry: &vgpu_spec::fault::FaultEntry| {
            let (fault, va) = (Handle(entry.fault), entry.va);
            self.oracle.event(match answer {
                Answer::Replay => DeviceEvent::FaultReplayed { fault, ctx, va },
                Answer::Cancel => DeviceEvent::FaultCancelled { fault, ctx, va },
            });
            wake.push(queue);
        };
        if fault == Handle::NONE {
            self.faults.answer_all(ctx, answer, &mut answered);
        } else if !self.faults.answer(ctx, fault, answer, &mut answered) {
            self.bad_handle(op, fault, self.faults.issued_before(fault), Some(ctx), None);
            return Err(STATUS_BAD_HANDLE);
        }
        for queue in wake {
            self.sched.schedule(queue);
        }
        Ok(Outcome::ok(0))
    }
}

/// First entry and count, from the form they have in a command.
fn entries(range: u64) -> Result<(usize, usize), u32> {
    let (first, count) = (range & 0xffff, range >> 16);
    if count == 0 || count > ENTRIES as u64 || first + count > ENTRIES as u64 {
        return Err(STATUS_BAD_ARGUMENT);
    }
    Ok((first as usize, count as usize))
}
