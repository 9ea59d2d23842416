// SPDX-License-Identifier: MIT OR Apache-2.0
//! The workloads, and what is common to them: rounds, cases, their reports.
//!
//! A workload runs in a process of its own, so that a crash is its failure and not the end of the machine. It does rounds: so
//! many for the default suite, or as many as the plan says, or until the time is up. A round is the same sequence of cases
//! each time, with a seed of its own derived from the workload's.

mod access;
mod bench;
mod invalidate;
mod release;
mod removal;
mod stress;
mod unregister;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::time::{Duration, Instant};

use guest_protocol::{Case, Extent, Message, Outcome, WorkloadPlan};

use crate::board::Board;
use crate::device::Device;
use crate::outcome::{Checked, Failure};
use crate::report::Sink;
use crate::rng::Rng;

/// Failed cases after which a workload gives up: each may have waited for its bound.
const PATIENCE: u64 = 20;
/// How often progress is told at the most.
const PROGRESS: Duration = Duration::from_secs(2);

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
}

/// Makes [`Ground::program`] end at once.
pub(crate) const EXIT_ARGUMENT: &str = "--exit-at-once";

/// A workload as code.
struct Workload {
    name: &'static str,
    /// Rounds in the default suite.
    rounds: u64,
    round: fn(&mut Round<'_, '_>),
}

const ALL: &[Workload] = &[
    Workload { name: "access", rounds: access::ROUNDS, round: access::round },
    Workload { name: "release", rounds: release::ROUNDS, round: release::round },
    Workload { name: "unregister", rounds: unregister::ROUNDS, round: unregister::round },
    Workload { name: "invalidate", rounds: invalidate::ROUNDS, round: invalidate::round },
    Workload { name: "stress", rounds: stress::ROUNDS, round: stress::round },
    Workload { name: "removal", rounds: removal::ROUNDS, round: removal::round },
];

/// What a plan may also name, though it is no part of any suite.
const HIDDEN: &[Workload] =
    &[Workload { name: guest_protocol::BENCH_WORKLOAD, rounds: bench::ROUNDS, round: bench::round }];

/// One round of a workload.
pub(crate) struct Round<'r, 'a> {
    ground: &'r Ground<'a>,
    workload: &'static str,
    seed: u64,
    iteration: u64,
}

impl Round<'_, '_> {
    /// The device.
    pub(crate) fn device(&self) -> &dyn Device {
        self.ground.device
    }

    /// A program that ends at once when it is run with [`EXIT_ARGUMENT`].
    pub(crate) fn program(&self) -> &Path {
        self.ground.program
    }

    /// Chance for a case: depends on the seed, the round and the name, not on what ran before.
    pub(crate) fn rng(&self, name: &str) -> Rng {
        let label = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Rng::derived(self.seed ^ label, self.iteration)
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
        let (outcome, detail, mismatch) = match result {
            Ok(()) => (Outcome::Pass, None, None),
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
    let Some(workload) = ALL.iter().chain(HIDDEN).find(|workload| workload.name == plan.name) else {
        return false;
    };
    let (rounds, until) = match plan.extent {
        Extent::Default => (Some(workload.rounds), None),
        Extent::Iterations(count) => (Some(count), None),
        Extent::Milliseconds(time) => (None, Some(Instant::now() + Duration::from_millis(time))),
    };
    let mut told = Instant::now();
    let mut done = 0;
    loop {
        let more = match (rounds, until) {
            (Some(rounds), _) => done < rounds,
            // At least one round, however short the time.
            (None, Some(until)) => done == 0 || Instant::now() < until,
            (None, None) => false,
        };
        if !more || ground.board.failed() >= PATIENCE {
            return true;
        }
        (workload.round)(&mut Round { ground, workload: workload.name, seed: plan.seed, iteration: done });
        done += 1;
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            let workload = workload.name.to_owned();
            ground.sink.send(&Message::Progress { workload, done, total: rounds });
        }
    }
}
