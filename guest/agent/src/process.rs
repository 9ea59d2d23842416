// SPDX-License-Identifier: MIT OR Apache-2.0
//! Child processes: made by fork without exec, heard through a pipe, waited for in bounded time.
#![allow(unsafe_code)] // fork and exit have no safe form

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, wait, waitid, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};
use serde::{Deserialize, Serialize};

use crate::outcome::{Checked, Doing, Failure};

/// How long anything that must end may take, in guest time. The host's watchdog has less patience, 34 s of it, and can say who hangs: a
/// workload that gave up first would say no more than that something took long. In a guest that is starved the watchdog has more
/// (docs/using.md), up to here where the guest gets an eighteenth of what it wants.
pub(crate) const BOUND: Duration = Duration::from_secs(600);
/// Exit status of a child whose body failed; its failure went through the pipe.
const FAILED: i32 = 1;
/// Exit status of a child that panicked.
const PANICKED: i32 = 101;

/// Ends this process now: no destructors, no handlers. Threads end with it.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit has no conditions.
    unsafe { nix::libc::_exit(status) }
}

/// Has a child close its copies of all files but the first three, as whatever starts programs does: a child of vfork(), which has this
/// process's memory and not its table of files, and for whose end the caller waits.
pub(crate) fn close_files_in_vfork() -> Checked {
    /// For one system call.
    const STACK: usize = 4096;
    extern "C" fn child(_: *mut nix::libc::c_void) -> nix::libc::c_int {
        // SAFETY: plain numbers. The table of files is the child's own. errno is the parent's, which is stopped meanwhile.
        let closed = unsafe { nix::libc::syscall(nix::libc::SYS_close_range, 3, u32::MAX, 0) };
        i32::from(closed != 0)
    }
    let mut stack = vec![0_u128; STACK];
    let flags = nix::libc::CLONE_VM | nix::libc::CLONE_VFORK | nix::libc::SIGCHLD;
    // SAFETY: the stack is the child's until this call returns, since CLONE_VFORK has the caller wait for its end, and grows down
    // from the end of the vector; the child touches nothing else, and ends itself when its function returns.
    let pid =
        unsafe { nix::libc::clone(child, stack.as_mut_ptr_range().end.cast(), flags, std::ptr::null_mut()) };
    let pid = Pid::from_raw(Errno::result(pid).doing("vfork")?);
    loop {
        match waitpid(pid, None) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(ended) => {
                return Err(Failure::wrong(format!(
                    "the child of vfork() could not close its files: {ended:?}"
                )));
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).doing("waitpid"),
        }
    }
}

/// Ends this thread and no other. Nothing of it is dropped, and its stack stays as it is.
pub(crate) fn leave_thread() -> ! {
    loop {
        // SAFETY: exit has no conditions; what others have borrowed of this thread's stack stays there.
        unsafe { nix::libc::syscall(nix::libc::SYS_exit, 0) };
    }
}

/// What a child tells its parent.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    Ready(u64),
    Failed(Failure),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Killed(Signal),
}

/// The parent, seen from the child.
#[derive(Debug)]
pub(crate) struct Parent {
    pipe: std::fs::File,
}

impl Parent {
    /// Says that the child has come to the point the parent waits for, with a number for it.
    pub(crate) fn ready(&self, number: u64) {
        self.say(&Word::Ready(number));
    }

    /// Says that something is wrong.
    pub(crate) fn failed(&self, failure: &Failure) {
        self.say(&Word::Failed(failure.clone()));
    }

    fn say(&self, word: &Word) {
        if let Ok(mut line) = serde_json::to_vec(word) {
            line.push(b'\n');
            // A parent that no longer listens does not need it.
            let _ = (&self.pipe).write_all(&line);
        }
    }
}

/// A child process, seen from its parent. Killed and reaped when dropped before its end.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    /// Readable when it has ended.
    end: OwnedFd,
    pipe: std::fs::File,
    heard: Vec<u8>,
    ended: Option<Ended>,
}

