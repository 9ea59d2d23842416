// SPDX-License-Identifier: MIT OR Apache-2.0
//! What jobs do to memory.

use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::command::*;
#[allow(unused_imports, reason = "a command and a job have this name, with the same value")]
use vgpu_spec::job::OP_NOP;
use vgpu_spec::job::*;
use vgpu_spec::pte::{ATOMIC, HUGE, VALID, VRAM, WRITE};

use super::{GpuConfig, rig};
use crate::function::Function as _;
use crate::testing::Rig;

const VA: u64 = 0x7f12_3400_0000;
const OTHER: u64 = 0x1_0000_0000;

fn job(op: u16, dst: u64, src: u64, len: u64, operand: [u64; 3]) -> Job {
    Job { op, dst, src, len, operand, ..Job::default() }
}

#[test]
fn fill_check_copy_and_compare_over_pages_that_lie_apart() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let (a, b) = (rig.alloc(0x8000), rig.alloc(0x8000));
    // Backwards, so that neighbours in the address space are none in memory.
    for page in 0..8 {
        space.map_range(VA + page * 0x1000, a + (7 - page) * 0x1000, 0x1000);
        space.map_range(OTHER + page * 0x1000, b + page * 0x1000, 0x1000);
    }
    let done = queue.run(&rig, job(OP_FILL, VA + 8, 0, 0x7ff0, [100, 3, 0]));
    assert_eq!((done.status, done.sequence, done.fence), (JOB_OK, 1, 1));
    assert_eq!(rig.get(a + 0x7000 + 8), 100);
    assert_eq!(rig.get(a + 0x6000), 100 + 3 * 511);
    let done = queue.run(&rig, job(OP_CHECK, 0, VA + 8, 0x7ff0, [100, 3, 0]));
    assert_eq!((done.status, done.result, done.address), (JOB_OK, 0, 0));
    assert_eq!(queue.run(&rig, job(OP_COPY, OTHER + 0x10, VA + 8, 0x7f00, [0; 3])).status, JOB_OK);
    assert_eq!(rig.get(b + 0x10), 100);
    let compare = job(OP_COMPARE, OTHER + 0x10, VA + 8, 0x7f00, [0; 3]);
    let done = queue.run(&rig, compare);
    assert_eq!((done.status, done.result), (JOB_OK, 0));
    rig.put(b + 0x3000, 1);
    rig.put(b + 0x5008, 1);
    let done = queue.run(&rig, compare);
    assert_eq!((done.status, done.result, done.address), (JOB_OK, 2, VA + 0x2ff8));
    let done = queue.run(&rig, job(OP_CHECK, 0, VA, 16, [5, 0, 0]));
    assert_eq!((done.result, done.address), (2, VA));
    rig.until("the fence", || rig.get(queue.fence) == queue.tail);
    assert!(space.close().iter().all(|status| *status == STATUS_OK));
}

#[test]
fn huge_leaves_and_vram() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let memory = rig.alloc(4 << 20);
    space.map(VA, memory | VALID | WRITE | HUGE);
    space.map(VA + (2 << 20), (memory + (2 << 20)) | VALID | WRITE | HUGE);
    let done = queue.run(&rig, job(OP_FILL, VA + 0x1000, 0, (4 << 20) - 0x2000, [1, 1, 0]));
    assert_eq!(done.status, JOB_OK);
    assert_eq!(rig.get(memory + 0x1000), 1);
    assert_eq!(rig.get(memory + (4 << 20) - 0x1008), ((4 << 20) - 0x2000) / 8);
    assert_eq!(rig.get(memory + (4 << 20) - 0x1000), 0);
    let counters = rig.gpu.counters();
    assert_eq!((counters.tlb_misses, counters.walks, counters.distinct_pages), (2, 2, 2));

    for page in 0..2_u64 {
        let handle = rig.ok(OP_GRANT, space.ctx, [PAGE_DATA.into(), 5 + page, 0, 0, 0]);
        space.data.push(vgpu_spec::handle::Handle(handle));
        space.map(OTHER + page * 0x1000, (5 + page) << 12 | VALID | WRITE | VRAM);
    }
    assert_eq!(queue.run(&rig, job(OP_COPY, OTHER, VA + 0x1000, 0x2000, [0; 3])).status, JOB_OK);
    let mut word = [0; 8];
    rig.gpu.bar_read(2, 0x6000, &mut word);
    assert_eq!(u64::from_le_bytes(word), 0x1000 / 8 + 1);
    assert!(space.close().iter().all(|status| *status == STATUS_OK));
}

