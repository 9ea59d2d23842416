// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes of a serial console into lines of text: partial lines, carriage returns, terminal escapes, bounded memory.

use guest_protocol::{CONSOLE_PREFIX, MAX_MESSAGE};

/// Longest line kept; what goes beyond is cut off and marked.
pub const MAX_LINE: usize = 4096;
/// Marks a line that was cut.
const CUT: &str = " [cut]";
/// Longest operating-system-command escape that is skipped before text is taken as text again.
const MAX_ESCAPE: usize = 256;
/// What is kept of the end of a line that was cut: the kernel may have printed into it.
const MAX_TAIL: usize = 2048;

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
///
/// Bytes are kept as they came until their line ends, for the kernel prints wherever the last program left off: what it says
/// behind a program's unfinished line, or in the middle of its terminal escape, is a line of its own.
#[derive(Debug, Default)]
pub struct Assembler {
    line: Vec<u8>,
    /// The line may be longer than others: it carries a message. Decided where others are cut.
    long: Option<bool>,
    cut: bool,
    /// The end of what was cut off.
    tail: Vec<u8>,
    carriage_return: bool,
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
        if !self.line.is_empty() {
            self.end(line);
        }
    }

    fn byte(&mut self, byte: u8, line: &mut dyn FnMut(String)) {
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
            _ => self.push(byte),
        }
    }

    fn push(&mut self, byte: u8) {
        let long = self.line.len() >= MAX_LINE
            // A message of the guest's agent may be longer than what a line of text is allowed.
            && *self.long.get_or_insert_with(|| carries_message(&self.line));
        if self.line.len() < MAX_LINE || (long && self.line.len() < MAX_MESSAGE + 2 * MAX_LINE) {
            self.line.push(byte);
            return;
        }
        self.cut = true;
        if self.tail.len() == MAX_TAIL {
            self.tail.drain(..MAX_TAIL / 2);
        }
        self.tail.push(byte);
    }

    fn end(&mut self, line: &mut dyn FnMut(String)) {
        // A message is taken apart by who reads it: what it quotes is no line of the kernel.
        let told = message_at(&self.line).unwrap_or(self.line.len());
        let mut from = 0;
        while let Some(at) = stamp(&self.line[..told], from + 1) {
            let text = plain(&self.line[from..at]);
            if !text.is_empty() {
                line(text);
            }
            from = at;
        }
        let mut text = plain(&self.line[from..]);
        if self.cut {
            text.push_str(CUT);
        }
        line(text);
        let mut next = stamp(&self.tail, 0);
        while let Some(at) = next {
            next = stamp(&self.tail, at + 1);
            line(plain(&self.tail[at..next.unwrap_or(self.tail.len())]));
        }
        self.line.clear();
        self.line.shrink_to(MAX_LINE);
        self.tail.clear();
        self.cut = false;
        self.long = None;
    }
}

/// Bytes as text, without terminal escapes and control characters.
fn plain(bytes: &[u8]) -> String {
    let (mut text, mut escape, mut length) = (Vec::with_capacity(bytes.len()), Escape::None, 0);
    for &byte in bytes {
        if escape != Escape::None {
            length += 1;
            // Longer is no escape after all, or a hostile one: text goes on.
            escape = if length > MAX_ESCAPE { Escape::None } else { escaped(escape, byte) };
            continue;
        }
        match byte {
            0x1b => (escape, length) = (Escape::Start, 0),
            b'\t' => text.push(byte),
            0..=0x1f | 0x7f => {}
            _ => text.push(byte),
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn escaped(escape: Escape, byte: u8) -> Escape {
    match (escape, byte) {
        (Escape::Start, b'[') => Escape::Control,
        (Escape::Start, b']' | b'P' | b'_' | b'^') => Escape::Command,
        (Escape::Start, b'(' | b')' | b'#' | b'%') => Escape::OneMore,
        (Escape::Control, 0x40..=0x7e) => Escape::None,
        (Escape::Control, _) => Escape::Control,
        (Escape::Command, 0x07) => Escape::None,
        (Escape::Command, 0x1b) => Escape::OneMore,
        (Escape::Command, _) => Escape::Command,
        _ => Escape::None,
    }
}

fn message_at(line: &[u8]) -> Option<usize> {
    let prefix = CONSOLE_PREFIX.as_bytes();
    line.windows(prefix.len()).position(|window| window == prefix)
}

fn carries_message(line: &[u8]) -> bool {
    // It stands at the beginning, or behind a kernel line that the agent's write interrupted; look no further than that.
    message_at(&line[..line.len().min(MAX_LINE / 4)]).is_some()
}

/// Where the kernel's time stamp stands at `from` or behind it, in the one form that printk gives it: `[    1.234567] `.
#[must_use]
pub fn stamp(bytes: &[u8], from: usize) -> Option<usize> {
    let is_stamp = |&at: &usize| {
        let inside = &bytes[at..];
        let Some(dot) = inside.iter().take(24).position(|&byte| byte == b'.') else { return false };
        let seconds = inside[1..dot.max(1)].trim_ascii_start();
        inside[0] == b'['
            && dot >= 6
            && !seconds.is_empty()
            && seconds.iter().all(u8::is_ascii_digit)
            && inside.len() >= dot + 9
            && inside[dot + 1..dot + 7].iter().all(u8::is_ascii_digit)
            && inside[dot + 7] == b']'
            && matches!(inside[dot + 8], b' ' | b'[')
    };
    (from..bytes.len()).find(is_stamp)
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
    fn the_kernel_is_heard_wherever_a_program_left_off() {
        let bug = "[    9.100000] BUG: Bad page state";
        let mut hide: Vec<Vec<u8>> = [
            "dots...",
            "\x1b",
            "\x1b[",
            "\x1b[1;3",
            "\x1b]0;title",
            "\x1b(",
            "\x1b]\x1b",
            "[    1.000000] a lie: ",
            "<4>",
        ]
        .map(|text| text.as_bytes().to_vec())
        .into();
        hide.push(vec![b'x'; MAX_LINE]);
        hide.push(vec![b'x'; 3 << 20]);
        for mut bytes in hide {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(30)]).into_owned();
            bytes.extend_from_slice(bug.as_bytes());
            bytes.extend_from_slice(b"\r\n");
            let lines = lines(&[&bytes]);
            assert_eq!(lines.last().map(String::as_str), Some(bug), "{shown:?}");
        }
        let told = format!("{CONSOLE_PREFIX}{{\"quotes\":\"{bug}\"}}");
        assert_eq!(lines(&[told.as_bytes()]), [told.as_str()]);
        assert_eq!(lines(&[b"array[12345.678901] x[    1.5] y"]).len(), 2);
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
