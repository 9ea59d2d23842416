// SPDX-License-Identifier: MIT OR Apache-2.0
//! Gates, from the guest's side: which stand where, who has which role, and the gates in user space.
//!
//! The witness keeps them; on a host without one (tests) nobody is ever held.
#![allow(unsafe_code)] // ioctls

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_protocol::ScenarioPlan;
use nix::errno::Errno;
use vgpu_spec::gate::{
    Arm, Local, NR_CLEAR, NR_DISARM, PLACE_BYTES, Point, ROLE_BYTES, Role, SITE_LOCAL, SITE_RECORD,
    SITE_WATCH, Site,
};
use vgpu_spec::uapi::WITNESS_MAGIC;

use crate::outcome::{Checked, Doing, Failure};
use crate::process::Pause;

nix::ioctl_write_ptr!(ioctl_add, WITNESS_MAGIC, 2, Site);
nix::ioctl_write_ptr!(ioctl_arm, WITNESS_MAGIC, 3, Arm);
nix::ioctl_none!(ioctl_disarm, WITNESS_MAGIC, NR_DISARM);
nix::ioctl_none!(ioctl_clear, WITNESS_MAGIC, NR_CLEAR);
nix::ioctl_write_ptr!(ioctl_role, WITNESS_MAGIC, 6, Role);
nix::ioctl_write_ptr!(ioctl_point, WITNESS_MAGIC, 7, Point);
nix::ioctl_readwrite!(ioctl_local, WITNESS_MAGIC, 8, Local);

/// Heartbeats after which a gate lets go that the guest itself should open: half a second.
const LOCAL_LIMIT: u32 = 5;

/// The gates of this guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gates<'a> {
    witness: Option<&'a File>,
}

/// A name in a field of the witness's, which ends with a zero byte.
fn field<const N: usize>(name: &str) -> Checked<[u8; N]> {
    let mut bytes = [0; N];
    let part = bytes.get_mut(..name.len()).filter(|_| name.len() < N);
    part.ok_or_else(|| Failure::wrong(format!("{name:?} is longer than {} bytes", N - 1)))?
        .copy_from_slice(name.as_bytes());
    Ok(bytes)
}

impl<'a> Gates<'a> {
    /// Those that a file of the witness gives, which init opened; or none.
    pub(crate) fn new(witness: Option<&'a File>) -> Self {
        Self { witness }
    }

    /// The calling thread is called this from now on; nothing if the name is empty, as it is to be when one of many threads ends.
    pub(crate) fn role(&self, name: &str) -> Checked {
        let role = Role { name: field::<ROLE_BYTES>(name)? };
        let Some(witness) = self.witness else { return Ok(()) };
        // SAFETY: the structure is the one that the ioctl's number names, and lives through the call.
        unsafe { ioctl_role(witness.as_raw_fd(), &role) }.map(drop).doing("role")
    }

    /// A gate in user space: waits until it is opened, if it stands there and is closed.
    pub(crate) fn point(&self, name: &str) -> Checked {
        let point = Point { name: field(name)? };
        let Some(witness) = self.witness else { return Ok(()) };
        loop {
            // SAFETY: as for the role.
            match unsafe { ioctl_point(witness.as_raw_fd(), &point) } {
                Err(Errno::EINTR) => {}
                other => return other.map(drop).doing("gate"),
            }
        }
    }

    fn add(&self, id: u32, flags: u32, place: &str, gives: &str) -> Checked<Result<(), Errno>> {
        let site =
            Site { id, flags, place: field::<PLACE_BYTES>(place)?, gives: field::<ROLE_BYTES>(gives)? };
        let Some(witness) = self.witness else { return Ok(Err(Errno::ENODEV)) };
        // SAFETY: as for the role.
        Ok(unsafe { ioctl_add(witness.as_raw_fd(), &site) }.map(drop))
    }

