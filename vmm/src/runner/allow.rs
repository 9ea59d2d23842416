// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a team accepts (`--allow FILE`): violations that are shown, with the reason, and do not make the verdict.
//!
//! An entry names one rule and says why. It may be narrowed by patterns, in which `*` stands for any text and which must fit as a
//! whole; all that are given must fit.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Spanned;
use vgpu::oracle::{Rule, Violation};

use crate::failure::{Failure, Result};

/// Entries of a file at most.
const MOST: usize = 1000;
/// Bytes of a file at most.
const MOST_BYTES: u64 = 1 << 20;

/// What is accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Allow {
    /// The file, as it was named.
    pub file: PathBuf,
    /// In the file's order.
    pub entries: Vec<Entry>,
}

/// One sort of violation that is accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Line of the file.
    pub line: usize,
    /// The rule.
    pub rule: Rule,
    /// Why.
    pub reason: String,
    /// Only in this workload.
    pub workload: Option<String>,
    /// Only if this fits the context's name, such as `context 3#7`.
    pub context: Option<String>,
    /// Only if this fits the sentence of the report.
    pub summary: Option<String>,
    /// Only if this fits one of the lines that the kernel printed, or one of the last events.
    pub stack: Option<String>,
    /// Only on a kernel whose release, or name as it was asked for, this fits.
    pub kernel: Option<String>,
    /// A run in which it could have been needed and was not is inconclusive; else that is only said.
    pub always: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    #[serde(default)]
    allow: Vec<Spanned<EntryForm>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryForm {
    rule: Spanned<String>,
    reason: Spanned<String>,
    workload: Option<Spanned<String>>,
    context: Option<String>,
    summary: Option<String>,
    stack: Option<String>,
    kernel: Option<String>,
    #[serde(default)]
    always: bool,
}

/// A kernel, by what an entry may name it.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<'k> {
    /// As it was asked for.
    pub name: &'k str,
    /// `uname -r`, as far as it is known.
    pub release: &'k str,
}

impl Allow {
    /// Reads a file.
    ///
    /// # Errors
    /// Usage, with file and line, if it cannot be read or says something that makes no sense.
    pub fn read(file: &Path) -> Result<Self> {
        let bad = |why: String| Failure::usage(format!("--allow {}: {why}", file.display()));
        let length = std::fs::metadata(file).map_err(|error| bad(error.to_string()))?.len();
        if length > MOST_BYTES {
            return Err(bad(format!("{length} bytes are too many")));
        }
        let text = std::fs::read_to_string(file).map_err(|error| bad(error.to_string()))?;
        let entries = parse(&text).map_err(|(line, why)| {
            Failure::usage(format!("--allow {}:{line}: {why}", file.display()))
                .remedy("docs/using.md says how such a file is written, and `list rules` has the rules")
        })?;
        Ok(Self { file: file.to_owned(), entries })
    }

    /// The entry that a violation falls under.
    #[must_use]
    pub fn entry(&self, violation: &Violation, workload: Option<&str>, kernel: Kernel<'_>) -> Option<usize> {
        self.entries.iter().position(|entry| entry.fits(violation, workload, kernel))
    }

    /// Entries that could have been needed in a run of these workloads on this kernel, and that none of `needed` names.
    #[must_use]
    pub fn unneeded(&self, needed: &[usize], workloads: &[String], kernel: Kernel<'_>) -> Vec<&Entry> {
        let could = |entry: &Entry| {
            entry.on(kernel) && entry.workload.as_ref().is_none_or(|name| workloads.contains(name))
        };
        let all = self.entries.iter().enumerate();
        all.filter(|(at, entry)| !needed.contains(at) && could(entry)).map(|(_, entry)| entry).collect()
    }

