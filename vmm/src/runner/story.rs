// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the guest has told so far: how far its plan is, what its workloads found.

use std::collections::BTreeMap;

use guest_protocol::{Case, Message, Outcome, Plan, Reader};
use vgpu::oracle::{Rule, Violation};
use vgpu_spec::handle::Handle;

use crate::report::results::{WorkloadOutcome, WorkloadResult};

/// What the agent calls the unloading of the driver.
const UNLOAD: &str = "unload";

/// The guest's story.
#[derive(Debug)]
pub struct Story {
    workloads: Vec<WorkloadResult>,
    current: Option<usize>,
    /// `uname -r`, once PID 1 runs.
    pub kernel: Option<String>,
    /// A module was loaded: from here on what the kernel complains about may be the driver's doing.
    pub modules: bool,
    /// The driver was loaded.
    pub driver: bool,
    /// Exit status of the command.
    pub exec_status: Option<i32>,
    /// Why the guest cannot go on.
    pub fatal: Option<String>,
    /// The plan is done.
    pub done: bool,
    /// Cases outside of every workload that failed for a reason that is no finding.
    pub loose: Vec<String>,
    /// Where the modules' code begins, by their names.
    pub texts: Vec<(String, u64)>,
}

impl Story {
    /// Nothing was told yet.
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let workloads = plan.workloads.iter().map(|workload| WorkloadResult {
            name: workload.name.clone(),
            seed: workload.seed,
            outcome: WorkloadOutcome::NotRun,
            seconds: 0.0,
            cases: 0,
            failed: 0,
            skipped: 0,
            detail: None,
            movers: BTreeMap::new(),
        });
        Self {
            workloads: workloads.collect(),
            current: None,
            kernel: None,
            modules: false,
            driver: false,
            exec_status: None,
            fatal: None,
            done: false,
            loose: Vec::new(),
            texts: Vec::new(),
        }
    }

    /// The workload that runs.
    #[must_use]
    pub fn workload(&self) -> Option<&str> {
        self.current.map(|index| self.workloads[index].name.as_str())
    }

    /// Takes a message; gives the violation that it reports, if it does.
    pub fn message(&mut self, message: &Message) -> Option<Violation> {
        match message {
            Message::Booted { kernel, .. } => self.kernel = Some(kernel.clone()),
            Message::ModuleLoaded { module } => {
                self.modules = true;
                self.driver |= module.contains("driver");
            }
            Message::ModuleText { module, text } => {
                // Two are what a guest of ours has.
                if self.texts.len() < 16 {
                    self.texts.push((module.clone(), *text));
                }
            }
            Message::WorkloadStart { workload, .. } => {
                // The same workload may stand in a plan twice.
                let next = |w: &WorkloadResult| w.name == *workload && w.outcome == WorkloadOutcome::NotRun;
                self.current = self.workloads.iter().position(next);
                if let Some(result) = self.running() {
                    result.outcome = WorkloadOutcome::Unfinished;
                }
            }
            Message::Case(case) => return self.case(case),
            Message::WorkloadEnd { workload, outcome, seconds, cases, failed } => {
                if let Some(result) = self.running().filter(|result| result.name == *workload) {
                    // An end does not undo what was told before it.
                    let contradicted = *failed == 0 && result.failed > 0;
                    let failed = (*failed).max(result.failed);
                    result.outcome = match outcome {
                        Outcome::Pass if failed > 0 => WorkloadOutcome::Fail,
                        // Nothing of it was done, however well.
                        Outcome::Pass if result.skipped > 0 && result.skipped == *cases => {
                            WorkloadOutcome::Skip
                        }
                        Outcome::Pass => WorkloadOutcome::Pass,
                        Outcome::Fail => WorkloadOutcome::Fail,
                        Outcome::Skip => WorkloadOutcome::Skip,
                    };
                    result.seconds = if seconds.is_finite() { *seconds } else { 0.0 };
                    if contradicted {
                        let detail = result.detail.take().unwrap_or_default();
                        result.detail = Some(format!("it says that no case failed, but one did: {detail}"));
                    }
                    // Its own count stands even if a line was lost.
                    result.cases = *cases;
                    result.failed = failed;
                    self.current = None;
                }
            }
            // The first word counts, and a failure more than a success.
            Message::ExecEnd { status } => {
                self.exec_status = self.exec_status.filter(|status| *status != 0).or(Some(*status));
            }
            Message::Fatal { reason } => self.fatal = Some(reason.clone()),
            Message::Done => self.done = true,
            Message::Progress { .. } | Message::Metric { .. } | Message::Ask { .. } => {}
        }
        None
    }

    fn running(&mut self) -> Option<&mut WorkloadResult> {
        self.current.map(|index| &mut self.workloads[index])
    }

    fn case(&mut self, case: &Case) -> Option<Violation> {
        if let Some(result) = self.running() {
            result.cases += 1;
            match case.outcome {
                Outcome::Pass => count_mover(&mut result.movers, &case.case),
                Outcome::Fail => result.failed += 1,
                Outcome::Skip => result.skipped += 1,
            }
            // The first that failed says most; that one was skipped matters only if none failed.
            let first = case.outcome == Outcome::Fail && result.failed == 1;
            if first || (case.outcome == Outcome::Skip && result.detail.is_none()) {
                let detail = case.detail.as_deref().unwrap_or("no detail");
                result.detail = Some(format!("{}: {detail}", case.case));
            }
        } else if case.outcome == Outcome::Fail {
            return self.outside(case);
        }
        mismatch(case)
    }

    /// A case outside of the workloads failed: the driver's module could not be unloaded.
    fn outside(&mut self, case: &Case) -> Option<Violation> {
        let detail = case.detail.as_deref().unwrap_or("no detail");
        // All processes have ended. A module that is still in use is held by something that should be gone.
        if case.workload == UNLOAD && (detail.contains("EAGAIN") || detail.contains("EBUSY")) {
            let summary = format!("the driver cannot be unloaded though no process is left: {detail}");
            return Some(Violation::new(Rule::UnregisterLeak, summary));
        }
        if self.loose.len() < 20 {
            self.loose.push(format!("{}/{}: {detail}", case.workload, case.case));
        }
        mismatch(case)
    }

    /// The workloads as results; `why` is what is said of those that did not end.
    #[must_use]
    pub fn results(&self, why: &str) -> Vec<WorkloadResult> {
        let mut results = self.workloads.clone();
        for result in &mut results {
            match result.outcome {
                WorkloadOutcome::NotRun => result.detail = Some(format!("not run: {why}")),
                WorkloadOutcome::Unfinished => {
                    let failed = result.detail.take().filter(|_| result.failed > 0);
                    result.detail =
                        Some(failed.map_or_else(|| why.to_owned(), |case| format!("{why}; before, {case}")));
                }
                WorkloadOutcome::Pass => result.detail = None,
                WorkloadOutcome::Fail | WorkloadOutcome::Skip => {}
            }
        }
        results
    }
}

