// SPDX-License-Identifier: MIT OR Apache-2.0
//! `list`: names of things, with a line about each.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::ListKind;
use crate::failure::{Failure, Result};
use crate::gates;
use crate::gates::script::Scenario;
use crate::provision::{KERNELS, mutants};

/// A name and what it is.
#[derive(Debug, Default, Serialize)]
struct Entry {
    name: String,
    about: String,
    /// The rule that must catch it; of mutants only.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    /// Where it is; of mutants only.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
}

impl Entry {
    fn line(&self, width: usize, rules: usize) -> String {
        match &self.rule {
            Some(rule) => format!("{:width$}  {rule:rules$}  {}", self.name, self.about),
            None => format!("{:width$}  {}", self.name, self.about),
        }
    }
}

fn entries(kind: ListKind) -> Result<Vec<Entry>> {
    let entry =
        |name: &str, about: &str| Entry { name: name.into(), about: about.into(), ..Entry::default() };
    Ok(match kind {
        ListKind::Workloads => guest_protocol::WORKLOADS.iter().map(|w| entry(w.name, w.about)).collect(),
        ListKind::Rules => {
            vgpu::oracle::Rule::ALL.iter().map(|rule| entry(rule.name(), rule.about())).collect()
        }
        ListKind::Kernels => KERNELS.iter().map(|kernel| entry(kernel.name, kernel.about)).collect(),
        ListKind::Mutants => mutants::all()?
            .into_iter()
            .map(|mutant| Entry {
                name: mutant.name,
                about: mutant.about,
                rule: mutant.rule.map(|rule| rule.name().to_owned()),
                path: Some(mutant.path),
            })
            .collect(),
        ListKind::Scenarios => {
            gates::all()?.iter().map(|scenario| entry(&scenario.name, &scenario.about)).collect()
        }
        ListKind::Gates => gates_of(&gates::all()?, entry),
        ListKind::Inject => Vec::new(),
    })
}

/// The places at which the testbench's own scenarios hold tasks, and which they are.
fn gates_of(scenarios: &[Scenario], entry: impl Fn(&str, &str) -> Entry) -> Vec<Entry> {
    let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for scenario in scenarios {
        for gate in &scenario.gates {
            places.entry(&gate.at).or_default().push(&scenario.name);
        }
    }
    places.iter().map(|(place, of)| entry(place, &format!("in {}", of.join(", ")))).collect()
}

/// Prints the list.
pub fn print(kind: ListKind, json: bool, out: &mut dyn Write) -> Result<()> {
    let entries = entries(kind)?;
    let written = if json {
        serde_json::to_string(&entries).map_err(std::io::Error::from).and_then(|text| writeln!(out, "{text}"))
    } else {
        let width = entries.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
        let rules = entries.iter().map(|entry| entry.rule.as_ref().map_or(0, String::len)).max().unwrap_or(0);
        entries.iter().try_for_each(|entry| writeln!(out, "{}", entry.line(width, rules)))
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
