// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table, or a JSON object a line.

use std::io::{self, IsTerminal, Write};

use super::judge::{Judged, Outcome};
use crate::cli::mutants::MutantsArgs;
use crate::provision::mutants::Mutant;
use crate::report::human::{Human, Tone};

/// Longest detail that a line of the table shows.
const DETAIL: usize = 160;

/// Prints what came of each as it comes, and a sum at the end.
pub(super) struct Report {
    json: bool,
    benign: bool,
    seeds: u64,
    width: usize,
    human: Human,
    judged: Vec<Judged>,
}

impl Report {
    /// Nothing was tried yet.
    #[must_use]
    pub(super) fn new(args: &MutantsArgs, chosen: &[Mutant]) -> Self {
        Self {
            json: args.json,
            benign: args.benign,
            seeds: args.seeds,
            width: chosen.iter().map(|mutant| mutant.name.len()).max().unwrap_or(0).max(6),
            human: Human::new(),
            judged: Vec::new(),
        }
    }

    /// The head of the table.
    pub(super) fn begin(&self) {
        if !self.json {
            let width = self.width;
            line(&format!("{:9}  {:width$}  {:>20}  {:24}  cases  seconds", "", "driver", "seed", "rule"));
        }
    }

    /// One came to its end.
    pub(super) fn add(&mut self, judged: Judged) {
        if self.json {
            // A value of plain fields: nothing in it can fail.
            line(&serde_json::to_string(&judged).unwrap_or_default());
        } else {
            line(&self.row(&judged));
        }
        self.judged.push(judged);
    }

    /// Whether all are as they should be.
    #[must_use]
    pub(super) fn as_it_should_be(&self) -> bool {
        self.judged.iter().all(|judged| judged.as_expected)
    }

    /// The sum, and with several seeds a row for each driver.
    pub(super) fn end(&self) {
        if self.json {
            return;
        }
        if self.seeds > 1 {
            line("");
            each(&self.judged).iter().for_each(|driver| line(&summed(driver, self.width)));
        }
        line("");
        line(&sum(&self.judged, self.benign));
    }

    fn row(&self, judged: &Judged) -> String {
        let width = self.width;
        let tone = match (judged.outcome, judged.as_expected) {
            (Outcome::Skipped, _) => Tone::Quiet,
            (_, true) => Tone::Good,
            (Outcome::Killed, false) => Tone::Doubtful,
            _ => Tone::Bad,
        };
        let outcome = self.human.paint(tone, &format!("{:9}", judged.outcome.name()));
        let mut row = format!(
            "{outcome}  {:width$}  {:20}  {:24}  {:5}  {:7.1}",
            judged.mutant,
            judged.seed,
            judged.rule.as_deref().unwrap_or("-"),
            judged.iterations,
            judged.seconds,
        );
        if let (Outcome::Killed, false, Some(expected)) =
            (judged.outcome, judged.as_expected, &judged.expected)
        {
            row.push_str(&format!("  not {expected}"));
        }
        let more = match judged.outcome {
            Outcome::Accused => judged.summary.as_deref(),
            _ => judged.detail.as_deref(),
        };
        if let Some(more) = more {
            let more: String = more.lines().next().unwrap_or_default().chars().take(DETAIL).collect();
            row.push_str(&format!("  ({more})"));
        }
        row
    }
}

/// The trials of each driver, which follow each other.
fn each(judged: &[Judged]) -> Vec<&[Judged]> {
    judged.chunk_by(|a, b| a.mutant == b.mutant).collect()
}

/// A driver's seeds in one row.
fn summed(trials: &[Judged], width: usize) -> String {
    let good = trials.iter().filter(|judged| judged.as_expected).count();
    let mut rules: Vec<&str> = trials.iter().filter_map(|judged| judged.rule.as_deref()).collect();
    rules.sort_unstable();
    rules.dedup();
    let most = trials.iter().map(|judged| judged.seconds).fold(0.0, f64::max);
    let name = trials.first().map_or("", |judged| judged.mutant.as_str());
    format!("{good:2} of {:2}  {name:width$}  {}  {most:.1} s at the most", trials.len(), rules.join(", "))
}

