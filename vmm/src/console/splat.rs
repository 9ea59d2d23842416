// SPDX-License-Identifier: MIT OR Apache-2.0
//! Recognises what a kernel prints when something is wrong with it, and collects the block that belongs to it.

use std::collections::VecDeque;

use super::lines::printk;

/// What kind of complaint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplatKind {
    /// The kernel hit something that it cannot go on from: bad pointer, BUG(), general protection.
    Oops,
    /// WARN() and other checks after which the kernel goes on.
    Warn,
    /// KASAN, KFENCE, KMSAN, KCSAN.
    Sanitizer,
    /// lockdep, RCU lock checks.
    Lockdep,
    /// The hung-task detector.
    HungTask,
    /// Lockup detectors and RCU stalls: a CPU does not get on.
    Stall,
    /// kmemleak.
    Leak,
    /// A panic. After another splat it is that one's end; alone it is the guest's.
    Panic,
    /// lockdep has run out of its tables and has turned itself off: nobody's fault, but from here on it sees nothing.
    Blind,
}

/// A complaint with its block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Splat {
    /// What kind.
    pub kind: SplatKind,
    /// The line by which it was recognised and the function it names, without the time.
    pub summary: String,
    /// The block, without times.
    pub lines: Vec<String>,
}

/// How a text is looked for in a line.
#[derive(Clone, Copy, Debug)]
enum At {
    /// The line begins with it.
    Start(&'static str),
    /// The line has it somewhere.
    Anywhere(&'static str),
    /// The line begins with the first and has the second.
    Both(&'static str, &'static str),
}

impl At {
    fn matches(self, line: &str) -> bool {
        match self {
            Self::Start(text) => line.starts_with(text),
            Self::Anywhere(text) => line.contains(text),
            Self::Both(start, text) => line.starts_with(start) && line.contains(text),
        }
    }
}

use At::{Anywhere, Both, Start};
use SplatKind::{Blind, HungTask, Leak, Lockdep, Oops, Panic, Sanitizer, Stall, Warn};

/// What is looked for; the first that matches counts.
const PATTERNS: &[(At, SplatKind)] = &[
    (Start("BUG: KASAN:"), Sanitizer),
    (Start("BUG: KFENCE:"), Sanitizer),
    (Start("BUG: KMSAN:"), Sanitizer),
    (Start("BUG: KCSAN:"), Sanitizer),
    (Start("UBSAN:"), Warn),
    (Anywhere("possible circular locking dependency detected"), Lockdep),
    (Anywhere("possible recursive locking detected"), Lockdep),
    (Anywhere("possible irq lock inversion dependency detected"), Lockdep),
    (Anywhere("-unsafe lock order detected"), Lockdep),
    (Anywhere("inconsistent lock state"), Lockdep),
    (Anywhere("bad unlock balance detected"), Lockdep),
    (Anywhere("bad contention detected"), Lockdep),
    (Anywhere("held lock freed!"), Lockdep),
    (Anywhere("lock held when returning to user space!"), Lockdep),
    (Anywhere("still has locks held!"), Lockdep),
    (Anywhere("Nested lock was not taken"), Lockdep),
    (Anywhere("suspicious RCU usage"), Lockdep),
    (Anywhere("Invalid wait context"), Lockdep),
    (Start("INFO: trying to register non-static key"), Lockdep),
    (Start("BUG: MAX_LOCK_DEPTH too low"), Lockdep),
    (Start("BUG: MAX_LOCKDEP_"), Blind),
    (Start("BUG: MAX_STACK_TRACE_ENTRIES too low"), Blind),
    (Both("INFO: task ", "blocked for more than"), HungTask),
    (Both("INFO: task ", "blocked in I/O wait for more than"), HungTask),
    (Anywhere("BUG: soft lockup"), Stall),
    (Anywhere("BUG: workqueue lockup"), Stall),
    (Anywhere("hard LOCKUP on cpu"), Stall),
    (Both("rcu: INFO:", "detected stalls on"), Stall),
    (Both("rcu: INFO:", "self-detected stall on"), Stall),
    (Both("rcu: INFO:", "detected expedited stalls on"), Stall),
    // Told one by one if kmemleak is verbose; how many there were stands behind them.
    (Both("kmemleak:", "unreferenced object"), Leak),
    (Both("kmemleak:", "new suspected memory leaks"), Leak),
    (Start("BUG: sleeping function called from invalid context"), Warn),
    (Start("BUG: scheduling while atomic"), Warn),
    (Start("BUG: using "), Warn),
    (Start("BUG: Bad "), Warn),
    (Start("BUG: non-zero pgtables_bytes"), Warn),
    (Start("kernel BUG at "), Oops),
    (Start("BUG: "), Oops),
    (Start("Oops"), Oops),
    (Start("Internal error:"), Oops),
    (Start("Unable to handle kernel"), Oops),
    (Start("general protection fault"), Oops),
    (Start("divide error:"), Oops),
    (Start("invalid opcode:"), Oops),
    (Start("int3:"), Oops),
    (Start("stack segment:"), Oops),
    (Start("traps: PANIC: double fault"), Oops),
    (Start("PANIC: double fault"), Oops),
    (Both("WARNING: CPU: ", " at "), Warn),
    // From 7.0 on: WARNING: mm/file.c:123 at function+0x1/0x2, CPU#0: task/123
    (Both("WARNING: ", " at "), Warn),
    (Start("Kernel panic - not syncing"), Panic),
];

/// Lines that, inside a block of an oops, belong to it though they look like the beginning of another.
const CONTINUES: &[At] = &[
    Start("Oops"),
    Start("general protection fault"),
    Start("Kernel panic - not syncing"),
    Start("invalid opcode:"),
    Start("Internal error:"),
    Start("BUG: kernel NULL pointer"),
    Start("BUG: unable to handle"),
];

/// Lines that end a block.
const ENDS: &[At] = &[Start("---[ end trace"), Start("---[ end Kernel panic")];

/// Longest block kept.
pub const MAX_BLOCK: usize = 256;
/// How many beginnings are remembered, so that a program that prints the kernel's log does not make them again.
const MAX_SEEN: usize = 256;

/// Finds splats in a stream of lines.
#[derive(Debug, Default)]
pub struct Recogniser {
    open: Option<Splat>,
    /// A line of equal signs or `cut here` just before, which belongs to the block.
    lead: Option<String>,
    seen: VecDeque<String>,
    /// The open block was printed before.
    again: bool,
}

impl Recogniser {
    /// Takes a line; gives the splats that it ends.
    ///
    /// Only lines of the kernel count, which begin with a time (the kernel is started with `printk.time=1`).
    pub fn line(&mut self, line: &str) -> Option<Splat> {
        let (time, text) = printk(line)?;
        let kind = recognise(text);
        if let Some(open) = &mut self.open {
            if belongs(open, text, kind) {
                push(open, text);
                if ENDS.iter().any(|end| end.matches(text))
                    || open.lines.len() >= MAX_BLOCK
                    || ends(open, text)
                {
                    return self.take();
                }
                return None;
            }
        }
        let ended = self.take();
        match kind {
            Some(kind) => self.begin(kind, time, text),
            None => self.lead = is_lead(text).then(|| text.to_owned()),
        }
        ended
    }

    /// Nothing came for a while, or the console ended: a block without an end marker ends here.
    pub fn idle(&mut self) -> Option<Splat> {
        self.take()
    }

    /// Whether a block is being collected.
    #[must_use]
    pub fn collecting(&self) -> bool {
        self.open.is_some()
    }

    fn begin(&mut self, kind: SplatKind, time: &str, text: &str) {
        let lead = self.lead.take();
        let key = format!("{time} {text}");
        self.again = self.seen.contains(&key);
        if !self.again {
            if self.seen.len() == MAX_SEEN {
                self.seen.pop_front();
            }
            self.seen.push_back(key);
        }
        let mut lines: Vec<String> = lead.into_iter().collect();
        lines.push(text.to_owned());
        // Some stand in brackets of their own: [ BUG: Invalid wait context ]
        let boxed = text.strip_prefix("[ ").and_then(|text| text.strip_suffix(" ]"));
        self.open = Some(Splat { kind, summary: boxed.unwrap_or(text).trim().to_owned(), lines });
    }

    fn take(&mut self) -> Option<Splat> {
        let mut splat = self.open.take().filter(|_| !self.again)?;
        let more = match splat.kind {
            Lockdep => locks(&splat.lines),
            HungTask => blocker(&splat.lines),
            Leak => leaked(&splat.lines),
            _ => None,
        };
        // Sanitizers say where it was, and so does lockdep with its locks.
        let told = splat.summary.contains("+0x") || (splat.kind == Lockdep && more.is_some());
        if let Some(place) = place(&splat.lines).filter(|_| !told) {
            splat.summary.push_str(" in ");
            splat.summary.push_str(&place);
        }
        if let Some(more) = more {
            splat.summary.push_str(": ");
            splat.summary.push_str(&more);
        }
        Some(splat)
    }
}

/// What kind of splat the line begins, if any.
fn recognise(text: &str) -> Option<SplatKind> {
    PATTERNS.iter().find(|(at, _)| at.matches(text)).map(|&(_, kind)| kind)
}

fn is_lead(text: &str) -> bool {
    text.contains("[ cut here ]") || (text.len() > 20 && text.bytes().all(|byte| byte == b'='))
}

fn belongs(open: &Splat, text: &str, kind: Option<SplatKind>) -> bool {
    match kind {
        None => !text.contains("[ cut here ]"),
        // lockdep says what it found twice in some reports; a stall report has several lines that look like new ones.
        // kmemleak tells of one object after the other, and then of their number.
        Some(kind) if kind == open.kind && matches!(kind, Lockdep | Stall | Leak) => true,
        Some(_) => matches!(open.kind, Oops | Sanitizer) && CONTINUES.iter().any(|line| line.matches(text)),
    }
}

/// Whether `text` ends a block in its own way.
fn ends(open: &Splat, text: &str) -> bool {
    match open.kind {
        // KASAN's report stands between two lines of equal signs.
        Sanitizer => open.lines.len() > 3 && is_lead(text),
        // lockdep's last word is the stack of the task that it caught.
        Lockdep => {
            text.trim() == "</TASK>" && open.lines.iter().any(|line| line.starts_with("stack backtrace"))
        }
        Leak => text.contains("new suspected memory leaks"),
        _ => false,
    }
}

fn push(open: &mut Splat, text: &str) {
    if open.lines.len() < MAX_BLOCK {
        open.lines.push(text.to_owned());
    }
}

/// The function in which it happened: RIP on x86, else the first of the call trace that is not the reporting itself.
fn place(lines: &[String]) -> Option<String> {
    let rip = lines.iter().find_map(|line| frame(line.split_once("RIP: 0010:")?.1));
    let place = rip.or_else(|| {
        let at = lines.iter().position(|line| line.trim_start().starts_with("Call Trace:"))?;
        lines[at + 1..].iter().map(|line| line.trim()).find_map(|line| {
            let name = line.split('+').next()?;
            let reporting = REPORTING.iter().any(|prefix| name.starts_with(prefix));
            if reporting || !line.contains("+0x") { None } else { frame(line) }
        })
    })?;
    // Raw addresses say nothing to anybody.
    (!place.starts_with("0x")).then(|| place.to_owned())
}

/// How names of functions begin in which nothing happens but the report, or the waiting.
const REPORTING: &[&str] = &[
    "<",
    "?",
    "dump_stack",
    "print_",
    "kasan_",
    "__schedule",
    "schedule",
    "lock_acquire",
    "__lock_acquire",
    "check_",
    "validate_chain",
    "lockdep_",
];

/// `function+0x1/0x2` at the beginning of a text, with the module behind it.
fn frame(text: &str) -> Option<&str> {
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    let module = text[end..].strip_prefix(" [").and_then(|rest| rest.find(']')).map_or(0, |close| close + 3);
    Some(text[..end + module].trim()).filter(|frame| !frame.is_empty())
}

/// Who wanted which lock, and held which.
fn locks(lines: &[String]) -> Option<String> {
    let lock = |mark: &str| {
        let at = lines.iter().position(|line| line.trim_end().ends_with(mark))?;
        // An address, or a hash of one, comes first.
        let (_, lock) = lines.get(at + 1)?.split_once('(')?;
        Some((at, format!("({lock}")))
    };
    let (at, wanted) = lock("is trying to acquire lock:")?;
    let who = lines[at].split_whitespace().next()?;
    let held = lock("already holding lock:").map_or(String::new(), |(_, held)| format!(", holding {held}"));
    Some(format!("{who} wants {wanted}{held}"))
}

/// What a hung task waits for, where the kernel knows the holder: `blocked on a mutex likely owned by task agent:91`.
fn blocker(lines: &[String]) -> Option<String> {
    lines.iter().filter(|line| line.starts_with("INFO: task ")).find_map(|line| {
        let at = line.find(" blocked on a")?;
        Some(line[at + 1..].trim_end_matches('.').to_owned())
    })
}

/// Who made what was left behind: of the first object the first function that is not the allocator.
fn leaked(lines: &[String]) -> Option<String> {
    const ALLOCATOR: &[&str] =
        &["kmem", "__kmalloc", "kmalloc", "__kvmalloc", "slab", "__alloc", "alloc_", "kasan"];
    let at = lines.iter().position(|line| line.contains("backtrace (crc"))?;
    let maker =
        lines[at + 1..].iter().map(|line| line.trim_start_matches("kmemleak:").trim()).find(|line| {
            // The code of a module that is gone has no name any more: its lines are found by the address.
            let place = line.contains("+0x") || line.starts_with("0xffffffff");
            place && !ALLOCATOR.iter().any(|name| line.starts_with(name))
        })?;
    Some(format!("the first was made in {maker}"))
}

#[cfg(test)]
#[path = "splat_test.rs"]
mod tests;
