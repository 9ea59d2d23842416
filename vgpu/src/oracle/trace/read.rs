// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading a trace's file, block by block.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::super::input::Input;
use super::{BLOCK, Block, FEWEST, HEADER, Header, MAGIC, MAX_ABOUT, MOST_BYTES, VERSION, codec};

/// Why a file cannot be read as a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The host's reasons.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It does not begin as one does.
    #[error("is no trace of this program")]
    NoTrace,
    /// It is of another version of the program.
    #[error("is a trace of version {0}, and this program reads version {VERSION}")]
    Version(u32),
    /// Its header makes no sense.
    #[error("has a damaged header: {0}")]
    Header(&'static str),
    /// It is shorter than its header says.
    #[error("is cut off: {there} bytes, and its header says {wanted}")]
    Truncated {
        /// Bytes that it has.
        there: u64,
        /// Bytes that it should have.
        wanted: u64,
    },
    /// A record makes no sense.
    #[error("is damaged at byte {at:#x}, event #{event}")]
    Damaged {
        /// Byte of the file.
        at: u64,
        /// Number of the event that should be there.
        event: u64,
    },
    /// The blocks are not those of one ring.
    #[error("is damaged: {0}")]
    Blocks(String),
}

/// What bytes are read from.
enum Source<'b> {
    File(&'b File),
    Bytes(&'b [u8]),
}

impl Source<'_> {
    fn read(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(out, at),
            Self::Bytes(bytes) => {
                let from = usize::try_from(at).ok().and_then(|at| bytes.get(at..at.checked_add(out.len())?));
                out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

/// A trace that was written, by this program and perhaps not to its end.
pub struct TraceFile<'b> {
    source: Source<'b>,
    pub(in super::super) header: Header,
    /// Number of a block, and where it lies; in the order of numbers, without a gap.
    blocks: Vec<(u64, u64)>,
    first: u64,
    first_beat: u64,
}

impl<'b> TraceFile<'b> {
    /// Of a file.
    ///
    /// # Errors
    /// If it cannot be read or is no whole trace. Records are looked at later.
    pub fn open(file: &'b File) -> Result<Self, TraceError> {
        let length = file.metadata()?.len();
        Self::of(Source::File(file), length)
    }

    /// Of a file's bytes.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn from_bytes(bytes: &'b [u8]) -> Result<Self, TraceError> {
        Self::of(Source::Bytes(bytes), bytes.len() as u64)
    }

    fn of(source: Source<'b>, length: u64) -> Result<Self, TraceError> {
        let mut head = vec![0; HEADER];
        if length < 8 {
            return Err(TraceError::NoTrace);
        }
        if length < HEADER as u64 {
            source.read(0, &mut head[..8])?;
            let mine = head.starts_with(MAGIC);
            return Err(if mine {
                TraceError::Truncated { there: length, wanted: HEADER as u64 }
            } else {
                TraceError::NoTrace
            });
        }
        source.read(0, &mut head)?;
        let header = parse_header(&head)?;
        let there = if header.closed { header.present } else { header.blocks };
        let wanted = HEADER as u64 + u64::from(there) * BLOCK as u64;
        if length < wanted {
            return Err(TraceError::Truncated { there: length, wanted });
        }
        let mut blocks = Vec::new();
        for index in 0..u64::from(there) {
            let at = HEADER as u64 + index * BLOCK as u64;
            let mut number = [0; 8];
            source.read(at, &mut number)?;
            let number = u64::from_le_bytes(number);
            if number == 0 {
                continue;
            }
            if (number - 1) % u64::from(header.blocks) != index {
                return Err(TraceError::Blocks(format!(
                    "block {number} at byte {at:#x} is not in its place"
                )));
            }
            blocks.push((number, at));
        }
        blocks.sort_unstable();
        if let Some(pair) = blocks.windows(2).find(|pair| pair[0].0 + 1 != pair[1].0) {
            return Err(TraceError::Blocks(format!(
                "between blocks {} and {} something is missing",
                pair[0].0, pair[1].0
            )));
        }
        let mut this = Self { source, header, blocks, first: 0, first_beat: 0 };
        if let Some(&(number, at)) = this.blocks.first() {
            let block = this.read(number, at)?;
            (this.first, this.first_beat) = (block.first, block.beat);
            if number == 1 && block.first != 0 {
                return Err(TraceError::Blocks("the first block does not begin with event #0".to_owned()));
            }
        }
        Ok(this)
    }

    /// What was run.
    #[must_use]
    pub fn about(&self) -> &str {
        &self.header.about
    }

    /// The run came to its end, and the trace was closed.
    #[must_use]
    pub fn closed(&self) -> bool {
        self.header.closed
    }

    /// Events before the first that is there: they were overwritten, the ring being full.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.first
    }

    /// Bytes of a ring that holds what is there.
    pub(in super::super) fn bytes(&self) -> u64 {
        HEADER as u64 + FEWEST.max(self.blocks.len() as u64) * BLOCK as u64
    }

    pub(in super::super) fn first_beat(&self) -> u64 {
        self.first_beat
    }

    fn read(&self, number: u64, at: u64) -> Result<Block, TraceError> {
        let mut bytes = vec![0; BLOCK];
        self.source.read(at, &mut bytes)?;
        let block = Block::parse(bytes)
            .filter(|block| block.number == number)
            .ok_or_else(|| TraceError::Blocks(format!("the header of block {number} makes no sense")))?;
        match block.damaged {
            Some(place) => Err(TraceError::Damaged { at: at + place as u64, event: block.next() }),
            None => Ok(block),
        }
    }

    /// Hands out every input, oldest first.
    pub(in super::super) fn each(&self, mut with: impl FnMut(Input)) -> Result<u64, TraceError> {
        let mut next = self.first;
        for &(number, at) in &self.blocks {
            let block = self.read(number, at)?;
            if block.first != next {
                return Err(TraceError::Blocks(format!(
                    "block {number} begins with event #{}, and the one before ends with #{}",
                    block.first,
                    next.wrapping_sub(1)
                )));
            }
            next = block.next();
            for (sequence, _, bytes) in block.records() {
                match codec::decode(bytes) {
                    Some(input) => with(input),
                    None => return Err(TraceError::Damaged { at, event: sequence }),
                }
            }
        }
        Ok(next)
    }
}

