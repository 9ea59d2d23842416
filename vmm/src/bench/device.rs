// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device alone, in this process: commands a second, and its bandwidth against a plain memcpy.

use std::hint::black_box;
use std::time::Instant;

use vgpu_spec::command::{Command, OP_INVALIDATE, OP_WRITE_PTES};
use vgpu_spec::job::{FLAG_NO_IRQ, Job, OP_COPY};
use vgpu_spec::pte;

use super::figure::{Figure, Goal, median, paired_ratio};
use super::rig::{HUGE, JOBS, RING, Rig, trouble};
use crate::failure::{Failure, Result};

const VA: u64 = 0x10_0000_0000;
/// Samples of a command's rate.
const SAMPLES: usize = 15;
/// Rings full of commands a sample.
const REPEATS: usize = 8;
/// Rounds of copying.
const ROUNDS: usize = 21;
/// Pairs of buffers, 2 MiB each: together more than caches hold.
const PAIRS: usize = 16;

/// WRITE_PTES, in process.
pub(super) fn tables() -> Result<Vec<Figure>> {
    let mut rig = Rig::new(16 << 20)?;
    let table = rig.table(0, VA)?;
    let entries = rig.alloc(4096)?;
    for index in 0..512 {
        let leaf = (0x1000_0000 + index * 4096) | pte::VALID | pte::WRITE;
        rig.memory.snapshot().store_u64(entries + 8 * index, leaf).map_err(trouble)?;
    }
    let mut figures = Vec::new();
    for count in [1_u64, 512] {
        let arg = [table.0, count << 16, entries, 0, 0];
        let rate = rate(&mut rig, OP_WRITE_PTES, arg)?;
        figures.push(Figure::new(
            "tables",
            format!("device/write-ptes-{count}"),
            rate * count as f64,
            "entries/s",
            format!("the device alone, in process: entries written by WRITE_PTES commands of {count}, 256 commands a doorbell"),
        ));
    }
    Ok(figures)
}

/// INVALIDATE, in process.
pub(super) fn invalidate() -> Result<Vec<Figure>> {
    let mut rig = Rig::new(16 << 20)?;
    let rate = rate(&mut rig, OP_INVALIDATE, [VA, VA + 0xfff, 0, 0, 0])?;
    Ok(vec![Figure::new(
        "invalidate",
        "device/invalidate",
        rate,
        "commands/s",
        "the device alone, in process: INVALIDATE commands of one page with nothing in flight, 256 a doorbell",
    )])
}

/// Commands a second: the median of the samples.
fn rate(rig: &mut Rig, op: u16, arg: [u64; 5]) -> Result<f64> {
    let batch = [Command { op, ctx: rig.ctx.0, arg, ..Command::default() }; RING];
    let mut rates = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let began = Instant::now();
        for _ in 0..REPEATS {
            rig.run(&batch)?;
        }
        rates.push((REPEATS * RING) as f64 / began.elapsed().as_secs_f64());
    }
    median(&rates).ok_or_else(nothing)
}

/// COPY against memcpy, in turns.
pub(super) fn bandwidth() -> Result<Vec<Figure>> {
    let mut rig = Rig::new((2 * PAIRS as u64 + 2) * HUGE)?;
    let mut pairs = Vec::new();
    for pair in 0..PAIRS as u64 {
        let (from, to) = (rig.alloc(HUGE)?, rig.alloc(HUGE)?);
        let (source, target) = (VA + 2 * pair * HUGE, VA + (2 * pair + 1) * HUGE);
        for (va, address) in [(source, from), (target, to)] {
            rig.map(va, address | pte::HUGE)?;
            for offset in (0..HUGE).step_by(4096) {
                rig.map(2 * VA + (va - VA) + offset, address + offset)?;
            }
            let text = vec![pair as u8 + 1; HUGE as usize];
            rig.memory.snapshot().write(address, &text).map_err(trouble)?;
        }
        rig.memory.snapshot().write(from, &vec![0xa0 | pair as u8; HUGE as usize]).map_err(trouble)?;
        pairs.push((source, target, to));
    }
    let mut plain: Vec<(Vec<u8>, Vec<u8>)> =
        (0..PAIRS).map(|pair| (vec![pair as u8 + 1; HUGE as usize], vec![0xff; HUGE as usize])).collect();

    let gib = (JOBS as u64 * HUGE) as f64 / f64::from(1 << 30);
    let (mut memcpy, mut huge, mut small) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let mut rates = [0.0; 3];
        // Each is first, second and last equally often.
        for turn in 0..3 {
            let which = (round + turn) % 3;
            let began = Instant::now();
            match which {
                0 => copy_plainly(&mut plain),
                _ => {
                    let base = if which == 1 { 0 } else { VA };
                    rig.jobs(pairs.iter().cycle().take(JOBS).map(|&(from, to, _)| Job {
                        op: OP_COPY,
                        flags: FLAG_NO_IRQ,
                        dst: base + to,
                        src: base + from,
                        len: HUGE,
                        ..Job::default()
                    }))?;
                }
            }
            rates[which] = gib / began.elapsed().as_secs_f64();
        }
        // The first round fills the TLB and touches everything once.
        if round > 0 {
            memcpy.push(rates[0]);
            huge.push(rates[1]);
            small.push(rates[2]);
        }
    }
    arrived(&rig, &pairs)?;
    let about = "the device's COPY, in process, one engine, 64 jobs of 2 MiB over 16 pairs of buffers, the doorbell and the wait included";
    let value = |samples: &[f64]| median(samples).ok_or_else(nothing);
    let against = |samples: &[f64]| paired_ratio(samples, &memcpy).ok_or_else(nothing);
    Ok(vec![
        Figure::new(
            "bandwidth",
            "memcpy",
            value(&memcpy)?,
            "GiB/s",
            "a plain memcpy of the same sizes and numbers, between ordinary buffers of this process, in turns with the others",
        ),
        Figure::new(
            "bandwidth",
            "copy-2MiB-leaves",
            value(&huge)?,
            "GiB/s",
            format!("{about}; against memcpy"),
        )
        .ratio(against(&huge)?)
        .goal(Goal::AtLeast(0.8)),
        Figure::new(
            "bandwidth",
            "copy-4KiB-leaves",
            value(&small)?,
            "GiB/s",
            format!("{about}; against memcpy"),
        )
        .ratio(against(&small)?),
    ])
}

fn copy_plainly(plain: &mut [(Vec<u8>, Vec<u8>)]) {
    for _ in 0..JOBS / PAIRS {
        for (from, to) in &mut *plain {
            to.copy_from_slice(black_box(from));
            black_box(to);
        }
    }
}

/// A copy that did not copy would be fast.
fn arrived(rig: &Rig, pairs: &[(u64, u64, u64)]) -> Result<()> {
    let mut text = vec![0; HUGE as usize];
    for (pair, &(.., address)) in pairs.iter().enumerate() {
        rig.memory.snapshot().read(address, &mut text).map_err(trouble)?;
        if text.iter().any(|&byte| byte != 0xa0 | pair as u8) {
            return Err(Failure::inconclusive("the device did not copy what it was to copy (a defect)"));
        }
    }
    Ok(())
}

fn nothing() -> Failure {
    Failure::inconclusive("nothing was measured (a defect)")
}
