// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's console: lines, the agent's messages and the kernel's complaints in them, and a log of bounded size.

pub mod lines;
pub mod splat;
pub mod symbols;

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;

use guest_protocol::{CONSOLE_PREFIX, Message};

pub use splat::{Splat, SplatKind};

/// Lines kept for messages about a lost guest: two times the stacks of all its tasks that matter, and what the kernel says of those that
/// hang in between. A line has 4 KiB at the most.
const TAIL: usize = 2048;
/// Largest log; a guest may print for ever.
const MAX_LOG: u64 = 64 << 20;

/// What was on the console.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A line.
    Line(String),
    /// A message of the agent.
    Message(Message),
    /// The kernel complained.
    Splat(Splat),
    /// Something that begins as a message and is none.
    Garbled(String),
}

/// Follows a console.
#[derive(Debug)]
pub struct Console {
    assembler: lines::Assembler,
    recogniser: splat::Recogniser,
    tail: VecDeque<String>,
    log: Option<File>,
    logged: u64,
    /// Lines seen in all.
    count: u64,
}

impl Console {
    /// Follows a console and writes its lines to `log`.
    #[must_use]
    pub fn new(log: Option<File>) -> Self {
        Self {
            assembler: lines::Assembler::default(),
            recogniser: splat::Recogniser::default(),
            tail: VecDeque::with_capacity(TAIL),
            log,
            logged: 0,
            count: 0,
        }
    }

    /// Takes bytes as they come.
    pub fn feed(&mut self, bytes: &[u8], items: &mut Vec<Item>) {
        let mut lines = Vec::new();
        self.assembler.feed(bytes, &mut |line| lines.push(line));
        for line in lines {
            self.line(line, items);
        }
    }

    /// Nothing came for a while: an open block ends.
    pub fn idle(&mut self, items: &mut Vec<Item>) {
        items.extend(self.recogniser.idle().map(Item::Splat));
    }

    /// The console ended.
    pub fn finish(&mut self, items: &mut Vec<Item>) {
        let mut lines = Vec::new();
        self.assembler.finish(&mut |line| lines.push(line));
        for line in lines {
            self.line(line, items);
        }
        self.idle(items);
    }

    /// The last lines, oldest first.
    #[must_use]
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let skip = self.tail.len().saturating_sub(lines);
        self.tail.iter().skip(skip).cloned().collect()
    }

    /// Lines seen so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The lines since the count was `from`, as far as they are kept.
    #[must_use]
    pub fn since(&self, from: u64) -> Vec<String> {
        let wanted = usize::try_from(self.count.saturating_sub(from)).unwrap_or(usize::MAX);
        self.tail(wanted)
    }

    fn line(&mut self, line: String, items: &mut Vec<Item>) {
        let Some(at) = line.find(CONSOLE_PREFIX) else {
            self.text(line, items);
            return;
        };
        // The agent's write may have come into the middle of a kernel line, or the other way round.
        if !line[..at].trim().is_empty() {
            self.text(line[..at].to_owned(), items);
        }
        let json = &line[at + CONSOLE_PREFIX.len()..];
        self.write_log(&line[at..]);
        let mut stream = serde_json::Deserializer::from_str(json).into_iter::<Message>();
        match stream.next() {
            Some(Ok(message)) => {
                items.push(Item::Message(message));
                self.texts(json[stream.byte_offset()..].trim(), items);
            }
            _ => {
                items.push(Item::Garbled(json.chars().take(200).collect()));
                // The kernel may have printed into it.
                if let Some(at) = lines::stamp(json.as_bytes(), 0) {
                    self.texts(&json[at..], items);
                }
            }
        }
    }

    /// What stands behind a message: perhaps several lines of the kernel.
    fn texts(&mut self, mut rest: &str, items: &mut Vec<Item>) {
        while !rest.is_empty() {
            let at = lines::stamp(rest.as_bytes(), 1).unwrap_or(rest.len());
            self.text(rest[..at].trim_end().to_owned(), items);
            rest = &rest[at..];
        }
    }

    fn text(&mut self, line: String, items: &mut Vec<Item>) {
        self.write_log(&line);
        self.count += 1;
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line.clone());
        let splat = self.recogniser.line(&line);
        items.push(Item::Line(line));
        items.extend(splat.map(Item::Splat));
    }

    fn write_log(&mut self, line: &str) {
        let Some(log) = &mut self.log else { return };
        if self.logged >= MAX_LOG {
            return;
        }
        self.logged += line.len() as u64 + 1;
        let note = if self.logged >= MAX_LOG { "\n[the log ends here: 64 MiB]" } else { "" };
        // A full disk must not end the run; the lines are still judged.
        if writeln!(log, "{line}{note}").is_err() {
            self.log = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(text: &str) -> Vec<Item> {
        let mut console = Console::new(None);
        let mut items = Vec::new();
        console.feed(text.as_bytes(), &mut items);
        console.finish(&mut items);
        items
    }

    #[test]
    fn messages_are_told_from_lines() {
        let done = serde_json::to_string(&Message::Done).unwrap();
        let found = items(&format!("hello\n{CONSOLE_PREFIX}{done}\n"));
        assert_eq!(found, [Item::Line("hello".into()), Item::Message(Message::Done)]);
    }

    #[test]
    fn interleaved_messages() {
        let done = serde_json::to_string(&Message::Done).unwrap();
        let found = items(&format!("[    1.0] half{CONSOLE_PREFIX}{done}[    1.1] BUG: Bad thing\r\n"));
        assert_eq!(found[0], Item::Line("[    1.0] half".into()));
        assert_eq!(found[1], Item::Message(Message::Done));
        assert_eq!(found[2], Item::Line("[    1.1] BUG: Bad thing".into()));
        assert!(matches!(&found[3], Item::Splat(splat) if splat.kind == SplatKind::Warn));
    }

    #[test]
    fn no_program_hides_what_the_kernel_says() {
        for hide in [CONSOLE_PREFIX, "hmm-testbench: {\"type\":\"done\"}dots", "\u{1b}]0;", "dots"] {
            let found =
                items(&format!("{hide}[    9.100000] WARNING: CPU: 0 PID: 1 at mm/x.c:1 f+0x1/0x2\r\n"));
            let warned = |item: &Item| matches!(item, Item::Splat(splat) if splat.kind == SplatKind::Warn);
            assert!(found.iter().any(warned), "{hide:?}: {found:?}");
        }
    }

    #[test]
    fn garbled_messages_are_said() {
        assert!(matches!(
            items(&format!("{CONSOLE_PREFIX}{{\"type\":\"nonsense\"}}\n"))[..],
            [Item::Garbled(_)]
        ));
        assert!(matches!(items(&format!("{CONSOLE_PREFIX}\n"))[..], [Item::Garbled(_)]));
    }

    #[test]
    fn the_tail_is_bounded_and_counted() {
        let mut console = Console::new(None);
        let mut items = Vec::new();
        for index in 0..3000 {
            console.feed(format!("line {index}\n").as_bytes(), &mut items);
            items.clear();
        }
        assert_eq!(console.count(), 3000);
        assert_eq!(console.tail(2), ["line 2998", "line 2999"]);
        assert_eq!(console.since(2997).len(), 3);
        assert_eq!(console.since(0).len(), TAIL);
    }
}
