// SPDX-License-Identifier: MIT OR Apache-2.0
//! Faults: raised, recorded, replayed, cancelled, dropped.

use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::command::*;
use vgpu_spec::fault::*;
use vgpu_spec::handle::Handle;
#[allow(unused_imports, reason = "a command and a job have this name, with the same value")]
use vgpu_spec::job::OP_NOP;
use vgpu_spec::job::*;
use vgpu_spec::pte::{ATOMIC, HUGE, VALID, VRAM, WRITE};
use vgpu_spec::regs::gpu as regs;
use vgpu_spec::witness::{self, Record};

use super::rig;
use crate::gpu::GpuConfig;
use crate::oracle::{Inspect as _, Rule};
use crate::testing::Rig;

const VA: u64 = 0x40_0000_0000;

fn fill(va: u64, len: u64) -> Job {
    Job { op: OP_FILL, dst: va, len, operand: [9, 0, 0], ..Job::default() }
}

#[test]
fn a_fault_parks_its_queue_only_and_a_replay_goes_on_where_it_stopped() {
    let rig = rig();
    let mut space = rig.bind();
    let (mut one, mut two) = (space.queue(4), space.queue(4));
    let memory = rig.alloc(0x3000);
    space.map_range(VA, memory, 0x1000);
    let index = one.submit(&rig, fill(VA + 0x800, 0x2000));
    let fault = rig.fault();
    assert_eq!((fault.va, fault.access, fault.reason), (VA + 0x1000, ACCESS_WRITE, REASON_ABSENT));
    assert_eq!((fault.ctx, fault.queue, fault.fence), (space.ctx.0, one.handle.0, 1));
    assert_eq!((fault.bytes, fault.retries), (0x1800, 0));
    assert_eq!(rig.get(memory + 0xff8), 9);
    let later = one.submit(&rig, Job { op: OP_NOP, ..Job::default() });
    assert_eq!(two.run(&rig, fill(VA, 8)).status, JOB_OK);
    assert_eq!(rig.gpu.context(space.ctx).unwrap().parked_faults, 1);
    assert_eq!(rig.gpu.context(space.ctx).unwrap().in_flight, None);
    // Replayed with nothing changed it comes again, under another handle.
    rig.ok(OP_FAULT_REPLAY, space.ctx, [fault.fault, 0, 0, 0, 0]);
    let again = rig.fault();
    assert_ne!(again.fault, fault.fault);
    assert_eq!((again.va, again.retries), (VA + 0x1000, 1));
    space.map_range(VA + 0x1000, memory + 0x1000, 0x2000);
    rig.ok(OP_FAULT_REPLAY, space.ctx, [again.fault, 0, 0, 0, 0]);
    assert_eq!(one.wait(&rig, index).status, JOB_OK);
    assert_eq!(one.wait(&rig, later).status, JOB_OK);
    assert_eq!(rig.get(memory + 0x27f8), 9);
    assert_eq!(rig.next_fault(), None);
    assert_eq!(rig.run(OP_FAULT_REPLAY, space.ctx, [again.fault, 0, 0, 0, 0]).0, STATUS_BAD_HANDLE);
    assert_eq!(rig.gpu.counters().faults, 2);
}

#[test]
fn an_access_that_is_replayed_for_ever_is_found_with_its_place() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let index = queue.submit(&rig, fill(VA, 8));
    for retries in 0..1000 {
        let fault = rig.fault();
        assert_eq!(fault.retries, retries);
        if retries % 9 == 0 {
            rig.oracle.witness(&Record { kind: witness::HEARTBEAT, ..Record::default() });
        }
        assert!(rig.oracle.violations().is_empty(), "{:?}", rig.oracle.violations());
        rig.ok(OP_FAULT_REPLAY, space.ctx, [fault.fault, 0, 0, 0, 0]);
    }
    // What is in the buffer has been judged.
    let last = rig.fault();
    let found = rig.oracle.violations();
    let [violation] = &found[..] else { panic!("{found:?}") };
    assert_eq!((violation.rule, violation.context), (Rule::HangLivelock, Some(space.ctx.0)));
    assert_eq!(violation.address, Some(VA));
    rig.ok(OP_FAULT_CANCEL, space.ctx, [last.fault, 0, 0, 0, 0]);
    assert_eq!(queue.wait(&rig, index).status, JOB_FAULT);
}

