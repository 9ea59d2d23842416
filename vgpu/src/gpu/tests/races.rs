// SPDX-License-Identifier: MIT OR Apache-2.0
//! Engines at work while the driver takes memory away.

use vgpu_spec::command::*;
use vgpu_spec::job::*;
use vgpu_spec::pte::{HUGE, VALID, WRITE};

use super::rig;
use crate::oracle::Inspect as _;
use crate::testing::{Queue, Rig, Space};

const VA: u64 = 0x55_0000_0000;

fn fill(va: u64, len: u64, value: u64) -> Job {
    Job { op: OP_FILL, flags: FLAG_NO_IRQ, dst: va, len, operand: [value, 0, 0], ..Job::default() }
}
fn strided(va: u64, len: u64, value: u64) -> Job {
    let operand = [value, 8, 0];
    Job { op: OP_STRIDED, flags: FLAG_NO_IRQ | FLAG_WRITE, dst: va, len, operand, ..Job::default() }
}

/// Keeps two queues busy on the leaf while it is taken away; then writes where it was, and nothing may change that.
fn take_away(rig: &Rig, space: &mut Space<'_>, queues: &mut [Queue], rounds: u64, leaf: u64, bytes: u64) {
    let level = u8::from(leaf & HUGE != 0);
    let memory = leaf & vgpu_spec::pte::ADDRESS;
    for round in 0..rounds {
        space.map(VA, leaf);
        let mut last = vec![];
        for queue in queues.iter_mut() {
            for i in 0..4 {
                let job = if i % 2 == 0 {
                    fill(VA, bytes, round)
                } else {
                    strided(VA, bytes.min(0x8000) / 8, round)
                };
                last.push(queue.submit(rig, job));
            }
        }
        for _ in 0..round % 50 {
            std::hint::spin_loop();
        }
        let commands = [space.clear(level, VA), space.invalidate(VA, VA + bytes - 1)];
        let index = rig.submit(&commands);
        rig.wait(index);
        let mark = 0xdead_0000 + round;
        rig.put(memory, mark);
        rig.put(memory + bytes - 8, mark);
        let view = rig.gpu.context(space.ctx).unwrap();
        assert_eq!((view.live_leaves, view.tlb_entries), (0, 0));
        for _ in 0..200 {
            assert_eq!((rig.get(memory), rig.get(memory + bytes - 8)), (mark, mark), "round {round}");
        }
        rig.command(Command { op: OP_CTX_KILL, ctx: space.ctx.0, ..Command::default() });
        for (queue, index) in queues.iter().flat_map(|queue| (0..4).map(move |i| (queue, i))) {
            let done = queue.wait(rig, queue.tail - 1 - index);
            assert!(matches!(done.status, JOB_OK | JOB_KILLED));
        }
        while rig.next_fault().is_some() {}
        assert_eq!((rig.get(memory), rig.get(memory + bytes - 8)), (mark, mark), "round {round}");
    }
}

#[test]
fn after_an_invalidation_nothing_lands() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queues = [space.queue(4), space.queue(4)];
    let memory = rig.alloc(2 << 20);
    take_away(&rig, &mut space, &mut queues, 300, memory | VALID | WRITE, 0x1000);
    rig.command(space.invalidate(0, u64::MAX));
    take_away(&rig, &mut space, &mut queues, 150, memory | VALID | WRITE | HUGE, 2 << 20);
    assert!(space.close().iter().all(|status| *status == STATUS_OK));
}

#[test]
fn after_a_release_nothing_lands() {
    let rig = rig();
    let memory = rig.alloc(2 << 20);
    for round in 0..100_u64 {
        let mut space = rig.bind();
        space.map(VA, memory | VALID | WRITE | HUGE);
        let mut queues = [space.queue(4), space.queue(4)];
        for queue in &mut queues {
            for i in 0..8 {
                queue.submit(&rig, if i % 2 == 0 { fill(VA, 2 << 20, 1) } else { strided(VA, 0x8000, 1) });
            }
        }
        for _ in 0..(round * 7) % 100 {
            std::hint::spin_loop();
        }
        rig.ok(OP_CTX_RELEASE, space.ctx, [0; 5]);
        rig.put(memory, 0xdead);
        rig.put(memory + 0x8000 - 8, 0xdead);
        let view = rig.gpu.context(space.ctx).unwrap();
        assert_eq!((view.released, view.tlb_entries, view.in_flight), (true, 0, None));
        for queue in &queues {
            for index in 0..8 {
                // The drain has seen to it: no waiting.
                assert!(queue.completion(&rig, index).is_some());
            }
        }
        std::thread::yield_now();
        assert_eq!((rig.get(memory), rig.get(memory + 0x8000 - 8)), (0xdead, 0xdead));
        // A test rig has only so much memory: use it again.
        assert!(space.close().iter().skip(1).all(|status| *status == STATUS_OK));
    }
}

