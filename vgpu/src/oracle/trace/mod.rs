// SPDX-License-Identifier: MIT OR Apache-2.0
//! The trace: every input of the judging in the order in which it was judged, in a ring of blocks, in memory or in a file.
//!
//! A file is mapped and shared, so what was written before this process died, by `kill -9` or otherwise, is in it. It begins
//! with a [header](Header) of a page; blocks of [`BLOCK`] bytes follow. A block is a small header and records one after the other; no
//! record goes over its end. The oldest block gives way to a new one. A record counts when its block's `used` says so,
//! which is stored after it.
//!
//! Lock order: the oracle's state is locked before this.

mod codec;
mod read;
mod text;

#[cfg(test)]
mod trace_test;

use std::fs::File;
use std::sync::atomic::Ordering::Release;

use parking_lot::Mutex;
use vgpu_spec::handle::Handle;
use vgpu_spec::{pte, witness};
use vm_memory::{Bytes as _, FileOffset, MmapRegion, VolatileMemory as _};

pub use read::{TraceError, TraceFile};
pub use text::describe;
#[cfg(test)]
pub(super) use trace_test::same_offline;

use super::OracleConfig;
use super::input::Input;

/// Bytes of a block.
pub(super) const BLOCK: usize = 64 << 10;
/// Bytes before a block's first record: its number (from 1 up, never reused; 0 is none), the number of its first event, the
/// heartbeats before that, all `u64`, bytes of records (`u32`), four bytes of nothing.
pub(super) const BLOCK_HEADER: usize = 32;
/// Bytes before the first block.
pub(super) const HEADER: usize = 4096;
/// Fewest blocks of a ring.
const FEWEST: u64 = 4;
/// Bytes of a trace if nothing else is said: the default suite takes less than a fourth of it.
pub const DEFAULT_BYTES: u64 = 64 << 20;
/// Smallest trace.
pub const LEAST_BYTES: u64 = HEADER as u64 + FEWEST * BLOCK as u64;
/// Largest trace.
pub const MOST_BYTES: u64 = 16 << 30;

/// Entries given to a violation.
pub(super) const LAST: usize = 20;
/// Events that are searched for them.
const SEARCHED: u64 = 64 * 1024;

/// What a trace's file begins with, little endian.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) blocks: u32,
    /// The run has come to its end and nothing is missing there.
    pub(super) closed: bool,
    /// Blocks that a closed file still has.
    pub(super) present: u32,
    pub(super) contexts: u32,
    pub(super) fault_heartbeats: u64,
    pub(super) max_violations: u64,
    pub(super) coherent_atomics: bool,
    /// What was run.
    pub(super) about: String,
}

const MAGIC: &[u8; 8] = b"HMMTRACE";
/// Goes up when records change their meaning.
const VERSION: u32 = 4;
const MAX_ABOUT: usize = 3 << 10;

impl Header {
    fn new(config: &OracleConfig, blocks: u32, about: &str) -> Self {
        let mut end = about.len().min(MAX_ABOUT);
        while !about.is_char_boundary(end) {
            end -= 1;
        }
        Self {
            blocks,
            closed: false,
            present: 0,
            contexts: config.contexts,
            fault_heartbeats: config.fault_heartbeats,
            max_violations: config.max_violations as u64,
            coherent_atomics: config.coherent_atomics,
            about: about[..end].to_owned(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let flags = u32::from(self.closed) | u32::from(self.coherent_atomics) << 1;
        for word in [VERSION, BLOCK as u32, self.blocks, flags, self.present, self.contexts] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for word in [self.fault_heartbeats, self.max_violations, self.about.len() as u64] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(self.about.as_bytes());
        bytes
    }
}

/// Where the blocks are.
enum Store {
    /// Nothing is kept.
    None,
    /// Zeroed memory, touched as far as it is used.
    Memory(Vec<u8>),
    /// The file behind its header.
    File(MmapRegion<()>, File),
}

impl Store {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        match self {
            Self::None => {}
            Self::Memory(memory) => {
                if let Some(to) = memory.get_mut(at..at + bytes.len()) {
                    to.copy_from_slice(bytes);
                }
            }
            Self::File(map, _) => {
                // Within the mapping, as the ring's own arithmetic has it.
                if let Ok(slice) = map.get_slice(HEADER + at, bytes.len()) {
                    slice.copy_from(bytes);
                }
            }
        }
    }
    /// After everything that was written before.
    fn publish(&mut self, at: usize, word: u32) {
        match self {
            Self::File(map, _) => {
                let _ = map.as_volatile_slice().store(word.to_le(), HEADER + at, Release);
            }
            _ => self.write(at, &word.to_le_bytes()),
        }
    }
    fn read(&self, at: usize, bytes: &mut [u8]) {
        match self {
            Self::None => {}
            Self::Memory(memory) => {
                if let Some(from) = memory.get(at..at + bytes.len()) {
                    bytes.copy_from_slice(from);
                }
            }
            Self::File(map, _) => {
                if let Ok(slice) = map.get_slice(HEADER + at, bytes.len()) {
                    slice.copy_to(bytes);
                }
            }
        }
    }
}

struct Ring {
    store: Store,
    header: Header,
    /// Number of the block at hand, from 1 up.
    number: u64,
    /// Bytes of records in it.
    used: usize,
    /// Number of the next event.
    next: u64,
    beat: u64,
    /// Events of device and witness.
    activity: u64,
    /// Bytes of records in all.
    bytes: u64,
    scratch: Vec<u8>,
}

/// The ring.
pub(super) struct Trace(Mutex<Ring>);

impl Trace {
    /// One in memory.
    pub(super) fn new(config: &OracleConfig) -> Self {
        let blocks = if config.enabled { blocks_of(config.trace_bytes) } else { 0 };
        let store = if blocks > 0 { Store::Memory(vec![0; blocks as usize * BLOCK]) } else { Store::None };
        Self::with(store, Header::new(config, blocks, ""))
    }