    /// What is said of an entry that was not needed.
    #[must_use]
    pub fn say(&self, entry: &Entry) -> String {
        let more = if entry.always { ", and it says always = true" } else { "" };
        format!("{}:{}: {} was allowed and did not happen{more}", self.file.display(), entry.line, entry.rule)
    }
}

impl Entry {
    fn on(&self, kernel: Kernel<'_>) -> bool {
        self.kernel.as_ref().is_none_or(|pattern| fits(pattern, kernel.name) || fits(pattern, kernel.release))
    }

    fn fits(&self, violation: &Violation, workload: Option<&str>, kernel: Kernel<'_>) -> bool {
        let one = |pattern: &Option<String>, text: Option<&str>| {
            pattern.as_ref().is_none_or(|pattern| text.is_some_and(|text| fits(pattern, text)))
        };
        self.rule == violation.rule
            && self.on(kernel)
            && self.workload.as_deref().is_none_or(|name| workload == Some(name))
            && one(&self.context, violation.context_name.as_deref())
            && one(&self.summary, Some(&violation.summary))
            && self
                .stack
                .as_ref()
                .is_none_or(|pattern| violation.events.iter().any(|line| fits(pattern, line.trim())))
    }
}

/// Whether a pattern fits the whole text; `*` is any text, also none.
fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    // Without a star nothing may be left over.
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.split_once(part) {
            Some((_, after)) => rest = after,
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn parse(text: &str) -> std::result::Result<Vec<Entry>, (usize, String)> {
    let line = |at: usize| 1 + text.as_bytes().iter().take(at).filter(|&&byte| byte == b'\n').count();
    let form: FileForm = toml::from_str(text)
        .map_err(|error| (error.span().map_or(1, |span| line(span.start)), error.message().to_owned()))?;
    if form.allow.len() > MOST {
        return Err((1, format!("more than {MOST} entries")));
    }
    if form.allow.is_empty() {
        return Err((1, "there is no [[allow]] in it".to_owned()));
    }
    let entry = |form: Spanned<EntryForm>| {
        let at = line(form.span().start);
        let form = form.into_inner();
        let refuse = |span: std::ops::Range<usize>, why: String| Err((line(span.start), why));
        let Some(rule) = Rule::from_name(form.rule.get_ref()) else {
            return refuse(form.rule.span(), format!("there is no rule {:?}", form.rule.get_ref()));
        };
        if form.reason.get_ref().trim().is_empty() {
            return refuse(form.reason.span(), "the reason is empty".to_owned());
        }
        if let Some(workload) = &form.workload {
            if !guest_protocol::WORKLOADS.iter().any(|known| known.name == workload.get_ref()) {
                return refuse(workload.span(), format!("there is no workload {:?}", workload.get_ref()));
            }
        }
        Ok(Entry {
            line: at,
            rule,
            reason: form.reason.into_inner(),
            workload: form.workload.map(Spanned::into_inner),
            context: form.context,
            summary: form.summary,
            stack: form.stack,
            kernel: form.kernel,
            always: form.always,
        })
    };
    form.allow.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: Kernel<'_> = Kernel { name: "bookworm", release: "6.1.0-50-cloud-amd64" };

    fn allow(text: &str) -> Allow {
        Allow { file: "a.toml".into(), entries: parse(text).unwrap() }
    }

    #[test]
    fn patterns_fit_as_a_whole() {
        for (pattern, text, expected) in [
            ("abc", "abc", true),
            ("abc", "abcd", false),
            ("a*", "abcd", true),
            ("*cd", "abcd", true),
            ("a*d", "ad", true),
            ("a*b*d", "axbxd", true),
            ("a*b*d", "axd", false),
            ("*", "", true),
            ("ab*b", "ab", false),
            ("**x**", "x", true),
            ("", "x", false),
        ] {
            assert_eq!(fits(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn an_entry_is_as_narrow_as_it_says() {
        let list = allow(
            r#"
            [[allow]]
            rule = "release/late"
            reason = "the UNMAP of exit does it"
            workload = "release"
            context = "context 1#*"
            summary = "*leaves are valid*"
            kernel = "6.1.*"

            [[allow]]
            rule = "kernel/warn"
            reason = "the core's own, bugzilla 1"
            stack = "*remove_migration_ptes+*"
            "#,
        );
        let ctx = vgpu_spec::handle::Handle(1 << 32 | 1 << 24 | 1);
        let late =
            Violation::new(Rule::ReleaseLate, "release has returned, but 2 leaves are valid (first)").on(ctx);
        let at = |violation: &Violation, workload, kernel| list.entry(violation, workload, kernel);
        assert_eq!(at(&late, Some("release"), KERNEL), Some(0));
        assert_eq!(at(&late, Some("stress"), KERNEL), None);
        assert_eq!(at(&late, None, KERNEL), None);
        assert_eq!(at(&late, Some("release"), Kernel { name: "trixie", release: "6.12" }), None);
        let mut other = late.clone();
        other.context_name = Some("context 2#1".into());
        assert_eq!(at(&other, Some("release"), KERNEL), None);
        let mapped = Violation { rule: Rule::ReleaseMapped, ..late.clone() };
        assert_eq!(at(&mapped, Some("release"), KERNEL), None);
        let mut warn = Violation::new(Rule::KernelWarn, "WARNING");
        assert_eq!(at(&warn, None, KERNEL), None);
        warn.events = vec![" rmap_walk_anon+0x12/0x80".into(), " remove_migration_ptes+0x12/0x80".into()];
        assert_eq!(at(&warn, None, KERNEL), Some(1));
    }

    #[test]
    fn what_was_not_needed_is_told_where_it_could_have_been() {
        let list = allow(
            "[[allow]]\nrule = \"release/late\"\nreason = \"a\"\n[[allow]]\nrule = \"kernel/warn\"\nreason = \"b\"\nkernel = \"trixie\"\n\
             [[allow]]\nrule = \"fault/unanswered\"\nreason = \"c\"\nworkload = \"stress\"\nalways = true\n",
        );
        let lines = |needed: &[usize], workloads: &[&str]| {
            let workloads: Vec<String> = workloads.iter().map(ToString::to_string).collect();
            list.unneeded(needed, &workloads, KERNEL).iter().map(|entry| entry.line).collect::<Vec<_>>()
        };
        assert_eq!(lines(&[], &["release"]), [1]);
        assert_eq!(lines(&[], &["release", "stress"]), [1, 8]);
        assert!(lines(&[0, 2], &["stress"]).is_empty());
        assert_eq!(
            list.say(&list.entries[2]),
            "a.toml:8: fault/unanswered was allowed and did not happen, and it says always = true"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_line() {
        for (text, line, said) in [
            ("", 1, "[[allow]]"),
            ("[[allow]]\nrule = \"release/late\"\n", 1, "reason"),
            ("[[allow]]\nrule = \"release/late\"\nreason = \" \"\n", 3, "the reason is empty"),
            ("\n[[allow]]\nreason = \"a\"\nrule = \"release/never\"\n", 4, "release/never"),
            ("[[allow]]\nrule = \"kernel/*\"\nreason = \"a\"\n", 2, "kernel/*"),
            ("[[allow]]\nrule = \"release/late\"\nreason = \"a\"\nworkload = \"releas\"\n", 4, "releas"),
            ("[[allow]]\nrule = \"release/late\"\nreason = \"a\"\nscope = \"x\"\n", 4, "scope"),
            ("[[allow]\n", 1, ""),
            ("[[allow]]\nrule = 5\n", 2, "string"),
        ] {
            let (at, why) = parse(text).unwrap_err();
            assert!(at == line && why.contains(said), "{text}: {at}: {why}");
        }
        assert!(Allow::read(Path::new("/nonexistent")).unwrap_err().to_string().contains("/nonexistent"));
    }
}
