// SPDX-License-Identifier: MIT OR Apache-2.0
//! The thread that serves one function to one client.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::net::{Shutdown, shutdown};
use zerocopy::IntoBytes;

use super::interrupts::Interrupts;
use super::session::Session;
use super::transport::{Incoming, Transport};
use crate::machine::FunctionSlot;

/// Where the client comes from.
#[derive(Debug)]
pub enum Connection {
    /// The first client that connects here; nobody else is let in.
    Listener(UnixListener),
    /// It is there already.
    Stream(UnixStream),
}

/// A running server. Dropping it stops it.
pub struct Server {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// How another thread ends the server, wherever it is blocked.
#[derive(Default)]
struct Stop {
    stopping: AtomicBool,
    /// What the thread is blocked on: the listener, then the connection. Shutting either down wakes it.
    socket: Mutex<Option<OwnedFd>>,
}

impl Stop {
    /// Makes `socket` the one to shut down; `false` if it is too late for that.
    fn watch(&self, socket: impl AsFd) -> io::Result<bool> {
        *self.socket.lock() = Some(socket.as_fd().try_clone_to_owned()?);
        Ok(!self.stopping.load(Ordering::SeqCst))
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        if let Some(socket) = &*self.socket.lock() {
            let _ = shutdown(socket, Shutdown::Both);
        }
    }
}

impl Server {
    /// Starts serving.
    ///
    /// # Errors
    /// If the thread or its file descriptors cannot be made.
    pub fn start(slot: FunctionSlot, connection: Connection) -> io::Result<Self> {
        let interrupts = Interrupts::new(slot.function.vectors(), slot.function.has_msix());
        let session = Session::new(slot.function, slot.memory, interrupts.clone())?;
        slot.interrupts.attach(interrupts);
        let stop = Arc::new(Stop::default());
        match &connection {
            Connection::Listener(listener) => stop.watch(listener)?,
            Connection::Stream(stream) => stop.watch(stream)?,
        };
        let thread = std::thread::Builder::new().name(format!("vfio-{}", slot.name)).spawn({
            let stop = stop.clone();
            move || run(connection, session, &stop)
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Waits until the client has gone.
    ///
    /// # Errors
    /// What broke the connection, if the client did not just close it.
    pub fn join(&mut self) -> io::Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(io::Error::other("the thread of the server panicked")),
        }
    }

    /// Ends the conversation and does not wait for that: what the client asked last may still be under way.
    pub fn hang_up(&self) {
        self.stop.stop();
    }

    /// Whether the server's thread has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the conversation.
    ///
    /// # Errors
    /// As [`Server::join`].
    pub fn stop(&mut self) -> io::Result<()> {
        self.stop.stop();
        self.join()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn run(connection: Connection, session: Session, stop: &Stop) -> io::Result<()> {
    let stopped = |error| if stop.stopping.load(Ordering::SeqCst) { Ok(()) } else { Err(error) };
    let stream = match connection {
        Connection::Stream(stream) => stream,
        Connection::Listener(listener) => match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => return stopped(error),
        },
    };
    if !stop.watch(&stream)? {
        return Ok(());
    }
    let mut closing = Closing { session, stop };
    serve(&mut Transport::new(stream), &mut closing.session).or_else(stopped)
}

/// Takes back what the client gave, and then hangs up, on every way out, a panic included.
struct Closing<'a> {
    session: Session,
    stop: &'a Stop,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.session.close();
        // The last duplicate of the connection: without this the client would wait for answers for ever.
        *self.stop.socket.lock() = None;
    }
}

fn serve(transport: &mut Transport, session: &mut Session) -> io::Result<()> {
    let mut reply = Vec::new();
    loop {
        let file = match transport.receive()? {
            Incoming::Closed => return Ok(()),
            // Replies: this server asks for nothing.
            Incoming::Message { header, .. } | Incoming::Refused { header, .. } if !header.is_request() => {
                continue;
            }
            Incoming::Message { header, body, fds } => session.handle(header, body, fds, &mut reply),
            Incoming::Refused { header, errno } => {
                reply.clear();
                if header.wants_reply() {
                    reply.extend_from_slice(header.failure(errno).as_bytes());
                }
                None
            }
        };
        if !reply.is_empty() {
            transport.send(&reply, file)?;
        }
    }
}
