// SPDX-License-Identifier: MIT OR Apache-2.0
//! The QEMU process: started and reaped by one thread of its own.
//!
//! The kernel sends the parent-death signal when the *thread* that forked is gone, so that thread must stay for as long as QEMU
//! runs: it is the one that waits for it.

use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::process::die_with_parent;

/// How much of its error output is kept.
const TAIL_BYTES: usize = 16 << 10;

/// A started process.
pub(super) struct Process {
    pid: u32,
    handle: Arc<OwnedFd>,
    ended: Arc<Ended>,
    supervisor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Ended {
    /// How, and the end of what it said.
    outcome: Mutex<Option<(String, bool, String)>>,
    changed: Condvar,
}

/// Kills the process without waiting, from anywhere.
#[derive(Clone)]
pub(super) struct Killer(Arc<OwnedFd>);

impl Killer {
    pub(super) fn kill(&self) {
        let _ = pidfd_send_signal(&*self.0, Signal::KILL);
    }
}

impl Process {
    /// Starts it. `inherited` are open in the child under their own numbers.
    pub(super) fn start(command: Command, inherited: Vec<OwnedFd>) -> io::Result<Self> {
        let ended = Arc::new(Ended::default());
        let (sender, receiver) = sync_channel(1);
        let supervisor = std::thread::Builder::new().name("qemu-supervisor".into()).spawn({
            let ended = ended.clone();
            move || {
                let started = spawn(command, &inherited);
                // The child has its own now; ours would hide its end from us.
                drop(inherited);
                match started {
                    Ok((child, handle)) => {
                        let _ = sender.send(Ok((child.id(), handle)));
                        supervise(child, &ended);
                    }
                    Err(error) => drop(sender.send(Err(error))),
                }
            }
        })?;
        match receiver.recv() {
            Ok(Ok((pid, handle))) => {
                Ok(Self { pid, handle: Arc::new(handle), ended, supervisor: Some(supervisor) })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the supervising thread is gone")),
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn killer(&self) -> Killer {
        Killer(self.handle.clone())
    }

    /// Waits for its end: what happened, whether it was a success, and the end of its error output.
    pub(super) fn wait(&self, timeout: Duration) -> Option<(String, bool, String)> {
        let deadline = Instant::now().checked_add(timeout);
        let mut outcome = self.ended.outcome.lock();
        while outcome.is_none() {
            match deadline {
                None => self.ended.changed.wait(&mut outcome),
                Some(deadline) => {
                    if self.ended.changed.wait_until(&mut outcome, deadline).timed_out() {
                        break;
                    }
                }
            }
        }
        outcome.clone()
    }

    /// Ends it and waits until it is reaped.
    pub(super) fn kill(&mut self) {
        self.killer().kill();
        if let Some(supervisor) = self.supervisor.take() {
            let _ = supervisor.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(mut command: Command, inherited: &[OwnedFd]) -> io::Result<(Child, OwnedFd)> {
    // A group of its own: Ctrl-C on the terminal is for us to answer.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    die_with_parent(&mut command);
    keep_open(&mut command, inherited)?;
    let mut child = command.spawn()?;
    let handle = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("no process number"))
        .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
    match handle {
        Ok(handle) => Ok((child, handle)),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// Lets the child keep these. They are closed on exec in this process, so that no other child gets them by accident.
fn keep_open(command: &mut Command, inherited: &[OwnedFd]) -> io::Result<()> {
    use rustix::io::{FdFlags, fcntl_setfd};
    use std::os::fd::AsRawFd;
    let numbers: Vec<_> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
    let keep = move || {
        for number in &numbers {
            // SAFETY: `Process::start` holds the descriptors until the child has started, so the numbers are theirs.
            #[allow(unsafe_code, reason = "descriptors are known by number on the far side of fork")]
            let fd = unsafe { BorrowedFd::borrow_raw(*number) };
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor takes locks.
    #[allow(unsafe_code, reason = "the only way to pass descriptors on")]
    unsafe {
        command.pre_exec(keep);
    }
    Ok(())
}

/// Collects the end of the error output, then the status.
fn supervise(mut child: Child, ended: &Ended) {
    let mut tail = Vec::new();
    if let Some(mut stderr) = child.stderr.take() {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = stderr.read(&mut buffer) {
            tail.extend_from_slice(&buffer[..count]);
            tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
        }
    }
    let (status, success) = match child.wait() {
        Ok(status) => (describe(status), status.success()),
        Err(error) => (format!("was lost: {error}"), false),
    };
    let tail = String::from_utf8_lossy(&tail).trim_end().to_owned();
    *ended.outcome.lock() = Some((status, success, tail));
    ended.changed.notify_all();
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => match signal_hook::low_level::signal_name(signal) {
            Some(name) => format!("was killed by {name}"),
            None => format!("was killed by signal {signal}"),
        },
        (None, None) => "ended".to_owned(),
    }
}
