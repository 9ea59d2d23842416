// SPDX-License-Identifier: MIT OR Apache-2.0
//! Registers, rings from nowhere, the window, reset.

use std::sync::atomic::Ordering::SeqCst;

use vgpu_spec::command::*;
#[allow(unused_imports, reason = "a command and a job have this name, with the same value")]
use vgpu_spec::job::OP_NOP;
use vgpu_spec::job::*;
use vgpu_spec::pte::{VALID, WRITE};
use vgpu_spec::regs::gpu as regs;
use vgpu_spec::witness::{self, Record};

use super::rig;
use crate::function::{Backing, Function as _};
use crate::gpu::{Gpu, GpuConfig};
use crate::oracle::{Inspect as _, Rule};
use crate::testing::{RAM, Rig, anonymous_file};

const VA: u64 = 0x1234_5678_9000;

#[test]
fn identification_and_shape() {
    let rig = rig();
    assert_eq!(rig.read(regs::ID), regs::ID_VALUE);
    assert_eq!(rig.read(regs::VERSION), regs::VERSION_VALUE);
    let shape = [regs::CONTEXTS, regs::ENGINES, regs::QUEUES, regs::TABLE_PAGES, regs::DATA_PAGES];
    assert_eq!(shape.map(|register| rig.read(register)), [8, 2, 8, 64, 4096]);
    let bars = rig.gpu.bars();
    assert!(matches!(bars[1].backing, Backing::Mapped(_)));
    assert_eq!((bars.len(), rig.gpu.vectors(), rig.gpu.has_msix()), (3, 3, true));
    let mut id = [0; 4];
    rig.gpu.config_read(0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x4d47_1234);
}

#[test]
fn refused_accesses_are_counted() {
    let rig = rig();
    let mut byte = [0xaa; 1];
    rig.gpu.bar_read(0, regs::ID.into(), &mut byte);
    assert_eq!(byte, [0]);
    rig.write(regs::ID, 1);
    rig.write(0x024, 1);
    let _ = rig.gpu.bar_write(0, 0xffff_ffff_ffff_fffc, &[0; 4]);
    let _ = rig.gpu.bar_write(0, 0x42, &[0; 4]);
    let _ = rig.gpu.bar_write(0, 0, &[0; 64]);
    assert_eq!(rig.read(regs::BAD_ACCESSES), 6);
    assert_eq!(rig.read(regs::ID), regs::ID_VALUE);
    assert_eq!(rig.gpu.counters().bad_accesses, 6);
}

#[test]
fn rings_from_nowhere() {
    let rig = rig();
    // More commands than the ring holds.
    rig.write(regs::CMD_TAIL, 257);
    rig.until("an error", || rig.read(regs::ERROR) == regs::ERROR_CMD_RING);
    rig.until("an interrupt", || rig.interrupts.0[2].load(SeqCst) > 0);
    rig.write(regs::ERROR, u32::MAX);
    rig.start();
    rig.ok(OP_NOP, vgpu_spec::handle::Handle::NONE, [0; 5]);
    // Sizes and addresses that are none.
    for (base, size) in [
        (rig.commands, 3),
        (rig.commands, 17),
        (rig.commands + 8, 8),
        (0x1000, 8),
        (u64::MAX - 63, 16),
        (RAM + (64 << 20) - 64, 4),
    ] {
        rig.write(regs::CMD_BASE_LO, base as u32);
        rig.write(regs::CMD_BASE_LO + 4, (base >> 32) as u32);
        rig.write(regs::CMD_SIZE, size);
        assert_eq!(rig.read(regs::ERROR), regs::ERROR_CMD_RING, "{base:#x} {size}");
        rig.write(regs::ERROR, u32::MAX);
        rig.write(regs::CMD_TAIL, 1);
    }
    rig.write(regs::FAULT_SIZE, 31);
    assert_eq!(rig.read(regs::ERROR), regs::ERROR_FAULT_BUFFER);
    rig.write(regs::ERROR, u32::MAX);
    // A write-back to nowhere.
    rig.start();
    rig.write(regs::CMD_DONE_LO, 0x1001);
    rig.submit(&[Command { op: OP_NOP, ..Command::default() }]);
    rig.until("an error", || rig.read(regs::ERROR) == regs::ERROR_CMD_RING);
    // The first of them is told, and the others are counted.
    assert_eq!(rig.unusable(), [(None, "CMD_TAIL is ahead by more than the command ring holds".into())]);
    // And not that what was memory is none.
    assert_eq!(rig.oracle.violations()[0].count, 1 + 3 + 1);
}

