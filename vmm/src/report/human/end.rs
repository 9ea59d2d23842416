// SPDX-License-Identifier: MIT OR Apache-2.0
//! The end of a run, for people: workloads, what was checked, what was found, the verdict.

use std::fmt::Write;

use super::Tone;
use crate::report::results::{Results, Verdict, ViolationRecord, WorkloadOutcome};

/// Violations shown in full; results.json has all.
const MAX_SHOWN: usize = 5;
/// Events shown of each.
const MAX_EVENTS: usize = 24;
/// Lines shown of what the kernel printed: the stacks of two tasks belong together.
const MAX_LINES: usize = 100;

type Paint<'a> = &'a dyn Fn(Tone, &str) -> String;

/// The text.
pub(super) fn text(results: &Results, paint: Paint<'_>) -> String {
    let mut text = String::new();
    workloads(&mut text, results, paint);
    checked(&mut text, results);
    for complaint in &results.boot_complaints {
        let _ = writeln!(text, "before the driver was loaded, and so not its doing: {complaint}");
    }
    for note in &results.notes {
        let _ = writeln!(text, "note: {note}");
    }
    allowed(&mut text, results, paint);
    text.push_str(&violations(&results.violations, paint));
    if !results.console_tail.is_empty() {
        let _ = writeln!(text, "\nlast console lines:");
        for line in &results.console_tail {
            let _ = writeln!(text, "| {line}");
        }
    }
    // Why a run could not be made is said on standard error, with what to do about it.
    let reasons = if results.error.is_none() { results.reasons.as_slice() } else { &[] };
    text.push_str(&verdict(results.verdict, reasons, paint));
    text
}

fn allowed(text: &mut String, results: &Results, paint: Paint<'_>) {
    if !results.allowed.is_empty() {
        let _ = writeln!(text, "\n{}", paint(Tone::Doubtful, "allowed"));
    }
    for allowed in results.allowed.iter().take(MAX_SHOWN) {
        let record = &allowed.violation;
        let times = if record.count > 1 { format!(", {} times", record.count) } else { String::new() };
        let _ =
            writeln!(text, "  {}{times}: {}\n    because: {}", record.rule, record.summary, allowed.reason);
    }
    if results.allowed.len() > MAX_SHOWN {
        let _ = writeln!(text, "  {} more; --out DIR keeps all", results.allowed.len() - MAX_SHOWN);
    }
    for unneeded in &results.allow_unneeded {
        let _ = writeln!(text, "{}: {unneeded}", paint(Tone::Doubtful, "warning"));
    }
}

/// What was found, the first ones in full.
pub(super) fn violations(violations: &[ViolationRecord], paint: Paint<'_>) -> String {
    let mut text = String::new();
    for (index, violation) in violations.iter().take(MAX_SHOWN).enumerate() {
        show(&mut text, index + 1, violations.len(), violation, paint);
    }
    if violations.len() > MAX_SHOWN {
        let _ = writeln!(text, "\n{} more violations; --out DIR keeps all", violations.len() - MAX_SHOWN);
    }
    text
}

/// The verdict, and why.
pub(super) fn verdict(verdict: Verdict, reasons: &[String], paint: Paint<'_>) -> String {
    let mut text = String::new();
    let tone = match verdict {
        Verdict::Clean => Tone::Good,
        Verdict::Violation => Tone::Bad,
        Verdict::Inconclusive | Verdict::Error => Tone::Doubtful,
    };
    let _ = writeln!(text, "\n{}", paint(tone, &format!("verdict: {}", verdict.name())));
    for reason in reasons {
        let _ = writeln!(text, "  {reason}");
    }
    text
}