/// One line about all.
fn sum(judged: &[Judged], benign: bool) -> String {
    let tried = judged.iter().filter(|judged| judged.outcome != Outcome::Skipped).count();
    let count = |outcome| judged.iter().filter(|judged| judged.outcome == outcome).count();
    let good =
        judged.iter().filter(|judged| judged.as_expected && judged.outcome != Outcome::Skipped).count();
    let mut text = if benign {
        format!("{good} of {tried} clean, {} accused", count(Outcome::Accused))
    } else {
        let killed = count(Outcome::Killed);
        format!(
            "{killed} of {tried} killed, {good} by the rule expected; {} survived",
            count(Outcome::Survived)
        )
    };
    for (outcome, name) in [(Outcome::Error, "could not be tried"), (Outcome::Skipped, "skipped")] {
        if count(outcome) > 0 {
            text.push_str(&format!(", {} {name}", count(outcome)));
        }
    }
    text
}

fn line(text: &str) {
    let mut out = io::stdout().lock();
    // Nobody reads any more: it goes on for its exit status.
    let _ = writeln!(out, "{text}");
    if !io::stdout().is_terminal() {
        let _ = out.flush();
    }
}

#[cfg(test)]
mod tests {
    use vgpu::oracle::Rule;

    use super::super::listen::tests::mutant;
    use super::*;
    use crate::runner::RunConfig;

    fn judged(name: &str, outcome: Outcome, as_expected: bool, rule: Option<&str>) -> Judged {
        let mut mutant = mutant(Some(Rule::ReleaseLate), &[]);
        mutant.name = name.into();
        let mut judged = Judged::untried(&mutant, &RunConfig::for_tests(), outcome, "because\nof it".into());
        judged.as_expected = as_expected;
        judged.rule = rule.map(str::to_owned);
        judged.seconds = 2.5;
        judged
    }

    fn report(judged: Vec<Judged>) -> Report {
        Report { json: false, benign: false, seeds: 2, width: 8, human: Human::new(), judged }
    }

    #[test]
    fn rows_say_what_is_not_as_it_should_be() {
        let report = report(Vec::new());
        let row = report.row(&judged("a", Outcome::Killed, false, Some("kernel/warn")));
        assert!(
            row.contains("killed") && row.contains("kernel/warn") && row.contains("not release/late"),
            "{row}"
        );
        let row = report.row(&judged("a", Outcome::Survived, false, None));
        assert!(row.contains("survived") && row.contains("(because)"), "{row}");
        let row = report.row(&judged("a", Outcome::Killed, true, Some("release/late")));
        assert!(!row.contains("not "), "{row}");
    }

    #[test]
    fn the_sum_counts_and_the_status_follows() {
        let all = vec![
            judged("a", Outcome::Killed, true, Some("release/late")),
            judged("a", Outcome::Killed, false, Some("kernel/warn")),
            judged("b", Outcome::Survived, false, None),
            judged("c", Outcome::Skipped, true, None),
            judged("d", Outcome::Error, false, None),
        ];
        assert_eq!(
            sum(&all, false),
            "2 of 4 killed, 1 by the rule expected; 1 survived, 1 could not be tried, 1 skipped"
        );
        assert_eq!(each(&all).len(), 4);
        let row = summed(each(&all)[0], 4);
        assert!(row.starts_with(" 1 of  2  a     kernel/warn, release/late"), "{row}");
        assert!(!report(all.clone()).as_it_should_be());
        assert!(report(vec![all[0].clone(), all[3].clone()]).as_it_should_be());
    }

    #[test]
    fn json_has_the_fields_that_scripts_read() {
        let value = serde_json::to_value(judged("a", Outcome::Killed, true, Some("release/late"))).unwrap();
        for field in
            ["mutant", "outcome", "rule", "expected", "iterations", "seconds", "seed", "kernel", "replay"]
        {
            assert!(value.get(field).is_some(), "{field}");
        }
        assert_eq!(
            (value["outcome"].as_str(), value["expected"].as_str()),
            (Some("killed"), Some("release/late"))
        );
    }
}
