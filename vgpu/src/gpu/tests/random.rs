// SPDX-License-Identifier: MIT OR Apache-2.0
//! Properties under random input.

use std::collections::HashMap;

use proptest::prelude::*;
use vgpu_spec::command::*;
use vgpu_spec::fault::{ACCESS_WRITE, REASON_ABSENT, REASON_RIGHTS};
use vgpu_spec::job::*;
use vgpu_spec::pte::{HUGE, VALID, VRAM, WRITE};

use crate::function::Function as _;
use crate::gpu::GpuConfig;
use crate::testing::{Rig, input};

/// So many cases, unless PROPTEST_CASES asks for more.
fn cases(few: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { few };
    ProptestConfig { cases, max_shrink_iters: 200, ..default }
}

fn small() -> GpuConfig {
    GpuConfig {
        contexts: 3,
        queues: 3,
        table_pages: 16,
        vram_bytes: 1 << 16,
        tlb_entries: Some(16),
        ..GpuConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(48))]

    /// Whatever a driver writes where: the device stays consistent, and a reset makes it as new.
    #[test]
    fn no_input_upsets_the_device(ops in proptest::collection::vec((0..16_u8, any::<[u64; 4]>()), 1..150)) {
        let rig = Rig::new(small(), 1 << 20);
        input::scene(&rig);
        input::play(&rig, &ops);
        rig.gpu.assert_consistent();
        let _ = rig.gpu.reset();
        rig.gpu.assert_consistent();
        rig.start();
        let space = rig.bind();
        prop_assert!(space.close().iter().all(|status| *status == STATUS_OK));
    }
}

const PAGES: u64 = 6;

/// Addresses in different tables of every level; the last is in the middle of a 2 MiB block.
fn va(page: u64) -> u64 {
    [0, 0x1000, 1 << 21, 1 << 30, (1 << 39) + 0x5000, (1 << 47) + (6 << 21) + 0x3000][page as usize]
}

proptest! {
    #![proptest_config(cases(24))]

    /// Every access goes where the tables say, or where they said since the last invalidation of the page.
    #[test]
    fn translations_are_those_of_the_model(ops in proptest::collection::vec((0..8_u8, 0..PAGES, 0..4_u64, any::<bool>()), 1..60)) {
        let rig = Rig::new(GpuConfig { table_pages: 64, contexts: 2, queues: 2, ..GpuConfig::default() }, 16 << 20);
        let mut space = rig.bind();
        let mut queue = space.queue(4);
        let frames: Vec<u64> = (0..4).map(|_| rig.alloc(2 << 20)).collect();
        for (i, frame) in frames.iter().enumerate() {
            for offset in [0, 0x3000] {
                rig.put(frame + offset, 100 + i as u64);
            }
        }
        // By page: every leaf that may be in a TLB or the tables, the last one being the tables'; `None` is no leaf.
        let mut model: HashMap<u64, Vec<Option<(u64, bool)>>> = HashMap::new();
        for (op, page, frame, write) in ops {
            let huge = page == PAGES - 1;
            let known = model.entry(page).or_insert_with(|| vec![None]);
            match op {
                0..=2 => {
                    let rights = if write { WRITE } else { 0 };
                    space.map(va(page), frames[frame as usize] | VALID | rights | if huge { HUGE } else { 0 });
                    known.push(Some((100 + frame, write)));
                }
                3 => {
                    let clear = space.clear(u8::from(huge), va(page));
                    prop_assert_eq!(rig.command(clear).0, STATUS_OK);
                    known.push(None);
                }
                4 => {
                    prop_assert_eq!(rig.command(space.invalidate(va(page), va(page) + 0xfff)).0, STATUS_OK);
                    known.drain(..known.len() - 1);
                }
                _ => {
                    // Reads with or without the right to write: xor with nothing is a write that changes nothing.
                    let job = Job {
                        op: OP_RANDOM,
                        flags: if write { FLAG_WRITE } else { 0 },
                        dst: va(page),
                        len: 1,
                        operand: [0, 8, 0],
                        ..Job::default()
                    };
                    let index = queue.submit(&rig, job);
                    let mut fault = None;
                    rig.until("the end", || {
                        if let Some(entry) = rig.next_fault() {
                            fault = Some(entry);
                            rig.ok(OP_FAULT_CANCEL, space.ctx, [entry.fault, 0, 0, 0, 0]);
                        }
                        queue.completion(&rig, index).is_some()
                    });
                    let done = queue.wait(&rig, index);
                    let now = known[known.len() - 1];
                    match fault {
                        // A fault always comes from a walk of the tables as they are.
                        Some(fault) => {
                            prop_assert_eq!((done.status, done.address, fault.va), (JOB_FAULT, va(page), va(page)));
                            prop_assert_eq!(fault.access & ACCESS_WRITE != 0, write);
                            prop_assert_eq!(fault.reason, if now.is_none() { REASON_ABSENT } else { REASON_RIGHTS });
                            prop_assert!(now.is_none_or(|(_, may_write)| write && !may_write));
                        }
                        None => {
                            prop_assert_eq!(done.status, JOB_OK);
                            let allowed = |leaf: &Option<(u64, bool)>| {
                                leaf.is_some_and(|(value, may_write)| value == done.result && (may_write || !write))
                            };
                            prop_assert!(known.iter().any(allowed), "{} is none of {:?}", done.result, known);
                        }
                    }
                }
            }
        }
        prop_assert!(space.close().iter().all(|status| *status == STATUS_OK));
    }
}

#[test]
fn leaves_of_vram_follow_the_grants() {
    let rig = Rig::new(small(), 1 << 20);
    let (mut one, mut two) = (rig.bind(), rig.bind());
    let page = rig.ok(OP_GRANT, one.ctx, [PAGE_DATA.into(), 3, 0, 0, 0]);
    let (mut a, mut b) = (one.queue(2), two.queue(2));
    let fill = |value| Job { op: OP_FILL, len: 8, operand: [value, 0, 0], ..Job::default() };
    one.map(0, 3 << 12 | VALID | WRITE | VRAM);
    two.map(0, 3 << 12 | VALID | WRITE | VRAM);
    assert_eq!(a.run(&rig, fill(1)).status, JOB_OK);
    let index = b.submit(&rig, fill(2));
    let fault = rig.fault();
    assert_eq!(fault.ctx, two.ctx.0);
    let clear = one.clear(0, 0);
    let flush = one.invalidate(0, u64::MAX);
    let give = Command { op: OP_RETURN, ctx: one.ctx.0, arg: [page, 0, 0, 0, 0], ..Command::default() };
    let last = rig.submit(&[clear, flush, give]);
    rig.wait(last);
    rig.ok(OP_GRANT, two.ctx, [PAGE_DATA.into(), 3, 0, 0, 0]);
    rig.ok(OP_FAULT_REPLAY, two.ctx, [fault.fault, 0, 0, 0, 0]);
    assert_eq!(b.wait(&rig, index).status, JOB_OK);
}