    /// One in a file of zeroes, [`file_bytes`] long and with all its blocks there: a disk that is full when the mapping is
    /// touched would end this process. `about` says what was run.
    ///
    /// # Errors
    /// If the file is too short or cannot be mapped.
    pub(super) fn create(config: &OracleConfig, file: File, about: &str) -> std::io::Result<Self> {
        let blocks = blocks_of(config.trace_bytes);
        let length = HEADER + blocks as usize * BLOCK;
        if file.metadata()?.len() < length as u64 {
            return Err(std::io::Error::other(format!("the trace's file is shorter than {length} bytes")));
        }
        let map = MmapRegion::build(
            Some(FileOffset::new(file.try_clone()?, 0)),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        )
        .map_err(std::io::Error::other)?;
        let trace = Self::with(Store::File(map, file), Header::new(config, blocks, about));
        trace.0.lock().write_header();
        Ok(trace)
    }

    fn with(store: Store, header: Header) -> Self {
        let mut ring = Ring {
            store,
            header,
            number: 0,
            used: BLOCK,
            next: 0,
            beat: 0,
            activity: 0,
            bytes: 0,
            // Longer ones are violations found elsewhere.
            scratch: Vec::with_capacity(256),
        };
        if ring.header.blocks > 0 {
            ring.begin_block();
        }
        Self(Mutex::new(ring))
    }

    /// Adds an input: its place in the global order.
    pub(super) fn push(&self, input: &Input) {
        self.0.lock().push(input);
    }

    /// Events of device and witness.
    pub(super) fn activity(&self) -> u64 {
        self.0.lock().activity
    }

    /// Events, and the bytes that they take.
    pub(super) fn size(&self) -> (u64, u64) {
        let ring = self.0.lock();
        (ring.next, ring.bytes)
    }

    /// The next event has this number; for a trace that is made from another one.
    pub(super) fn begin_at(&self, sequence: u64, beat: u64) {
        let mut ring = self.0.lock();
        if ring.next == 0 && ring.header.blocks > 0 {
            (ring.next, ring.beat, ring.number) = (sequence, beat, 0);
            ring.begin_block();
        }
    }

    /// The run is over: the file says so and gives back what it did not need. What is told from now on is not kept.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn close(&self) -> std::io::Result<()> {
        let mut ring = self.0.lock();
        if !matches!(ring.store, Store::File(..)) {
            return Ok(());
        }
        ring.header.closed = true;
        ring.header.present = ring.number.min(ring.header.blocks.into()) as u32;
        ring.write_header();
        let present = ring.header.present as usize;
        match std::mem::replace(&mut ring.store, Store::None) {
            Store::File(map, file) => {
                drop(map);
                file.set_len((HEADER + present * BLOCK) as u64)?;
                file.sync_all()
            }
            _ => Ok(()),
        }
    }

    /// What the file would hold now.
    pub(super) fn snapshot(&self) -> Vec<u8> {
        let ring = self.0.lock();
        let present = ring.number.min(ring.header.blocks.into()) as usize;
        let header = Header { closed: true, present: present as u32, ..ring.header.clone() };
        let mut bytes = header.bytes();
        bytes.resize(HEADER + present * BLOCK, 0);
        ring.store.read(0, &mut bytes[HEADER..]);
        bytes
    }