/// The violation that a case reports: data that differs from the model, or a hole that the device could still reach.
///
/// A workload says so by filling in what it found. A case that failed without that failed for a reason of its own, such as
/// memory that it did not get, and makes the run inconclusive.
fn mismatch(case: &Case) -> Option<Violation> {
    let found = case.mismatch?;
    let reader = match found.reader {
        Reader::Cpu => "the CPU",
        Reader::Device | Reader::Refused | Reader::Ended | Reader::Held => "the device",
    };
    let rule = match found.reader {
        Reader::Cpu | Reader::Device => Rule::DataMismatch,
        Reader::Refused => Rule::FaultSpuriousFatal,
        Reader::Ended => Rule::ContextEndedEarly,
        Reader::Held => Rule::UnregisterLeak,
    };
    let mut summary = format!("{}/{} (iteration {})", case.workload, case.case, case.iteration);
    if found.reader == Reader::Ended {
        summary.push_str(": gone before its owner has let it go");
    } else if found.reader == Reader::Held {
        summary.push_str(&format!(
            ": the context has gone, and pages from {:#x} on are held still",
            found.address
        ));
    } else if found.reader == Reader::Refused {
        summary.push_str(&format!(": an access of the device to {:#x} failed for good", found.address));
    } else if found.expected == found.found {
        summary.push_str(&format!(": {reader} reached {:#x}", found.address));
    } else {
        summary.push_str(&format!(
            ": {reader} read {:#x} at {:#x} where the model has {:#x}",
            found.found, found.address, found.expected
        ));
    }
    if let Some(detail) = &case.detail {
        summary.push_str(&format!(" ({detail})"));
    }
    let mut violation = Violation::new(rule, summary);
    if found.reader != Reader::Ended {
        violation = violation.at(Some(found.address), None);
    }
    if found.context != 0 {
        violation = violation.on(Handle(found.context));
    }
    Some(violation)
}

