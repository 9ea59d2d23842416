// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest says, made fit to be shown and stored: it ends up on terminals, in XML and in tables.

use guest_protocol::{Case, Message};
use vgpu::oracle::Violation;

use super::story::is_mover;
use crate::machine::MachineExit;
use crate::report::results::Results;

/// Longest name or sentence kept, in characters.
const MAX_TEXT: usize = 8192;
/// Most events of a violation that are kept, many more than the oracle tells.
const MAX_EVENTS: usize = 4096;
/// Most lines of a machine's last words: registers of eight processors, seven lines each.
const MAX_LAST_WORDS: usize = 100;
/// Longest time that a guest can have measured, in seconds: thirty years.
const MAX_SECONDS: f64 = 1e9;

/// Takes out of a message what could mislead its readers: control characters, endless texts, numbers that are none.
pub(crate) fn tame(message: &mut Message) {
    match message {
        Message::Booted { kernel: text, .. }
        | Message::ModuleLoaded { module: text }
        | Message::ModuleText { module: text, .. }
        | Message::WorkloadStart { workload: text, .. }
        | Message::Progress { workload: text, .. }
        | Message::Fatal { reason: text } => tame_text(text),
        Message::Case(Case { workload, case, seconds, detail, .. }) => {
            tame_text(workload);
            tame_text(case);
            if let Some(detail) = detail {
                tame_text(detail);
            }
            tame_seconds(seconds);
        }
        Message::WorkloadEnd { workload, seconds, .. } => {
            tame_text(workload);
            tame_seconds(seconds);
        }
        Message::Metric { name, unit, .. } => {
            tame_text(name);
            tame_text(unit);
        }
        Message::Ask { .. } | Message::ExecEnd { .. } | Message::Done => {}
    }
}

/// The same for a violation that another testbench, in an outer guest, reports.
pub(crate) fn tame_violation(violation: &mut Violation) {
    tame_text(&mut violation.summary);
    violation.events.truncate(MAX_EVENTS);
    // The room of those that are not kept was theirs to choose.
    violation.events.shrink_to_fit();
    let others = [&mut violation.context_name, &mut violation.replay, &mut violation.allowed];
    others.into_iter().flatten().chain(&mut violation.events).for_each(tame_text);
}

/// And for its results.
pub(crate) fn tame_results(results: &mut Results) {
    results.allow_unneeded.iter_mut().for_each(tame_text);
    results.allowed.iter_mut().for_each(|allowed| tame_text(&mut allowed.reason));
    let allowed = results.allowed.iter_mut().map(|allowed| &mut allowed.violation);
    for violation in results.violations.iter_mut().chain(allowed) {
        tame_text(&mut violation.rule);
        tame_text(&mut violation.summary);
        let others = [&mut violation.context_name, &mut violation.workload, &mut violation.replay];
        others.into_iter().flatten().chain(&mut violation.events).for_each(tame_text);
    }
    for workload in &mut results.workloads {
        tame_text(&mut workload.name);
        workload.detail.iter_mut().for_each(tame_text);
        workload.movers.retain(|name, _| is_mover(name));
        tame_seconds(&mut workload.seconds);
    }
    if let Some(scenario) = &mut results.scenario {
        let lines = scenario.story.iter_mut().flat_map(|line| [&mut line.who, &mut line.what]);
        lines.chain([&mut scenario.name]).chain(&mut scenario.order).for_each(tame_text);
    }
    if let Some(error) = &mut results.error {
        tame_text(&mut error.message);
        error.remedy.iter_mut().for_each(tame_text);
    }
    let lists =
        [&mut results.reasons, &mut results.boot_complaints, &mut results.notes, &mut results.console_tail];
    lists.into_iter().flatten().chain(&mut results.machine_version).for_each(tame_text);
    tame_text(&mut results.kernel);
}

