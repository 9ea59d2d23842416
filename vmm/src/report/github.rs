// SPDX-License-Identifier: MIT OR Apache-2.0
//! For GitHub Actions: workflow commands that annotate, and a step summary in Markdown.
//!
//! Text that a guest had a hand in must neither end a command's line nor leave its place in a table: see [`data`], [`property`] and
//! [`cell`]. The escapes are those of the runner's own toolkit (actions/toolkit, packages/core/src/command.ts).

use std::fmt::Write;

use super::results::{Results, Verdict, ViolationRecord};

/// Annotations shown; the forge keeps ten of a kind in a step.
const MOST: usize = 10;
/// Events of a violation in the summary.
const MOST_EVENTS: usize = 24;

/// One line for each violation, kernel splats among them, or for what kept the run from a verdict.
#[must_use]
pub fn annotations(results: &Results) -> String {
    let mut text = String::new();
    for violation in results.violations.iter().take(MOST) {
        let _ = writeln!(text, "::error title={}::{}", property(&violation.rule), data(&sentence(violation)));
    }
    if results.violations.len() > MOST {
        let more = results.violations.len() - MOST;
        let _ = writeln!(text, "::error title=more violations::{more} more are in results.json");
    }
    for allowed in results.allowed.iter().take(MOST) {
        let record = &allowed.violation;
        let sentence = format!("{}\nallowed: {}", record.summary, allowed.reason);
        let _ = writeln!(text, "::notice title=allowed {}::{}", property(&record.rule), data(&sentence));
    }
    for unneeded in results.allow_unneeded.iter().take(MOST) {
        let _ = writeln!(text, "::warning title=allow list::{}", data(unneeded));
    }
    let level = match results.verdict {
        Verdict::Clean | Verdict::Violation => None,
        Verdict::Inconclusive => Some("warning"),
        Verdict::Error => Some("error"),
    };
    if let Some(level) = level {
        let reasons = results.reasons.join("\n");
        let _ =
            writeln!(text, "::{level} title=hmm-testbench: {}::{}", results.verdict.name(), data(&reasons));
    }
    text
}

fn sentence(violation: &ViolationRecord) -> String {
    let mut text = violation.summary.clone();
    if let Some(context) = violation.context {
        let _ = write!(text, "; context {context:#x}");
    }
    if let Some(address) = violation.address {
        let _ = write!(text, "; address {address:#x}");
    }
    if let Some(replay) = &violation.replay {
        let _ = write!(text, "\nreplay: {replay}");
    }
    text
}

/// What was run, checked and found.
#[must_use]
pub fn summary(results: &Results) -> String {
    let mut text = String::new();
    let nested = if results.nested { ", nested" } else { "" };
    let accel = results.accel.as_deref().unwrap_or("no accelerator");
    let _ = writeln!(text, "### hmm-testbench: {}\n", results.verdict.name());
    let _ = writeln!(
        text,
        "Kernel {}, machine {} ({}{nested}), {} CPUs, seed {}, {:.1} s\n",
        cell(&results.kernel),
        cell(&results.machine),
        cell(accel),
        results.cpus,
        results.seed,
        results.seconds
    );
    for reason in &results.reasons {
        let _ = writeln!(text, "- {}", cell(reason));
    }
    if !results.workloads.is_empty() {
        let _ =
            writeln!(text, "\n| workload | outcome | cases | failed | seconds |\n|---|---|---:|---:|---:|");
        for w in &results.workloads {
            let (name, outcome) = (cell(&w.name), w.outcome.name());
            let _ = writeln!(text, "| {name} | {outcome} | {} | {} | {:.1} |", w.cases, w.failed, w.seconds);
        }
    }
    let c = &results.counters;
    let _ = writeln!(text, "\n| checked | |\n|---|---:|");
    for (what, count) in [
        ("device accesses", c.accesses),
        ("distinct pages", c.distinct_pages),
        ("invalidations of mapped ranges", c.invalidations),
        ("device page faults", c.faults),
        ("contexts bound", c.contexts),
        ("address spaces", c.address_spaces),
        ("witness probes missed", c.probes_missed),
    ] {
        let _ = writeln!(text, "| {what} | {count} |");
    }
    for allowed in results.allowed.iter().take(MOST) {
        let record = &allowed.violation;
        let (rule, summary, reason) = (cell(&record.rule), cell(&record.summary), cell(&allowed.reason));
        let _ = writeln!(text, "\n- allowed {rule}: {summary} ({reason})");
    }
    for unneeded in results.allow_unneeded.iter().take(MOST) {
        let _ = writeln!(text, "- {}", cell(unneeded));
    }
    for violation in results.violations.iter().take(MOST) {
        let _ = writeln!(text, "\n#### {}\n\n{}\n", cell(&violation.rule), cell(&sentence(violation)));
        if !violation.events.is_empty() {
            let _ = writeln!(text, "<details><summary>last events</summary>\n");
            for event in violation.events.iter().take(MOST_EVENTS) {
                // Indented by four: code, whatever is in it.
                let _ = writeln!(text, "    {}", event.replace(['\r', '\n'], " "));
            }
            let _ = writeln!(text, "\n</details>");
        }
    }
    text.push('\n');
    text
}

/// The text of a workflow command.
fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// A property of a workflow command.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// Text inside a line or a table of Markdown: nothing in it is markup.
fn cell(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '\r' | '\n' => safe.push_str("<br>"),
            '|' | '`' | '*' | '_' | '[' | ']' | '\\' | '#' | '~' | '!' => {
                safe.push('\\');
                safe.push(letter);
            }
            letter => safe.push(letter),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::tests::sample;

    #[test]
    fn hostile_text_stays_in_its_place() {
        let mut results = sample();
        results.violations[0].rule = "kernel/oops,file=x::y".into();
        results.violations[0].summary = "100% bad\n::error::forged\r\n| <b>".into();
        results.violations[0].events = vec!["a\n\n# heading".into()];
        let annotations = annotations(&results);
        // The violation, what is allowed, and what was allowed in vain.
        assert_eq!(annotations.lines().count(), 3, "{annotations}");
        assert!(
            annotations.starts_with("::error title=kernel/oops%2Cfile=x%3A%3Ay::100%25 bad%0A"),
            "{annotations}"
        );
        let summary = summary(&results);
        assert!(!summary.contains("<b>") && summary.contains("\\| &lt;b&gt;"), "{summary}");
        assert!(summary.lines().all(|line| !line.starts_with("::") && line != "# heading"), "{summary}");
    }

    #[test]
    fn many_violations_are_counted() {
        let mut results = sample();
        results.violations = vec![results.violations[0].clone(); MOST + 7];
        let text = annotations(&results);
        assert_eq!(text.matches("::error title=release/late").count(), MOST);
        assert!(text.contains("7 more are in results.json"), "{text}");
    }

    #[test]
    fn a_run_without_a_verdict_is_a_warning_or_an_error() {
        let mut results = sample();
        results.violations.clear();
        results.allowed.clear();
        results.allow_unneeded.clear();
        results.reasons = vec!["guest died".into()];
        results.verdict = Verdict::Inconclusive;
        assert_eq!(annotations(&results), "::warning title=hmm-testbench: inconclusive::guest died\n");
        results.verdict = Verdict::Error;
        assert!(annotations(&results).starts_with("::error "));
        results.verdict = Verdict::Clean;
        assert_eq!(annotations(&results), "");
        assert!(summary(&results).contains("| device accesses | 1 |"));
    }
}