    /// Sets up the gates of a scenario. What is not there is skipped if it may be, else the scenario cannot be tried here.
    ///
    /// The kernel looks through all its functions for each; under emulation that may take seconds. `told` is called after each, so
    /// that nobody takes it for a hang.
    pub(crate) fn set_up(&self, plan: &ScenarioPlan, told: &dyn Fn(u64)) -> Checked<GatesUp<'a>> {
        let up = GatesUp(*self);
        for (done, site) in plan.sites.iter().enumerate() {
            told(done as u64);
            let record = if site.record { SITE_RECORD } else { 0 };
            let watch = if site.watch { SITE_WATCH } else { 0 };
            match self.add(site.id, record | watch, &site.place, &site.gives)? {
                Ok(()) => {}
                Err(Errno::ENOENT | Errno::EINVAL) if site.optional => {}
                Err(errno) => return Err(cannot(&site.place, errno)),
            }
        }
        Ok(up)
    }

    fn arm(&self, iteration: u64, limit: u32) -> Checked {
        let Some(witness) = self.witness else { return Ok(()) };
        let arm = Arm { iteration, limit, reserved: 0 };
        // SAFETY: as for the role.
        unsafe { ioctl_arm(witness.as_raw_fd(), &arm) }.map(drop).doing("arm the gates")
    }

    fn disarm(&self) {
        let Some(witness) = self.witness else { return };
        // SAFETY: no argument.
        let _ = unsafe { ioctl_disarm(witness.as_raw_fd()) };
    }

    /// Takes all gates away, whoever set them up.
    pub(crate) fn clear(&self) -> Result<(), Errno> {
        let Some(witness) = self.witness else { return Ok(()) };
        // SAFETY: no argument.
        unsafe { ioctl_clear(witness.as_raw_fd()) }.map(drop)
    }

    /// Whether there is such a place, and a witness; it is a gate from then on.
    fn stands(&self, id: u32, flags: u32, place: &str, whom: &str) -> Checked<bool> {
        match self.add(id, flags, place, whom)? {
            Ok(()) => Ok(true),
            Err(Errno::ENODEV | Errno::ENOENT | Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(false),
            Err(errno) => Err(errno).doing(place),
        }
    }

    /// As [`hold`](Self::hold), for those who have come back from another function before: whoever did is `whom` from then on.
    pub(crate) fn hold_after(&self, before: &str, place: &str, whom: &str) -> Checked<Option<Hold<'a>>> {
        let up = GatesUp(*self);
        if self.stands(1, SITE_RECORD, before, whom)? { self.hold_in(up, place, whom) } else { Ok(None) }
    }

    /// A gate that the caller itself opens, for tasks of this role, or for all. Open at first. None where there is no such
    /// place, or no witness.
    pub(crate) fn hold(&self, place: &str, whom: &str) -> Checked<Option<Hold<'a>>> {
        self.hold_in(GatesUp(*self), place, whom)
    }

    fn hold_in(&self, up: GatesUp<'a>, place: &str, whom: &str) -> Checked<Option<Hold<'a>>> {
        if !self.stands(0, SITE_LOCAL, place, whom)? {
            return Ok(None);
        }
        self.arm(0, LOCAL_LIMIT)?;
        Hold::new(&Arc::new(up), 0).map(Some)
    }

    /// Two of them, at two places, for two roles.
    pub(crate) fn hold_two(
        &self,
        first: (&str, &str),
        second: (&str, &str),
    ) -> Checked<Option<(Hold<'a>, Hold<'a>)>> {
        let up = GatesUp(*self);
        if !self.stands(0, SITE_LOCAL, first.0, first.1)?
            || !self.stands(1, SITE_LOCAL, second.0, second.1)?
        {
            return Ok(None);
        }
        self.arm(0, LOCAL_LIMIT)?;
        let up = Arc::new(up);
        Ok(Some((Hold::new(&up, 0)?, Hold::new(&up, 1)?)))
    }
}

fn cannot(place: &str, errno: Errno) -> Failure {
    let why = match errno {
        Errno::ENODEV => "there is no witness",
        Errno::ENOENT => "there is no such function in this kernel and driver, or it cannot be traced",
        Errno::EOPNOTSUPP => {
            "this kernel is built without CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS, so that no function can be a gate"
        }
        Errno::ENOSPC => "too many functions are gates already",
        Errno::EEXIST => "there is one already",
        _ => errno.desc(),
    };
    Failure::wrong(format!("no gate at {place}: {why}"))
}

/// Gates that are set up. They go when this is dropped.
#[derive(Debug)]
pub(crate) struct GatesUp<'a>(Gates<'a>);