/// And for how a machine that it carried ended: a line, and some lines of last words.
pub(crate) fn tame_exit(exit: &mut MachineExit) {
    if let MachineExit::Died { status, stderr_tail } = exit {
        tame_text(status);
        let lines: Vec<_> =
            stderr_tail.lines().take(MAX_LAST_WORDS).map(|line| printable(line, MAX_TEXT)).collect();
        *stderr_tail = lines.join("\n");
    }
}

/// The text without control characters, at most `most` characters of it.
pub(crate) fn printable(text: &str, most: usize) -> String {
    text.chars().take(most).map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

/// The same for one text.
pub(crate) fn tame_text(text: &mut String) {
    if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
        *text = printable(text, MAX_TEXT);
    }
}

fn tame_seconds(seconds: &mut f64) {
    *seconds = if seconds.is_finite() { seconds.clamp(0.0, MAX_SECONDS) } else { 0.0 };
}

#[cfg(test)]
mod tests {
    use guest_protocol::Outcome;

    use super::*;
    use crate::gates::engine::{Line, ScenarioResult};

    #[test]
    fn results_of_another_testbench_are_tamed_too() {
        let mut results = crate::report::results::tests::sample();
        let bad = "\u{1b}[2J".to_owned();
        results.reasons.push(bad.clone());
        results.console_tail.push(bad.clone());
        results.violations[0].events.push(bad.clone());
        results.violations[0].summary.clone_from(&bad);
        results.workloads[0].name.clone_from(&bad);
        results.workloads[0].seconds = f64::MAX;
        results.workloads[0].movers.insert(bad.clone(), 1);
        let line = Line { beat: 1, who: bad.clone(), what: bad.clone() };
        results.scenario =
            Some(ScenarioResult { order: Some(bad.clone()), story: vec![line], ..Default::default() });
        tame_results(&mut results);
        let text = serde_json::to_string(&results).unwrap();
        assert!(!text.contains("u001b"), "{text}");
        assert_eq!(results.workloads[0].seconds, MAX_SECONDS);
        let mut violation = Violation::new(vgpu::oracle::Rule::ReleaseLate, bad.clone());
        violation.events.push(bad);
        tame_violation(&mut violation);
        assert_eq!((violation.summary.as_str(), violation.events[0].as_str()), (" [2J", " [2J"));
        violation.events = vec![String::new(); 100_000];
        tame_violation(&mut violation);
        assert_eq!(violation.events.len(), MAX_EVENTS);
    }

    #[test]
    fn a_carried_machines_last_words_are_lines_of_text() {
        let bad = "\u{1b}[2Jbad";
        let mut exit =
            MachineExit::Died { status: bad.into(), stderr_tail: format!("{bad}\nRIP\n").repeat(1000) };
        tame_exit(&mut exit);
        let MachineExit::Died { status, stderr_tail } = exit else { panic!() };
        assert_eq!(status, " [2Jbad");
        assert_eq!(stderr_tail.lines().take(2).collect::<Vec<_>>(), [" [2Jbad", "RIP"]);
        assert_eq!(stderr_tail.lines().count(), MAX_LAST_WORDS);
    }

    #[test]
    fn nothing_of_it_can_mislead() {
        let mut message = Message::Case(Case {
            workload: "access\r\n".into(),
            case: "\u{1b}[2Jverdict: clean".into(),
            seed: 1,
            iteration: 1,
            outcome: Outcome::Fail,
            seconds: 1e300,
            detail: Some("x".repeat(100_000)),
            mismatch: None,
        });
        tame(&mut message);
        let Message::Case(case) = message else { panic!() };
        assert_eq!((case.workload.as_str(), case.case.as_str()), ("access  ", " [2Jverdict: clean"));
        assert_eq!(case.detail.map(|text| text.len()), Some(MAX_TEXT));
        assert_eq!(case.seconds, MAX_SECONDS);
        let mut end = Message::WorkloadEnd {
            workload: String::new(),
            outcome: Outcome::Pass,
            seconds: -1.0,
            cases: u64::MAX,
            failed: u64::MAX,
        };
        tame(&mut end);
        assert!(matches!(end, Message::WorkloadEnd { seconds, .. } if seconds == 0.0));
    }
}