#[test]
fn single_words() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queue = space.queue(4);
    let memory = rig.alloc(0x4_0000);
    space.map_range(VA, memory, 0x4_0000);
    let mut strided = job(OP_STRIDED, VA, 0, 0x400, [1000, 0x100, 0]);
    strided.flags = FLAG_WRITE;
    assert_eq!(queue.run(&rig, strided).result, 0);
    assert_eq!((rig.get(memory), rig.get(memory + 0x3_ff00)), (1000, 2023));
    strided.flags = 0;
    assert_eq!(queue.run(&rig, strided).result, (1000..2024).sum::<u64>());
    let add = job(OP_ATOMIC_ADD, VA + 8, 0, 100, [5, 0, 0]);
    assert_eq!(queue.run(&rig, add).result, (0..100).map(|i| i * 5).sum::<u64>());
    assert_eq!(rig.get(memory + 8), 500);

    let mut model: Vec<u64> = (0..0x8000).map(|i| rig.get(memory + i * 8)).collect();
    let mut sum = 0_u64;
    for i in 0..3000 {
        let index = random_index(42, i, 0x8000);
        sum = sum.wrapping_add(model[index as usize]);
        model[index as usize] ^= 77 ^ index;
    }
    let mut random = job(OP_RANDOM, VA, 0, 3000, [42, 0x4_0000, 77]);
    random.flags = FLAG_WRITE;
    assert_eq!(queue.run(&rig, random).result, sum);
    assert!(model.iter().enumerate().all(|(i, word)| rig.get(memory + 8 * i as u64) == *word));
    let counters = rig.gpu.counters();
    assert_eq!(counters.accesses, 0x400 * 2 + 100 + 3000);
    assert_eq!((counters.distinct_pages, counters.jobs), (64, 4));
    // Two engines, so each page is missed twice at the most.
    assert!((64..=128).contains(&counters.tlb_misses));
}

#[test]
fn bad_jobs_bus_errors_and_interrupts() {
    let rig = rig();
    let mut space = rig.bind();
    let mut queue = space.queue(2);
    assert_eq!(queue.run(&rig, job(99, 0, 0, 0, [0; 3])).status, JOB_BAD);
    assert_eq!(queue.run(&rig, job(OP_NOP, 0, 0, 0, [0; 3])).status, JOB_OK);
    assert_eq!(queue.run(&rig, job(OP_FILL, VA, 0, 0, [0; 3])).status, JOB_OK);
    rig.until("interrupts", || rig.interrupts.0[1].load(SeqCst) == 3);
    let mut quiet = job(OP_NOP, 0, 0, 0, [0; 3]);
    quiet.flags = FLAG_NO_IRQ;
    for _ in 0..10 {
        assert_eq!(queue.run(&rig, quiet).status, JOB_OK);
    }
    assert_eq!(rig.interrupts.0[1].load(SeqCst), 3);
    // Outside guest memory.
    space.map(VA, 0x5000 | VALID | WRITE | ATOMIC);
    let done = queue.run(&rig, job(OP_FILL, VA + 16, 0, 64, [0; 3]));
    assert_eq!((done.status, done.address), (JOB_BUS_ERROR, VA + 16));
    let done = queue.run(&rig, job(OP_ATOMIC_ADD, VA + 16, 0, 64, [0; 3]));
    assert_eq!((done.status, done.address), (JOB_BUS_ERROR, VA + 16));
}

/// A device that takes its time.
fn slow_rig() -> Rig {
    Rig::new(
        GpuConfig { jitter: Some(5), contexts: 8, queues: 8, table_pages: 64, ..GpuConfig::default() },
        64 << 20,
    )
}

/// Waits for one more completion interrupt than `heard`.
fn hear(rig: &Rig, heard: &mut u64) {
    let count = || rig.interrupts.0[1].load(SeqCst);
    rig.until("an interrupt", || count() > *heard);
    *heard = count();
}