fn parse_header(head: &[u8]) -> Result<Header, TraceError> {
    let small = |at: usize| head.get(at..at + 4).and_then(|b| Some(u32::from_le_bytes(b.try_into().ok()?)));
    let long = |at: usize| head.get(at..at + 8).and_then(|b| Some(u64::from_le_bytes(b.try_into().ok()?)));
    let short = TraceError::Header("it is too short");
    let fields = (|| Some((small(8)?, small(12)?, small(16)?, small(20)?, small(24)?, small(28)?)))();
    let words = (|| Some((long(32)?, long(40)?, long(48)?)))();
    let (Some((version, block, blocks, flags, present, contexts)), Some((beats, most, about))) =
        (fields, words)
    else {
        return Err(short);
    };
    if !head.starts_with(MAGIC) {
        return Err(TraceError::NoTrace);
    }
    if version != VERSION {
        return Err(TraceError::Version(version));
    }
    let bytes = u64::from(blocks) * BLOCK as u64;
    if block as usize != BLOCK || u64::from(blocks) < FEWEST || bytes > MOST_BYTES || present > blocks {
        return Err(TraceError::Header("its size makes no sense"));
    }
    if flags > 3 || contexts > 1 << 24 || most > 1 << 20 {
        return Err(TraceError::Header("its settings make no sense"));
    }
    let about = usize::try_from(about).ok().filter(|&length| length <= MAX_ABOUT);
    let about = about.and_then(|length| std::str::from_utf8(head.get(56..56 + length)?).ok());
    Ok(Header {
        blocks,
        closed: flags & 1 != 0,
        present,
        contexts,
        fault_heartbeats: beats,
        max_violations: most,
        coherent_atomics: flags & 2 != 0,
        about: about.ok_or(TraceError::Header("what was run is no text"))?.to_owned(),
    })
}
