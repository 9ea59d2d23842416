// SPDX-License-Identifier: MIT OR Apache-2.0
//! Gates, seen from the host: what a guest's tasks say of them, and the doors that are opened for them.
//!
//! Who decides is a [`Conductor`]. It is called inside a register access of the guest, so it decides from what it knows and
//! waits for nobody; a task that is to wait finds its door closed and looks again.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use vgpu_spec::gate::{self, ROLE_BYTES, SITES, SLOTS};
use vgpu_spec::witness::Record;

/// A role: what a task is called in a scenario. Empty for a task that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Role([u8; ROLE_BYTES]);

impl Role {
    /// The role of this name; none if it is too long.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; ROLE_BYTES];
        // The last byte ends it.
        bytes.get_mut(..name.len()).filter(|_| name.len() < ROLE_BYTES)?.copy_from_slice(name.as_bytes());
        Some(Self(bytes))
    }

    fn of(words: [u64; 2]) -> Self {
        let mut bytes = [0; ROLE_BYTES];
        bytes[..8].copy_from_slice(&words[0].to_le_bytes());
        bytes[8..].copy_from_slice(&words[1].to_le_bytes());
        Self(bytes)
    }

    /// Nobody's.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0[0] == 0
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        // The guest says it: whatever it is, it becomes one word.
        self.0
            .iter()
            .take_while(|byte| **byte != 0)
            .try_for_each(|byte| f.write_char(if byte.is_ascii_graphic() { char::from(*byte) } else { '?' }))
    }
}

/// Why a task goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Its door was opened.
    Opened,
    /// It had waited too long.
    Limit,
    /// It could not sleep, and had spun long enough.
    Spun,
    /// It could not sleep, and no CPU would have been left.
    NoCpu,
    /// The repetition has ended.
    Over,
    /// The guest itself opened the gate.
    Local,
}

/// What a task, or the witness about one, has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateRecord {
    /// A repetition begins.
    Armed {
        /// Its number.
        iteration: u64,
        /// A bit for each site that there is.
        sites: u64,
        /// The guest itself opens some of them: it is no scenario.
        local: bool,
    },
    /// It has ended.
    Disarmed {
        /// Its number.
        iteration: u64,
    },
    /// A task has come to a gate.
    Reached {
        /// Which.
        site: usize,
        /// Where it waits, if it does.
        slot: Option<usize>,
        /// It cannot sleep there.
        spins: bool,
        /// Its role.
        role: Role,
        /// The function's first argument, or what it returns.
        value: u64,
    },
    /// It goes on.
    Passed {
        /// From which.
        site: usize,
        /// Where it waited.
        slot: Option<usize>,
        /// Why.
        why: Why,
        /// Its role.
        role: Role,
    },
    /// A task is asleep in a watched function.
    Blocked {
        /// Which.
        site: usize,
        /// Its role.
        role: Role,
        /// Its thread id.
        pid: u32,
    },
    /// It has left the function.
    Left {
        /// Which.
        site: usize,
        /// Its role.
        role: Role,
        /// Its thread id.
        pid: u32,
    },
    /// A task has this role from now on, or had it until now.
    Role {
        /// Which.
        role: Role,
        /// Its thread id.
        pid: u32,
        /// It has it no longer.
        gone: bool,
    },
}

impl GateRecord {
    /// Reads a record. None if it is of another kind, or makes no sense: see [`is_kind`](Self::is_kind).
    #[must_use]
    pub fn read(record: &Record) -> Option<Self> {
        let [what, first, second, value] = record.arg;
        let role = Role::of([first, second]);
        let pid = u32::try_from(value).ok();
        let site = usize::try_from(what & 0xffff).ok().filter(|site| *site < SITES);
        let slot = match what >> 16 & 0xffff {
            gate::NO_SLOT => Some(None),
            slot => usize::try_from(slot).ok().filter(|slot| *slot < SLOTS).map(Some),
        };
        Some(match record.kind {
            gate::ARMED => Self::Armed { iteration: what, sites: first, local: second != 0 },
            gate::DISARMED => Self::Disarmed { iteration: what },
            gate::REACHED => {
                Self::Reached { site: site?, slot: slot?, spins: what >> 32 & 1 != 0, role, value }
            }
            gate::PASSED => {
                let why = match u32::try_from(what >> 32 & 0xff).ok()? {
                    gate::PASS_OPENED => Why::Opened,
                    gate::PASS_LIMIT => Why::Limit,
                    gate::PASS_SPUN => Why::Spun,
                    gate::PASS_NO_CPU => Why::NoCpu,
                    gate::PASS_OVER => Why::Over,
                    gate::PASS_LOCAL => Why::Local,
                    _ => return None,
                };
                Self::Passed { site: site?, slot: slot?, why, role }
            }
            gate::BLOCKED => Self::Blocked { site: site?, role, pid: pid? },
            gate::LEFT => Self::Left { site: site?, role, pid: pid? },
            gate::ROLE => Self::Role { role, pid: pid?, gone: what & 1 != 0 },
            _ => return None,
        })
    }

    /// Whether a record is of one of these kinds.
    #[must_use]
    pub fn is_kind(kind: u32) -> bool {
        gate::RECORDS.contains(&kind)
    }
}