#[test]
fn an_interrupt_stands_for_several_completions_and_none_is_forgotten() {
    const JOBS: u64 = 20;
    const ROUNDS: u64 = 20;
    let rig = slow_rig();
    let mut space = rig.bind();
    let mut queue = space.queue(6);
    space.map_range(VA, rig.alloc(0x1000), 0x1000);
    let mut heard = 0;
    for _ in 0..ROUNDS {
        // Between two that take a while: the first so that they stand ready, the last so that its interrupt is one of its own.
        let long = job(OP_RANDOM, VA, 0, 100_000, [7, 0x1000, 0]);
        queue.submit(&rig, long);
        for _ in 2..JOBS {
            queue.submit(&rig, job(OP_NOP, 0, 0, 0, [0; 3]));
        }
        let last = queue.submit(&rig, long);
        // As a driver that looks only when it is told to.
        while queue.completion(&rig, last).is_none() {
            hear(&rig, &mut heard);
        }
    }
    assert!(heard < JOBS * ROUNDS, "{heard} interrupts");
}

#[test]
fn the_interrupt_for_killed_jobs_comes_late_and_comes() {
    let rig = slow_rig();
    let mut heard = 0;
    for _ in 0..20 {
        let mut space = rig.bind();
        let mut queue = space.queue(2);
        // Nothing is mapped there: it is parked.
        queue.submit(&rig, job(OP_FILL, VA, 0, 8, [0; 3]));
        assert!(space.close().iter().all(|status| *status == STATUS_OK));
        hear(&rig, &mut heard);
    }
}

#[test]
fn jobs_of_a_queue_stay_in_order_and_rings_wrap() {
    let rig = rig();
    let mut space = rig.bind();
    let memory = rig.alloc(0x1000);
    space.map_range(VA, memory, 0x1000);
    let mut queues: Vec<_> = (0..3).map(|_| space.queue(3)).collect();
    for round in 0..200 {
        let mut indices = vec![];
        for (i, queue) in queues.iter_mut().enumerate() {
            for _ in 0..8 {
                indices.push((i, queue.submit(&rig, job(OP_FILL, VA + 8 * i as u64, 0, 8, [round, 0, 0]))));
            }
        }
        for (i, index) in indices {
            let done = queues[i].wait(&rig, index);
            assert_eq!((done.status, done.sequence), (JOB_OK, index as u32 + 1));
        }
        for i in 0..3 {
            assert_eq!(rig.get(memory + 8 * i), round);
        }
    }
}

#[test]
fn copies_to_vram_fail_when_they_are_to() {
    let rig = rig();
    let mut space = rig.bind();
    let (system, other, page) = (rig.alloc(0x1000), rig.alloc(0x1000), 3_u64);
    let handle = rig.ok(OP_GRANT, space.ctx, [PAGE_DATA.into(), page, 0, 0, 0]);
    assert_ne!(handle, 0);
    space.map(0x1000, system | VALID | WRITE);
    space.map(0x2000, other | VALID | WRITE);
    space.map(0x3000, page << 12 | VALID | WRITE | VRAM);
    let mut queue = space.queue(3);
    let mut run = |op, dst, src| {
        let job = Job { op, dst, src, len: 0x1000, operand: [7, 0, 0], ..Job::default() };
        queue.run(&rig, job).status
    };
    assert_eq!(run(OP_FILL, 0x3000, 0), JOB_OK);
    rig.gpu.fail_copies(2);
    // What does not write to VRAM is none of them.
    assert_eq!(run(OP_COPY, 0x1000, 0x2000), JOB_OK);
    assert_eq!(run(OP_COPY, 0x1000, 0x3000), JOB_OK);
    assert_eq!(rig.get(system), 7);
    rig.put(other, 9);
    assert_eq!(run(OP_COPY, 0x3000, 0x2000), JOB_BUS_ERROR);
    assert_eq!(run(OP_FILL, 0x3000, 0), JOB_BUS_ERROR);
    assert_eq!(run(OP_COPY, 0x1000, 0x3000), JOB_OK);
    assert_eq!(rig.get(system), 7, "nothing was written");
    assert_eq!(run(OP_COPY, 0x3000, 0x2000), JOB_OK);
    assert_eq!(run(OP_COPY, 0x1000, 0x3000), JOB_OK);
    assert_eq!(rig.get(system), 9);
    rig.gpu.fail_copies(5);
    rig.gpu.fail_copies(0);
    assert_eq!(run(OP_COPY, 0x3000, 0x2000), JOB_OK);
}
