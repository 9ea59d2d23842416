// SPDX-License-Identifier: MIT OR Apache-2.0
//! `stress`: threads of random memory operations against random device work, each checked against a model.
//!
//! All threads share one arena and one context, so that one's invalidations meet the others' faults and accesses. Each has a
//! slot of its own in the arena, and a model that knows of every page of it: gone, or its rights and its pattern. So every
//! answer of the device is known beforehand, a fault with its page included. A second context reads all over the arena and
//! takes whatever it finds.
//!
//! What a slot does to its memory is what a process does to its own, and what the kernel and other processes do to it: advice,
//! write protection, moves, a debugger's writes ([`slot`]). In some rounds a part of the kernel moves memory by itself meanwhile
//! ([`mover`]), in some data are lost by design ([`ends`]). The first rounds, which are those of the default suite, take what
//! costs little; all later ones go through everything there is, in an order of chance.

mod ends;
mod helper;
mod mover;
mod slot;

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use helper::Helper;
use mover::{AtWork, Mover};
use slot::{Mix, Slot, Tools};

use super::Round;
use super::boundary::numa;
use crate::boot::cpus;
use crate::client::{Context, Job};
use crate::device::Device;
use crate::memory::{HUGE, Mapping};
use crate::outcome::{Checked, Doing, Failure};
use crate::rng::Rng;

/// Rounds in the default suite.
pub(super) const ROUNDS: u64 = 3;
/// Operations of a thread in a round.
const STEPS: usize = 150;
/// The most threads.
const MOST: usize = 16;

/// What a round is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The slots and nothing else.
    Plain,
    /// Something moves their memory.
    With(Mover),
    /// Frames break.
    Poison,
    /// It ends by the OOM killer.
    Oom,
}

/// The first rounds.
const FIRST: [Kind; ROUNDS as usize] =
    [Kind::Plain, Kind::With(Mover::Khugepaged), Kind::With(Mover::ClearRefs)];

/// Every kind.
fn all() -> Vec<Kind> {
    let movers = mover::ALL.into_iter().map(Kind::With);
    movers.chain([Kind::Plain, Kind::Poison, Kind::Oom]).collect()
}

/// What this round is to be, and what instead if the kernel lacks it, in order.
fn kinds(round: &Round<'_, '_>) -> Vec<Kind> {
    let iteration = round.iteration();
    if let Some(first) = FIRST.get(iteration as usize) {
        return vec![*first, Kind::Plain];
    }
    let mut order = all();
    let later = iteration - ROUNDS;
    let count = order.len() as u64;
    // Each once, in an order of chance, and then all of them again in another.
    let mut chance = round.rng_of("kinds", later / count);
    for last in (1..order.len()).rev() {
        order.swap(last, chance.index(last + 1));
    }
    order.rotate_left((later % count) as usize);
    order
}

/// One round.
pub(super) fn round(round: &mut Round<'_, '_>) {
    let all = round.iteration() >= ROUNDS;
    round.ground.board.begin("threads");
    let began = Instant::now();
    for kind in kinds(round) {
        // What a kernel lacks is left out of the mix, and something else comes in its place.
        let chance = |name: &str| round.rng(name);
        let told = match kind {
            Kind::Poison => lost("memory-failure", ends::poison(round.device(), &chance)),
            Kind::Oom => lost("oom", ends::oom(round.device(), &chance)),
            Kind::Plain => threads(round.device(), Mix { all, ..Mix::default() }, None, &chance),
            Kind::With(mover) => match AtWork::new(mover, &mut chance("mover")) {
                Ok(at_work) => {
                    let mix = Mix { all, alike: mover == Mover::Ksm, ..Mix::default() };
                    threads(round.device(), mix, Some(at_work), &chance)
                }
                Err(failure) => lost(mover.name(), Err(failure)),
            },
        };
        if let Some(results) = told {
            for (name, result) in results {
                round.report_with(&name, began.elapsed(), result);
            }
            return;
        }
    }
}

/// What came of each part of a round; of some that have passed something is to be said.
type Results = Vec<(String, Checked<Option<String>>)>;

/// What came of a round of one part; nothing if this kernel cannot have it.
fn lost(name: &str, result: Checked<String>) -> Option<Results> {
    match result {
        Err(Failure::Skip(_)) => None,
        other => Some(vec![(format!("mover/{name}"), other.map(Some))]),
    }
}

/// A round in this process.
fn threads(
    device: &dyn Device,
    mix: Mix,
    mut at_work: Option<AtWork>,
    rng: &dyn Fn(&str) -> Rng,
) -> Option<Results> {
    let results = match Stage::new(device, mix) {
        Ok(mut stage) => {
            let begun = at_work.as_mut().map_or(Ok(()), AtWork::begin);
            match begun {
                Ok(()) => stage.run(at_work.as_mut(), rng),
                Err(failure) => vec![("setup".to_owned(), Err(failure))],
            }
        }
        Err(failure) => vec![("setup".to_owned(), Err(failure))],
    };
    let Some(at_work) = at_work else {
        return Some(results.into_iter().map(|(name, result)| (name, result.map(|()| None))).collect());
    };
    let with = format!("with {} at work", at_work.mover.name());
    let part = |(name, result): (String, Checked)| {
        let said = name.starts_with(MOVER).then(|| at_work.told());
        (name, result.map(|()| said).doing(&with))
    };
    Some(results.into_iter().map(part).collect())
}

/// Before the name of what moves memory, in the names of cases.
const MOVER: &str = "mover/";

/// Bytes of all slots together.
fn arena_bytes() -> usize {
    workers() * HUGE
}

