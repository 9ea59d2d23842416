// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the job operations do to memory, one bounded step at a time.

use std::sync::atomic::{AtomicU64, Ordering};

use vgpu_spec::fault::{ACCESS_ATOMIC, ACCESS_WRITE};
use vgpu_spec::handle::Handle;
use vgpu_spec::job::{
    FLAG_WRITE, JOB_BUS_ERROR, OP_ATOMIC_ADD, OP_CHECK, OP_COMPARE, OP_COPY, OP_FILL, OP_RANDOM, random_index,
};
use vgpu_spec::pte::{self, HUGE_SHIFT, leaf_address, leaf_shift};
use vm_memory::VolatileSlice;
use zerocopy::IntoBytes as _;

use super::context::Context;
use super::counters::count;
use super::device::Device;
use super::engine::{Engine, Fault, SCRATCH, Step};
use super::inflight::EMPTY;
use super::work::{Shape, Work};
use crate::memory::{MemoryError, Snapshot};

/// Single words accessed in one published step.
const BATCH: u64 = 256;

/// What the oracle is told of where a translation led: the 4 KiB frame, or the page of VRAM.
#[inline]
fn frame(raw: u64, va: u64) -> u64 {
    leaf_address(raw, va) & pte::ADDRESS
}

impl Device {
    /// The memory that a leaf leads to, at most `bytes` of it.
    #[inline]
    fn target<'a>(
        &'a self,
        snapshot: &'a Snapshot,
        (raw, va): (u64, u64),
        bytes: u64,
        write: bool,
    ) -> Result<VolatileSlice<'a>, MemoryError> {
        let address = leaf_address(raw, va);
        if raw & pte::VRAM != 0 {
            self.vram.slice_up_to(address, bytes, write)
        } else {
            snapshot.slice_up_to(address, bytes, write)
        }
    }

    /// The word that a leaf leads to.
    #[inline]
    fn word<'a>(
        &'a self,
        snapshot: &'a Snapshot,
        (raw, va): (u64, u64),
        write: bool,
    ) -> Result<&'a AtomicU64, MemoryError> {
        let address = leaf_address(raw, va);
        if raw & pte::VRAM != 0 {
            self.vram.atomic_u64(address, write)
        } else {
            snapshot.atomic_u64(address, write)
        }
    }
}

