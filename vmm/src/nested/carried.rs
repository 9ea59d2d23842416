// SPDX-License-Identifier: MIT OR Apache-2.0
//! `--nested --vfio gpu`: our own functions handed over.
//!
//! Device, witness, oracle and session stay on this host, as with `--machine qemu`: the outer QEMU shows both functions to the
//! outer guest over vfio-user, behind its IOMMU. The machine inside hands them on to its guest and is a mere carrier: it says
//! what comes on the console, and how its guest ended. To the session all of it is one machine, [`Carried`].
//!
//! One lock, a leaf: what the inside has said.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::frame::Frame;
use super::frame::InnerEvent;
use super::outside::{BOOT, LAST_WORDS, OuterConsole, SILENCE, start_outer};
use super::{Errand, image};
use crate::event::{Event, EventSink};
use crate::failure::{Failure, Result};
use crate::machine::{ConsoleSink, Machine, MachineConfig, MachineExit};
use crate::provision::Kernel;
use crate::runner::RunConfig;
use crate::runner::parts::Parts;
use crate::runner::untrusted;

/// How often a waiting caller looks.
const TICK: Duration = Duration::from_millis(10);

/// Notes of the inside that are passed on. It has a few words about its devices to say, and the host makes all the others.
const MOST_NOTES: usize = 20;

/// What the outer guest is made of, beside the run's own parts.
pub(crate) struct Outer {
    /// Its kernel.
    pub kernel: Kernel,
    /// Where its console goes.
    pub log: Option<File>,
    /// Where what it notes goes.
    pub events: Arc<dyn EventSink>,
}

impl Outer {
    /// Boots the outer guest, which starts the machine that `machine` says.
    pub(crate) fn start(
        self,
        config: &RunConfig,
        parts: &Parts,
        machine: MachineConfig,
    ) -> Result<Box<dyn Machine>> {
        let MachineConfig { mut initramfs, functions, console, .. } = machine;
        let image = image::build(Errand::Run, config, parts, &self.kernel, &mut initramfs, parts.qemu()?)?;
        drop(initramfs);
        let trouble = |error: std::io::Error| Failure::environment(format!("no line: {error}"));
        let (line, theirs) = UnixStream::pair().map_err(trouble)?;
        let reader = line.try_clone().map_err(trouble)?;
        let outer_console = Arc::new(Mutex::new(OuterConsole::new(self.log)));
        let sink: ConsoleSink = Box::new(move |bytes| outer_console.lock().feed(bytes));
        let outer = start_outer(config, parts, &self.kernel, image, theirs, functions, sink)?;
        let said =
            Arc::new(Mutex::new(Said { exit: None, hello: false, heard: Instant::now(), broken: None }));
        let reader = std::thread::Builder::new()
            .name("nested-line".into())
            .spawn({
                let (said, events) = (Arc::clone(&said), self.events);
                move || listen(reader, console, &said, events.as_ref())
            })
            .map_err(|error| Failure::environment(format!("cannot start a thread: {error}")))?;
        Ok(Box::new(Carried { outer, line, said, reader: Some(reader), told: None, exit: None }))
    }
}

/// What the inside has said.
struct Said {
    exit: Option<MachineExit>,
    hello: bool,
    heard: Instant,
    broken: Option<String>,
}

/// Follows the line to its end.
fn listen(mut line: UnixStream, mut console: ConsoleSink, said: &Mutex<Said>, events: &dyn EventSink) {
    let mut notes = 0;
    loop {
        let frame = match Frame::read(&mut line) {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error) => {
                said.lock().broken = Some(format!("the line to the outer guest broke: {error}"));
                return;
            }
        };
        match &frame {
            Frame::Log(bytes) => console(bytes),
            Frame::Event(event) => {
                if let (InnerEvent::Note { text }, true) = (event.as_ref(), notes < MOST_NOTES) {
                    let mut text = text.clone();
                    untrusted::tame_text(&mut text);
                    notes += 1;
                    events.event(Event::Note { text });
                }
            }
            _ => {}
        }
        let mut said = said.lock();
        // After the console has been taken: a guest that had to wait for that was not silent.
        said.heard = Instant::now();
        match frame {
            Frame::Hello(_) => said.hello = true,
            Frame::Exit(mut exit) => {
                untrusted::tame_exit(&mut exit);
                said.exit = Some(*exit);
            }
            _ => {}
        }
    }
}

/// The machine in the outer guest, and the outer guest.
struct Carried {
    outer: Box<dyn Machine>,
    line: UnixStream,
    said: Arc<Mutex<Said>>,
    reader: Option<JoinHandle<()>>,
    /// When the inside was told that its last word has arrived.
    told: Option<Instant>,
    exit: Option<MachineExit>,
}

impl Carried {
    fn look(&mut self) -> Option<MachineExit> {
        if self.exit.is_some() {
            return self.exit.clone();
        }
        let outer = self.outer.wait(Duration::ZERO);
        let said = self.said.lock();
        let patience = if said.hello { SILENCE } else { BOOT };
        let silent = said.heard.elapsed() >= patience;
        let (over, broken) = (said.exit.is_some(), said.broken.clone());
        drop(said);
        if over && self.told.is_none() {
            // An outer guest that is gone already was told, or does not care.
            let _ = Frame::Received.write(&mut self.line);
            self.told = Some(Instant::now());
        }
        let late = self.told.is_some_and(|told| told.elapsed() >= LAST_WORDS);
        let died = |status: String, stderr_tail| Some(MachineExit::Died { status, stderr_tail });
        let otherwise = match outer {
            Some(MachineExit::PoweredOff) => {
                died("the outer guest switched itself off without a word".into(), String::new())
            }
            Some(MachineExit::Died { status, stderr_tail }) => {
                died(format!("the outer guest: {status}"), stderr_tail)
            }
            None if broken.is_some() => died(broken.unwrap_or_default(), String::new()),
            None if silent => {
                died(format!("the outer guest said nothing for {} s", patience.as_secs()), String::new())
            }
            None if late => None,
            None => return None,
        };
        self.finish();
        let said = self.said.lock().exit.take();
        self.exit = said.or(otherwise);
        self.exit.clone()
    }

    /// Ends the outer guest, and takes the rest of what it said.
    fn finish(&mut self) {
        self.outer.kill();
        if let Some(reader) = self.reader.take() {
            // The guest's end of the line went with it.
            let _ = reader.join();
        }
    }
}

impl Machine for Carried {
    fn wait(&mut self, timeout: Duration) -> Option<MachineExit> {
        let begin = Instant::now();
        loop {
            let exit = self.look();
            if exit.is_some() || begin.elapsed() >= timeout {
                return exit;
            }
            std::thread::sleep(TICK);
        }
    }

    fn kill(&mut self) {
        self.finish();
        let exit = || MachineExit::Died { status: "killed".into(), stderr_tail: String::new() };
        self.exit.get_or_insert_with(exit);
    }

    fn nmi(&mut self) -> Result<()> {
        Frame::Nmi.write(&mut self.line).map_err(|error| {
            Failure::inconclusive(format!("cannot ask the outer guest to send an interrupt: {error}"))
        })
    }

    fn pid(&self) -> Option<u32> {
        self.outer.pid()
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.finish();
    }
}
