// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command of `--exec` and the shell of `--shell`.
//!
//! With a `/bin/sh` in the image the command is a shell command. Without one it is split into words and run directly: words
//! end at blanks; single quotes keep everything up to the next one; double quotes too, but a backslash in them, and outside of
//! quotes, keeps the next character. Nothing is expanded. A name without a slash is looked for in [`PATH`].

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, execve, setsid};

use crate::outcome::{Checked, Doing, Failure, describe};
use crate::process::{Child, Ended};
use crate::report::note;

const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/testbench";
const SHELL: &str = "/bin/sh";
/// Exit status where the program cannot be run, as shells have it.
const NOT_FOUND: i32 = 127;

/// Runs a command; its exit status, or 128 + the signal.
pub(crate) fn run(command: &str) -> i32 {
    let words = if Path::new(SHELL).exists() {
        Ok(vec![SHELL.to_owned(), "-c".to_owned(), command.to_owned()])
    } else {
        split(command)
    };
    match words {
        Ok(words) => wait_for(&words, "/dev/console"),
        Err(why) => {
            note(&format!("--exec: {why}"));
            NOT_FOUND
        }
    }
}

/// Runs an interactive shell on the console.
pub(crate) fn shell() {
    if !Path::new(SHELL).exists() {
        return note("no shell: the image has no /bin/sh (add one with --add)");
    }
    // Job control needs a terminal that can be controlling, which /dev/console never is.
    let terminal = if Path::new("/dev/ttyS0").exists() { "/dev/ttyS0" } else { "/dev/console" };
    wait_for(&[SHELL.to_owned(), "-i".to_owned()], terminal);
}

fn wait_for(words: &[String], terminal: &str) -> i32 {
    let ended = Child::spawn(|_| {
        let Err(errno) = become_program(words, terminal);
        note(&format!("{}: {}", words.first().map_or("", String::as_str), describe(errno)));
        crate::process::exit_now(NOT_FOUND)
    })
    .and_then(|mut child| child.wait_long());
    match ended {
        Ok(Ended::Exited(status)) => status,
        Ok(Ended::Killed(signal)) => 128 + signal as i32,
        Err(failure) => {
            note(&failure.to_string());
            NOT_FOUND
        }
    }
}

fn become_program(words: &[String], terminal: &str) -> Result<Infallible, Errno> {
    setsid()?;
    // The first terminal that a session's leader opens becomes its controlling one.
    if let Ok(terminal) = OpenOptions::new().read(true).write(true).open(terminal) {
        dup2_stdin(&terminal)?;
        dup2_stdout(&terminal)?;
        dup2_stderr(&terminal)?;
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    let arguments = words
        .iter()
        .map(|word| CString::new(word.as_str()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| Errno::EINVAL)?;
    let program = words.first().map_or("", String::as_str);
    let environment = [
        CString::new(format!("PATH={PATH}")).map_err(|_| Errno::EINVAL)?,
        c"HOME=/".to_owned(),
        c"TERM=linux".to_owned(),
    ];
    let mut result = Err(Errno::ENOENT);
    for candidate in candidates(program) {
        let path = CString::new(candidate).map_err(|_| Errno::EINVAL)?;
        result = execve(&path, &arguments, &environment);
        if result != Err(Errno::ENOENT) {
            break;
        }
    }
    result
}

fn candidates(program: &str) -> Vec<String> {
    if program.contains('/') {
        vec![program.to_owned()]
    } else {
        PATH.split(':').map(|folder| format!("{folder}/{program}")).collect()
    }
}

/// Replaces the calling child with `program`, run with one argument.
pub(crate) fn replace(program: &Path, argument: &str) -> Checked {
    let path = CString::new(program.as_os_str().as_encoded_bytes())
        .map_err(|_| Failure::wrong("a program's name contains a NUL byte"))?;
    let argument = CString::new(argument).map_err(|_| Failure::wrong("an argument contains a NUL byte"))?;
    let none: [CString; 0] = [];
    execve(&path, &[path.clone(), argument], &none).map(|never| match never {}).doing("execve")
}

/// Splits a command as the module's head says.
fn split(command: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut rest = command.chars();
    while let Some(next) = rest.next() {
        match next {
            ' ' | '\t' | '\n' => words.extend(word.take()),
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match rest.next() {
                        Some(end) if end == next => break,
                        Some('\\') if next == '"' => word.push(rest.next().ok_or("ends in a backslash")?),
                        Some(inner) => word.push(inner),
                        None => return Err("a quote is not closed"),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(rest.next().ok_or("ends in a backslash")?),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    if words.is_empty() { Err("the command is empty") } else { Ok(words) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_as_documented() {
        assert_eq!(split("a  b\tc").unwrap(), ["a", "b", "c"]);
        assert_eq!(split(r#"x 'a b' "c \" d"e \ f '' "#).unwrap(), ["x", "a b", "c \" de", " f", ""]);
        assert!(split("'open").is_err());
        assert!(split("  ").is_err());
        assert!(split("a\\").is_err());
    }

    #[test]
    fn exit_statuses_and_signals() {
        assert_eq!(wait_for(&["true".to_owned()], "/dev/null"), 0);
        assert_eq!(wait_for(&["/bin/sh".to_owned(), "-c".to_owned(), "exit 7".to_owned()], "/dev/null"), 7);
        assert_eq!(
            wait_for(&["/bin/sh".to_owned(), "-c".to_owned(), "kill -9 $$".to_owned()], "/dev/null"),
            137
        );
    }
}
