// SPDX-License-Identifier: MIT OR Apache-2.0
//! A job at work: checked once, then carried out step by step.

use vgpu_spec::fault::{ACCESS_ATOMIC, ACCESS_READ, ACCESS_WRITE};
use vgpu_spec::job::{
    FLAG_NO_IRQ, FLAG_WRITE, Job, MAX_LEN, OP_ATOMIC_ADD, OP_CHECK, OP_COMPARE, OP_COPY, OP_FILL, OP_NOP,
    OP_RANDOM, OP_STRIDED,
};
use vgpu_spec::pte::VA_BITS;

/// What kind of walk through memory a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Nothing to do.
    Nothing,
    /// Ranges of bytes: (address, access) of the first and the second operand.
    Linear { first: (u64, u32), second: Option<(u64, u32)> },
    /// Single words `stride` bytes apart.
    Strided { access: u32 },
    /// Single words in random order.
    Random { access: u32 },
}

/// A job at work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// The copy that was checked.
    pub(crate) job: Job,
    pub(crate) shape: Shape,
    /// Bytes or accesses done.
    pub(crate) done: u64,
    pub(crate) result: u64,
    pub(crate) address: u64,
    /// Where the access at `done` faulted last.
    pub(crate) fault_va: u64,
    /// How often the access at `done` has faulted.
    pub(crate) retries: u32,
}

impl Work {
    /// Checks a job; `None` if it is not well formed.
    pub(crate) fn new(job: Job) -> Option<Self> {
        let may_write = matches!(job.op, OP_STRIDED | OP_RANDOM);
        let flags = FLAG_NO_IRQ | if may_write { FLAG_WRITE } else { 0 };
        if job.reserved != 0 || job.flags & !flags != 0 || job.len > MAX_LEN {
            return None;
        }
        let write = job.flags & FLAG_WRITE != 0;
        let shape = match job.op {
            OP_NOP => Shape::Nothing,
            OP_FILL => linear(&job, (job.dst, ACCESS_WRITE), None)?,
            OP_COPY => {
                let apart = job.dst.abs_diff(job.src) >= job.len;
                let shape = linear(&job, (job.src, ACCESS_READ), Some((job.dst, ACCESS_WRITE)))?;
                apart.then_some(shape)?
            }
            OP_CHECK => linear(&job, (job.src, ACCESS_READ), None)?,
            OP_COMPARE => linear(&job, (job.src, ACCESS_READ), Some((job.dst, ACCESS_READ)))?,
            OP_ATOMIC_ADD => strided(&job, ACCESS_READ | ACCESS_WRITE | ACCESS_ATOMIC)?,
            OP_STRIDED => strided(&job, if write { ACCESS_WRITE } else { ACCESS_READ })?,
            OP_RANDOM => {
                let bytes = job.operand[1];
                if job.len > 0 && bytes == 0 || !in_space(job.dst, bytes) {
                    return None;
                }
                Shape::Random { access: if write { ACCESS_READ | ACCESS_WRITE } else { ACCESS_READ } }
            }
            _ => return None,
        };
        Some(Self { job, shape, done: 0, result: 0, address: 0, fault_va: 0, retries: 0 })
    }

    /// Nothing is left to do.
    pub(crate) fn is_done(&self) -> bool {
        self.shape == Shape::Nothing || self.done >= self.job.len
    }
}

/// Whole words below 2^48.
fn in_space(va: u64, bytes: u64) -> bool {
    (va | bytes) % 8 == 0 && va.checked_add(bytes).is_some_and(|end| end <= 1 << VA_BITS)
}

fn linear(job: &Job, first: (u64, u32), second: Option<(u64, u32)>) -> Option<Shape> {
    let fits = in_space(first.0, job.len) && second.is_none_or(|second| in_space(second.0, job.len));
    fits.then_some(Shape::Linear { first, second })
}

fn strided(job: &Job, access: u32) -> Option<Shape> {
    let bytes = match job.len.checked_sub(1) {
        None => 0,
        Some(steps) => steps.checked_mul(job.operand[1])?.checked_add(8)?,
    };
    (job.operand[1] % 8 == 0 && in_space(job.dst, bytes)).then_some(Shape::Strided { access })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(op: u16) -> Job {
        Job { op, dst: 0x10_0000, src: 0x20_0000, len: 0x1000, operand: [1, 8, 3], ..Job::default() }
    }
    fn bad(change: impl Fn(&mut Job), op: u16) -> bool {
        let mut job = job(op);
        change(&mut job);
        Work::new(job).is_none()
    }

    #[test]
    fn malformed_jobs_are_refused() {
        for op in OP_NOP..=OP_RANDOM {
            assert!(!bad(|_| (), op), "{op}");
            assert!(bad(|j| j.reserved = 1, op));
            assert!(bad(|j| j.flags = 0x8000, op));
            assert!(bad(|j| j.len = MAX_LEN + 8, op));
        }
        assert!(bad(|_| (), 0) && bad(|_| (), 9));
        for op in [OP_FILL, OP_COPY, OP_COMPARE] {
            assert!(bad(|j| j.dst = 4, op) && bad(|j| j.len = 12, op));
            assert!(bad(|j| j.dst = (1 << 48) - 0x800, op) && bad(|j| j.dst = u64::MAX - 7, op));
            assert!(bad(|j| j.flags = FLAG_WRITE, op));
        }
        assert!(bad(|j| j.dst = j.src + 0xff8, OP_COPY) && bad(|j| j.dst = j.src, OP_COPY));
        assert!(!bad(|j| j.dst = j.src + 0x1000, OP_COPY) && !bad(|j| j.dst = j.src, OP_COMPARE));
        for op in [OP_STRIDED, OP_ATOMIC_ADD] {
            assert!(bad(|j| j.operand[1] = 4, op) && bad(|j| j.operand[1] = u64::MAX - 7, op));
            assert!(bad(|j| j.operand[1] = 1 << 40, op) && !bad(|j| j.operand[1] = 0, op));
            assert!(!bad(|j| j.len = 0, op));
        }
        assert!(bad(|j| j.operand[1] = 0, OP_RANDOM) && bad(|j| j.operand[1] = 1 << 48, OP_RANDOM));
    }
}