/// The most movers that are counted, and the most characters of a name: more than any agent of ours has.
const MOST_MOVERS: usize = 64;

/// A case that tells of what moved memory while others worked is counted by its name.
fn count_mover(movers: &mut BTreeMap<String, u64>, case: &str) {
    let Some(name) = case.strip_prefix("mover/").filter(|name| is_mover(name)) else { return };
    if movers.len() < MOST_MOVERS || movers.contains_key(name) {
        *movers.entry(name.to_owned()).or_default() += 1;
    }
}

/// Whether it may be the name of what moves memory: it is shown as it is.
pub(super) fn is_mover(name: &str) -> bool {
    (1..=MOST_MOVERS).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::RunConfig;
    use crate::runner::plan::plan;
    use guest_protocol::Mismatch;

    fn case(outcome: Outcome, mismatch: Option<Mismatch>) -> Case {
        Case {
            workload: "access".into(),
            case: "anonymous/fill".into(),
            seed: 1,
            iteration: 2,
            outcome,
            seconds: 0.1,
            detail: (outcome != Outcome::Pass).then(|| "because".into()),
            mismatch,
        }
    }

    fn start(workload: &str) -> Message {
        Message::WorkloadStart { workload: workload.into(), seed: 1 }
    }

    #[test]
    fn workloads_that_did_not_end_are_told_from_those_that_did() {
        let mut story = Story::new(&plan(&RunConfig::for_tests()));
        story.message(&start("access"));
        assert_eq!(story.workload(), Some("access"));
        story.message(&Message::Case(case(Outcome::Pass, None)));
        let results = story.results("guest died");
        assert_eq!(results[0].outcome, WorkloadOutcome::Unfinished);
        assert_eq!(results[0].cases, 1);
        assert_eq!(results[1].detail.as_deref(), Some("not run: guest died"));
        story.message(&Message::WorkloadEnd {
            workload: "access".into(),
            outcome: Outcome::Pass,
            seconds: f64::NAN,
            cases: 9,
            failed: 0,
        });
        let results = story.results("guest died");
        assert_eq!(
            (results[0].outcome, results[0].cases, results[0].seconds),
            (WorkloadOutcome::Pass, 9, 0.0)
        );
        assert_eq!(story.workload(), None);
    }

    #[test]
    fn what_moved_memory_is_counted_by_its_name() {
        let mut story = Story::new(&plan(&RunConfig::for_tests()));
        story.message(&start("access"));
        for name in ["mover/ksm", "mover/swapoff", "mover/ksm", "slot-0", "mover/\u{1b}[31m", "mover/"] {
            let case = Case { case: name.to_owned(), ..case(Outcome::Pass, None) };
            story.message(&Message::Case(case));
        }
        let failed = Case { case: "mover/damon".into(), ..case(Outcome::Fail, None) };
        story.message(&Message::Case(failed));
        let movers = &story.results("")[0].movers;
        let counted: Vec<_> = movers.iter().map(|(name, rounds)| (name.as_str(), *rounds)).collect();
        assert_eq!(counted, [("ksm", 2), ("swapoff", 1)]);
    }

    #[test]
    fn an_end_does_not_undo_what_was_told() {
        let mut story = Story::new(&plan(&RunConfig::for_tests()));
        let pass = |workload: &str| Message::WorkloadEnd {
            workload: workload.into(),
            outcome: Outcome::Pass,
            seconds: 1.0,
            cases: u64::MAX,
            failed: 0,
        };
        story.message(&start("access"));
        story.message(&Message::Case(case(Outcome::Fail, None)));
        story.message(&pass("release"));
        assert_eq!(story.workload(), Some("access"), "that was not its end");
        story.message(&pass("access"));
        let result = &story.results("why")[0];
        assert_eq!((result.outcome, result.failed), (WorkloadOutcome::Fail, 1));
        assert!(result.detail.as_deref().is_some_and(|detail| detail.contains("anonymous/fill")));
        story.message(&Message::ExecEnd { status: 7 });
        story.message(&Message::ExecEnd { status: 0 });
        assert_eq!(story.exec_status, Some(7));
    }

    #[test]
    fn a_workload_of_which_every_case_was_skipped_is_skipped() {
        for (skipped, cases, outcome) in
            [(2, 2, WorkloadOutcome::Skip), (2, 3, WorkloadOutcome::Pass), (0, 0, WorkloadOutcome::Pass)]
        {
            let mut story = Story::new(&plan(&RunConfig::for_tests()));
            story.message(&start("access"));
            (0..skipped).for_each(|_| drop(story.message(&Message::Case(case(Outcome::Skip, None)))));
            story.message(&Message::WorkloadEnd {
                workload: "access".into(),
                outcome: Outcome::Pass,
                seconds: 1.0,
                cases,
                failed: 0,
            });
            assert_eq!(story.results("why")[0].outcome, outcome);
        }
    }

    #[test]
    fn only_data_is_a_violation() {
        let mut story = Story::new(&plan(&RunConfig::for_tests()));
        story.message(&start("access"));
        assert!(story.message(&Message::Case(case(Outcome::Fail, None))).is_none());
        let mismatch = Mismatch {
            context: Handle::new(vgpu_spec::handle::Kind::Context, 3, 1).0,
            address: 0x1000,
            expected: 1,
            found: 2,
            reader: Reader::Device,
        };
        let violation = story.message(&Message::Case(case(Outcome::Fail, Some(mismatch)))).unwrap();
        assert_eq!(violation.rule, Rule::DataMismatch);
        assert_eq!(violation.address, Some(0x1000));
        assert_eq!(violation.context_name.as_deref(), Some("context 3#1"));
        assert!(violation.summary.contains("the device read 0x2 at 0x1000 where the model has 0x1"));
        let refused = Mismatch { reader: Reader::Refused, expected: 0, found: 0, ..mismatch };
        let violation = story.message(&Message::Case(case(Outcome::Fail, Some(refused)))).unwrap();
        assert_eq!(violation.rule, Rule::FaultSpuriousFatal);
        assert!(violation.summary.contains("an access of the device to 0x1000 failed for good"));
        let ended = Mismatch { reader: Reader::Ended, address: 0, expected: 0, found: 0, ..mismatch };
        let violation = story.message(&Message::Case(case(Outcome::Fail, Some(ended)))).unwrap();
        assert_eq!((violation.rule, violation.address), (Rule::ContextEndedEarly, None));
        assert!(violation.summary.contains("gone before its owner has let it go (because)"));
        let held = Mismatch { reader: Reader::Held, expected: 0, found: 0, ..mismatch };
        let violation = story.message(&Message::Case(case(Outcome::Fail, Some(held)))).unwrap();
        assert_eq!((violation.rule, violation.address), (Rule::UnregisterLeak, Some(0x1000)));
        assert!(violation.summary.contains("pages from 0x1000 on are held still (because)"));
        let result = &story.results("why")[0];
        assert_eq!(
            (result.failed, result.detail.as_deref()),
            (5, Some("why; before, anonymous/fill: because"))
        );
    }

    #[test]
    fn strangers_are_ignored() {
        let mut story = Story::new(&plan(&RunConfig::for_tests()));
        story.message(&start("no such workload"));
        story.message(&Message::Case(case(Outcome::Fail, None)));
        assert_eq!(story.workload(), None);
        assert_eq!(story.loose, ["access/anonymous/fill: because"]);
        assert!(story.results("x").iter().all(|result| result.cases == 0));
    }

    #[test]
    fn a_driver_that_cannot_be_unloaded() {
        let mut story = Story::new(&plan(&RunConfig::for_tests()));
        let mut unload = case(Outcome::Fail, None);
        unload.workload = "unload".into();
        unload.detail = Some("delete_module: Try again (EAGAIN)".into());
        let violation = story.message(&Message::Case(unload.clone())).unwrap();
        assert_eq!(violation.rule, Rule::UnregisterLeak);
        // A driver of the user's may have another name.
        unload.detail = Some("delete_module: No such file or directory (ENOENT)".into());
        assert!(story.message(&Message::Case(unload)).is_none());
        assert_eq!(story.loose.len(), 1);
    }
}
