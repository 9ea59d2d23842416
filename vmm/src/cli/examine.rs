// SPDX-License-Identifier: MIT OR Apache-2.0
//! `doctor`: what this machine has and lacks, for people or programs.

use std::io::Write;

use crate::doctor::{Doctor, State};
use crate::failure::{Failure, FailureKind, Result};

/// Prints the findings; the exit status is 4 if something is missing.
pub fn print(doctor: &Doctor, json: bool, out: &mut dyn Write) -> Result<u8> {
    let written = if json {
        serde_json::to_string(doctor).map_err(std::io::Error::from).and_then(|text| writeln!(out, "{text}"))
    } else {
        out.write_all(text(doctor).as_bytes())
    };
    match written {
        // The reader has seen enough.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::environment(format!("cannot write: {error}")))
        }
        _ => Ok(if doctor.healthy { 0 } else { FailureKind::Environment.exit_status() }),
    }
}

fn text(doctor: &Doctor) -> String {
    let width = doctor.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in &doctor.checks {
        let state = match check.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Missing => "MISSING",
        };
        text.push_str(&format!("{state:7}  {:width$}  {}\n", check.name, check.found));
        if let Some(remedy) = &check.remedy {
            text.push_str(&format!("{:7}  {:width$}  -> {remedy}\n", "", ""));
        }
    }
    text.push_str(if doctor.healthy { "nothing is missing\n" } else { "something is missing: see above\n" });
    text
}
