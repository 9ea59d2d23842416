// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stage events: everything a run has to say, as values. The terminal, JSON lines and the result file are consumers.

use guest_protocol::Message;
use serde::Serialize;

/// Something happened.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A fact worth one line, such as which accelerator is used and why.
    Note {
        /// The line.
        text: String,
    },
    /// A step began.
    StepStart {
        /// Unique name of the step while it runs, such as `kernel bookworm`.
        step: String,
        /// What it does, for people.
        about: String,
        /// Total amount of work in units, if known.
        total: Option<u64>,
    },
    /// A step got further.
    StepProgress {
        /// Which.
        step: String,
        /// Units done.
        done: u64,
        /// Total, if known by now.
        total: Option<u64>,
        /// What it is at.
        detail: Option<String>,
    },
    /// A step ended.
    StepEnd {
        /// Which.
        step: String,
        /// Seconds it took.
        seconds: f64,
        /// Nothing had to be done: it was there already.
        cached: bool,
        /// Whether it succeeded.
        ok: bool,
    },
    /// A console line of the guest, without its line end.
    Console {
        /// The line.
        line: String,
    },
    /// The guest's agent said something.
    Guest {
        /// What.
        message: Message,
    },
    /// A violation was found.
    Violation {
        /// It.
        violation: vgpu::oracle::Violation,
    },
    /// Something happened in a run inside an outer guest (`--nested`).
    Nested {
        /// What.
        inner: Box<Event>,
    },
}

/// Takes events, from any thread.
pub trait EventSink: Send + Sync {
    /// Takes one.
    fn event(&self, event: Event);
}

impl<F: Fn(Event) + Send + Sync> EventSink for F {
    fn event(&self, event: Event) {
        self(event);
    }
}
