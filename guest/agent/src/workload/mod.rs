// SPDX-License-Identifier: MIT OR Apache-2.0
//! The workloads, and what is common to them: rounds, cases, their reports.
//!
//! A workload runs in a process of its own, so that a crash is its failure and not the end of the machine. It does rounds: so
//! many for the default suite, or as many as the plan says, or until the time is up. A round is the same sequence of cases
//! each time, with a seed of its own derived from the workload's.
//!
//! Most of a case's time goes by in waiting, for the device or for another process. So a workload whose cases do not get into
//! each other's way does its rounds in several lanes, processes that run side by side. That is also what a device with many
//! users sees: one address space ends while another faults.

mod access;
mod bench;
mod boundary;
mod invalidate;
mod migrate;
mod races;
mod release;
mod removal;
mod stress;
mod unplug;
mod unregister;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::time::{Duration, Instant};

use guest_protocol::{Case, Extent, Message, Outcome, WorkloadPlan};

use crate::board::{Board, LANES};
use crate::boot::cpus;
use crate::device::Device;
use crate::gates::Gates;
use crate::outcome::{Checked, Doing, Failure};
use crate::process::Child;
use crate::report::Sink;
use crate::rng::Rng;

/// Failed cases after which a workload gives up: each may have waited for its bound.
const PATIENCE: u64 = 20;
/// How often progress is told at the most, by each lane.
const PROGRESS: Duration = Duration::from_secs(2);
/// The most lanes: each may have a dozen contexts at a time, and the device has 64.
const MOST_LANES: usize = 4;

/// What a workload runs on.
pub(crate) struct Ground<'a> {
    /// The device.
    pub(crate) device: &'a dyn Device,
    /// Takes the reports.
    pub(crate) sink: &'a dyn Sink,
    /// Shared with the parent, which reads it should this process crash.
    pub(crate) board: &'a Board,
    /// A program that ends at once when it is run with [`EXIT_ARGUMENT`].
    pub(crate) program: &'a Path,
    /// Where tasks can be held.
    pub(crate) gates: Gates<'a>,
    /// The device's atomics are coherent with the CPUs', on all memory.
    pub(crate) coherent_atomics: bool,
}

/// Makes [`Ground::program`] end at once.
pub(crate) const EXIT_ARGUMENT: &str = "--exit-at-once";

/// Makes a group of processes and removes it: the kernel does something once, with the first one.
pub(crate) fn first_group() -> Checked {
    boundary::Narrow::new(1 << 30).map(drop)
}

/// A workload as code.
struct Workload {
    name: &'static str,
    /// Rounds in the default suite.
    rounds: u64,
    /// Rounds may run side by side.
    lanes: bool,
    round: fn(&mut Round<'_, '_>),
}

const ALL: &[Workload] = &[
    Workload { name: "access", rounds: access::ROUNDS, lanes: true, round: access::round },
    Workload { name: "release", rounds: release::ROUNDS, lanes: true, round: release::round },
    Workload { name: "unregister", rounds: unregister::ROUNDS, lanes: true, round: unregister::round },
    Workload { name: "invalidate", rounds: invalidate::ROUNDS, lanes: true, round: invalidate::round },
    // There is one set of gates.
    Workload { name: "races", rounds: races::ROUNDS, lanes: false, round: races::round },
    Workload { name: "stress", rounds: stress::ROUNDS, lanes: false, round: stress::round },
    Workload { name: "migrate", rounds: migrate::ROUNDS, lanes: false, round: migrate::round },
    Workload { name: "removal", rounds: removal::ROUNDS, lanes: false, round: removal::round },
    Workload {
        name: guest_protocol::UNPLUG_WORKLOAD,
        rounds: unplug::ROUNDS,
        lanes: false,
        round: unplug::round,
    },
];

/// What a plan may also name, though it is no part of any suite.
const HIDDEN: &[Workload] = &[Workload {
    name: guest_protocol::BENCH_WORKLOAD,
    rounds: bench::ROUNDS,
    lanes: false,
    round: bench::round,
}];

/// One round of a workload.
pub(crate) struct Round<'r, 'a> {
    ground: &'r Ground<'a>,
    workload: &'static str,
    seed: u64,
    iteration: u64,
}

impl<'r, 'a> Round<'r, 'a> {
    /// A round of something that is no workload of its own.
    pub(crate) fn of(ground: &'r Ground<'a>, workload: &'static str, seed: u64, iteration: u64) -> Self {
        Self { ground, workload, seed, iteration }
    }