impl Child {
    /// Runs `body` in a child process, which then ends: with status 0, or 1 and the failure told to the parent.
    pub(crate) fn spawn(body: impl FnOnce(&Parent) -> Checked) -> Checked<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).doing("pipe")?;
        // Only the reading end stays non-blocking.
        fcntl(&write, FcntlArg::F_SETFL(OFlag::empty())).doing("fcntl")?;
        // SAFETY: the child runs on with a copy of everything. Callers fork where no other thread holds a lock that the child
        // needs: PID 1 and the workloads have one thread at that point, or a body that only ends the process. (glibc makes its
        // allocator safe across fork by itself.)
        match unsafe { fork() }.doing("fork")? {
            ForkResult::Parent { child } => {
                drop(write);
                // Not reaped yet, so the number is still its own.
                let end = pidfd(child).doing("pidfd_open")?;
                Ok(Self { pid: child, end, pipe: read.into(), heard: Vec::new(), ended: None })
            }
            ForkResult::Child => {
                drop(read);
                exit_now(Self::run(write, body))
            }
        }
    }

    fn run(write: OwnedFd, body: impl FnOnce(&Parent) -> Checked) -> i32 {
        let parent = Parent { pipe: write.into() };
        // A panic must not unwind into the parent's frames, which this process has copies of.
        match catch_unwind(AssertUnwindSafe(|| body(&parent))) {
            Ok(Ok(())) => 0,
            Ok(Err(failure)) => {
                parent.say(&Word::Failed(failure));
                FAILED
            }
            Err(_) => {
                parent.say(&Word::Failed(Failure::wrong("the child panicked; see the console")));
                PANICKED
            }
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Its pidfd.
    pub(crate) fn fd(&self) -> std::os::fd::RawFd {
        self.end.as_raw_fd()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> Checked<bool> {
        Ok(self.poll_end()?.is_some())
    }

    /// Sends a signal, if it has not ended already: then its number may be another's, and its end says what was wrong.
    pub(crate) fn signal(&self, signal: Signal) -> Checked {
        if self.ended.is_some() { Ok(()) } else { kill(self.pid, signal).doing("kill") }
    }

    /// Waits until the child says that it is ready; its number.
    pub(crate) fn wait_ready(&mut self) -> Checked<u64> {
        let until = Instant::now() + BOUND;
        loop {
            let gone = self.poll_end()?;
            match self.next_word() {
                Some(Word::Ready(number)) => return Ok(number),
                Some(Word::Failed(failure)) => return Err(failure),
                None => {}
            }
            if let Some(ended) = gone {
                return Err(Failure::Wrong(format!("the child ended before it was ready: {ended:?}")));
            }
            if Instant::now() > until {
                return Err(Failure::Wrong(format!("the child was not ready after {BOUND:?}")));
            }
            wait_readable(&[self.end.as_fd(), self.pipe.as_fd()], until)?;
        }
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> Checked<Ended> {
        let until = Instant::now() + BOUND;
        loop {
            if let Some(ended) = self.poll_end()? {
                return Ok(ended);
            }
            if Instant::now() > until {
                return Err(Failure::Wrong(format!("process {} did not end within {BOUND:?}", self.pid)));
            }
            // Not the pipe: it is at its end for good once nobody holds the other side, and would not let us sleep.
            wait_readable(&[self.end.as_fd()], until)?;
        }
    }

    /// Waits for its end, however long that takes: for work whose length only the plan knows. Reaps orphans meanwhile, which
    /// come to PID 1.
    pub(crate) fn wait_long(&mut self) -> Checked<Ended> {
        loop {
            // Only PID 1 is given other processes' children.
            match if std::process::id() == 1 { wait() } else { waitpid(self.pid, None) } {
                Ok(WaitStatus::Exited(pid, status)) if pid == self.pid => {
                    return Ok(*self.ended.insert(Ended::Exited(status)));
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == self.pid => {
                    return Ok(*self.ended.insert(Ended::Killed(signal)));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).doing("wait"),
            }
        }
    }

    /// Waits for its end, which must be a return from its body without a failure.
    pub(crate) fn join(&mut self) -> Checked {
        let ended = self.wait()?;
        self.judge(ended)
    }

    /// Whether an end was a return from the body without a failure; the failure it told otherwise.
    pub(crate) fn judge(&mut self, ended: Ended) -> Checked {
        while let Some(word) = self.next_word() {
            if let Word::Failed(failure) = word {
                return Err(failure);
            }
        }
        match ended {
            Ended::Exited(0) => Ok(()),
            other => Err(Failure::Wrong(format!("the child ended with {other:?}"))),
        }
    }

    /// Waits for its end, with `signal` sent to it all the while, which it has a handler for when it is ready.
    pub(crate) fn join_disturbed(&mut self, signal: Signal, every: Duration) -> Checked {
        self.wait_ready()?;
        while !self.has_ended()? {
            self.signal(signal)?;
            std::thread::sleep(every);
        }
        self.join()
    }

    /// Waits for its end, which must be by `signal`.
    pub(crate) fn join_killed(&mut self, signal: Signal) -> Checked {
        match self.wait()? {
            Ended::Killed(by) if by == signal => Ok(()),
            other => Err(self.next_failure().unwrap_or_else(|| {
                Failure::Wrong(format!("the child ended with {other:?} instead of by {signal}"))
            })),
        }
    }

    /// The next failure that it, or a child of its own, has told.
    pub(crate) fn next_failure(&mut self) -> Option<Failure> {
        loop {
            if let Word::Failed(failure) = self.next_word()? {
                return Some(failure);
            }
        }
    }

    fn poll_end(&mut self) -> Checked<Option<Ended>> {
        if self.ended.is_none() {
            self.ended = loop {
                match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::Exited(_, status)) => break Some(Ended::Exited(status)),
                    Ok(WaitStatus::Signaled(_, signal, _)) => break Some(Ended::Killed(signal)),
                    Ok(_) => break None,
                    Err(Errno::EINTR) => {}
                    Err(errno) => return Err(errno).doing("waitpid"),
                }
            };
        }
        Ok(self.ended)
    }

    fn next_word(&mut self) -> Option<Word> {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = self.pipe.read(&mut buffer) {
            self.heard.extend_from_slice(&buffer[..read]);
        }
        let end = self.heard.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.heard.drain(..=end).collect();
        serde_json::from_slice(&line).ok()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended.is_none() && kill(self.pid, Signal::SIGKILL).is_ok() {
            // Bounded: a process stuck in the kernel is the host's to judge, and must not take the workload with it.
            let _ = self.wait();
        }
    }
}

/// A descriptor of a process that is readable when the process has ended.
pub(crate) fn pidfd(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: a system call with plain numbers; what it returns is a new descriptor or an error.
    let fd = Errno::result(unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: a descriptor that was made just now, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sleeps until one of the descriptors is readable or the time is up: without waking in between, since under emulation a
/// process that looks again and again costs those it waits for.
fn wait_readable(fds: &[BorrowedFd<'_>], until: Instant) -> Checked {
    let mut fds: Vec<_> = fds.iter().map(|&fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno).doing("poll"),
    }
}

/// Takes a killed process's memory away before it has ended, as the OOM killer's reaper does: with invalidations that must
/// not sleep, and while its threads and its device still run.
pub(crate) fn reap_memory(child: &Child) -> Result<(), Errno> {
    // SAFETY: a system call with plain numbers; it changes no memory of this process.
    let reaped = unsafe { nix::libc::syscall(nix::libc::SYS_process_mrelease, child.end.as_raw_fd(), 0) };
    Errno::result(reaped).map(drop)
}

/// Runs `body` with priority over everything else on the CPU it is on.
pub(crate) fn undisturbed<T>(body: impl FnOnce() -> T) -> Checked<T> {
    let policy = |policy, priority| {
        let parameters = nix::libc::sched_param { sched_priority: priority };
        // SAFETY: the structure lives through the call.
        Errno::result(unsafe { nix::libc::sched_setscheduler(0, policy, &parameters) })
            .doing("sched_setscheduler")
    };
    policy(nix::libc::SCHED_FIFO, 10)?;
    let result = body();
    policy(nix::libc::SCHED_OTHER, 0)?;
    Ok(result)
}

/// Waits for a process that is not this one's own child but was left to it (see `set_child_subreaper`).
pub(crate) fn wait_adopted(pid: Pid) -> Checked {
    let until = Instant::now() + BOUND;
    let mut pause = Pause::default();
    // It may be gone and reaped already, if it was left to PID 1; then the wait below says so.
    if let Ok(end) = pidfd(pid) {
        wait_readable(&[end.as_fd()], until)?;
    }
    while Instant::now() < until {
        match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => {}
            // Not left to this process yet: its parent still lives.
            Err(Errno::ECHILD) if kill(pid, None).is_ok() => {}
            other => return Err(Failure::Wrong(format!("the grandchild ended with {other:?}"))),
        }
        pause.take();
    }
    Err(Failure::Wrong(format!("process {pid} did not end within {BOUND:?}")))
}

/// Pauses between two looks at something: short at first, since most things take a millisecond.
#[derive(Debug)]
pub(crate) struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(Duration::from_micros(100))
    }
}

impl Pause {
    /// Sleeps, longer each time.
    pub(crate) fn take(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 3 / 2).min(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_heard_and_reaped() {
        let mut child = Child::spawn(|parent| {
            parent.ready(42);
            Ok(())
        })
        .unwrap();
        assert_eq!(child.wait_ready().unwrap(), 42);
        child.join().unwrap();
    }

    #[test]
    fn failures_panics_and_signals_are_told_apart() {
        let mut child = Child::spawn(|_| Err(Failure::wrong("no"))).unwrap();
        assert_eq!(child.join(), Err(Failure::wrong("no")));
        let mut child = Child::spawn(|_| {
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        })
        .unwrap();
        child.signal(Signal::SIGKILL).unwrap();
        child.join_killed(Signal::SIGKILL).unwrap();
        let mut child = Child::spawn(|parent| {
            parent.ready(0);
            Err(Failure::wrong("at once"))
        })
        .unwrap();
        assert_eq!(child.wait().unwrap(), Ended::Exited(FAILED));
        child.signal(Signal::SIGKILL).unwrap();
        assert_eq!(child.join_killed(Signal::SIGKILL), Err(Failure::wrong("at once")));
        let mut child = Child::spawn(|_| {
            std::panic::set_hook(Box::new(|_| {}));
            panic!("on purpose")
        })
        .unwrap();
        assert!(child.join().is_err());
    }
}
