// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parts of the kernel that only some kernels have: their files in proc and sysfs, and system calls without a safe form.
//!
//! What is not there makes a case *skipped*, with the reason; what is there and refuses makes it fail.
#![allow(unsafe_code)] // system calls by number: each block says why it may

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;

use crate::memory::PAGE;
use crate::outcome::{Checked, Doing, Failure};

/// Where there is no driver this is no guest of ours, and nothing that concerns the whole system is touched.
pub(crate) fn only_in_a_guest() -> Checked {
    let here = Path::new(vgpu_spec::uapi::DRIVER_DEVICE).exists();
    if here { Ok(()) } else { Err(Failure::Skip("there is no device node of a driver".to_owned())) }
}

/// A file of the kernel that may not be there.
fn trouble(path: &Path, error: &std::io::Error) -> Failure {
    let text = format!("{}: {error}", path.display());
    match error.kind() {
        ErrorKind::NotFound => Failure::Skip(format!("this kernel has no {}", path.display())),
        // Said by files of parts that are switched off.
        ErrorKind::Unsupported => Failure::Skip(text),
        _ => Failure::Wrong(text),
    }
}

/// What a file of the kernel says, without white space around it.
pub(crate) fn read(path: impl AsRef<Path>) -> Checked<String> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(|error| trouble(path, &error))?;
    Ok(text.trim().to_owned())
}

/// Writes to a file of the kernel.
pub(crate) fn write(path: impl AsRef<Path>, text: &str) -> Checked {
    use std::io::Write;
    let path = path.as_ref();
    let open = std::fs::OpenOptions::new().write(true).open(path);
    open.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|error| trouble(path, &error))
}

/// Settings of the kernel that are as before when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Settings(Vec<(PathBuf, String)>);

impl Settings {
    /// Changes one.
    pub(crate) fn set(&mut self, path: impl AsRef<Path>, text: &str) -> Checked {
        let path = path.as_ref();
        let before = read(path)?;
        write(path, text)?;
        // A file that offers a choice has the chosen word in brackets.
        let before = match before.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
            Some((chosen, _)) => chosen.to_owned(),
            None => before,
        };
        self.0.push((path.to_owned(), before));
        Ok(())
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (path, before) in self.0.drain(..).rev() {
            // Nobody is left to tell.
            let _ = write(&path, &before);
        }
    }
}

/// A counter of /proc/vmstat; 0 if this kernel has none of that name.
pub(crate) fn vmstat(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// Waits until `done`, at most so long; whether it came to that.
pub(crate) fn within(time: Duration, mut done: impl FnMut() -> Checked<bool>) -> Checked<bool> {
    let until = Instant::now() + time;
    loop {
        if done()? {
            return Ok(true);
        }
        if Instant::now() > until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Loads modules that came with the kernel, in this order; those already loaded or built in are passed over.
pub(crate) fn load_modules(names: &[&str]) -> Checked {
    for name in names {
        let loaded = Path::new("/sys/module").join(name.replace('-', "_"));
        let plain = Path::new(guest_protocol::MODULES_DIR).join(format!("{name}.ko"));
        let packed = Path::new(guest_protocol::MODULES_DIR).join(format!("{name}.ko.xz"));
        // Not among the files: built into this kernel, or not in it; whoever needs it finds out.
        let Some((path, flags)) = [(plain, 0), (packed, MODULE_INIT_COMPRESSED_FILE)]
            .into_iter()
            .find(|(path, _)| path.exists() && !loaded.exists())
        else {
            continue;
        };
        let file = File::open(&path).map_err(|error| trouble(&path, &error))?;
        // SAFETY: the descriptor is open through the call, and the parameters are a string with its end.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), flags) };
        match Errno::result(result) {
            Ok(_) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno).doing(&format!("load {}", path.display())),
        }
    }
    Ok(())
}

/// `MODULE_INIT_COMPRESSED_FILE` of linux/module.h.
const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;

/// Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) const PAGEMAP_SWAPPED: u64 = 1 << 62;
/// The page has been written to since the last clear_refs.
pub(crate) const PAGEMAP_SOFT_DIRTY: u64 = 1 << 55;

/// Entries of this process's pagemap for so many pages.
pub(crate) fn pagemap(address: u64, pages: usize) -> Checked<Vec<u64>> {
    use std::os::unix::fs::FileExt;
    let path = Path::new("/proc/self/pagemap");
    let file = File::open(path).map_err(|error| trouble(path, &error))?;
    let mut bytes = vec![0; pages * 8];
    file.read_exact_at(&mut bytes, address / PAGE as u64 * 8).map_err(|error| trouble(path, &error))?;
    Ok(bytes
        .chunks_exact(8)
        .map(|word| {
            u64::from_ne_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]])
        })
        .collect())
}

/// process_madvise on another process's memory; bytes advised.
pub(crate) fn process_madvise(pidfd: RawFd, address: u64, bytes: usize, advice: i32) -> Result<usize, Errno> {
    let part = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes };
    // SAFETY: the structure lives through the call; the addresses in it are another process's.
    let done = unsafe { libc::syscall(libc::SYS_process_madvise, pidfd, &raw const part, 1, advice, 0) };
    Errno::result(done).map(|done| done as usize)
}

