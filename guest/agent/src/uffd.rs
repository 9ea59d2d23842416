// SPDX-License-Identifier: MIT OR Apache-2.0
//! userfaultfd: a thread of the process serves its page faults (Documentation/admin-guide/mm/userfaultfd.rst).
#![allow(unsafe_code)] // ioctls, and a system call without a safe form

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::memory::{Mapping, PAGE, Pattern};
use crate::outcome::{Checked, Doing, Failure};

/// linux/userfaultfd.h; all of it little structures.
mod abi {
    #[repr(C)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }
    #[repr(C)]
    pub(super) struct Range {
        pub(super) start: u64,
        pub(super) len: u64,
    }
    #[repr(C)]
    pub(super) struct Register {
        pub(super) range: Range,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }
    #[repr(C)]
    pub(super) struct Copy {
        pub(super) dst: u64,
        pub(super) src: u64,
        pub(super) len: u64,
        pub(super) mode: u64,
        pub(super) copied: i64,
    }
    #[repr(C)]
    pub(super) struct WriteProtect {
        pub(super) range: Range,
        pub(super) mode: u64,
    }
    pub(super) const API: u64 = 0xaa;
    pub(super) const MISSING: u64 = 1;
    pub(super) const WP: u64 = 2;
    pub(super) const PROTECT: u64 = 1;
    pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
    pub(super) const FLAG_WP: u64 = 2;
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);
    nix::ioctl_readwrite!(write_protect, 0xaa, 0x06, WriteProtect);
}

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Pages that are not there.
    Missing,
    /// Writes to pages that were protected.
    WriteProtect,
}

/// A descriptor by which ranges are registered, and through which their faults are told.
pub(crate) struct Uffd(File);

impl Uffd {
    /// One without any range yet.
    pub(crate) fn new() -> Checked<Self> {
        // SAFETY: a system call with plain numbers; what it returns is a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = match Errno::result(fd) {
            Err(errno @ (Errno::ENOSYS | Errno::EPERM)) => {
                return Err(Failure::Skip(format!("userfaultfd: {errno}")));
            }
            other => other.doing("userfaultfd")?,
        };
        // SAFETY: a descriptor that was made just now, and is nobody else's.
        let fd = unsafe { File::from_raw_fd(fd as RawFd) };
        let mut api = abi::Api { api: abi::API, features: 0, ioctls: 0 };
        // SAFETY: as everywhere below, the structure is the one that the ioctl's number names, and lives through the call.
        unsafe { abi::api(fd.as_raw_fd(), &mut api) }.doing("UFFDIO_API")?;
        Ok(Self(fd))
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Registers a part of a mapping, all of which must be mapped.
    pub(crate) fn register(&self, map: &Mapping, at: usize, bytes: usize, mode: Mode) -> Checked {
        let bits = if mode == Mode::Missing { abi::MISSING } else { abi::WP };
        let range = abi::Range { start: map.at(at), len: bytes as u64 };
        let mut register = abi::Register { range, mode: bits, ioctls: 0 };
        // SAFETY: see `new`.
        match unsafe { abi::register(self.raw(), &mut register) } {
            Err(Errno::EINVAL) if mode == Mode::WriteProtect => {
                Err(Failure::Skip("this kernel does not have write protection by userfaultfd".to_owned()))
            }
            other => other.doing("UFFDIO_REGISTER").map(drop),
        }
    }

    /// Registered no more: what was protected can be written again.
    pub(crate) fn unregister(&self, map: &Mapping, at: usize, bytes: usize) -> Checked {
        let mut range = abi::Range { start: map.at(at), len: bytes as u64 };
        // SAFETY: see `new`.
        unsafe { abi::unregister(self.raw(), &mut range) }.doing("UFFDIO_UNREGISTER").map(drop)
    }

