// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who plays in scenarios: threads and processes that come to gates, in parts that have names.
//!
//! A cast plays once a repetition, in a process of its own, with the gates closed when it begins. Who of it waits where, and for
//! how long, is the scenario's to say; without gates it must still come to its end, and check what it can.

mod fault;
mod seed;

use std::time::{Duration, Instant};

use guest_protocol::{Extent, Message, Play, ScenarioPlan, WorkloadPlan};

use crate::device::Device;
use crate::gates::{Gates, GatesUp};
use crate::outcome::{Checked, Failure};
use crate::process::Child;
use crate::rng::Rng;
use crate::workload::{Ground, Round, one_round};

/// Failed repetitions after which a scenario gives up.
const PATIENCE: u64 = 20;
/// How often progress is told at the most.
const PROGRESS: Duration = Duration::from_secs(2);

/// What a cast plays on.
pub(crate) struct Stage<'a> {
    /// The device.
    pub(crate) device: &'a dyn Device,
    /// Roles, and gates in user space.
    pub(crate) gates: Gates<'a>,
    /// Which repetition it is.
    pub(crate) iteration: u64,
    rng: Rng,
}

impl Stage<'_> {
    /// Chance for this repetition.
    pub(crate) fn rng(&self) -> Rng {
        self.rng.clone()
    }
}

/// A cast as code.
struct Cast {
    name: &'static str,
    play: fn(&Stage<'_>) -> Checked,
}

/// In the order of the protocol's list, which says what they are.
const ALL: &[Cast] = &[
    Cast { name: "fault-and-drop", play: fault::and_drop },
    Cast { name: "drop-and-fault", play: fault::after_drop },
    Cast { name: "release-unregister", play: seed::release_unregister },
    Cast { name: "release-once", play: seed::release_once },
    Cast { name: "release-waits", play: seed::release_waits },
    Cast { name: "unregister-in-release", play: seed::unregister_in_release },
    Cast { name: "mirrors-sem", play: seed::mirrors_sem },
    Cast { name: "mirrors-sem-narrow", play: seed::mirrors_sem_narrow },
    Cast { name: "range-unheld", play: seed::range_unheld },
    Cast { name: "range-held", play: seed::range_held },
    Cast { name: "reclaim", play: seed::reclaim },
];

/// The names of all casts.
#[cfg(test)]
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    ALL.iter().map(|cast| cast.name)
}

/// Plays a scenario as often as the plan says, and reports a case for each repetition. False if it names what does not exist.
pub(crate) fn run(plan: &WorkloadPlan, scenario: &ScenarioPlan, ground: &Ground<'_>) -> bool {
    let cast = match &scenario.play {
        Play::Cast(name) => match ALL.iter().find(|cast| cast.name == *name) {
            Some(cast) => Some(cast),
            None => return false,
        },
        Play::Workload(_) | Play::Command(_) => None,
    };
    // Once a process.
    let name: &'static str = plan.name.clone().leak();
    let told = |done| {
        let total = Some(scenario.sites.len() as u64);
        ground.sink.send(&Message::Progress { workload: format!("{name}, its gates"), done, total });
    };
    let up = match ground.gates.set_up(scenario, &told) {
        Ok(up) => up,
        Err(failure) => {
            let mut round = Round::of(ground, name, plan.seed, 0);
            round.case("gates", |_| Err(failure));
            return true;
        }
    };
    let mut exists = true;
    repeat(plan, name, ground, |round| match (&scenario.play, cast) {
        (_, Some(cast)) => repetition(round, cast, scenario, &up),
        (Play::Workload(workload), None) => {
            exists &=
                armed(round.iteration(), scenario, &up, || Ok(one_round(workload, round))).unwrap_or(true);
        }
        (Play::Command(command), None) => {
            let iteration = round.iteration();
            round.case("command", |_| {
                armed(iteration, scenario, &up, || match crate::exec::run(command) {
                    0 => Ok(()),
                    status => Err(Failure::wrong(format!("the command ended with status {status}"))),
                })
            });
        }
        (Play::Cast(_), None) => exists = false,
    });
    exists
}

/// Repetitions, one after the other, as many as the plan says.
fn repeat(
    plan: &WorkloadPlan,
    name: &'static str,
    ground: &Ground<'_>,
    mut repetition: impl FnMut(&mut Round<'_, '_>),
) {
    let (total, until) = match plan.extent {
        Extent::Default => (Some(1), None),
        Extent::Iterations(count) => (Some(count), None),
        Extent::Milliseconds(time) => (None, Some(Instant::now() + Duration::from_millis(time))),
    };
    let mut told = Instant::now();
    let mut done = 0;
    // To make the gates may have taken longer than a scenario that may hang is given: its patience begins here.
    ground.sink.send(&Message::Progress { workload: name.to_owned(), done, total });
    while ground.board.failed() < PATIENCE {
        let more = match (total, until) {
            (Some(total), _) => done < total,
            (None, until) => done == 0 || until.is_some_and(|until| Instant::now() < until),
        };
        if !more {
            return;
        }
        repetition(&mut Round::of(ground, name, plan.seed, done));
        done += 1;
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            ground.sink.send(&Message::Progress { workload: name.to_owned(), done, total });
        }
    }
}

/// With the gates closed, until it has ended.
fn armed<T>(
    iteration: u64,
    scenario: &ScenarioPlan,
    up: &GatesUp<'_>,
    body: impl FnOnce() -> Checked<T>,
) -> Checked<T> {
    up.arm(iteration, scenario.limit.max(1))?;
    let result = body();
    up.disarm();
    result
}

fn repetition(round: &mut Round<'_, '_>, cast: &Cast, scenario: &ScenarioPlan, up: &GatesUp<'_>) {
    let (device, gates, iteration) = (round.device(), round.gates(), round.iteration());
    round.case(cast.name, |rng| {
        armed(iteration, scenario, up, || {
            let mut child =
                Child::spawn(|_| (cast.play)(&Stage { device, gates, iteration, rng: rng.clone() }))?;
            // However long it takes: it is the host that says who hangs.
            let ended = child.wait_long()?;
            child.judge(ended)
        })
    });
}
