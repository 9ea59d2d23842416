// SPDX-License-Identifier: MIT OR Apache-2.0
//! More faults at a time than a driver likes: every queue that there is stands at one.

use crate::client::{Context, Job, Ticket};
use crate::device::Device;
use crate::memory::{Mapping, PAGE};
use crate::outcome::{Checked, Doing, Failure, require};

/// Contexts, of 64 that the device has: others may still be on their way out.
const CONTEXTS: usize = 56;
/// Queues of a context.
const QUEUES: usize = 2;
/// Pages that each queue faults in, one after the other.
const PAGES: usize = 12;

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
