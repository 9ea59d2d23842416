// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random input, most of which makes some sense to the device: the property tests and the fuzz targets play it.
//!
//! Meant for a device of three contexts and queues with 1 MiB of memory.
#![allow(clippy::unwrap_used, reason = "for tests only")]

use vgpu_spec::command::*;
use vgpu_spec::handle::{Handle, Kind};
use vgpu_spec::job::Job;
use vgpu_spec::pte::{ATOMIC, VALID, WRITE};
use vgpu_spec::regs::gpu as regs;

use super::{RAM, Rig};
use crate::function::Function as _;
use crate::gpu::Gpu;
use crate::oracle::Inspect as _;

/// A handle that mostly exists.
fn handle(gpu: &Gpu, kind: Kind, from: u64) -> u64 {
    let (index, other) = ((from & 0xf) as u32, (from >> 8) as u32);
    if other % 8 == 0 {
        return Handle::new(kind, index % 5, other >> 3 & 3).0;
    }
    match kind {
        Kind::Fault => Handle::new(kind, index % 3, 1 + other % 4).0,
        _ => gpu.last_handle(kind, index).0,
    }
}

/// Rings, completions and memory for jobs, apart from what random writes hit most.
const RINGS: u64 = RAM + 0x8_0000;
const PAGES_AT: u64 = RAM + 0x9_0000;

/// Two contexts with a few pages and a queue each, as a start.
pub fn scene(rig: &Rig) {
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
        _ => RAM + (((from >> 3) % (1 << 20)) & !63),
    }
}

fn command(gpu: &Gpu, [op, a, b, c]: [u64; 4]) -> Command {
    let handle = |kind, from| handle(gpu, kind, from);
    let op = (op % 19) as u16;
    let arg = match op {
        OP_CTX_SET_ROOT => [if a % 8 == 0 { 0 } else { handle(Kind::TablePage, a) }, 0, 0, 0, 0],
        OP_GRANT => [1 + a % 3, b % 17, 0, 0, 0],
        OP_RETURN => [handle(if a % 2 == 0 { Kind::TablePage } else { Kind::DataPage }, a >> 1), 0, 0, 0, 0],
        OP_WRITE_PTES => {
            [handle(Kind::TablePage, a), (b % 600) | (((b >> 20) % 600) << 16), address(c), 0, 0]
        }
        OP_WRITE_PTE => {
            let address = if c % 2 == 0 { ((c >> 8) % 16) << 12 } else { address(c >> 8) & !0xfff };
            [handle(Kind::TablePage, a), b % 3, address | (c & 0x1f), 0, 0]
        }
        OP_CLEAR_PTES => [handle(Kind::TablePage, a), (b % 600) | (((b >> 20) % 600) << 16), 0, 0, 0],
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
        if from % 8 == 0 { from } else { (from % 16 / 15) << 39 | (((from >> 4) % 4) << 12) | (from & 0xff8) }
    };
    let len = if a % 8 == 0 { a } else { (a % 0x3000) & !7 };
    Job {
        op: (op % 10) as u16,
        flags: (op >> 8) as u16 & 3,
        reserved: u32::from(op % 64 == 63),
        fence: a,
        dst: va(b),
        src: va(c),
        len,
        operand: [a, if b % 8 == 0 { b } else { (b % 0x2000) & !7 }, c],
    }
}

/// Does to the device what the input says: commands, jobs, register accesses, memory.
pub fn play(rig: &Rig, ops: &[(u8, [u64; 4])]) {
    for &(kind, words) in ops {
        let [a, b, c, _] = words;
        match kind % 16 {
            0..=5 => {
                let index = rig.read(regs::CMD_HEAD);
                let slot = rig.commands + u64::from(index % 256) * 64;
                rig.memory.snapshot().write_object(slot, &command(&rig.gpu, words)).unwrap();
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
                // Mostly one more than last time.
                let index = (a % 3) as u32;
                let tail = rig.gpu.last_doorbell(index) as u16;
                let tail = if b % 16 == 0 { b as u16 } else { tail.wrapping_add(1) };
                let bell = rig.gpu.last_handle(Kind::Queue, index).generation() << 16 | u32::from(tail);
                rig.write(regs::QUEUE_DOORBELL + 4 * (a % 3) as u32, bell);
                std::thread::yield_now();
            }
            9 if c % 4 == 0 => rig.write((a % 0x200) as u32 * 4, b as u32),
            10 if c % 4 == 0 => {
                let register = regs::REGISTERS[(a % regs::REGISTERS.len() as u64) as usize];
                rig.write(register.offset, b as u32 >> (c % 32));
            }
            11 => {
                let _ = rig.gpu.bar_write(
                    0,
                    regs::WINDOW as u64 + a % 0x1010,
                    &b.to_le_bytes()[..(c % 9) as usize],
                );
                let mut data = [0; 16];
                rig.gpu.bar_read((a % 5) as u8, b % 0x1_0010, &mut data[..(c % 17) as usize]);
            }
            12 if c % 4 == 0 => {
                let _ = rig.gpu.config_write(a as u16 % 0x100, &b.to_le_bytes()[..(c % 9) as usize]);
            }
            13 => rig.start(),
            14 => {
                let _ = rig.memory.snapshot().write_object(address(a), &[b, c]);
                let _ = rig.gpu.context(Handle(handle(&rig.gpu, Kind::Context, c)));
            }
            _ => rig.gpu.assert_consistent(),
        }
    }
}
