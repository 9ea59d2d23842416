// SPDX-License-Identifier: MIT OR Apache-2.0
//! `list`: names of things, with a line about each.

use std::io::Write;

use serde::Serialize;

use super::ListKind;
use crate::failure::{Failure, Result};
use crate::provision::KERNELS;

/// A name and what it is.
#[derive(Debug, Serialize)]
struct Entry {
    name: String,
    about: String,
}

fn entries(kind: ListKind) -> Vec<Entry> {
    let entry = |name: &str, about: &str| Entry { name: name.into(), about: about.into() };
    match kind {
        ListKind::Workloads => guest_protocol::WORKLOADS.iter().map(|w| entry(w.name, w.about)).collect(),
        ListKind::Rules => {
            vgpu::oracle::Rule::ALL.iter().map(|rule| entry(rule.name(), rule.about())).collect()
        }
        ListKind::Kernels => KERNELS.iter().map(|kernel| entry(kernel.name, kernel.about)).collect(),
        ListKind::Scenarios | ListKind::Inject | ListKind::Gates | ListKind::Mutants => Vec::new(),
    }
}

/// Prints the list.
pub fn print(kind: ListKind, json: bool, out: &mut dyn Write) -> Result<()> {
    let entries = entries(kind);
    let written = if json {
        serde_json::to_string(&entries).map_err(std::io::Error::from).and_then(|text| writeln!(out, "{text}"))
    } else {
        let width = entries.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
        entries.iter().try_for_each(|entry| writeln!(out, "{:width$}  {}", entry.name, entry.about))
    };
    if entries.is_empty() {
        let _ = writeln!(std::io::stderr(), "none in this version");
    }
    match written {
        // The reader has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| Failure::environment(format!("cannot write the list: {error}"))),
    }
}
