// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a command could not do what was asked, and the exit status that goes with it.

use std::fmt;

/// A failure with the exit status that scripts rely on.
#[derive(Debug)]
pub struct Failure {
    /// Which kind it is.
    pub kind: FailureKind,
    /// What was wrong and where, in one line.
    pub what: String,
    /// What the user can do about it, if anything.
    pub remedy: Option<String>,
    /// The last console lines, where a guest was running.
    pub console_tail: Vec<String>,
}

/// What kind of failure, and so the exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The command line or an input file is wrong (status 2).
    Usage,
    /// The guest was lost or gave no evidence (status 3).
    Inconclusive,
    /// The environment lacks something (status 4).
    Environment,
}

impl FailureKind {
    /// The process's exit status.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Inconclusive => 3,
            Self::Environment => 4,
        }
    }
}

impl Failure {
    /// A wrong command line or input file.
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(FailureKind::Usage, what)
    }
    /// A run that proves nothing.
    pub fn inconclusive(what: impl Into<String>) -> Self {
        Self::new(FailureKind::Inconclusive, what)
    }
    /// Something missing on this machine.
    pub fn environment(what: impl Into<String>) -> Self {
        Self::new(FailureKind::Environment, what)
    }
    /// Adds what the user can do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
    fn new(kind: FailureKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), remedy: None, console_tail: Vec::new() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(remedy) = &self.remedy {
            write!(f, "\n  {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Shorthand for what may fail so.
pub type Result<T, E = Failure> = std::result::Result<T, E>;
