// SPDX-License-Identifier: MIT OR Apache-2.0
//! The serial port COM1 and the console behind it.
//!
//! A processor that writes puts the byte into a bounded queue; a thread of its own hands the queue to the console's sink, so
//! that a slow sink stops the guest only when the queue is full. Keys come through a socket and wait for room in the port.
//!
//! Locks, in order: [`Serial::port`], then [`Queue::state`] or [`Room::full`].

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::machine::ConsoleSink;

/// Bytes that the guest can be ahead of the sink.
const QUEUE: usize = 64 << 10;
/// A line that does not end is handed on after this.
const PATIENCE: Duration = Duration::from_millis(20);
/// Bytes that are handed on even without a line's end.
const CHUNK: usize = 512;

#[derive(Default)]
struct QueueState {
    bytes: VecDeque<u8>,
    /// Nothing comes any more: what is there is delivered, and then it ends.
    closed: bool,
}

/// What the guest has said and nobody has heard yet.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    readable: Condvar,
    writable: Condvar,
}

impl Queue {
    /// Adds what the guest says; waits for room unless the queue is closed.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut state = self.state.lock();
        for &byte in bytes {
            while state.bytes.len() >= QUEUE && !state.closed {
                self.readable.notify_one();
                self.writable.wait(&mut state);
            }
            if state.closed {
                return;
            }
            state.bytes.push_back(byte);
        }
        if state.bytes.back() == Some(&b'\n') || state.bytes.len() >= CHUNK {
            self.readable.notify_one();
        }
    }

    /// Adds what the machine says on lines of its own, as far as there is room: waits for nobody.
    pub(super) fn say(&self, text: &str) {
        let mut state = self.state.lock();
        let room = QUEUE.saturating_sub(state.bytes.len());
        if !state.closed {
            state.bytes.extend(b"\n".iter().chain(text.as_bytes()).take(room));
        }
        self.readable.notify_one();
    }

    /// Nobody will say anything any more.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.readable.notify_one();
        self.writable.notify_all();
    }

    /// Everything that is there, waiting for something; `None` at the end.
    fn take(&self) -> Option<Vec<u8>> {
        let mut state = self.state.lock();
        // A byte that ends no line wakes nobody, so this also looks by itself.
        while state.bytes.is_empty() {
            if state.closed {
                return None;
            }
            self.readable.wait_for(&mut state, PATIENCE);
        }
        let bytes = state.bytes.drain(..).collect();
        self.writable.notify_all();
        Some(bytes)
    }

    /// Hands everything to the sink until the queue is closed. With `show`, to the terminal first.
    pub(super) fn deliver(&self, mut sink: ConsoleSink, show: bool) {
        let terminal = io::stdout();
        while let Some(bytes) = self.take() {
            if show {
                let mut terminal = terminal.lock();
                let _ = terminal.write_all(&bytes).and_then(|()| terminal.flush());
            }
            sink(&bytes);
        }
    }
}

/// The queue as the port's output.
struct Output(Arc<Queue>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's interrupt.
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        // The only failure is a counter at its end, and then KVM has yet to see the earlier signals.
        let _ = self.0.write(1);
        Ok(())
    }
}

/// Wakes whoever has more keys than the port has room.
#[derive(Default)]
struct Room {
    full: Mutex<bool>,
    changed: Condvar,
    ended: AtomicBool,
}

struct Events(Arc<Room>);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        *self.0.full.lock() = false;
        self.0.changed.notify_all();
    }
}

/// The port.
pub(super) struct Serial {
    port: Mutex<vm_superio::Serial<Irq, Events, Output>>,
    room: Arc<Room>,
}

impl Serial {
    /// A port that signals `interrupt` and talks to `queue`.
    pub(super) fn new(interrupt: EventFd, queue: Arc<Queue>) -> Arc<Self> {
        let room = Arc::new(Room::default());
        let port = vm_superio::Serial::with_events(Irq(interrupt), Events(Arc::clone(&room)), Output(queue));
        Arc::new(Self { port: Mutex::new(port), room })
    }

