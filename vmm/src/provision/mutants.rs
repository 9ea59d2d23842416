// SPDX-License-Identifier: MIT OR Apache-2.0
//! The broken drivers in guest/mutants: patches, each with a head that says what it does and which rule must catch it.

use std::path::{Path, PathBuf};

use vgpu::oracle::Rule;

use super::source_tree;
use crate::failure::{Failure, Result};

/// A broken driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// The patch's name without `.patch`.
    pub name: String,
    /// What it does, one line.
    pub about: String,
    /// The rule that must catch it.
    pub rule: Rule,
    /// The patch, for `--patch`.
    pub path: PathBuf,
}

/// Every mutant of the source tree, by name.
///
/// # Errors
/// Usage if there is no source tree, or a patch in it has no head that can be read.
pub fn all() -> Result<Vec<Mutant>> {
    let folder = source_tree()?.join("guest/mutants");
    let trouble =
        |error: std::io::Error| Failure::usage(format!("cannot read {}: {error}", folder.display()));
    let mut mutants = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(trouble)? {
        let path = entry.map_err(trouble)?.path();
        if path.extension().is_some_and(|end| end == "patch") {
            let text = std::fs::read_to_string(&path).map_err(trouble)?;
            mutants.push(read(path, &text)?);
        }
    }
    mutants.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(mutants)
}

/// Reads a patch's head: its first line, and a line `Rule: NAME` before the patch begins.
fn read(path: PathBuf, text: &str) -> Result<Mutant> {
    let lacks = |what: &str| Failure::usage(format!("{}: its head has no {what}", path.display()));
    let head = || text.lines().take_while(|line| !line.starts_with("--- "));
    let about = head().next().map(str::trim).filter(|line| !line.is_empty());
    let rule = head().find_map(|line| Rule::from_name(line.strip_prefix("Rule:")?.trim()));
    Ok(Mutant {
        name: path.file_stem().unwrap_or(Path::new("").as_os_str()).to_string_lossy().into_owned(),
        about: about.ok_or_else(|| lacks("first line that says what it does"))?.to_owned(),
        rule: rule.ok_or_else(|| lacks("line `Rule: NAME` with the name of a rule"))?,
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read() {
        let text = "Do it twice.\n\nRule: release/twice\nModels: x\n\n--- a/x.c\nRule: release/late\n";
        let mutant = read("/x/do-it.patch".into(), text).unwrap();
        assert_eq!((mutant.name.as_str(), mutant.about.as_str()), ("do-it", "Do it twice."));
        assert_eq!(mutant.rule, Rule::ReleaseTwice);
        for text in ["", "--- a/x.c\nRule: release/late", "About.\nRule: nonsense\n--- a/x.c"] {
            assert_eq!(read("/x/do-it.patch".into(), text).unwrap_err().kind.exit_status(), 2);
        }
    }

    #[test]
    fn the_trees_own_can_be_read() {
        let mutants = all().unwrap();
        assert!(mutants.iter().any(|mutant| mutant.rule == Rule::HangDeadlock));
    }
}