impl Rig {
    /// What `ring/unusable` was found of: contexts, and why.
    fn unusable(&self) -> Vec<(Option<u64>, String)> {
        let found = self.oracle.violations().into_iter();
        let found = found.filter(|violation| violation.rule == Rule::RingUnusable);
        found
            .map(|violation| {
                let why = violation.summary.split(" has stopped: ").nth(1).unwrap_or_default();
                (violation.context, why.to_owned())
            })
            .collect()
    }
}

#[test]
fn doorbells_that_name_no_queue() {
    let rig = rig();
    let mut space = rig.bind();
    let queue = space.queue(2);
    let bell = |index: u32, value: u32| {
        rig.write(regs::ERROR, u32::MAX);
        rig.write(regs::QUEUE_DOORBELL + 4 * index, value);
        rig.read(regs::ERROR)
    };
    let generation = queue.handle.generation();
    assert_eq!(bell(200, 0), regs::ERROR_DOORBELL);
    assert_eq!(bell(1, 0x1_0000), regs::ERROR_DOORBELL);
    assert_eq!(bell(0, (generation + 1) << 16 | 1), regs::ERROR_DOORBELL);
    assert_eq!(bell(0, generation << 16), 0);
    // Five jobs in a ring of four: the queue is stopped.
    bell(0, generation << 16 | 5);
    rig.until("an error", || rig.read(regs::ERROR) == regs::ERROR_QUEUE);
    assert_eq!(
        rig.unusable(),
        [(Some(space.ctx.0), "the doorbell is ahead by more than the queue holds".into())]
    );
    rig.ok(OP_QUEUE_DESTROY, space.ctx, [queue.handle.0, 0, 0, 0, 0]);
    assert_eq!(bell(0, generation << 16 | 1), regs::ERROR_DOORBELL);
    assert_eq!(rig.gpu.counters().bad_handles, 4);
}

#[test]
fn the_window_shows_and_writes_tables() {
    let rig = rig();
    let mut space = rig.bind();
    let memory = rig.alloc(0x1000);
    let table = space.table(0, VA);
    rig.write(regs::WINDOW_PAGE, table.index());
    let at = u64::from(regs::WINDOW) + 8 * vgpu_spec::pte::index(VA, 0) as u64;
    let leaf = memory | VALID | WRITE;
    let _ = rig.gpu.bar_write(0, at, &leaf.to_le_bytes());
    let mut queue = space.queue(2);
    let job = Job { op: OP_FILL, dst: VA, len: 8, operand: [5, 0, 0], ..Job::default() };
    assert_eq!(queue.run(&rig, job).status, JOB_OK);
    assert_eq!(rig.get(memory), 5);
    let mut low = [0; 4];
    rig.gpu.bar_read(0, at, &mut low);
    assert_eq!(u32::from_le_bytes(low), leaf as u32);
    let _ = rig.gpu.bar_write(0, at, &[0; 4]);
    assert_eq!(rig.gpu.context(space.ctx).unwrap().live_leaves, 0);
    // Not granted, out of range, askew.
    rig.write(regs::WINDOW_PAGE, 60);
    let _ = rig.gpu.bar_write(0, at, &[0; 8]);
    rig.write(regs::WINDOW_PAGE, u32::MAX);
    let _ = rig.gpu.bar_write(0, at, &[0; 8]);
    rig.gpu.bar_read(0, at, &mut [0; 8]);
    rig.gpu.bar_read(0, at + 4, &mut [0; 8]);
    assert_eq!(rig.read(regs::BAD_ACCESSES), 3);
}

#[test]
fn interrupts_wait_for_being_enabled() {
    let rig = rig();
    rig.write(regs::IRQ_ENABLE, 0);
    rig.ok(OP_INTERRUPT, vgpu_spec::handle::Handle::NONE, [0; 5]);
    rig.until("the cause", || rig.read(regs::IRQ_STATUS) == 4);
    assert_eq!(rig.interrupts.0[2].load(SeqCst), 0);
    rig.write(regs::IRQ_ENABLE, 7);
    assert_eq!(rig.interrupts.0[2].load(SeqCst), 1);
    rig.write(regs::IRQ_STATUS, 4);
    assert_eq!(rig.read(regs::IRQ_STATUS), 0);
}