#[test]
fn faults_and_invalidations_of_many_contexts_at_once() {
    let rig = rig();
    let mut spaces: Vec<_> = (0..4).map(|_| rig.bind()).collect();
    let memory = rig.alloc(0x4000);
    let mut queues: Vec<_> = spaces.iter_mut().map(|space| space.queue(5)).collect();
    for round in 0..50 {
        let mut pending = vec![];
        for (i, queue) in queues.iter_mut().enumerate() {
            for _ in 0..16 {
                pending.push((i, queue.submit(&rig, fill(VA, 0x1000, round))));
            }
        }
        // Each is served until its jobs are done, and loses its page again now and then.
        let mut served = 0;
        rig.until("all jobs", || {
            if let Some(fault) = rig.next_fault() {
                let i = spaces.iter().position(|space| space.ctx.0 == fault.ctx).unwrap();
                spaces[i].map_range(VA, memory + 0x1000 * i as u64, 0x1000);
                rig.ok(OP_FAULT_REPLAY, spaces[i].ctx, [fault.fault, 0, 0, 0, 0]);
                served += 1;
                if served % 3 == 0 {
                    let commands = [spaces[i].clear(0, VA), spaces[i].invalidate(VA, VA + 0xfff)];
                    let index = rig.submit(&commands);
                    rig.wait(index);
                }
            }
            pending.iter().all(|(i, index)| queues[*i].completion(&rig, *index).is_some())
        });
        for (i, index) in pending {
            assert_eq!(queues[i].wait(&rig, index).status, JOB_OK);
        }
        for space in &mut spaces {
            let commands = [space.clear(0, VA), space.invalidate(VA, VA + 0xfff)];
            let index = rig.submit(&commands);
            rig.wait(index);
        }
    }
}

/// Dropping many entries takes a while. A step that begins meanwhile may still hit one of them; it must not remember it.
#[test]
fn a_hit_during_an_invalidation_is_not_remembered() {
    const PAGES: u64 = 20_000;
    const HOT: u64 = 32;
    let rig = rig();
    let mut space = rig.bind();
    let mut queues = [space.queue(4), space.queue(4)];
    let memory = rig.alloc(0x1000);
    for page in 0..PAGES {
        space.map(VA + (page << 12), memory | VALID | WRITE);
    }
    let strided = |pages: u64, times: u64| Job {
        op: OP_STRIDED,
        dst: VA,
        len: pages * times,
        operand: [0, if times == 1 { 0x1000 } else { 0 }, 0],
        ..Job::default()
    };
    for round in 0..12_u64 {
        let mut last = vec![];
        for queue in &mut queues {
            // Every entry, so that dropping them takes long; then one hot page, over and over.
            last.push(queue.submit(&rig, strided(PAGES, 1)));
        }
        for (queue, index) in queues.iter().zip(&last) {
            assert_eq!(queue.wait(&rig, *index).status, JOB_OK);
        }
        for queue in &mut queues {
            for _ in 0..3 {
                // Far more than can be done before the invalidation, however long this thread has to wait for a CPU: a fault ends it.
                queue.submit(&rig, strided(MAX_LEN / 2, 2));
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
        let mut commands: Vec<Command> = (0..HOT).map(|page| space.clear(0, VA + (page << 12))).collect();
        commands.push(space.invalidate(VA, VA + (PAGES << 12) - 1));
        rig.wait(rig.submit(&commands));
        // Whatever still runs must fault by now: nothing of the hot page is translated any more.
        for (queue, first) in queues.iter().zip(&last) {
            let fault =
                (1..=3).any(|job| queue.completion(&rig, first + job).is_none_or(|done| done.status == 0));
            assert!(fault, "all jobs were over before the invalidation: this round shows nothing");
        }
        let view = rig.gpu.context(space.ctx).unwrap();
        assert_eq!(view.tlb_entries, 0);
        rig.command(Command { op: OP_CTX_KILL, ctx: space.ctx.0, ..Command::default() });
        while rig.next_fault().is_some() {}
        for queue in &mut queues {
            let index = queue.submit(&rig, strided(1, 1));
            assert_eq!(rig.fault().va, VA, "round {round}: a stale translation was used");
            rig.command(Command { op: OP_CTX_KILL, ctx: space.ctx.0, ..Command::default() });
            assert_eq!(queue.wait(&rig, index).status, JOB_KILLED);
        }
        while rig.next_fault().is_some() {}
        for page in 0..HOT {
            space.map(VA + (page << 12), memory | VALID | WRITE);
        }
    }
}