impl GatesUp<'_> {
    /// A repetition begins: the gates are closed.
    pub(crate) fn arm(&self, iteration: u64, limit: u32) -> Checked {
        self.0.arm(iteration, limit)
    }

    /// It has ended.
    pub(crate) fn disarm(&self) {
        self.0.disarm();
    }
}

impl Drop for GatesUp<'_> {
    fn drop(&mut self) {
        // Who does not leave a watched function is found by the watchdog.
        let _ = self.0.clear();
    }
}

/// A gate at which tasks are held until the caller opens it, for half a second at the most.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    up: Arc<GatesUp<'a>>,
    id: u32,
}

impl<'a> Hold<'a> {
    fn new(up: &Arc<GatesUp<'a>>, id: u32) -> Checked<Self> {
        let hold = Self { up: Arc::clone(up), id };
        hold.open()?;
        Ok(hold)
    }

    fn local(&self, what: u32) -> Checked<Local> {
        let mut local = Local { id: self.id, what, ..Local::default() };
        let witness = self.up.0.witness.ok_or_else(|| Failure::wrong("no witness"))?;
        // SAFETY: the structure is the one that the ioctl's number names, and lives through the call.
        unsafe { ioctl_local(witness.as_raw_fd(), &mut local) }.doing("look at a gate")?;
        Ok(local)
    }

    /// Waits until a task is held there. False if none comes within `patience`.
    pub(crate) fn wait(&self, patience: Duration) -> Checked<bool> {
        let until = Instant::now() + patience;
        let mut pause = Pause::default();
        while self.local(0)?.waiting == 0 {
            if Instant::now() > until {
                return Ok(false);
            }
            pause.take();
        }
        Ok(true)
    }

    /// Lets everybody through.
    pub(crate) fn open(&self) -> Checked {
        self.local(1).map(drop)
    }

    /// Lets one of those who wait through, and waits for the next one. False if none comes within `patience`.
    pub(crate) fn admit(&self, patience: Duration) -> Checked<bool> {
        let before = self.local(3)?.reached;
        let until = Instant::now() + patience;
        let mut pause = Pause::default();
        while self.local(0)?.reached == before {
            if Instant::now() > until {
                return Ok(false);
            }
            pause.take();
        }
        Ok(true)
    }

    /// Holds whoever comes from now on.
    pub(crate) fn close(&self) -> Checked {
        self.local(2).map(drop)
    }

    /// Holds whoever comes from now on, but the first `passing`. Nobody is to be there, nor to come meanwhile.
    pub(crate) fn close_behind(&self, passing: u32) -> Checked<Behind<'_>> {
        let before = self.local(2)?.reached;
        for _ in 0..passing {
            self.local(3)?;
        }
        Ok(Behind { hold: self, last: before.wrapping_add(passing) })
    }
}

/// A gate that lets some pass before it holds one.
#[derive(Debug)]
pub(crate) struct Behind<'a> {
    hold: &'a Hold<'a>,
    /// How many have come when all that pass have.
    last: u32,
}

impl Behind<'_> {
    /// Waits until one is held behind them. False if none comes within `patience`, or before it is `over`.
    pub(crate) fn wait(&self, patience: Duration, over: &dyn Fn() -> bool) -> Checked<bool> {
        let until = Instant::now() + patience;
        let mut pause = Pause::default();
        while (self.hold.local(0)?.reached.wrapping_sub(self.last) as i32) <= 0 {
            if over() || Instant::now() > until {
                return Ok(false);
            }
            pause.take();
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_witness_nobody_is_held() {
        let gates = Gates::new(None);
        gates.role("A").unwrap();
        gates.point("go").unwrap();
        assert!(gates.hold("return:hmm_range_fault", "").unwrap().is_none());
        assert!(gates.role("a-role-that-is-too-long").is_err());
        let plan = ScenarioPlan::default();
        gates.set_up(&plan, &|_| ()).unwrap().arm(0, 1).unwrap();
    }

    #[test]
    fn names_fit_or_are_refused() {
        assert_eq!(field::<4>("abc").unwrap(), *b"abc\0");
        assert!(field::<4>("abcd").is_err());
    }
}