#[test]
fn reasons() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let memory = rig.alloc(0x1000);
    let mut expect = |space: &mut crate::testing::Space<'_>, job: Job, reason| {
        let index = queue.submit(&rig, job);
        let fault = rig.fault();
        assert_eq!((fault.va, fault.reason), (VA, reason));
        rig.ok(OP_FAULT_CANCEL, space.ctx, [fault.fault, 0, 0, 0, 0]);
        let done = queue.wait(&rig, index);
        assert_eq!((done.status, done.address), (JOB_FAULT, VA));
    };
    expect(&mut space, fill(VA, 8), REASON_ABSENT);
    space.map(VA, memory | VALID);
    expect(&mut space, fill(VA, 8), REASON_RIGHTS);
    let add = Job { op: OP_ATOMIC_ADD, dst: VA, len: 1, ..Job::default() };
    space.map(VA, memory | VALID | WRITE);
    expect(&mut space, add, REASON_RIGHTS);
    space.map(VA, memory | VALID | ATOMIC);
    expect(&mut space, add, REASON_RIGHTS);
    space.map(VA, memory | VALID | WRITE | 1 << 60);
    expect(&mut space, fill(VA, 8), REASON_MALFORMED);
    // VRAM that was never granted, and beyond its end.
    space.map(VA, 0x3000 | VALID | WRITE | VRAM);
    expect(&mut space, fill(VA, 8), REASON_MALFORMED);
    space.map(VA, 1 << 40 | VALID | WRITE | VRAM);
    expect(&mut space, fill(VA, 8), REASON_MALFORMED);
    // A directory entry to a table of another context.
    let other = rig.bind();
    let root = space.tables[&(3, 0)];
    let foreign = other.tables[&(3, 0)].index();
    rig.ok(OP_WRITE_PTE, space.ctx, [root.0, VA >> 39, VALID | u64::from(foreign) << 12, 0, 0]);
    expect(&mut space, fill(VA, 8), REASON_MALFORMED);
    rig.ok(OP_CTX_SET_ROOT, space.ctx, [0; 5]);
    expect(&mut space, fill(VA, 8), REASON_NO_ROOT);
    assert_eq!(rig.gpu.counters().bad_handles, 3);
}

#[test]
fn rights_may_be_added_without_an_invalidation() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let memory = rig.alloc(2 << 20);
    space.map(VA, memory | VALID | HUGE);
    assert_eq!(queue.run(&rig, Job { op: OP_CHECK, src: VA, len: 8, ..Job::default() }).status, JOB_OK);
    let index = queue.submit(&rig, fill(VA, 8));
    let fault = rig.fault();
    assert_eq!(fault.reason, REASON_RIGHTS);
    space.map(VA, memory | VALID | WRITE | HUGE);
    rig.ok(OP_FAULT_REPLAY, space.ctx, [0; 5]);
    assert_eq!(queue.wait(&rig, index).status, JOB_OK);
}

#[test]
fn overflow_is_sticky_and_nothing_is_lost() {
    let rig = rig();
    // Only four entries.
    rig.write(regs::FAULT_SIZE, 2);
    let mut space = rig.bind();
    let mut queues: Vec<_> = (0..8).map(|_| space.queue(2)).collect();
    let wanted: std::collections::BTreeSet<u64> = (0..8).map(|i| VA + i * 0x1000).collect();
    for (i, queue) in queues.iter_mut().enumerate() {
        queue.submit(&rig, fill(VA + i as u64 * 0x1000, 8));
    }
    rig.until("an overflow", || rig.read(regs::FAULT_STATUS) == regs::FAULT_OVERFLOW);
    rig.until("all faults", || rig.gpu.counters().faults == 8);
    assert_eq!(rig.read(regs::FAULT_PUT), 4);
    let mut seen = std::collections::BTreeSet::new();
    let entry = |index: u32| -> FaultEntry {
        rig.memory.snapshot().read_object(rig.faults + u64::from(index % 4) * 64).unwrap()
    };
    for index in 0..4 {
        seen.insert(entry(index).va);
    }
    rig.write(regs::FAULT_GET, 4);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(rig.read(regs::FAULT_PUT), 4, "not before the flag is cleared");
    rig.write(regs::FAULT_STATUS, regs::FAULT_OVERFLOW);
    rig.until("the others", || rig.read(regs::FAULT_PUT) == 8);
    for index in 4..8 {
        seen.insert(entry(index).va);
    }
    assert_eq!(seen, wanted);
    rig.ok(OP_FAULT_CANCEL, space.ctx, [0; 5]);
    for queue in &queues {
        assert_eq!(queue.wait(&rig, 0).status, JOB_FAULT);
    }
    // A GET from nowhere is a full buffer, not a crash.
    for get in [9, 1000, u32::MAX, 0x8000_0000] {
        rig.write(regs::FAULT_STATUS, 1);
        rig.write(regs::FAULT_GET, get);
        let index = queues[0].submit(&rig, fill(VA, 8));
        rig.until("an overflow", || rig.read(regs::FAULT_STATUS) == regs::FAULT_OVERFLOW);
        rig.ok(OP_FAULT_CANCEL, space.ctx, [0; 5]);
        assert_eq!(queues[0].wait(&rig, index).status, JOB_FAULT);
    }
}

