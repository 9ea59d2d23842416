// SPDX-License-Identifier: MIT OR Apache-2.0
//! From what was seen to a verdict.

use guest_protocol::WORKLOADS;

use crate::report::results::{Counters, Verdict, WorkloadOutcome, WorkloadResult};

/// What was seen of a guest that was started.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Rules that were broken, by name.
    pub broken: Vec<String>,
    /// The oracle was to judge.
    pub oracle: bool,
    /// The witness said hello.
    pub hello: bool,
    /// What was counted.
    pub counters: Counters,
    /// The workloads.
    pub workloads: Vec<WorkloadResult>,
    /// A command was to run.
    pub exec: bool,
    /// Its exit status.
    pub exec_status: Option<i32>,
    /// The guest said that its plan is done.
    pub done: bool,
    /// Why the guest could not go on, by its own word.
    pub fatal: Option<String>,
    /// Why the guest is lost.
    pub lost: Option<String>,
    /// Ended from outside.
    pub interrupted: bool,
    /// Messages that could not be read: what they said is not known.
    pub garbled: u64,
    /// What is said of entries of the allow list that must have been needed and were not.
    pub unneeded: Vec<String>,
    /// Violations that were not kept, where others were accepted: nobody knows what they were.
    pub unkept: u64,
    /// What failed outside of the workloads.
    pub loose: Vec<String>,
    /// Why it is not certain that a scenario went as it was written.
    pub scenario: Vec<String>,
}

