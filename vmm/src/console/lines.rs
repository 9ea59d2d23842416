// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes of a serial console into lines of text: partial lines, carriage returns, terminal escapes, bounded memory.

use guest_protocol::{CONSOLE_PREFIX, MAX_MESSAGE};

/// Longest line kept; what goes beyond is cut off and marked.
pub const MAX_LINE: usize = 4096;
/// Marks a line that was cut.
const CUT: &str = " [cut]";
/// Longest operating-system-command escape that is skipped before text is taken as text again.
const MAX_ESCAPE: usize = 256;

/// Where in a terminal escape the input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    /// ESC was seen.
    Start,
    /// ESC [ was seen: up to a final byte.
    Control,
    /// ESC ] was seen: up to BEL or ESC \.
    Command,
    /// ESC ( and the like: one byte more.
    OneMore,
}

/// Makes lines of what arrives in pieces.
#[derive(Debug)]
pub struct Assembler {
    line: Vec<u8>,
    cut: bool,
    carriage_return: bool,
    escape: Escape,
    escape_len: usize,
}

impl Default for Assembler {
    fn default() -> Self {
        Self { line: Vec::new(), cut: false, carriage_return: false, escape: Escape::None, escape_len: 0 }
    }
}

impl Assembler {
    /// Takes bytes and calls `line` with each line they complete.
    pub fn feed(&mut self, bytes: &[u8], line: &mut dyn FnMut(String)) {
        for &byte in bytes {
            self.byte(byte, line);
        }
    }

    /// Hands out an unfinished line, at the end of the stream.
    pub fn finish(&mut self, line: &mut dyn FnMut(String)) {
        self.carriage_return = false;
        self.escape = Escape::None;
        if !self.line.is_empty() {
            self.end(line);
        }
    }

    fn byte(&mut self, byte: u8, line: &mut dyn FnMut(String)) {
        if self.escape != Escape::None {
            self.escaped(byte);
            return;
        }
        if self.carriage_return && byte != b'\n' && byte != b'\r' {
            // A lone carriage return: what follows overwrites the line on a terminal; here it is a line of its own.
            self.carriage_return = false;
            if !self.line.is_empty() {
                self.end(line);
            }
        }
        match byte {
            b'\n' => {
                self.carriage_return = false;
                self.end(line);
            }
            b'\r' => self.carriage_return = true,
            0x1b => {
                self.escape = Escape::Start;
                self.escape_len = 0;
            }
            b'\t' => self.push(b'\t'),
            0..=0x1f | 0x7f => {}
            _ => self.push(byte),
        }
    }

    fn escaped(&mut self, byte: u8) {
        self.escape_len += 1;
        if byte == b'\n' || self.escape_len > MAX_ESCAPE {
            // Not an escape after all, or a hostile one: text goes on.
            self.escape = Escape::None;
            return;
        }
        self.escape = match (self.escape, byte) {
            (Escape::Start, b'[') => Escape::Control,
            (Escape::Start, b']' | b'P' | b'_' | b'^') => Escape::Command,
            (Escape::Start, b'(' | b')' | b'#' | b'%') => Escape::OneMore,
            (Escape::Control, 0x40..=0x7e) => Escape::None,
            (Escape::Control, _) => Escape::Control,
            (Escape::Command, 0x07) => Escape::None,
            (Escape::Command, 0x1b) => Escape::OneMore,
            (Escape::Command, _) => Escape::Command,
            _ => Escape::None,
        };
    }

    fn push(&mut self, byte: u8) {
        // A message of the guest's agent may be longer than what a line of text is allowed.
        if self.line.len() < MAX_LINE
            || (self.line.len() < MAX_MESSAGE + 2 * MAX_LINE && carries_message(&self.line))
        {
            self.line.push(byte);
        } else {
            self.cut = true;
        }
    }

    fn end(&mut self, line: &mut dyn FnMut(String)) {
        let mut text = String::from_utf8_lossy(&self.line).into_owned();
        if self.cut {
            text.push_str(CUT);
        }
        self.line.clear();
        self.line.shrink_to(MAX_LINE);
        self.cut = false;
        line(text);
    }
}

