// SPDX-License-Identifier: MIT OR Apache-2.0
//! One JSON object a line on standard output: every stage event, then `{"event":"results",...}`.

use std::io::{self, Write};

use serde::Serialize;

use super::Reporter;
use super::results::Results;
use crate::event::{Event, EventSink};
use crate::failure::Failure;

/// Prints JSON lines.
#[derive(Debug, Default)]
pub struct Jsonl;

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Last<'a> {
    Results { results: &'a Results },
    Failure { exit_status: u8, message: &'a str, remedy: Option<&'a str>, console_tail: &'a [String] },
}

/// An event of a nested run: the same object with one more field.
#[derive(Serialize)]
struct Marked<'a> {
    nested: bool,
    #[serde(flatten)]
    event: &'a Event,
}

fn print(value: &impl Serialize) {
    let Ok(mut line) = serde_json::to_vec(value) else { return };
    line.push(b'\n');
    // Nobody reads any more: the run goes on for its exit status.
    let _ = io::stdout().lock().write_all(&line);
}

impl EventSink for Jsonl {
    fn event(&self, event: Event) {
        match &event {
            Event::Nested { inner } => print(&Marked { nested: true, event: inner }),
            plain => print(plain),
        }
    }
}

impl Reporter for Jsonl {
    fn results(&self, results: &Results) {
        print(&Last::Results { results });
    }
    fn failure(&self, failure: &Failure) {
        print(&Last::Failure {
            exit_status: failure.kind.exit_status(),
            message: &failure.what,
            remedy: failure.remedy.as_deref(),
            console_tail: &failure.console_tail,
        });
    }
}