    /// The last events on the context, its address space and, where given, the page; oldest first.
    pub(super) fn last(&self, ctx: Option<Handle>, mm: Option<u64>, va: Option<u64>) -> Vec<String> {
        let ring = self.0.lock();
        // Newest first; what says the same in a row is one line.
        let mut found: Vec<Line> = Vec::with_capacity(LAST);
        let mut full = false;
        let oldest = ring.number.saturating_sub(ring.header.blocks.into()) + 1;
        for number in (oldest..=ring.number).rev() {
            let Some(block) = ring.block(number).filter(|_| !full) else { break };
            for (sequence, beat, bytes) in block.records().rev() {
                if sequence + SEARCHED < ring.next {
                    full = true;
                    break;
                }
                let about = |input: &Input| text::concerns(input, ctx, mm, va);
                let Some(input) = codec::decode(bytes).filter(about) else { continue };
                let text = text::render(&input);
                if let Some(line) = found.last_mut().filter(|line| line.text == text) {
                    (line.sequence, line.beat, line.times) = (sequence, beat, line.times + 1);
                } else if found.len() < LAST {
                    found.push(Line { sequence, beat, text, times: 1, last: sequence });
                } else {
                    full = true;
                    break;
                }
            }
        }
        found.iter().rev().map(ToString::to_string).collect()
    }
}

/// Length that the file of a trace of `bytes` bytes must have.
#[must_use]
pub fn file_bytes(bytes: u64) -> u64 {
    HEADER as u64 + u64::from(blocks_of(bytes)) * BLOCK as u64
}

/// A line of a report.
struct Line {
    sequence: u64,
    beat: u64,
    text: String,
    /// How often it was said in a row, and the number of the last time.
    times: u32,
    last: u64,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { sequence, beat, text, times, last } = self;
        write!(f, "#{sequence} beat {beat} {text}")?;
        if *times > 1 { write!(f, ", {times} times until #{last}") } else { Ok(()) }
    }
}

fn blocks_of(bytes: u64) -> u32 {
    let bytes = bytes.clamp(LEAST_BYTES, MOST_BYTES);
    ((bytes - HEADER as u64) / BLOCK as u64) as u32
}

impl Ring {
    fn at(&self, number: u64) -> usize {
        (number.saturating_sub(1) % u64::from(self.header.blocks.max(1))) as usize * BLOCK
    }

    fn write_header(&mut self) {
        let bytes = self.header.bytes();
        if let Store::File(map, _) = &self.store {
            if let Ok(slice) = map.get_slice(0, bytes.len()) {
                slice.copy_from(&bytes);
            }
        }
    }

    fn begin_block(&mut self) {
        self.number += 1;
        let at = self.at(self.number);
        // While it is changed it is nobody's.
        self.store.publish(at + 24, 0);
        let mut head = [0; 24];
        for (bytes, word) in head.chunks_exact_mut(8).zip([self.number, self.next, self.beat]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        self.store.write(at, &head);
        self.used = 0;
    }

    fn push(&mut self, input: &Input) {
        if matches!(self.store, Store::None) {
            return;
        }
        self.count(input);
        self.scratch.clear();
        codec::encode(input, &mut self.scratch);
        self.append();
        self.beat += u64::from(is_beat(input));
    }

    fn count(&mut self, input: &Input) {
        self.activity += u64::from(match input {
            Input::Witness(record) => !matches!(record.kind, witness::HEARTBEAT | witness::MESSAGE),
            Input::Device { .. } | Input::Associate { .. } | Input::Access { .. } => true,
            _ => false,
        });
    }

    /// Adds what is in `scratch`.
    fn append(&mut self) {
        let (head, length) = frame(&self.scratch);
        let bytes = length + self.scratch.len();
        if self.used + bytes > BLOCK - BLOCK_HEADER {
            self.begin_block();
        }
        let at = self.at(self.number);
        self.store.write(at + BLOCK_HEADER + self.used, &head[..length]);
        self.store.write(at + BLOCK_HEADER + self.used + length, &self.scratch);
        self.used += bytes;
        self.bytes += bytes as u64;
        self.store.publish(at + 24, self.used as u32);
        self.next += 1;
    }

    fn block(&self, number: u64) -> Option<Block> {
        let mut bytes = vec![0; BLOCK];
        if number == 0 || matches!(self.store, Store::None) {
            return None;
        }
        self.store.read(self.at(number), &mut bytes);
        Block::parse(bytes).filter(|block| block.number == number)
    }
}

/// A trace's file with these records, whatever is in them; for fuzzing.
#[cfg(any(test, feature = "testing"))]
pub fn file_of_records<'r>(records: impl Iterator<Item = &'r [u8]>) -> Vec<u8> {
    let trace = Trace::new(&OracleConfig { trace_bytes: LEAST_BYTES, ..OracleConfig::default() });
    for record in records {
        let mut ring = trace.0.lock();
        ring.scratch.clear();
        ring.scratch.extend_from_slice(&record[..record.len().min(BLOCK / 2)]);
        ring.append();
    }
    trace.snapshot()
}