impl Engine<'_> {
    /// Does the next part of a job.
    pub(crate) fn step(&mut self, context: &Context, ctx: Handle, work: &mut Work) -> Step {
        match work.shape {
            Shape::Nothing => Step::More,
            Shape::Linear { first, second } => self.linear(context, ctx, work, first, second),
            Shape::Strided { access } => {
                let Some(count) = words_left(work) else { return Step::More };
                let (base, stride) = (work.job.dst, work.job.operand[1]);
                let start = base + work.done * stride;
                let range = (start, start + (count - 1) * stride + 7);
                self.words(context, ctx, work, access, range, |i| base + i * stride)
            }
            Shape::Random { access } => {
                let (base, seed, bytes) = (work.job.dst, work.job.operand[0], work.job.operand[1]);
                let range = (base, base + (bytes - 1));
                self.words(context, ctx, work, access, range, |i| base + 8 * random_index(seed, i, bytes / 8))
            }
        }
    }

    /// One leaf of each operand and 2 MiB at most.
    fn linear(
        &mut self,
        context: &Context,
        ctx: Handle,
        work: &mut Work,
        first: (u64, u32),
        second: Option<(u64, u32)>,
    ) -> Step {
        let device = self.device;
        let left = work.job.len - work.done;
        let first = (first.0 + work.done, first.1);
        let second = second.map(|(va, access)| (va + work.done, access));
        let mut bytes = left.min(to_end(first.0, HUGE_SHIFT));
        if let Some((va, _)) = second {
            bytes = bytes.min(to_end(va, HUGE_SHIFT));
        }
        let range = |va: u64| (va, va + (bytes - 1));
        let ranges = [range(first.0), second.map_or(EMPTY, |second| range(second.0))];
        let Some(published) = self.publish(context, ctx, ranges) else { return Step::Gone };
        let mut leaves = [0; 2];
        let operands = [Some(first), second];
        for (leaf, operand) in leaves.iter_mut().zip(operands) {
            let Some((va, access)) = operand else { continue };
            match self.translate(context, ctx, (va, access), &published) {
                Ok(raw) => *leaf = raw,
                Err(reason) => return Step::Fault(Fault { va, access, reason, bytes: left }),
            }
            bytes = bytes.min(to_end(va, leaf_shift(*leaf)));
        }
        let snapshot = device.memory.snapshot();
        let find = |leaf: u64, (va, access): (u64, u32), bytes: u64| {
            device.target(&snapshot, (leaf, va), bytes, access & ACCESS_WRITE != 0).map_err(|_| va)
        };
        let source = match find(leaves[0], first, bytes) {
            Ok(slice) => slice,
            Err(va) => return bus_error(work, va),
        };
        bytes = bytes.min(source.len() as u64);
        let other = match second.map(|second| find(leaves[1], second, bytes)).transpose() {
            Ok(slice) => slice,
            Err(va) => return bus_error(work, va),
        };
        bytes = bytes.min(other.as_ref().map_or(bytes, |slice| slice.len() as u64)) & !7;
        published.side.in_flight.accessing(first.0);
        let compare = device.oracle.compare(ctx);
        let mut used = 0;
        for (leaf, operand) in leaves.into_iter().zip(operands) {
            if let Some((va, access)) = operand {
                device.oracle.access(ctx, va, frame(leaf, va), access);
                if let Some(compare) = &compare {
                    compare.range(va, bytes, leaf, access);
                }
                used += 1;
            }
        }
        match (work.job.op, &other) {
            (OP_FILL, _) => self.fill(work, &source, bytes),
            (OP_COPY, Some(to)) => copy(&source, to, bytes),
            (OP_CHECK, _) => self.check(work, &source, bytes),
            (OP_COMPARE, Some(with)) => self.compare(work, &source, with, bytes),
            _ => {}
        }
        if let Some(compare) = &compare {
            compare.again();
            for (leaf, operand) in leaves.into_iter().zip(operands) {
                if let Some((va, access)) = operand {
                    compare.range(va, bytes, leaf, access);
                    if access & ACCESS_WRITE != 0 {
                        self.side.tlbs[ctx.index() as usize].lock().wrote(va, bytes, leaf);
                    }
                }
            }
        }
        drop(published);
        count(&self.side.counters.accesses, used);
        count(&self.side.counters.bytes_moved, bytes * used);
        work.done += bytes;
        work.retries = 0;
        if bytes == 0 { bus_error(work, first.0) } else { Step::More }
    }

    fn pattern(&mut self, work: &Work, at: u64, words: usize) {
        let [base, step, _] = work.job.operand;
        // Added up rather than multiplied out: a 64-bit product a word is what would take the time here.
        let mut value = base.wrapping_add(step.wrapping_mul((work.done + at) / 8));
        for word in &mut self.words[..words] {
            *word = value;
            value = value.wrapping_add(step);
        }
    }

    fn fill(&mut self, work: &Work, to: &VolatileSlice<'_>, bytes: u64) {
        each_part(to, bytes, |at, words, part| {
            self.pattern(work, at, words);
            part.copy_from(self.words[..words].as_bytes());
        });
    }

    fn check(&mut self, work: &mut Work, from: &VolatileSlice<'_>, bytes: u64) {
        let start = work.job.src + work.done;
        each_part(from, bytes, |at, words, part| {
            self.pattern(work, at, words);
            part.copy_to(self.others[..words].as_mut_bytes());
            differences(work, start + at, &self.others[..words], &self.words[..words]);
        });
    }

    fn compare(&mut self, work: &mut Work, from: &VolatileSlice<'_>, with: &VolatileSlice<'_>, bytes: u64) {
        let start = work.job.src + work.done;
        each_part(from, bytes, |at, words, part| {
            part.copy_to(self.words[..words].as_mut_bytes());
            if let Ok(part) = with.offset(at as usize) {
                part.copy_to(self.others[..words].as_mut_bytes());
                differences(work, start + at, &self.words[..words], &self.others[..words]);
            }
        });
    }

    /// Up to [`BATCH`] single words, each translated for itself.
    fn words(
        &mut self,
        context: &Context,
        ctx: Handle,
        work: &mut Work,
        access: u32,
        range: (u64, u64),
        address: impl Fn(u64) -> u64,
    ) -> Step {
        let device = self.device;
        let Some(batch) = words_left(work) else { return Step::More };
        let Some(published) = self.publish(context, ctx, [range, EMPTY]) else { return Step::Gone };
        let snapshot = device.memory.snapshot();
        let compare = device.oracle.compare(ctx);
        self.checked.begin();
        let (first, write) = (work.done, work.job.flags & FLAG_WRITE != 0);
        let [operand0, _, operand2] = work.job.operand;
        let mut step = Step::More;
        let mut accessing = false;
        for i in first..first + batch {
            let va = address(i);
            let raw = match self.translate(context, ctx, (va, access), &published) {
                Ok(raw) => raw,
                Err(reason) => {
                    step = Step::Fault(Fault { va, access, reason, bytes: 8 });
                    break;
                }
            };
            let Ok(word) = device.word(&snapshot, (raw, va), access & ACCESS_WRITE != 0) else {
                step = bus_error(work, va);
                break;
            };
            if !accessing {
                accessing = true;
                published.side.in_flight.accessing(va);
            }
            device.oracle.access(ctx, va, frame(raw, va), access);
            if let Some(compare) = &compare {
                if self.checked.is_new(va, raw) {
                    compare.page(va, raw, access);
                }
            }
            let read = if access & ACCESS_ATOMIC != 0 {
                debug_assert_eq!(work.job.op, OP_ATOMIC_ADD);
                if device.config.coherent_atomics || raw & pte::VRAM != 0 {
                    word.fetch_add(operand0, Ordering::SeqCst)
                } else {
                    // Engines are atomic to each other.
                    let _one = device.atomics.lock();
                    let old = word.load(Ordering::SeqCst);
                    std::thread::yield_now();
                    word.store(old.wrapping_add(operand0), Ordering::SeqCst);
                    old
                }
            } else if work.job.op == OP_RANDOM && write {
                let old = word.load(Ordering::Relaxed);
                word.store(old ^ operand2 ^ ((va - work.job.dst) / 8), Ordering::Relaxed);
                old
            } else if write {
                word.store(operand0.wrapping_add(i), Ordering::Relaxed);
                0
            } else {
                word.load(Ordering::Relaxed)
            };
            work.result = work.result.wrapping_add(read);
            work.done = i + 1;
        }
        if let Some(compare) = &compare {
            compare.again();
            for &(va, raw) in self.checked.pages() {
                compare.page(va, raw, access);
            }
            if access & ACCESS_WRITE != 0 {
                let mut tlb = self.side.tlbs[ctx.index() as usize].lock();
                self.checked.pages().iter().for_each(|&(va, raw)| tlb.wrote(va, 1, raw));
            }
        }
        drop(published);
        let done = work.done - first;
        if done > 0 {
            work.retries = 0;
            count(&self.side.counters.accesses, done);
            count(&self.side.counters.bytes_moved, done * 8);
        }
        step
    }
}

