// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hears a run's events: what was found, and how far the suite had come by then.

use std::time::{Duration, Instant};

use guest_protocol::{Case, Message};
use parking_lot::Mutex;
use vgpu::oracle::Violation;

use crate::event::{Event, EventSink};
use crate::provision::mutants::Mutant;

/// How long a run goes on once what was expected is found: the same fault may show in other ways at the same moment.
const LINGER: Duration = Duration::from_millis(500);

/// Something that was found.
#[derive(Clone, Debug)]
pub(super) struct Find {
    /// What.
    pub(super) violation: Violation,
    /// Cases that had ended.
    pub(super) cases: u64,
    /// Seconds since PID 1 ran.
    pub(super) seconds: f64,
    /// The workload that was running, and its last case that had ended.
    pub(super) workload: Option<String>,
    /// See `workload`.
    pub(super) last_case: Option<String>,
}

/// What was heard of a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Heard {
    /// In the order of being found.
    pub(super) finds: Vec<Find>,
    /// Cases that have ended.
    pub(super) cases: u64,
    /// Seconds since PID 1 ran.
    pub(super) seconds: f64,
    /// Cases that failed, with why; the first few.
    pub(super) failed: Vec<String>,
}

#[derive(Debug, Default)]
struct State {
    booted: Option<Instant>,
    enough: Option<Instant>,
    workload: Option<String>,
    last_case: Option<String>,
    heard: Heard,
}

impl State {
    fn seconds(&self) -> f64 {
        self.booted.map_or(0.0, |booted| booted.elapsed().as_secs_f64())
    }
}

/// Listens to a run.
#[derive(Debug)]
pub(super) struct Listener {
    /// Whose `Rule:` ends the run; a correct driver's run goes on to its end.
    until: Option<Mutant>,
    state: Mutex<State>,
}

/// Failed cases whose reasons are kept.
const FAILED: usize = 3;

impl Listener {
    /// Listens until the rule that `until` names has found something (any if it names none), or to the end.
    #[must_use]
    pub(super) fn new(until: Option<Mutant>) -> Self {
        Self { until, state: Mutex::default() }
    }

    /// What was expected was found, a moment ago.
    #[must_use]
    pub(super) fn heard_enough(&self) -> bool {
        self.state.lock().enough.is_some_and(|at| at.elapsed() >= LINGER)
    }

    /// All of it.
    #[must_use]
    pub(super) fn heard(&self) -> Heard {
        let state = self.state.lock();
        Heard { seconds: state.seconds(), ..state.heard.clone() }
    }

    fn message(&self, message: Message) {
        let mut state = self.state.lock();
        match message {
            Message::Booted { .. } => {
                state.booted.get_or_insert_with(Instant::now);
            }
            Message::WorkloadStart { workload, .. } => {
                state.workload = Some(workload);
                state.last_case = None;
            }
            Message::WorkloadEnd { .. } => state.workload = None,
            Message::Case(case) => {
                state.heard.cases += 1;
                let Case { workload, case: name, detail, outcome, .. } = case;
                if outcome == guest_protocol::Outcome::Fail && state.heard.failed.len() < FAILED {
                    let why = detail.unwrap_or_else(|| "no detail".to_owned());
                    state.heard.failed.push(format!("{workload} {name}: {why}"));
                }
                state.last_case = Some(name);
            }
            _ => {}
        }
    }

    fn violation(&self, violation: Violation) {
        let mut state = self.state.lock();
        // A rule that may be seen first does not end it: the one that is named may follow.
        let ends = |mutant: &Mutant| mutant.rule.is_none_or(|rule| rule == violation.rule);
        if self.until.as_ref().is_some_and(ends) {
            state.enough.get_or_insert_with(Instant::now);
        }
        let find = Find {
            violation,
            cases: state.heard.cases,
            seconds: state.seconds(),
            workload: state.workload.clone(),
            last_case: state.last_case.clone(),
        };
        state.heard.finds.push(find);
    }
}

impl EventSink for Listener {
    fn event(&self, event: Event) {
        match event {
            Event::Guest { message } => self.message(message),
            Event::Violation { violation } => self.violation(violation),
            Event::Nested { inner } => self.event(*inner),
            _ => {}
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use guest_protocol::Outcome;
    use vgpu::oracle::Rule;

    use super::*;

    pub(in crate::mutants) fn mutant(rule: Option<Rule>, also: &[Rule]) -> Mutant {
        Mutant {
            name: "it".into(),
            about: String::new(),
            rule,
            also: also.to_vec(),
            needs: None,
            options: Vec::new(),
            kernel: None,
            path: "/x/it.patch".into(),
        }
    }

    pub(in crate::mutants) fn case(outcome: Outcome) -> Event {
        Event::Guest {
            message: Message::Case(Case {
                workload: "access".into(),
                case: "rights".into(),
                seed: 1,
                iteration: 0,
                outcome,
                seconds: 0.1,
                detail: Some("why".into()),
                mismatch: None,
            }),
        }
    }

    fn found(rule: Rule) -> Event {
        Event::Violation { violation: Violation::new(rule, "it was seen") }
    }

    #[test]
    fn it_counts_up_to_what_was_found() {
        let listener = Listener::new(Some(mutant(Some(Rule::ReleaseLate), &[Rule::KernelWarn])));
        listener
            .event(Event::Guest { message: Message::WorkloadStart { workload: "access".into(), seed: 1 } });
        listener.event(case(Outcome::Pass));
        listener.event(Event::Nested { inner: Box::new(case(Outcome::Fail)) });
        listener.event(found(Rule::KernelWarn));
        assert!(listener.state.lock().enough.is_none());
        listener.event(found(Rule::ReleaseLate));
        listener.event(case(Outcome::Pass));
        let heard = listener.heard();
        assert_eq!((heard.cases, heard.finds.len(), heard.finds[1].cases), (3, 2, 2));
        assert_eq!(heard.finds[0].workload.as_deref(), Some("access"));
        assert_eq!(heard.failed, ["access rights: why"]);
        assert!(!listener.heard_enough());
        std::thread::sleep(LINGER);
        assert!(listener.heard_enough());
    }

    #[test]
    fn a_correct_driver_is_heard_to_the_end() {
        let listener = Listener::new(None);
        listener.event(found(Rule::KernelWarn));
        std::thread::sleep(LINGER);
        assert!(!listener.heard_enough());
    }
}
