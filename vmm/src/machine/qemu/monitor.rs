// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's machine protocol (QMP) over an inherited socket.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use qapi::qmp::{self, Event, QmpCommand};
use qapi::{Command, Execute};
use serde_json::Value;

/// Longest line that is read; QEMU's longest events have some hundred bytes.
const MAX_LINE: u64 = 1 << 20;
/// Longest wait for an answer. QEMU answers from its main loop, which a guest's register access can hold up.
const PATIENCE: Duration = Duration::from_secs(10);

/// What QEMU has told of itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Story {
    /// Why it shut down: who asked and the reason's name.
    pub shutdown: Option<(bool, String)>,
    /// The guest reported a panic.
    pub panicked: bool,
}

/// The connection.
pub(super) struct Monitor {
    stream: UnixStream,
    answers: Receiver<Value>,
    story: Arc<Mutex<Story>>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Takes the connection over. Does not wait for QEMU.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        let story = Arc::new(Mutex::new(Story::default()));
        let (sender, answers) = channel();
        let reader = BufReader::new(stream.try_clone()?);
        let thread = std::thread::Builder::new().name("qemu-monitor".into()).spawn({
            let story = story.clone();
            move || follow(reader, &story, &sender)
        })?;
        let monitor = Self { stream, answers, story, thread: Some(thread) };
        // Commands are refused before this one; its answer need not be waited for.
        monitor.send(&qmp::qmp_capabilities { enable: None })?;
        Ok(monitor)
    }

    /// Carries a command out.
    pub(super) fn execute<C: QmpCommand>(&mut self, command: &C) -> io::Result<()> {
        while self.answers.try_recv().is_ok() {}
        self.send(command)?;
        loop {
            let answer = self.answers.recv_timeout(PATIENCE).map_err(|_| {
                io::Error::new(ErrorKind::TimedOut, format!("QEMU did not answer {}", C::NAME))
            })?;
            if answer["id"] != C::NAME {
                continue; // the answer to an earlier command that was given up
            }
            return match answer.get("error") {
                Some(error) => Err(io::Error::other(format!("{}: {error}", C::NAME))),
                None => Ok(()),
            };
        }
    }

    /// What happened, completely: waits for the end of the connection.
    pub(super) fn finish(&mut self) -> Story {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.story.lock().clone()
    }

    fn send<C: Command>(&self, command: &C) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Execute::<&C, &str>::with_id(command, C::NAME))?;
        line.push(b'\n');
        (&self.stream).write_all(&line)
    }
}

fn follow(mut reader: BufReader<UnixStream>, story: &Mutex<Story>, answers: &Sender<Value>) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        // A newer QEMU has events that the crate does not know; they tell nothing here.
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { continue };
        if message.get("event").is_some() {
            if let Ok(event) = serde_json::from_value::<Event>(message) {
                tell(&event, &mut story.lock());
            }
        } else if message.get("QMP").is_none() && answers.send(message).is_err() {
            return;
        }
    }
}

fn tell(event: &Event, story: &mut Story) {
    match event {
        Event::SHUTDOWN { data, .. } => {
            let reason =
                serde_json::to_value(data.reason).ok().and_then(|value| value.as_str().map(String::from));
            story.shutdown = Some((data.guest, reason.unwrap_or_default()));
        }
        Event::GUEST_PANICKED { .. } => story.panicked = true,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_events_and_answers() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut monitor = Monitor::new(ours).unwrap();
        let qemu = std::thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            (&theirs).write_all(b"{\"QMP\":{}}\r\n").unwrap();
            assert!(lines.next().unwrap().unwrap().contains("qmp_capabilities"));
            (&theirs).write_all(b"{\"return\":{},\"id\":\"qmp_capabilities\"}\r\nnonsense\r\n").unwrap();
            assert!(lines.next().unwrap().unwrap().contains("inject-nmi"));
            (&theirs)
                .write_all(b"{\"event\":\"FROM_THE_FUTURE\"}\n{\"return\":{},\"id\":\"inject-nmi\"}\n")
                .unwrap();
            assert!(lines.next().unwrap().unwrap().contains("inject-nmi"));
            (&theirs)
                .write_all(
                    b"{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"},\"id\":\"inject-nmi\"}\n",
                )
                .unwrap();
            let shutdown = r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}"#;
            (&theirs).write_all(shutdown.as_bytes()).unwrap();
        });
        monitor.execute(&qmp::inject_nmi {}).unwrap();
        assert!(monitor.execute(&qmp::inject_nmi {}).unwrap_err().to_string().contains("no"));
        qemu.join().unwrap();
        assert_eq!(monitor.finish().shutdown, Some((true, "guest-shutdown".into())));
    }
}