fn workers() -> usize {
    (cpus() as usize + 1).min(MOST)
}

/// The arena and who works on it.
struct Stage {
    map: Mapping,
    context: Context,
    reader: Context,
    workers: usize,
    mix: Mix,
    nodes: usize,
    helper: Option<Helper>,
}

impl Stage {
    fn new(device: &dyn Device, mix: Mix) -> Checked<Self> {
        // First, so that it has no copy of the others.
        let helper = Some(Helper::new()?);
        Ok(Self {
            map: Mapping::new(arena_bytes(), HUGE, crate::memory::Backing::Anonymous).doing("mmap")?,
            context: Context::bind(device)?,
            reader: Context::bind(device)?,
            workers: workers(),
            mix,
            nodes: numa::last_node().map_or(1, |last| last.unsigned_abs() as usize + 1),
            helper,
        })
    }

    fn tools(&self) -> Tools<'_> {
        Tools {
            map: &self.map,
            context: &self.context,
            mix: self.mix,
            helper: self.helper.as_ref(),
            nodes: self.nodes,
        }
    }

    /// All slots to their end; what came of each, and of who else took part.
    fn run(&mut self, at_work: Option<&mut AtWork>, rng: &dyn Fn(&str) -> Rng) -> Vec<(String, Checked)> {
        let left = AtomicUsize::new(self.workers);
        // Nobody makes a hole before every thread has started: a thread brings mappings of its own (a stack for signals, a heap),
        // and the kernel would put them into another's hole.
        let started = Barrier::new(self.workers + usize::from(at_work.is_some()));
        let (left, started) = (&left, &started);
        let begin = move || {
            drop(std::hint::black_box(vec![0_u8; 64]));
            started.wait();
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.workers)
                .map(|index| {
                    let name = format!("slot-{index}");
                    let mut slot = Slot::new(self.tools(), index, rng(&name));
                    let thread = scope.spawn(move || {
                        let _gone = Leaving(left);
                        begin();
                        slot.work(STEPS)
                    });
                    (name, thread)
                })
                .collect();
            let moving = at_work.map(|at_work| {
                let name = format!("{MOVER}{}", at_work.mover.name());
                let (context, mut rng) = (&self.context, rng("prods"));
                let thread = scope.spawn(move || {
                    begin();
                    while left.load(Ordering::Acquire) > 0 {
                        at_work.prod(context, &mut rng)?;
                        std::thread::sleep(at_work.pause(&mut rng));
                    }
                    Ok(())
                });
                (name, thread)
            });
            let reading = read_everywhere(&self.map, &self.reader, self.workers, &mut rng("reader"), left);
            let mut results: Vec<(String, Checked)> = threads
                .into_iter()
                .chain(moving)
                .map(|(name, thread)| {
                    (name, thread.join().unwrap_or_else(|_| Err(Failure::wrong("the thread panicked"))))
                })
                .collect();
            results.push(("reader".to_owned(), reading));
            results
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Board;
    use crate::device::model::Model;
    use crate::gates::Gates;
    use crate::workload::Ground;

    struct Nobody;

    impl crate::report::Sink for Nobody {
        fn send(&self, _: &guest_protocol::Message) {}
    }

    /// A round of everything in a child, as in the guest; whether anything differed from the models.
    fn differs(corrupt: bool) -> bool {
        let device = Model { corrupt };
        let mut child = crate::process::Child::spawn(|parent| {
            let mut stage = Stage::new(&device, Mix { all: true, ..Mix::default() })?;
            for seed in 0..4 {
                let rng = |name: &str| Rng::derived(seed, name.bytes().map(u64::from).sum());
                for (name, result) in stage.run(None, &rng) {
                    result.doing(&name)?;
                }
                // The models begin anew.
                let bytes = stage.map.bytes();
                stage
                    .map
                    .renew(0, bytes, crate::memory::Prot::Write, crate::memory::Backing::Anonymous)
                    .doing("mmap")?;
            }
            parent.ready(0);
            Ok(())
        })
        .unwrap();
        let ended = child.wait_long().unwrap();
        match child.judge(ended) {
            Ok(()) => false,
            Err(Failure::Mismatch(mismatch, _)) => mismatch.expected != mismatch.found,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn everything_agrees_with_the_models_on_a_correct_device_only() {
        assert!(!differs(false));
        assert!(differs(true));
    }

    #[test]
    fn later_rounds_are_of_every_kind_in_an_order_of_the_seed() {
        let (sink, board, device) = (Nobody, Board::new().unwrap(), Model::default());
        let program = std::path::Path::new("/bin/true");
        let ground = Ground {
            device: &device,
            sink: &sink,
            board: &board,
            program,
            gates: Gates::new(None),
            coherent_atomics: true,
        };
        let of = |seed, iteration| kinds(&Round::of(&ground, "stress", seed, iteration));
        for (iteration, first) in (0..).zip(FIRST) {
            assert_eq!(of(1, iteration)[0], first);
        }
        let cycle = |seed, from: u64| -> Vec<Kind> {
            (from..from + all().len() as u64).map(|iteration| of(seed, iteration)[0]).collect()
        };
        let (one, two) = (cycle(1, ROUNDS), cycle(1, ROUNDS + all().len() as u64));
        for kind in all() {
            assert!(one.contains(&kind) && two.contains(&kind), "{kind:?}");
            assert!(of(1, ROUNDS).contains(&kind));
        }
        assert_eq!(one, cycle(1, ROUNDS));
        assert!(one != two && one != cycle(2, ROUNDS));
    }
}
