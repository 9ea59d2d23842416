// SPDX-License-Identifier: MIT OR Apache-2.0
//! `report`: shows again what earlier runs left in their `--out` folders, for people or for a forge's log.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::failure::{Failure, Result};
use crate::report::github;
use crate::report::human::Human;
use crate::report::results::{Results, SCHEMA_VERSION};

/// No results are longer: violations, events and console lines are bounded where they are made.
const MOST: u64 = 64 << 20;

/// Arguments of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Folders that runs wrote with --out
    #[arg(value_name = "DIR", required = true)]
    pub dirs: Vec<PathBuf>,
    /// How
    #[arg(long, value_enum, default_value = "human")]
    pub format: ReportFormat,
    /// With --format github: append the summary, in Markdown, to this file instead of the one named by GITHUB_STEP_SUMMARY
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
}

/// How results are shown again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// As at the end of the run
    Human,
    /// GitHub Actions: an annotation for each violation, kernel splats included, and a step summary
    Github,
}

/// Prints the reports; the status is 0 whatever the verdicts were.
///
/// # Errors
/// Usage if a folder has no results that this version can read; then nothing is printed.
pub fn print(args: &ReportArgs, human: &Human, out: &mut dyn Write) -> Result<u8> {
    let runs = args.dirs.iter().map(|dir| load(dir)).collect::<Result<Vec<_>>>()?;
    let text = match args.format {
        ReportFormat::Human => runs.iter().map(|run| human.end(run)).collect::<String>(),
        ReportFormat::Github => {
            let named =
                std::env::var_os("GITHUB_STEP_SUMMARY").filter(|name| !name.is_empty()).map(PathBuf::from);
            if let Some(file) = args.summary.clone().or(named) {
                append(&file, &runs)?;
            }
            runs.iter().map(github::annotations).collect::<String>()
        }
    };
    match out.write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::environment(format!("cannot write: {error}")))
        }
        _ => Ok(0),
    }
}

fn append(file: &Path, runs: &[Results]) -> Result<()> {
    let write = || {
        let mut file = File::options().append(true).create(true).open(file)?;
        runs.iter().try_for_each(|run| file.write_all(github::summary(run).as_bytes()))
    };
    write().map_err(|e| Failure::environment(format!("cannot write the summary {}: {e}", file.display())))
}

fn load(dir: &Path) -> Result<Results> {
    let file = dir.join("results.json");
    let bad = |why: String| {
        Failure::usage(format!("{}: {why}", file.display()))
            .remedy("name a folder that `run --out DIR` has written")
    };
    let mut text = String::new();
    let read = File::open(&file).and_then(|file| file.take(MOST + 1).read_to_string(&mut text));
    let length = read.map_err(|error| bad(error.to_string()))?;
    if length as u64 > MOST {
        return Err(bad(format!("is longer than {} MiB", MOST >> 20)));
    }
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    // Asked before the rest: of a newer form, other fields may be missing.
    match value.get("schema_version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(SCHEMA_VERSION) => {}
        Some(version) => {
            return Err(bad(format!("has schema version {version}, this testbench reads {SCHEMA_VERSION}")));
        }
        None => return Err(bad("has no schema_version".into())),
    }
    serde_json::from_value(value).map_err(|error| bad(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::tests::sample;

    fn report(dir: &Path, format: ReportFormat, summary: Option<PathBuf>) -> Result<String> {
        let mut out = Vec::new();
        let args = ReportArgs { dirs: vec![dir.to_owned()], format, summary };
        print(&args, &Human::new(), &mut out).map(|status| {
            assert_eq!(status, 0);
            String::from_utf8(out).unwrap()
        })
    }

    #[test]
    fn both_forms_of_a_run() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("results.json"), serde_json::to_vec(&sample()).unwrap()).unwrap();
        let human = report(dir.path(), ReportFormat::Human, None).unwrap();
        assert!(human.contains("verdict: violation") && human.contains("release/late"), "{human}");
        let summary = dir.path().join("summary.md");
        for round in 1..=2 {
            let github = report(dir.path(), ReportFormat::Github, Some(summary.clone())).unwrap();
            assert!(github.starts_with("::error title=release/late::"), "{github}");
            let summary = std::fs::read_to_string(&summary).unwrap();
            // In the list, over its own section, and once more where it was allowed.
            assert_eq!(summary.matches("release/late").count(), 3 * round, "{summary}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let says = |words: &str| {
            let failure = report(dir.path(), ReportFormat::Human, None).unwrap_err();
            assert_eq!(failure.kind, crate::failure::FailureKind::Usage);
            assert!(failure.what.contains(words), "{failure}");
        };
        says("No such file");
        for (text, words) in [
            ("{", "EOF"),
            ("{}", "no schema_version"),
            (r#"{"schema_version": 99}"#, "schema version 99"),
            (r#"{"schema_version": 1}"#, "missing field"),
        ] {
            std::fs::write(dir.path().join("results.json"), text).unwrap();
            says(words);
        }
    }
}