fn workloads(text: &mut String, results: &Results, paint: Paint<'_>) {
    // A run that was not made has no workloads to speak of.
    let error = results.error.is_some() && results.counters.accesses == 0;
    if results.workloads.is_empty() || error {
        return;
    }
    let width = results.workloads.iter().map(|w| w.name.len()).max().unwrap_or(0).max("workload".len());
    let head =
        format!("{:width$}  {:10}  {:>7}  {:>7}  {:>7}", "workload", "outcome", "cases", "failed", "seconds");
    let _ = writeln!(text, "\n{}", paint(Tone::Strong, &head));
    for workload in &results.workloads {
        let tone = match workload.outcome {
            WorkloadOutcome::Pass => Tone::Good,
            WorkloadOutcome::Fail => Tone::Bad,
            WorkloadOutcome::Skip | WorkloadOutcome::Unfinished | WorkloadOutcome::NotRun => Tone::Doubtful,
        };
        let outcome = paint(tone, &format!("{:10}", workload.outcome.name()));
        let detail = workload.detail.as_deref().map(|detail| format!("  {detail}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "{:width$}  {outcome}  {:>7}  {:>7}  {:>7.1}{detail}",
            workload.name, workload.cases, workload.failed, workload.seconds
        );
    }
    for workload in results.workloads.iter().filter(|workload| !workload.movers.is_empty()) {
        let movers: Vec<_> =
            workload.movers.iter().map(|(name, rounds)| format!("{name} {rounds}")).collect();
        let _ =
            writeln!(text, "movers at work in {}, in so many rounds: {}", workload.name, movers.join(", "));
    }
}

fn checked(text: &mut String, results: &Results) {
    let c = &results.counters;
    if results.error.is_some() && c.accesses == 0 {
        return;
    }
    let oracle =
        if results.oracle { "" } else { " (the oracle was off: only data, console and hangs were judged)" };
    let _ = writeln!(text, "\nchecked{oracle}");
    let rows = [
        (
            c.accesses,
            format!(
                "device accesses over {} distinct pages ({} TLB misses, {} walks)",
                group(c.distinct_pages),
                group(c.tlb_misses),
                group(c.walks)
            ),
        ),
        (c.invalidations, "invalidations of ranges the device had mapped".to_owned()),
        (c.ranges_judged, "invalidations judged when their start had returned".to_owned()),
        (c.steps_compared, "steps and leaves held against the CPU's page tables".to_owned()),
        (c.faults, "device page faults".to_owned()),
        (c.contexts, format!("contexts bound, {} unregistered", group(c.unregisters))),
        (c.address_spaces, format!("address spaces mirrored, {} released", group(c.releases))),
        (c.probes_missed, format!("witness probes missed, over {} heartbeats", group(c.heartbeats))),
    ];
    let width = rows.iter().map(|(n, _)| group(*n).len()).max().unwrap_or(0);
    for (number, what) in rows {
        let _ = writeln!(text, "  {:>width$}  {what}", group(number));
    }
    let _ = writeln!(
        text,
        "seed {}, {} CPU{}, machine {} ({}), kernel {}, {:.1} s",
        results.seed,
        results.cpus,
        if results.cpus == 1 { "" } else { "s" },
        results.machine,
        results.accel.as_deref().unwrap_or("no accelerator"),
        results.kernel,
        results.seconds
    );
}

fn show(text: &mut String, number: usize, of: usize, violation: &ViolationRecord, paint: Paint<'_>) {
    let head = format!("violation {number} of {of}: {}", violation.rule);
    let _ = writeln!(text, "\n{}", paint(Tone::Bad, &head));
    let _ = writeln!(text, "  {}", violation.summary);
    let mut row = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = writeln!(text, "  {name:9}{value}");
        }
    };
    let context = violation.context.map(|handle| match &violation.context_name {
        Some(name) => format!("{name} ({handle:#x})"),
        None => format!("{handle:#x}"),
    });
    row("context", context);
    row("address", violation.address.map(|address| format!("{address:#x}")));
    row("frame", violation.frame.map(|frame| format!("{frame:#x}")));
    row("workload", violation.workload.clone());
    row("seen", (violation.count > 1).then(|| format!("{} times", violation.count)));
    if !violation.events.is_empty() {
        let printed = violation.rule.starts_with("hang/") || violation.rule.starts_with("kernel/");
        let (head, max) =
            if printed { ("the kernel printed", MAX_LINES) } else { ("last events", MAX_EVENTS) };
        let _ = writeln!(text, "  {head}:");
        // Of a console block the beginning tells most, of the device's events the end; both are short enough as a rule.
        for line in violation.events.iter().take(max) {
            let _ = writeln!(text, "    {line}");
        }
        if violation.events.len() > max {
            let _ = writeln!(text, "    ({} more in results.json)", violation.events.len() - max);
        }
    }
    if let Some(replay) = &violation.replay {
        let _ = writeln!(text, "  replay:  {replay}");
    }
}

/// 1234567 as `1,234,567`.
fn group(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::tests::sample;

    #[test]
    fn the_end_says_it_all() {
        let text = text(&sample(), &|_, text| text.to_owned());
        for part in [
            "because: exit's UNMAP does it",
            "warning: a.toml:9",
            "release   not-run",
            "not run: guest died",
            "violation 1 of 1: release/late",
            "0x7f0000001000",
            "replay:  replay",
            "last console lines:",
            "verdict: violation",
            "seed 18446744073709551615",
        ] {
            let found = text.contains(part);
            assert!(found, "{part} is not in:\n{text}");
        }
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(group(0), "0");
        assert_eq!(group(999), "999");
        assert_eq!(group(1000), "1,000");
        assert_eq!(group(1_234_567), "1,234,567");
    }
}