#[test]
fn release_kill_and_destroy_drop_faults() {
    let rig = rig();
    let mut space = rig.bind();
    let (mut one, mut two) = (space.queue(4), space.queue(4));
    let parked = |queue: &mut crate::testing::Queue| {
        let index = queue.submit(&rig, fill(VA, 8));
        queue.submit(&rig, fill(VA, 8));
        (index, rig.fault())
    };
    let killed = |queue: &crate::testing::Queue, index| {
        assert_eq!(queue.wait(&rig, index).status, JOB_KILLED);
        assert_eq!(queue.wait(&rig, index + 1).status, JOB_KILLED);
    };
    let (index, fault) = parked(&mut one);
    rig.ok(OP_CTX_KILL, space.ctx, [0; 5]);
    killed(&one, index);
    assert_eq!(rig.run(OP_FAULT_CANCEL, space.ctx, [fault.fault, 0, 0, 0, 0]).0, STATUS_BAD_HANDLE);
    let (index, _) = parked(&mut two);
    rig.ok(OP_QUEUE_DESTROY, space.ctx, [two.handle.0, 0, 0, 0, 0]);
    killed(&two, index);
    let (index, fault) = parked(&mut one);
    rig.ok(OP_CTX_RELEASE, space.ctx, [0; 5]);
    killed(&one, index);
    assert_eq!(rig.run(OP_FAULT_REPLAY, space.ctx, [fault.fault, 0, 0, 0, 0]).0, STATUS_BAD_STATE);
    assert_eq!(rig.gpu.context(space.ctx).unwrap().parked_faults, 0);
    let index = one.submit(&rig, fill(VA, 8));
    assert_eq!(one.wait(&rig, index).status, JOB_KILLED);
    assert_eq!(rig.run(OP_FAULT_CANCEL, Handle(77), [0; 5]).0, STATUS_BAD_HANDLE);
}

/// A device that takes its time.
fn slow() -> Rig {
    let config = GpuConfig { contexts: 8, queues: 8, engines: 2, jitter: Some(7), ..GpuConfig::default() };
    Rig::new(config, 64 << 20)
}

/// Lets an access fault; whether the interrupt for it is held back. There were `before`.
fn faults(rig: &Rig, queue: &mut crate::testing::Queue, before: u64) -> bool {
    queue.submit(rig, fill(VA, 8));
    rig.fault();
    let held_back = || rig.gpu.device.holding_back.load(SeqCst);
    let mut held = false;
    rig.until("the interrupt, or that it is held back", || {
        held |= held_back();
        held || rig.interrupts.0[regs::VECTOR_FAULT as usize].load(SeqCst) > before
    });
    held
}

#[test]
fn an_interrupt_that_is_held_back_comes_all_the_same() {
    let rig = slow();
    let raised = || rig.interrupts.0[regs::VECTOR_FAULT as usize].load(SeqCst);
    let mut held = 0;
    for before in 0..32 {
        let mut space = rig.bind();
        let mut queue = space.queue(4);
        held += usize::from(faults(&rig, &mut queue, before));
        // Where it is, and where its place is another's.
        if before % 2 == 0 {
            rig.until("the interrupt", || raised() == before + 1);
        }
        space.close();
    }
    rig.until("the last interrupt", || raised() == 32);
    assert!((1..32).contains(&held), "{held}");
}

#[test]
fn a_reset_forgets_the_interrupt_that_is_held_back() {
    let rig = slow();
    let raised = || rig.interrupts.0[regs::VECTOR_FAULT as usize].load(SeqCst);
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let mut before = 0;
    while !faults(&rig, &mut queue, before) {
        rig.ok(OP_FAULT_CANCEL, space.ctx, [0; 5]);
        before += 1;
    }
    rig.write(regs::CTRL, regs::CTRL_RESET);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(raised(), before);
}