/// The verdict and its reasons.
///
/// A violation outranks everything. Without one, a run that did not do all it was to do, or of which not everything was seen,
/// is inconclusive: it proves nothing.
#[must_use]
pub fn judge(evidence: &Evidence) -> (Verdict, Vec<String>) {
    let mut doubts = doubts(evidence);
    if !evidence.broken.is_empty() {
        let mut names: Vec<&String> = Vec::new();
        for name in &evidence.broken {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
        let mut reasons = vec![format!("broken: {}", names.join(", "))];
        reasons.append(&mut doubts);
        return (Verdict::Violation, reasons);
    }
    if doubts.is_empty() { (Verdict::Clean, doubts) } else { (Verdict::Inconclusive, doubts) }
}

/// What is said of violations that were not kept, where others are accepted: nobody knows what they were.
pub(crate) fn unkept_beside_allowed(unkept: u64) -> Option<String> {
    (unkept > 0).then(|| format!("{unkept} violations were not kept beside those that are allowed"))
}

fn doubts(evidence: &Evidence) -> Vec<String> {
    let mut doubts = Vec::new();
    if evidence.interrupted {
        doubts.push("interrupted".to_owned());
    }
    doubts.extend(evidence.lost.clone());
    doubts.extend(evidence.fatal.as_ref().map(|reason| format!("the guest could not go on: {reason}")));
    let gone = evidence.interrupted || evidence.lost.is_some() || evidence.fatal.is_some();
    if !evidence.done && !gone {
        doubts.push("the guest ended before its plan was done".to_owned());
    }
    for workload in &evidence.workloads {
        let detail = workload.detail.as_deref().unwrap_or("no detail");
        match workload.outcome {
            WorkloadOutcome::Pass | WorkloadOutcome::Skip => {}
            WorkloadOutcome::Fail => doubts.push(format!("{} failed: {detail}", workload.name)),
            WorkloadOutcome::Unfinished => doubts.push(format!("{} did not end: {detail}", workload.name)),
            WorkloadOutcome::NotRun => doubts.push(format!("{} {detail}", workload.name)),
        }
    }
    let skipped = |workload: &WorkloadResult| workload.outcome == WorkloadOutcome::Skip;
    if !evidence.workloads.is_empty() && evidence.workloads.iter().all(skipped) {
        doubts.push("every workload was skipped".to_owned());
    }
    doubts.extend(evidence.loose.iter().cloned());
    if !gone {
        doubts.extend(evidence.scenario.iter().cloned());
    }
    doubts.extend(unkept_beside_allowed(evidence.unkept));
    // One that is gone or was cut short may not have got so far.
    if evidence.done {
        doubts.extend(evidence.unneeded.iter().cloned());
    }
    match evidence.exec_status {
        Some(0) => {}
        Some(status) => doubts.push(format!("the command ended with status {status}")),
        None if evidence.exec && evidence.done => doubts.push("the command did not end".to_owned()),
        None => {}
    }
    if evidence.garbled > 0 {
        doubts.push(format!("{} messages of the guest could not be read", evidence.garbled));
    }
    if evidence.oracle {
        witness_doubts(evidence, gone, &mut doubts);
    }
    doubts
}

fn witness_doubts(evidence: &Evidence, gone: bool, doubts: &mut Vec<String>) {
    let counters = &evidence.counters;
    if counters.probes_missed > 0 {
        doubts.push(format!("the witness missed {} probes", counters.probes_missed));
    }
    if counters.bad_records > 0 {
        doubts.push(format!("{} records of the witness made no sense", counters.bad_records));
    }
    if counters.witness_starts > 1 {
        doubts.push(format!(
            "the witness was started {} times: what happened in between was not judged",
            counters.witness_starts
        ));
    }
    let asked =
        WORKLOADS.iter().any(|known| known.resets && evidence.workloads.iter().any(|w| w.name == known.name));
    if counters.contexts_lost > 0 && !asked {
        doubts.push(format!(
            "the device was reset with {} contexts on it: their end was not judged",
            counters.contexts_lost
        ));
    }
    // A guest that is gone has its reason already.
    if gone || !evidence.done {
        return;
    }
    if !evidence.hello {
        doubts.push("the witness did not report: the oracle saw one side only".to_owned());
    } else if counters.heartbeats == 0 {
        doubts.push("the witness had no heartbeat: hangs and unanswered faults were not judged".to_owned());
    }
    if counters.unassociated_contexts > 0 {
        doubts.push(format!(
            "of {} contexts it is not known whose they were: their release was not judged",
            counters.unassociated_contexts
        ));
    }
    if counters.accesses == 0 {
        doubts.push("no evidence: the device made no access".to_owned());
    } else if counters.address_spaces == 0 && counters.unassociated_contexts == 0 {
        // A driver may try its device out by itself.
        doubts.push("no evidence: the device made no access for any process".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean() -> Evidence {
        Evidence {
            oracle: true,
            hello: true,
            done: true,
            counters: Counters { accesses: 10, address_spaces: 1, heartbeats: 10, ..Counters::default() },
            workloads: vec![WorkloadResult {
                name: "access".into(),
                seed: 1,
                outcome: WorkloadOutcome::Pass,
                seconds: 1.0,
                cases: 1,
                failed: 0,
                skipped: 0,
                detail: None,
                movers: Default::default(),
            }],
            ..Evidence::default()
        }
    }

    fn verdict(change: impl Fn(&mut Evidence)) -> Verdict {
        let mut evidence = clean();
        change(&mut evidence);
        let (verdict, reasons) = judge(&evidence);
        assert_eq!(verdict == Verdict::Clean, reasons.is_empty());
        verdict
    }

    #[test]
    fn clean_is_clean() {
        assert_eq!(verdict(|_| {}), Verdict::Clean);
        assert_eq!(verdict(|e| (e.exec, e.exec_status) = (true, Some(0))), Verdict::Clean);
    }

    #[test]
    fn a_violation_outranks_everything() {
        assert_eq!(verdict(|e| e.broken.push("release/late".into())), Verdict::Violation);
        let all = |e: &mut Evidence| {
            e.broken.push("kernel/oops".into());
            e.lost = Some("panic".into());
            e.interrupted = true;
            e.counters.probes_missed = 3;
            e.done = false;
        };
        assert_eq!(verdict(all), Verdict::Violation);
    }

    #[test]
    fn resets_that_a_workload_asks_for_are_no_gap() {
        let reset = |e: &mut Evidence| {
            e.counters.contexts_lost = 1;
            e.workloads[0].name = "removal".into();
        };
        assert_eq!(verdict(reset), Verdict::Clean);
    }

    #[test]
    fn whatever_was_not_seen_is_inconclusive() {
        let changes: [fn(&mut Evidence); 21] = [
            |e| e.scenario.push("a gate was not come to".into()),
            |e| e.unkept = 1,
            |e| e.unneeded.push("a.toml:1: release/late was allowed and did not happen".into()),
            |e| e.hello = false,
            |e| e.counters.heartbeats = 0,
            |e| e.counters.probes_missed = 1,
            |e| e.counters.bad_records = 1,
            |e| e.counters.witness_starts = 2,
            |e| e.counters.contexts_lost = 1,
            |e| e.counters.accesses = 0,
            |e| e.counters.unassociated_contexts = 1,
            |e| e.done = false,
            |e| e.lost = Some("silent".into()),
            |e| e.fatal = Some("no driver".into()),
            |e| e.interrupted = true,
            |e| e.garbled = 1,
            |e| e.workloads[0].outcome = WorkloadOutcome::Fail,
            |e| e.workloads[0].outcome = WorkloadOutcome::NotRun,
            |e| e.workloads[0].outcome = WorkloadOutcome::Unfinished,
            |e| e.workloads[0].outcome = WorkloadOutcome::Skip,
            |e| (e.exec, e.exec_status) = (true, Some(7)),
        ];
        for (index, change) in changes.iter().enumerate() {
            assert_eq!(verdict(change), Verdict::Inconclusive, "{index}");
        }
    }

    #[test]
    fn without_the_oracle_the_witness_is_not_missed() {
        let change = |e: &mut Evidence| {
            e.oracle = false;
            e.hello = false;
            e.counters = Counters::default();
        };
        assert_eq!(verdict(change), Verdict::Clean);
    }

    #[test]
    fn a_lost_guest_is_said_once() {
        let mut evidence = clean();
        evidence.lost = Some("the guest shows no sign of life".into());
        evidence.done = false;
        evidence.hello = false;
        assert_eq!(judge(&evidence).1.len(), 1);
    }
}
