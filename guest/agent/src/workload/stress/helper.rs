// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another process that does to this one's memory what it is asked for: a debugger, an advisor, a writer.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};

use crate::kernel::{poke, process_madvise};
use crate::memory::{PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure};
use crate::process::{BOUND, Child, pidfd};

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    /// A page's worth of a pattern, through /proc/PID/mem: whatever the page's rights are.
    Write(Pattern),
    /// The same by process_vm_writev, within the page's rights.
    WriteVector(Pattern),
    /// One word, as a debugger: whatever the page's rights are.
    Poke(u64),
    /// process_madvise: so many bytes, which advice.
    Advise(usize, i32),
}

/// A request on the line: act, address, and two words of its own.
type Words = [u64; 4];

impl Act {
    fn words(self, address: u64) -> Words {
        match self {
            Self::Write(pattern) => [0, address, pattern.first, pattern.step],
            Self::WriteVector(pattern) => [1, address, pattern.first, pattern.step],
            Self::Poke(word) => [2, address, word, 0],
            Self::Advise(bytes, advice) => [3, address, bytes as u64, u64::from(advice.unsigned_abs())],
        }
    }

    fn from_words(words: Words) -> (Self, u64) {
        let pattern = Pattern { first: words[2], step: words[3] };
        let act = match words[0] {
            0 => Self::Write(pattern),
            1 => Self::WriteVector(pattern),
            2 => Self::Poke(words[2]),
            _ => Self::Advise(words[2] as usize, words[3] as i32),
        };
        (act, words[1])
    }
}

/// The line to it.
struct Line {
    stream: UnixStream,
    /// A request was not answered in time. It may still be, and the answer would be taken for that to the next.
    broken: bool,
}

/// The other process, asked by any thread of this one. Ended when dropped.
///
/// The lock is held from a request to its answer; nothing else is waited for meanwhile.
pub(super) struct Helper {
    line: Mutex<Line>,
    _child: Child,
}

impl Helper {
    /// A child, which has a copy of all that there is now: so it is made before the memory and the contexts that it is to act on.
    pub(super) fn new() -> Checked<Self> {
        let trouble = |error: std::io::Error| Failure::wrong(format!("a line to a helper: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(trouble)?;
        ours.set_read_timeout(Some(BOUND)).map_err(trouble)?;
        let copy = ours.as_raw_fd();
        let child = Child::spawn(move |_| {
            // Else it would not see that the other end is gone.
            nix::unistd::close(copy).doing("close")?;
            serve(theirs)
        })?;
        Ok(Self { line: Mutex::new(Line { stream: ours, broken: false }), _child: child })
    }

    /// Has something done to this process's memory at `address`; bytes that were done. Who may not do it at all says EPERM.
    pub(super) fn ask(&self, act: Act, address: u64) -> Checked<Result<usize, Errno>> {
        let trouble = |error: std::io::Error| Failure::wrong(format!("the helper does not answer: {error}"));
        let mut line = self.line.lock().map_err(|_| Failure::wrong("a thread panicked"))?;
        if line.broken {
            return Err(Failure::wrong("the helper did not answer before"));
        }
        let answer = line.exchange(&act.words(address));
        line.broken = answer.is_err();
        let answer = answer.map_err(trouble)?;
        Ok(usize::try_from(answer).map_err(|_| Errno::from_raw(answer.unsigned_abs() as i32)))
    }
}

impl Line {
    fn exchange(&mut self, words: &Words) -> std::io::Result<i64> {
        for word in words {
            self.stream.write_all(&word.to_ne_bytes())?;
        }
        let mut answer = [0; 8];
        self.stream.read_exact(&mut answer)?;
        Ok(i64::from_ne_bytes(answer))
    }
}

/// The helper's life: until its parent is gone, or does not want it any more.
fn serve(mut line: UnixStream) -> Checked {
    let parent = getppid();
    let memory = File::options().write(true).open(format!("/proc/{parent}/mem")).ok();
    let advised = pidfd(parent).ok();
    let mut words = [[0; 8]; 4];
    while line.read_exact(words.as_flattened_mut()).is_ok() {
        let (act, address) = Act::from_words(words.map(u64::from_ne_bytes));
        let done = match act {
            Act::Write(pattern) => write(memory.as_ref(), address, pattern),
            Act::WriteVector(pattern) => {
                let remote = RemoteIoVec { base: address as usize, len: PAGE };
                process_vm_writev(parent, &[IoSlice::new(&bytes_of(pattern))], &[remote])
            }
            Act::Poke(word) => debug(parent, address, word),
            Act::Advise(bytes, advice) => match &advised {
                Some(fd) => process_madvise(fd.as_raw_fd(), address, bytes, advice),
                None => Err(Errno::ENOSYS),
            },
        };
        let answer = match done {
            Ok(bytes) => bytes as i64,
            Err(errno) => -i64::from(errno as i32),
        };
        if line.write_all(&answer.to_ne_bytes()).is_err() {
            break;
        }
    }
    Ok(())
}

fn bytes_of(pattern: Pattern) -> Vec<u8> {
    (0..PAGE).step_by(8).flat_map(|at| pattern.word(at).to_ne_bytes()).collect()
}

fn write(memory: Option<&File>, address: u64, pattern: Pattern) -> Result<usize, Errno> {
    let memory = memory.ok_or(Errno::EPERM)?;
    memory
        .write_at(&bytes_of(pattern), address)
        .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// Stops the process's first thread for the moment that it takes.
fn debug(pid: Pid, address: u64, word: u64) -> Result<usize, Errno> {
    ptrace::attach(pid)?;
    let stopped = loop {
        match waitpid(pid, None) {
            Err(Errno::EINTR) => {}
            other => break other,
        }
    };
    let poked = match stopped {
        Ok(WaitStatus::Stopped(..)) => poke(pid, address, word),
        Ok(_) => Err(Errno::ESRCH),
        Err(errno) => Err(errno),
    };
    ptrace::detach(pid, None)?;
    poked.map(|()| size_of::<u64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_answer_is_not_the_next_ones() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(std::time::Duration::from_millis(10))).unwrap();
        let line = Mutex::new(Line { stream: ours, broken: false });
        let helper = Helper { line, _child: Child::spawn(|_| Ok(())).unwrap() };
        theirs.write_all(&8_i64.to_ne_bytes()).unwrap();
        assert_eq!(helper.ask(Act::Poke(1), 0x1000).unwrap(), Ok(8));
        assert!(helper.ask(Act::Poke(1), 0x1000).is_err(), "too late");
        theirs.write_all(&8_i64.to_ne_bytes()).unwrap();
        assert!(helper.ask(Act::Poke(2), 0x1000).is_err(), "the answer to another question");
    }

    #[test]
    fn what_is_asked_arrives() {
        for act in [
            Act::Write(Pattern { first: 1, step: 2 }),
            Act::WriteVector(Pattern { first: 3, step: 4 }),
            Act::Poke(u64::MAX),
            Act::Advise(1 << 21, 25),
        ] {
            let (back, address) = Act::from_words(act.words(0x7000));
            assert_eq!((format!("{back:?}"), address), (format!("{act:?}"), 0x7000));
        }
    }
}
