// SPDX-License-Identifier: MIT OR Apache-2.0
//! A driver that wants to stop the machine, not to use the device.

use std::time::{Duration, Instant};

use vgpu_spec::command::*;
use vgpu_spec::handle::Handle;
use vgpu_spec::job::{Job, OP_FILL};
use vgpu_spec::pte::{ENTRIES, VALID};
use vgpu_spec::regs::gpu as regs;

use super::rig;
use crate::function::Function as _;
use crate::testing::Rig;

/// What a reset, under the machine's lock, may take in a test build on a loaded host. Without a bound it was minutes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tables linked so that each directory entry leads to as many tables as there are, all of them full: the root first.
fn knot(rig: &Rig) -> (Handle, Vec<Handle>) {
    let space = rig.bind();
    let ctx = space.ctx;
    let root = space.tables[&(3, 0)];
    let pages: Vec<Handle> =
        (40..44).map(|index| Handle(rig.ok(OP_GRANT, ctx, [PAGE_TABLE.into(), index, 0, 0, 0]))).collect();
    let raw = rig.alloc(4096);
    // Each of them is table, directory and leaves at once: whatever level it is met at, it is full.
    for (i, page) in pages.iter().enumerate() {
        for entry in 0..ENTRIES as u64 {
            let next = pages[(i + entry as usize) % pages.len()].index();
            rig.put(raw + 8 * entry, VALID | u64::from(next) << 12);
        }
        rig.ok(OP_WRITE_PTES, ctx, [page.0, (ENTRIES as u64) << 16, raw, 0, 0]);
    }
    (ctx, std::iter::once(root).chain(pages).collect())
}

/// Waits until the command processor is in the middle of something.
fn at_work(rig: &Rig) {
    rig.until("the ring to be at work", || rig.gpu.device.core.is_locked());
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn a_reset_does_not_wait_for_a_ring_of_endless_commands() {
    let rig = rig();
    let (ctx, pages) = knot(&rig);
    let raw = rig.alloc(0x2000);
    for entry in 0..ENTRIES as u64 {
        for (at, page) in [(raw, pages[1]), (raw + 0x1000, pages[2])] {
            rig.put(at + 8 * entry, VALID | u64::from(page.index()) << 12);
        }
    }
    let link = |from: u64| Command {
        op: OP_WRITE_PTES,
        ctx: ctx.0,
        arg: [pages[0].0, (ENTRIES as u64) << 16, from, 0, 0],
        ..Command::default()
    };
    let commands: Vec<Command> = (0..60).map(|i| link(raw + i % 2 * 0x1000)).collect();
    rig.submit(&commands);
    at_work(&rig);
    let began = Instant::now();
    let _ = rig.gpu.reset();
    assert!(began.elapsed() < PATIENCE, "the reset took {:?}", began.elapsed());
    rig.start();
    assert!(rig.bind().close().iter().all(|status| *status == STATUS_OK));
    // Nor does the end of the device.
    let (ctx, pages) = knot(&rig);
    let endless = |from: u64| Command {
        op: OP_WRITE_PTES,
        ctx: ctx.0,
        arg: [pages[0].0, (ENTRIES as u64) << 16, from, 0, 0],
        ..Command::default()
    };
    let commands: Vec<Command> = (0..60).map(|i| endless(raw + i % 2 * 0x1000)).collect();
    rig.submit(&commands);
    at_work(&rig);
    let began = Instant::now();
    rig.gpu.shutdown();
    assert!(began.elapsed() < PATIENCE, "the shutdown took {:?}", began.elapsed());
}

#[test]
fn a_doorbell_that_races_with_the_queues_end_begins_nothing() {
    let rig = rig();
    let mut space = rig.bind();
    let (first, mut second) = (space.queue(2), space.queue(2));
    let device = &rig.gpu.device;
    // As if an engine were at work on the first queue: its destruction waits, and that of the second behind it.
    assert!(device.sched.claim(first.handle.index()));
    let destroy = |queue: Handle| Command {
        op: OP_QUEUE_DESTROY,
        ctx: space.ctx.0,
        arg: [queue.0, 0, 0, 0, 0],
        ..Command::default()
    };
    let last = rig.submit(&[destroy(first.handle), destroy(second.handle)]);
    rig.until("both to be taken", || rig.read(regs::CMD_HEAD) == last);
    // The doorbell found the queue alive just before.
    let job = Job { op: OP_FILL, dst: 0x7000, len: 8, ..Job::default() };
    let index = second.handle.index();
    rig.memory.snapshot().write_object(second.ring, &job).unwrap();
    second.tail = 1;
    device.queues[index as usize]
        .doorbell
        .store(1 | second.handle.generation() << 16, std::sync::atomic::Ordering::SeqCst);
    device.sched.schedule(index);
    rig.until("the queue's turn", || {
        device.queues[index as usize].run.lock().head == 1 || device.faults.parked(None) == 1
    });
    device.sched.give_back(first.handle.index(), false);
    rig.wait(last);
    assert_eq!((device.faults.parked(None), rig.gpu.counters().faults), (0, 0));
    space.queues.clear();
    assert!(space.close().iter().all(|status| *status == STATUS_OK));
}
