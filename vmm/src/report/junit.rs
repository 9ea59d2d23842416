// SPDX-License-Identifier: MIT OR Apache-2.0
//! `junit.xml`: one test case a workload, one for the oracle's verdict.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, SerializeError, TestCase, TestCaseStatus, TestSuite};

use super::results::{Results, Verdict, WorkloadOutcome};

/// The report as XML.
pub fn report(results: &Results) -> Result<String, SerializeError> {
    let mut report = Report::new("hmm-testbench");
    let mut suite = TestSuite::new(format!("hmm-testbench {} {}", results.machine, results.kernel));
    for workload in &results.workloads {
        let own = results.violations.iter().filter(|v| v.workload.as_deref() == Some(&workload.name));
        let broken: Vec<String> = own.map(|v| format!("{}: {}", v.rule, v.summary)).collect();
        let status = match workload.outcome {
            _ if !broken.is_empty() => failed(NonSuccessKind::Failure, &broken.join("\n")),
            WorkloadOutcome::Pass => TestCaseStatus::success(),
            WorkloadOutcome::Fail => {
                failed(NonSuccessKind::Failure, workload.detail.as_deref().unwrap_or("failed"))
            }
            WorkloadOutcome::Skip => {
                let mut status = TestCaseStatus::skipped();
                status.set_message(workload.detail.clone().unwrap_or_default());
                status
            }
            WorkloadOutcome::Unfinished | WorkloadOutcome::NotRun => {
                failed(NonSuccessKind::Error, workload.detail.as_deref().unwrap_or(workload.outcome.name()))
            }
        };
        let mut case = TestCase::new(format!("hmm-testbench.{}", workload.name), status);
        case.set_classname("hmm-testbench.workload");
        if let Ok(time) = Duration::try_from_secs_f64(workload.seconds) {
            case.set_time(time);
        }
        suite.add_test_case(case);
    }
    let status = match results.verdict {
        Verdict::Clean => TestCaseStatus::success(),
        Verdict::Violation => {
            let text: Vec<String> =
                results.violations.iter().map(|v| format!("{}: {}", v.rule, v.summary)).collect();
            failed(NonSuccessKind::Failure, &text.join("\n"))
        }
        Verdict::Inconclusive | Verdict::Error => failed(NonSuccessKind::Error, &results.reasons.join("\n")),
    };
    let mut case = TestCase::new("hmm-testbench.verdict", status);
    case.set_classname("hmm-testbench");
    let mut said: Vec<String> = Vec::new();
    for allowed in &results.allowed {
        let record = &allowed.violation;
        said.push(format!("allowed {}: {} ({})", record.rule, record.summary, allowed.reason));
    }
    said.extend(results.allow_unneeded.iter().map(|unneeded| format!("warning: {unneeded}")));
    if !said.is_empty() {
        case.set_system_out(said.join("\n"));
    }
    suite.add_test_case(case);
    report.add_test_suite(suite);
    report.to_string()
}

fn failed(kind: NonSuccessKind, text: &str) -> TestCaseStatus {
    let mut status = TestCaseStatus::non_success(kind);
    status.set_message(text.lines().next().unwrap_or_default());
    status.set_description(text);
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::tests::sample;

    #[test]
    fn every_workload_and_the_verdict_are_cases() {
        let mut results = sample();
        results.workloads[0].seconds = 1e300;
        results.violations[0].summary = "a <b> & \u{1} c".into();
        let xml = report(&results).unwrap();
        assert!(xml.contains("hmm-testbench.release"));
        assert!(xml.contains("hmm-testbench.verdict"));
        assert!(xml.contains("release/late"));
        assert!(xml.contains("allowed release/late: left one (exit"));
        assert!(xml.contains("a &lt;b&gt; &amp;"));
        assert!(!xml.contains('\u{1}'));
    }
}