struct Who(Role);
impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { f.write_str("a task") } else { self.0.fmt(f) }
    }
}

impl fmt::Display for GateRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Armed { iteration, sites, .. } => {
                write!(f, "repetition {iteration} begins, {} sites", sites.count_ones())
            }
            Self::Disarmed { iteration } => write!(f, "repetition {iteration} ends"),
            Self::Reached { site, slot, role, .. } => {
                let how = if slot.is_some() { "waits at" } else { "comes to" };
                write!(f, "{} {how} gate {site}", Who(role))
            }
            Self::Passed { site, why, role, .. } => {
                let why = match why {
                    Why::Opened => "",
                    Why::Limit => ", having waited as long as a gate may stay closed",
                    Why::Spun => ", having spun as long as it may",
                    Why::NoCpu => ", since it cannot sleep and no CPU would be left",
                    Why::Over => ", since the repetition has ended",
                    Why::Local => ", which the guest opened",
                };
                write!(f, "{} goes on from gate {site}{why}", Who(role))
            }
            Self::Blocked { site, role, pid } => {
                write!(f, "{} (pid {pid}) is asleep in function {site}", Who(role))
            }
            Self::Left { site, role, pid } => write!(f, "{} (pid {pid}) has left function {site}", Who(role)),
            Self::Role { role, pid, gone: false } => write!(f, "pid {pid} is {}", Who(role)),
            Self::Role { role, pid, gone: true } => write!(f, "pid {pid} is {} no longer", Who(role)),
        }
    }
}

/// A door a slot. Closed by whoever comes to it, opened by the conductor.
#[derive(Debug)]
pub struct Doors([AtomicBool; SLOTS]);

impl Default for Doors {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicBool::new(true)))
    }
}

impl Doors {
    /// The task in a slot may go on.
    pub fn open(&self, slot: usize) {
        self.set(slot, true);
    }

    /// A task has come to it.
    pub fn close(&self, slot: usize) {
        self.set(slot, false);
    }

    fn set(&self, slot: usize, open: bool) {
        if let Some(door) = self.0.get(slot) {
            door.store(open, SeqCst);
        }
    }

    /// Whether it may. Nobody is held in a slot that does not exist.
    #[must_use]
    pub fn is_open(&self, slot: usize) -> bool {
        self.0.get(slot).is_none_or(|door| door.load(SeqCst))
    }

    pub(crate) fn open_all(&self) {
        self.0.iter().for_each(|door| door.store(true, SeqCst));
    }
}

/// Who decides which door is opened when. Called inside a register access of the guest: it must not block.
pub trait Conductor: Send + Sync {
    /// The witness has reported something, of whatever kind, and it has been judged. A task that waits has its door closed
    /// before this is called.
    fn record(&self, record: &Record, doors: &Doors);
    /// A task has found its door closed, once more.
    fn looked(&self, slot: usize, doors: &Doors);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u32, arg: [u64; 4]) -> Record {
        Record { kind, arg, ..Record::default() }
    }

    #[test]
    fn roles_are_short_words() {
        assert_eq!(Role::new("fault-worker").unwrap().to_string(), "fault-worker");
        assert!(Role::new("a-name-of-sixteen").is_none());
        assert!(Role::new("").unwrap().is_empty());
        let odd = Role::of([u64::from_le_bytes(*b"A\n\x1b[0mB\0"), 0]);
        assert_eq!(odd.to_string(), "A??[0mB");
    }

    #[test]
    fn records_are_read_or_refused() {
        let a = u64::from_le_bytes(*b"A\0\0\0\0\0\0\0");
        let reached = GateRecord::read(&record(gate::REACHED, [3 | 5 << 16 | 1 << 32, a, 0, 7])).unwrap();
        let role = Role::new("A").unwrap();
        assert_eq!(reached, GateRecord::Reached { site: 3, slot: Some(5), spins: true, role, value: 7 });
        assert_eq!(reached.to_string(), "A waits at gate 3");
        let passed = record(gate::PASSED, [3 | gate::NO_SLOT << 16 | 2 << 32, 0, 0, 0]);
        assert!(matches!(
            GateRecord::read(&passed),
            Some(GateRecord::Passed { slot: None, why: Why::Spun, .. })
        ));
        for bad in [
            record(gate::REACHED, [SITES as u64, 0, 0, 0]),
            record(gate::REACHED, [(SLOTS as u64) << 16, 0, 0, 0]),
            record(gate::PASSED, [77 << 32, 0, 0, 0]),
            record(gate::BLOCKED, [0, 0, 0, 1 << 40]),
            record(vgpu_spec::witness::HELLO, [0; 4]),
        ] {
            assert_eq!(GateRecord::read(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn doors_that_do_not_exist_hold_nobody() {
        let doors = Doors::default();
        assert!(doors.is_open(0) && doors.is_open(SLOTS));
        doors.close(0);
        doors.close(SLOTS);
        assert!(!doors.is_open(0) && doors.is_open(1) && doors.is_open(SLOTS));
        doors.open_all();
        assert!(doors.is_open(0));
    }
}
