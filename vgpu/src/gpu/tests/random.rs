// SPDX-License-Identifier: MIT OR Apache-2.0
//! Properties under random input.

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;

use proptest::prelude::*;
use vgpu_spec::command::*;
use vgpu_spec::fault::{ACCESS_WRITE, REASON_ABSENT, REASON_RIGHTS};
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::job::*;
use vgpu_spec::pte::{ATOMIC, HUGE, VALID, VRAM, WRITE};
use vgpu_spec::regs::gpu as regs;

use crate::function::Function as _;
use crate::gpu::context::State;
use crate::gpu::device::Device;
use crate::gpu::{GpuConfig, queue};
use crate::oracle::Inspect as _;
use crate::testing::{RAM, Rig};

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

/// What must hold whenever no command is at work.
fn assert_consistent(device: &Device) {
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

/// A handle that mostly exists.
fn handle(device: &Device, kind: Kind, from: u64) -> u64 {
    let (index, other) = ((from & 0xf) as u32, (from >> 8) as u32);
    if other % 8 == 0 {
        return Handle::new(kind, index % 5, other >> 3 & 3).0;
    }
    match kind {
        Kind::Context => device.contexts[index as usize % 3].now().0.0,
        Kind::Queue => device.queues[index as usize % 3].now().0.0,
        Kind::TablePage => device.tables.pages.handle(index).0,
        Kind::DataPage => device.data.handle(index).0,
        Kind::Fault => Handle::new(kind, index % 3, 1 + other % 4).0,
    }
}

/// Rings, completions and memory for jobs, apart from what random writes hit most.
const RINGS: u64 = RAM + 0x8_0000;
const PAGES_AT: u64 = RAM + 0x9_0000;

/// Two contexts with a few pages and a queue each, as a start.
fn scene(rig: &Rig) {
    for number in 0..2_u64 {
        let mut space = rig.bind();
        for page in 0..3 {
            space.map(
                page << 12,
                (PAGES_AT + (page << 12)) | VALID | WRITE | if page == 2 { 0 } else { ATOMIC },
            );
        }
        let ring = RINGS + number * 0x1000;
        rig.ok(OP_QUEUE_CREATE, space.ctx, [ring, 2, ring + 0x400, ring + 0x800, 0]);
    }
}

/// An address that may well be guest memory.
fn address(from: u64) -> u64 {
    match from % 8 {
        0 => from,
        1 => RAM + (1 << 20) - (from >> 3) % 256,
        _ => RAM + ((from >> 3) % (1 << 20) & !63),
    }
}

fn command(device: &Device, [op, a, b, c]: [u64; 4]) -> Command {
    let handle = |kind, from| handle(device, kind, from);
    let op = (op % 19) as u16;
    let arg = match op {
        OP_CTX_SET_ROOT => [if a % 8 == 0 { 0 } else { handle(Kind::TablePage, a) }, 0, 0, 0, 0],
        OP_GRANT => [1 + a % 3, b % 17, 0, 0, 0],
        OP_RETURN => [handle(if a % 2 == 0 { Kind::TablePage } else { Kind::DataPage }, a >> 1), 0, 0, 0, 0],
        OP_WRITE_PTES => [handle(Kind::TablePage, a), b % 600 | (b >> 20) % 600 << 16, address(c), 0, 0],
        OP_WRITE_PTE => {
            let address = if c % 2 == 0 { (c >> 8) % 16 << 12 } else { address(c >> 8) & !0xfff };
            [handle(Kind::TablePage, a), b % 3, address | c & 0x1f, 0, 0]
        }
        OP_CLEAR_PTES => [handle(Kind::TablePage, a), b % 600 | (b >> 20) % 600 << 16, 0, 0, 0],
        OP_INVALIDATE => [a, b, 0, 0, 0],
        OP_QUEUE_CREATE if a % 2 == 0 => {
            let ring = RINGS + (a >> 8) % 4 * 0x1000;
            [ring, 2 + b % 2, ring + 0x400, ring + 0x800, 0]
        }
        OP_QUEUE_CREATE => [address(a), b % 12, address(b >> 4), address(c), 0],
        OP_QUEUE_DESTROY => [handle(Kind::Queue, a), 0, 0, 0, 0],
        OP_FAULT_REPLAY | OP_FAULT_CANCEL => {
            [if a % 2 == 0 { 0 } else { handle(Kind::Fault, a >> 1) }, 0, 0, 0, 0]
        }
        _ => [a, b, c, 0, 0],
    };
    let ctx = if c % 16 == 0 { a } else { handle(Kind::Context, c >> 4) };
    Command { op, flags: u16::from(a % 64 == 63), ctx, arg, ..Command::default() }
}

fn job([op, a, b, c]: [u64; 4]) -> Job {
    // Around the addresses that the few table entries above reach.
    let va = |from: u64| {
        if from % 8 == 0 { from } else { (from % 16 / 15) << 39 | (from >> 4) % 4 << 12 | (from & 0xff8) }
    };
    let len = if a % 8 == 0 { a } else { a % 0x3000 & !7 };
    Job {
        op: (op % 10) as u16,
        flags: (op >> 8) as u16 & 3,
        reserved: u32::from(op % 64 == 63),
        fence: a,
        dst: va(b),
        src: va(c),
        len,
        operand: [a, if b % 8 == 0 { b } else { b % 0x2000 & !7 }, c],
    }
}

proptest! {
    #![proptest_config(cases(48))]

    /// Whatever a driver writes where: the device stays consistent, and a reset makes it as new.
    #[test]
    fn no_input_upsets_the_device(ops in proptest::collection::vec((0..16_u8, any::<[u64; 4]>()), 1..150)) {
        let rig = Rig::new(small(), 1 << 20);
        scene(&rig);
        for (kind, words) in ops {
            let [a, b, c, _] = words;
            match kind {
                0..=5 => {
                    let index = rig.read(regs::CMD_HEAD);
                    let slot = rig.commands + u64::from(index % 256) * 64;
                    rig.memory.snapshot().write_object(slot, &command(&rig.gpu.device, words)).unwrap();
                    rig.write(regs::CMD_TAIL, index.wrapping_add(1));
                    // Mostly it is taken before the next; not always, since the device may be off.
                    for _ in 0..50 {
                        if rig.read(regs::CMD_HEAD) != index {
                            break;
                        }
                        std::thread::yield_now();
                    }
                }
                6..=8 => {
                    let at = RINGS + (a >> 8) % 4 * 0x1000 + (a >> 16) % 4 * 64;
                    rig.memory.snapshot().write_object(at, &job(words)).unwrap();
                    let queue = &rig.gpu.device.queues[(a % 3) as usize];
                    // Mostly one more than last time.
                    let tail = queue.doorbell.load(SeqCst) as u16;
                    let tail = if b % 16 == 0 { b as u16 } else { tail.wrapping_add(1) };
                    let bell = queue.now().0.generation() << 16 | u32::from(tail);
                    rig.write(regs::QUEUE_DOORBELL + 4 * (a % 3) as u32, bell);
                    std::thread::yield_now();
                }
                9 if c % 4 == 0 => rig.write((a % 0x200) as u32 * 4, b as u32),
                10 if c % 4 == 0 => {
                    let register = regs::REGISTERS[(a % regs::REGISTERS.len() as u64) as usize];
                    rig.write(register.offset, b as u32 >> (c % 32));
                }
                11 => {
                    let _ = rig.gpu.bar_write(0, regs::WINDOW as u64 + a % 0x1010, &b.to_le_bytes()[..(c % 9) as usize]);
                    let mut data = [0; 16];
                    rig.gpu.bar_read((a % 5) as u8, b % 0x1_0010, &mut data[..(c % 17) as usize]);
                }
                12 if c % 4 == 0 => {
                    let _ = rig.gpu.config_write(a as u16 % 0x100, &b.to_le_bytes()[..(c % 9) as usize]);
                }
                13 => rig.start(),
                14 => {
                    let _ = rig.memory.snapshot().write_object(address(a), &[b, c]);
                    let _ = rig.gpu.context(Handle(handle(&rig.gpu.device, Kind::Context, c)));
                }
                _ => assert_consistent(&rig.gpu.device),
            }
        }
        assert_consistent(&rig.gpu.device);
        let _ = rig.gpu.reset();
        assert_consistent(&rig.gpu.device);
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
