// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drivers as patches: the broken ones of guest/mutants, the correct ones of guest/benign, and other people's. A head before the
//! patch says what it does and what must come of it.

use std::path::{Path, PathBuf};

use vgpu::oracle::Rule;

use super::source_tree;
use crate::failure::{Failure, Result};

/// Longest patch that is read.
const MOST: u64 = 16 << 20;

/// A driver as a patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// The patch's name without `.patch`.
    pub name: String,
    /// What it does, one line; empty if its head does not say.
    pub about: String,
    /// The rule that must catch it (`Rule:`); none for a correct driver, and where the head does not say.
    pub rule: Option<Rule>,
    /// Rules that may catch it as well or first (`Also:`): the same fault seen a little earlier or later.
    pub also: Vec<Rule>,
    /// What of the kernel it needs to be compiled (`Needs:`).
    pub needs: Option<String>,
    /// The kernel it is for (`Kernel:`), by name; the default one if the head does not say.
    pub kernel: Option<String>,
    /// Options of `run` that it is tried with (`Options:`), of those in [`OPTIONS`].
    pub options: Vec<String>,
    /// The patch, for `--patch`.
    pub path: PathBuf,
}

/// What a head may ask for: what is under the driver, and which part of it runs. Not what is run on it. `--append` is for a kernel's own
/// detectors, which are off if not asked for.
const OPTIONS: [&str; 4] = ["--append", "--atomics", "--backend", "--mirror-policy"];

impl Mutant {
    /// Whether a violation of `rule` is what the head asks for. Without a `Rule:` any is.
    #[must_use]
    pub fn expects(&self, rule: Rule) -> bool {
        self.rule.is_none() || self.rule == Some(rule) || self.also.contains(&rule)
    }
}

/// Every mutant of the source tree, by name.
///
/// # Errors
/// Usage if there is no source tree, or a patch in it has no head that can be read.
pub fn all() -> Result<Vec<Mutant>> {
    let mutants = folder(&source_tree()?.join("guest/mutants"))?;
    for mutant in &mutants {
        let lacks = |what| Err(Failure::usage(format!("{}: its head has no {what}", mutant.path.display())));
        if mutant.about.is_empty() {
            return lacks("first line that says what it does");
        }
        if mutant.rule.is_none() {
            return lacks("line `Rule: NAME` with the name of a rule");
        }
    }
    Ok(mutants)
}

/// Every correct driver of the source tree, by name.
///
/// # Errors
/// Usage if there is no source tree, or a head in it makes no sense.
pub fn benign() -> Result<Vec<Mutant>> {
    folder(&source_tree()?.join("guest/benign"))
}

/// Every patch in a folder, by name.
///
/// # Errors
/// Usage if it cannot be read, or a head names something that there is not.
pub fn folder(folder: &Path) -> Result<Vec<Mutant>> {
    let trouble =
        |error: std::io::Error| Failure::usage(format!("cannot read {}: {error}", folder.display()));
    let mut mutants = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(trouble)? {
        let path = entry.map_err(trouble)?.path();
        if path.extension().is_some_and(|end| end == "patch" || end == "diff") {
            let trouble =
                |why: String| Failure::usage(format!("cannot read the patch {}: {why}", path.display()));
            if std::fs::metadata(&path).map_err(|e| trouble(e.to_string()))?.len() > MOST {
                return Err(trouble(format!("it is longer than {} MiB", MOST >> 20)));
            }
            // Other people's need not be UTF-8; only the head is read here.
            let bytes = std::fs::read(&path).map_err(|e| trouble(e.to_string()))?;
            mutants.push(read(path, &String::from_utf8_lossy(&bytes))?);
        }
    }
    mutants.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(mutants)
}

