// SPDX-License-Identifier: MIT OR Apache-2.0
//! What came of a driver.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vgpu::oracle::Rule;

use super::listen::{Find, Heard};
use crate::provision::mutants::Mutant;
use crate::report::results::{Results, Verdict, WorkloadOutcome};
use crate::runner::RunConfig;

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// A broken driver in which something was found.
    Killed,
    /// One in which nothing was.
    Survived,
    /// A correct driver in which nothing was found.
    Clean,
    /// One in which something was.
    Accused,
    /// The kernel is not one that it can be built for, as its head says.
    Skipped,
    /// It could not be tried, or not to the end.
    Error,
}

impl Outcome {
    /// Its name.
    #[must_use]
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Survived => "survived",
            Self::Clean => "clean",
            Self::Accused => "accused",
            Self::Skipped => "skipped",
            Self::Error => "error",
        }
    }
}

/// One driver with one seed. A line of `mutants --json`: fields may be added, never renamed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Judged {
    /// Its name.
    pub(super) mutant: String,
    /// What came of it.
    pub(super) outcome: Outcome,
    /// The rule that found it: the one it names, or one of its `Also:`, if one of those did, else the first that did.
    pub(super) rule: Option<String>,
    /// The rule that it names.
    pub(super) expected: Option<String>,
    /// Whether that is as it should be.
    pub(super) as_expected: bool,
    /// Cases of the suite that had ended when it was found, or in all.
    pub(super) iterations: u64,
    /// Seconds from PID 1 to that moment, or in all.
    pub(super) seconds: f64,
    /// The seed.
    pub(super) seed: u64,
    /// The kernel's release.
    pub(super) kernel: String,
    /// The machine.
    pub(super) machine: String,
    /// The patch.
    pub(super) patch: PathBuf,
    /// Every rule that found something, in order.
    pub(super) rules: Vec<String>,
    /// The workload in which it was found.
    pub(super) workload: Option<String>,
    /// The case of it that had ended last.
    pub(super) after_case: Option<String>,
    /// What was found, one sentence.
    pub(super) summary: Option<String>,
    /// The command that finds it again.
    pub(super) replay: Option<String>,
    /// Why it could not be tried; or what else may explain that nothing was found.
    pub(super) detail: Option<String>,
}

impl Judged {
    fn new(mutant: &Mutant, config: &RunConfig, outcome: Outcome) -> Self {
        Self {
            mutant: mutant.name.clone(),
            outcome,
            rule: None,
            expected: mutant.rule.map(|rule| rule.name().to_owned()),
            as_expected: matches!(outcome, Outcome::Clean | Outcome::Skipped),
            iterations: 0,
            seconds: 0.0,
            seed: config.seed,
            kernel: config.kernel.clone(),
            machine: config.machine.to_string(),
            patch: mutant.path.clone(),
            rules: Vec::new(),
            workload: None,
            after_case: None,
            summary: None,
            replay: None,
            detail: None,
        }
    }

    /// One that could not be tried.
    #[must_use]
    pub(super) fn untried(mutant: &Mutant, config: &RunConfig, outcome: Outcome, why: String) -> Self {
        Self { detail: Some(why), ..Self::new(mutant, config, outcome) }
    }
}

/// From what was heard to what came of it.
#[must_use]
pub(super) fn judge(
    benign: bool,
    mutant: &Mutant,
    config: &RunConfig,
    heard: &Heard,
    results: &Results,
) -> Judged {
    let named = |find: &&Find| mutant.rule == Some(find.violation.rule);
    let expected = |find: &&Find| mutant.expects(find.violation.rule);
    let finds = &heard.finds;
    let decisive = finds.iter().find(named).or(finds.iter().find(expected)).or(finds.first());
    let outcome = match (benign, decisive, results.verdict) {
        (false, Some(_), _) => Outcome::Killed,
        (true, Some(_), _) => Outcome::Accused,
        // The suite came to its end; what failed in it without a violation is for the reader.
        (false, None, _) if to_the_end(results) => Outcome::Survived,
        (true, None, Verdict::Clean) => Outcome::Clean,
        _ => Outcome::Error,
    };
    let mut judged = Judged::new(mutant, config, outcome);
    judged.kernel.clone_from(&results.kernel);
    judged.rules = in_order(heard);
    (judged.iterations, judged.seconds) = (heard.cases, heard.seconds);
    if let Some(find) = decisive {
        let rule = find.violation.rule;
        judged.rule = Some(rule.name().to_owned());
        judged.as_expected = !benign && mutant.expects(rule);
        (judged.iterations, judged.seconds) = (find.cases, find.seconds);
        judged.workload.clone_from(&find.workload);
        judged.after_case.clone_from(&find.last_case);
        judged.summary = Some(find.violation.summary.clone());
        judged.replay.clone_from(&find.violation.replay);
    } else if outcome != Outcome::Clean {
        let reasons = if heard.failed.is_empty() { &results.reasons } else { &heard.failed };
        judged.detail = Some(reasons.join("; ")).filter(|reasons| !reasons.is_empty());
    }
    judged
}