fn is_beat(input: &Input) -> bool {
    matches!(input, Input::Witness(record) if record.kind == witness::HEARTBEAT)
}

/// What stands before a record: its length and a check byte.
fn frame(record: &[u8]) -> ([u8; 4], usize) {
    let length = record.len();
    let sum = check_byte(record);
    if length < 0x80 {
        ([length as u8, sum, 0, 0], 2)
    } else {
        // Three bytes of length: 16 bits are enough for a block.
        ([length as u8 | 0x80, (length >> 7) as u8 | 0x80, (length >> 14) as u8, sum], 4)
    }
}

fn check_byte(record: &[u8]) -> u8 {
    let hash =
        record.iter().fold(0x811c_9dc5_u32, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    (hash ^ hash >> 8 ^ hash >> 16 ^ hash >> 24) as u8
}

/// A block as it was read.
pub(super) struct Block {
    pub(super) number: u64,
    /// Number of its first event.
    pub(super) first: u64,
    /// Heartbeats before that.
    pub(super) beat: u64,
    /// Sequence, beat, and place of each record's bytes.
    records: Vec<(u64, u64, usize, usize)>,
    bytes: Vec<u8>,
    /// Where the first byte lies that makes no sense, if there is one.
    pub(super) damaged: Option<usize>,
}

impl Block {
    /// `None` if it is none.
    pub(super) fn parse(bytes: Vec<u8>) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let (number, first, mut beat) = (word(0)?, word(8)?, word(16)?);
        let used = (word(24)? & 0xffff_ffff) as usize;
        if number == 0 || number.max(first).max(beat) >> 62 != 0 {
            return None;
        }
        let end = BLOCK_HEADER.checked_add(used).filter(|&end| end <= bytes.len());
        let mut block = Self { number, first, beat, records: Vec::new(), bytes: Vec::new(), damaged: None };
        let Some(end) = end else {
            block.damaged = Some(24);
            return Some(block);
        };
        let mut at = BLOCK_HEADER;
        while at < end {
            let Some((from, to)) = record_at(&bytes[..end], at) else {
                block.damaged = Some(at);
                break;
            };
            block.records.push((first + block.records.len() as u64, beat, from, to));
            // A heartbeat's record is known by its first bytes.
            beat += u64::from(codec::is_heartbeat(&bytes[from..to]));
            at = to;
        }
        block.bytes = bytes;
        Some(block)
    }

    /// Sequence number, heartbeats before it, and bytes of each record.
    pub(super) fn records(&self) -> impl DoubleEndedIterator<Item = (u64, u64, &[u8])> {
        self.records.iter().map(|&(sequence, beat, from, to)| (sequence, beat, &self.bytes[from..to]))
    }

    /// Number of the event after its last.
    pub(super) fn next(&self) -> u64 {
        self.first + self.records.len() as u64
    }
}

/// Where the record lies whose frame is at `at`.
fn record_at(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*bytes.get(at)?);
    let (length, from, sum) = if first < 0x80 {
        (first, at + 2, *bytes.get(at + 1)?)
    } else {
        let (second, third) = (usize::from(*bytes.get(at + 1)?), usize::from(*bytes.get(at + 2)?));
        (first & 0x7f | (second & 0x7f) << 7 | third << 14, at + 4, *bytes.get(at + 3)?)
    };
    let record = bytes.get(from..from.checked_add(length)?)?;
    (length > 0 && check_byte(record) == sum).then_some((from, from + length))
}

/// Last address that a leaf at `va` maps.
pub(super) fn leaf_last(va: u64, entry: u64) -> u64 {
    let shift = if entry & pte::HUGE != 0 { pte::HUGE_SHIFT } else { pte::PAGE_SHIFT };
    va | ((1 << shift) - 1)
}