    /// A read of one of the eight registers.
    pub(super) fn read(&self, register: u8) -> u8 {
        self.port.lock().read(register & 7)
    }

    /// A write to one of the eight registers.
    pub(super) fn write(&self, register: u8, value: u8) {
        // In loopback mode a guest can fill the port; it loses bytes then, as with a real one.
        let _ = self.port.lock().write(register & 7, value);
    }

    /// Feeds keys to the guest until the socket ends or the machine does.
    pub(super) fn feed(&self, mut keys: UnixStream) {
        let mut buffer = [0; 64];
        while let Ok(count) = keys.read(&mut buffer) {
            let mut rest = &buffer[..count];
            if rest.is_empty() {
                return;
            }
            while !rest.is_empty() {
                // Set before the port is tried: it may be emptied right after.
                *self.room.full.lock() = true;
                let taken = self.port.lock().enqueue_raw_bytes(rest).unwrap_or(0);
                rest = rest.get(taken..).unwrap_or_default();
                let mut full = self.room.full.lock();
                while !rest.is_empty() && *full {
                    if self.room.ended.load(Ordering::SeqCst) {
                        return;
                    }
                    self.room.changed.wait_for(&mut full, Duration::from_millis(100));
                }
            }
        }
    }

    /// Lets a thread in [`Self::feed`] go.
    pub(super) fn end(&self) {
        self.room.ended.store(true, Ordering::SeqCst);
        self.room.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn port() -> (Arc<Serial>, Arc<Queue>, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let queue = Arc::new(Queue::default());
        (Serial::new(interrupt.try_clone().unwrap(), queue.clone()), queue, interrupt)
    }

    #[test]
    fn all_that_is_said_is_delivered() {
        let (serial, queue, _interrupt) = port();
        let (sender, receiver) = channel();
        let deliver = std::thread::spawn({
            let queue = queue.clone();
            move || queue.deliver(Box::new(move |bytes| sender.send(bytes.to_vec()).unwrap()), false)
        });
        // More than the queue holds.
        let said: Vec<u8> = (0..3 * QUEUE).map(|i| i as u8).collect();
        for byte in &said {
            serial.write(0, *byte);
        }
        queue.close();
        deliver.join().unwrap();
        assert_eq!(receiver.iter().flatten().collect::<Vec<_>>(), said);
        serial.write(0, b'x');
    }

    #[test]
    fn keys_wait_for_room() {
        let (serial, _queue, interrupt) = port();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let feed = std::thread::spawn({
            let serial = serial.clone();
            move || serial.feed(theirs)
        });
        serial.write(1, 1);
        let typed: Vec<u8> = (0..500_u32).map(|i| i as u8).collect();
        (&ours).write_all(&typed).unwrap();
        let mut seen = Vec::new();
        while seen.len() < typed.len() {
            if serial.read(5) & 1 != 0 {
                seen.push(serial.read(0));
            }
        }
        assert_eq!(seen, typed);
        assert!(interrupt.read().is_ok());
        drop(ours);
        feed.join().unwrap();
    }

    #[test]
    fn nobody_waits_at_the_end() {
        let (serial, _queue, _interrupt) = port();
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&ours).write_all(&[0; 300]).unwrap();
        let feed = std::thread::spawn({
            let serial = serial.clone();
            move || serial.feed(theirs)
        });
        std::thread::sleep(Duration::from_millis(20));
        serial.end();
        drop(ours);
        feed.join().unwrap();
    }

    proptest! {
        #[test]
        fn hostile_accesses(accesses in prop::collection::vec((any::<u8>(), any::<Option<u8>>()), 0..300)) {
            let (serial, queue, _interrupt) = port();
            for (register, value) in accesses {
                match value {
                    Some(value) => serial.write(register, value),
                    None => drop(serial.read(register)),
                }
            }
            prop_assert!(queue.state.lock().bytes.len() <= QUEUE);
        }
    }
}
