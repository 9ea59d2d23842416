// SPDX-License-Identifier: MIT OR Apache-2.0
//! Frames on the line between the testbench outside and the one inside: a kind, a length, a body.
//!
//! The line is a byte stream that neither loses nor reorders. What comes out of the outer guest is trusted no more than what comes
//! out of any guest: lengths are bounded by kind before anything is allocated, and a body that is not what its kind says is an
//! error that ends the line.

use std::io::{self, ErrorKind, Read, Write};

use guest_protocol::Message;
use serde::{Deserialize, Serialize};
use vgpu::oracle::Violation;

use crate::machine::MachineExit;
use crate::report::results::Results;

/// Version of the frames; both ends are the same program, so another one means a mixed-up file.
pub const VERSION: u32 = 1;
/// Kind and length.
const HEADER: usize = 5;
/// Longest body of console bytes.
pub const MAX_LOG: usize = 64 << 10;
/// Longest event: a violation with its last events, or a message of the agent.
const MAX_EVENT: usize = 1 << 20;
/// Longest results: as many violations as are kept, and a console's tail.
const MAX_RESULTS: usize = 32 << 20;

/// What is said.
#[derive(Debug)]
pub enum Frame {
    /// Inside to outside: PID 1 of the outer guest runs.
    Hello(Hello),
    /// Inside to outside: still there. Comes every second from a thread that does nothing else.
    Alive,
    /// Inside to outside: something happened in the run.
    Event(Box<InnerEvent>),
    /// Inside to outside: what goes into the run's console.log.
    Log(Vec<u8>),
    /// Inside to outside: the next part of the run's trace. Before the results, and not at all if there is no oracle.
    Trace(Vec<u8>),
    /// Inside to outside: the run is over. The last frame from there.
    Results(Box<Results>),
    /// Inside to outside: how the machine ended that carries the outside's run. The last frame from there.
    Exit(Box<MachineExit>),
    /// Outside to inside: send that machine's processors a non-maskable interrupt.
    Nmi,
    /// Outside to inside: end the run in order.
    Interrupt,
    /// Outside to inside: the results have arrived, and the outer guest can be switched off.
    Received,
}

/// The first frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// `uname -r` of the outer guest.
    pub kernel: String,
}

/// The events that a run inside can have; all others are the outside's own.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum InnerEvent {
    /// A fact worth one line.
    Note {
        /// The line.
        text: String,
    },
    /// A console line of the guest.
    Console {
        /// The line.
        line: String,
    },
    /// The guest's agent said something.
    Guest {
        /// What.
        message: Message,
    },
    /// A violation was found.
    Violation {
        /// It.
        violation: Violation,
    },
}

const HELLO: u8 = 1;
const ALIVE: u8 = 2;
const EVENT: u8 = 3;
const LOG: u8 = 4;
const RESULTS: u8 = 5;
const INTERRUPT: u8 = 6;
const RECEIVED: u8 = 7;
const EXIT: u8 = 8;
const NMI: u8 = 9;
const TRACE: u8 = 10;

/// The longest body of a kind; none for a kind that does not exist.
fn longest(kind: u8) -> Option<usize> {
    match kind {
        HELLO => Some(4096),
        EVENT | EXIT => Some(MAX_EVENT),
        LOG | TRACE => Some(MAX_LOG),
        RESULTS => Some(MAX_RESULTS),
        ALIVE | INTERRUPT | RECEIVED | NMI => Some(0),
        _ => None,
    }
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.into())
}

impl Frame {
    /// The bytes that are sent.
    ///
    /// # Errors
    /// If the body is longer than its kind allows.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let json = |value: serde_json::Result<Vec<u8>>| value.map_err(io::Error::from);
        let (kind, body) = match self {
            Self::Hello(hello) => (HELLO, json(serde_json::to_vec(hello))?),
            Self::Alive => (ALIVE, Vec::new()),
            Self::Event(event) => (EVENT, json(serde_json::to_vec(event))?),
            Self::Log(bytes) => (LOG, bytes.clone()),
            Self::Trace(bytes) => (TRACE, bytes.clone()),
            Self::Results(results) => (RESULTS, json(serde_json::to_vec(results))?),
            Self::Exit(exit) => (EXIT, json(serde_json::to_vec(exit))?),
            Self::Nmi => (NMI, Vec::new()),
            Self::Interrupt => (INTERRUPT, Vec::new()),
            Self::Received => (RECEIVED, Vec::new()),
        };
        if longest(kind).is_none_or(|longest| body.len() > longest) {
            return Err(bad(format!("a frame of kind {kind} with {} bytes is too long", body.len())));
        }
        let length = u32::try_from(body.len()).map_err(|_| bad("a frame is too long"))?;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.push(kind);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Writes it.
    ///
    /// # Errors
    /// Those of the line.
    pub fn write(&self, line: &mut impl Write) -> io::Result<()> {
        line.write_all(&self.encode()?)
    }

