// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest says, made fit to be shown and stored: it ends up on terminals, in XML and in tables.

use guest_protocol::{Case, Message};

/// Longest name or sentence kept, in characters.
const MAX_TEXT: usize = 8192;
/// Longest time that a guest can have measured, in seconds: thirty years.
const MAX_SECONDS: f64 = 1e9;

/// Takes out of a message what could mislead its readers: control characters, endless texts, numbers that are none.
pub(super) fn tame(message: &mut Message) {
    match message {
        Message::Booted { kernel: text, .. }
        | Message::ModuleLoaded { module: text }
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
        Message::ExecEnd { .. } | Message::Done => {}
    }
}

/// The text without control characters, at most `most` characters of it.
pub(super) fn printable(text: &str, most: usize) -> String {
    text.chars().take(most).map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn tame_text(text: &mut String) {
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