fn carries_message(line: &[u8]) -> bool {
    let prefix = CONSOLE_PREFIX.as_bytes();
    // It stands at the beginning, or behind a kernel line that the agent's write interrupted; look no further than that.
    line[..line.len().min(MAX_LINE / 4)].windows(prefix.len()).any(|window| window == prefix)
}

/// A kernel line without what printk puts before it, and the time it put there.
#[must_use]
pub fn printk(line: &str) -> Option<(&str, &str)> {
    let mut rest = line;
    // Level, where the console shows it: <4>
    if let Some(inner) = rest.strip_prefix('<') {
        let (level, tail) = inner.split_once('>')?;
        if level.is_empty() || level.len() > 3 || !level.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        rest = tail;
    }
    let (time, tail) = rest.strip_prefix('[')?.split_once(']')?;
    let (seconds, fraction) = time.trim_start().split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(seconds) || !digits(fraction) {
        return None;
    }
    let mut text = tail.strip_prefix(' ').unwrap_or(tail);
    // Caller, where the kernel is built with it: [  T123] or [   C0]
    if let Some((caller, tail)) = text.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        let caller = caller.trim_start();
        if matches!(caller.as_bytes().first(), Some(b'T' | b'C')) && digits(&caller[1..]) {
            text = tail.strip_prefix(' ').unwrap_or(tail);
        }
    }
    Some((time.trim_start(), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut assembler = Assembler::default();
        let mut lines = Vec::new();
        for piece in pieces {
            assembler.feed(piece, &mut |line| lines.push(line));
        }
        assembler.finish(&mut |line| lines.push(line));
        lines
    }

    #[test]
    fn pieces_make_lines() {
        assert_eq!(lines(&[b"one\r", b"\ntw", b"o\n\nthree"]), ["one", "two", "", "three"]);
    }

    #[test]
    fn a_lone_carriage_return_begins_anew() {
        assert_eq!(lines(&[b"10%\r20%\r\r\nend\n"]), ["10%", "20%", "end"]);
    }

    #[test]
    fn escapes_and_controls_go() {
        assert_eq!(lines(&[b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07x\x1b(By\x00\x08\n"]), ["red xy"]);
        // Firmware clears the screen with these.
        assert_eq!(lines(&[b"\x1bc\x1b[?7l\x1b[2JSeaBIOS\r\n"]), ["SeaBIOS"]);
    }

    #[test]
    fn an_unended_escape_does_not_swallow_the_console() {
        let mut bytes = b"\x1b]".to_vec();
        bytes.extend(std::iter::repeat_n(b'x', 1000));
        bytes.extend_from_slice(b"\nBUG\n");
        assert_eq!(lines(&[&bytes]).last().map(String::as_str), Some("BUG"));
    }

    #[test]
    fn long_lines_are_cut() {
        let long = vec![b'a'; 1 << 20];
        let lines = lines(&[&long, b"\nnext\n"]);
        assert_eq!(lines[0].len(), MAX_LINE + CUT.len());
        assert_eq!(lines[1], "next");
    }

    #[test]
    fn a_message_may_be_longer() {
        let mut bytes = CONSOLE_PREFIX.as_bytes().to_vec();
        bytes.extend(vec![b'm'; 20_000]);
        assert_eq!(lines(&[&bytes])[0].len(), bytes.len());
    }

    #[test]
    fn invalid_utf8_is_shown_as_such() {
        assert_eq!(lines(&[b"a\xff\xfeb\n"]), ["a\u{fffd}\u{fffd}b"]);
    }

    #[test]
    fn printk_prefixes() {
        assert_eq!(printk("[    1.234567] hello"), Some(("1.234567", "hello")));
        assert_eq!(printk("<4>[12345.000001][  T42] hello"), Some(("12345.000001", "hello")));
        assert_eq!(printk("[    0.000000] [    C0]  indented"), Some(("0.000000", " indented")));
        assert_eq!(printk("[   12.5] [drm] text"), Some(("12.5", "[drm] text")));
        assert_eq!(printk("WARNING: something of a program"), None);
        assert_eq!(printk("[ok] done"), None);
        assert_eq!(printk("[1.] "), None);
        assert_eq!(printk(""), None);
    }
}