    /// Reads the next one; none at the line's orderly end.
    ///
    /// # Errors
    /// Those of the line; `InvalidData` for what is no frame.
    pub fn read(line: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        let first = loop {
            match line.read(&mut header[..1]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        line.read_exact(&mut header[1..])?;
        let kind = header[0];
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        match longest(kind) {
            None => return Err(bad(format!("there is no frame of kind {kind}"))),
            Some(longest) if length > longest => {
                return Err(bad(format!("a frame of kind {kind} claims {length} bytes")));
            }
            Some(_) => {}
        }
        let mut body = vec![0; length];
        line.read_exact(&mut body)?;
        Self::decode(kind, body).map(Some)
    }

    fn decode(kind: u8, body: Vec<u8>) -> io::Result<Self> {
        let no_json = |error: serde_json::Error| bad(format!("a frame of kind {kind}: {error}"));
        Ok(match kind {
            HELLO => Self::Hello(serde_json::from_slice(&body).map_err(no_json)?),
            ALIVE => Self::Alive,
            EVENT => Self::Event(Box::new(serde_json::from_slice(&body).map_err(no_json)?)),
            LOG => Self::Log(body),
            TRACE => Self::Trace(body),
            RESULTS => Self::Results(Box::new(serde_json::from_slice(&body).map_err(no_json)?)),
            EXIT => Self::Exit(Box::new(serde_json::from_slice(&body).map_err(no_json)?)),
            NMI => Self::Nmi,
            INTERRUPT => Self::Interrupt,
            RECEIVED => Self::Received,
            _ => return Err(bad("no such kind")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::tests::sample;
    use proptest::prelude::*;
    use vgpu::oracle::Rule;

    fn back(frame: &Frame) -> Frame {
        let bytes = frame.encode().unwrap();
        let mut rest = bytes.as_slice();
        let read = Frame::read(&mut rest).unwrap().unwrap();
        assert!(rest.is_empty());
        read
    }

    #[test]
    fn frames_are_read_back() {
        let hello = Hello { version: VERSION, kernel: "7.3".into() };
        assert!(matches!(back(&Frame::Hello(hello.clone())), Frame::Hello(read) if read == hello));
        assert!(matches!(back(&Frame::Alive), Frame::Alive));
        assert!(matches!(back(&Frame::Interrupt), Frame::Interrupt));
        assert!(matches!(back(&Frame::Received), Frame::Received));
        assert!(matches!(back(&Frame::Log(vec![0, 255, 10])), Frame::Log(bytes) if bytes == [0, 255, 10]));
        assert!(matches!(back(&Frame::Trace(vec![0, 255])), Frame::Trace(bytes) if bytes == [0, 255]));
        assert!(
            matches!(back(&Frame::Results(Box::new(sample()))), Frame::Results(read) if *read == sample())
        );
        let mut violation = Violation::new(Rule::ReleaseLate, "left");
        violation.address = Some(u64::MAX);
        let Frame::Event(event) = back(&Frame::Event(Box::new(InnerEvent::Violation { violation }))) else {
            panic!("no event");
        };
        let InnerEvent::Violation { violation } = *event else { panic!("no violation") };
        assert_eq!((violation.rule, violation.address), (Rule::ReleaseLate, Some(u64::MAX)));
    }

    #[test]
    fn the_end_between_frames_is_an_end_and_within_one_an_error() {
        assert!(Frame::read(&mut [].as_slice()).unwrap().is_none());
        let bytes = Frame::Log(vec![1; 10]).encode().unwrap();
        for cut in 1..bytes.len() {
            assert_eq!(
                Frame::read(&mut &bytes[..cut]).unwrap_err().kind(),
                ErrorKind::UnexpectedEof,
                "{cut}"
            );
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_read() {
        for kind in [HELLO, ALIVE, EVENT, LOG, TRACE, RESULTS, INTERRUPT, RECEIVED, 0, 8, 255] {
            let bytes = [kind, 255, 255, 255, 255];
            assert_eq!(
                Frame::read(&mut bytes.as_slice()).unwrap_err().kind(),
                ErrorKind::InvalidData,
                "{kind}"
            );
        }
        assert!(Frame::Log(vec![0; MAX_LOG + 1]).encode().is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..9u8) {
            let _ = Frame::read(&mut bytes.as_slice());
            let mut framed = vec![kind];
            framed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            framed.extend_from_slice(&bytes);
            let _ = Frame::read(&mut framed.as_slice());
        }
    }
}