fn words_left(work: &Work) -> Option<u64> {
    match work.job.len - work.done {
        0 => None,
        left => Some(left.min(BATCH)),
    }
}

/// Bytes to the end of the leaf of that size around `va`.
#[inline]
fn to_end(va: u64, shift: u32) -> u64 {
    (1 << shift) - (va & ((1 << shift) - 1))
}

fn bus_error(work: &mut Work, va: u64) -> Step {
    work.address = va;
    Step::End(JOB_BUS_ERROR)
}

/// Runs over a slice in parts that fit the scratch buffers: offset, words, part.
fn each_part(slice: &VolatileSlice<'_>, bytes: u64, mut part: impl FnMut(u64, usize, &VolatileSlice<'_>)) {
    let mut at = 0;
    while at < bytes {
        let words = ((bytes - at) / 8).min(SCRATCH as u64) as usize;
        match slice.subslice(at as usize, words * 8) {
            Ok(piece) if words > 0 => part(at, words, &piece),
            _ => return,
        }
        at += words as u64 * 8;
    }
}

fn copy(from: &VolatileSlice<'_>, to: &VolatileSlice<'_>, bytes: u64) {
    if let Ok(from) = from.subslice(0, bytes as usize) {
        from.copy_to_volatile_slice(*to);
    }
}

/// Counts words that differ, and keeps the address of the first.
fn differences(work: &mut Work, va: u64, is: &[u64], expected: &[u64]) {
    if is == expected {
        return;
    }
    for (i, (is, expected)) in is.iter().zip(expected).enumerate() {
        if is != expected {
            if work.result == 0 {
                work.address = va + 8 * i as u64;
            }
            work.result += 1;
        }
    }
}