/// perf_event_open for a breakpoint in a file's text that every process of that mapping gets (a uprobe).
///
/// The event is of the calling process only, and goes with the descriptor.
pub(crate) fn uprobe(path: &std::ffi::CStr, offset: u64) -> Checked<OwnedFd> {
    /// `struct perf_event_attr` as of its first version that has `config2` (perf_event_open(2)).
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        sample_period: u64,
        sample_type: u64,
        read_format: u64,
        flags: u64,
        wakeup_events: u32,
        bp_type: u32,
        config1: u64,
        config2: u64,
    }
    let kind = read("/sys/bus/event_source/devices/uprobe/type")?;
    let kind = kind.parse().map_err(|_| Failure::wrong(format!("the uprobe event's type is {kind:?}")))?;
    let attributes = Attributes {
        kind,
        size: size_of::<Attributes>() as u32,
        config1: path.as_ptr() as u64,
        config2: offset,
        ..Attributes::default()
    };
    const FLAG_FD_CLOEXEC: libc::c_ulong = 8;
    // SAFETY: the structure and the path in it live through the call; what it returns is a new descriptor or an error.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attributes, 0, -1, -1, FLAG_FD_CLOEXEC)
    };
    let fd = Errno::result(fd).doing("perf_event_open")?;
    // SAFETY: a descriptor that was made just now, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// swapon.
pub(crate) fn swap_on(path: &std::ffi::CStr) -> Result<(), Errno> {
    // SAFETY: a string with its end.
    Errno::result(unsafe { libc::swapon(path.as_ptr(), 0) }).map(drop)
}

/// swapoff.
pub(crate) fn swap_off(path: &std::ffi::CStr) -> Result<(), Errno> {
    // SAFETY: a string with its end.
    Errno::result(unsafe { libc::swapoff(path.as_ptr()) }).map(drop)
}

/// move_pages: the status of each page, a node or a negative error.
pub(crate) fn move_pages(addresses: &[u64], node: i32) -> Result<Vec<i32>, Errno> {
    let nodes = vec![node; addresses.len()];
    let mut status = vec![0_i32; addresses.len()];
    const MPOL_MF_MOVE: libc::c_int = 2;
    // SAFETY: three arrays of as many elements as is said, which live through the call; the pages stay where they are mapped.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addresses.len(),
            addresses.as_ptr(),
            nodes.as_ptr(),
            status.as_mut_ptr(),
            MPOL_MF_MOVE,
        )
    };
    Errno::result(done).map(|_| status)
}

/// mbind: pages of a range are to come from `node`, and those that are there go there. All of it must be mapped.
pub(crate) fn prefer_node(address: u64, bytes: usize, node: i32) -> Result<(), Errno> {
    const MPOL_PREFERRED: libc::c_int = 1;
    const MPOL_MF_MOVE: libc::c_int = 2;
    let nodes = 1_u64.checked_shl(node.unsigned_abs()).unwrap_or(0);
    // SAFETY: one word of node numbers, which lives through the call; the pages stay where they are mapped.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            address,
            bytes,
            MPOL_PREFERRED,
            &raw const nodes,
            u64::BITS,
            MPOL_MF_MOVE,
        )
    };
    Errno::result(done).map(drop)
}

/// Lets a signal come and go without an effect.
pub(crate) fn pass_over(signal: nix::sys::signal::Signal) -> Checked {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any moment.
    unsafe { sigaction(signal, &action) }.doing("sigaction").map(drop)
}

/// Writes to another process's memory as a debugger: whatever the page's rights are, the write breaks a private mapping's
/// sharing. The process must be stopped by this one.
pub(crate) fn poke(pid: Pid, address: u64, word: u64) -> Result<(), Errno> {
    nix::sys::ptrace::write(pid, address as nix::sys::ptrace::AddressType, word as libc::c_long)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_skipped_and_settings_come_back() {
        assert!(matches!(read("/proc/no-such-file"), Err(Failure::Skip(_))));
        let dir = std::env::temp_dir().join(format!("testbench-settings-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (plain, choice) = (dir.join("plain"), dir.join("choice"));
        std::fs::write(&plain, "10\n").unwrap();
        std::fs::write(&choice, "always [madvise] never\n").unwrap();
        let mut settings = Settings::default();
        settings.set(&plain, "20").unwrap();
        settings.set(&choice, "never").unwrap();
        assert!(matches!(settings.set(dir.join("none"), "1"), Err(Failure::Skip(_))));
        assert_eq!(read(&plain).unwrap(), "20");
        drop(settings);
        // A file of the kernel takes the whole of a write; an ordinary one keeps its tail.
        assert!(read(&plain).unwrap().starts_with("10"));
        assert!(read(&choice).unwrap().starts_with("madvise"));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn counters_and_pagemap() {
        assert!(vmstat("pgfault") > 0 && vmstat("no_such_counter") == 0);
        let map = crate::memory::Mapping::small(2 * PAGE).unwrap();
        map.touch(0, PAGE);
        let entries = pagemap(map.at(0), 2).unwrap();
        assert!(entries[0] >> 63 == 1 && entries[1] >> 63 == 0 && entries[0] & PAGEMAP_SWAPPED == 0);
    }
}
