// SPDX-License-Identifier: MIT OR Apache-2.0
//! More than a driver likes: faults at a time, for every queue that there is stands at one; and page tables, for there are not so many.

use vgpu_spec::uapi;

use crate::client::{Context, Job, Ticket};
use crate::device::Device;
use crate::memory::{Backing, HUGE, Mapping, PAGE, Prot};
use crate::outcome::{Checked, Doing, Failure, require};

/// Contexts, of 64 that the device has: others may still be on their way out.
const CONTEXTS: usize = 56;
/// Queues of a context.
const QUEUES: usize = uapi::QUEUES as usize;
/// Pages that each queue faults in, one after the other.
const PAGES: usize = 12;

/// Jobs that end at once, and how often.
const BURST: usize = 24;
const BURSTS: u64 = 4;
/// Accesses of the job that they wait behind.
const PLUG: u64 = 1 << 15;

/// Accesses of a job that lasts for as long as the queue behind it is filled: so many, or twice as many if that was over too soon, and so on.
const LONG_PLUG: std::ops::RangeInclusive<u32> = 18..=23;
/// Jobs submitted to a queue that seems to have no end.
const FILLED_MOST: usize = 1024;
/// Jobs that have to wait for a place.
const BEHIND: usize = 8;

/// Pages 2 MiB apart, so that each takes a table of leaves: more than the device has pages for tables (2,048 if not said otherwise).
const REGIONS: usize = 2150;
/// Every so many of them are read again, which were dropped for others.
const AGAIN: usize = 8;

/// One context uses up what there is for its tables. Its driver has to make room: it alone is in its own way.
pub(super) fn regions(device: &dyn Device, first: u64) -> Checked {
    let map = Mapping::reserve(REGIONS * HUGE, HUGE).doing("mmap")?;
    for region in 0..REGIONS {
        map.renew(region * HUGE, PAGE, Prot::Write, Backing::Anonymous).doing("mmap")?;
    }
    let context = Context::bind(device)?;
    context.run(Job::strided_write(map.at(0), REGIONS as u64, HUGE, first))?.ok()?;
    let mut sum = 0_u64;
    for region in 0..REGIONS {
        let (at, expected) = (region * HUGE, first.wrapping_add(region as u64));
        let found = map.load(at);
        if found != expected {
            return Err(Failure::cpu(context.handle(), map.at(at), expected, found));
        }
        sum = if region % AGAIN == 0 { sum.wrapping_add(expected) } else { sum };
    }
    let count = REGIONS.div_ceil(AGAIN) as u64;
    let read = context.run(Job::strided_read(map.at(0), count, AGAIN * HUGE))?.ok()?;
    require(read.result == sum, || format!("the device should have summed {sum:#x}: {read}"))
}

/// Short jobs behind a long one, of which only the last is waited for: they end all at once, and an interrupt may stand for any number of
/// them.
pub(super) fn burst(device: &dyn Device, first: u64) -> Checked {
    let context = Context::bind(device)?;
    let map = Mapping::small((1 + BURST) * PAGE).doing("mmap")?;
    map.touch(0, map.bytes());
    context.run(Job::strided_write(map.at(0), 1 + BURST as u64, PAGE, 0))?.ok()?;
    for round in 0..BURSTS {
        let first = first.wrapping_add(round);
        // Nothing else is at work: what ends on one queue is heard of by nothing that ends on another.
        let queue = (round % QUEUES as u64) as u32;
        let mut last = context.submit(Job::random_read(map.at(0), PAGE, PLUG, first).queue(queue))?;
        for job in 0..BURST {
            let word = first.wrapping_add(job as u64);
            last = context.submit(Job::strided_write(map.at((1 + job) * PAGE), 1, 8, word).queue(queue))?;
        }
        context.wait(last)?.ok()?;
        for job in 0..BURST {
            let (at, expected) = ((1 + job) * PAGE, first.wrapping_add(job as u64));
            let found = map.load(at);
            if found != expected {
                return Err(Failure::cpu(context.handle(), map.at(at), expected, found));
            }
        }
    }
    Ok(())
}

/// Jobs behind a long one until the driver says that the queue is full, and some more: each is done once, and none in another's place.
pub(super) fn full(device: &dyn Device, first: u64) -> Checked {
    let context = Context::bind(device)?;
    for log2 in LONG_PLUG {
        if fill(&context, first, 1 << log2)? {
            return Ok(());
        }
    }
    // The device is faster than that.
    Ok(())
}

/// Whether the job in front, of so many accesses, was still at work when the queue was full, or had room for them all.
fn fill(context: &Context, first: u64, accesses: u64) -> Checked<bool> {
    let words = FILLED_MOST + BEHIND;
    let map = Mapping::small((8 * words).next_multiple_of(PAGE) + PAGE).doing("mmap")?;
    let plug = map.bytes() - PAGE;
    map.touch(0, map.bytes());
    // What is added twice is seen, and what is written twice is not.
    let job = |index: usize| Job::atomic_add(map.at(8 * index), 1, 8, first | 1);
    context.run(Job::strided_write(map.at(0), words as u64, 8, 0))?.ok()?;
    let plug = context.submit(Job::random_read(map.at(plug), PAGE, accesses, first))?;
    let (mut last, mut taken) = (plug, 0);
    while taken < FILLED_MOST {
        match context.try_submit(job(taken))? {
            Some(ticket) => last = ticket,
            None => break,
        }
        taken += 1;
    }
    let plugged = !context.has_ended(plug)?;
    for _ in 0..BEHIND {
        last = context.submit(job(taken))?;
        taken += 1;
    }
    context.wait(last)?.ok()?;
    for index in 0..words {
        let expected = (index as u64).wrapping_add(if index < taken { first | 1 } else { 0 });
        let found = map.load(8 * index);
        if found != expected {
            return Err(Failure::cpu(context.handle(), map.at(8 * index), expected, found));
        }
    }
    Ok(plugged)
}

/// Each queue writes pages of its own that nobody has touched, so that each page is a fault, and 112 of them wait at a time. With
/// a small fault buffer that is an overflow, again and again.
pub(super) fn queues(device: &dyn Device, first: u64) -> Checked {
    let share = PAGES * PAGE;
    let map = Mapping::small(CONTEXTS * QUEUES * share).doing("mmap")?;
    let contexts = (0..CONTEXTS).map(|_| Context::bind(device)).collect::<Checked<Vec<_>>>()?;
    let mut tickets: Vec<(usize, Ticket)> = Vec::with_capacity(CONTEXTS * QUEUES);
    for part in 0..CONTEXTS * QUEUES {
        let job =
            Job::strided_write(map.at(part * share), PAGES as u64, PAGE, first.wrapping_add(part as u64));
        let context = part / QUEUES;
        tickets.push((context, contexts[context].submit(job.queue((part % QUEUES) as u32))?));
    }
    for (context, ticket) in tickets {
        contexts[context].wait(ticket)?.ok()?;
    }
    for part in 0..CONTEXTS * QUEUES {
        for page in 0..PAGES {
            let expected = first.wrapping_add((part + page) as u64);
            let at = part * share + page * PAGE;
            let found = map.load(at);
            if found != expected {
                return Err(Failure::cpu(contexts[part / QUEUES].handle(), map.at(at), expected, found));
            }
        }
    }
    let served = contexts.iter().map(|context| Ok(context.file().query().doing("query")?.faults_cancelled));
    let cancelled: u64 = served.collect::<Checked<Vec<_>>>()?.into_iter().sum();
    require(cancelled == 0, || format!("{cancelled} faults on memory that is there were cancelled"))
}