    /// Where tasks can be held.
    pub(crate) fn gates(&self) -> Gates<'a> {
        self.ground.gates
    }

    /// Which one it is.
    pub(crate) fn iteration(&self) -> u64 {
        self.iteration
    }

    /// The device.
    pub(crate) fn device(&self) -> &'a dyn Device {
        self.ground.device
    }

    /// A program that ends at once when it is run with [`EXIT_ARGUMENT`].
    pub(crate) fn program(&self) -> &Path {
        self.ground.program
    }

    /// Chance for a case: depends on the seed, the round and the name, not on what ran before.
    pub(crate) fn rng(&self, name: &str) -> Rng {
        self.rng_of(name, self.iteration)
    }

    /// Chance for several rounds together, which have this number.
    pub(crate) fn rng_of(&self, name: &str, rounds: u64) -> Rng {
        let label = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Rng::derived(self.seed ^ label, rounds)
    }

    /// Runs a case and reports it.
    pub(crate) fn case(&mut self, name: &str, body: impl FnOnce(&mut Rng) -> Checked) {
        if self.ground.board.failed() >= PATIENCE {
            return;
        }
        self.ground.board.begin(name);
        let mut rng = self.rng(name);
        let began = Instant::now();
        let result = body(&mut rng);
        self.report(name, began.elapsed(), result);
    }

    /// Reports a case that was run otherwise.
    pub(crate) fn report(&mut self, name: &str, took: Duration, result: Checked) {
        self.report_with(name, took, result.map(|()| None));
    }

    /// The same; of a case that has passed something may be said.
    pub(crate) fn report_with(&mut self, name: &str, took: Duration, result: Checked<Option<String>>) {
        let (outcome, detail, mismatch) = match result {
            Ok(said) => (Outcome::Pass, said, None),
            Err(Failure::Skip(why)) => (Outcome::Skip, Some(why), None),
            Err(failure @ Failure::Wrong(_)) => (Outcome::Fail, Some(failure.to_string()), None),
            Err(failure @ Failure::Mismatch(mismatch, _)) => {
                (Outcome::Fail, Some(failure.to_string()), Some(mismatch))
            }
        };
        self.ground.board.end(outcome == Outcome::Fail);
        self.ground.sink.send(&Message::Case(Case {
            workload: self.workload.to_owned(),
            case: name.to_owned(),
            seed: self.seed,
            iteration: self.iteration,
            outcome,
            seconds: took.as_secs_f64(),
            detail,
            mismatch,
        }));
    }
}

/// Runs a workload of the plan and reports its cases; its caller reports its end. False if there is none of that name.
pub(crate) fn run(plan: &WorkloadPlan, ground: &Ground<'_>) -> bool {
    if let Some(scenario) = &plan.scenario {
        return crate::cast::run(plan, scenario, ground);
    }
    let Some(workload) =
        ALL.iter().chain(boundary::ALL).chain(HIDDEN).find(|workload| workload.name == plan.name)
    else {
        return false;
    };
    let (rounds, until) = match plan.extent {
        Extent::Default => (Some(workload.rounds), None),
        Extent::Iterations(count) => (Some(count), None),
        Extent::Milliseconds(time) => (None, Some(Instant::now() + Duration::from_millis(time))),
    };
    let course = Course { workload, seed: plan.seed, rounds, until, lanes: lanes(workload, rounds) };
    if course.lanes == 1 {
        course.run(0, ground);
    } else {
        course.run_lanes(ground);
    }
    true
}

/// A round of a workload by name, within something else. False if there is none of that name.
pub(crate) fn one_round(name: &str, round: &mut Round<'_, '_>) -> bool {
    let workload = ALL.iter().find(|workload| workload.name == name);
    workload.is_some_and(|workload| {
        (workload.round)(round);
        true
    })
}

/// How many lanes a workload has with so many rounds, or with time for any number.
fn lanes(workload: &Workload, rounds: Option<u64>) -> usize {
    if !workload.lanes {
        return 1;
    }
    let most = (cpus() as usize).clamp(1, MOST_LANES.min(LANES));
    rounds.map_or(most, |rounds| most.min(rounds.max(1) as usize))
}

/// A workload's way through its rounds.
struct Course<'w> {
    workload: &'w Workload,
    seed: u64,
    rounds: Option<u64>,
    until: Option<Instant>,
    lanes: usize,
}

impl Course<'_> {
    /// Runs every lane in a process of its own.
    fn run_lanes(&self, ground: &Ground<'_>) {
        let began = Instant::now();
        let boards: Vec<_> = (0..self.lanes).map(|lane| ground.board.lane(lane)).collect();
        let children: Vec<_> = boards
            .iter()
            .enumerate()
            .map(|(lane, board)| {
                Child::spawn(|_| {
                    // Orphans of the cases come to their lane, which waits for them.
                    nix::sys::prctl::set_child_subreaper(true).doing("prctl")?;
                    self.run(lane, &Ground { board, ..*ground });
                    Ok(())
                })
            })
            .collect();
        for (child, board) in children.into_iter().zip(&boards) {
            let ended = child.and_then(|mut child| {
                let ended = child.wait_long()?;
                child.judge(ended)
            });
            if let Err(failure) = ended {
                let name = board.running().unwrap_or_else(|| "process".to_owned());
                let ground = Ground { board, ..*ground };
                let mut round =
                    Round { ground: &ground, workload: self.workload.name, seed: self.seed, iteration: 0 };
                round.report(&name, began.elapsed(), Err(failure.at("the workload's process died")));
            }
        }
    }

    /// Does the rounds of one lane.
    fn run(&self, lane: usize, ground: &Ground<'_>) {
        let mut told = Instant::now();
        let mut iteration = lane as u64;
        loop {
            let more = match (self.rounds, self.until) {
                (Some(rounds), _) => iteration < rounds,
                // At least one round, however short the time.
                (None, Some(until)) => iteration == lane as u64 || Instant::now() < until,
                (None, None) => false,
            };
            if !more || ground.board.failed() >= PATIENCE {
                return;
            }
            let name = self.workload.name;
            (self.workload.round)(&mut Round { ground, workload: name, seed: self.seed, iteration });
            iteration += self.lanes as u64;
            let done = ground.board.end_round();
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                ground.sink.send(&Message::Progress { workload: name.to_owned(), done, total: self.rounds });
            }
        }
    }
}
