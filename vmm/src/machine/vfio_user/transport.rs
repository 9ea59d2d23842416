// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole messages with their file descriptors over a stream socket, within fixed bounds.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::FromZeros;
use zerocopy::IntoBytes;

use super::wire::{Header, MAX_FDS, MAX_MESSAGE};

/// What came in.
#[derive(Debug)]
pub enum Incoming<'a> {
    /// A message.
    Message {
        /// Its header.
        header: Header,
        /// What follows it.
        body: &'a [u8],
        /// What came with it.
        fds: Vec<OwnedFd>,
    },
    /// A message beyond the bounds, read to its end and thrown away.
    Refused {
        /// Its header.
        header: Header,
        /// Why.
        errno: Errno,
    },
    /// The other side closed the connection between two messages.
    Closed,
}

/// One end of a connection.
///
/// Reads stop at each message's end, so that file descriptors belong to the message that they come with: the kernel joins the
/// bytes of neighbouring messages in one read, and then nobody could tell.
pub struct Transport {
    stream: UnixStream,
    body: Vec<u8>,
}

impl Transport {
    /// Over a connected socket.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, body: vec![0; MAX_MESSAGE] }
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// When the connection breaks, or the stream cannot be followed any further: a header shorter than a header, or an end within a
    /// message.
    pub fn receive(&mut self) -> io::Result<Incoming<'_>> {
        let mut header = Header::new_zeroed();
        let mut fds = Fds::default();
        if !fill(&self.stream, header.as_mut_bytes(), &mut fds, true)? {
            return Ok(Incoming::Closed);
        }
        let Some(left) = (header.size.get() as usize).checked_sub(Header::BYTES) else {
            return Err(io::Error::new(ErrorKind::InvalidData, "a message shorter than its header"));
        };
        if left + Header::BYTES > MAX_MESSAGE {
            let mut left = left;
            while left > 0 {
                let some = left.min(self.body.len());
                fill(&self.stream, &mut self.body[..some], &mut Fds::default(), false)?;
                left -= some;
            }
            return Ok(Incoming::Refused { header, errno: Errno::MSGSIZE });
        }
        let body = &mut self.body[..left];
        fill(&self.stream, body, &mut fds, false)?;
        if fds.too_many {
            return Ok(Incoming::Refused { header, errno: Errno::TOOBIG });
        }
        Ok(Incoming::Message { header, body, fds: fds.fds })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn send(&self, message: &[u8], file: Option<&File>) -> io::Result<()> {
        let mut fds = [self.stream.as_fd()];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(file) = file {
            fds[0] = file.as_fd();
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let mut rest = message;
        while !rest.is_empty() {
            match sendmsg(&self.stream, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    control.clear();
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Fds {
    fds: Vec<OwnedFd>,
    too_many: bool,
}

impl Fds {
    fn take(&mut self, control: &mut RecvAncillaryBuffer<'_>, flags: ReturnFlags) {
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if self.fds.len() > MAX_FDS || flags.contains(ReturnFlags::CTRUNC) {
            self.too_many = true;
            self.fds.clear();
        }
    }
}

/// Reads until `buffer` is full. `false` if the stream ended before the first byte and that is allowed.
fn fill(stream: &UnixStream, buffer: &mut [u8], fds: &mut Fds, end_allowed: bool) -> io::Result<bool> {
    let mut done = 0;
    while done < buffer.len() {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buffer[done..])];
        match recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => {
                fds.take(&mut control, message.flags);
                match message.bytes {
                    0 if done == 0 && end_allowed => return Ok(false),
                    0 => return Err(ErrorKind::UnexpectedEof.into()),
                    bytes => done += bytes,
                }
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(true)
}