/// Reads a patch's head: its first line, and the lines `Rule:`, `Also:`, `Needs:`, `Kernel:`, `Options:` before the patch begins.
fn read(path: PathBuf, text: &str) -> Result<Mutant> {
    let head = || text.lines().take_while(|line| !line.starts_with("--- ") && !line.starts_with("diff "));
    let field = |name: &str| {
        head().find_map(|line| Some(line.strip_prefix(name)?.trim())).filter(|value| !value.is_empty())
    };
    let rule = |name: &str| {
        Rule::from_name(name.trim()).ok_or_else(|| {
            Failure::usage(format!("{}: there is no rule `{}`", path.display(), name.trim()))
                .remedy("`list rules` has their names")
        })
    };
    let rules = |field: Option<&str>| -> Result<Vec<Rule>> {
        field.map_or(Ok(Vec::new()), |names| names.split(',').map(rule).collect())
    };
    let options: Vec<String> =
        field("Options:").unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    if let Some(word) = options.iter().step_by(2).find(|word| !OPTIONS.contains(&word.as_str())) {
        return Err(Failure::usage(format!("{}: `Options:` cannot be `{word}`", path.display()))
            .remedy(format!("it takes {}, each with a value", OPTIONS.join(", "))));
    }
    let about = head().next().map(str::trim).filter(|line| !names_a_field(line)).unwrap_or_default();
    Ok(Mutant {
        name: path.file_stem().unwrap_or(Path::new("").as_os_str()).to_string_lossy().into_owned(),
        about: about.to_owned(),
        rule: field("Rule:").map(rule).transpose()?,
        also: rules(field("Also:"))?,
        needs: field("Needs:").map(str::to_owned),
        kernel: field("Kernel:").map(str::to_owned),
        options,
        path,
    })
}

/// Whether a line says something with a name before a colon, and so is no description.
fn names_a_field(line: &str) -> bool {
    ["Rule:", "Also:", "Needs:", "Kernel:", "Options:", "From:", "Subject:", "Index:"]
        .iter()
        .any(|name| line.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read() {
        let text = "Do it twice.\n\nRule: release/twice\nAlso: release/late, kernel/warn\nNeeds: Linux 7.0\nModels: x\n\n--- a/x.c\nRule: release/late\n";
        let mutant = read("/x/do-it.patch".into(), text).unwrap();
        assert_eq!((mutant.name.as_str(), mutant.about.as_str()), ("do-it", "Do it twice."));
        assert_eq!(mutant.rule, Some(Rule::ReleaseTwice));
        assert_eq!(mutant.also, [Rule::ReleaseLate, Rule::KernelWarn]);
        assert_eq!(mutant.needs.as_deref(), Some("Linux 7.0"));
        assert!(mutant.expects(Rule::KernelWarn) && !mutant.expects(Rule::KernelOops));
    }

    #[test]
    fn a_head_that_says_nothing_expects_anything() {
        for text in ["", "--- a/x.c\nRule: release/late", "diff --git a/x.c b/x.c\n--- a/x.c\n"] {
            let mutant = read("/x/other.patch".into(), text).unwrap();
            assert_eq!((mutant.about.as_str(), mutant.rule), ("", None), "{text}");
            assert!(mutant.expects(Rule::KernelOops));
        }
    }

    #[test]
    fn options_are_those_of_the_driver_and_the_platform() {
        let with = |options| read("/x/y.patch".into(), &format!("About.\nOptions: {options}\n--- a/x.c"));
        let words = with("--backend mirror  --mirror-policy srcu").unwrap().options;
        assert_eq!(words, ["--backend", "mirror", "--mirror-policy", "srcu"]);
        assert!(with("").unwrap().options.is_empty());
        for wrong in ["--iterations 9", "--atomics exclusive --seed 1", "access"] {
            assert_eq!(with(wrong).unwrap_err().kind.exit_status(), 2, "{wrong}");
        }
    }

    #[test]
    fn a_rule_that_there_is_not_is_refused() {
        for text in
            ["About.\nRule: nonsense\n--- a/x.c", "About.\nRule: release/late\nAlso: release/late,, x\n"]
        {
            let failure = read("/x/do-it.patch".into(), text).unwrap_err();
            assert_eq!(failure.kind.exit_status(), 2);
        }
    }

    #[test]
    fn the_trees_own_can_be_read() {
        let mutants = all().unwrap();
        assert!(mutants.iter().any(|mutant| mutant.rule == Some(Rule::HangDeadlock)));
        assert!(mutants.len() >= 40, "{}", mutants.len());
        let benign = benign().unwrap();
        assert!(benign.iter().all(|driver| driver.rule.is_none() && !driver.about.is_empty()));
    }
}