/// Every workload was done, well or badly.
pub(super) fn to_the_end(results: &Results) -> bool {
    let done =
        |outcome| matches!(outcome, WorkloadOutcome::Pass | WorkloadOutcome::Fail | WorkloadOutcome::Skip);
    !results.workloads.is_empty() && results.workloads.iter().all(|workload| done(workload.outcome))
}

fn in_order(heard: &Heard) -> Vec<String> {
    let mut rules: Vec<Rule> = Vec::new();
    for find in &heard.finds {
        if !rules.contains(&find.violation.rule) {
            rules.push(find.violation.rule);
        }
    }
    rules.into_iter().map(|rule| rule.name().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use vgpu::oracle::Violation;

    use super::super::listen::tests::mutant;
    use super::*;
    use crate::report::results::tests::sample;

    fn heard(rules: &[Rule]) -> Heard {
        let find = |(n, rule): (usize, &Rule)| Find {
            violation: Violation::new(*rule, "seen"),
            cases: 10 + n as u64,
            seconds: n as f64,
            workload: Some("release".into()),
            last_case: None,
        };
        Heard {
            finds: rules.iter().enumerate().map(find).collect(),
            cases: 99,
            seconds: 50.0,
            failed: vec!["access rights: why".into()],
        }
    }

    fn results(verdict: Verdict, outcome: WorkloadOutcome) -> Results {
        let mut results = sample();
        results.verdict = verdict;
        results.workloads[0].outcome = outcome;
        results
    }

    fn judged(benign: bool, rule: Option<Rule>, also: &[Rule], found: &[Rule], results: &Results) -> Judged {
        judge(benign, &mutant(rule, also), &RunConfig::for_tests(), &heard(found), results)
    }

    #[test]
    fn the_rule_that_was_expected_counts_even_if_it_came_later() {
        let ended = results(Verdict::Violation, WorkloadOutcome::Unfinished);
        let (late, mapped, warn) = (Rule::ReleaseLate, Rule::ReleaseMapped, Rule::KernelWarn);
        let it = judged(false, Some(mapped), &[], &[warn, late, mapped, warn], &ended);
        assert_eq!(
            (it.outcome, it.rule.as_deref(), it.iterations),
            (Outcome::Killed, Some("release/mapped"), 12)
        );
        assert!(it.as_expected);
        assert_eq!(it.rules, ["kernel/warn", "release/late", "release/mapped"]);
        let both = judged(false, Some(mapped), &[late], &[late, mapped], &ended);
        assert_eq!(both.rule.as_deref(), Some("release/mapped"));
        let also = judged(false, Some(mapped), &[late], &[warn, late], &ended);
        assert_eq!((also.rule.as_deref(), also.as_expected), (Some("release/late"), true));
    }

    #[test]
    fn another_rule_kills_and_is_not_what_was_expected() {
        let ended = results(Verdict::Violation, WorkloadOutcome::Pass);
        let it = judged(false, Some(Rule::ReleaseMapped), &[], &[Rule::KernelWarn], &ended);
        assert_eq!(
            (it.outcome, it.as_expected, it.rule.as_deref()),
            (Outcome::Killed, false, Some("kernel/warn"))
        );
        let any = judged(false, None, &[], &[Rule::KernelWarn], &ended);
        assert!(any.as_expected && any.expected.is_none());
    }

    #[test]
    fn nothing_found_is_a_survivor_only_if_all_was_tried() {
        for (outcome, expected) in [
            (WorkloadOutcome::Pass, Outcome::Survived),
            (WorkloadOutcome::Fail, Outcome::Survived),
            (WorkloadOutcome::Unfinished, Outcome::Error),
            (WorkloadOutcome::NotRun, Outcome::Error),
        ] {
            let it =
                judged(false, Some(Rule::ReleaseLate), &[], &[], &results(Verdict::Inconclusive, outcome));
            assert_eq!((it.outcome, it.as_expected, it.iterations), (expected, false, 99));
            assert_eq!(it.detail.as_deref(), Some("access rights: why"));
        }
    }

    #[test]
    fn a_correct_driver_is_clean_or_accused() {
        let clean = judged(true, None, &[], &[], &results(Verdict::Clean, WorkloadOutcome::Pass));
        assert_eq!((clean.outcome, clean.as_expected, clean.detail), (Outcome::Clean, true, None));
        let ended = results(Verdict::Violation, WorkloadOutcome::Pass);
        let accused = judged(true, None, &[], &[Rule::KernelWarn], &ended);
        assert_eq!((accused.outcome, accused.as_expected), (Outcome::Accused, false));
        let unproven = judged(true, None, &[], &[], &results(Verdict::Inconclusive, WorkloadOutcome::Fail));
        assert_eq!((unproven.outcome, unproven.as_expected), (Outcome::Error, false));
    }
}