#[test]
fn nothing_happens_without_enable_and_bus_mastering() {
    let rig = rig();
    let mut space = rig.bind();
    let memory = rig.alloc(0x1000);
    space.map_range(VA, memory, 0x1000);
    let mut queue = space.queue(2);
    let job = Job { op: OP_FILL, dst: VA, len: 8, operand: [5, 0, 0], ..Job::default() };
    let _ = rig.gpu.config_write(4, &[2, 0]);
    let index = queue.submit(&rig, job);
    let command = rig.submit(&[Command { op: OP_NOP, ..Command::default() }]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(queue.completion(&rig, index).is_none());
    assert_ne!(rig.get32(rig.done), command);
    let _ = rig.gpu.config_write(4, &[6, 0]);
    assert_eq!(queue.wait(&rig, index).status, JOB_OK);
    rig.wait(command);
    rig.write(regs::CTRL, 0);
    let index = queue.submit(&rig, job);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(queue.completion(&rig, index).is_none());
    rig.write(regs::CTRL, regs::CTRL_ENABLE);
    assert_eq!(queue.wait(&rig, index).status, JOB_OK);
}

#[test]
fn a_reset_forgets_everything_but_generations() {
    let rig = rig();
    let memory = rig.alloc(2 << 20);
    let mut last = 0;
    for round in 0..20 {
        let mut space = rig.bind();
        assert!(space.ctx.generation() > last);
        last = space.ctx.generation();
        space.map_range(VA, memory, 0x1000);
        space.map(VA >> 21 << 21 ^ 1 << 30, memory | VALID | WRITE | vgpu_spec::pte::HUGE);
        let mut queue = space.queue(4);
        for _ in 0..10 {
            let dst = VA >> 21 << 21 ^ 1 << 30;
            queue.submit(&rig, Job { op: OP_FILL, dst, len: 2 << 20, ..Job::default() });
        }
        queue.submit(&rig, Job { op: OP_FILL, dst: 0x1000, len: 8, ..Job::default() });
        if round % 2 == 0 {
            rig.write(regs::CTRL, regs::CTRL_RESET);
            assert_eq!(rig.read(regs::CTRL), 0);
        } else {
            // As a guest does it: a function-level reset through configuration space.
            let _ = rig.gpu.config_write(0x58, &[0, 0x80]);
        }
        // Nothing of the device lands any more.
        rig.put(memory, 77);
        rig.put(queue.fence, 77);
        assert!(rig.gpu.context(space.ctx).is_none());
        for register in regs::REGISTERS.iter().filter(|r| r.offset >= regs::CTRL && r.count == 1) {
            assert_eq!(rig.read(register.offset), register.reset, "{}", register.name);
        }
        queue.ring(&rig);
        assert_eq!(rig.read(regs::ERROR), regs::ERROR_DOORBELL);
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!((rig.get(memory), rig.get(queue.fence)), (77, 77));
        rig.write(regs::ERROR, u32::MAX);
        rig.start();
        assert_eq!(rig.run(OP_CTX_RELEASE, space.ctx, [0; 5]).0, STATUS_BAD_HANDLE);
    }
}

#[test]
fn shapes_out_of_range_are_refused() {
    let make = |config: GpuConfig, vram: u64| {
        let memory = std::sync::Arc::new(crate::memory::SystemMemory::new());
        let switch = std::sync::Arc::new(crate::function::InterruptSwitch::new());
        let oracle = crate::oracle::Oracle::new(crate::oracle::OracleConfig::default());
        Gpu::new(config, memory, anonymous_file(vram), switch, oracle).is_ok()
    };
    let good = GpuConfig { table_pages: 8, vram_bytes: 0x1000, msix: false, ..GpuConfig::default() };
    assert!(make(good, 0x1000));
    assert!(!make(good, 0));
    assert!(!make(GpuConfig { contexts: 0, ..good }, 0x1000));
    assert!(!make(GpuConfig { queues: 257, ..good }, 0x1000));
    assert!(!make(GpuConfig { engines: 17, ..good }, 0x1000));
    assert!(!make(GpuConfig { vram_bytes: 0x3000, ..good }, 0x3000));
    assert!(!make(GpuConfig { tlb_entries: Some(0), ..good }, 0x1000));
    let cold = Rig::cold(good, 1 << 20);
    cold.gpu.shutdown();
    cold.gpu.shutdown();
}

impl Rig {
    /// The driver gives memory back. Whose the device says that it is.
    fn free(&self, start: u64, bytes: u64) -> Vec<String> {
        let arg = [start, bytes, 0, 0];
        self.oracle.witness(&Record { kind: witness::DMA_FREED, arg, ..Record::default() });
        let Some(last) = bytes.checked_sub(1).map(|more| start.saturating_add(more)) else {
            return Vec::new();
        };
        self.gpu.rings((start, last)).iter().map(ToString::to_string).collect()
    }
    fn ring_freed(&self) -> usize {
        self.oracle.violations().iter().filter(|violation| violation.rule == Rule::RingFreed).count()
    }
}

#[test]
fn memory_that_the_device_has_is_not_given_back() {
    let rig = rig();
    rig.start();
    let mut space = rig.bind();
    let other = rig.alloc(0x1000);
    let mut queue = space.queue(2);
    // What touches nothing of the device's, and what is no range.
    for (start, bytes) in [(other, 0x1000), (queue.ring - 8, 8), (queue.fence, 0), (u64::MAX - 7, 64), (0, 0)]
    {
        assert!(rig.free(start, bytes).is_empty(), "{start:#x} {bytes}");
    }
    assert_eq!(rig.ring_freed(), 0);
    let of = format!("{} of {}", queue.handle, space.ctx);
    for (start, bytes) in [
        (queue.ring, 1),
        (queue.ring + 64 * 4 - 1, 1),
        (queue.ring - 4, 5),
        (queue.completions + 32 * 4 - 1, 1),
        (queue.fence + 7, 1),
        (queue.fence - 8, 0x1000),
    ] {
        assert_eq!(rig.free(start, bytes)[0], of, "{start:#x} {bytes}");
    }
    let found = rig.oracle.violations();
    assert_eq!((found.len(), found[0].rule, found[0].context), (1, Rule::RingFreed, Some(space.ctx.0)));
    assert_eq!(found[0].count, 6);
    // Its jobs have ended by the end of RELEASE, and there are no more.
    let leaf = rig.alloc(0x1000) | VALID | WRITE;
    space.map(VA, leaf);
    queue.submit(
        &rig,
        Job { op: OP_RANDOM, dst: VA, len: 1 << 40, operand: [1, 0x1000, 0], ..Job::default() },
    );
    rig.ok(OP_CTX_RELEASE, space.ctx, [0; 5]);
    assert!(rig.free(queue.ring, 64).is_empty());
    // And of a living one by that of QUEUE_DESTROY.
    let mut living = rig.bind();
    let queue = living.queue(2);
    rig.ok(OP_QUEUE_DESTROY, living.ctx, [queue.handle.0, 0, 0, 0, 0]);
    assert!(rig.free(queue.ring, 64).is_empty());
}

#[test]
fn the_devices_own_rings_are_not_given_back_while_it_is_on() {
    let rig = rig();
    rig.start();
    assert_eq!(rig.free(rig.commands, 0x1000), ["the command ring"]);
    assert_eq!(rig.free(rig.done + 3, 4), ["the command ring"]);
    assert_eq!(rig.free(rig.faults, 1), ["the fault buffer"]);
    assert_eq!(rig.ring_freed(), 1);
    rig.write(regs::FAULT_SIZE, 0);
    assert!(rig.free(rig.faults, 1).is_empty());
    // Nor what was refused: a size that there is not, and a base in the middle of an entry.
    for (base, log2) in [(rig.faults, 13), (rig.faults + 8, 4)] {
        rig.write(regs::FAULT_BASE_LO, base as u32);
        rig.write(regs::FAULT_SIZE, log2);
        assert!(rig.free(rig.faults, 0x1000).is_empty(), "{base:#x} {log2}");
    }
    rig.write(regs::CTRL, 0);
    assert!(rig.free(rig.commands, 0x1000).is_empty());
}
