// SPDX-License-Identifier: MIT OR Apache-2.0
//! `stress`: threads of random memory operations against random device work, each checked against a model.
//!
//! All threads share one arena and one context, so that one's invalidations meet the others' faults and accesses. Each has a
//! slot of its own in the arena, and a model that knows of every page of it: gone, or its rights and its pattern. So every
//! answer of the device is known beforehand, a fault with its page included. A second context reads all over the arena and
//! takes whatever it finds.

mod slot;

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use slot::Slot;

use super::Round;
use crate::boot::cpus;
use crate::client::{Context, Job};
use crate::memory::{HUGE, Mapping};
use crate::outcome::{Checked, Doing, Failure};
use crate::rng::Rng;

/// Rounds in the default suite.
pub(super) const ROUNDS: u64 = 3;
/// Operations of a thread in a round.
const STEPS: usize = 150;
/// The most threads.
const MOST: usize = 16;

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    let workers = (cpus() as usize + 1).min(MOST);
    let setup = || -> Checked<_> {
        let map = Mapping::new(workers * HUGE, HUGE, crate::memory::Backing::Anonymous).doing("mmap")?;
        Ok((map, Context::bind(round.device())?, Context::bind(round.device())?))
    };
    round.ground.board.begin("threads");
    let began = Instant::now();
    let results = match setup() {
        Ok((map, context, reader)) => {
            let rng = |name: &str| round.rng(name);
            run(&map, &context, &reader, workers, &rng)
        }
        Err(failure) => vec![("setup".to_owned(), Err(failure))],
    };
    for (name, result) in results {
        round.report(&name, began.elapsed(), result);
    }
}

type Results = Vec<(String, Checked)>;

fn run(
    map: &Mapping,
    context: &Context,
    reader: &Context,
    workers: usize,
    rng: &dyn Fn(&str) -> Rng,
) -> Results {
    let left = AtomicUsize::new(workers);
    // Nobody makes a hole before every thread has started: a thread brings mappings of its own (a stack for signals), and the
    // kernel would put them into another's hole.
    let started = Barrier::new(workers);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|index| {
                let name = format!("slot-{index}");
                let mut slot = Slot::new(map, context, index, rng(&name));
                let (left, started) = (&left, &started);
                let thread = scope.spawn(move || {
                    let _gone = Leaving(left);
                    started.wait();
                    slot.work(STEPS)
                });
                (name, thread)
            })
            .collect();
        let reading = read_everywhere(map, reader, workers, &mut rng("reader"), &left);
        let mut results: Results = threads
            .into_iter()
            .map(|(name, thread)| {
                (name, thread.join().unwrap_or_else(|_| Err(Failure::wrong("the thread panicked"))))
            })
            .collect();
        results.push(("reader".to_owned(), reading));
        results
    })
}

/// Counts a thread out, however it ends.
struct Leaving<'a>(&'a AtomicUsize);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Reads all over the arena as long as anybody works on it. What it finds is of no interest, only that each job ends well, or
/// with a fault where something is gone.
fn read_everywhere(
    map: &Mapping,
    reader: &Context,
    workers: usize,
    rng: &mut Rng,
    left: &AtomicUsize,
) -> Checked {
    while left.load(Ordering::Acquire) > 0 {
        let index = rng.index(workers);
        let job = Job::random_read(map.at(index * HUGE), Slot::bytes(index), 1 + rng.below(2000), rng.next());
        reader.run(job)?.ok_or_fault()?;
        std::thread::sleep(Duration::from_micros(300 + rng.below(1000)));
    }
    Ok(())
}
