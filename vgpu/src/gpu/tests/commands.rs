// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands: states, handles, arguments, completion in order.

use vgpu_spec::command::*;
use vgpu_spec::handle::{Handle, Kind};
#[allow(unused_imports, reason = "a command and a job have this name, with the same value")]
use vgpu_spec::job::OP_NOP;
use vgpu_spec::job::*;
use vgpu_spec::pte::{VALID, WRITE};
use vgpu_spec::regs::gpu as regs;

use super::rig;
use crate::oracle::Inspect as _;

const VA: u64 = 0x1234_5678_9000;

#[test]
fn a_context_goes_from_free_to_free() {
    let rig = rig();
    let mut space = rig.bind();
    let memory = rig.alloc(0x1000);
    space.map_range(VA, memory, 0x1000);
    let mut queue = space.queue(4);
    assert_eq!(queue.run(&rig, Job { op: OP_CHECK, src: VA, len: 8, ..Job::default() }).status, JOB_OK);
    let ctx = space.ctx;
    let view = rig.gpu.context(ctx).unwrap();
    assert_eq!((view.released, view.live_leaves, view.tlb_entries), (false, 1, 1));
    assert_eq!(view.first_leaf.unwrap().0, VA);
    assert_eq!(view.first_tlb.unwrap().0, VA);
    assert_eq!(rig.run(OP_CTX_UNBIND, ctx, [0; 5]).0, STATUS_BAD_STATE);
    rig.ok(OP_CTX_RELEASE, ctx, [0; 5]);
    let view = rig.gpu.context(ctx).unwrap();
    assert_eq!((view.released, view.live_leaves, view.tlb_entries), (true, 0, 0));
    for (op, arg) in [
        (OP_CTX_RELEASE, [0; 5]),
        (OP_CTX_KILL, [0; 5]),
        (OP_GRANT, [1, 60, 0, 0, 0]),
        (OP_WRITE_PTE, [space.tables[&(3, 0)].0, 0, VALID, 0, 0]),
        (OP_CTX_SET_ROOT, [space.tables[&(3, 0)].0, 0, 0, 0, 0]),
        (OP_QUEUE_CREATE, [memory, 2, memory, 0, 0]),
        (OP_FAULT_REPLAY, [0; 5]),
    ] {
        assert_eq!(rig.run(op, ctx, arg).0, STATUS_BAD_STATE, "op {op}");
    }
    for (op, arg) in [
        (OP_INVALIDATE, [0, u64::MAX, 0, 0, 0]),
        (OP_FAULT_CANCEL, [0; 5]),
        (OP_CLEAR_PTES, [space.tables[&(0, VA >> 21 << 21)].0, 512 << 16, 0, 0, 0]),
        (OP_CTX_SET_ROOT, [0; 5]),
    ] {
        rig.ok(op, ctx, arg);
    }
    for queue in &space.queues {
        rig.ok(OP_QUEUE_DESTROY, ctx, [queue.0, 0, 0, 0, 0]);
    }
    for page in space.tables.values() {
        rig.ok(OP_RETURN, ctx, [page.0, 0, 0, 0, 0]);
        assert_eq!(rig.run(OP_RETURN, ctx, [page.0, 0, 0, 0, 0]).0, STATUS_BAD_HANDLE);
    }
    rig.ok(OP_CTX_UNBIND, ctx, [0; 5]);
    assert!(rig.gpu.context(ctx).is_none());
    for op in OP_CTX_SET_ROOT..=OP_FAULT_CANCEL {
        assert_eq!(rig.run(op, ctx, [0; 5]).0, STATUS_BAD_HANDLE, "op {op}");
    }
    let next = rig.bind();
    assert_eq!((next.ctx.index(), next.ctx.generation()), (ctx.index(), ctx.generation() + 1));
}

#[test]
fn what_is_invalidated_after_unbind_is_told_with_its_address() {
    let rig = rig();
    let ctx = rig.bind().ctx;
    rig.ok(OP_CTX_RELEASE, ctx, [0; 5]);
    rig.ok(OP_CTX_UNBIND, ctx, [0; 5]);
    assert_eq!(rig.run(OP_INVALIDATE, ctx, [VA, VA + 0xfff, 0, 0, 0]).0, STATUS_BAD_HANDLE);
    let violations = rig.oracle.violations();
    // The first is of the tables that it has left behind.
    let found = violations.last().map(|v| (v.rule.name(), v.context, v.address));
    assert_eq!(found, Some(("unregister/touch", Some(ctx.0), Some(VA))));
}

