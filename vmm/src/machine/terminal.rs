// SPDX-License-Identifier: MIT OR Apache-2.0
//! The console on this terminal: raw mode for as long as it lasts, whatever ends it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// The key before a command, as in QEMU: Ctrl-A.
const ESCAPE: u8 = 0x01;
/// Ends the machine, after [`ESCAPE`].
const QUIT: u8 = b'x';

/// The terminal while it is the guest's. Dropping it gives it back.
pub(super) struct Terminal {
    raw: Option<Raw>,
    wake: Arc<OwnedFd>,
    input: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Hands this terminal's keys to `console`, and calls `quit` on Ctrl-A x.
    pub(super) fn attach(console: UnixStream, quit: impl Fn() + Send + 'static) -> io::Result<Self> {
        let raw = Raw::enter()?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let input = std::thread::Builder::new().name("console-input".into()).spawn({
            let wake = wake.clone();
            move || {
                if matches!(forward(console, &wake), Ok(true)) {
                    quit();
                }
            }
        })?;
        Ok(Self { raw, wake, input: Some(input) })
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        if let Some(input) = self.input.take() {
            let _ = input.join();
        }
        drop(self.raw.take());
    }
}

/// Copies keys until told to stop (`false`) or asked to quit (`true`).
fn forward(mut console: UnixStream, wake: &OwnedFd) -> io::Result<bool> {
    let mut stdin = io::stdin();
    let (mut keys, mut escaped) = ([0; 256], false);
    loop {
        let stdin_fd = stdin.as_fd().try_clone_to_owned()?;
        let mut fds = [PollFd::new(wake, PollFlags::IN), PollFd::new(&stdin_fd, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(false);
        }
        let count = stdin.read(&mut keys)?;
        if count == 0 {
            return Ok(false);
        }
        let mut plain = Vec::with_capacity(count);
        for key in &keys[..count] {
            match (std::mem::take(&mut escaped), *key) {
                (true, QUIT) => return Ok(true),
                (false, ESCAPE) => escaped = true,
                (_, key) => plain.push(key),
            }
        }
        console.write_all(&plain)?;
    }
}

/// Raw mode of standard input. Given back when dropped, which unwinding does too, and on signals that end the process.
struct Raw {
    saved: Termios,
    signals: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Raw {
    /// `None` if standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let saved = tcgetattr(&stdin)?;
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])?;
        let handle = signals.handle();
        let thread = std::thread::Builder::new().name("terminal".into()).spawn({
            let saved = saved.clone();
            move || {
                if let Some(signal) = signals.forever().next() {
                    let _ = tcsetattr(io::stdin(), OptionalActions::Now, &saved);
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
            }
        })?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { saved, signals: handle, thread: Some(thread) }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.saved);
        self.signals.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
