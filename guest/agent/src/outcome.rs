// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a case did not pass, and how errors of the system become that.

use std::fmt;

use guest_protocol::{Mismatch, Reader};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// Why a case did not pass. It crosses process borders as JSON, since many cases run in a child.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub(crate) enum Failure {
    /// Data differs from the model.
    Mismatch(Mismatch, String),
    /// Anything else that must not be.
    Wrong(String),
    /// It cannot be tried here.
    Skip(String),
}

impl Failure {
    /// A failure that has only words.
    pub(crate) fn wrong(what: impl Into<String>) -> Self {
        Self::Wrong(what.into())
    }

    /// The CPU found something else than it should.
    pub(crate) fn cpu(context: u64, address: u64, expected: u64, found: u64) -> Self {
        Self::Mismatch(Mismatch { context, address, expected, found, reader: Reader::Cpu }, String::new())
    }

    /// The device found something else than it should.
    pub(crate) fn device(context: u64, address: u64, expected: u64, found: u64) -> Self {
        Self::Mismatch(Mismatch { context, address, expected, found, reader: Reader::Device }, String::new())
    }

    /// The device reached what it must not have: a mismatch whose two values are the same.
    pub(crate) fn reached(context: u64, address: u64, detail: String) -> Self {
        let mismatch = Mismatch { context, address, expected: 0, found: 0, reader: Reader::Device };
        Self::Mismatch(mismatch, detail)
    }

    /// The device was refused what it has every right to.
    pub(crate) fn refused(context: u64, address: u64, detail: String) -> Self {
        let mismatch = Mismatch { context, address, expected: 0, found: 0, reader: Reader::Refused };
        Self::Mismatch(mismatch, detail)
    }

    /// The context, or what it is to know, has gone before its owner let it go.
    pub(crate) fn ended(context: u64, detail: String) -> Self {
        let mismatch = Mismatch { context, address: 0, expected: 0, found: 0, reader: Reader::Ended };
        Self::Mismatch(mismatch, detail)
    }

    /// The context has gone, and somebody still holds pages that it had.
    pub(crate) fn held(context: u64, address: u64, detail: String) -> Self {
        let mismatch = Mismatch { context, address, expected: 0, found: 0, reader: Reader::Held };
        Self::Mismatch(mismatch, detail)
    }

    /// The same failure, with the step in which it happened.
    pub(crate) fn at(self, step: &str) -> Self {
        let join =
            |detail: String| if detail.is_empty() { step.to_owned() } else { format!("{step}: {detail}") };
        match self {
            Self::Mismatch(mismatch, detail) => Self::Mismatch(mismatch, join(detail)),
            Self::Wrong(detail) => Self::Wrong(join(detail)),
            Self::Skip(detail) => Self::Skip(join(detail)),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mismatch(Mismatch { reader: Reader::Ended, .. }, detail) => out.write_str(detail),
            Self::Mismatch(m, detail) if m.expected == m.found => {
                write!(out, "{detail} (at {:#x})", m.address)
            }
            Self::Mismatch(m, detail) => write!(
                out,
                "{detail}{}the {} found {:#x} at {:#x} instead of {:#x}",
                if detail.is_empty() { "" } else { ": " },
                match m.reader {
                    Reader::Cpu => "CPU",
                    Reader::Device | Reader::Refused | Reader::Ended | Reader::Held => "device",
                },
                m.found,
                m.address,
                m.expected
            ),
            Self::Wrong(detail) | Self::Skip(detail) => out.write_str(detail),
        }
    }
}

/// What a case or a step of it returns.
pub(crate) type Checked<T = ()> = Result<T, Failure>;

/// Says what was being done when an error came.
pub(crate) trait Doing<T> {
    /// Turns an error into a [`Failure`] that begins with `step`.
    fn doing(self, step: &str) -> Checked<T>;
}

impl<T> Doing<T> for Result<T, Errno> {
    fn doing(self, step: &str) -> Checked<T> {
        self.map_err(|errno| Failure::Wrong(format!("{step}: {}", describe(errno))))
    }
}

impl<T> Doing<T> for Checked<T> {
    fn doing(self, step: &str) -> Checked<T> {
        self.map_err(|failure| failure.at(step))
    }
}

/// An error's words and its name.
pub(crate) fn describe(errno: Errno) -> String {
    format!("{} ({errno:?})", errno.desc())
}

/// Fails with `what` unless `holds`.
pub(crate) fn require(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(Failure::Wrong(what())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_errors_read_well() {
        let failed: Result<(), Errno> = Err(Errno::EBUSY);
        let failure = failed.doing("bind").doing("many contexts").unwrap_err();
        assert_eq!(failure.to_string(), "many contexts: bind: Device or resource busy (EBUSY)");
        let failure = Failure::cpu(1, 0x1000, 2, 3).at("copy");
        assert_eq!(failure.to_string(), "copy: the CPU found 0x3 at 0x1000 instead of 0x2");
    }

    #[test]
    fn crosses_a_process_border() {
        let failure = Failure::device(u64::MAX, 8, 1, 2).at("x");
        let json = serde_json::to_string(&failure).unwrap();
        assert_eq!(serde_json::from_str::<Failure>(&json).unwrap(), failure);
    }
}