    /// Protects pages that are present from writing, or lets them be written again.
    pub(crate) fn protect(&self, map: &Mapping, at: usize, bytes: usize, on: bool) -> Checked {
        let range = abi::Range { start: map.at(at), len: bytes as u64 };
        let mut wp = abi::WriteProtect { range, mode: if on { abi::PROTECT } else { 0 } };
        // SAFETY: see `new`.
        match unsafe { abi::write_protect(self.raw(), &mut wp) } {
            // 6.1 takes no range of several mappings, which pages with different advice are.
            Err(Errno::ENOENT) if bytes > PAGE => {
                (at..at + bytes).step_by(PAGE).try_for_each(|page| self.protect(map, page, PAGE, on))
            }
            other => other.doing("UFFDIO_WRITEPROTECT").map(drop),
        }
    }

    /// The next fault that waits to be served, if there is one.
    pub(crate) fn fault(&self) -> Checked<Option<Fault>> {
        // struct uffd_msg: an event, and for a fault its flags and address.
        let mut message = [0_u8; 32];
        match (&self.0).read(&mut message) {
            Ok(32) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            other => return Err(Failure::wrong(format!("read of a userfaultfd: {other:?}"))),
        }
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|index| message[at + index]));
        let address = word(16) & !(PAGE as u64 - 1);
        let fault = Fault { address, protected: word(8) & abi::FLAG_WP != 0 };
        Ok((message[0] == abi::EVENT_PAGEFAULT).then_some(fault))
    }
}

/// A fault that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// Of its page.
    pub(crate) address: u64,
    /// It would write to a page that is protected.
    pub(crate) protected: bool,
}

/// Who serves the faults of one mapping.
pub(crate) struct Server<'m> {
    uffd: Uffd,
    map: &'m Mapping,
    /// What a page that is not there is filled with.
    pattern: Pattern,
    /// A page to copy from.
    page: Mapping,
    served: Mutex<BTreeSet<u64>>,
    stop: AtomicBool,
}

impl<'m> Server<'m> {
    /// Registers all of a mapping.
    pub(crate) fn new(map: &'m Mapping, mode: Mode, pattern: Pattern) -> Checked<Self> {
        let uffd = Uffd::new()?;
        uffd.register(map, 0, map.bytes(), mode)?;
        Ok(Self {
            uffd,
            map,
            pattern,
            page: Mapping::small(PAGE).doing("mmap")?,
            served: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    /// Protects a part from writing, or lets it be written again.
    pub(crate) fn protect(&self, at: usize, bytes: usize, on: bool) -> Checked {
        self.uffd.protect(self.map, at, bytes, on)
    }

    /// Whether a fault of the page at this offset was served.
    pub(crate) fn has_served(&self, at: usize) -> bool {
        let served = self.served.lock();
        served.is_ok_and(|served| served.contains(&(self.map.at(at) & !(PAGE as u64 - 1))))
    }

    /// Ends [`Server::run`].
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Serves faults until [`Server::stop`].
    pub(crate) fn run(&self) -> Checked {
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(self.uffd.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(10_u8)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                other => other.doing("poll")?,
            };
            if let Some(fault) = self.uffd.fault()? {
                self.serve(fault)?;
            }
        }
        Ok(())
    }

    fn serve(&self, Fault { address, protected }: Fault) -> Checked {
        if let Ok(mut served) = self.served.lock() {
            served.insert(address);
        }
        let at = address.wrapping_sub(self.map.at(0)) as usize;
        if protected {
            return self.protect(at, PAGE, false);
        }
        self.page.fill(0, PAGE, self.pattern.from(at));
        let (src, len) = (self.page.at(0), PAGE as u64);
        let mut copy = abi::Copy { dst: address, src, len, mode: 0, copied: 0 };
        // SAFETY: see `new`; it fills a page that is not there, of a mapping where no Rust object lives.
        match unsafe { abi::copy(self.uffd.raw(), &mut copy) } {
            // Somebody was faster, or the mapping changes: the fault comes again.
            Ok(_) | Err(Errno::EEXIST | Errno::EAGAIN | Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno).doing("UFFDIO_COPY"),
        }
    }
}
