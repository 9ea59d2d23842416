// SPDX-License-Identifier: MIT OR Apache-2.0
//! What benchmarks that start machines have in common: a console that is listened to, and a QEMU started as one would by hand.

use std::fs::File;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use crate::failure::{Failure, Result};
use crate::machine::ConsoleSink;
use crate::process::{die_with_parent, last_lines};

/// A guest that has not said what it is waited for by now is lost, on any machine and however much else the host does.
const PATIENCE: Duration = Duration::from_secs(900);
/// Console lines shown of a lost guest.
const TAIL_LINES: usize = 30;

/// Some bytes of a console, and when they came.
struct Heard {
    at: Instant,
    bytes: Vec<u8>,
}

/// Where a console is listened to.
pub(super) struct Ear {
    heard: Receiver<Heard>,
    seen: Vec<u8>,
    /// How much of `seen` was looked through.
    taken: usize,
}

/// Where a console's bytes go.
pub(super) struct Mouth(Sender<Heard>);

/// A way from a console to who waits for its words.
pub(super) fn listen() -> (Mouth, Ear) {
    let (sender, heard) = channel();
    (Mouth(sender), Ear { heard, seen: Vec::new(), taken: 0 })
}

impl Mouth {
    fn say(&self, bytes: &[u8]) {
        // Nobody listens any more when the machine is being ended.
        let _ = self.0.send(Heard { at: Instant::now(), bytes: bytes.to_vec() });
    }

    /// For a machine of ours.
    pub(super) fn sink(self) -> ConsoleSink {
        Box::new(move |bytes| self.say(bytes))
    }

    /// For a program's output, until it ends.
    fn follow(self, mut output: File) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            self.say(&buffer[..count]);
        }
    }
}

impl Ear {
    /// Waits for `words`; when they came. What was before them is not heard again.
    pub(super) fn wait_for(&mut self, words: &[u8], interrupted: &AtomicBool) -> Result<Instant> {
        let began = Instant::now();
        let mut at = began;
        loop {
            let rest = &self.seen[self.taken..];
            if let Some(place) = rest.windows(words.len()).position(|window| window == words) {
                self.taken += place + words.len();
                return Ok(at);
            }
            if began.elapsed() > PATIENCE {
                return Err(self.lost());
            }
            match self.heard.recv_timeout(Duration::from_millis(100)) {
                Ok(heard) => {
                    self.seen.extend(heard.bytes);
                    at = heard.at;
                }
                Err(RecvTimeoutError::Timeout) if interrupted.load(Ordering::Relaxed) => {
                    return Err(Failure::inconclusive("interrupted"));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.lost()),
            }
        }
    }

    /// Waits for the rest of a line that begins with `words`.
    pub(super) fn line(&mut self, words: &[u8], interrupted: &AtomicBool) -> Result<String> {
        self.wait_for(words, interrupted)?;
        self.rest_of_line(interrupted)
    }

    /// Waits for the rest of the line of which the beginning was waited for.
    pub(super) fn rest_of_line(&mut self, interrupted: &AtomicBool) -> Result<String> {
        let from = self.taken;
        self.wait_for(b"\n", interrupted)?;
        Ok(String::from_utf8_lossy(&self.seen[from..self.taken]).trim().to_owned())
    }

    fn lost(&self) -> Failure {
        let mut failure = Failure::inconclusive("a guest was lost before it said what was waited for");
        failure.console_tail = last_lines(&String::from_utf8_lossy(&self.seen), TAIL_LINES);
        failure
    }
}

/// A QEMU started by hand; ended when dropped.
pub(super) struct Running(Child);

impl Running {
    /// Starts it; what it says and what its guest says on its standard output goes to `mouth`.
    pub(super) fn start(mut command: Command, mouth: Mouth) -> Result<Self> {
        let fail = |error: std::io::Error| Failure::environment(format!("cannot start QEMU: {error}"));
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| fail(errno.into()))?;
        command.stdin(Stdio::null()).stderr(writer.try_clone().map_err(fail)?).stdout(writer);
        let running = Self(die_with_parent(&mut command).spawn().map_err(fail)?);
        // Its copies of the writing end would keep the console open.
        drop(command);
        std::thread::spawn(move || mouth.follow(File::from(reader)));
        Ok(running)
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_heard_in_pieces_and_once() {
        let never = AtomicBool::new(false);
        let (mouth, mut ear) = listen();
        mouth.say(b"[    0.1] Linux hmm-test version\r\nhmm-te");
        mouth.say(b"stbench: 17\r\nhmm-");
        assert_eq!(ear.line(b"hmm-testbench: ", &never).unwrap(), "17");
        drop(mouth);
        let failure = ear.wait_for(b"hmm-testbench: ", &never).unwrap_err();
        assert!(failure.console_tail.iter().any(|line| line.contains("hmm-test version")), "{failure}");
    }

    #[test]
    fn what_a_program_says_is_heard() {
        let never = AtomicBool::new(false);
        let (mouth, mut ear) = listen();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2"]);
        let _running = Running::start(command, mouth).unwrap();
        ear.wait_for(b"one\n", &never).unwrap();
        ear.wait_for(b"two\n", &never).unwrap();
        assert!(ear.wait_for(b"three", &never).is_err());
    }
}