#[test]
fn an_unbind_takes_back_what_was_left() {
    let rig = rig();
    for _ in 0..20 {
        let mut space = rig.bind();
        let _ = space.table(0, VA);
        let _ = space.queue(2);
        rig.ok(OP_GRANT, space.ctx, [PAGE_DATA.into(), 3, 0, 0, 0]);
        rig.ok(OP_CTX_RELEASE, space.ctx, [0; 5]);
        rig.ok(OP_CTX_UNBIND, space.ctx, [0; 5]);
    }
    assert_eq!(rig.gpu.counters().contexts, 20);
}

#[test]
fn bad_arguments_are_told_apart() {
    let rig = rig();
    let space = rig.bind();
    let ctx = space.ctx;
    let root = space.tables[&(3, 0)].0;
    let memory = rig.alloc(0x1000);
    let made_up = Handle::new(Kind::TablePage, 3, 9).0;
    for (op, arg, status) in [
        (OP_GRANT, [3, 0, 0, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_GRANT, [1, 64, 0, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_GRANT, [1, u64::MAX, 0, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_GRANT, [1, 0, 0, 0, 0], STATUS_BAD_STATE),
        (OP_RETURN, [made_up, 0, 0, 0, 0], STATUS_BAD_HANDLE),
        (OP_RETURN, [ctx.0, 0, 0, 0, 0], STATUS_BAD_HANDLE),
        (OP_CTX_SET_ROOT, [made_up, 0, 0, 0, 0], STATUS_BAD_HANDLE),
        (OP_WRITE_PTES, [root, 0, memory, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_WRITE_PTES, [root, 1 | 512 << 16, memory, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_WRITE_PTES, [root, 1 << 60 | 1 << 16, memory, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_WRITE_PTES, [root, 1 << 16, memory + 4, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_WRITE_PTES, [root, 512 << 16, 0x1000, 0, 0], STATUS_BAD_ADDRESS),
        (OP_WRITE_PTES, [root, 512 << 16, u64::MAX - 7, 0, 0], STATUS_BAD_ADDRESS),
        (OP_WRITE_PTES, [made_up, 512 << 16, memory, 0, 0], STATUS_BAD_HANDLE),
        (OP_WRITE_PTE, [root, 512, 0, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_CLEAR_PTES, [root, 511 | 2 << 16, 0, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_INVALIDATE, [1, 0, 0, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_QUEUE_CREATE, [memory, 1, memory, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_QUEUE_CREATE, [memory, 11, memory, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_QUEUE_CREATE, [memory + 8, 2, memory, 0, 0], STATUS_BAD_ARGUMENT),
        (OP_QUEUE_CREATE, [memory, 2, memory, 4, 0], STATUS_BAD_ARGUMENT),
        (OP_QUEUE_CREATE, [memory, 2, 0x1000, 0, 0], STATUS_BAD_ADDRESS),
        (OP_QUEUE_CREATE, [u64::MAX - 63, 10, memory, 0, 0], STATUS_BAD_ADDRESS),
        (OP_QUEUE_DESTROY, [Handle::new(Kind::Queue, 200, 1).0, 0, 0, 0, 0], STATUS_BAD_HANDLE),
        (OP_FAULT_CANCEL, [Handle::new(Kind::Fault, 0, 1).0, 0, 0, 0, 0], STATUS_BAD_HANDLE),
        (99, [0; 5], STATUS_BAD_COMMAND),
        (0, [0; 5], STATUS_BAD_COMMAND),
    ] {
        assert_eq!(rig.run(op, ctx, arg).0, status, "op {op} {arg:x?}");
    }
    let flags = Command { op: OP_NOP, flags: 1, ..Command::default() };
    assert_eq!(rig.command(flags).0, STATUS_BAD_COMMAND);
    for _ in 1..8 {
        let _ = rig.bind();
    }
    assert_eq!(rig.run(OP_CTX_BIND, Handle::NONE, [0; 5]).0, STATUS_NO_SPACE);
    let mut space = space;
    for _ in 0..8 {
        let _ = space.queue(2);
    }
    assert_eq!(rig.run(OP_QUEUE_CREATE, ctx, [memory, 2, memory, 0, 0]).0, STATUS_NO_SPACE);
}

#[test]
fn one_context_cannot_use_anothers_pages_and_queues() {
    let rig = rig();
    let (mut one, two) = (rig.bind(), rig.bind());
    let page = one.tables[&(3, 0)].0;
    let queue = one.queue(2);
    let before = rig.gpu.counters().bad_handles;
    assert_eq!(rig.run(OP_RETURN, two.ctx, [page, 0, 0, 0, 0]).0, STATUS_BAD_HANDLE);
    assert_eq!(rig.run(OP_WRITE_PTE, two.ctx, [page, 0, 0, 0, 0]).0, STATUS_BAD_HANDLE);
    assert_eq!(rig.run(OP_QUEUE_DESTROY, two.ctx, [queue.handle.0, 0, 0, 0, 0]).0, STATUS_BAD_HANDLE);
    assert_eq!(rig.gpu.counters().bad_handles, before + 3);
}

#[test]
fn a_batch_that_ends_a_context_needs_no_waiting_in_between() {
    let rig = rig();
    let memory = rig.alloc(2 << 20);
    for _ in 0..50 {
        let mut space = rig.bind();
        space.map(VA >> 21 << 21, memory | VALID | WRITE | vgpu_spec::pte::HUGE);
        let mut queue = space.queue(4);
        for _ in 0..16 {
            queue.submit(&rig, Job { op: OP_FILL, dst: VA >> 21 << 21, len: 2 << 20, ..Job::default() });
        }
        let command =
            |op, arg0: u64| Command { op, ctx: space.ctx.0, arg: [arg0, 0, 0, 0, 0], ..Command::default() };
        let mut batch = vec![command(OP_CTX_RELEASE, 0), command(OP_QUEUE_DESTROY, queue.handle.0)];
        batch.extend(space.tables.values().map(|page| command(OP_RETURN, page.0)));
        batch.push(command(OP_CTX_UNBIND, 0));
        batch.push(command(OP_INTERRUPT, 0));
        let first = rig.submit(&[]);
        let last = rig.submit(&batch);
        rig.wait(last);
        for index in first..last {
            assert_eq!(rig.outcome(index).0, STATUS_OK);
        }
        for index in 0..16 {
            assert!(matches!(queue.wait(&rig, index).status, JOB_OK | JOB_KILLED));
        }
        rig.until("the slot to be free", || rig.gpu.context(space.ctx).is_none());
    }
    rig.until("interrupts", || rig.interrupts.0[2].load(std::sync::atomic::Ordering::SeqCst) == 50);
}

#[test]
fn invalidations_count_only_where_there_was_something() {
    let rig = rig();
    let mut space = rig.bind();
    let memory = rig.alloc(0x2000);
    space.map_range(VA, memory, 0x2000);
    let count = || rig.gpu.counters().invalidations;
    rig.command(space.invalidate(0, u64::MAX));
    assert_eq!(count(), 0);
    let clear = space.clear(0, VA);
    rig.command(clear);
    rig.command(space.invalidate(VA + 0x1000, VA + 0x1fff));
    assert_eq!(count(), 0);
    rig.command(space.invalidate(VA, VA));
    assert_eq!(count(), 1);
    let mut queue = space.queue(2);
    let job = Job { op: OP_CHECK, src: VA + 0x1000, len: 8, ..Job::default() };
    assert_eq!(queue.run(&rig, job).status, JOB_OK);
    rig.command(space.invalidate(0, u64::MAX));
    rig.command(space.invalidate(0, u64::MAX));
    assert_eq!(count(), 2);
    assert_eq!(rig.gpu.context(space.ctx).unwrap().tlb_entries, 0);
}

#[test]
fn a_changed_leaf_is_used_only_after_an_invalidation() {
    let rig = rig();
    let mut space = rig.bind();
    let (a, b) = (rig.alloc(0x1000), rig.alloc(0x1000));
    let mut queue = space.queue(4);
    space.map_range(VA, a, 0x1000);
    // On every engine, since each has a TLB of its own.
    let fill = |value| Job { op: OP_FILL, dst: VA, len: 8, operand: [value, 0, 0], ..Job::default() };
    rig.until("both engines to have it", || {
        assert_eq!(queue.run(&rig, fill(1)).status, JOB_OK);
        rig.gpu.context(space.ctx).unwrap().tlb_entries == 2
    });
    space.map_range(VA, b, 0x1000);
    assert_eq!(queue.run(&rig, fill(2)).status, JOB_OK);
    assert_eq!((rig.get(a), rig.get(b)), (2, 0));
    rig.command(space.invalidate(VA, VA + 0xfff));
    assert_eq!(queue.run(&rig, fill(3)).status, JOB_OK);
    assert_eq!((rig.get(a), rig.get(b)), (2, 3));
    assert_eq!(rig.read(regs::ERROR), 0);
}
